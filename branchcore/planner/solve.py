"""Chooses what a request left open, and forecasts what one iteration needs and takes.

Letters: n GPUs, P prompts per update.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from branchcore import recipes
from branchcore.models.commands.flow_task import PLANNED
from branchcore.models.sizing.live_bytes import CallBytes, measure
from branchcore.models.sizing.memory import MemoryPlan, plan_memory
from branchcore.models.sizing.memory_need import Need
from branchcore.plan import Counts
from branchcore.planner.engine import Overhead, overhead
from branchcore.planner.forecast import Forecast, phases, tape_rows, widest
from branchcore.planner.near import or_nearest
from branchcore.planner.probe import SECONDS, Probe
from branchcore.planner.request import Request
from branchcore.planner.sheet import sheet_of, sheet_speed
from branchcore.planner.speed import Speed
from branchcore.planner.spread import Spread, ways
from branchcore.planner.subject import Subject, load_subject
from branchcore.planner.times import stage_seconds
from branchcore.recipes.recipe import Recipe
from branchcore.trainer_config import TrainerConfig

LINK = 32e9
"""Bytes per second between GPUs that nobody named: PCIe 4.0 x16, one way."""


class Planned(NamedTuple):
    """A run that fits, on every one of n GPUs."""

    request: Request
    subject: Subject
    recipe: Recipe
    options: Mapping[str, Any]
    config: TrainerConfig
    """Of the whole run, as `train` takes it."""
    local: TrainerConfig
    """Of the GPU that has the most prompts."""
    memory: MemoryPlan
    spread: Spread
    need: Need
    counts: Counts
    """Of that GPU's iteration."""


