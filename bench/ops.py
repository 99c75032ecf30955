"""Time the ops against what the released trainers compute in eager torch.

    python bench/ops.py [--op branch_step] [--json out.json] [--rounds 15] [--threads 1]

Each case is checked against float64 first and is not timed if it fails. Eager torch is timed in
two ways: the whole wave at once, as a batched trainer calls it (`ratio`), and one parent after the
other, which keeps its temporaries in the cache of a CPU (`ratio_blocked`). Variants run in turn
within a round, so that a ratio is taken between neighbours; the table gives medians with p20 and
p80. Beside each time stands its share of the floor: the larger of the time to copy the bytes that
must move and the time to draw the normals, both measured here, in the same run.
Letters: N parents, K children of each, M = N K, D latent elements.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import facts
from torch import Tensor

from branchcore import _dispatch, ops, testing
from branchcore.noise import Noise

N, K, D = 64, 4, 65536
A, B, S = 1.02, -0.11, 0.37
CLIP = (1e-4, 1e-4)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)

Run = Callable[[], Any]


class Timed(NamedTuple):
    """One case: ours, eager torch's on so many parents at once, and what nobody can avoid."""

    op: str
    case: str
    run: Run
    eager: Callable[[int], Any]
    num_bytes: int
    num_normals: int


class Wave:
    """The tensors of one wave, and of the loss on it."""

    def __init__(self, dtype: torch.dtype) -> None:
        num_children = N * K
        self.x, self.v, self.v_old = (testing.normal((N, D), torch.float32, i) for i in range(3))
        self.v_old = (self.v + 1e-3 * self.v_old).to(dtype)
        self.v = self.v.to(dtype).requires_grad_()
        self.rows = torch.tensor([[A, B, 0.0, S]], dtype=torch.float64).repeat(num_children, 1)
        self.child_start = testing.child_starts((K,) * N)
        self.noise = testing.draws((K,) * N, ("own",))
        k = torch.full((num_children,), B / S, dtype=torch.float64)
        self.exponent = torch.stack((k, k.square() / 2), dim=1)
        self.advantage = testing.normal((num_children, 2)).clamp(min=0.0)
        self.weight = torch.ones(num_children)
        with torch.no_grad():
            self.y, self.log_prob_old = eager_step(self.x, self.v_old)


def log_prob(y_MD: Tensor, mean_MD: Tensor) -> Tensor:
    """Average the Gaussian log-density over elements, (M,)."""
    log_prob_MD = -((y_MD - mean_MD) ** 2) / (2 * S**2) - math.log(S) - HALF_LOG_2PI
    return log_prob_MD.mean(1)


def means(x_ND: Tensor, v_ND: Tensor) -> Tensor:
    """Expand parents to their children's means, (M, D)."""
    x_MD, v_MD = (t.float().repeat_interleave(K, 0) for t in (x_ND, v_ND))
    return A * x_MD + B * v_MD


