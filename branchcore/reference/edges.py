"""Parents and children as index arithmetic. Letters: N parents, M children, D elements."""

import torch
from torch import Tensor


def parents(child_start: Tensor, num_children: int) -> Tensor:
    """Name the parent of each child, (N + 1,) int64 starts -> (M,) int64, without a sync."""
    children_M = torch.arange(num_children, device=child_start.device)
    return torch.searchsorted(child_start, children_M, right=True) - 1


def sum_children(values_MD: Tensor, child_start: Tensor) -> Tensor:
    """Add up the children of each parent: (M, ...) -> (N, ...), zero for a parent without any."""
    sums = values_MD.new_zeros(child_start.numel() - 1, *values_MD.shape[1:])
    return sums.index_add(0, parents(child_start, len(values_MD)), values_MD)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
