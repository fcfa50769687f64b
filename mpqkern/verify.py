"""verify: do the packed kernels compute what their dequantized weights say? Layer by layer and end to end.

Each packed layer is run again on the inputs that it met, in fp64 and plain PyTorch. A result is a sum of K
products; summed in fp32 in any order its error is, with u = 2^-24, at most

    6 sqrt(K) u  *  sum |x| |w|        (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5): fails with
                                        probability below 2 K exp(-18))

plus the rounding of the result to its own type. Integer products (act_bits=8) are exact, so there only the
final roundings count. Where activations are bf16 or fp16, weights may be rounded to that type first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .catalog import call, evaluating
from .ledger import table
from .nn import PackedConv2d, PackedLinear, PackedModule
from .plain import quantize_activations

CONFIDENCE = 6  # of the probabilistic bound


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


def verify(model: nn.Module, batch: Any) -> Verification:
    """Checks every packed layer on the inputs that `batch` (tensor, tuple or dict) brings it.

    End to end, the model is run once more with every packed layer replaced by its fp64 reference; that
    difference may be no larger than if each layer's own bound had been used up and passed on, which is
    measured by a third run whose layers are off by their bounds.

    >>> from mpqkern import swap_
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> _ = swap_(model, {nn.Linear: 4})
    >>> verify(model, torch.randn(8, 64)).ok
    True
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedModule)}
    if not layers:
        raise ValueError("model has no packed layer; wanted one that swap_ has worked on")
    worst: dict[str, Check] = {}

    def record(name: str, module: PackedModule, x: Tensor, y: Tensor) -> None:
        exact, bound = reference(module, x, y.dtype)
        error = (y.double() - exact).abs()
        # Where the reference is not finite (an overflow of the model's own), the kernel must agree on that.
        strange = ~exact.isfinite()
        agree = torch.equal(y.isfinite(), exact.to(y.dtype).isfinite())
        error, bound = error.masked_fill(strange, 0), bound.masked_fill(strange, 1)
        ratio = float((error / bound.clamp_min(1e-300)).max()) if error.numel() else 0.0
        check = Check(
            name, *((float(t.max()) if t.numel() else 0.0) for t in (error, bound)), ratio if agree else torch.inf
        )
        if name not in worst or check.worst > worst[name].worst:
            worst[name] = check

    with evaluating(model):
        packed = _tensors(_run(model, batch, layers, record))
        exact = _tensors(_run(model, batch, layers, None, shift=0.0))
        moved = [_tensors(_run(model, batch, layers, None, shift=s)) for s in (1.0, -1.0)]
    checks = tuple(worst[name] for name in layers if name in worst)
    unreached = tuple(name for name in layers if name not in worst)
    return Verification(checks, _end_to_end(packed, exact, moved), unreached)


def reference(module: PackedModule, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The layer's result in fp64, and how far a kernel may be from it at each place."""
    w = module.dequantize().double() if module.dtype == torch.float32 else _fp32_weight(module).double()
    bias = None if module.bias is None else module.bias.double()
    u_sum, u_weight, u_out = 2.0**-24, 0.0, torch.finfo(dtype).eps / 2
    if module.scheme.act_bits:
        values = _rounded(module, x)
        u_sum = 2.0**-24 / module.k**0.5 / CONFIDENCE  # exact products; dequantized weights round once
    else:
        values = x.double()
        u_weight = 0.0 if dtype == torch.float32 else u_out  # a kernel may round weights to the result's type
    exact = _apply(module, values, w, bias)
    size = _apply(module, values.abs(), w.abs(), None if bias is None else bias.abs())
    bound = (CONFIDENCE * module.k**0.5 * u_sum + u_weight) * size + 2 * u_out * exact.abs()
    return exact, bound + torch.finfo(dtype).tiny


def _fp32_weight(module: PackedModule) -> Tensor:
    kept, module.dtype = module.dtype, torch.float32
    try:
        return module.dequantize()
    finally:
        module.dtype = kept


def _rounded(module: PackedModule, x: Tensor) -> Tensor:
    """Activations as the 8-bit kernels see them: per row and group, or per sample of a convolution."""
    x = x.float()
    if isinstance(module, PackedLinear):
        q, scale = quantize_activations(x, module.group_size)
        spread = scale.double().repeat_interleave(module.group_size or x.shape[-1], -1)
        return q.double() * spread[..., : x.shape[-1]]
    batch = x if x.dim() == 4 else x.unsqueeze(0)
    q, scale = quantize_activations(batch.flatten(1), 0)
    return (q.double() * scale.double()).view(x.shape)


def _apply(module: PackedModule, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(module, PackedLinear):
        return F.linear(x, w, bias)
    assert isinstance(module, PackedConv2d)
    if module._pad_before is not None:
        x = F.pad(x, module._pad_before, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    return F.conv2d(x, w, bias, module.stride, module._op_padding, module.dilation, module.groups)


def _run(
    model: nn.Module,
    batch: Any,
    layers: dict[str, PackedModule],
    record: Callable[[str, PackedModule, Tensor, Tensor], None] | None,
    shift: float = 0.0,
) -> Any:
    """The model on `batch`; with `record`, as it is, else with references off by `shift` bounds."""

    def hook(name: str) -> Callable[..., Tensor | None]:
        def watch(module: PackedModule, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
            if record is not None:
                record(name, module, inputs[0], y)
                return None
            exact, bound = reference(module, inputs[0], y.dtype)
            return (exact + shift * bound).to(y.dtype)

        return watch

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        return call(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """The float tensors of a model's output, whatever holds them."""
    if isinstance(value, Tensor):
        return [value.double()] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    return []


def _end_to_end(packed: list[Tensor], exact: list[Tensor], moved: list[list[Tensor]]) -> Check:
    """Norms over the whole output: single entries of `moved` may cancel, their sum does not."""

    def distance(a: list[Tensor], b: list[Tensor]) -> float:
        return max((float((x - y).norm() / max(1, x.numel()) ** 0.5) for x, y in zip(a, b, strict=True)), default=0.0)

    error = distance(packed, exact)
    bound = max(distance(m, exact) for m in moved)
    return Check("end to end", error, bound, error / bound if bound else float(error > 0))
