"""The real digits: 1797 handwritten 8 x 8 images that ship inside scikit-learn."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class RealDigits(NamedTuple):
    """Images with ink 1 and paper -1, and the two halves that the classifiers are trained on."""

    images: Tensor  # (1797, 8, 8) fp32
    labels: Tensor  # (1797,) int64
    half_a: Tensor  # (898,) int64, indices: trains the reward classifier
    half_b: Tensor  # (899,) int64, indices: trains the judge


@functools.cache
def load_real_digits() -> RealDigits:
    """Load the digits, offline.

    Raises:
        RuntimeError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise RuntimeError(
            "load_real_digits: scikit-learn must be installed, got none; "
            "try pip install 'branchcore[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 8, 8) / 8 - 1
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return RealDigits(images, torch.from_numpy(labels).long(), order[:898], order[898:])
