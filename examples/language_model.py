"""A language model along the frontier of bytes against nats: what each step down in size costs in perplexity.

    python -m examples.language_model [--quick] [--points 6]

A byte-level transformer of 19 layers, trained for a minute on Python's own library. One measurement gives the whole
frontier; some of its points are packed and judged on files that were held out.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from bench.models.data import stdlib, windows
from bench.models.training import trained_chargpt
from mpqkern.ledger import table


def nats(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean loss of a byte."""
    with torch.inference_mode():
        parts = zip(x.split(32), y.split(32), strict=True)
        losses = [F.cross_entropy(model(a).flatten(0, 1), b.flatten()) for a, b in parts]
    return float(torch.stack(losses).mean())


def continued(model: nn.Module, text: str, length: int) -> str:
    """The likeliest next bytes."""
    ids = torch.tensor([list(text.encode())])
    with torch.inference_mode():
        for _ in range(length):
            ids = torch.cat([ids, model(ids[:, -128:])[:, -1:].argmax(-1)], 1)
    return bytes(ids[0].tolist()).decode(errors="replace")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="trained for seconds, few samples")
    parser.add_argument("--points", type=int, default=6, help="of the frontier to pack and judge")
    args = parser.parse_args(arguments)
    steps, samples = (10, 8) if args.quick else (600, 64)
    model = trained_chargpt(steps)
    learned, rest = stdlib()
    x, y = windows(learned, samples, torch.Generator().manual_seed(0))
    held_out = windows(rest, 2 * samples, torch.Generator().manual_seed(1))

    scores = mq.score(model, [(x, y)], method="fisher", bits=(2, 4, 8))
    front = mq.frontier(scores, kind="bytes")
    places = sorted({round(i * (len(front) - 1) / max(args.points - 1, 1)) for i in range(args.points)} | {front.knee})

    def line(name: str, judged: nn.Module, size: int) -> tuple[str, ...]:
        loss = nats(judged, *held_out)
        return name, f"{size:,} B", f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{loss / math.log(2):.3f}"

    floats = sum(4 * layer.params for layer in mq.catalog(model))
    lines = [("point", "packed weights", "nats a byte", "perplexity", "bits a byte"), line("float", model, floats)]
    for i in reversed(places):
        packed = copy.deepcopy(model)
        ledger = mq.swap_(packed, front[i])
        lines.append(line(f"{i} (knee)" if i == front.knee else str(i), packed, ledger.bytes))
        if i == front.knee:
            chosen = packed
    print(f"{len(front)} points on the frontier\n{table(lines)}")
    for name, speaker in (("float", model), ("knee", chosen)):
        print(f"\n{name}: {continued(speaker, 'def __init__(self, ', 8 if args.quick else 60)!r}")


if __name__ == "__main__":
    main()
