"""How fast is a packed convolution, against torch's fp32 one in the order of memory that suits that better?

python bench/conv.py                                        # every layer of three networks, some minutes
python bench/conv.py --networks resnet18 --batch 1 --bits 4 --a8 --isa avx2 --out conv.json
python bench/conv.py --networks mobilenet_v2 --kinds depthwise
python bench/conv.py --peers --a8 --bits 2 4 8                # with what is installed of bench/peers; see race.py

Every contender runs in NCHW and channels-last order, and its faster one counts. "x float" is torch's better time
over it; sums weigh a layer by how often it occurs. Errors are the largest, against torch's, relative to its largest
result.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator

import torch
from harness import keep_memory, measure, write
from layers import NETWORKS, Layer
from peers import conv as peers
from race import Cell, report
from torch import nn

import mpqkern as mq
from mpqkern.ledger import table

ORDERS = {"nchw": torch.contiguous_format, "last": torch.channels_last}
KINDS = {
    "depthwise": lambda layer: layer.depthwise,
    "1x1": lambda layer: layer.kernel == 1,
    "dense": lambda layer: layer.kernel > 1 and not layer.depthwise,
}


def raced(layer: Layer, batch: int, schemes: list[mq.Scheme], rounds: int) -> list[dict[str, object]]:
    """One row a contender: microseconds in each order, the speedup of its better one, its error."""
    conv = nn.Conv2d(layer.cin, layer.cout, layer.kernel, layer.stride, layer.kernel // 2, groups=layer.groups)
    x = torch.randn(batch, layer.cin, layer.size, layer.size)
    modules: dict[str, nn.Module] = {"float": conv}
    modules |= {str(s): mq.PackedConv2d.from_float(conv, s) for s in schemes}
    inputs = {order: x.contiguous(memory_format=form) for order, form in ORDERS.items()}
    lasting = nn.Conv2d(layer.cin, layer.cout, layer.kernel, layer.stride, layer.kernel // 2, groups=layer.groups)
    lasting.load_state_dict(conv.state_dict())
    lasting.to(memory_format=torch.channels_last)  # a float module's weights go with its input
    calls = {
        (name, order): (lambda i, m=lasting if (name, order) == ("float", "last") else m, y=inputs[order]: m(y))
        for name, m in modules.items()
        for order in ORDERS
    }
    with torch.inference_mode():
        times = measure(calls, rounds=rounds)  # type: ignore[arg-type]
        exact = conv(x)
        errors = {name: float((m(x) - exact).abs().max() / exact.abs().max()) for name, m in modules.items()}
    best = {name: min(times[name, order].seconds for order in ORDERS) for name in modules}
    return [
        {"layer": str(layer), "batch": batch, "what": name, "speedup": best["float"] / best[name],
         "best_us": best[name] * 1e6, "macs": exact.numel() * conv.weight[0].numel(), "error": errors[name],
         **{f"{order}_us": times[name, order].seconds * 1e6 for order in ORDERS},
         **{f"{order}_spread": times[name, order].spread for order in ORDERS}}
        for name in modules
    ]  # fmt: skip


def peer_cells(args: argparse.Namespace, schemes: list[mq.Scheme]) -> Iterator[Cell]:
    """The same layers with other libraries beside ours."""
    for network in args.networks:
        for batch in args.batch:
            for layer in NETWORKS[network]:
                if any(KINDS[kind](layer) for kind in args.kinds):
                    shape = layer.cin, layer.cout, layer.size, layer.kernel, layer.stride, layer.groups
                    of, weight, x = peers.layer(batch, *shape)
                    head = {"network": network, "batch": batch, "layer": str(layer)}
                    yield Cell(head, peers.racers(of, schemes), of, weight, x)


def lines_of(rows: list[dict[str, object]]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("layer", "times", "what", "nchw us", "last us", "x float", "GMAC/s", "error")]
    for r in rows:
        rate = f"{r['macs'] / r['best_us'] / 1e3:.0f}"  # type: ignore[operator]
        lines.append((r["layer"], str(r["times"]), r["what"], f"{r['nchw_us']:.0f}", f"{r['last_us']:.0f}",
                      f"{r['speedup']:.2f}", rate, f"{r['error']:.3f}"))  # type: ignore[arg-type]  # fmt: skip
    return lines


def totals(rows: list[dict[str, object]]) -> list[tuple[str, ...]]:
    """Milliseconds of all layers of a network, and of those of one kind."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for r in rows:
        for kind in ("all", r["kind"]):
            sums[kind, r["what"]] += r["times"] * r["best_us"] / 1e3  # type: ignore[index,operator]
    lines: list[tuple[str, ...]] = [("layers", "what", "ms", "x float")]
    lines += [(kind, what, f"{ms:.2f}", f"{sums[kind, 'float'] / ms:.2f}") for (kind, what), ms in sorted(sums.items())]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--group", type=int, default=0, help="group size, 0 for the whole row")
    parser.add_argument("--a8", action="store_true", help="with 8-bit activations, too")
    parser.add_argument("--peers", action="store_true", help="with other libraries, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--isa", default="", choices=["", *mq.ops.ISAS[1:]], help="a lower instruction set")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.isa:
        mq.ops.isa(args.isa)
    schemes = [
        mq.Scheme(b, group_size=args.group or None, act_bits=a)
        for b in args.bits
        for a in ((None, 8) if args.a8 else (None,))
    ]
    if args.peers:
        return report("conv", peer_cells(args, schemes), args)
    keep_memory()
    print(f"{mq.ops.isa()}, {args.threads} thread(s)")
    everything = []
    for network in args.networks:
        for batch in args.batch:
            rows = []
            for layer, times in NETWORKS[network].items():
                kind = next(name for name, holds in KINDS.items() if holds(layer))
                if kind in args.kinds:
                    head = {"network": network, "kind": kind, "times": times}
                    rows += [head | row for row in raced(layer, batch, schemes, args.rounds)]
            print(f"\n{network}, batch {batch}")
            print(table(lines_of(rows), left=(0, 2)))
            print(table(totals(rows), left=(0, 1)))
            everything += rows
    write(args.out, {"bench": "conv", "arguments": vars(args), "rows": everything})


if __name__ == "__main__":
    main()
