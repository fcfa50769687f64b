"""swap_: puts packed modules in the place of float ones, all or none; unswap_ goes back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

from torch import nn

from .. import packed
from ..catalog import Candidate, candidates, kind_of
from ..held import HOOKS
from ..ledger import Ledger, Row
from ..planned import planned
from ..rounding import MinMax, Rounded, Rounding, as_rounding, calibrate
from ..scheme import Scheme
from .conv import PackedConv2d
from .fuse import fusions
from .linear import PackedLinear
from .module import PackedModule

log = logging.getLogger("mpqkern")

PACKED = {"linear": PackedLinear, "conv2d": PackedConv2d}
ACT_SCALE = "_mpqkern_act_scale"  # attribute of a float layer: what it was packed with before, kept for the next time
# What nn.Module keeps on an instance besides parameters, buffers and children, and a swap carries over.
KEPT = (
    *HOOKS,
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def swap_(
    model: nn.Module,
    plan: Mapping[str | type, Scheme | int | None] | Scheme | int | Any,
    *,
    rounding: str | Rounding | Rounded = "minmax",
    batches: Any = None,
    keep_float: bool = False,
    strict: bool = False,
    check: Callable[[nn.Module], None] | None = None,
    **calibration: Any,
) -> Ledger:
    """Packs the layers that `plan` selects, in place, and returns what was done to each.

    `plan` maps exact names, globs, "re:..." patterns or types to a `Scheme`, to a bit width, or to None
    (stay in float); the most specific pattern wins. One `Scheme` or width is for all layers, and anything with a
    `schemes` mapping works as well.
    All or nothing: on any error, also one raised by `check(model)` after the swap, the model is as before.
    A layer that nothing names follows the one whose weight it shares.

    Layers that cannot be packed (see `mpqkern.catalog`) stay in float with the reason in the ledger, or
    raise with `strict=True`. `keep_float=True` keeps the float modules for an exact `unswap_`, at the price of
    their memory.

    `rounding` names one of the ways of `mpqkern.rounding`, or is one with options, or what `calibrate` has found.
    Those that look at data need `batches`; these and further options go to `mpqkern.calibrate`.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> print(swap_(model, {nn.Linear: 4, "2": Scheme(8, group_size=32)}).bytes)
    2860
    """
    found = candidates(model)
    if not found and any(isinstance(module, PackedModule) for module in model.modules()):
        raise ValueError("all layers of the model are packed already; wanted float ones: unswap_ it first")
    wanted = planned(plan, found)
    for name, scheme in wanted.items():
        try:
            if scheme is not None:
                scheme.require_packable()
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
    rounded = _rounded(model, plan, rounding, batches, calibration)
    blocked = [c for c in found if wanted.get(c.name) is not None and c.reason]
    for c in blocked:
        if strict:
            raise ValueError(f"layer {c.name!r} cannot be packed: {c.reason}")
        log.warning("%s stays in float: %s", c.name or "the model", c.reason)
    taken = {c.name: wanted[c.name] for c in found if wanted.get(c.name) is not None and not c.reason}
    made: dict[str, PackedModule] = {}
    by_weight: dict[int, tuple[str, PackedModule, Scheme]] = {}  # who came first with a weight
    rows: list[Row] = []
    counted: set[int] = set()  # float weights that a row has counted
    for c in found:
        scheme = taken.get(c.name)
        if scheme is None:
            reason = c.reason or ("asked for" if c.name in wanted else "not selected")
            rows.append(_float_row(c, reason, counted))
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
        new, row = _pack(c, scheme, rounded, twin)
        by_weight.setdefault(id(c.module.weight), (c.name, new, scheme))
        if keep_float:
            new.__dict__["_float"] = c.module
        made[c.name] = new
        rows.append(row)
    places = [(name, c.module, made[c.name]) for c in found if c.name in made for name in c.names]
    replace_modules(model, places, check)
    return Ledger(tuple(rows))


def unswap_(model: nn.Module) -> nn.Module:
    """Puts float layers back: the kept ones where there are any, else ones with dequantized weights.

    They round no activations, but remember an `act_scale` for when they are swapped again.

    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> _ = swap_(model, {"0": 8})
    >>> unswap_(model)
    Sequential(
      (0): Linear(in_features=8, out_features=8, bias=True)
    )
    """
    for name, activation in fusions(model).items():
        raise ValueError(f"layer {name!r} applies {activation!r}; wanted the model that fuse was given")
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
            carry_over(module, new)
            made[id(module)] = new
        places.append((name, module, made[id(module)]))
    replace_modules(model, places, None)
    return model


def _rounded(
    model: nn.Module, plan: Any, rounding: str | Rounding | Rounded, batches: Any, calibration: dict[str, Any]
) -> Rounding | Rounded:
    """How to round: a way that needs nothing but the weight, or the codes of all layers."""
    _check_options(rounding, calibration)
    if isinstance(rounding, Rounded):
        given = {"batches": batches, **calibration} if batches is not None else calibration
        if given:
            raise TypeError(f"{', '.join(given)} given with codes that are found already; wanted only rounding=")
        return rounding
    method = as_rounding(rounding)
    if batches is not None:
        return calibrate(model, plan, batches, rounding=method, **calibration)
    if method.needs != "nothing" or calibration:
        what = ", ".join(calibration) or f"rounding={rounding!r}"
        raise ValueError(f"{what} needs to see data; wanted batches=")
    return method


def _check_options(rounding: str | Rounding | Rounded, given: Mapping[str, Any]) -> None:
    known = [name for name, p in signature(calibrate).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name, value in given.items():
        if name in known:
            continue
        kind = rounding.rounding if isinstance(rounding, Rounded) else as_rounding(rounding)
        if name in {field.name for field in fields(kind)}:
            kind = type(kind).__name__
            raise TypeError(f"{name}={value!r} is an option of the rounding; wanted rounding={kind}({name}={value!r})")
        own = [name for name, p in signature(swap_).parameters.items() if p.kind is p.KEYWORD_ONLY]
        raise TypeError(f"{name}={value!r} is no option; wanted one of {', '.join(dict.fromkeys(own + known))}")


def _pack(
    c: Candidate, scheme: Scheme, rounded: Rounding | Rounded, twin: tuple[str, PackedModule, Scheme] | None
) -> tuple[PackedModule, Row]:
    module = c.module
    new = PACKED[kind_of(module)].empty_like(module, scheme)
    new.copy_bias_(module)
    name = twin[0] if twin else c.name
    codes = rounded.get(name) if isinstance(rounded, Rounded) else None
    if isinstance(rounded, Rounded) and (codes is None or rounded.schemes[name] != scheme):
        was = f"was rounded to {rounded.schemes[name]}" if codes else "was not rounded"
        raise ValueError(f"layer {c.name!r} {was} but the plan has {scheme}; wanted the same plan as for calibrate")
    if isinstance(rounded, Rounded):
        rounded.check_weight(name, module.weight)
    try:
        if twin is not None:
            new.qweight, new.scales, new.zeros = twin[1].qweight, twin[1].scales, twin[1].zeros
            new._derived = twin[1]._derived
        elif codes is None and isinstance(rounded, MinMax) and rounded.fused:
            new.pack_(module.weight, rounded.name)
        else:
            new.store_(codes or rounded.round(packed.weight_rows(module.weight.detach()).float(), scheme))
        if codes is not None and codes.shift is not None:
            new.shift_bias_(codes.shift)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"layer {c.name!r} cannot be packed as {scheme}: {error}") from error
    carry_over(module, new)
    if codes is not None and codes.act_scale is not None:  # not the one that it was packed with before
        new.set_act_scale_(codes.act_scale)
    weight = module.weight.detach().double()
    norm, squared = float(weight.square().sum()), float((weight - new.dequantize().double()).square().sum())
    if norm and not new.scales.any():
        raise ValueError(
            f"layer {c.name!r} cannot be packed as {scheme}: its weights are too small for float16 scales; "
            "wanted scale_dtype='float32'"
        )
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


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Mode, hooks, trainability and the attributes that the user set on the instance."""
    new.training = old.training
    for name in KEPT:
        if name in old.__dict__:
            new.__dict__[name] = old.__dict__[name]
    if isinstance(old, PackedModule):
        new.__dict__.update(old.__dict__.get("_user_attributes", {}))
        for name, trained in old.__dict__.get("_trained", {}).items():
            getattr(new, name).requires_grad_(trained)
        new.__dict__.pop(ACT_SCALE, None)
        if old.act_scale is not None:
            new.__dict__[ACT_SCALE] = old.act_scale
        return
    kind, sizes = (nn.Linear, (1, 1)) if isinstance(old, nn.Linear) else (nn.Conv2d, (1, 1, 1))
    fresh = nn.utils.skip_init(kind, *sizes)  # draws no random numbers
    new._user_attributes = {k: v for k, v in old.__dict__.items() if k not in fresh.__dict__}
    scale = new._user_attributes.pop(ACT_SCALE, None)
    if scale is not None and new.act_scale_problem(scale) is None:
        new.set_act_scale_(scale)
    new._trained = {name: p.requires_grad for name, p in old.named_parameters(recurse=False)}
    for name, value in new._user_attributes.items():
        new.__dict__.setdefault(name, value)


