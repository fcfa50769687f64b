"""How fast are whole networks, packed, against torch's fp32?

python bench/whole.py                                       # three networks, a minute or two
python bench/whole.py --networks resnet18 --batch 1 --bits 2 4 8 --peers --out whole.json

Weights are random, batch norms folded, one image size: 224 x 224. Of torch's and ours, the faster order of memory
counts. "fused": layers apply the ReLUs behind them. "fixed": scales of activations are fixed beforehand, as in others'
8-bit networks. "x float" is torch's time over it; errors are the largest, against torch's, relative to its largest
result.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import keep_memory, measure, write
from models.vision import MAKE
from peers import whole as peers
from torch import Tensor, nn

import mpqkern as mq
from mpqkern.ledger import table

ORDERS = {"nchw": torch.contiguous_format, "last": torch.channels_last}


def ours(model: nn.Module, x: Tensor, scheme: mq.Scheme) -> dict[str, nn.Module]:
    packed = copy.deepcopy(model)
    mq.swap_(packed, scheme)
    found = {str(scheme): packed, f"{scheme} fused": mq.fuse(packed, x)}
    if scheme.act_bits:
        fixed = copy.deepcopy(packed)
        mq.calibrate_activations_(fixed, [x], observer="max")
        found |= {f"{scheme} fixed": fixed, f"{scheme} fixed fused": mq.fuse(fixed, x)}
    return found


def raced(name: str, batch: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row a contender."""
    model, x = MAKE[name]().eval(), torch.randn(batch, 3, 224, 224)
    modules = {"float": model}
    for scheme in (mq.Scheme(bits, act_bits=act) for act in args.act_bits for bits in args.bits):
        modules |= ours(model, x, scheme)
    inputs = {order: x.contiguous(memory_format=form) for order, form in ORDERS.items()}
    lasting = copy.deepcopy(model).to(memory_format=torch.channels_last)  # a float model's weights go with its input
    calls: dict[Any, Callable[[int], Tensor]] = {
        (what, order): lambda i, m=lasting if (what, order) == ("float", "last") else m, y=inputs[order]: m(y)
        for what, m in modules.items()
        for order in ORDERS
    }
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.peers:
            others, missing = peers.racers(model, x, Path(folder))
            calls |= {(what, "nchw"): call for what, call in others.items()}
    exact = model(x)
    times = measure(calls, rounds=args.rounds)
    best = {what: min((k for k in calls if k[0] == what), key=lambda k: times[k].seconds) for what, _ in calls}
    rows = [
        {"network": name, "batch": batch, "what": what, "ours": what in modules and what != "float",
         "ms": times[key].seconds * 1e3, "spread": times[key].spread, "order": key[1],
         "speedup": times[best["float"]].seconds / times[key].seconds,
         "error": float((calls[key](0) - exact).abs().max() / exact.abs().max())}
        for what, key in best.items()
    ]  # fmt: skip
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(MAKE), choices=list(MAKE))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--exact", action="store_true", help="with activations as they are, too")
    parser.add_argument("--peers", action="store_true", help="with other libraries, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    args.act_bits = (None, 8) if args.exact else (8,)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    keep_memory()
    everything, why = [], {}
    lines: list[tuple[str, ...]] = [("network", "images", "what", "ms", "+-", "x float", "error")]
    with torch.inference_mode():
        for name in args.networks:
            for batch in args.batch:
                rows, missing = raced(name, batch, args)
                everything += rows
                why |= missing
                lines += [(name, str(batch), r["what"], f"{r['ms']:.1f}", f"{r['spread']:.0%}", f"{r['speedup']:.2f}",
                           f"{r['error']:.3f}") for r in rows]  # fmt: skip
                write(args.out, {"bench": "whole", "arguments": vars(args), "missing": why, "rows": everything})
    print(f"{mq.ops.isa()}, {args.threads} thread(s)")
    print(table(lines, left=(0, 2)))
    for name, reason in why.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
