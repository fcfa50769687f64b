"""Packed modules with fixed activation scales: what carries them, what refuses them."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import PackedConv2d, PackedLinear, Scheme
from mpqkern.checkpoint import FileError

SCHEME = Scheme(4, act_bits=8, group_size=32)
EACH = torch.tensor([0.02, 0.03])


def make() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 45), nn.Linear(45, 5)
    )


def packed(static: bool = True) -> nn.Sequential:
    model = make()
    mq.swap_(model, {"*": SCHEME})
    if static:
        model[0].set_act_scale_(torch.tensor([0.02]))
        model[4].set_act_scale_(EACH)
    return model.eval()


X = torch.linspace(-3, 3, 2 * 75).view(2, 3, 5, 5)


def test_the_forward_pass_uses_it_and_its_reference_too() -> None:
    model = packed()
    y = model[4](torch.randn(3, 45))
    assert not torch.equal(model(X), packed(False)(X)) and y.shape == (3, 5)
    x = torch.randn(3, 45) * 3
    limit = (127 * EACH.double()).repeat_interleave(32)[:45]
    assert torch.equal(model[4].rounded_input(x).abs().amax(0), limit.minimum(model[4].rounded_input(x).abs().amax(0)))
    assert (model[4].rounded_input(x).abs() == limit).any() and (model[0].rounded_input(X[0]).abs() <= 2.54).all()
    assert mq.verify(model, X).ok


def test_state_dicts_hold_it_only_when_set() -> None:
    model, fresh = packed(), packed(False)
    assert sorted(set(model.state_dict()) - set(fresh.state_dict())) == ["0.act_scale", "4.act_scale"]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X)) and fresh[3].act_scale is None
    fresh[4].set_act_scale_(torch.ones(1))
    fresh.load_state_dict(model.state_dict())  # another granularity than before
    assert torch.equal(fresh[4].act_scale, EACH)
    state = model.state_dict() | {"4.act_scale": torch.tensor([0.1, torch.nan])}
    with pytest.raises(RuntimeError, match=r"4.act_scale=.*nan.*wanted finite numbers above 0"):
        fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"4.act_scale is float32 \[3\]; wanted float32 \[1\] or \[2\]"):
        fresh.load_state_dict(model.state_dict() | {"4.act_scale": torch.ones(3)})


def test_copies_and_casts_keep_it_in_fp32() -> None:
    model = packed()
    assert torch.equal(copy.deepcopy(model)(X), model(X))
    for cast in (torch.float16, torch.bfloat16, torch.float64):
        assert model.to(cast)[4].act_scale.dtype == torch.float32
    assert torch.equal(model.float()[4].act_scale, EACH)
    assert model.to("meta")[0].act_scale.is_meta


def test_representation_and_bytes() -> None:
    model = packed()
    assert "act_bits=8, act_scale=tensor)" in repr(model[0]) and "act_scale=group)" in repr(model[4])
    assert "act_scale" not in repr(model[3])
    assert all(m.packed_bytes() == m.scheme.bytes(m.weight_shape) for m in (model[0], model[4]))


@pytest.mark.parametrize("keep_float", [False, True])
def test_a_float_layer_remembers_it(keep_float: bool) -> None:
    model = make()
    mq.swap_(model, {"*": SCHEME}, keep_float=keep_float)
    model[4].set_act_scale_(EACH)
    mq.unswap_(model)
    assert type(model[4]) is nn.Linear and list(model[4].state_dict()) == ["weight", "bias"]
    mq.swap_(model, {"*": SCHEME}, keep_float=keep_float)
    assert torch.equal(model[4].act_scale, EACH) and model[0].act_scale is None
    model[4].set_act_scale_(None)
    mq.swap_(mq.unswap_(model), {"*": SCHEME})
    assert model[4].act_scale is None
    model[4].set_act_scale_(EACH)
    mq.swap_(mq.unswap_(model), {"*": Scheme(4, act_bits=8)})  # one group: two scales do not fit
    assert model[4].act_scale is None


def test_files_carry_it(tmp_path: Path) -> None:
    model, path = packed(), tmp_path / "m.safetensors"
    mq.save(model, path)
    loaded = mq.load(make, path).eval()
    assert repr(loaded) == repr(model) and torch.equal(loaded(X), model(X))
    assert loaded[4].act_scale.dtype == torch.float32 and loaded[3].act_scale is None
    mq.save(packed(False), path)
    assert mq.load(make, path)[0].act_scale is None


def rewritten(path: Path, change: dict) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda h: h["4.act_scale"].update(dtype="I32"), r"'4.act_scale': act_scale is int32 \[2\]; wanted float32"),
        (
            lambda h: h["4.act_scale"].update(shape=[2, 1]),
            r"act_scale is float32 \[2, 1\]; wanted float32 \[1\] or \[2\]",
        ),
        (lambda h: h["4.act_scale"].update(shape=[2**40]), "4.act_scale"),
        (lambda h: h.update({"3.act_scaled": h.pop("4.act_scale")}), "the model has no '3.act_scaled'"),
        (lambda h: h.update({"1.act_scale": h.pop("4.act_scale")}), "the model has no '1.act_scale'"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "m.safetensors"
    mq.save(packed(), path)
    rewritten(path, change)
    with pytest.raises(FileError, match=message):
        mq.load(make, path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_numbers_that_are_no_scales_are_refused(tmp_path: Path, value: float) -> None:
    model, path = packed(), tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"act_scale=\[.*\]; wanted finite numbers above 0"):
        model[0].set_act_scale_(torch.tensor([value]))
    model[0].act_scale = torch.tensor([value])
    mq.save(model, path)
    with pytest.raises(FileError, match=r"layer '0': act_scale=\[.*\]; wanted finite numbers above 0"):
        mq.load(make, path)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="act_scale is set where act_bits=None; wanted act_bits=8"):
        PackedLinear(8, 8, Scheme(4)).set_act_scale_(torch.ones(1))
    conv = PackedConv2d(64, 8, (3, 3), SCHEME)
    with pytest.raises(ValueError, match=r"act_scale is float32 \[18\]; wanted float32 \[1\]$"):
        conv.set_act_scale_(torch.ones(18))
    with pytest.raises(ValueError, match=r"act_scale is float64 \[1\]; wanted float32 \[1\]$"):
        conv.set_act_scale_(torch.ones(1).double())
    assert conv.act_scale is None


def test_compiled_and_traced_models_use_it() -> None:
    model = packed()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), model(X), atol=1e-6)
    assert torch.equal(torch.fx.symbolic_trace(model)(X), model(X))
