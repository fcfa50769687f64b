"""Ledgers: what was predicted beside what is so, in a table, in JSON and back."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.latency import measure

from . import nets
from .test_held import everything

PLAN = {"0": Scheme(4, group_size=32), "2.conv1": 8, "2.conv2": 2, "6": Scheme(2, symmetric=False)}


@pytest.fixture
def packed(tmp_path):
    """A float model, its packed self, the ledger, a batch with labels, and the file."""
    model = nets.resnet()
    other = copy.deepcopy(model)
    ledger = mq.swap_(other, PLAN)
    mq.save(other, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    return model, other, ledger, (torch.randn(6, 3, 8, 8), torch.arange(6) % 5), tmp_path / "model.safetensors"


def words(text):
    return " ".join(text.splitlines()[0].split())


def test_bytes_on_disk_are_those_predicted(packed):
    _, model, ledger, _, file = packed
    found = mq.audit(ledger, model, file=file)
    for row in found.packed:
        assert row.disk_bytes == row.predicted_bytes == row.bytes == row.scheme.bytes(row.weight_shape) > 0
    assert [row.disk_bytes for row in found.left] == [row.float_bytes for row in ledger.left]
    assert found.whole.file_bytes == file.stat().st_size and found.sized_as_predicted
    assert ledger.sized_as_predicted is None and ledger["0"].disk_bytes is None  # the old one is as it was
    wrong = replace(found.rows[0], disk_bytes=1)
    assert mq.Ledger((wrong, *found.rows[1:])).sized_as_predicted is False


def test_shared_tensors_lie_in_the_file_once(tmp_path):
    model = nets.Tied()
    ledger = mq.swap_(model, {"*": 4})
    mq.save(model, tmp_path / "m")
    found = mq.audit(ledger, model, torch.randn(4, 12), float_model=nets.Tied(), file=tmp_path / "m", rounds=1)
    assert found["b"].predicted_bytes == found["b"].disk_bytes == 0 and found["a"].disk_bytes == ledger["a"].bytes
    assert found["b"].rise is None and found["a"].rise > 0 and found.sized_as_predicted


def test_a_file_of_another_model_is_named(packed, tmp_path):
    _, model, ledger, _, _ = packed
    other = nets.resnet()
    mq.swap_(other, {"6": 2})
    mq.save(other, tmp_path / "other")
    with pytest.raises(mq.checkpoint.FileError, match=r"it lacks '0.qweight'; wanted the file of this model"):
        mq.audit(ledger, model, file=tmp_path / "other")
    with pytest.raises(ValueError, match=r"^layer '0' is Conv2d in model; wanted the model of this ledger, w4g32"):
        mq.audit(ledger, other)


def test_rises_are_those_that_scores_predict(packed):
    """With the batch that was scored, `single` predicts exactly what one packed layer does to the loss."""
    before, model, ledger, batch, _ = packed
    schemes = [Scheme(4, group_size=32), Scheme(8), Scheme(2), Scheme(2, symmetric=False), None]
    scores = mq.score(before, [batch], method="single", bits=schemes)
    found = mq.audit(ledger, model, [batch], float_model=before, scores=scores, rounds=1)
    for row in found.packed:
        assert row.rise == pytest.approx(row.score, rel=1e-3, abs=1e-6) and row.rise != 0
    assert all(row.score == 0 and row.rise is None for row in found.left)
    assert (found.whole.loss, found.whole.method) == ("ce", "single")
    assert found.whole.score == pytest.approx(sum(row.score for row in found.rows))
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(m(batch[0]).double(), batch[1])) for m in (before, model)]
    assert found.whole.float_loss == pytest.approx(losses[0])
    assert found.whole.rise == pytest.approx(losses[1] - losses[0])


def test_times_are_predicted_and_measured(packed, monkeypatch):
    before, model, ledger, batch, _ = packed
    now, forward = [0.0], mq.PackedConv2d.forward

    def slow(self, x):
        now[0] += self.scheme.bits
        return forward(self, x)

    monkeypatch.setattr(mq.PackedConv2d, "forward", slow)
    monkeypatch.setattr(measure, "_Clock", lambda device: lambda: now[0])
    latency = mq.Latency({"0": {"float": 5.0, "w4g32": 1.5}, "6": {"float": 2.0, "w2-asym": 0.5}}, 10.0)
    found = mq.audit(ledger, model, batch, float_model=before, latency=latency, rounds=1)
    assert [found[n].ms for n in PLAN] == [4000, 8000, 2000, 0] and found["0"].float_ms == 0
    assert (found["0"].predicted_ms, found["6"].predicted_ms, found["2.conv1"].predicted_ms) == (1.5, 0.5, None)
    assert found.whole.predicted_ms == 5.0 and found.whole.ms == 14000
    assert mq.audit(ledger, model, batch, rounds=1)["0"].float_ms is None  # no float model, no time of it


def test_models_are_as_they_were(packed):
    before, model, ledger, batch, _ = packed
    states = everything(before), everything(model)

    def loss(output, b):
        raise KeyboardInterrupt

    mq.audit(ledger, model, batch, float_model=before, rounds=1)
    with pytest.raises(KeyboardInterrupt):
        mq.audit(ledger, model, batch, float_model=before, loss=loss, rounds=1)
    assert (everything(before), everything(model)) == states


def test_the_table_shows_what_is_known(packed):
    before, model, ledger, batch, file = packed
    assert words(str(ledger)) == "layer weight scheme float bytes bytes rel. error"
    found = mq.audit(ledger, model, batch, float_model=before, file=file, rounds=1)
    assert words(str(found)) == "layer weight scheme float bytes bytes on disk float ms ms rel. error ce +"
    total = str(found).splitlines()[-1]
    assert f"file {file.stat().st_size:,} bytes" in total and "x as fast" in total


def test_rows_come_one_by_one_or_by_name():
    model = nets.resnet()
    ledger = mq.swap_(model, Scheme(8, act_bits=8))
    activations = mq.calibrate_activations_(model, torch.randn(6, 3, 8, 8))
    for found in (ledger, activations):
        assert list(found) == [found[row.name] for row in found.rows] and len(found) == len(found.rows) > 1
        assert "2.conv1" in found and "2.conv9" not in found
        with pytest.raises(KeyError, match=r"no layer '2\.conv9'; wanted one of '0', '2\.conv1'"):
            found["2.conv9"]


def test_json_goes_there_and_back(packed):
    before, model, ledger, batch, file = packed
    found = mq.audit(ledger, model, batch, float_model=before, file=file, rounds=1)
    assert mq.Ledger.from_json(found.to_json()) == found
    values = json.loads(ledger.to_json())
    del values["whole"]  # as it was written before there was one
    assert mq.Ledger.from_json(json.dumps(values)) == ledger
    for text in ("", "[]", "{}", '{"layers": [{"name": 1}]}', '{"layers": [], "whole": {"x": 1}}'):
        with pytest.raises(ValueError, match=r"^text=.* is no ledger .*wanted what to_json wrote"):
            mq.Ledger.from_json(text)


def test_latency_and_comparison_come_back_from_json():
    latency = mq.Latency({"1": {"float": 2.0, "w4": 0.5}}, 3.0)
    assert mq.Latency.from_json(latency.to_json()).total == 3.0
    assert mq.Budget(ms=1, table=json.loads(latency.to_json())).row(
        [mq.Layer("1", "linear", (4, 4), 16)], [Scheme(4)]
    ).values.tolist() == [[5 * 10**8]]
    for text in ("", "[]", "{}", '{"": {"float": -1}}', '{"": {"float": 1}, "a": {"w4": 1}}'):
        with pytest.raises(ValueError, match=r"^text=.*wanted what to_json wrote"):
            mq.Latency.from_json(text)
    with pytest.raises(ValueError, match="is no comparison"):
        mq.Comparison.from_json("{}")
