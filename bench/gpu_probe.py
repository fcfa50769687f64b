"""A section of gpu_speed.py: many weights of one layer on the same inputs, against a call of torch's for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Device, Row, rates, short
from layers import Layer
from torch import Tensor

VARIANTS = 10  # as of a layer that tries widths and groups
LINEAR = ((16, 1024, 1024), (512, 1024, 1024), (8192, 768, 768))  # rows, N, K
CONV = (Layer(64, 64, 56), Layer(256, 256, 14), Layer(512, 128, 28, 1), Layer(96, 96, 56, groups=96))
Call = Callable[[Tensor, Tensor], Tensor]


def one_by_one(product: Call, x: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([product(x, w) for w in weights])


def timed(head: Row, name: str, call: Call, x: Tensor, weights: Tensor, device: Device, peak: dict[str, float]) -> Row:
    stacks = [weights.clone() for _ in range(device.copies(weights.nbytes))]
    y = call(x, weights)
    row = head | {"what": name} | device.seconds(lambda i: call(x, stacks[i % len(stacks)]), len(stacks))
    macs = y.numel() * weights[0, 0].numel()
    return rates(row, peak, bytes=x.nbytes + weights.nbytes + y.nbytes, operations=2 * macs)


def probe(args: argparse.Namespace, device: Device, peak: dict[str, float]) -> Iterator[tuple[Row, list[Any]]]:
    """Without TF32 on either side."""
    torch.backends.cudnn.allow_tf32 = False
    mpq = torch.ops.mpqkern
    for dtype in (torch.float32, torch.float16):
        make = partial(torch.randn, device=device.kind, dtype=torch.float32)
        for m, n, k in LINEAR if device.cuda else ((8, 32, 32),):
            x, weights = make(m, k).to(dtype), make(VARIANTS, n, k).to(dtype)
            head = {"dtype": short(dtype), "layer": f"{k}>{n}", "m": m}
            calls = {"torch": partial(one_by_one, F.linear), "probe_linear": mpq.probe_linear}
            yield head, jobs(head, calls, x, weights, device, peak)
        for shape in CONV if device.cuda else (Layer(8, 8, 8),):
            for batch in args.batch:
                how = ([shape.stride] * 2, [shape.kernel // 2] * 2, [1, 1], shape.groups)
                x = make(batch, shape.cin, shape.size, shape.size).to(dtype)
                x = x.contiguous(memory_format=torch.channels_last)
                weights = make(VARIANTS, shape.cout, shape.cin // shape.groups, *[shape.kernel] * 2).to(dtype)
                head = {"dtype": short(dtype), "layer": str(shape), "batch": batch}
                calls = {
                    "torch": partial(one_by_one, lambda x, w, how=how: F.conv2d(x, w, None, *how)),
                    "probe_conv2d": lambda x, w, how=how: mpq.probe_conv2d(x, w, None, *how),
                }
                yield head, jobs(head, calls, x, weights, device, peak)


def jobs(head: Row, calls: dict[str, Call], *how: Any) -> list[Any]:
    """As gpu_speed.py wants them: a name, whether it is ours, and what measures it."""
    return [(name, name != "torch", partial(timed, head, name, call, *how)) for name, call in calls.items()]
