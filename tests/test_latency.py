"""Latencies: measured in the model, by a clock that the test moves; kept on disk; turned into budgets."""

import json
import logging
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.latency import measure, turns

from . import nets
from .test_held import everything


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only in layers: a float one takes its inputs' width of them, a packed one its bits."""
    now = [0.0]
    linear, packed = F.linear, mq.PackedLinear.forward

    def slow_linear(x, w, b=None):
        now[0] += w.shape[1]
        return linear(x, w, b)

    def slow_packed(self, x):
        now[0] += self.scheme.bits
        return packed(self, x)

    monkeypatch.setattr(F, "linear", slow_linear)
    monkeypatch.setattr(mq.PackedLinear, "forward", slow_packed)
    monkeypatch.setattr(measure, "_Clock", lambda device: lambda: now[0])
    return now


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again, self.never = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(5, 5)
        self.other = nn.Linear(16, 16)

    def forward(self, x):
        return self.other(self.again(self.again(self.first(x)).relu()))


def test_each_layer_has_the_time_of_all_its_calls(clock):
    found = mq.measure_latency(Twice(), torch.randn(3, 6), bits=(2, 8), cache=False)
    assert dict(found) == {
        "first": {"float": 6000, "w2": 2000, "w8": 8000},
        "again": {"float": 32000, "w2": 4000, "w8": 16000},
        "never": {"float": 0, "w2": 0, "w8": 0},
        "other": {"float": 16000, "w2": 2000, "w8": 8000},
    }
    assert found.total == 54000 and found.rest == 0
    assert found.whole == {"float": 54000, "w2": 8000, "w8": 32000}
    assert found.predict({"first": None, "again": Scheme(8)}) == 54000 - 16000
    assert found.fastest("first") == "w2"
    (line,) = (line for line in str(found).splitlines() if line.startswith("again"))
    assert line.split() == ["again", "32000.0000", "4000.0000", "16000.0000", "w2"]


def test_layers_of_one_shape_share_the_median(clock, monkeypatch):
    noise = iter([0, 1, 5, 0] * 1000)  # for each layer its own
    linear = F.linear

    def jitter(x, w, b=None):
        clock[0] += next(noise)
        return linear(x, w, b)

    monkeypatch.setattr(F, "linear", jitter)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4))
    found = mq.measure_latency(model, torch.randn(2, 8), bits=(4,), cache=False)
    assert found["0"] == found["1"] == found["2"] == {"float": 9000, "w4": 4000} and found["3"]["float"] == 8000


def test_what_is_known_is_not_measured_again(clock, tmp_path, monkeypatch):
    asked = []
    timed = measure._timed
    monkeypatch.setattr(measure, "_timed", lambda v, names, *rest: asked.append(list(names)) or timed(v, names, *rest))
    model, x = Twice(), torch.randn(3, 6)
    first = mq.measure_latency(model, x, bits=(2, 8), cache=str(tmp_path))
    assert mq.measure_latency(model, x, bits=(2, 8), cache=str(tmp_path)) == first
    mq.measure_latency(model, x, bits=(4,), cache=str(tmp_path))  # another scheme
    mq.measure_latency(model, torch.randn(4, 6), bits=(2, 8), cache=str(tmp_path))  # another batch
    assert asked == [["first", "again", "other"], [], ["first", "again", "other"], ["first", "again", "other"]]
    monkeypatch.setenv("MPQKERN_CACHE", str(tmp_path / "deeper"))
    mq.measure_latency(model, x, bits=(2, 8))
    (file,) = (tmp_path / "deeper").glob("latency-*.json")
    assert json.loads(file.read_text())["where"]["mpqkern"] == mq.__version__


@pytest.mark.parametrize("text", ["no json", "{}", '{"where": 1, "ms": {}}'])
def test_a_file_that_is_none_is_measured_anew(clock, tmp_path, caplog, text):
    model, x = Twice(), torch.randn(3, 6)
    first = mq.measure_latency(model, x, bits=(2,), cache=str(tmp_path))
    (file,) = tmp_path.glob("*.json")
    good = file.read_text()
    file.write_text(text)
    assert mq.measure_latency(model, x, bits=(2,), cache=str(tmp_path)) == first
    assert "measured anew" in caplog.text and file.read_text() == good
    file.write_text(good.replace(": 2000.0", ": -2000.0"))
    assert mq.measure_latency(model, x, bits=(2,), cache=str(tmp_path)) == first


