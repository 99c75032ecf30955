"""A trainer that knows nothing of branchcore, and what becomes of it at three depths."""
