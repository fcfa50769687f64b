"""Hugging Face transformers: packed models saved and loaded, float checkpoints packed on the way."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mpqkern as mq
from mpqkern import PackedModule, Scheme

transformers = pytest.importorskip("transformers", minversion="5.0")
hf = pytest.importorskip("mpqkern.integrations.transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
PLAN = {"*": 4, "re:.*(gate_proj|query|q_proj)": Scheme(2, group_size=32, symmetric=False)}
IDS = torch.arange(12).view(2, 6)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def llama(**options: object) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, vocab_size=64, **options)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, vocab_size=64, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "llama": (llama, IDS),
    "bert": (bert, IDS),
    "vit": (vit, torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def packed(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = llama()
    mq.swap_(model, PLAN)
    hf.annotate_(model)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def logits(model: nn.Module, x: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(x).logits


def edit_config(folder: Path, edit: Callable[[dict], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_bit_for_bit(name: str, tmp_path: Path) -> None:
    make, x = MODELS[name]
    model = make()
    mq.swap_(model, PLAN)
    hf.annotate_(model)
    model.save_pretrained(tmp_path)
    kind = getattr(transformers, type(model).__name__)
    loaded = kind.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, x), logits(model, x))
    assert repr(loaded) == repr(model) and "Packed" in repr(loaded)
    state = loaded.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_float_checkpoints_are_packed_as_swap_would(name: str, tmp_path: Path) -> None:
    make, x = MODELS[name]
    model = make()
    for parameter in model.parameters():  # biases are made of zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "float")
    config = hf.MpqConfig(PLAN, rounding="mse")
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    mq.swap_(model, PLAN, rounding="mse")
    assert torch.equal(logits(loaded, x), logits(model, x)) and repr(loaded) == repr(model)
    loaded.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, x), logits(model, x))


def test_auto_classes_and_what_is_on_disk(packed: tuple[nn.Module, Path]) -> None:
    model, folder = packed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert set(stored) == set(model.state_dict())
    layers = [m for m in model.modules() if isinstance(m, PackedModule)]
    floats = sum(4 * p.numel() for p in model.parameters())  # the embedding and the norms
    assert sum(t.nbytes for t in stored.values()) == floats + sum(m.scheme.bytes(m.weight_shape) for m in layers)
    note = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert note["quant_method"] == "mpqkern" and len(note["layers"]) == len(layers) == 15
    assert note["layers"]["lm_head"]["bits"] == 4 and note["layers"]["model.layers.0.mlp.gate_proj"]["bits"] == 2


def test_shards_and_generation(packed: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = packed
    model.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path / "shards")
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **greedy), model.generate(IDS, **greedy))


class Floats(TorchDispatchMode):
    """The shapes of all float matrices that come to be off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and not t.is_meta and t.dim() == 2:
                self.shapes.add(tuple(t.shape))
        return out


@pytest.mark.parametrize("where", ["cpu", "auto"])
def test_device_map(packed: tuple[nn.Module, Path], where: str) -> None:
    pytest.importorskip("accelerate")
    model, folder = packed
    loaded = type(model).from_pretrained(folder, device_map=where)
    assert torch.equal(logits(loaded, IDS.to(loaded.device)).cpu(), logits(model, IDS)) and "Packed" in repr(loaded)


def test_loading_makes_no_float_weight(packed: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = packed
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode sees its own thread only
    with Floats() as seen:
        type(model).from_pretrained(folder)
    weights = {m.weight_shape for m in model.modules() if isinstance(m, PackedModule)} - {(64, 32)}
    assert (64, 32) in seen.shapes  # the embedding, which is as large as lm_head
    assert not weights & seen.shapes


def test_the_dtype_asked_for(packed: tuple[nn.Module, Path]) -> None:
    model, folder = packed
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == half.lm_head.dtype == logits(half).dtype == torch.bfloat16
    assert half.lm_head.scales.dtype == torch.float16 and half.lm_head.qweight.dtype == torch.uint8
    assert torch.equal(half.lm_head.qweight, model.lm_head.qweight)
    assert torch.allclose(logits(half).float(), logits(model), atol=0.02)


def test_trunk_and_head_load_from_each_other(packed: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, folder = packed
    trunk = transformers.AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        assert torch.equal(trunk(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    trunk.save_pretrained(tmp_path / "trunk")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trunk")
    assert type(whole.lm_head) is nn.Linear and repr(whole.model) == repr(model.model)


def test_tied_embeddings_stay_tied_and_in_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "float")
    with caplog.at_level(logging.WARNING, "mpqkern"):
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=hf.MpqConfig({"*": 4}))
    assert "lm_head stays in float: its weight is tied to model.embed_tokens.weight" in caplog.text
    loaded.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed")
    for one in (loaded, again):
        assert one.lm_head.weight is one.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(loaded))


def test_gpt2_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"packs no layer of GPT2LMHeadModel; .*c_attn: a transformers Conv1D keeps"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=hf.MpqConfig({"*": 4}))


