"""What is written down about packed layers beside their tensors, and the empty layers made from it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .catalog import FLOATS
from .nn import PackedModule
from .nn.swap import PACKED, carry_over, replace_modules
from .scheme import Scheme

Found = Callable[[str], tuple[tuple[int, ...], torch.dtype] | None]  # shape and type of a stored tensor, by its name


def layer_notes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each name of a packed layer what is no tensor: its kind, sizes, type and scheme; ready for JSON.

    >>> from mpqkern import swap_
    >>> model = nn.Sequential(nn.Linear(64, 10))
    >>> _ = swap_(model, {"0": 4})
    >>> note = layer_notes(model)["0"]
    >>> note["kind"], note["weight_shape"], note["dtype"], note["bits"]
    ('linear', [10, 64], 'float32', 4)
    """
    return {
        name: {
            "kind": next(kind for kind, cls in PACKED.items() if isinstance(module, cls)),
            "weight_shape": list(module.weight_shape),
            "dtype": str(module.dtype)[6:],
            **module.scheme.to_dict(),
        }
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedModule)
    }


def put_packed_layers(model: nn.Module, notes: dict[str, Any], found: Found, error: Callable[[str], Exception]) -> None:
    """Puts layers as `notes` tell in the place of the float ones, on their device, buffers not yet filled.

    `found` knows the stored tensors: calibration may have given a layer a bias or an `act_scale` that the float
    layer does not have. What does not fit is raised as `error(message)`.
    """
    places = []
    made: dict[int, nn.Module] = {}
    for name, entry in notes.items():
        if not isinstance(entry, dict):
            raise error(f"layer {name!r}: its entry is no object")
        values = dict(entry)
        kind, shape = values.pop("kind", None), values.pop("weight_shape", None)
        dtype = {str(d)[6:]: d for d in FLOATS}.get(str(values.pop("dtype", None)))
        if not isinstance(kind, str) or dtype is None:
            raise error(f"layer {name!r}: its kind is {kind!r} or its dtype missing or unknown")
        try:
            scheme = Scheme.from_dict(values)
            scheme.require_packable()
        except (ValueError, TypeError) as problem:
            raise error(f"layer {name!r}: {problem}") from None
        try:
            old = model.get_submodule(name) if name else None
        except AttributeError:
            old = None
        if old is None or kind not in PACKED:
            raise error(f"layer {name!r} of kind {kind!r} is not in the model")
        weight = old._parameters.get("weight")
        if (
            not isinstance(old, nn.Linear if kind == "linear" else nn.Conv2d)
            or weight is None
            or list(weight.shape) != shape
        ):
            has = "" if weight is None else f" {list(weight.shape)}"
            raise error(f"layer {name!r} is a {kind} {shape} in the file but a {type(old).__name__}{has} in the model")
        if id(old) not in made:
            new = made[id(old)] = PACKED[kind].empty_like(old.to(dtype), scheme)
            if new.bias is None and found(f"{name}.bias") is not None:
                new.bias = torch.zeros(weight.shape[0], dtype=dtype, device=new.qweight.device)
            carry_over(old, new)
            _put_act_scale(new, f"{name}.act_scale", found, error)
        elif made[id(old)].scheme != scheme:
            raise error(f"layer {name!r} is a shared module but has another scheme than under its first name")
        places.append((name, old, made[id(old)]))
    replace_modules(model, places, None)


def _put_act_scale(module: PackedModule, name: str, found: Found, error: Callable[[str], Exception]) -> None:
    """A place for the fixed scales of activations, if there are such."""
    stored = found(name)
    if stored is not None:
        shape, dtype = stored
        try:
            module.set_act_scale_(torch.empty(shape, dtype=dtype, device="meta"))
        except ValueError as problem:
            raise error(f"tensor {name!r}: {problem}") from None