def replace_modules(
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
        _set_fast_paths(model)
        if check is not None:
            check(model)
    except BaseException:
        for parent, key, old in done:
            parent._modules[key] = old
        _set_fast_paths(model)
        raise


def _set_fast_paths(model: nn.Module) -> None:
    """In eval mode torch's transformer layers read linear1.weight themselves and would never call a packed
    module; activation_relu_or_gelu = 0 tells a layer that its activation has no fused kernel, and
    use_nested_tensor = False keeps the container from making inputs that only fused layers take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _hold(module, "activation_relu_or_gelu", 0, module.children())
        elif isinstance(module, nn.TransformerEncoder):
            _hold(module, "use_nested_tensor", False, module.layers.modules())


def _hold(module: nn.Module, name: str, value: object, inside: Iterable[nn.Module]) -> None:
    """Sets an attribute as long as something packed is inside, and puts it back afterwards."""
    memory = f"_{name}_before_swap"
    packed = any(isinstance(m, PackedModule) for m in inside)
    if packed and memory not in module.__dict__:
        module.__dict__[memory] = getattr(module, name)
        setattr(module, name, value)
    elif not packed and memory in module.__dict__:
        setattr(module, name, module.__dict__.pop(memory))


def _float_row(c: Candidate, reason: str, counted: set[int]) -> Row:
    weight = c.module._parameters.get("weight")
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return Row(c.name, kind_of(c.module), (), None, 0, 0, reason=reason)
    stored = 0 if id(weight) in counted else _bytes(weight)
    counted.add(id(weight))
    return Row(c.name, kind_of(c.module), tuple(weight.shape), None, _bytes(weight), stored, reason=reason)


def _bytes(t: Any) -> int:
    return t.numel() * t.element_size()
