"""An assignment as other projects' settings: plain dicts and strings, nothing of theirs is imported.

They say which widths go where. The grids are each tool's own, and not all tools run all they can state; what a
format cannot state at all is an error here.
"""

from __future__ import annotations

import re
from typing import Any

from ..scheme import Scheme
from .assignment import Assignment

# llama.cpp's nearest block type by width; the names are ggml's.
GGML_TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0", None: "f16"}


def to_fqn_config(assignment: Assignment) -> dict[str, Any]:
    """torchao's `FqnToConfig` in its JSON form, which `torchao.core.config.config_from_dict` reads.

    Layers that stay in float are there as None. torchao's 8-bit activations take linear layers only.

    >>> config = to_fqn_config(Assignment({"fc": Scheme(4, group_size=64), "head": None}))
    >>> layers = config["_data"]["fqn_to_config"]
    >>> layers["fc"]["_type"], layers["fc"]["_data"]["granularity"]["_data"], layers["head"]
    ('IntxWeightOnlyConfig', {'group_size': 64}, None)
    """
    layers = {name: None if s is None else _torchao(name, s) for name, s in _named(assignment)}
    return _typed("FqnToConfig", {"fqn_to_config": layers}, version=1)


def to_gptq_dynamic(assignment: Assignment) -> dict[str, dict[str, Any]]:
    r"""GPTQModel's `dynamic`: "+:" overrides the base settings of a module, "-:" leaves it out.

    >>> to_gptq_dynamic(Assignment({"fc.0": Scheme(4, group_size=64), "head": None}))
    {'+:^fc\\.0$': {'bits': 4, 'group_size': 64, 'sym': True}, '-:^head$': {}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name, s in _named(assignment):
        if s is None:
            found[f"-:^{re.escape(name)}$"] = {}
            continue
        _want(name, s, "GPTQModel", bits=range(2, 9), act_bits=(None,))
        found[f"+:^{re.escape(name)}$"] = {"bits": s.bits, "group_size": s.group_size or -1, "sym": s.symmetric}
    return found


def to_compressed_tensors(assignment: Assignment) -> dict[str, Any]:
    """compressed-tensors' quantization_config: one group of targets for each scheme, float ones ignored.

    >>> config = to_compressed_tensors(Assignment({"fc": Scheme(4), "up": Scheme(4), "head": None}))
    >>> config["config_groups"]["group_0"]["targets"], config["ignore"], config["format"]
    (['fc', 'up'], ['head'], 'pack-quantized')
    """
    targets: dict[Scheme, list[str]] = {}
    for name, s in _named(assignment):
        if s is not None:
            targets.setdefault(s, []).append(_only(name))
    groups = [_group(s, names) for s, names in targets.items()]
    formats = list(dict.fromkeys(group["format"] for group in groups)) or ["dense"]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [_only(name) for name, s in _named(assignment) if s is None],
    }


def to_llama_tensor_types(assignment: Assignment) -> str:
    r"""The file for `llama-quantize --tensor-type-file`; each line is an argument of `--tensor-type`, too.

    Names must already be the GGUF file's, with or without ".weight". Activations have no setting there. --pure makes
    llama-quantize ignore all of it, and some versions treat a type that is also the base type as not given.

    >>> print(to_llama_tensor_types(Assignment({"blk.0.ffn_down": Scheme(4), "output": None})))
    ^blk\.0\.ffn_down(\.weight)?$=q4_k
    ^output(\.weight)?$=f16
    """
    lines = []
    for name, s in assignment.schemes.items():
        if not re.fullmatch(r"[a-z0-9_.]+", name):  # patterns are lowercased, and end at a blank or "="
            raise ValueError(f"layer {name!r} cannot be in a GGUF file; wanted lowercase letters, digits, '_' and '.'")
        if s is not None:
            _want(name, s, "llama.cpp", bits=[width for width in GGML_TYPES if width], act_bits=(None, 8))
        kind = GGML_TYPES[None if s is None else s.bits]
        suffix = "" if name.endswith(".weight") else r"(\.weight)?"
        lines.append(f"^{re.escape(name)}{suffix}$={kind}")  # anchored: a pattern matches anywhere in a name
    return "\n".join(lines)


def _named(assignment: Assignment) -> list[tuple[str, Scheme | None]]:
    """Layers and schemes; none of the tools has a name for a model that is a layer itself."""
    if "" in assignment.schemes:
        raise ValueError("layer '' is the whole model, which has no name to go by; wanted layers within a model")
    return list(assignment.schemes.items())


def _want(name: str, scheme: Scheme, tool: str, **wanted: Any) -> None:
    for field, values in wanted.items():
        value = getattr(scheme, field)
        if value not in values:
            there = ", ".join(map(str, values))
            raise ValueError(f"layer {name!r} has {field}={value}, which {tool} does not take; wanted one of {there}")


def _typed(kind: str, data: Any, version: int | None = None) -> dict[str, Any]:
    """An object as torchao writes it."""
    return {"_type": kind, **({} if version is None else {"_version": version}), "_data": data}


def _torchao(name: str, scheme: Scheme) -> dict[str, Any]:
    _want(name, scheme, "torchao", act_bits=(None, 8))
    kind, prefix = ("IntxWeightOnlyConfig", "")
    if scheme.act_bits is not None:
        kind, prefix = ("Int8DynamicActivationIntxWeightConfig", "weight_")
    grain = ("PerGroup", {"group_size": scheme.group_size}) if scheme.group_size else ("PerAxis", {"axis": 0})
    settings = {
        "weight_dtype": _typed("torch.dtype", f"int{scheme.bits}"),
        f"{prefix}granularity": _typed(*grain, version=1),
        f"{prefix}mapping_type": _typed("MappingType", "SYMMETRIC" if scheme.symmetric else "ASYMMETRIC"),
    }
    return _typed(kind, settings, version=2)


def _only(name: str) -> str:
    """The name, but as a pattern where it could be a class's, which means all its modules, or looks like a pattern."""
    special = name.startswith("re:") or (name.isidentifier() and name[0].isupper())
    return f"re:^{re.escape(name)}$" if special else name


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = _arguments(scheme.bits, scheme.symmetric, "group" if scheme.group_size else "channel")
    tokens = None if scheme.act_bits is None else _arguments(scheme.act_bits, True, "token")
    return {
        "targets": targets,
        "weights": weights | {"group_size": scheme.group_size},
        "input_activations": tokens,
        "output_activations": None,
        "format": "pack-quantized" if tokens is None else "int-quantized",
    }


def _arguments(bits: int, symmetric: bool, strategy: str) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": None,
        "dynamic": strategy == "token",  # tokens are scaled as they arrive
    }