def test_a_folder_that_cannot_be_written_is_no_error(clock, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("mpqkern.latency.kept.write_file", full)
    with caplog.at_level(logging.WARNING):
        mq.measure_latency(Twice(), torch.randn(3, 6), bits=(2,), cache=str(tmp_path))
    assert "not kept: disk full" in caplog.text


def test_budgets_of_the_whole_model_are_kept_by_the_solver(clock):
    latency = mq.Latency({"a": {"float": 4.0, "w2": 1.0, "w4": 5.0}, "b": {"float": 3.0, "w2": 1.0, "w4": 2.0}}, 9.0)
    layers = [mq.Layer(n, "linear", (4, 4), 16) for n in "ab"]
    scores = mq.Scores(layers, [Scheme(2), Scheme(4), None], np.array([[9.0, 2.0, 0.0], [5.0, 1.0, 0.0]]))
    best = mq.solve(scores, latency.budget(8.0))
    assert best.schemes == {"a": None, "b": Scheme(4)}  # 4 bits are slower than float in "a"
    assert latency.predict(best) == 8.0
    assert mq.solve(scores, mq.Budget(ms=2.0, table=latency)).schemes == {"a": Scheme(2), "b": Scheme(2)}
    with pytest.raises(ValueError, match=r"^ms=1.5; wanted at least 2, which is spent outside"):
        latency.budget(1.5)
    with pytest.raises(ValueError, match=r"names the layer 'c', which was not timed"):
        latency.predict({"c": None})
    with pytest.raises(ValueError, match=r"layer 'a' was not timed as 'w8'; wanted one of float, w2, w4"):
        latency.predict({"a": Scheme(8)})


def test_what_is_predicted_fits_its_own_budget_where_layers_add_up_to_more_than_the_model():
    latency = mq.Latency({"a": {"float": 4.0, "w2": 1.0}, "b": {"float": 3.0, "w2": 2.0}}, 5.0)
    layers = [mq.Layer(n, "linear", (4, 4), 16) for n in "ab"]
    scores = mq.Scores(layers, [Scheme(2), None], np.array([[9.0, 0.0], [5.0, 0.0]]))
    fast = latency.predict(dict.fromkeys("ab", Scheme(2)))
    assert fast == 1.0 and latency.rest == 0
    assert mq.solve(scores, latency.budget(fast)).schemes == dict.fromkeys("ab", Scheme(2))
    assert latency.predict(mq.solve(scores, latency.budget(4.0))) == 4.0
    with pytest.raises(ValueError, match=r"^ms=-0.5; wanted at least 0, which is spent outside"):
        latency.budget(-0.5)


def test_a_file_of_it_is_a_budgets_table(tmp_path):
    latency = mq.Latency({"a": {"float": 4.0, "w2": 1.25}}, 9.0)
    (tmp_path / "ms.json").write_text(latency.to_json())
    row = mq.Budget(ms=2, table=tmp_path / "ms.json").row([mq.Layer("a", "linear", (4, 4), 16)], [None, Scheme(2)])
    assert row.values.tolist() == [[4 * 10**9, 1.25 * 10**9]]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(tmp_path, fails):
    model, batch = nets.resnet().train(), {"images": torch.randn(2, 3, 8, 8)}
    before, calls = everything(model), []

    def forward(m, batch):
        calls.append(m)
        if fails and len(calls) == 9:
            raise KeyboardInterrupt
        return m(batch["images"])

    try:
        mq.measure_latency(model, batch, forward=forward, rounds=1, cache=str(tmp_path))
    except KeyboardInterrupt:
        assert fails
    assert everything(model) == before and len(calls) >= 9


def test_real_times_add_up(tmp_path):
    """A coarse check of the real clock: that the layers take most of the time of a model of large layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    found = mq.measure_latency(model, torch.randn(64, 1024), bits=(4,), rounds=5, cache=str(tmp_path))
    assert 0.3 * found.total < found["0"]["float"] + found["2"]["float"] < 1.5 * found.total
    assert all(0 < ms < 1e3 for row in found.values() for ms in row.values())


def test_errors(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with pytest.raises(ValueError, match="bits=3; wanted 2, 4 or 8"):
        mq.measure_latency(model, x, bits=(3,))
    with pytest.raises(TypeError, match=r"bits=\('4',\); wanted widths or Schemes"):
        mq.measure_latency(model, x, bits=("4",))
    with pytest.raises(ValueError, match="rounds=0; wanted a whole number, at least 1"):
        mq.measure_latency(model, x, rounds=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cache='.*file' is a file; wanted a folder"):
        mq.measure_latency(model, x, cache=str(tmp_path / "file"))


def test_nobody_pays_for_the_turn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call after another contender's turn is slow, as it is after one that leaves caches to be written."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # then the clock is the process's own time
    last = ["none"]

    def call(name: str) -> None:
        until = time.process_time() + (3e-3 if last[0] != name else 1e-5)
        last[0] = name
        while time.process_time() < until:
            pass

    found = turns.measure({name: lambda i, name=name: call(name) for name in "ab"}, rounds=5, min_seconds=2e-4)
    assert max(timing.seconds for timing in found.values()) < 1e-4
