"""Group normalisation with SiLU of channels-last activations, as a VAE decoder has them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from branchcore import _check, _dispatch, reference, testing
from branchcore.reference.edges import wide
from branchcore.reference.group_norm_silu import picture, positions

MAX_CHANNELS = 4096
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool = True,
) -> Tensor:
    """Normalise groups of channels of every image, scale, shift, and apply SiLU.

    Args:
        x_BCHW: (B, C, H, W) in channels_last, or a video (B, C, T, H, W) in channels_last_3d; fp32
            or bf16; C <= 4096. A video's group is normalised over all of its frames.
        weight_C: (C,) fp32 or bf16.
        bias_C: (C,) fp32 or bf16.
        num_groups: must divide C.
        eps: added to the variance; 1e-6 in the autoencoders of diffusers, 1e-5 in torch.
        silu: False leaves the SiLU out, as before the attention of the middle block.

    Returns:
        x's shape, dtype and memory format. Differentiable in x_BCHW, weight_C and bias_C.

    Numerics: fp32 moments of each channel and tile, combined by Chan's formula in a fixed order
        (fp64 sums on the CPU): a mean far above the standard deviation costs the variance no more
        digits than in torch's own GroupNorm. An image's bits do not depend on its batch. One
        rounding to bf16, after the SiLU. All-fp64 input runs the reference in fp64.
    Source: Wu and He 2018, eq. 1-5; Chan, Golub, LeVeque 1983 for the statistics.
    """
    _check_images(x_BCHW)
    num_channels = x_BCHW.shape[1]
    _check_groups(num_channels, num_groups)
    _check.positive(_OP, "eps", eps)
    for name, value in (("weight_C", weight_C), ("bias_C", bias_C)):
        states = _check.states(x_BCHW)
        _check.tensor(_OP, name, value, (num_channels,), states, x_BCHW.device)
    y_BPC, _ = _forward(positions(x_BCHW), weight_C, bias_C, num_groups, eps, silu)
    return picture(y_BPC, x_BCHW.shape)


_OP = "group_norm_silu"


def _check_images(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{_OP}: x_BCHW must be a tensor, got {type(x).__name__}")
    if x.dim() not in _LAYOUTS:
        raise ValueError(
            f"{_OP}: x_BCHW must be (B, C, H, W) or (B, C, T, H, W), got {tuple(x.shape)}"
        )
    _check.tensor(_OP, "x_BCHW", x, tuple(x.shape), _check.STATE + _check.REFERENCE, x.device)
    layout = _LAYOUTS[x.dim()]
    if x.numel() > 0 and not x.is_contiguous(memory_format=layout):
        raise ValueError(
            f"{_OP}: x_BCHW must be contiguous in {layout}, got strides {x.stride()} of shape "
            f"{tuple(x.shape)}; try .to(memory_format={layout})"
        )


def _check_groups(num_channels: int, num_groups: int) -> None:
    if num_channels < 1 or num_groups < 1 or num_channels % num_groups != 0:
        raise ValueError(
            f"{_OP}: num_groups must be a divisor of C={num_channels}, got {num_groups}"
        )
    if num_channels > MAX_CHANNELS:
        raise NotImplementedError(
            f"{_OP}: x_BCHW must have at most C={MAX_CHANNELS} channels, got {num_channels}; "
            "try torch.nn.functional.group_norm"
        )


def _fake(
    x_BPC: Tensor,
    weight_C: Tensor,  # noqa: ARG001
    bias_C: Tensor,  # noqa: ARG001
    num_groups: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    y_BPC = torch.empty_like(x_BPC, memory_format=torch.contiguous_format)
    return y_BPC, x_BPC.new_empty((len(x_BPC), num_groups, 2), dtype=wide(x_BPC.dtype))


def _triton(
    x_BPC: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    outputs = _fake(x_BPC, weight_C, bias_C, num_groups)
    inputs = x_BPC.contiguous(), weight_C.contiguous(), bias_C.contiguous()
    _dispatch.triton_kernels(_OP).group_norm_silu_fwd(*inputs, eps, silu, *outputs)
    return outputs


def _cpp(
    x_BPC: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    y_BPC, statistics_BG2 = _fake(x_BPC, weight_C, bias_C, num_groups)
    parameters = _fp32(weight_C, bias_C)
    _dispatch.native().group_norm_silu(
        *_rows(x_BPC), *parameters, len(x_BPC), eps, silu, *_rows(y_BPC, statistics_BG2)
    )
    return y_BPC, statistics_BG2


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Join images: kernels for the CPU take matrices."""
    return [tensor.contiguous().flatten(0, 1) for tensor in tensors]


def _fp32(*parameters: Tensor) -> list[Tensor]:
    return [parameter.float().contiguous() for parameter in parameters]


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x_BPC, weight_C, bias_C, *_ = inputs
    return (
        torch.empty_like(x_BPC, memory_format=torch.contiguous_format),
        torch.empty_like(weight_C, memory_format=torch.contiguous_format),
        torch.empty_like(bias_C, memory_format=torch.contiguous_format),
    )