class Planner:
    """Loads and measures a model once for all requests about it.

    Args:
        clock: of the probe.
        seconds: of the probe, at most.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, seconds: float = SECONDS
    ) -> None:
        self._clock, self._seconds = clock, seconds
        self._subjects: dict[str, Subject] = {}
        self._costs: dict[str, CallBytes] = {}
        self._speeds: dict[tuple[Any, ...], Speed] = {}

    def plan(self, request: Request) -> Planned:
        """Chooses what was left open.

        Raises:
            Impossible: nothing fits, or what was set cannot run; names the nearest that can.
        """
        return or_nearest(request, self.attempt)

    def attempt(self, request: Request) -> Planned:
        """Chooses what was left open, or raises what is wrong with the rest.

        Raises:
            ValueError, TypeError, NotImplementedError: the request cannot run.
        """
        subject = self._subject(request)
        options = subject.options(request)
        recipe = recipes.build(request.recipe, subject.sigmas(request), **options)
        recipe.plan([0], seed=0, iteration=0)
        subject.check(recipe)
        config = _config(subject, request)
        parallel = request.parallel_config()
        own = set(request.parallel)
        refusal: Exception | None = None
        for way in ways(parallel, request.gpus, open_=not own):
            try:
                return self._fit(request, subject, recipe, options, config, way)
            except ValueError as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _fit(
        self,
        request: Request,
        subject: Subject,
        recipe: Recipe,
        options: Mapping[str, Any],
        config: TrainerConfig,
        way: Any,
    ) -> Planned:
        spread = Spread.of(way, request.gpus, subject.model.module)
        _check_spread(spread, config)
        most = -(-config.prompts_per_iteration // request.gpus)
        each = min(most, config.prompts_per_round or most)
        overlapped = config.overlap_rewards and each < most
        local = dataclasses.replace(
            config,
            prompts_per_iteration=most,
            prompts_per_round=each,
            overlap_rewards=overlapped,
            **({"tape": 0} if spread.lockstep else {}),
        )
        kept = [name for name in PLANNED if name in request.fields]
        found = plan_memory(
            subject.model,
            recipe,
            local,
            memory_of(request),
            prompt=subject.prompts[0],
            cost=self._cost(request, subject),
            keep=[*kept, *(["tape"] if spread.lockstep and "tape" not in kept else [])],
            adjust=lambda need: need._replace(fixed=spread.fixed(need.fixed)),
        )
        local = found.config
        chosen = {name: getattr(local, name) for name in PLANNED}
        need = Need.of(subject.model, recipe, local, self._cost(request, subject))
        need = need._replace(fixed=found.fixed, decode_batch=found.decode_batch)
        counts = need.plan(most).counts()
        whole = dataclasses.replace(config, **chosen)
        return Planned(request, subject, recipe, options, whole, local, found, spread, need, counts)

    def forecast(self, planned: Planned) -> Forecast:
        """Forecasts an iteration: bytes and seconds on the GPU that has the most prompts."""
        need, request = planned.need, planned.request
        engine = self._engine(planned)
        speed = self._speed(planned)
        link = LINK if request.gpu is None else sheet_of(request.gpu).link
        # offloaded weights cross the host's bus instead
        sent = planned.spread.sent(need) if request.gpus > 1 else 0.0
        seconds = stage_seconds(need, speed, engine, reduction=sent / link)
        return Forecast(phases(need), seconds, speed.source)

    def _engine(self, planned: Planned) -> Overhead:
        latent = planned.subject.model.latent_shape
        device = torch.device("cpu")
        if planned.subject.present and planned.request.gpu is None:
            device = next(planned.subject.model.module.parameters()).device
        found = overhead(
            latent,
            planned.recipe,
            planned.local,
            device=device,
            clock=self._clock,
            seconds=0.3 * self._seconds,
        )
        if planned.subject.present and planned.request.gpu is None:
            return found
        # a processor's time for states is not a GPU's: kernels there take less than this host does
        return found._replace(seconds={})

    def _speed(self, planned: Planned) -> Speed:
        request, subject = planned.request, planned.subject
        if request.gpu is not None or not subject.present:
            name = request.gpu or "H100"
            return sheet_speed(subject.model, subject.prompts[0], name)
        rows, images = widest(planned.need)
        key = (_key(request), rows, images)
        if key not in self._speeds:
            probe = Probe(subject.model, subject.prompts, clock=self._clock, seconds=self._seconds)
            averages = (planned.local.ema_decay is not None) + planned.need.lags
            on_tape = tape_rows(planned.need)
            self._speeds[key] = probe.speed(
                rows, images, subject.reward, tape=on_tape, averages=averages
            )
        return self._speeds[key]

    def _subject(self, request: Request) -> Subject:
        key = _key(request)
        if key not in self._subjects:
            self._subjects[key] = load_subject(request)
        return self._subjects[key]

    def _cost(self, request: Request, subject: Subject) -> CallBytes:
        key = _key(request)
        if key not in self._costs:
            self._costs[key] = measure(subject.model, subject.prompts[0])
        return self._costs[key]


def _key(request: Request) -> str:
    """Names what has to be loaded anew."""
    return f"{request.model} {sorted(request.flags.items(), key=str)}"


def _config(subject: Subject, request: Request) -> TrainerConfig:
    fields = subject.fields(request)
    if fields.get("overlap_rewards") and "prompts_per_round" not in fields:
        fields["prompts_per_round"] = 1
    settings: dict[str, Any] = {"iterations": 1, **fields}
    return TrainerConfig(**settings)


def _check_spread(spread: Spread, config: TrainerConfig) -> None:
    """Raises ValueError for settings that exclude each other, as a run would."""
    if spread.lockstep and config.overlap_rewards:
        raise ValueError("overlap_rewards must be off with reshard, got both")
    if spread.lockstep and config.prune.stop:
        raise ValueError("prune_stop must be left out with reshard, got both")
    if spread.lockstep and config.tape:
        raise ValueError(f"tape must be 0 with reshard, got {config.tape}")
    if spread.sharded and config.prune.measure:
        raise ValueError("prune_measure must be 0 where weights are sharded")


def memory_of(request: Request) -> int:
    """Returns the bytes of one device: as said, of the GPU that was named, or of what is here."""
    if request.memory is not None:
        return request.memory
    if request.gpu is not None:
        return sheet_of(request.gpu).memory
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
