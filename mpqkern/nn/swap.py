"""swap_: puts packed modules in the place of float ones, all or none; unswap_ goes back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .. import select
from ..catalog import Candidate, candidates, kind_of
from ..ledger import Ledger, Row
from ..scheme import Scheme
from .conv import PackedConv2d
from .linear import PackedLinear
from .module import PackedModule

log = logging.getLogger("mpqkern")

PACKED = {"linear": PackedLinear, "conv2d": PackedConv2d}
# What nn.Module keeps on an instance besides parameters, buffers and children, and a swap carries over.
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def swap_(
    model: nn.Module,
    plan: Mapping[str | type, Scheme | int | None] | Any,
    *,
    rounding: str = "minmax",
    keep_float: bool = False,
    strict: bool = False,
    check: Callable[[nn.Module], None] | None = None,
) -> Ledger:
    """Packs the layers that `plan` selects, in place, and returns what was done to each.

    `plan` maps exact names, globs, "re:..." patterns or types to a `Scheme`, to a bit width, or to None
    (stay in float); the most specific pattern wins. Anything with a `schemes` mapping works as well.
    All or nothing: on any error, also one raised by `check(model)` after the swap, the model is as before.

    Layers that cannot be packed (see `mpqkern.catalog`) stay in float with the reason in the ledger, or
    raise with `strict=True`. `rounding` is "minmax" or "mse" (the range with the least squared error).
    `keep_float=True` keeps the float modules for an exact `unswap_`, at the price of their memory.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> print(swap_(model, {nn.Linear: 4, "2": Scheme(8, group_size=32)}).bytes)
    2860
    """
    if rounding not in ("minmax", "mse"):
        raise ValueError(f"rounding={rounding!r}; wanted 'minmax' or 'mse'")
    found = candidates(model)
    wanted = _resolve(plan, found)
    blocked = [c for c in found if wanted.get(c.name) is not None and c.reason]
    for c in blocked:
        if strict:
            raise ValueError(f"layer {c.name!r} cannot be packed: {c.reason}")
        log.warning("%s stays in float: %s", c.name or "the model", c.reason)
    taken = {c.name: wanted[c.name] for c in found if wanted.get(c.name) is not None and not c.reason}
    made: dict[str, PackedModule] = {}
    by_weight: dict[int, tuple[str, PackedModule, Scheme]] = {}
    rows = []
    for c in found:
        scheme = taken.get(c.name)
        if scheme is None:
            rows.append(_float_row(c, c.reason or ("asked for" if c.name in wanted else "not selected")))
            continue
        twin = by_weight.get(id(c.module.weight))
        if twin and twin[2] != scheme:
            raise ValueError(
                f"layers {twin[0]!r} and {c.name!r} share one weight "
                f"but were given {twin[2]} and {scheme}; wanted the same"
            )
        if any(o.name not in taken and o.module._parameters.get("weight") is c.module.weight for o in found):
            raise ValueError(
                f"layer {c.name!r} shares its weight with one that stays in float; wanted one scheme for both"
            )
        new, row = _pack(c, scheme, rounding, twin[1] if twin else None)
        by_weight.setdefault(id(c.module.weight), (c.name, new, scheme))
        if keep_float:
            new.__dict__["_float"] = c.module
        made[c.name] = new
        rows.append(row)
    places = [(name, c.module, made[c.name]) for c in found if c.name in made for name in c.names]
    _replace(model, places, check)
    return Ledger(tuple(rows))


def unswap_(model: nn.Module) -> nn.Module:
    """Puts float layers back: the kept ones where there are any, else ones with dequantized weights.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = swap_(model, {"0": 8})
    >>> unswap_(model)
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    made: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    places = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PackedModule):
            continue
        if id(module) not in made:
            kept = module.__dict__.get("_float")
            new = kept if kept is not None else module.to_float()
            if kept is None:  # packed layers that shared their codes share the weight again
                new.weight = weights.setdefault(id(module.qweight), new.weight)
            _carry_over(module, new)
            made[id(module)] = new
        places.append((name, module, made[id(module)]))
    _replace(model, places, None)
    return model


