"""verify: do the packed kernels compute what their codes say? Layer by layer and end to end.

Each packed layer is run again on the inputs that it met, in fp64 and plain PyTorch. A result is a sum of K
products; summed in fp32 in any order its error is, with u = 2^-24, at most

    6 sqrt(K) u  *  sum |x| |w|        (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5): fails with
                                        probability below 2 K exp(-18))

to which come 3 u sum |x| |w| for rounding each weight (difference, product) and the sum, and the rounding of
the result to its own type. Where activations are bf16 or fp16, weights may be rounded to that type first. With
act_bits=8, products and their sums over a group, or over spans of 256 and more of it, are exact integers: K is then
the number of these spans. An activation that a layer applies widens the bound by its steepest slope; one with an
exponential adds 4 u times the size of what it is applied to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packed, plain
from .catalog import Forward, call, float_outputs, input_of, require_arguments
from .held import held, hooked
from .ledger import table
from .nn import PackedConv2d, PackedLinear, PackedModule

CONFIDENCE = 6  # of the probabilistic bound
SLOPES = {"relu": 1.0, "relu6": 1.0, "silu": 1.1, "gelu": 1.13}  # the steepest of each activation, rounded up
CURVES = ("silu", "gelu")
EXACT_SPAN = 256  # products with 8-bit activations that are summed exactly at least, if the group is as long


@dataclass(frozen=True)
class Check:
    """One layer, or the whole model under the name "end to end"."""

    name: str
    error: float  # largest |packed - reference|
    bound: float  # what it may be there
    worst: float  # largest error / bound over all results; above 1 is a failure

    @property
    def ok(self) -> bool:
        return self.worst <= 1


@dataclass(frozen=True)
class Verification:
    layers: tuple[Check, ...]
    end_to_end: Check
    unreached: tuple[str, ...] = ()  # packed layers that the batch never came to: not checked

    @property
    def ok(self) -> bool:
        return all(check.ok for check in (*self.layers, self.end_to_end))

    def __str__(self) -> str:
        lines = [("layer", "error", "bound", "worst / bound", "")]
        for c in (*self.layers, self.end_to_end):
            lines.append((c.name, f"{c.error:.2e}", f"{c.bound:.2e}", f"{c.worst:.3f}", "ok" if c.ok else "WRONG"))
        lines += [(name, "", "", "", "not reached by this batch") for name in self.unreached]
        return table(lines, left=(0, 4))


def verify(model: nn.Module, batch: Any, *, forward: Forward | None = None) -> Verification:
    """Checks every packed layer on the inputs that `batch` (tensor, tuple or dict) brings it; `forward(model, batch)`
    is for models that are called in another way.

    End to end, the model is run once more with every packed layer replaced by its fp64 reference; that
    difference may be no larger than if each layer's own bound had been used up and passed on, which is
    measured by two more runs whose layers are off by their bounds. All runs see the same random numbers and
    leave buffers as they were.

    >>> from mpqkern import swap_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> _ = swap_(model, {nn.Linear: 4})
    >>> verify(model, torch.randn(8, 64)).ok
    True
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedModule)}
    if not layers:
        raise ValueError("model has no packed layer; wanted one that swap_ has worked on")
    if forward is None:
        require_arguments(model, batch)
    worst: dict[str, Check] = {}

    def record(name: str, module: PackedModule, y: Tensor, exact: Tensor, bound: Tensor) -> None:
        check = _compare(name, y, exact, bound)
        if name not in worst or check.worst > worst[name].worst:
            worst[name] = check

    def run() -> Any:
        return (forward or call)(model, batch)

    got = _run(model, run, layers, record)
    exact = _run(model, run, layers, None, shift=0.0)
    moved = [_run(model, run, layers, None, shift=s) for s in (1.0, -1.0)]
    if not worst:
        raise ValueError("batch reaches no packed layer; wanted one that brings inputs to at least one")
    if not got:
        raise ValueError("the model's output holds no float tensor to compare; wanted at least one")
    checks = tuple(worst[name] for name in layers if name in worst)
    unreached = tuple(name for name in layers if name not in worst)
    return Verification(checks, _end_to_end(got, exact, moved), unreached)


