"""Models: adapters of diffusers transformers, and the embedded digits task."""
