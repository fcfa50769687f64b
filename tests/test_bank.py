"""A bank loses nothing, repeats nothing, and takes nothing that was measured under other conditions."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern.measuring.bank import Bank
from mpqkern.measuring.meter import Meter, Unfinished

from . import nets

WHERE = {"model": "a", "schemes": "w2, w4"}


def make(calls):
    def item(key):
        calls.append(key)
        return {"x": np.array([len(key) / 3])}

    return item


def test_items_come_back_bit_for_bit(tmp_path):
    value = np.random.default_rng(0).normal(size=(3, 4))
    Bank(tmp_path, WHERE).put("batch/a.b/1", x=value, n=np.arange(3))
    again = Bank(tmp_path, WHERE)
    assert "batch/a.b/1" in again and "batch" not in again
    assert again["batch/a.b/1"]["x"].tobytes() == value.tobytes()
    assert not list(tmp_path.rglob("*.part"))


def test_a_run_goes_on_where_it_stopped(tmp_path):
    keys, calls = [f"b/{i}" for i in range(5)], []
    with pytest.raises(Unfinished, match="max_evals=2 was reached after 2 of 5 evaluations"):
        meter = Meter(max_evals=2)
        meter.begin("x", 5)
        Bank(tmp_path, WHERE).measure(keys, make(calls), meter)
    assert calls == keys[:2]
    found = Bank(tmp_path, WHERE).measure(keys, make(calls), Meter())
    assert calls == keys and [item["x"][0] for item in found] == [len(k) / 3 for k in keys]


def test_the_last_item_is_no_reason_to_stop():
    meter = Meter(max_evals=3)
    meter.begin("x", 3)
    Bank(None, WHERE).measure(["a", "b", "c"], make([]), meter)
    assert meter.evaluations == 3


def test_time_limit():
    meter = Meter(time_limit=1e-9)
    meter.begin("x", 3)
    with pytest.raises(Unfinished, match="time_limit=1e-09"):
        meter.step("a")


@pytest.mark.parametrize("limit", ["time_limit", "max_evals"])
def test_limits_are_checked(limit):
    with pytest.raises(ValueError, match=f"{limit}=0; wanted a (whole )?number above 0, or None"):
        Meter(**{limit: 0})


def test_other_conditions_are_refused(tmp_path):
    Bank(tmp_path, WHERE)
    with pytest.raises(ValueError, match="other conditions: model was 'a' and is 'b'; wanted another folder"):
        Bank(tmp_path, {**WHERE, "model": "b"})


def test_a_broken_item_is_measured_again(tmp_path, caplog):
    Bank(tmp_path, WHERE).put("k", x=np.ones(2))
    (tmp_path / "items" / "k.npz").write_bytes(b"PK\x03\x04 cut off")
    bank = Bank(tmp_path, WHERE)
    assert "k" not in bank and "measured again" in caplog.text


def test_merging(tmp_path):
    one, two = Bank(tmp_path / "1", WHERE), Bank(tmp_path / "2", WHERE)
    one.put("a/1", x=np.ones(1))
    two.put("a/1", x=np.zeros(1))
    two.put("b/c.d/2", x=np.full(1, 2.0))
    assert one.merge(tmp_path / "2") == 1
    assert one["a/1"]["x"] == 1 and Bank(tmp_path / "1", WHERE)["b/c.d/2"]["x"] == 2
    Bank(tmp_path / "3", {"model": "z"})
    with pytest.raises(ValueError, match="other conditions"):
        one.merge(tmp_path / "3")
    with pytest.raises(ValueError, match="holds no measurements"):
        one.merge(tmp_path / "4")


def test_files_of_another_version(tmp_path):
    Bank(tmp_path, WHERE)
    head = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**head, "version": 99}))
    with pytest.raises(ValueError, match="version 99; wanted"):
        Bank(tmp_path, WHERE)


def noisy(run, *, scale=1.0):
    """A method of one's own: an item a batch."""
    keys = [run.key(i, "noise") for i in range(len(run.task.batches))]
    run.meter.begin("noise", len(keys))
    size = (len(run.task.layers), 2)
    items = run.bank.measure(keys, lambda key: {"x": np.full(size, scale * len(run.bank._items))}, run.meter)
    return sum(item["x"] for item in items) / len(items)