def test_calibrated_biases_and_activation_scales_are_kept(tmp_path: Path) -> None:
    model = llama()
    mq.swap_(model, {"lm_head": Scheme(4, act_bits=8), "*.down_proj": Scheme(8, act_bits=8, group_size=32)})
    down = model.model.layers[0].mlp.down_proj
    down.shift_bias_(torch.randn(32))
    down.set_act_scale_(torch.tensor([0.02, 0.03]))
    model.lm_head.set_act_scale_(torch.tensor([0.05]))
    hf.annotate_(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for name in ("lm_head", "model.layers.0.mlp.down_proj"):  # before any call would make them
        assert torch.equal(loaded.get_submodule(name).fragments, model.get_submodule(name).fragments)
    assert torch.equal(logits(loaded), logits(model)) and repr(loaded) == repr(model)


def test_the_note_follows_later_changes(packed: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = packed
    model = copy.deepcopy(model)
    mq.unswap_(model)
    mq.swap_(model, {"lm_head": 8})
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), logits(model))
    mq.unswap_(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no packed layer"):
        model.save_pretrained(tmp_path / "float")


def test_dequantize_gives_float_layers(packed: tuple[nn.Module, Path]) -> None:
    _, folder = packed
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = logits(loaded)
    assert torch.allclose(logits(loaded.dequantize()), before, atol=1e-5) and type(loaded.lm_head) is nn.Linear
    assert not hasattr(loaded.config, "quantization_config")


def test_weights_that_a_float_checkpoint_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["classifier.weight"], state["bert.pooler.dense.bias"]
    safetensors.torch.save_file(state, path, {"format": "pt"})
    with caplog.at_level(logging.WARNING, "mpqkern"):
        loaded = type(model).from_pretrained(tmp_path, quantization_config=hf.MpqConfig({"*": 4}))
    assert "classifier stays in float: the checkpoint has no weight for it" in caplog.text
    assert type(loaded.classifier) is nn.Linear and not loaded.bert.pooler.dense.bias.any()


def test_tensors_that_a_packed_checkpoint_lacks(packed: tuple[nn.Module, Path]) -> None:
    model, folder = packed
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state["lm_head.scales"]
    safetensors.torch.save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor 'lm_head.scales' is not in the checkpoint"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    "edit,message",
    [
        (lambda c: c["layers"]["lm_head"].update(bits=3), "layer 'lm_head': bits=3; wanted 2, 4 or 8"),
        (
            lambda c: c["layers"]["lm_head"].update(weight_shape=[64, 33]),
            r"linear \[64, 33\] .* but a Linear \[64, 32\]",
        ),
        (
            lambda c: c["layers"].update(head=c["layers"]["lm_head"]),
            "layer 'head' of kind 'linear' is not in the model",
        ),
        (lambda c: c.update(format_version=2), "format_version=2; wanted 1"),
    ],
)
def test_bad_notes(packed: tuple[nn.Module, Path], edit: Callable[[dict], None], message: str) -> None:
    model, folder = packed
    edit_config(folder, edit)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: hf.MpqConfig(), "neither or both of plan and layers"),
        (lambda: hf.MpqConfig({"*": 3}), "bits=3; wanted 2, 4 or 8"),
        (lambda: hf.MpqConfig({"*": "4"}), "'4'; wanted a Scheme, 2, 4, 8 or None"),
        (lambda: hf.MpqConfig([4]), "wanted a mapping"),
        (lambda: hf.MpqConfig({"*": 4}, rounding="gptq"), "rounding='gptq'; wanted one that needs no data"),
        (lambda: hf.annotate_(nn.Linear(2, 2)), "model=Linear; wanted a PreTrainedModel"),
        (lambda: hf.annotate_(llama()), "LlamaForCausalLM has no packed layer"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_plan_of_one_scheme_is_for_all_layers() -> None:
    assert hf.MpqConfig(4).to_dict() == hf.MpqConfig(Scheme(4)).to_dict() == hf.MpqConfig({"*": 4}).to_dict()


def test_layers_that_share_their_weight_are_refused(tmp_path: Path) -> None:
    model = llama()
    one, two = (layer.mlp for layer in model.model.layers)
    two.up_proj.weight = one.up_proj.weight
    mq.swap_(model, {"*.up_proj": 4})
    with pytest.raises(ValueError, match=r"layers 'model.layers.0.mlp.up_proj' and 'model.layers.1.mlp.up_proj' share"):
        hf.annotate_(model)


def test_config_survives_json_and_types() -> None:
    config = hf.MpqConfig({nn.Linear: Scheme(4, group_size=64), "head": None}, rounding="mse")
    again = hf.MpqConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.schemes() == {"type:torch.nn.modules.linear.Linear": Scheme(4, group_size=64), "head": None}


def test_transformers_is_imported_only_on_request() -> None:
    code = "import sys, mpqkern, mpqkern.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
