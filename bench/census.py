"""Count the floating point operations of published models, and what sharing saves.

python bench/census.py --json bench/results/census.json

Runs on the meta device: no weights, no download, about a minute.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import machine

from branchcore.models.sizing import census
from branchcore.models.sizing.shapes import SHAPES

ROWS = 16


def row(name: str) -> dict[str, Any]:
    """Counts one shape."""
    shape = SHAPES[name]
    plain, shared = census.saved(shape, ROWS)
    return {
        "shape": name,
        "source": shape.architecture.source,
        "size": list(shape.size),
        "text_tokens": shape.tokens,
        "parameters": plain.parameters,
        "tera_per_row": plain.tera_per_row,
        "parts": {part: flops / plain.total for part, flops in plain.parts.items()},
        "rows": ROWS,
        "plain_tera": plain.total / 1e12,
        "shared_tera": shared.total / 1e12,
        "decode_tera": census.decode_tera(shape),
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    rows = []
    for name in args.shapes:
        rows.append(row(name))
        r = rows[-1]
        saved = 100 * (1 - r["shared_tera"] / r["plain_tera"])
        parts = ", ".join(f"{part} {100 * share:.1f} %" for part, share in r["parts"].items())
        print(
            f"{name:14} {r['parameters'] / 1e9:6.2f} B  {r['tera_per_row']:8.2f} TFLOP a row "
            f"({parts}); {ROWS} nodes {r['plain_tera']:.1f}, shared {r['shared_tera']:.1f} "
            f"(-{saved:.2f} %); decode {r['decode_tera']:.2f}"
        )
    if args.json:
        result = {"meta": machine.facts(), "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
