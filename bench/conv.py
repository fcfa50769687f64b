"""How fast is a packed convolution, against torch's fp32 one?

python bench/conv.py [--bits 2 4 8] [--a8] [--threads 1] [--isa avx2] [--out conv.json]
python bench/conv.py --peers --a8 --out peers.json   # with what is installed of bench/peers; see race.py
"""

from __future__ import annotations

import argparse

import torch
from harness import measure, write
from peers import conv as peers
from race import Cell, report
from torch import nn

import mpqkern as mq
from mpqkern.ledger import table

# name: batch, channels in, out, height = width, kernel, stride, groups
CASES = {
    "ResNet-18 stage 1": (1, 64, 64, 56, 3, 1, 1),
    "ResNet-18 stage 2": (1, 128, 128, 28, 3, 1, 1),
    "ResNet-18 stage 3": (1, 256, 256, 14, 3, 1, 1),
    "ResNet-18 stage 4": (1, 512, 512, 7, 3, 1, 1),
    "ResNet-18 downsampling": (1, 128, 256, 28, 3, 2, 1),
    "ResNet-50 1x1": (1, 256, 64, 56, 1, 1, 1),
    "depthwise": (1, 144, 144, 56, 3, 1, 144),
    "digits, first block": (64, 32, 32, 8, 3, 1, 1),
    "digits, last block": (64, 128, 128, 2, 3, 1, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--a8", action="store_true", help="with 8-bit activations, too")
    parser.add_argument("--peers", action="store_true", help="with other libraries, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", default="", choices=["", *mq.ops.ISAS[1:]], help="a lower instruction set")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    if args.isa:
        mq.ops.isa(args.isa)
    schemes = [mq.Scheme(b, act_bits=a) for b in args.bits for a in ((None, 8) if args.a8 else (None,))]
    if args.peers:
        layers = ((name, *peers.layer(*case)) for name, case in CASES.items())
        cells = (Cell({"case": name}, peers.racers(of, schemes), of, *data) for name, of, *data in layers)
        return report("conv", cells, args)
    rows, lines = [], [("case", "what", "us", "+-", "x float", "GMAC/s")]
    for case, (batch, cin, cout, size, kernel, stride, groups) in CASES.items():
        conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups)
        x = torch.randn(batch, cin, size, size)
        modules: dict[str, nn.Module] = {"float": conv}
        modules |= {str(s): mq.PackedConv2d.from_float(conv, s) for s in schemes}
        with torch.inference_mode():
            times = measure({n: (lambda i, m=m, x=x: m(x)) for n, m in modules.items()}, rounds=args.rounds)
            macs = conv(x).numel() * conv.weight[0].numel()
        for name, t in times.items():
            ratio = times["float"].seconds / t.seconds
            rows.append({"case": case, "what": name, "us": t.seconds * 1e6, "spread": t.spread, "speedup": ratio})
            rate = f"{macs / t.seconds / 1e9:.0f}"
            lines.append((case, name, f"{t.seconds * 1e6:.0f}", f"{t.spread:.0%}", f"{ratio:.2f}", rate))
    print(f"{mq.ops.isa()}, {args.threads} thread(s)")
    print(table(lines, left=(0, 1)))
    write(args.out, {"bench": "conv", "arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
