"""Group normalisation and SiLU. Letters: B images, C channels, G groups, P positions of an image.

x_BCHW stands for (B, C, T, H, W) as well; its P positions are all of H, W and T.
y = silu(z), z = weight xhat + bias, xhat = (x - mean) / sqrt(var + eps), per image and group.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu as activation

from branchcore.reference.edges import wide


def positions(x_BCHW: Tensor) -> Tensor:
    """Put channels last and flatten the rest: (B, C, H, W) or (B, C, T, H, W) -> (B, P, C)."""
    return x_BCHW.movedim(1, -1).flatten(1, -2)


def picture(y_BPC: Tensor, shape: torch.Size) -> Tensor:
    """Undo `positions`; a contiguous argument gives a tensor in channels_last."""
    num_images, num_channels, *sizes = shape
    return y_BPC.view(num_images, *sizes, num_channels).movedim(-1, 1)


def group_norm_silu(
    x_BCHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    num_groups: int,
    eps: float,
    silu: bool = True,
) -> Tensor:
    """See `branchcore.ops.group_norm_silu`."""
    x_BPC = positions(x_BCHW)
    y_BPC, _ = group_norm_silu_positions(x_BPC, weight_C, bias_C, num_groups, eps, silu)
    return picture(y_BPC, x_BCHW.shape)


def group_norm_silu_positions(
    x_BPC: Tensor, weight_C: Tensor, bias_C: Tensor, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    """Give y_BPC, and statistics_BG2: the mean and 1 / sqrt(var + eps) of every group."""
    dtype = wide(x_BPC.dtype)
    x_BPGc = x_BPC.to(dtype).unflatten(2, (num_groups, -1))
    mean_B1G1 = x_BPGc.mean((1, 3), keepdim=True)
    centred_BPGc = x_BPGc - mean_B1G1
    rstd_B1G1 = (centred_BPGc.square().mean((1, 3), keepdim=True) + eps).rsqrt()
    z_BPC = (centred_BPGc * rstd_B1G1).flatten(2) * weight_C.to(dtype) + bias_C.to(dtype)
    y_BPC = activation(z_BPC) if silu else z_BPC
    # contiguous, whatever order of axes the arithmetic has kept from x
    return y_BPC.to(x_BPC.dtype).contiguous(), torch.cat((mean_B1G1, rstd_B1G1), 3)[:, 0]


def group_norm_silu_backward(
    grad_BPC: Tensor,
    x_BPC: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    statistics_BG2: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give dx, dweight and dbias; with means over a group,

    dx = rstd (weight dz - mean(weight dz) - xhat mean(weight dz xhat)),
    dweight = sum dz xhat, dbias = sum dz over all images and positions.
    """
    dtype, split = statistics_BG2.dtype, (statistics_BG2.shape[1], -1)
    mean_B1G1, rstd_B1G1 = statistics_BG2[:, None].split(1, 3)
    weight_wide_C = weight_C.to(dtype)
    xhat_BPGc = (x_BPC.to(dtype).unflatten(2, split) - mean_B1G1) * rstd_B1G1
    xhat_BPC, dz_BPC = xhat_BPGc.flatten(2), grad_BPC.to(dtype)
    if silu:
        z_BPC = xhat_BPC * weight_wide_C + bias_C.to(dtype)
        gate_BPC = z_BPC.sigmoid()
        dz_BPC = dz_BPC * (gate_BPC * (1.0 + z_BPC * (1.0 - gate_BPC)))
    dxhat_BPGc = (dz_BPC * weight_wide_C).unflatten(2, split)
    along_BPGc = xhat_BPGc * (dxhat_BPGc * xhat_BPGc).mean((1, 3), keepdim=True)
    dx_BPGc = rstd_B1G1 * (dxhat_BPGc - dxhat_BPGc.mean((1, 3), keepdim=True) - along_BPGc)
    return (
        dx_BPGc.flatten(2).to(x_BPC.dtype).contiguous(),
        (dz_BPC * xhat_BPC).sum((0, 1)).to(weight_C.dtype),
        dz_BPC.sum((0, 1)).to(bias_C.dtype),
    )
