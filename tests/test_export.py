"""Exported settings, read back by the rules of the tool they are for."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from mpqkern.scheme import Scheme
from mpqkern.solve import Assignment, export

PLAN = Assignment(
    {
        "blk.0.ffn_down": Scheme(4, group_size=64),
        "blk.0.attn_output": Scheme(8, act_bits=8),
        "blk.10.ffn_down": Scheme(2, symmetric=False),
        "blk.1.ffn_down": Scheme(4, group_size=64),
        "output": None,
    }
)
STRANGERS = ["blk.0.ffn_down_exps", "blk.0xffn_down", "blk.1.ffn_down.0", "xblk.1.ffn_down", "output_norm", "blk.0"]
WEIGHTS_ONLY = Assignment({name: s and Scheme(s.bits, None, s.group_size) for name, s in PLAN.schemes.items()})


# --- torchao: objects are {"_type", "_data"} with a "_version" where the class has one; all else is taken as it is ---


def torchao(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "_type" in value and "_data" in value:
        return value["_type"], torchao(value["_data"])
    return {key: torchao(part) for key, part in value.items()}


def test_torchao() -> None:
    written = json.loads(json.dumps(export.to_fqn_config(PLAN)))
    kind, settings = torchao(written)
    assert kind == "FqnToConfig" and list(settings) == ["fqn_to_config"]
    layers = settings["fqn_to_config"]
    assert list(layers) == list(PLAN.schemes) and layers["output"] is None
    assert layers["blk.0.ffn_down"] == (
        "IntxWeightOnlyConfig",
        {
            "weight_dtype": ("torch.dtype", "int4"),
            "granularity": ("PerGroup", {"group_size": 64}),
            "mapping_type": ("MappingType", "SYMMETRIC"),
        },
    )
    assert layers["blk.0.attn_output"] == (
        "Int8DynamicActivationIntxWeightConfig",
        {
            "weight_dtype": ("torch.dtype", "int8"),
            "weight_granularity": ("PerAxis", {"axis": 0}),
            "weight_mapping_type": ("MappingType", "SYMMETRIC"),
        },
    )
    assert layers["blk.10.ffn_down"][1]["mapping_type"] == ("MappingType", "ASYMMETRIC")
    # Another version than the class's is read as an old one, of which the arguments may differ.
    versions = {c["_type"]: c["_version"] for c in written["_data"]["fqn_to_config"].values() if c}
    assert written["_version"] == 1 and set(versions.values()) == {2} and len(versions) == 2


# --- GPTQModel: patterns match from the start of a name, negative ones are asked first ---


def gptq(dynamic: dict[str, dict], name: str) -> dict | bool | None:
    for pattern, settings in sorted(dynamic.items(), key=lambda item: not item[0].startswith("-:")):
        if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, name):
            return False if pattern.startswith("-:") else settings
    return None


def test_gptq_model() -> None:
    dynamic = json.loads(json.dumps(export.to_gptq_dynamic(WEIGHTS_ONLY)))
    assert gptq(dynamic, "blk.0.ffn_down") == {"bits": 4, "group_size": 64, "sym": True}
    assert gptq(dynamic, "blk.10.ffn_down") == {"bits": 2, "group_size": -1, "sym": True}
    assert gptq(dynamic, "output") is False
    assert all(gptq(dynamic, name) is None for name in STRANGERS)
    odd = export.to_gptq_dynamic(Assignment({"a-b.c+d": Scheme(3, symmetric=False)}))
    assert gptq(odd, "a-b.c+d") == {"bits": 3, "group_size": -1, "sym": False} and gptq(odd, "a-b.ccd") is None


# --- compressed-tensors: a target is a name, a class of modules, or "re:" and a pattern from the start of a name ---


def groups_of(config: dict, name: str, classes: tuple[str, ...] = ("Linear", "Module")) -> list[str]:
    def matches(target: str) -> bool:
        if target.startswith("re:"):
            return re.match(target[3:], name) is not None
        return target == name or target in classes

    if any(map(matches, config["ignore"])):
        return []
    return [key for key, group in config["config_groups"].items() if any(map(matches, group["targets"]))]


def test_compressed_tensors() -> None:
    config = json.loads(json.dumps(export.to_compressed_tensors(PLAN)))
    found = {name: groups_of(config, name) for name in PLAN.schemes}
    assert list(found.values()) == [["group_0"], ["group_1"], ["group_2"], ["group_0"], []]
    assert not any(groups_of(config, name) for name in STRANGERS)
    for group in config["config_groups"].values():
        assert set(group) == {"targets", "weights", "input_activations", "output_activations", "format"}
        weights, tokens = group["weights"], group["input_activations"]
        assert (weights["strategy"] == "group") == (weights["group_size"] is not None) and not weights["dynamic"]
        assert tokens is None or (tokens["strategy"], tokens["dynamic"], tokens["num_bits"]) == ("token", True, 8)
        assert group["format"] == ("pack-quantized" if tokens is None else "int-quantized")
    first, second, third = config["config_groups"].values()
    assert (first["weights"]["num_bits"], first["weights"]["group_size"]) == (4, 64)
    assert second["weights"]["strategy"] == "channel" and not third["weights"]["symmetric"]
    assert config["format"] == "mixed-precision" and config["quant_method"] == "compressed-tensors"


def test_compressed_tensors_of_one_format_and_of_none() -> None:
    assert export.to_compressed_tensors(WEIGHTS_ONLY)["format"] == "pack-quantized"
    nothing = export.to_compressed_tensors(Assignment({"a": None}))
    assert (nothing["format"], nothing["config_groups"], nothing["ignore"]) == ("dense", {}, ["a"])


def test_a_layer_named_like_a_class_does_not_mean_the_class() -> None:
    config = export.to_compressed_tensors(Assignment({"Linear": Scheme(4), "Module": None, "fc": Scheme(2)}))
    assert groups_of(config, "Linear") == ["group_0"] and groups_of(config, "Module") == []
    assert groups_of(config, "fc") == ["group_1"] and groups_of(config, "other") == []


def test_a_layer_named_like_a_pattern_means_itself() -> None:
    config = export.to_compressed_tensors(Assignment({"re:.*": Scheme(4), "re:f[c]": None}))
    assert groups_of(config, "re:.*") == ["group_0"] and groups_of(config, "re:f[c]") == []
    assert config["ignore"] == [r"re:^re:f\[c\]$"]
    assert not any(groups_of(config, name) for name in ("fc", "other", "re:xx"))


@pytest.mark.parametrize("write", [export.to_fqn_config, export.to_gptq_dynamic, export.to_compressed_tensors])
def test_a_model_that_is_a_layer_has_no_name(write) -> None:
    for scheme in (Scheme(4), None):
        with pytest.raises(ValueError, match="layer '' is the whole model"):
            write(Assignment({"": scheme}))


# --- llama.cpp: name=type parted by blanks; names are lowercased and searched for anywhere in a tensor's name ---


def llama(text: str, tensor: str) -> list[str]:
    pairs = [argument.split("=", 1) for argument in text.split()]
    return [kind for pattern, kind in pairs if re.search(pattern.lower(), tensor)]


def test_llama_cpp() -> None:
    text = export.to_llama_tensor_types(PLAN)
    found = {name: llama(text, f"{name}.weight") for name in PLAN.schemes}
    assert list(found.values()) == [["q4_k"], ["q8_0"], ["q2_k"], ["q4_k"], ["f16"]]
    assert not any(llama(text, f"{name}.weight") for name in STRANGERS)
    assert llama(export.to_llama_tensor_types(Assignment({"output.weight": Scheme(6)})), "output.weight") == ["q6_k"]


@pytest.mark.parametrize(
    ("write", "scheme", "message"),
    [
        (export.to_fqn_config, Scheme(4, act_bits=6), "layer 'a' has act_bits=6, which torchao does not take"),
        (
            export.to_gptq_dynamic,
            Scheme(4, act_bits=8),
            "act_bits=8, which GPTQModel does not take; wanted one of None",
        ),
        (export.to_gptq_dynamic, Scheme(1), "bits=1, which GPTQModel does not take; wanted one of 2, 3, 4, 5, 6, 7, 8"),
        (
            export.to_llama_tensor_types,
            Scheme(7),
            "bits=7, which llama.cpp does not take; wanted one of 2, 3, 4, 5, 6, 8",
        ),
        (export.to_llama_tensor_types, Scheme(4, act_bits=4), "act_bits=4, which llama.cpp does not take"),
    ],
)
def test_what_a_tool_cannot_state_is_an_error(write, scheme: Scheme, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write(Assignment({"a": scheme}))


@pytest.mark.parametrize("name", ["model.Layer", "a b", "a=b", ""])
def test_names_that_no_gguf_file_has(name: str) -> None:
    with pytest.raises(ValueError, match="wanted lowercase letters, digits"):
        export.to_llama_tensor_types(Assignment({name: Scheme(4)}))
