"""save and load: a packed model as one safetensors file, plain tensors and a JSON note of the schemes.

The note (header key "mpqkern") holds the format version, the scheme of each packed layer, the names that share
another's tensor, and those of the nn.Identity modules, which stand where batch norms were folded. Loading builds the
model on the meta device, puts packed layers in place and then hands out the file's tensors, so float weights of packed
layers never exist.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import tensorfile
from .nn import PackedModule
from .notes import layer_notes, put_packed_layers
from .tensorfile import FileError
from .transform.batchnorm import KINDS

FORMAT_VERSION = 1


def save(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Writes every parameter and buffer of `model`; returns the bytes of its tensors.

    The file appears whole or not at all. Shared tensors are written once. Read it with `load`, or with any
    safetensors reader.
    """
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(f"module {name!r} keeps extra state that is no tensor; wanted parameters and buffers only")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in _state(model):
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device and holds no numbers")
        kind = isinstance(tensor, nn.Parameter)
        key = (
            (kind, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        )
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach()
    identities = [name for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Identity]
    note = {
        "format_version": FORMAT_VERSION,
        "layers": layer_notes(model),
        "aliases": aliases,
        "identities": identities,
    }
    return tensorfile.write(Path(path), tensors, {"format": "pt", "mpqkern": json.dumps(note)})


def load(
    make_model: Callable[[], nn.Module], path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model of `make_model()` with the packed layers and tensors of the file.

    `make_model` is called under `torch.device("meta")`, where tensors take no memory; it returns the float
    model that was packed, with its batch norms or, where `fold_batchnorm_` was called, without. Raises
    `mpqkern.checkpoint.FileError` when the file is damaged or does not fit.
    """
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise TypeError(f"make_model is a {type(make_model).__name__}; wanted a function or class that makes the model")
    with tensorfile.Reader(Path(path)) as file:
        note = read_note(file)
        model = _on_meta(make_model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"make_model() returned a {type(model).__name__}; wanted an nn.Module")
        _fold(model, note["identities"], file)
        put_packed_layers(model, note["layers"], partial(_found, file, note["aliases"]), file.error)
        places = list(_places(model))
        _check_names(places, file, note["aliases"])
        made: dict[str, Tensor] = {}
        filled: dict[tuple[int, str], str] = {}
        for name, owner, key, slot in places:
            source = note["aliases"].get(name, name)
            before = filled.setdefault((id(owner), key), source)
            if before != source:
                raise file.error(f"the model shares {before!r} and {name!r}, but the file holds two tensors")
            if source not in made:
                tensor = file.tensor(source).to(device)
                made[source] = nn.Parameter(tensor, slot.requires_grad) if isinstance(slot, nn.Parameter) else tensor
            table = owner._parameters if key in owner._parameters else owner._buffers
            if isinstance(slot, nn.Parameter) != isinstance(made[source], nn.Parameter):
                raise file.error(f"{name!r} shares {source!r}, but one is a parameter and one is not")
            table[key] = made[source]
        _check_act_scales(model, file)
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            module.derive_()
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"make_model() leaves the tensor {key!r} of module {name!r} without values; "
                    "wanted it registered as a buffer (persistent or not), which the file then holds"
                )
    return model


def _on_meta(make_model: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            return make_model()
    except Exception as error:
        raise RuntimeError(
            f"make_model() failed on the meta device, where tensors have no values ({error}); wanted a function "
            "that only builds modules: no .item(), no .to(device), no reading of weights"
        ) from error


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer, non-persistent ones too: a meta model could not make those itself."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, module, key, tensor


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, _, _, tensor in _places(model))


def read_note(file: tensorfile.Reader) -> dict[str, Any]:
    """What `save` wrote beside the tensors: layers, aliases, identities; checked for form."""
    text = file.metadata.get("mpqkern")
    if text is None:
        raise file.error("it has no mpqkern entry in its header; wanted a file written by mpqkern.save")
    try:
        note = json.loads(text)
        version, layers, aliases = note["format_version"], note["layers"], note["aliases"]
        identities = note.get("identities", [])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise file.error(
            "its mpqkern entry cannot be read; wanted JSON with format_version, layers and aliases"
        ) from None
    if type(version) is not int or version != FORMAT_VERSION:
        raise file.error(f"its format_version is {version!r}; wanted {FORMAT_VERSION}")
    if not isinstance(layers, dict) or not isinstance(aliases, dict):
        raise file.error("layers and aliases of its mpqkern entry are no objects")
    if not isinstance(identities, list) or not all(isinstance(name, str) for name in identities):
        raise file.error("identities of its mpqkern entry is no list of names")
    for name, source in aliases.items():
        if not isinstance(source, str) or source not in file.names or name in file.names:
            raise file.error(f"it says that {name!r} shares {source!r}, which it does not hold")
    return {"layers": layers, "aliases": aliases, "identities": identities}


def _fold(model: nn.Module, identities: list[str], file: tensorfile.Reader) -> None:
    """What `fold_batchnorm_` does to a model's modules: nothing where norms were, and a bias in layers without one."""
    modules = dict(model.named_modules(remove_duplicate=False))
    norms = [name for name in identities if name and isinstance(modules.get(name), KINDS)]
    for name in norms:
        parent, _, key = name.rpartition(".")
        modules[parent]._modules[key] = nn.Identity().train(modules[name].training)
    for name, module in modules.items() if norms else ():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is None and f"{name}.bias" in file.names:
            module.bias = nn.Parameter(torch.empty(len(module.weight), dtype=module.weight.dtype, device="meta"))


def _found(file: tensorfile.Reader, aliases: dict[str, str], name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
    source = aliases.get(name, name)
    return file.shape_and_dtype(source) if source in file.names else None


def _check_act_scales(model: nn.Module, file: tensorfile.Reader) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.act_scale is not None:
            problem = module.act_scale_problem(module.act_scale)
            if problem:
                raise file.error(f"layer {name!r}: {problem}")


def _check_names(
    places: list[tuple[str, nn.Module, str, Tensor]], file: tensorfile.Reader, aliases: dict[str, str]
) -> None:
    """Every tensor of the model is in the file with its shape, packed ones with their type, and no others."""
    wanted = {name for name, *_ in places}
    missing = sorted(wanted - file.names - set(aliases))
    extra = sorted((file.names | set(aliases)) - wanted)
    if missing or extra:
        parts = [
            f"{what} {', '.join(map(repr, names[:5]))}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for what, names in (("it lacks", missing), ("the model has no", extra))
            if names
        ]
        raise file.error("; ".join(parts))
    for name, owner, _, slot in places:
        shape, dtype = file.shape_and_dtype(aliases.get(name, name))
        exact = isinstance(owner, PackedModule) and not name.endswith("bias")
        same_kind = dtype == slot.dtype if exact else dtype.is_floating_point == slot.is_floating_point()
        if shape != tuple(slot.shape) or not same_kind:
            raise file.error(f"tensor {name!r} is {dtype} {list(shape)}; wanted {slot.dtype} {list(slot.shape)}")


__all__ = ["FORMAT_VERSION", "FileError", "load", "save"]
