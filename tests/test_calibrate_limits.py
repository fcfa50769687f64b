"""calibrate, stopped, interrupted or asked for what cannot be: it goes on, and the model is as it was."""

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.rounding import calibrate, layerwise

from . import nets
from .test_calibrate import IMAGES, VECTORS, mlp, same
from .test_held import everything


def test_a_stopped_run_goes_on_to_the_same_codes(tmp_path, monkeypatch: pytest.MonkeyPatch):
    model = nets.resnet()
    want = calibrate(model, {"*": 2}, IMAGES, correct_bias=True)
    made = []
    put = layerwise._rounded

    def stop(job, layer, statistics):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(layer)
        return put(job, layer, statistics)

    monkeypatch.setattr(layerwise, "_rounded", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, {"*": 2}, IMAGES, correct_bias=True, bank=tmp_path)
    monkeypatch.setattr(layerwise, "_rounded", lambda *a: made.append(a[1]) or put(*a))
    again = calibrate(model, {"*": 2}, IMAGES, correct_bias=True, bank=tmp_path)
    assert same(again, want) and len(made) == len(want) == len(set(made))
    with pytest.raises(ValueError, match=r"measured under other conditions: .*schemes"):
        calibrate(model, {"*": 4}, IMAGES, correct_bias=True, bank=tmp_path)
    with pytest.raises(ValueError, match=r"measured under other conditions: .*batches"):
        calibrate(model, {"*": 2}, IMAGES[:2], correct_bias=True, bank=tmp_path)


def test_a_time_limit_stops_between_layers(tmp_path):
    model = nets.resnet()
    with pytest.raises(mq.Unfinished, match="time_limit"):
        calibrate(model, {"*": 2}, IMAGES, bank=tmp_path, time_limit=1e-9)
    assert len(list(tmp_path.rglob("layer*.npz"))) == 1
    assert same(calibrate(model, {"*": 2}, IMAGES, bank=tmp_path), calibrate(model, {"*": 2}, IMAGES))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_model_is_left_as_it_was(error: type, monkeypatch: pytest.MonkeyPatch):
    model = nets.resnet().train()
    before = everything(model)
    calibrate(model, {"*": 2}, IMAGES)
    assert everything(model) == before

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(layerwise, "collect", fail)
    with pytest.raises(error):
        mq.swap_(model, {"*": Scheme(2, act_bits=8)}, rounding="gptq", batches=IMAGES)
    assert everything(model) == before and isinstance(model[0], nn.Conv2d)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: mq.swap_(m, {"*": 4}, rounding="gptq"), "rounding='gptq' needs to see data; wanted batches="),
        (lambda m, x: mq.swap_(m, {"*": 4}, correct_bias=True), "correct_bias needs to see data; wanted batches="),
        (lambda m, x: mq.swap_(m, {"*": 4}, roundng="gptq"), "roundng='gptq' is no option; wanted one of rounding, b"),
        (
            lambda m, x: mq.swap_(m, {"*": 4}, rounding="gptq", batches=x, damp=0.1),
            r"damp=0.1 is an option of the rounding; wanted rounding=GPTQ\(damp=0.1\)",
        ),
        (lambda m, x: calibrate("m", {"*": 4}, x), "model=str; wanted a torch.nn.Module"),
        (lambda m, x: mq.swap_(m, {"*": 3}, rounding="gptq", batches=x), "bits=3; wanted 2, 4 or 8"),
        (lambda m, x: calibrate(m, {"*": 4}, x, memory=0), "memory=0; wanted bytes"),
        (lambda m, x: calibrate(m, {"*": 4}, x, memory="1 GB"), "memory='1 GB'; wanted bytes"),
        # the hash of a text is another one in each process
        (lambda m, x: calibrate(m, {"*": 4}, x, seed="a"), "seed='a'; wanted a whole number"),
        (lambda m, x: calibrate(m, {"*": 4}, x, rounding=mq.rounding.GPTQ), r"with options, as in GPTQ\(damp=0.1\)"),
        (lambda m, x: calibrate(m, {"*": 4}, x, memory=99), "memory=99; wanted at least 4608 bytes for the .* of 0"),
        (lambda m, x: calibrate(m, {"*": 4}, x, correct_bias=1), "correct_bias=1; wanted True or False"),
        (lambda m, x: calibrate(m, {"*": 4}, x / 0), "layer '0' meets infinities or NaN"),
        (lambda m, x: calibrate(m, {"9": 4}, x), "pattern='9' matches no layer"),
        (
            lambda m, x: calibrate(m, {"*": 4}, x, rounding=mq.rounding.Rounding()),
            "wanted 'minmax', .*one of the classes",
        ),
        (
            lambda m, x: mq.swap_(m, {"*": 4}, rounding=calibrate(m, {"*": 8}, x)),
            "layer '0' was rounded to w8 but the plan has w4",
        ),
        (
            lambda m, x: mq.swap_(m, {"*": 4}, rounding=calibrate(m, {"0": 4}, x)),
            "layer '2' was not rounded but the plan has w4",
        ),
        (
            lambda m, x: mq.swap_(m, {"*": 4}, rounding=calibrate(m, {"*": 4}, x), batches=x),
            "batches given with codes that are found already",
        ),
    ],
)
def test_mistakes(call, message: str):
    model = mlp()
    before = everything(model)
    with pytest.raises((ValueError, TypeError), match=message):
        call(model, VECTORS)
    assert everything(model) == before


@pytest.mark.parametrize("rounding", ["hqq", "gptq", "gpfq", "qronos", "adaround"])
@pytest.mark.parametrize("weight", [float("nan"), 1e7])
def test_weights_that_no_grid_holds_are_named(rounding: str, weight: float):
    """Of the last layer: no other one meets what comes of them."""
    model = mlp()
    model[4].weight.data[0, 0] = weight
    before = everything(model)
    with pytest.raises(ValueError, match="'4' returns" if rounding == "adaround" and weight != weight else "layer '4'"):
        mq.swap_(model, {"*": 4}, rounding=rounding, batches=VECTORS)
    assert str(everything(model)) == str(before)  # NaN is not equal to itself


def test_nothing_to_round():
    assert len(calibrate(mlp(), {"*": None}, VECTORS)) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda item: item | {"codes": item["codes"][:3]},
        lambda item: item | {"codes": item["codes"] + 16},
        lambda item: item | {"scales": item["scales"] * np.nan},
        lambda item: item | {"scales": item["scales"].astype(np.float32)},
        lambda item: item | {"extra": item["codes"]},
        lambda item: {"codes": item["codes"]},
    ],
    ids=["rows", "range", "nan", "type", "more", "less"],
)
def test_what_is_no_rounding_of_the_layer_is_not_taken_from_a_bank(tmp_path, caplog, change):
    model, x = nn.Sequential(nn.Linear(12, 5)), torch.randn(20, 12)
    (before,) = calibrate(model, {"*": 4}, x, bank=tmp_path).values()
    (file,) = (tmp_path / "items").glob("*.npz")
    with np.load(file) as item:
        changed = change(dict(item))
    np.savez(file, **changed)
    (after,) = calibrate(model, {"*": 4}, x, bank=tmp_path).values()
    assert torch.equal(before.values(), after.values()) and "rounded again" in caplog.text
    caplog.clear()
    calibrate(model, {"*": 4}, x, bank=tmp_path)
    assert not caplog.text  # it was put right
