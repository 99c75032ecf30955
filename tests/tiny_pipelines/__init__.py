"""Tiny diffusers pipelines with random weights: real classes, real tokenizers, no download."""
