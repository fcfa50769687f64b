"""An assignment as other projects' settings: plain dicts and strings, nothing of theirs is imported.

They say which widths go where; what those tools can run of it is theirs to decide.
"""

from __future__ import annotations

import re
from typing import Any

from ..scheme import Scheme
from .assignment import Assignment

TORCHAO_A8 = "Int8DynamicActivationIntxWeightConfig"
# llama.cpp's nearest block type by width; the names are ggml's.
GGML_TYPES = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0", None: "f16"}


def to_fqn_config(assignment: Assignment) -> dict[str, dict[str, Any] | None]:
    """torchao's `FqnToConfig` as data: {name: {"_type": config class, arguments}}, None stays in float.

    >>> config = to_fqn_config(Assignment({"fc": Scheme(4, group_size=64), "head": None}))
    >>> config["fc"]["weight_dtype"], config["fc"]["granularity"], config["head"]
    ('int4', 'PerGroup(64)', None)
    """
    return {name: None if s is None else _torchao(s) for name, s in assignment.schemes.items()}


def to_gptq_dynamic(assignment: Assignment) -> dict[str, dict[str, Any]]:
    r"""GPTQModel's `dynamic`: "+:" overrides the base settings of a module, "-:" leaves it out.

    >>> to_gptq_dynamic(Assignment({"fc.0": Scheme(4, group_size=64), "head": None}))
    {'+:^fc\\.0$': {'bits': 4, 'group_size': 64, 'sym': True}, '-:^head$': {}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name, s in assignment.schemes.items():
        if s is None:
            found[f"-:^{re.escape(name)}$"] = {}
        else:
            found[f"+:^{re.escape(name)}$"] = {"bits": s.bits, "group_size": s.group_size or -1, "sym": s.symmetric}
    return found


def to_compressed_tensors(assignment: Assignment) -> dict[str, Any]:
    """compressed-tensors' quantization_config: one group of targets for each scheme, float ones ignored.

    >>> config = to_compressed_tensors(Assignment({"fc": Scheme(4), "up": Scheme(4), "head": None}))
    >>> config["config_groups"]["group_0"]["targets"], config["ignore"]
    (['fc', 'up'], ['head'])
    """
    groups: dict[Scheme, list[str]] = {}
    for name, s in assignment.schemes.items():
        if s is not None:
            groups.setdefault(s, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": _arguments(s.bits, s.symmetric, s.group_size),
                "input_activations": None if s.act_bits is None else _tokens(s.act_bits),
                "output_activations": None,
            }
            for i, (s, names) in enumerate(groups.items())
        },
        "ignore": [name for name, s in assignment.schemes.items() if s is None],
    }


def to_llama_tensor_types(assignment: Assignment) -> str:
    r"""Arguments of `llama-quantize`, one a line; names must already be the GGUF file's.

    >>> print(to_llama_tensor_types(Assignment({"blk.0.ffn_down": Scheme(4), "output": None})))
    --tensor-type "blk\.0\.ffn_down=q4_k"
    --tensor-type "output=f16"
    """
    lines = []
    for name, s in assignment.schemes.items():
        width = None if s is None else s.bits
        if width not in GGML_TYPES:
            there = ", ".join(str(w) for w in GGML_TYPES if w)
            raise ValueError(
                f"layer {name!r} has {width} bits, for which llama.cpp has no type; wanted {there} or float"
            )
        lines.append(f'--tensor-type "{re.escape(name)}={GGML_TYPES[width]}"')
    return "\n".join(lines)


def _torchao(scheme: Scheme) -> dict[str, Any]:
    if scheme.act_bits not in (None, 8):
        raise ValueError(f"act_bits={scheme.act_bits}, for which torchao has no configuration; wanted None or 8")
    kind, prefix = ("IntxWeightOnlyConfig", "") if scheme.act_bits is None else (TORCHAO_A8, "weight_")
    grain = f"PerGroup({scheme.group_size})" if scheme.group_size else "PerAxis(0)"
    grid = "SYMMETRIC" if scheme.symmetric else "ASYMMETRIC"
    return {
        "_type": kind,
        "weight_dtype": f"int{scheme.bits}",
        f"{prefix}granularity": grain,
        f"{prefix}mapping_type": grid,
    }


def _arguments(bits: int, symmetric: bool, group_size: int | None) -> dict[str, Any]:
    base = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    return {**base, "strategy": "group" if group_size else "channel", "group_size": group_size}


def _tokens(bits: int) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "dynamic": True,
        "strategy": "token",
        "group_size": None,
    }
