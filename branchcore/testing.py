"""Conformance: an op as data, and the check of any implementation against float64.

An implementation passes when its error against the reference in float64 is at most twice what the
reference itself makes in the same dtype, plus 2 eps(dtype) max|exact|: nobody chooses a tolerance.
Letters: N parents, M children, E trained edges, D latent elements.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from branchcore import _dispatch
from branchcore.noise import LATENT, Noise

Inputs = dict[str, Any]
KINDS = ("own", "mixed", "shared", "amplified", "none")


class Case(NamedTuple):
    """One set of inputs: why it is tested, and what the spec's builder is told."""

    reason: str
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """What a test or a benchmark needs to know about an op."""

    name: str
    op: Callable[..., Any]
    """The public op, called with the inputs as keywords."""
    reference: Callable[..., Any]
    """The specification, called the same way."""
    build: Callable[..., Inputs]
    """Makes the inputs of a case from its options. Names carry shape suffixes."""
    cases: tuple[Case, ...]
    num_bytes: Callable[[Inputs], int]
    """Bytes that one forward must at least move."""
    results: tuple[str, ...] = ()
    """Names of the results if the op returns a plain tensor."""
    differentiable: tuple[str, ...] = ()
    """Inputs with a gradient."""
    factor: float = 1.0
    """Widens the bound; the module that sets it says why."""
    gpu_factor: float = 1.0
    """Widens it where a GPU's special-function unit makes the normals."""
    large: Mapping[str, Any] = field(
        default_factory=lambda: {"counts": (4,) * 8, "num_elements": 9001}
    )
    """Options of a call that is worth several threads."""
    parts: Callable[[Inputs], Iterator["Part"]] | None = None
    """Cuts a call into calls whose results must keep their bits; by default one per parent."""


class Part(NamedTuple):
    """A piece of a call that can be run alone, and where its results lie in those of the whole."""

    inputs: Inputs
    rows: dict[str, slice]
    """Slice of the leading axis per result or gradient; what is not named sums over parts."""


class Outcome(NamedTuple):
    """The error of one result or gradient, and what it may be."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the bound."""
        return self.error <= self.bound


def check(spec: OpSpec, inputs: Inputs, run: Callable[..., Any] | None = None) -> list[Outcome]:
    """Compare a run of the op with the reference in float64, results and gradients.

    Args:
        spec: the op.
        inputs: keywords of one case.
        run: what to check instead of the public op under the implementation now in force.
    """
    with poisoned():
        found = evaluate(spec, run or spec.op, inputs)
    eager = evaluate(spec, spec.reference, inputs)
    # the same problem in float64: its cotangents too are those of the call, widened
    dtypes = {name: value.dtype for name, value in eager.items()}
    exact = evaluate(spec, spec.reference, widen(inputs), dtypes)
    if found.keys() != exact.keys():
        raise AssertionError(f"{spec.name}: results must be {list(exact)}, got {list(found)}")
    factor = spec.factor * (spec.gpu_factor if _special_functions(inputs) else 1.0)
    return [_outcome(factor, name, found[name], eager[name], exact[name]) for name in exact]


def _special_functions(inputs: Inputs) -> bool:
    tensors = (tensor for value in inputs.values() for tensor in _tensors(value))
    return any(_dispatch.special_functions(tensor.device) for tensor in tensors)


def _tensors(value: Any) -> tuple[Tensor, ...]:
    if isinstance(value, Noise):
        return tuple(value)
    return (value,) if isinstance(value, Tensor) else ()


