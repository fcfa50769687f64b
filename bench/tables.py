"""Markdown tables of a result of `linear.py --peers` or `conv.py --peers`, as the README shows them.

    python bench/tables.py peers.json [--exact]

A cell has our speed relative to torch's fp32, and relative to the best of the others: those that store the weight in
as many bits, or in float; where nobody else has that width, any. torch's own fp32, what it is all relative to, competes
too. Of kernels of ours that differ only in the order of memory the faster counts.

>>> rows = [{"m": 1, "what": "float", "bits": 32, "ours": False, "us": 80.0, "of_right": 1.0},
...         {"m": 1, "what": "w4", "bits": 4, "ours": True, "us": 20.0, "of_right": 1.0},
...         {"m": 1, "what": "sloppy", "bits": 4, "ours": False, "us": 10.0, "of_right": 0.5}]
>>> print(markdown(rows))
| weight | M=1 |
|---|---|
| w4 | 4.0x, 0.50 of sloppy |
>>> print(markdown(rows, exact=True).splitlines()[-1])
| w4 | 4.0x, 4.00 of float |
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
INEXACT = 0.02  # a largest sum that is off by more has saturated
ORDER = " channels_last"


def markdown(rows: list[Row], *, exact: bool = False) -> str:
    """`exact`: without others' kernels whose sums saturate."""
    cells: dict[str, dict[str, str]] = {}
    places = [{key: r[key] for key in list(r)[: list(r).index("what")]} for r in rows]  # what a row begins with
    for place in [p for i, p in enumerate(places) if p not in places[:i]]:
        here = [r for r, p in zip(rows, places, strict=True) if p == place]
        others = [r for r in here if not r["ours"] and not r["what"].endswith("dequantized first")]
        base = next(r["us"] for r in others if r["what"] == "float")
        if exact:
            others = [r for r in others if r["of_right"] is None or abs(r["of_right"] - 1) < INEXACT]
        column = f"M={place['m']}" if "m" in place else "speed"
        where = ", ".join(str(value) for key, value in place.items() if key != "m")
        for name in dict.fromkeys(r["what"].removesuffix(ORDER) for r in here if r["ours"]):
            row = min((r for r in here if r["what"] in (name, name + ORDER)), key=lambda r: r["us"])
            alike = [r for r in others if r["bits"] == row["bits"]]
            rivals = alike + [r for r in others if r["bits"] == 32] if alike else others
            best = min(rivals, key=lambda r: r["us"])
            text = f"{base / row['us']:.1f}x, {best['us'] / row['us']:.2f} of {best['what']}"
            cells.setdefault(f"{where}, {name}" if where else name, {})[column] = text
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [["weight", *columns], *([name, *(line.get(c, "") for c in columns)] for name, line in cells.items())]
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * (1 + len(columns)), *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--exact", action="store_true", help="without others' kernels whose sums saturate")
    args = parser.parse_args()
    print(markdown(json.loads(args.result.read_text())["rows"], exact=args.exact))


if __name__ == "__main__":
    main()
