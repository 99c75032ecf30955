"""Time the ops against what the released trainers compute in eager torch.

    python bench/ops.py [--op branch_step] [--json out.json] [--rounds 15] [--threads 1]
    python bench/ops.py --device cuda [--op branch_step] [--json out.json] [--budget 240]

On a GPU see ops_gpu.py. On a CPU:

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
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import eager
import torch
from eager import CLIP
from machine import facts
from torch import Tensor
from waves import Wave

from branchcore import _dispatch, ops, testing
from branchcore.noise import Noise

N, K, D = 64, 4, 65536

Run = Callable[[], Any]


class Timed(NamedTuple):
    """One case: ours, eager torch's on so many parents at once, and what nobody can avoid."""

    op: str
    case: str
    run: Run
    eager: Callable[[int], Any]
    num_bytes: int
    num_normals: int


def chunks(num_parents: int) -> list[tuple[slice, slice]]:
    """Cut a wave: rows of parents and of their children."""
    starts = range(0, N, num_parents)
    return [(slice(n, n + num_parents), slice(n * K, (n + num_parents) * K)) for n in starts]


def eager_loss(wave: Wave, num_parents: int) -> None:
    """Score stored children under the new velocity, clip the ratio, backward."""
    for nodes, edges in chunks(num_parents):
        v_ND = wave.v[nodes].detach().requires_grad_()
        log_prob_M = eager.log_prob(wave.y[edges], eager.means(wave.x[nodes], v_ND, K))
        eager.ratio_loss(
            log_prob_M, wave.log_prob_old[edges], wave.advantage[edges], wave.weight[edges]
        ).backward()


def eager_log_prob(wave: Wave, num_parents: int) -> None:
    for nodes, edges in chunks(num_parents):
        v_ND = wave.v[nodes].detach().requires_grad_()
        eager.log_prob(wave.y[edges], eager.means(wave.x[nodes], v_ND, K)).sum().backward()


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
    wave = Wave((N, K, D), dtype, torch.device("cpu"))
    name = str(dtype).removeprefix("torch.")
    size = f"N={N} K={K} D={D} v {name}"
    v, x, y, normals = testing.num_bytes(wave.v), N * D * 4, N * K * D * 4, N * K * D
    nodes = wave.child_start

    def step() -> Any:
        with torch.no_grad():
            return ops.branch_step(wave.x, wave.v, wave.rows, nodes, wave.noise)

    def grow(num_parents: int) -> Any:
        with torch.no_grad():
            return [eager.step(wave.x[n], wave.v[n], K) for n, _ in chunks(num_parents)]

    def randn(num_parents: int) -> Any:
        return [torch.randn(num_parents * K, D) for _ in chunks(num_parents)]

    return [
        Timed("philox_normal", f"M={N * K} D={D} against torch.randn",
              lambda: ops.philox_normal(wave.noise, D), randn, y, normals),
        Timed("branch_step", size, step, grow, x + v + y, normals),
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only cases of this op")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--rounds", type=int, default=15, help="on a CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, whose cases differ")
    parser.add_argument("--gpu-cases", action="store_true", help="the GPU's cases on a CPU, tiny")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds, of the GPU's cases")
    parser.add_argument(
        "--mode", choices=("time", "resume", "compile"), default="time", help="of the GPU's cases"
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda" or options.gpu_cases:
        import ops_gpu

        return ops_gpu.main(device, options.op, options.json, options.budget, options.mode)
    measure_on_cpu(options)
    return 0


def measure_on_cpu(options: argparse.Namespace) -> None:
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
    sys.exit(main())