def eager_step(x_ND: Tensor, v_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Grow children as the released trainers do: expand, draw, step, and the log-probability."""
    mean_MD = means(x_ND, v_ND)
    y_MD = mean_MD + S * torch.randn(mean_MD.shape)
    return y_MD, log_prob(y_MD, mean_MD)


def chunks(num_parents: int) -> list[tuple[slice, slice]]:
    """Cut a wave: rows of parents and of their children."""
    starts = range(0, N, num_parents)
    return [(slice(n, n + num_parents), slice(n * K, (n + num_parents) * K)) for n in starts]


def eager_loss(wave: Wave, num_parents: int) -> None:
    """Score stored children under the new velocity, clip the ratio, backward."""
    for nodes, edges in chunks(num_parents):
        v_ND = wave.v[nodes].detach().requires_grad_()
        log_prob_M = log_prob(wave.y[edges], means(wave.x[nodes], v_ND))
        ratio = torch.exp(log_prob_M - wave.log_prob_old[edges])
        clipped = ratio.clamp(1 - CLIP[0], 1 + CLIP[1])
        plus, minus = wave.advantage[edges].unbind(1)
        loss = minus * torch.maximum(ratio, clipped) - plus * torch.minimum(ratio, clipped)
        (wave.weight[edges] * loss).sum().backward()


def eager_log_prob(wave: Wave, num_parents: int) -> None:
    for nodes, edges in chunks(num_parents):
        v_ND = wave.v[nodes].detach().requires_grad_()
        log_prob(wave.y[edges], means(wave.x[nodes], v_ND)).sum().backward()


def our_loss(wave: Wave, v_old: Tensor | None) -> None:
    wave.v.grad = None
    p, q = ops.edge_dots(wave.v, v_old, wave.child_start, wave.noise)
    ops.ratio_loss(
        p, q, wave.child_start, wave.exponent, wave.advantage, wave.weight, CLIP
    ).loss.backward()


def our_log_prob(wave: Wave) -> None:
    wave.v.grad = None
    ops.sde_log_prob(wave.x, wave.v, wave.y, wave.rows, wave.child_start).sum().backward()


def cases(dtype: torch.dtype) -> list[Timed]:
    wave, name = Wave(dtype), str(dtype).removeprefix("torch.")
    size = f"N={N} K={K} D={D} v {name}"
    v, x, y, normals = testing.num_bytes(wave.v), N * D * 4, N * K * D * 4, N * K * D
    nodes = wave.child_start

    def step() -> Any:
        with torch.no_grad():
            return ops.branch_step(wave.x, wave.v, wave.rows, nodes, wave.noise)

    def eager(num_parents: int) -> Any:
        with torch.no_grad():
            return [eager_step(wave.x[n], wave.v[n]) for n, _ in chunks(num_parents)]

    def randn(num_parents: int) -> Any:
        return [torch.randn(num_parents * K, D) for _ in chunks(num_parents)]

    return [
        Timed("philox_normal", f"M={N * K} D={D} against torch.randn",
              lambda: ops.philox_normal(wave.noise, D), randn, y, normals),
        Timed("branch_step", size, step, eager, x + v + y, normals),
        Timed("edge_dots+ratio_loss", f"{size}, off policy, forward and backward",
              lambda: our_loss(wave, wave.v_old), lambda n: eager_loss(wave, n),
              5 * v, 2 * normals),
        Timed("edge_dots+ratio_loss", f"{size}, on policy, forward and backward",
              lambda: our_loss(wave, None), lambda n: eager_loss(wave, n), v, normals),
        Timed("sde_log_prob", f"{size}, forward and backward",
              lambda: our_log_prob(wave), lambda n: eager_log_prob(wave, n),
              2 * (x + v + y) + v, 0),
    ]  # fmt: skip


def conforms(op: str) -> bool:
    """Check the timed sizes, cut to two parents, against the reference in float64."""
    for stem in op.split("+"):
        spec = import_module(f"branchcore.ops.{stem}").SPEC
        size: dict[str, Any] = {"counts": (K, K), "num_elements": D}
        if stem == "philox_normal":
            size = {"num_draws": K, "num_elements": D, "dtype": torch.float32}
        if stem == "ratio_loss":
            size = {"counts": (K,) * N}
        if not all(outcome.passed for outcome in testing.check(spec, spec.build(**size))):
            return False
    return True


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median(values: list[float], quantile: float = 0.5) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(quantile).item()


class Machine(NamedTuple):
    """What the floor is made of."""

    copy_bytes_per_s: float
    normals_per_s: float


def measure_machine(rounds: int) -> Machine:
    """Time a copy between warm tensors, and normals that stay in the first-level cache."""
    source, target = torch.ones(N * D), torch.zeros(N * D)
    copy = median([seconds(lambda: target.copy_(source)) for _ in range(3 * rounds)])
    noise: Noise = testing.draws((1,) * 256, ("own",))
    # every draw goes to the same row
    out = torch.empty(1, 2048).expand(256, 2048)
    fill = _dispatch.native().philox_normal
    draw = median([seconds(lambda: fill(*noise, out)) for _ in range(10 * rounds)])
    return Machine(2 * testing.num_bytes(source) / copy, out.numel() / draw)


def measure(timed: Timed, machine: Machine, rounds: int) -> dict[str, Any]:
    """Time in turn: ours, eager on the whole wave, eager on one parent after the other."""
    runs = (timed.run, lambda: timed.eager(N), lambda: timed.eager(1))
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    ours, wave, parents = (list(column) for column in zip(*times, strict=True))
    # a copy moves its bytes twice: once in, once out
    memory = timed.num_bytes / machine.copy_bytes_per_s
    floor = max(memory, timed.num_normals / machine.normals_per_s)
    return {
        "op": timed.op,
        "case": timed.case,
        "bytes": timed.num_bytes,
        "normals": timed.num_normals,
        "ms": 1e3 * median(ours),
        "eager_wave_ms": 1e3 * median(wave),
        "eager_parents_ms": 1e3 * median(parents),
        **paired("ratio", ours, wave),
        **paired("ratio_blocked", ours, parents),
        "floor_ms": 1e3 * floor,
        "floor_share": floor / median(ours),
        "floor_of": "memory" if memory == floor else "normals",
    }


def paired(name: str, ours: list[float], eager: list[float]) -> dict[str, float]:
    """Median and spread of how many times faster ours is, round by round."""
    ratios = [b / a for a, b in zip(ours, eager, strict=True)]
    quantiles = {"": 0.5, "_p20": 0.2, "_p80": 0.8}
    return {name + suffix: median(ratios, q) for suffix, q in quantiles.items()}


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['op']:21s} {row['case']:60s} {row['ms']:6.1f} ms;"
        f" eager {row['eager_wave_ms']:6.1f} ms: {row['ratio']:5.1f}x"
        f" [{row['ratio_p20']:.1f}, {row['ratio_p80']:.1f}];"
        f" one parent after the other {row['eager_parents_ms']:6.1f} ms:"
        f" {row['ratio_blocked']:5.1f}x [{row['ratio_blocked_p20']:.1f},"
        f" {row['ratio_blocked_p80']:.1f}];"
        f" {100 * row['floor_share']:3.0f} % of the {row['floor_of']} floor"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only cases of this op")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = measure_machine(options.rounds)
    print(
        f"copy {machine.copy_bytes_per_s / 1e9:.1f} GB/s, "
        f"normals {machine.normals_per_s / 1e9:.2f} G/s, {_dispatch.ISA}"
    )
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for timed in cases(dtype):
            wanted = options.op is None or options.op in timed.op
            if not wanted or (timed.op == "philox_normal" and dtype != torch.float32):
                continue
            if not conforms(timed.op):
                raise SystemExit(f"{timed.op} must agree with float64 before it is timed")
            row = measure(timed, machine, options.rounds)
            rows.append(row)
            print(describe(row))
    if options.json:
        meta = facts() | machine._asdict()
        options.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
