"""Whole training scripts for the families of real models, one file each.

The pipeline's folder, then that of the run:

    python -m branchcore.examples.train_sd3 /models/stable-diffusion-3.5-medium runs/red
"""