def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, silu = inputs
    outputs = _fake_backward(*inputs)
    dense = (tensor.contiguous() for tensor in tensors)
    _dispatch.triton_kernels(_OP).group_norm_silu_bwd(*dense, silu, *outputs)
    return outputs


def _cpp_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_BPC, x_BPC, weight_C, bias_C, statistics_BG2, silu = inputs
    parameters = _fp32(weight_C, bias_C)
    dx_BPC, dweight_C, dbias_C = _fake_backward(grad_BPC, x_BPC, *parameters)
    _dispatch.native().group_norm_silu_backward(
        *_rows(grad_BPC, x_BPC),
        *parameters,
        *_rows(statistics_BG2),
        len(x_BPC),
        silu,
        *_rows(dx_BPC),
        dweight_C,
        dbias_C,
    )
    return dx_BPC, dweight_C.to(weight_C.dtype), dbias_C.to(bias_C.dtype)


_forward = _dispatch.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, bool silu)"
    " -> (Tensor, Tensor)",
    {"triton": _triton, "cpp": _cpp, "reference": reference.group_norm_silu_positions},
    _fake,
)
_backward = _dispatch.define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias,"
    " Tensor statistics, bool silu) -> (Tensor, Tensor, Tensor)",
    {
        "triton": _triton_backward,
        "cpp": _cpp_backward,
        "reference": reference.group_norm_silu_backward,
    },
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BPC, weight_C, bias_C, _, _, ctx.silu = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x_BPC, weight_C, bias_C, output[1])


def _autograd(ctx: Any, grad_BPC: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad_BPC, *ctx.saved_tensors, ctx.silu), None, None, None)


_dispatch.register_autograd(_OP, _autograd, _setup_context)


F32, BF16 = torch.float32, torch.bfloat16
_SD3 = {"num_channels": 512, "num_groups": 32, "sizes": (8, 8)}


def _build(
    sizes: tuple[int, ...] = (9, 9),
    num_images: int = 2,
    num_channels: int = 64,
    num_groups: int = 16,
    silu: bool = True,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    mean: float = 0.5,
    strided: bool = False,
) -> testing.Inputs:
    x_BPC = testing.normal((num_images, *sizes, num_channels), F32, 0) * 1.5 + mean
    weight_C = 1.0 + 0.5 * testing.normal((num_channels,), F32, 1, strided)
    return {
        "x_BCHW": x_BPC.to(dtypes[0]).movedim(-1, 1),
        "weight_C": weight_C.to(dtypes[1]),
        "bias_C": testing.normal((num_channels,), dtypes[1], 2, strided),
        "num_groups": num_groups,
        "eps": 1e-6,
        "silu": silu,
    }


def _images(inputs: testing.Inputs) -> Iterator[testing.Part]:
    x_BCHW = inputs["x_BCHW"]
    for image in range(len(x_BCHW)):
        one = slice(image, image + 1)
        yield testing.Part(inputs | {"x_BCHW": x_BCHW[one]}, {"B": one})


SPEC = testing.OpSpec(
    name="group_norm_silu",
    op=group_norm_silu,
    reference=reference.group_norm_silu,
    build=_build,
    cases=(
        testing.Case("two tiles, the last ragged", {}),
        testing.Case("SD3 and FLUX: 512 channels, bf16", {**_SD3, "dtypes": (BF16, BF16)}),
        testing.Case("before attention: no SiLU", {**_SD3, "silu": False, "dtypes": (BF16, BF16)}),
        testing.Case("fp32 parameters of bf16 activations", {"dtypes": (BF16, F32)}),
        testing.Case("bf16 parameters of fp32 activations", {"dtypes": (F32, BF16)}),
        testing.Case("mean of 200 standard deviations", {"mean": 300.0}),
        testing.Case(
            "10 channels per group, C no power of two", {"num_channels": 320, "num_groups": 32}
        ),
        testing.Case(
            "one group, second stage in several steps",
            {"num_groups": 1, "sizes": (33, 32), "num_channels": 256, "num_images": 1},
        ),
        testing.Case("video", {"sizes": (3, 4, 5)}),
        testing.Case("parameters not contiguous", {"strided": True}),
        testing.Case(
            "as many channels as there may be",
            {"num_images": 1, "sizes": (3, 11), "num_channels": 4096, "num_groups": 32},
        ),
        testing.Case(
            "one position, four channels",
            {"num_images": 1, "sizes": (1, 1), "num_channels": 4, "num_groups": 1},
        ),
        testing.Case("no images", {"num_images": 0}),
        testing.Case("no positions", {"sizes": (0, 3)}),
    ),
    # two passes over x and one over y
    num_bytes=lambda inputs: 3 * testing.num_bytes(inputs["x_BCHW"]),
    results=("y_BCHW",),
    differentiable=("x_BCHW", "weight_C", "bias_C"),
    parts=_images,
    large={"num_images": 3, "sizes": (40, 40)},
)
