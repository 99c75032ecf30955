"""How a Triton kernel is started: on its tensors' device, with errors that name it."""

from typing import Any

import torch

LIMIT = 2**31 - 1


def launch_grid(
    kernel: Any, programs: int | tuple[int, int], *arguments: Any, **constants: Any
) -> None:
    """Start a program per place of the grid, nothing for an empty one.

    The first argument is a tensor on the device of the launch.

    Raises:
        ValueError: the grid is larger than a GPU takes.
        RuntimeError: the launch failed.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return
    name = kernel.fn.__name__
    if grid[0] > LIMIT:
        raise ValueError(
            f"{name}: programs must be at most 2^31 - 1, got {grid[0]}; try fewer rows in a call"
        )
    with torch.cuda.device_of(arguments[0]):
        try:
            kernel[grid](*arguments, enable_fp_fusion=True, **constants)
        except RuntimeError as error:
            raise RuntimeError(
                f"{name}: launch failed, got {str(error)!r}; try python -m branchcore doctor"
            ) from error
