"""What PackedLinear and PackedConv2d share: the packed buffers, their types, the readable weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import packed
from ..rounding.grid import Codes
from ..scheme import Scheme

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedModule(nn.Module):
    """Holds a weight as `qweight`, `scales` and `zeros` (see mpqkern.packed), and an optional `bias`.

    All four are buffers, so `state_dict` is plain tensors. Casting the module (`.half()`, `.to(dtype)`)
    casts the bias, as for a float layer; codes, scales and zeros keep their types.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self,
        scheme: Scheme,
        weight_shape: tuple[int, ...],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.weight_shape = tuple(weight_shape)
        self._dtype = dtype or torch.get_default_dtype()
        scale_dtype = getattr(torch, scheme.scale_dtype)
        for name, shape in scheme.shapes(weight_shape).items():
            kind = torch.uint8 if name == "qweight" else scale_dtype
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        values = torch.zeros(weight_shape[0], dtype=self._dtype, device=device) if bias else None
        self.register_buffer("bias", values)

    @classmethod
    def empty_like(cls, layer: nn.Module, scheme: Scheme) -> Self:
        """The packed layer that the float `layer` would become, its buffers not yet filled."""
        raise TypeError(f"{cls.__name__} is abstract; wanted PackedLinear or PackedConv2d")

    def empty_float(self) -> nn.Module:
        """The float layer of the same sizes, on the same device, its parameters not yet filled."""
        raise TypeError(f"{type(self).__name__} is abstract; wanted PackedLinear or PackedConv2d")

    @classmethod
    def from_float(cls, layer: nn.Module, scheme: Scheme, *, search: str = "minmax") -> Self:
        """Packs a copy of `layer`'s weight; `search` is "minmax" or "mse"."""
        new = cls.empty_like(layer, scheme)
        new.pack_(layer.weight, search)
        new.copy_bias_(layer)
        return new

    def to_float(self) -> nn.Module:
        """A float layer with the dequantized weight."""
        new = self.empty_float()
        new.weight = nn.Parameter(self.dequantize())
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.clone())
        return new

    def copy_bias_(self, layer: nn.Module) -> None:
        if layer.bias is not None:
            self.bias = layer.bias.detach().clone()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the float layer that this stands for: the bias's, or what casts have made of it."""
        return self._dtype if self.bias is None else self.bias.dtype

    @property
    def k(self) -> int:
        """Weights in a row of the packed matrix."""
        return math.prod(self.weight_shape[1:])

    @property
    def group_size(self) -> int:
        """The ops' group size: 0 is the whole row."""
        return self.scheme.group_size or 0

    @torch.inference_mode(False)  # or the buffers could never take part in a backward pass
    @torch.no_grad()
    def pack_(self, weight: Tensor, search: str = "minmax") -> float:
        """Quantizes a float weight into the buffers; returns the sum of squared errors."""
        scheme = self.scheme
        rows = packed.weight_rows(weight.detach()).contiguous()
        if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            rows = rows.float()
        qweight, scales, zeros, errors = torch.ops.mpqkern.quantize(
            rows, scheme.bits, self.group_size, scheme.symmetric, search, scheme.scale_dtype
        )
        self.qweight, self.scales, self.zeros = qweight, scales, zeros
        return float(errors.double().sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def store_(self, found: Codes) -> None:
        """Packs codes that were chosen elsewhere."""
        device = self.qweight.device
        self.qweight = torch.ops.mpqkern.pack(found.codes.to(device), self.scheme.bits)
        self.scales, self.zeros = found.scales.to(device), found.zeros.to(device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def shift_bias_(self, shift: Tensor) -> None:
        """Adds to the bias; a layer without one gets one."""
        shift = shift.to(self.qweight.device, self.dtype)
        self.bias = shift if self.bias is None else self.bias + shift

    def dequantize(self) -> Tensor:
        """The weight as float, in the float layer's shape and the module's dtype."""
        rows = torch.ops.mpqkern.dequantize(
            self.qweight, self.scales, self.zeros, self.scheme.bits, self.group_size, self.k
        )
        return packed.weight_from_rows(rows, self.weight_shape).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew at each access; read it, writing changes nothing."""
        return self.dequantize()

    def packed_bytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(t.numel() * t.element_size() for t in (self.qweight, self.scales, self.zeros))

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> PackedModule:
        kept = {name: getattr(self, name) for name in ("scales", "zeros")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:  # a cast: follow it to its device only
                setattr(self, name, old.to(new.device))
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.scales.device)).dtype
        if self.__dict__.get("_float") is not None:  # the float module that swap_ was asked to keep
            self._float._apply(fn)
        return self

    def _scheme_repr(self) -> str:
        s = self.scheme
        text = f"bits={s.bits}, group_size={s.group_size}, symmetric={s.symmetric}"
        return text + (f", act_bits={s.act_bits}" if s.act_bits else "")