def test_a_method_of_ones_own(tmp_path):
    model, batches = nets.resnet(), [torch.randn(2, 3, 8, 8) for _ in range(3)]
    scores = mq.score(model, batches, method=noisy, bits=(2, 8), bank=tmp_path, scale=2.0)
    assert scores.unary[0, 0] == 2.0 and scores.provenance["method"] == "noisy"
    assert scores.provenance["evaluations"] == 3
    more = mq.score(model, [*batches, torch.randn(2, 3, 8, 8)], method=noisy, bits=(2, 8), bank=tmp_path, scale=2.0)
    assert more.provenance["evaluations"] == 1
    with pytest.raises(ValueError, match="options was"):
        mq.score(model, batches, method=noisy, bits=(2, 8), bank=tmp_path, scale=3.0)
    model[6].bias.data += 1
    with pytest.raises(ValueError, match="model was"):
        mq.score(model, batches, method=noisy, bits=(2, 8), bank=tmp_path, scale=2.0)
    with pytest.raises(TypeError, match="scael=1 is no option of method 'noisy'; wanted one of scale"):
        mq.score(model, batches, method=noisy, scael=1)


def test_a_bar_only_where_it_is_asked_for(capsys):
    model, batch = nets.resnet(), torch.randn(2, 3, 8, 8)
    mq.score(model, batch, method=noisy, bits=(2, 8))
    assert capsys.readouterr().err == ""
    mq.score(model, batch, method=noisy, bits=(2, 8), progress=True)
    assert "noise: 100%" in capsys.readouterr().err


class Scaled(nn.Module):
    """Has a setting and a counter."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.layer, self.scale, self.runs = nn.Linear(4, 4), scale, 0
        self._kind, self.seen = ("a", 1), None

    def forward(self, x):
        self.runs += 1
        self.seen = x
        return self.layer(x) * self.scale


def test_settings_of_modules_count(tmp_path):
    model, batch = nn.Sequential(Scaled(), nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.randn(3, 4)
    scores = mq.score(model, batch, method=noisy, bits=(2, 8), bank=tmp_path)
    assert scores.provenance["evaluations"] == 1
    assert mq.score(model, batch, method=noisy, bits=(2, 8), bank=tmp_path).provenance["evaluations"] == 0
    changes = [(0, "scale", 0.5, "1.0"), (0, "_kind", ("b", 1), "('a', 1)"), (1, "eps", 0.1, "1e-05"),
               (2, "p", 0.1, "0.5")]  # fmt: skip
    for at, name, value, was in changes:
        before = getattr(model[at], name)
        setattr(model[at], name, value)
        with pytest.raises(ValueError, match=re.escape(f"{at}.{name} was {was} and is {value!r}")):
            mq.score(model, batch, method=noisy, bits=(2, 8), bank=tmp_path)
        setattr(model[at], name, before)
    for module in model:
        module.extra = [1, "x"]
    with pytest.raises(ValueError, match=re.escape("0.extra was not there and is [1, 'x']; 1.extra was")):
        mq.score(model, batch, method=noisy, bits=(2, 8), bank=tmp_path)


def test_what_is_being_measured_goes_by_its_name(monkeypatch):
    seen = []
    step = Meter.step
    monkeypatch.setattr(Meter, "step", lambda self, name, *a, **k: seen.append(name) or step(self, name, *a, **k))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batch = torch.randn(4, 8)
    mq.score(model, [batch, batch + 1], method="kl", bits=(2, 8), rounding="gptq")
    rounded = ["0 w2", "0 w8", "2 w2", "2 w8"]
    assert seen == [*rounded, *["reference", *rounded] * 2]
    seen.clear()
    mq.score(model, [batch, batch + 1], method="mpqco", bits=(2, 8))
    assert seen == ["batch 0", "batch 1"]