def _outcome(factor: float, name: str, found: Tensor, eager: Tensor, exact: Tensor) -> Outcome:
    if found.shape != exact.shape or found.dtype != eager.dtype:
        return Outcome(f"{name}: {found.dtype} {tuple(found.shape)}", float("inf"), 0.0)
    if exact.numel() == 0:
        return Outcome(name, 0.0, 0.0)
    error = (found.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    floor = 2.0 * torch.finfo(found.dtype).eps * exact.abs().max().item()
    return Outcome(name, error, factor * (2.0 * eager_error + floor))


def evaluate(
    spec: OpSpec,
    run: Callable[..., Any],
    inputs: Inputs,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """Run once and name every result and every gradient, for a fixed cotangent.

    Args:
        spec: the op.
        run: what to call.
        inputs: keywords of one case.
        dtypes: what to round the cotangents to; by default the dtypes of the results.
    """
    leaves = _leaves(spec, inputs)
    results = dict(_named(run(**{**inputs, **leaves}), spec.results))
    cotangents = {
        name: normal(result.shape, (dtypes or {}).get(name, result.dtype), i).to(result)
        for i, (name, result) in enumerate(results.items())
    }
    graded = [name for name, result in results.items() if result.requires_grad]
    if graded:
        grads = torch.autograd.grad(
            [results[name] for name in graded],
            list(leaves.values()),
            [cotangents[name] for name in graded],
        )
        results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def _leaves(spec: OpSpec, inputs: Inputs) -> dict[str, Tensor]:
    given = (name for name in spec.differentiable if inputs[name] is not None)
    return {name: inputs[name].detach().requires_grad_() for name in given}


def _named(result: Any, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    fields = getattr(result, "_fields", names)
    values: tuple[Any, ...] = (result,) if isinstance(result, Tensor) else result
    for name, value in zip(fields, values, strict=True):
        if isinstance(value, Tensor):
            yield name, value
        else:
            yield from _named(value, ())


def widen(inputs: Inputs) -> Inputs:
    """Turn every float input, and every dtype, into float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return {name: wide(value) for name, value in inputs.items()}


@contextmanager
def poisoned() -> Generator[None]:
    """Fill every new uninitialised tensor with NaN, so that an unwritten element shows."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def one_row(inputs: Inputs, row: int) -> Inputs:
    """Cut a call down to one parent and its children, by the shape suffixes of its inputs."""
    starts = inputs.get("child_start")
    first, last = (row, row + 1) if starts is None else starts[row : row + 2].tolist()

    def cut(name: str, value: Any) -> Any:
        axis = name.rpartition("_")[2][:1]
        if name == "child_start":
            return None if value is None else value.new_tensor([0, last - first])
        if isinstance(value, Noise):
            return value._replace(counter=value.counter[first:last], mix=value.mix[first:last])
        if not isinstance(value, Tensor):
            return value
        return value[row : row + 1] if axis == "N" else value[first:last]

    return {name: cut(name, value) for name, value in inputs.items()}


def parents(inputs: Inputs) -> Iterator[Part]:
    """Cut a call into one part per parent, by the shape suffixes of its inputs."""
    num_parents = next(len(value) for name, value in inputs.items() if _is_row(name, value))
    starts = inputs.get("child_start")
    for row in range(num_parents):
        node = slice(row, row + 1)
        edges = node if starts is None else slice(*starts[row : row + 2].tolist())
        yield Part(one_row(inputs, row), {"N": node, "M": edges, "E": edges})


def _is_row(name: str, value: object) -> bool:
    return name == "noise" or (isinstance(value, Tensor) and name.rpartition("_")[2][0] == "N")


def alone_and_together(spec: OpSpec, inputs: Inputs) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Run a call whole and in parts: (name, of the part alone, of the part in the whole)."""
    together = ones(spec, inputs)
    for part in (spec.parts or parents)(inputs):
        for name, alone in ones(spec, part.inputs).items():
            where = part.rows.get(name, part.rows.get(name.rpartition("_")[2][:1]))
            if where is not None:
                yield name, alone, together[name][where]


def ones(spec: OpSpec, inputs: Inputs) -> dict[str, Tensor]:
    """Results and gradients, for a cotangent of ones, which does not see the batch."""
    leaves = _leaves(spec, inputs)
    results = dict(_named(spec.op(**{**inputs, **leaves}), spec.results))
    graded = [value.sum() for value in results.values() if value.requires_grad]
    if graded:
        grads = torch.autograd.grad(graded, list(leaves.values()))
        results |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in results.items()}


def to(inputs: Inputs, device: torch.device) -> Inputs:
    """Move every tensor and every noise to a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, Noise):
            return Noise(*(part.to(device) for part in value))
        return value.to(device) if isinstance(value, Tensor) else value

    return {name: moved(value) for name, value in inputs.items()}


def normal(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, strided: bool = False
) -> Tensor:
    """Draw test data; the same values in float64 and float32. `strided` is not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    if strided:
        wider = (*shape[:-1], 2 * shape[-1])
        return torch.randn(wider, generator=generator).to(dtype)[..., ::2]
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def child_starts(counts: Sequence[int]) -> Tensor:
    """Turn numbers of children into their starts, (N + 1,)."""
    return torch.tensor([0, *counts]).cumsum(0)


def draws(counts: Sequence[int], kinds: Sequence[str] = KINDS) -> Noise:
    """Name one draw per child, cycling through kinds; siblings share their second stream."""
    parents = [n for n, count in enumerate(counts) for _ in range(count)]
    names: list[tuple[int, int, int]] = []
    mixes: list[tuple[float, float]] = []
    for child, parent in enumerate(parents):
        kind = kinds[child % len(kinds)]
        own = -1 if kind in ("shared", "none") else 100 + child
        names.append((own, 10 + parent if kind in ("mixed", "shared") else -1, 7 + parent % 2))
        mixes.append(
            {"mixed": (0.8, 0.6), "shared": (0.0, 1.0), "amplified": (1.3, 0.0)}.get(
                kind, (1.0, 0.0)
            )
        )
    return Noise(
        torch.tensor([2**32 - 5, 3, LATENT]),
        torch.tensor(names, dtype=torch.int32).reshape(-1, 3),
        torch.tensor(mixes, dtype=torch.float64).reshape(-1, 2),
    )


def num_bytes(*tensors: Any) -> int:
    """Add up the bytes of tensors, skipping what is not one."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
