"""All contenders for one layer in turn, and a row of figures for each: what linear.py and conv.py share.

"of roof" is the least time that reading the weight and doing the multiply-adds can take on this processor, over the
time taken; "error" is to the float weight's result, "own error" to the exact result of the very weight that is stored;
"of right" is what comes back of a sum as large as they get: below 1 it has saturated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import copies, keep_memory, measure, write
from peers import Peer, Product, build, errors, top_of_range
from roofline import Peaks, peaks
from torch import Tensor

from mpqkern import ops
from mpqkern.ledger import table

WORK = 2 * 10**9  # multiply-adds with all copies of a weight: with more, memory is not what takes the time


@dataclass(frozen=True)
class Cell:
    """One layer, and who computes it; speed is relative to the first."""

    head: dict[str, Any]  # what rows and lines begin with
    racers: Sequence[Peer]
    product: Product
    weight: Tensor
    x: Tensor


def race(cell: Cell, *, peak: Peaks, rounds: int, sums: bool = False) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each that can run, and why the others are missing; `sums`: look for saturation, too."""
    weight, x, product = cell.weight, cell.x, cell.product
    results = product(x, weight).numel()
    macs = results * weight[0].numel()

    def rotated(weight_bytes: float) -> int:
        return max(2, min(copies(int(weight_bytes) + 4 * results), WORK // macs))

    built, missing = build(cell.racers, weight, x, rotated)
    times = measure({name: made.call for name, made in built.items()}, rounds=rounds)
    seconds = {name: times[name].seconds / made.products for name, made in built.items()}
    rows = [
        {**cell.head, "what": p.name, "bits": p.bits, "ours": p.ours,
         "us": seconds[p.name] * 1e6, "spread": times[p.name].spread,
         "speedup": seconds[cell.racers[0].name] / seconds[p.name],
         "roofline": peak.seconds(p.bytes(weight), macs, p.arithmetic) / seconds[p.name],
         **errors(built[p.name], product, weight, x),
         "of_right": top_of_range(p, product, weight, x) if sums else None}
        for p in cell.racers if p.name in built
    ]  # fmt: skip
    return rows, missing


def report(bench: str, cells: Iterable[Cell], args: argparse.Namespace) -> None:
    """Races in every cell, prints a table and writes `args.out` after each: a long run may be cut short."""
    keep_memory()
    peak, rows, missing = peaks(), [], {}
    for cell in cells:
        with torch.inference_mode():
            found, why = race(cell, peak=peak, rounds=args.rounds, sums=args.peers)
        rows += found
        missing |= {f"{name} ({', '.join(map(str, cell.head.values()))})": reason for name, reason in why.items()}
        result = {"bench": bench, "arguments": vars(args), "peaks": vars(peak), "missing": missing}
        write(args.out, result | {"rows": rows})
    heads = list(cell.head)
    lines = [(*heads, "what", "us", "+-", "x float", "of roof", "error", "own error", "of right")]
    for r in rows:
        right = "" if r["of_right"] is None else f"{r['of_right']:.3f}"
        lines.append((*(str(r[name]) for name in heads), r["what"], f"{r['us']:.0f}", f"{r['spread']:.0%}",
                      f"{r['speedup']:.2f}", f"{r['roofline']:.2f}", f"{r['error']:.4f}", f"{r['own_error']:.4f}",
                      right))  # fmt: skip
    print(f"{ops.isa()}, {args.threads} thread(s); {peak}")
    print(table(lines, left=(0, len(heads))))
    for name, reason in missing.items():
        print(f"left out: {name}: {reason}")