def reference(
    module: PackedModule, x: Tensor, dtype: torch.dtype, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The layer's result in fp64, and how far a kernel may be from it at each place."""
    w = _exact_weight(module)
    bias = None if module.bias is None else module.bias.double()
    u, u_out = 2.0**-24, torch.finfo(dtype).eps / 2
    if module.scheme.act_bits:
        spans = math.ceil(module.k / min(module.group_size or module.k, EXACT_SPAN))
        values, factor = module.rounded_input(x), (CONFIDENCE * spans**0.5 + 3) * u
    else:  # a kernel may round weights to the type of the result
        values = x.double()
        factor = (CONFIDENCE * module.k**0.5 + 3) * u + (0.0 if dtype == torch.float32 else u_out)
    exact = _apply(module, values, w, bias)
    size = _apply(module, values.abs(), w.abs(), None if bias is None else bias.abs())
    bound = factor * size + 2 * u_out * exact.abs() + torch.finfo(dtype).tiny
    if activation is None:
        return exact, bound
    after = plain.ACTIVATIONS[activation](exact)
    computed = 4 * u * exact.abs() if activation in CURVES else 0
    return after, SLOPES[activation] * bound + computed + 2 * u_out * after.abs()


def _handed_on(y: Tensor, exact: Tensor, bound: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers as what they stand for: within -127 to 127 steps of `scale`, half a step off, and NaN where a sample is
    not finite."""
    step = scale.double()
    finite = exact.float().isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
    exact = torch.where(finite, exact.clamp(-127 * step, 127 * step), torch.nan)
    return plain.from_bytes(y, step), exact, bound + step / 2


def _exact_weight(module: PackedModule) -> Tensor:
    """scale * (code - zero) in fp64, where neither step rounds."""
    codes = packed.unpack(module.qweight, module.scheme.bits, module.k).double()
    scale, zero = (packed.spread(t.double(), module.group_size, module.k) for t in (module.scales, module.zeros))
    return packed.weight_from_rows(scale * (codes - zero), module.weight_shape)


def _compare(name: str, y: Tensor, exact: Tensor, bound: Tensor) -> Check:
    """Where the exact result overflows the type of `y`, or is no number, `y` must be the same; elsewhere near."""
    rounded = exact.to(y.dtype)
    strange = ~rounded.isfinite()
    same = torch.equal(y.isnan(), rounded.isnan()) and torch.equal(
        y[strange].nan_to_num(), rounded[strange].nan_to_num()
    )
    if not y.numel():
        return Check(name, 0.0, 0.0, 0.0)
    error = (y.double() - exact).abs().masked_fill(strange, 0)
    bound = bound.masked_fill(strange, 1)
    ratio = float((error / bound).nan_to_num(torch.inf).max())
    return Check(name, float(error.nan_to_num(torch.inf).max()), float(bound.max()), ratio if same else torch.inf)


def _apply(module: PackedModule, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, PackedLinear):
        return F.linear(x, w, bias)
    assert isinstance(module, PackedConv2d)
    if module._pad_before is not None:
        x = F.pad(x, module._pad_before, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    return F.conv2d(x, w, bias, module.stride, module._op_padding, module.dilation, module.groups)


def _run(
    model: nn.Module,
    run: Callable[[], Any],
    layers: dict[str, PackedModule],
    record: Callable[[str, PackedModule, Tensor, Tensor, Tensor], None] | None,
    shift: float = 0.0,
) -> list[Tensor]:
    """The model's float outputs; with `record`, as it is, else with references off by `shift` bounds."""

    def hook(name: str) -> Callable[..., Tensor | None]:
        def watch(module: PackedModule, args: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> Tensor | None:
            activation = args[1] if len(args) > 1 else named.get("activation")
            dtype = y.dtype if y.is_floating_point() else torch.float32  # integers are handed on in place of it
            exact, bound = reference(module, input_of(args, named), dtype, activation)
            if dtype != y.dtype and record is not None:
                y, exact, bound = _handed_on(y, exact, bound, args[2] if len(args) > 2 else named["out_scale"])
            if record is not None:
                record(name, module, y, exact, bound)
                return None
            return (exact + shift * bound).to(dtype)

        return watch

    # first in line, so that hooks of the user's own act on references as they do on results
    handles = (m.register_forward_hook(hook(name), prepend=True, with_kwargs=True) for name, m in layers.items())
    with hooked(handles), held(model):
        return float_outputs(run())


def _end_to_end(got: list[Tensor], exact: list[Tensor], moved: list[list[Tensor]]) -> Check:
    """Root mean squares over each output: single entries of `moved` may cancel, their sum does not."""
    worst = Check("end to end", 0.0, 0.0, 0.0)
    for i, (y, want) in enumerate(zip(got, exact, strict=True)):
        finite = want.isfinite()
        error, bound = _distance(y, want, finite), max(_distance(m[i], want, finite) for m in moved)
        same = torch.equal(y[~finite].nan_to_num(), want[~finite].nan_to_num()) and bool(y[finite].isfinite().all())
        ratio = (error / bound if bound else float(error > 0)) if same else torch.inf
        if ratio >= worst.worst:
            worst = Check("end to end", error, bound, ratio)
    return worst


def _distance(a: Tensor, b: Tensor, where: Tensor) -> float:
    difference = (a[where] - b[where]).nan_to_num(torch.inf)
    return float(difference.square().mean().sqrt()) if difference.numel() else 0.0
