"""A diffusers pipeline behind the engine's `Model` protocol. Letters: L images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from branchcore.credit import Floats
from branchcore.models.adapters import has_lora, without_lora
from branchcore.models.family import Family, Size, Text
from branchcore.models.prompted_flow import PromptedFlow
from branchcore.models.sharing import Sharing
from branchcore.packing import balanced_chunks

ENCODE_BATCH = 16


class FlowModel:
    """A pipeline of one of the families; made by a family's `from_pretrained`.

    Args:
        family: the architecture.
        pipe: the pipeline; wrappers of its transformer (peft's, accelerate's) are looked through.
        size: what is generated.
        guidance: scale of classifier-free guidance, 1 = off.
        negative_prompt: of the unconditional half.
        dtype: of the transformer's weights and activations.
        device: where transformer, VAE and text encoders live.
    """

    def __init__(
        self,
        family: Family,
        pipe: Any,
        size: Size,
        *,
        guidance: float,
        negative_prompt: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.family, self.pipe, self.size = family, pipe, size
        self.guidance, self.negative_prompt = guidance, negative_prompt
        self.dtype, self.device = dtype, torch.device(device)
        self.module: nn.Module = unwrapped(pipe.transformer)
        self.vae: nn.Module = pipe.vae
        self.latent_shape = family.latent_shape(pipe, size)
        self.train_uncond = False
        """Whether the gradient also runs through the unconditional half."""
        self.decode_batch: int | None = None
        """Images per VAE call; None = all."""
        self.frozen: nn.Module | None = None
        """Copy of the base policy under full fine-tuning; a LoRA is switched off instead."""
        self.sharing: Sharing | None = None
        self.frozen_sharing: Sharing | None = None
        self.folded: list[str] = []
        """Cross-attentions whose text keys and values are computed once per prompt."""
        self.rollout_predict: Callable[[nn.Module, Tensor, Tensor, Text], Tensor] | None = None
        """Takes calls without gradient instead of the family's `predict`; see `graph_rollout`."""
        self._texts: dict[str, Text] = {}
        self._negative: Text | None = None
        self.share()

    def share(self) -> None:
        """Computes text, time and modulation once per prompt and noise level (the default)."""
        if self.sharing is None:
            self.sharing = Sharing(self.module, self.family.shared)
            self.folded = self.family.fold_cross_attention(self.module, self.sharing)
            if self.frozen is not None:
                self.frozen_sharing = Sharing(self.frozen, self.family.shared)
                self.family.fold_cross_attention(self.frozen, self.frozen_sharing)

    def unshare(self) -> None:
        """Computes everything on every row again, by the modules as diffusers made them."""
        for sharing in (self.sharing, self.frozen_sharing):
            if sharing is not None:
                sharing.undo()
        self.sharing = self.frozen_sharing = None
        self.folded = []

    def sigmas(self, steps: int) -> Floats:
        """Returns the pipeline's own (steps + 1,) noise levels at this size."""
        return self.family.sigmas(self.pipe, steps, self.latent_shape)

    def to(self, device_or_dtype: torch.device | torch.dtype | str) -> FlowModel:
        """Moves weights to a device or a float dtype (float64 for exactness); returns self.

        Text encoders keep their dtype. What `with_prompts` returned before is not moved along.
        """
        modules = [part for part in (self.module, self.vae, self.frozen) if part is not None]
        if isinstance(device_or_dtype, torch.dtype):
            for module in modules:
                cast(module, device_or_dtype)
            self.dtype = device_or_dtype
        else:
            parts = self._text_encoders().values()
            for module in (*modules, *(part for part in parts if part is not None)):
                nn.Module.to(module, device_or_dtype)
            self.device = torch.device(device_or_dtype)
        return self

    def encode(self, prompts: Sequence[str], *, release: bool = False) -> None:
        """Encodes prompts that are new, each once, and remembers them on the host.

        The last bits of an encoding depend on what is encoded in the same call: give all prompts
        of a run in one call, in one order, and a repeated run repeats its bits.

        Args:
            prompts: any number of texts; each takes 1 to 4 MB of host memory.
            release: free the text encoders afterwards; unknown prompts are an error from then on.

        Raises:
            TypeError: one string instead of a sequence of them.
            ValueError: a prompt that the encoders cannot take whole, or encoders already released.
        """
        if isinstance(prompts, str):
            raise TypeError(
                f"encode: prompts must be a sequence of texts, got one str; try [{prompts!r}]"
            )
        new = list(dict.fromkeys(text for text in prompts if text not in self._texts))
        lacks_negative = self.guidance > 1.0 and self._negative is None
        if (new or lacks_negative) and not self._has_text_encoders():
            unknown = new or [self.negative_prompt]
            raise ValueError(
                f"encode: prompts must be known once the text encoders are released, got "
                f"{unknown[0]!r} and {len(unknown) - 1} more; try encode(all_prompts, release=True)"
            )
        self.family.check_prompts(self.pipe, new)
        if lacks_negative:
            with torch.no_grad():
                self._negative = _on_host(
                    self.family.encode_negative(self.pipe, self.negative_prompt)
                )
        chunks = balanced_chunks(len(new), ENCODE_BATCH)
        for lo, hi in tqdm(chunks, desc="encode prompts", disable=len(chunks) < 4 or None):
            with torch.no_grad():
                texts = self.family.encode(self.pipe, new[lo:hi])
            for prompt, text in zip(new[lo:hi], texts, strict=True):
                self._texts[prompt] = _on_host(text)
        if release:
            self.release_text_encoders()

    def _text_encoders(self) -> dict[str, nn.Module | None]:
        parts = self.pipe.components
        return {name: part for name, part in parts.items() if name.startswith("text_encoder")}

    def _has_text_encoders(self) -> bool:
        return any(part is not None for part in self._text_encoders().values())

    def release_text_encoders(self) -> None:
        """Frees the text encoders' memory; prompts encoded so far stay known."""
        for name in self._text_encoders():
            setattr(self.pipe, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def with_prompts(self, prompts: Sequence[str]) -> PromptedFlow:
        """Returns a view of this model whose `prompt` arguments index these prompts.

        Raises:
            TypeError, ValueError: see `encode`; or no prompts.
        """
        if not prompts:
            raise ValueError("with_prompts: prompts must be one or more texts, got none")
        self.encode(prompts)
        texts = [self._texts[prompt] for prompt in prompts]
        if self.guidance > 1.0 and self._negative is not None:
            texts.append(self._negative)
        stacked = self.family.stack(texts)
        return PromptedFlow(self, {name: self._put(value) for name, value in stacked.items()})

    def _put(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (L, 3, H, W) or videos (L, F, 3, H, W) in [0, 1] of latents at sigma 0."""
        chunks = balanced_chunks(len(latents), self.decode_batch)
        return torch.cat([self.family.decode(self.vae, latents[lo:hi]) for lo, hi in chunks])

    @contextmanager
    def as_reference(self) -> Generator[nn.Module]:
        """Lends the transformer as the base policy: its copy, or itself without its adapters.

        Raises:
            ValueError: there is neither.
        """
        if self.frozen is not None:
            yield self.frozen
            return
        if not has_lora(self.module):
            raise ValueError(
                "reference_velocity: model must have a LoRA or a frozen copy of its weights, got "
                "neither; try add_lora() or train_all(reference=True)"
            )
        with without_lora(self.module):
            yield self.module


def unwrapped(transformer: Any) -> nn.Module:
    """Returns the transformer inside `DistributedDataParallel` and peft's `PeftModel`."""
    if isinstance(transformer, nn.parallel.DistributedDataParallel):
        transformer = transformer.module
    base = getattr(transformer, "get_base_model", None)
    return transformer if base is None else base()


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts float weights; a LoRA and what the model's class wants in fp32 never fall below it."""
    wanted = {*(getattr(module, "_keep_in_fp32_modules", None) or []), "lora_A", "lora_B"}
    half = dtype in (torch.bfloat16, torch.float16)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        kept = half and not wanted.isdisjoint(name.split("."))
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept else dtype)


def _on_host(text: Text) -> Text:
    return {name: value.cpu() for name, value in text.items()}