def _resolve(plan: Any, found: list[Candidate]) -> dict[str, Scheme | None]:
    """The scheme for each candidate by its first name."""
    plan = getattr(plan, "schemes", plan)
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan={plan!r}; wanted a mapping of names, patterns or types to Scheme, or an Assignment")
    asked: dict[str, Scheme | None] = {}
    for pattern, value in plan.items():
        scheme = Scheme(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if scheme is not None and not isinstance(scheme, Scheme):
            raise TypeError(f"plan[{pattern!r}]={value!r}; wanted a Scheme, 2, 4, 8 or None")
        if scheme is not None:
            scheme.require_packable()
        asked[pattern.__name__ if isinstance(pattern, type) else pattern] = scheme
    kinds = {name: c.kinds for c in found for name in c.names}
    if not asked:
        return {}
    chosen = select.assign(asked, kinds)
    wanted: dict[str, Scheme | None] = {}
    for c in found:
        values = {name: chosen[name] for name in c.names if name in chosen}
        if len(set(values.values())) > 1:
            raise ValueError(f"one module goes by the names {values}, with different schemes; wanted the same")
        if values:
            wanted[c.name] = next(iter(values.values()))
    return wanted


def _pack(c: Candidate, scheme: Scheme, rounding: str, twin: PackedModule | None) -> tuple[PackedModule, Row]:
    module = c.module
    new = PACKED[kind_of(module)].empty_like(module, scheme)
    if twin is None:
        try:
            squared = new.pack_(module.weight, rounding)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"layer {c.name!r} cannot be packed as {scheme}: {error}") from error
    else:
        new.qweight, new.scales, new.zeros = twin.qweight, twin.scales, twin.zeros
        squared = float((module.weight.detach().double() - twin.dequantize().double()).square().sum())
    new.copy_bias_(module)
    _carry_over(module, new)
    norm = float(module.weight.detach().double().square().sum())
    row = Row(
        c.name,
        kind_of(module),
        tuple(module.weight.shape),
        scheme,
        _bytes(module.weight),
        0 if twin else new.packed_bytes(),
        (squared / norm) ** 0.5 if norm else 0.0,
    )
    return new, row


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Mode, hooks and attributes that the user set on the instance."""
    new.training = old.training
    for name in HOOKS:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    fresh = nn.Linear(1, 1) if isinstance(old, nn.Linear) else nn.Conv2d(1, 1, 1) if isinstance(old, nn.Conv2d) else old
    for name, value in old.__dict__.items():
        if name not in fresh.__dict__ and name not in new.__dict__:
            new.__dict__[name] = value


def _replace(
    model: nn.Module, places: list[tuple[str, nn.Module, nn.Module]], check: Callable[[nn.Module], None] | None
) -> None:
    """Sets every new module at its name; puts all the old ones back if anything goes wrong."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, old, new in places:
            parent_name, _, key = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            done.append((parent, key, old))
            parent._modules[key] = new
        _set_fast_paths(parent for parent, _, _ in done)
        if check is not None:
            check(model)
    except BaseException:
        for parent, key, old in done:
            parent._modules[key] = old
        _set_fast_paths(parent for parent, _, _ in done)
        raise


def _set_fast_paths(parents: Iterable[nn.Module]) -> None:
    """In eval mode nn.TransformerEncoderLayer reads linear1.weight itself and would never call a packed
    module; activation_relu_or_gelu = 0 tells it that its activation has no fused kernel."""
    for layer in parents:
        if not isinstance(layer, nn.TransformerEncoderLayer):
            continue
        packed = any(isinstance(child, PackedModule) for child in layer.children())
        if packed and "_activation_before_swap" not in layer.__dict__:
            layer._activation_before_swap = layer.activation_relu_or_gelu
            layer.activation_relu_or_gelu = 0
        elif not packed and "_activation_before_swap" in layer.__dict__:
            layer.activation_relu_or_gelu = layer.__dict__.pop("_activation_before_swap")


def _float_row(c: Candidate, reason: str) -> Row:
    weight = c.module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return Row(c.name, kind_of(c.module), (), None, 0, 0, reason=reason)
    return Row(c.name, kind_of(c.module), tuple(weight.shape), None, _bytes(weight), _bytes(weight), reason=reason)


def _bytes(t: Any) -> int:
    return t.numel() * t.element_size()
