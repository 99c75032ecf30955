"""Run every op's conformance cases once, forward and backward: a short program for a sanitizer.

    compute-sanitizer --tool memcheck python bench/small_cases.py --implementation cuda

Nothing is compared and no other kernel of ours runs. PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every
tensor an allocation of its own, so that an access behind its end is one behind an allocation.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import torch

from branchcore import _dispatch, ops, testing


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--implementation", choices=_dispatch.IMPLEMENTATIONS, default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--op", help="only this op")
    options = parser.parse_args()
    device, ran = torch.device(options.device), 0
    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    chosen = [name for name in names if options.op in (None, name)]
    specs = [importlib.import_module(f"branchcore.ops.{name}").SPEC for name in chosen]
    specs = [spec for spec in specs if options.implementation in _dispatch._ops[spec.name]]
    print(f"{sum(len(spec.cases) for spec in specs)} cases to run", flush=True)
    for spec in specs:
        with _dispatch.use(options.implementation):
            for case in spec.cases:
                testing.ones(spec, testing.to(spec.build(**case.options), device))
                ran += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(f"{spec.name}: {len(spec.cases)} cases", flush=True)
    print(f"{ran} cases ran with {options.implementation}")
    return int(ran == 0)


if __name__ == "__main__":
    sys.exit(main())
