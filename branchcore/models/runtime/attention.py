"""Chooses who computes attention: one of diffusers' backends, tried before it is trusted."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from branchcore.models.cross_attention import CrossAttention
from branchcore.models.flow_model import FlowModel
from branchcore.models.runtime.change import Change
from branchcore.models.runtime.probe import Case, Mask, probe
from branchcore.models.softmax_attention import JointAttention

DISPATCHING: dict[str, Callable[[], Any]] = {
    "JointAttnProcessor2_0": JointAttention,
    "SanaAttnProcessor2_0": CrossAttention,
}
"""Stock processors that always take torch's attention -> ours, which ask the dispatcher."""
NO_SOFTMAX = ("SanaLinearAttnProcessor2_0", "SanaLinearProcessor")
"""Linear attention: no backend computes it."""
MASKS: dict[str, Mask] = {"encoder_hidden_states_mask": "keep", "encoder_attention_mask": "add"}
"""Arguments of a transformer that mask text -> form of the mask."""


def set_attention(model: FlowModel, backend: str = "native", *, training: bool = True) -> Change:
    """Lets all softmax attention of the transformer go through one backend.

    The backend is first tried on tiny tensors, on the model's device, in its dtype, head sizes and
    masks, forward and backward, and compared with "native" (fp32 1e-5, fp16 5e-3, bf16 3e-2 of the
    largest value); whatever is wrong is an error and changes nothing. "_flash_3" has no backward
    in diffusers; its package's own is used instead, which stays registered. `share`, `unshare` and
    `accelerate` change processors: call them first, and take them back last.

    Args:
        model: its transformer and `frozen`.
        backend: "native", "flash", "_flash_3" or another name of diffusers' AttentionBackendName.
        training: whether gradients run through it. False takes a backend without a backward for
            calls without gradient, and "native" wherever gradient is enabled: rollout and update
            then differ by the backend's rounding.

    Raises:
        ValueError: unknown backend, or an attention processor that asks no dispatcher.
        RuntimeError: its package is absent, or its numbers are wrong.
        NotImplementedError: not for the device, dtype, head size or masks; no backward.
    """
    _check_name(backend)
    transformers = [model.module] if model.frozen is None else [model.module, model.frozen]
    parts = [part for transformer in transformers for part in _attentions(transformer)]
    if backend == "_flash_3" and training:
        _differentiable_flash_3()
    for head_dim in sorted({int(part.inner_dim) // int(part.heads) for part in parts}):
        probe(backend, Case(model.device, model.dtype, head_dim, _mask(model.module), training))
    undo = [_switch(part, backend, training) for part in parts]

    def restore() -> None:
        for back in reversed(undo):
            back()

    where = "all calls" if training else "calls without gradient, 'native' with it"
    return Change(
        f"attention of {len(parts)} modules by {backend!r} in {where}: it gave the numbers of "
        f"'native' on {model.device} in {str(model.dtype).removeprefix('torch.')}",
        restore,
    )


def _check_name(backend: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = [name.value for name in AttentionBackendName]
    if backend not in names:
        raise ValueError(
            f"set_attention: backend must be one of {', '.join(names)}, got {backend!r}"
        )


def _attentions(transformer: nn.Module) -> Generator[Any]:
    """Yields modules whose processor is a softmax attention that can be switched."""
    for name, part in transformer.named_modules():
        processor = getattr(part, "processor", None)
        kind = type(processor).__name__
        if processor is None or kind in NO_SOFTMAX:
            continue
        if kind not in DISPATCHING and not hasattr(processor, "_attention_backend"):
            raise ValueError(
                f"set_attention: model must have processors that ask diffusers' dispatcher or "
                f"{', '.join(DISPATCHING)}, got {kind} at {name}"
            )
        yield part


def _mask(transformer: nn.Module) -> Mask:
    arguments = inspect.signature(transformer.forward).parameters
    found: list[Mask] = [form for name, form in MASKS.items() if name in arguments]
    return found[0] if found else "none"


def _switch(part: Any, backend: str, training: bool) -> Callable[[], None]:
    """Gives a module's processor a backend; returns what takes that back."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    stock = part.processor
    if type(stock).__name__ in DISPATCHING:
        part.set_processor(DISPATCHING[type(stock).__name__]())
    processor = part.processor
    before, chosen = type(processor), vars(processor).get("_attention_backend")
    plain = before.__bases__[0] if getattr(before, "follows_gradient", False) else before
    processor.__class__ = plain if training else _following_gradient(plain, backend)
    if training:
        processor._attention_backend = AttentionBackendName(backend)

    def restore() -> None:
        processor.__class__ = before
        vars(processor)["_attention_backend"] = chosen
        # undone already by what put the stock processor there
        if part.processor is processor:
            part.set_processor(stock)

    return restore


def _following_gradient(kind: type, backend: str) -> type:
    """Returns the same processor whose backend is native wherever gradient is enabled.

    Asked at each call, so that blocks computed again in a backward take it too.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    fast, native = AttentionBackendName(backend), AttentionBackendName.NATIVE

    def current(_: object) -> AttentionBackendName:
        return native if torch.is_grad_enabled() else fast

    return type(
        kind.__name__, (kind,), {"_attention_backend": property(current), "follows_gradient": True}
    )


def _differentiable_flash_3() -> None:
    """Registers flash-attention 3 with its package's backward, if diffusers found the package."""
    from diffusers.models import attention_dispatch as dispatch

    registry: Any = dispatch._AttentionBackendRegistry  # pyright: ignore[reportPrivateUsage]
    name = dispatch.AttentionBackendName._FLASH_3  # pyright: ignore[reportPrivateUsage]
    forward_only = registry._backends[name]
    found = dispatch._CAN_USE_FLASH_ATTN_3  # pyright: ignore[reportPrivateUsage]
    if not found or hasattr(forward_only, "__wrapped__"):
        return
    package = importlib.import_module("flash_attn_interface")

    @wraps(forward_only)
    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if not recorded or args or options.get("attn_mask") is not None:
            return forward_only(query, key, value, *args, **options)
        out = package.flash_attn_func(
            query,
            key,
            value,
            softmax_scale=options.get("scale"),
            causal=options.get("is_causal", False),
        )
        return out[0] if isinstance(out, tuple) else out

    registry.register(name, constraints=registry._constraints[name])(attend)
