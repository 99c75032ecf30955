"""What a first run on a GPU must find out about the model that the benchmark times.

    python bench/gpu_checklist.py --json out.json [--device cuda] [--budget 70]

Forward by batch: eager, in a CUDA graph, compiled; attention by backend; whether a row's bits
depend on its neighbours or on gradients; memory and backward of 15 states on the tape; a decoder
with its norms eager and fused; kernels at 8 x 3 and 64 x 3. Each part is on its own: one that
breaks is recorded with its error, and one that the budget has no time for is named. Nothing here
is judged, except that `bitwise` must run and no part may kill the GPU's context.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from attempts import ContextDied, attempt, write_json
from decoder import SMALL_WIDTHS, WIDTHS, eager_norm, fused_norm, random_decoder
from gpu_cases import noise_cases
from gpu_timing import Lane, num_sets, spread, time_in_turn
from gpu_variants import forced, implementations
from machine import facts
from mmdit import SD35M, SMALL, MMDiTModel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCHES = {"cuda": (16, 1, 32, 2), "cpu": (2, 1)}
KERNELS = ("branch_step", "edge_dots+ratio_loss")
TAPED = 15
COMPILE_SECONDS = {"cuda": 45.0, "cpu": 2.0}
"""What a compiled part takes at least, for all that is known before."""
JUDGED = ("bitwise",)
ATTENTION = ("flash_attn", "flash_attn_interface", "flash_attn_3", "xformers")
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
Result = dict[str, Any]


class Checklist:
    """A device, the model on it, and what was found."""

    def __init__(self, device: torch.device, path: Path | None, budget: float) -> None:
        self.device, self.path, self.on_gpu = device, path, device.type == "cuda"
        self.end = time.perf_counter() + budget
        self.config = SD35M if self.on_gpu else SMALL
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.model = MMDiTModel(self.config, 2, device, dtype)
        self.failures: list[dict[str, str]] = []
        self.errors: list[dict[str, str]] = []
        """What broke in parts that are not judged."""
        self.cut: list[str] = []
        self.result: Result = {"meta": facts(device), "cut": self.cut, "errors": self.errors}
        self.result["failures"] = self.failures

    def run(self) -> None:
        """Runs all parts, those with compilers last."""
        for name in ("matmul", "forward", "bitwise", "tape", "attention", "decoder", "kernels"):
            self.part(name, getattr(self, name))
        longest = COMPILE_SECONDS[self.device.type]
        for rows in BATCHES[self.device.type]:
            run = partial(self.compiled_forward, rows)
            longest = max(longest, self.part(f"compiled forward of {rows}", run, longest))

    def part(self, name: str, run: Callable[[], Any], needed: float = 0.0) -> float:
        """Runs a part if there is time, writes what it found, and returns its seconds."""
        start = time.perf_counter()
        if start + needed > self.end:
            self.cut.append(name)
            return 0.0
        kept = self.failures if name in JUDGED else self.errors
        try:
            found = attempt(name, run, kept)
            self.result[name] = {"error": kept[-1]["error"]} if found is None else found
        except ContextDied:
            # whatever part it was in: no later one can run
            self.failures += [] if kept is self.failures else kept[-1:]
            raise
        finally:
            write_json(self.path, self.result)
        taken = time.perf_counter() - start
        print(f"{name} ({taken:.1f} s): {json.dumps(self.result[name])}", flush=True)
        return taken

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], Any], total: float = 0.4) -> float:
        """Times back-to-back calls as a program makes them: launches and waits included."""
        call()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        repeats = 1
        if self.on_gpu:
            repeats = min(max(int(total / (time.perf_counter() - start)), 3), 50)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def inputs(self, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Draws states, noise levels that differ, and prompts."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn((rows, *self.model.latent_shape), generator=generator, device=self.device)
        sigma = torch.linspace(0.95, 0.15, rows, device=self.device)
        return x, sigma, torch.arange(rows, device=self.device) % 2

    def matmul(self) -> Result:
        """Times the product that every utilisation is divided by."""
        size = 8192 if self.on_gpu else 64
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return {"size": size, "tflops": 2e-12 * size**3 / self.seconds(lambda: a @ b)}

    def forward(self) -> list[Result]:
        """Times a forward by batch, eager and replayed."""
        return [row for rows in BATCHES[self.device.type] for row in self._forward(rows, "eager")]

    def compiled_forward(self, rows: int) -> list[Result]:
        """Times a forward with every block compiled; blocks share their code."""
        backend = "inductor" if self.on_gpu else "aot_eager"
        start = time.perf_counter()
        try:
            for block in self.model.module.blocks:
                block.compile(dynamic=False, backend=backend)
            found = self._forward(rows, "compiled")
            same = self._grad_mode(rows)
        finally:
            for block in self.model.module.blocks:
                block._compiled_call_impl = None
        whole = {"mode": "grad and no-grad, compiled", "rows": rows, "bitwise_equal": same}
        return [*found, whole | {"seconds_in_all": time.perf_counter() - start}]

    def _forward(self, rows: int, mode: str) -> list[Result]:
        given = self.inputs(rows)
        with torch.no_grad():
            launched = self.seconds(lambda: self.model.velocity(*given))
            times = {mode: launched}
            if self.on_gpu:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    kept = self.model.velocity(*given)
                times[f"{mode}, graph"] = self.seconds(graph.replay)
                del kept, graph
        work = 1e-12 * rows * self.config.flops
        return [
            {"mode": name, "rows": rows, "ms": 1e3 * taken, "tflops": work / taken}
            for name, taken in times.items()
        ]

    def _grad_mode(self, rows: int) -> bool:
        given = self.inputs(rows)
        with torch.no_grad():
            plain = self.model.velocity(*given)
        return torch.equal(plain, self.model.velocity(*given).detach())

    def bitwise(self) -> Result:
        """Compares the bits of rows in other company, other places and other batch sizes."""
        rows = 16 if self.on_gpu else 4
        (x, sigma, prompt), (other, *_) = self.inputs(rows), self.inputs(rows, seed=1)
        half = rows // 2
        mixed = torch.cat([x[:half], other[half:]])
        turned = torch.arange(rows, device=self.device).roll(3)
        with torch.no_grad():
            base = self.model.velocity(x, sigma, prompt)
            company = self.model.velocity(mixed, sigma, prompt)[:half]
            moved = self.model.velocity(x[turned], sigma[turned], prompt[turned])
            alone = self.model.velocity(x[:1], sigma[:1], prompt[:1])
            again = self.model.velocity(x, sigma, prompt)
        difference = (alone - base[:1]).float().norm() / base[:1].float().norm()
        return {
            "rows": rows,
            "two_runs_equal": torch.equal(base, again),
            "other_neighbours_equal": torch.equal(base[:half], company),
            "other_places_equal": torch.equal(base[turned], moved),
            "grad_and_no_grad_equal": self._grad_mode(rows),
            "alone_against_batch": float(difference),
        }

    def tape(self) -> Result:
        """Keeps the graph of 15 states, as a rollout does, and takes their backward."""
        given = self.inputs(TAPED)
        self.model.velocity(*given).sum().backward()
        self.wait()
        before = torch.cuda.memory_allocated(self.device) if self.on_gpu else 0
        start = time.perf_counter()
        v = self.model.velocity(*given)
        self.wait()
        middle = time.perf_counter()
        held = torch.cuda.memory_allocated(self.device) - before if self.on_gpu else None
        v.backward(torch.randn_like(v))
        self.wait()
        end = time.perf_counter()
        return {
            "states": TAPED,
            "gib": None if held is None else held / 2**30,
            "forward_ms": 1e3 * (middle - start),
            "backward_ms": 1e3 * (end - middle),
            "backward_over_forward": (end - middle) / (middle - start),
        }

    def attention(self) -> Result:
        """Times the attention of 16 rows by backend, forward and both ways."""
        c, tokens = self.config, self.config.image_tokens + self.config.text_tokens
        shape = (16 if self.on_gpu else 2, c.heads, tokens, c.width // c.heads)
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        q, k, v = (
            torch.randn(shape, device=self.device).to(dtype).requires_grad_() for _ in range(3)
        )
        found: Result = {"installed": [name for name in ATTENTION if find_spec(name)]}
        for name in BACKENDS if self.on_gpu else ("MATH",):

            def both() -> None:
                out = F.scaled_dot_product_attention(q, k, v)
                torch.autograd.grad(out, (q, k, v), out)

            def run(name: str = name, both: Callable[[], None] = both) -> dict[str, float]:
                with sdpa_kernel([getattr(SDPBackend, name)]):
                    with torch.no_grad():
                        one = self.seconds(lambda: F.scaled_dot_product_attention(q, k, v), 0.1)
                    return {"forward_ms": 1e3 * one, "both_ms": 1e3 * self.seconds(both, 0.1)}

            took = attempt(f"attention {name}", run, self.errors)
            found[name] = took or {"error": self.errors[-1]["error"]}
        return found

    def decoder(self) -> list[Result]:
        """Times a decoder with its norms eager, eager in channels-last, and fused."""
        widths, side = (WIDTHS, 64) if self.on_gpu else (SMALL_WIDTHS, 4)
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        last, first = torch.channels_last, torch.contiguous_format
        kinds = {
            "eager": (eager_norm, first),
            "eager, channels last": (eager_norm, last),
            "group_norm_silu, channels last": (fused_norm, last),
        }
        found = []
        for images in (1, 8):
            for name, (norm, layout) in kinds.items():
                torch.manual_seed(0)
                net = random_decoder(norm, widths).to(self.device, dtype).to(memory_format=layout)
                latents = torch.randn(images, 16, side, side, device=self.device)
                latents = latents.to(dtype).to(memory_format=layout)
                with torch.no_grad():
                    taken = self.seconds(partial(net, latents))
                found.append({"norms": name, "images": images, "ms": 1e3 * taken})
        return found

    def kernels(self) -> list[Result]:
        """Times our branch step and loss at 8 x 3 and 64 x 3."""
        lane, found = Lane(self.device), []
        for parents in (8, 64):
            for case in noise_cases(self.device, parents):
                if case.size == "flux-1024" or case.op not in KERNELS:
                    continue
                for name in implementations(case, self.device):
                    sets = num_sets(self.device, case.footprint)
                    ready = lane.prepare(forced(case.ours, name), sets)
                    times = time_in_turn(lane, {name: ready}, 0.1 if self.on_gpu else 0.0, (2, 20))
                    us = 1e6 * spread(times[name]).median
                    row = {"op": case.op, "size": case.size, "label": case.label, "us": us}
                    row |= {"implementation": name, "gb_per_s": 1e-3 * case.num_bytes / us}
                    found.append(row | {"normals_per_s": 1e6 * case.num_normals / us})
                    del ready
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--budget", type=float, default=70.0, help="seconds")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    torch._dynamo.config.recompile_limit = 64
    found = Checklist(device, options.json, options.budget)
    with suppress(ContextDied):
        found.run()
    write_json(options.json, found.result)
    print(f"cut by the budget: {', '.join(found.cut) or 'nothing'}")
    print(f"broke, not judged: {', '.join(f['what'] for f in found.errors) or 'nothing'}")
    return int(bool(found.failures))


if __name__ == "__main__":
    sys.exit(main())
