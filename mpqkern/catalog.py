"""Which layers of a model can be packed, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .held import held, hooked
from .scheme import Layer
from .select import type_names

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Forward = Callable[[nn.Module, Any], Any]  # (model, batch) -> output, for models that are called in a way of their own


@dataclass
class Candidate:
    """A module that holds a weight to pack, all the names it goes by, and what stands against it."""

    names: list[str]
    module: nn.Module
    reason: str | None  # None: it can be packed

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def kinds(self) -> list[str]:
        """What its types can be selected by, most specific first."""
        return type_names(c for c in type(self.module).__mro__ if c not in (nn.Module, object))


def candidates(model: nn.Module, *, on_meta: bool = False) -> list[Candidate]:
    """Every Linear, Conv2d and lookalike of `model`, in order; a module under two names comes once.

    With `on_meta=True` weights on the meta device count as well, which get their numbers later.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__}; wanted a torch.nn.Module")
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Conv2d)) or _is_hf_conv1d(module):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    users = _weight_users(model)
    found = [
        Candidate(names[key], module, _reason(model, names[key], module, users, on_meta))
        for key, module in modules.items()
    ]
    for kept in [c for c in found if c.reason]:
        for c in found:
            if not c.reason and c.module.weight is kept.module._parameters.get("weight"):
                c.reason = f"its weight is shared with {kept.name}, which stays in float: {kept.reason}"
    return found


def catalog(model: nn.Module, batch: Any = None) -> list[Layer]:
    """The layers that can be packed; with a batch (tensor, tuple or dict), their multiply-adds too.

    >>> catalog(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.zeros(3, 4))
    [Layer(name='0', kind='linear', weight_shape=(8, 4), params=32, macs=96)]
    """
    return described(model, None if batch is None else lambda: call(model, batch))


def described(model: nn.Module, run: Callable[[], Any] | None) -> list[Layer]:
    """The same with `run()` for one pass of the model."""
    able = [c for c in candidates(model) if c.reason is None]
    macs = _count_macs(model, able, run) if run is not None else {}
    return [
        Layer(c.name, kind_of(c.module), tuple(c.module.weight.shape), c.module.weight.numel(), macs.get(c.name))
        for c in able
    ]


def kind_of(module: nn.Module) -> str:
    return "conv2d" if isinstance(module, nn.Conv2d) else "linear"


def call(model: nn.Module, batch: Any) -> Any:
    """`model` on a batch given as a tensor, a tuple or list of arguments, or a dict of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def require_arguments(model: nn.Module, batch: Any) -> None:
    """That `call` can: a tuple or list holds just the model's arguments."""
    if not isinstance(batch, (tuple, list)):
        return
    try:
        signature(model.forward).bind(*batch)
    except TypeError as error:
        raise TypeError(
            f"batch is a {type(batch).__name__} of {len(batch)}, which the model does not take ({error}); "
            "wanted its arguments, without labels, or forward="
        ) from None


def float_outputs(value: Any) -> list[Tensor]:
    """The float tensors of a model's output in fp64, whatever holds them."""
    if isinstance(value, Tensor):
        return [value.double()] if value.is_floating_point() else []
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in float_outputs(item)]
    return []


def batches_of(batches: Any, model: nn.Module) -> list[Any]:
    """The batches of a list or any other iterable, at least one, on the model's device; a single tensor, tuple or dict
    is one batch."""
    one = isinstance(batches, (Tensor, tuple, Mapping))
    if not one and (not isinstance(batches, Iterable) or isinstance(batches, (str, bytes))):
        raise TypeError(f"batches={batches!r}; wanted a batch or an iterable of batches")
    device = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    # any mapping becomes a dict, which tree_map looks into
    given = [dict(batch) if isinstance(batch, Mapping) else batch for batch in ([batches] if one else batches)]
    if not given:
        raise ValueError("batches is empty; wanted at least one batch")

    def there(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # made in inference mode, it could not go through a model that takes gradients
        return leaf.to(device, copy=leaf.is_inference() and not torch.is_inference_mode_enabled())

    return [tree_map(there, batch) for batch in given]


def feed(model: nn.Module, batch: Any) -> Any:
    """`model` on the inputs of a batch as data loaders give it: a tensor, an (inputs, labels) pair, or a dict of
    keywords with the labels, if any, under "labels"."""
    if isinstance(batch, Mapping):
        return model(**{k: v for k, v in batch.items() if k != "labels"})
    if not isinstance(batch, (tuple, list)):
        return model(batch)
    try:
        return model(batch[0])
    except TypeError as error:
        wanted = "wanted (inputs, labels) pairs, dicts of keywords, or forward="
        try:
            signature(model.forward).bind(batch[0])
        except (TypeError, ValueError):  # the call itself: it was not something inside of the model
            raise TypeError(f"the model does not take the first part of a batch alone ({error}); {wanted}") from error
        raise


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer or norm of torch is called with."""
    return args[0] if args else kwargs["input"]


def _reason(
    model: nn.Module, names: list[str], module: nn.Module, users: dict[int, list[str]], on_meta: bool
) -> str | None:
    if _is_hf_conv1d(module):
        return "a transformers Conv1D keeps its weight as [in, out]; make it an nn.Linear to pack it"
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    kind = type(module)
    if "parametrizations" in module._modules:
        return "its weight is parametrized; remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm, spectral_norm); remove that first"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "it is lazy and not yet initialised; run a batch through the model first"
    if not _runs_as(kind, base):
        return f"{kind.__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if "" in names:
        return "it is the model itself; wrap it, for instance in nn.Sequential, to swap it in place"
    if any(isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention) for name in names):
        return "nn.MultiheadAttention reads its weights directly"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}; wanted float32, float16 or bfloat16"
    if weight.is_meta and not on_meta:
        return "its weight is on the meta device and holds no numbers"
    if weight.numel() == 0:
        return "its weight is empty"
    extra = [*module._modules, *module._buffers, *(set(module._parameters) - {"weight", "bias"})]
    if extra:
        return f"it holds {extra[0]!r} besides weight and bias, which the packed layer would lose"
    others = [u for u in users.get(id(weight), []) if u != "linear"]
    if others:
        return f"its weight is shared with {others[0]}, which needs it in float"
    return None


def _weight_users(model: nn.Module) -> dict[int, list[str]]:
    """Who else uses each parameter: "linear" for a packable place, else a name for the reader."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                plain = key == "weight" and isinstance(module, (nn.Linear, nn.Conv2d))
                users.setdefault(id(parameter), []).append("linear" if plain else f"{name}.{key}")
    return users


def _runs_as(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass computes what its base computes."""
    methods = ("forward", "__call__", "_call_impl", *(("_conv_forward",) if base is nn.Conv2d else ()))
    return all(getattr(kind, name) is getattr(base, name) for name in methods)


def _is_hf_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _count_macs(model: nn.Module, layers: list[Candidate], run: Callable[[], Any]) -> dict[str, int]:
    counts: dict[str, int] = {}

    def counter(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            places = output.numel() // module.weight.shape[0]  # rows, or pixels of all samples
            counts[name] = counts.get(name, 0) + places * module.weight.numel()

        return hook

    with hooked(c.module.register_forward_hook(counter(c.name)) for c in layers), held(model):
        run()
    return counts
