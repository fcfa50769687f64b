"""What PackedLinear and PackedConv2d share: the packed buffers, their types, the readable weight."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from .. import ops, packed
from ..rounding.grid import Codes
from ..scheme import Scheme

if TYPE_CHECKING:
    from typing_extensions import Self


KEEPERS = ("cpu", "cuda")  # devices with kernels that take fragments
NOT_YET = -1  # a version that no tensor has: fragments are to be made


class PackedModule(nn.Module):
    """Holds a weight as `qweight`, `scales` and `zeros` (see mpqkern.packed), and an optional `bias`.

    With `act_bits=8` there may be an `act_scale` as well, fp32 [1] or, in linear layers, [groups of the weight]:
    activations are then rounded by it, and saturate beyond 127 of it, rather than each row's or sample's maximum.

    All are buffers, so `state_dict` is plain tensors; an `act_scale` that is None is not in it. Casting the module
    (`.half()`, `.to(dtype)`) casts the bias, as for a float layer; codes, scales and zeros keep their types.

    `layer(x, activation="relu")` applies one of "relu", "relu6", "silu" and "gelu" to the results before they are
    stored; `mpqkern.fuse` has a model call its layers so. With `out_scale=`, a convolution with an `act_scale` may hand
    its results to the next one as integers, rounded by that one's `act_scale`.

    Where kernels read codes in an order of their own, there may be a second copy of the codes in that order,
    `fragments`: made from `qweight`, never saved or exported. Another `qweight` has none until `derive_` is called; one
    that was written to in place has them made anew at the next call. Only writes that torch counts are seen: none to
    `qweight.data`, to inference tensors or behind numpy's back, and in a compiled program none at all; there, call
    `derive_`. Memory that is worth more than speed is saved by `keeps_fragments = False`, on a class or a layer, before
    `derive_`.
    """

    keeps_fragments: bool = True
    _fragments_op: str | None = None  # the op that takes them

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None
    act_scale: Tensor | None

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
        self.register_buffer("act_scale", None)
        self._derived: tuple[Tensor, int, Tensor] | None = None  # fragments, behind the qweight that they are of

    @classmethod
    def empty_like(cls, layer: nn.Module, scheme: Scheme) -> Self:
        """The packed layer that the float `layer` would become, its buffers not yet filled."""
        raise TypeError(f"{cls.__name__} is abstract; wanted PackedLinear or PackedConv2d")

    def empty_float(self) -> nn.Module:
        """The float layer of the same sizes, on the same device, its parameters not yet filled."""
        raise TypeError(f"{type(self).__name__} is abstract; wanted PackedLinear or PackedConv2d")

    def rounded_input(self, x: Tensor) -> Tensor:
        """fp64: the values that a layer with `act_bits=8` multiplies in place of `x`."""
        raise TypeError(f"{type(self).__name__} is abstract; wanted PackedLinear or PackedConv2d")

    @property
    def act_groups(self) -> int:
        """The most scales that `act_scale` may hold."""
        return 1

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

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_act_scale_(self, scale: Tensor | None) -> None:
        """Rounds activations by a copy of `scale` from now on; by their own maxima again when it is None.

        >>> from mpqkern import PackedLinear
        >>> layer = PackedLinear(8, 4, Scheme(4, act_bits=8))
        >>> layer.set_act_scale_(torch.tensor([0.02]))
        >>> "act_bits=8, act_scale=tensor" in repr(layer)
        True
        """
        if scale is not None:
            problem = self.act_scale_problem(scale)
            if problem:
                raise ValueError(problem)
            scale = scale.detach().to(self.scales.device, copy=True)
        self.act_scale = scale

    def act_scale_problem(self, scale: Tensor) -> str | None:
        """What keeps `scale` from being an `act_scale` of this layer."""
        if self.scheme.act_bits is None:
            return "act_scale is set where act_bits=None; wanted act_bits=8"
        if scale.dtype != torch.float32 or scale.dim() != 1 or scale.numel() not in (1, self.act_groups):
            wanted = "[1]" + (f" or [{self.act_groups}]" if self.act_groups > 1 else "")
            return f"act_scale is {scale.dtype} {list(scale.shape)}; wanted float32 {wanted}".replace("torch.", "")
        if not scale.is_meta and not bool((scale.isfinite() & (scale > 0)).all()):
            return f"act_scale={scale.tolist()}; wanted finite numbers above 0"
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state with an `act_scale` makes the place for it."""
        scale = state_dict.get(prefix + "act_scale")
        if scale is not None:
            problem = self.act_scale_problem(scale)
            if problem is None and (self.act_scale is None or self.act_scale.shape != scale.shape):
                self.act_scale = torch.empty_like(scale, device=self.scales.device)
            elif problem:
                *_, errors = args
                errors.append(f"{prefix}{problem}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.derive_()

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
        self.derive_()
        return float(errors.double().sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def store_(self, found: Codes) -> None:
        """Packs codes that were chosen elsewhere."""
        device = self.qweight.device
        self.qweight = torch.ops.mpqkern.pack(found.codes.to(device), self.scheme.bits)
        self.scales, self.zeros = found.scales.to(device, copy=True), found.zeros.to(device, copy=True)  # may be views
        self.derive_()

    @property
    def takes_fragments(self) -> bool:
        """Whether kernels where the weight is have a use for them."""
        q, device = self.qweight, self.qweight.device.type
        if not self.keeps_fragments or self._fragments_op is None or q.dtype != torch.uint8 or device not in KEEPERS:
            return False
        enough = self.scheme.act_bits is not None and len(q) > ops.PANEL // 2  # a panel is filled up
        return (device == "cuda" or enough) and ops.has_kernel(self._fragments_op, device)

    def _held(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None]:
        """What each call reads: the weight, bias and act_scale."""
        weight = self._quick("qweight"), self._quick("scales"), self._quick("zeros")
        return weight, self._quick("bias"), self._quick("act_scale")

    def _quick(self, name: str) -> Tensor | None:
        """An attribute that is a buffer, unless its owner has made it a parameter: getattr looks elsewhere first, and
        takes most of a microsecond."""
        return self._buffers[name] if name in self._buffers else getattr(self, name)

    @property
    def fragments(self) -> Tensor | None:
        """The codes in the order of the kernels; None where there are none of the present `qweight`."""
        if self._derived is None:
            return None
        q, version, fragments = self._derived
        stale = version == NOT_YET if torch.compiler.is_compiling() else version != _version(q)
        return None if stale or q is not self._quick("qweight") else fragments

    @torch.inference_mode(False)
    @torch.no_grad()
    def derive_(self) -> None:
        """Makes `fragments` anew, if there is a use for them; called when the module is packed, loaded or moved."""
        q = self.qweight
        make = torch.ops.mpqkern.fragments
        self._derived = (q, _version(q), make(q, self.scheme.bits, self.k)) if self.takes_fragments else None

    def _fragments_for(self, input: Tensor) -> Tensor | None:
        """`fragments`, unless there is a program in the making that would keep them."""
        if self._derived is None:
            return None
        if isinstance(input, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
            return None
        found = self.fragments
        if found is None and self._derived[0] is self.qweight and not torch.compiler.is_compiling():
            self.derive_()
            return self.fragments
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "qweight":
            self._derived = None  # they would keep the old one in memory

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_derived": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.takes_fragments:  # made at the next call: qweight's memory may be filled only after this
            self._derived = (self.qweight, NOT_YET, self.qweight)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self)] = new = self.__class__.__new__(self.__class__)
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.derive_()
        return new

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
        kept = {
            name: getattr(self, name) for name in ("scales", "zeros", "act_scale") if getattr(self, name) is not None
        }
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:  # a cast: follow it to its device only
                setattr(self, name, old.to(new.device))
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.scales.device)).dtype
        if self.__dict__.get("_float") is not None:  # the float module that swap_ was asked to keep
            self._float._apply(fn)
        self.derive_()
        return self

    def _scheme_repr(self) -> str:
        s = self.scheme
        text = f"bits={s.bits}, group_size={s.group_size}, symmetric={s.symmetric}"
        if s.act_bits:
            text += f", act_bits={s.act_bits}"
        if self.act_scale is not None:
            text += f", act_scale={'tensor' if self.act_scale.numel() == 1 else 'group'}"
        return text


def _version(q: Tensor) -> int:
    """How often `q` was written to in place, as far as that is counted."""
    return 0 if q.is_inference() else q._version
