"""What one would otherwise take: other libraries' kernels for the same layer, all behind one call.

linear.PEERS and conv.racers list them. All are optional (`pip install onnx onnxruntime openvino`; for ggml see
ggml.py): what is not installed, or refuses a case, is left out and the reason said. A peer gets a float weight, makes
its own quantized copies of it and computes with one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]  # (x, weight): the float layer
JUDGED = 16  # rows of x, or images, whose results are looked at


@dataclass(frozen=True)
class Built:
    call: Callable[[int], Tensor]  # call(i) turns to the next copies; the result is that of the first copy or an equal
    values: Tensor  # the weight that it computes with
    products: int = 1  # done by one call: a graph holds all copies, so that its overhead is not counted each time


@dataclass(frozen=True)
class Peer:
    """`make(weight, x, copies)` gives what computes with `x`; `bits` 32 is float, `group` 0 a whole row."""

    name: str
    bits: int
    arithmetic: str  # "fp32" or "int8": the peak that it is held against
    make: Callable[[Tensor, Tensor, int], Built]
    group: int = 0
    scale_bytes: float = 4
    ours: bool = False

    def bytes(self, weight: Tensor) -> float:
        """What a product has to read."""
        rows = len(weight)
        scales = rows * (weight.numel() // rows // self.group if self.group else 1) if self.bits < 16 else 0
        wide = weight.element_size() if self.bits == 32 else self.bits / 8
        return weight.numel() * wide + scales * self.scale_bytes


def build(
    peers: Iterable[Peer], weight: Tensor, x: Tensor, copies: Callable[[float], int]
) -> tuple[dict[str, Built], dict[str, str]]:
    """Those that work here, by name, and why the others do not; `copies(bytes)` says how many to make."""
    found, missing = {}, {}
    for peer in peers:
        try:
            made = peer.make(weight, x, copies(peer.bytes(weight)))
            made.call(0)
            found[peer.name] = made
        except Exception as error:  # a peer may fail in any way: the others are still worth measuring
            missing[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return found, missing


def grid(weight: Tensor, bits: int, group: int = 0) -> tuple[Tensor, Tensor]:
    """Round to nearest on a symmetric grid: int8 codes [N, K] from -2**(bits-1), scales [N, groups] in fp32.

    >>> grid(torch.tensor([[1.0, -2.0, 0.4, 0.0]]), 4)
    (tensor([[ 4, -8,  2,  0]], dtype=torch.int8), tensor([[0.2500]]))
    """
    low = 2 ** (bits - 1)
    rows = weight.flatten(1).unflatten(1, (-1, group or weight[0].numel()))
    scales = rows.abs().amax(-1, keepdim=True) / low
    codes = (rows / scales).round().clamp(-low, low - 1)
    return codes.to(torch.int8).reshape(weight.shape), scales.squeeze(-1)


def spread_out(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight that codes and scales stand for, in double.

    >>> spread_out(*grid(torch.tensor([[1.0, -2.0, 0.4, 0.0]]), 4))
    tensor([[ 1.0000, -2.0000,  0.5000,  0.0000]], dtype=torch.float64)
    """
    groups = codes.flatten(1).unflatten(1, (scales.shape[1], -1))
    return (groups.double() * scales.double()[..., None]).reshape(codes.shape)


def errors(found: Built, product: Product, weight: Tensor, x: Tensor) -> dict[str, float]:
    """Largest errors relative to the largest result: to the float weight's, and to the very weight's that it holds."""
    y = found.call(0)[:JUDGED].double()
    exact = {"error": weight.double(), "own_error": found.values.double()}
    results = {name: product(x[:JUDGED].double(), values) for name, values in exact.items()}
    return {name: float((y - r).abs().max() / r.abs().max()) for name, r in results.items()}


def top_of_range(peer: Peer, product: Product, weight: Tensor, x: Tensor) -> float | None:
    """What comes back of the right result when sums are as large as they get (equal weights, activations near the top
    of their range): 1 is exact, less is a sum that stopped at the end of 16 bits."""
    high, worst = 0.98 + 0.02 * torch.rand_like(x[:JUDGED]), 1.0
    weight = weight if weight.dim() > 2 else weight[:256]  # rows alike do not count on each other
    for sign in (1.0, -1.0):
        found, _ = build([peer], torch.full_like(weight, sign), high, lambda _: 1)
        if peer.name not in found:
            return None
        right = product(high.double(), found[peer.name].values.double())
        ratio = float((found[peer.name].call(0).double() / right).median())  # not the padded edge of an image
        worst = max(worst, ratio, key=lambda r: abs(r - 1))
    return worst
