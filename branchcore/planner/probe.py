"""Measures how fast a model is where it is, in at most a few seconds, and leaves no trace.

Letters: N rows of a call, D latent elements.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from branchcore.model import Model, VelocityModel, call_velocity
from branchcore.planner.speed import NOTHING, Curve, Speed
from branchcore.rewards import Reward

SECONDS = 10.0
REPEATS = 3
_OPTIMIZED = 20_000_000


class Probe:
    """Times calls of one model.

    Args:
        model: as it will run, on its device.
        prompts: that it knows; up to 8 share a call.
        clock: seconds; `time.process_time` where others use the processor too.
        seconds: after which no further size is tried.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str],
        *,
        clock: Callable[[], float] = time.perf_counter,
        seconds: float = SECONDS,
    ) -> None:
        self.model, self._clock = model, clock
        self.prompts = list(dict.fromkeys(prompts))[:8]
        self._trained = [p for p in model.module.parameters() if p.requires_grad]
        self.device = self._trained[0].device
        self._end = time.perf_counter() + seconds

    def speed(
        self,
        rows: int,
        images: int,
        reward: Reward | None = None,
        *,
        tape: int = 1,
        averages: int = 0,
    ) -> Speed:
        """Measures calls of 1, 2, 4, ... rows up to the most that a run makes.

        Args:
            rows: of the largest call; it must fit.
            images: of the largest call of the decoder.
            reward: called on noise; None = its time stays unknown, 0.
            tape: rows whose graphs are alive together in the run; those of 3 calls at most here.
            averages: of the weights, updated after every step.
        """
        with self._untouched():
            view = self.model.with_prompts(self.prompts)
            sizes, points = _sizes(rows), dict[int, tuple[float, float, float]]()
            for size in sizes:
                if points and self._late():
                    break
                points[size] = self._calls(view, size, min(3, max(1, tape // size)))
            call, tape_call, backward = (
                Curve(tuple(points), tuple(seconds))
                for seconds in zip(*points.values(), strict=True)
            )
            decode, scored = self._images(images, reward)
            return Speed(
                call=call,
                tape_call=tape_call,
                backward=backward,
                decode=decode,
                reward=scored,
                optimizer=self._optimizer() * (1.0 + 0.3 * averages),
                source=f"Times are from a probe of this {self._device_name()}.",
            )

    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @contextmanager
    def _untouched(self) -> Generator[None]:
        """Gradients and random numbers are after the block what they were before."""
        before = [p.grad for p in self._trained]
        cuda = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                yield
        finally:
            for parameter, gradient in zip(self._trained, before, strict=True):
                parameter.grad = gradient

    def _late(self) -> bool:
        return time.perf_counter() > self._end

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self._wait()
        start = self._clock()
        result = work()
        self._wait()
        return self._clock() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _calls(self, view: VelocityModel, rows: int, alive: int) -> tuple[float, float, float]:
        """Returns median seconds of a forward, one with a graph, and its backward."""
        plain = partial(self._velocity, view, rows)
        with torch.no_grad():
            plain()  # kernels are chosen, caches filled
            forward = self._median(plain)
        taped: list[float] = []
        backward: list[float] = []
        while len(taped) < REPEATS and not (taped and self._late()):
            made = [self._timed(plain) for _ in range(alive)]
            taped += [seconds for seconds, _ in made]
            for _, v in made:
                backward.append(self._timed(partial(v.backward, torch.ones_like(v)))[0])
        return forward, statistics.median(taped), statistics.median(backward)

    def _median(self, work: Callable[[], Any]) -> float:
        found = [self._timed(work)[0]]
        while len(found) < REPEATS and not self._late():
            found.append(self._timed(work)[0])
        return statistics.median(found)

    def _velocity(self, view: VelocityModel, rows: int) -> Tensor:
        prompt = np.arange(rows, dtype=np.int64) * len(self.prompts) // rows
        x = self._noise(rows, int(np.prod(view.latent_shape)))
        sigma = np.full(rows, 0.5)
        on_device = (torch.from_numpy(a).to(self.device) for a in (sigma, prompt))
        sigma_N, prompt_N = on_device
        return call_velocity(view, x, sigma_N.to(x.dtype), prompt_N, host=(sigma, prompt))

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def _images(self, most: int, reward: Reward | None) -> tuple[Curve, Curve]:
        """Returns seconds of decoding and of scoring, by images."""
        decode: dict[int, float] = {}
        scored: dict[int, float] = {}
        for count in sorted({1, min(4, most), most}):
            if decode and self._late():
                break
            latents = self._noise(count, *self.model.latent_shape)
            with torch.no_grad():
                images = self.model.decode(latents)
                decode[count] = self._median(partial(self.model.decode, latents))
                if reward is not None:
                    texts = [self.prompts[i % len(self.prompts)] for i in range(count)]
                    scored[count] = self._median(partial(reward, images, texts))
        curve = Curve(tuple(scored), tuple(scored.values())) if scored else NOTHING
        return Curve(tuple(decode), tuple(decode.values())), curve

    def _optimizer(self) -> float:
        """Returns seconds of a step, by that of as many weights as are copied at no cost."""
        some: list[Tensor] = []
        for parameter in self._trained:
            if some and sum(p.numel() for p in some) + parameter.numel() > _OPTIMIZED:
                break
            some.append(torch.zeros(parameter.shape, device=self.device, requires_grad=True))
        for parameter in some:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer = torch.optim.AdamW(some, lr=1e-5)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(some, 1.0)
            optimizer.step()

        step()
        part = sum(p.numel() for p in some) / sum(p.numel() for p in self._trained)
        return self._median(step) / part


def _sizes(most: int) -> list[int]:
    return sorted({2**i for i in range(most.bit_length())} | {most})
