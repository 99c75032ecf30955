"""What published models cost, before anything is loaded: shapes, FLOPs, bytes."""
