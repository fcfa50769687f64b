"""Only the block that a layer is in runs again; where that is not the same, the whole model does."""

import logging

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.held import held
from mpqkern.measuring.task import Task
from mpqkern.rounding import calibrate, layerwise
from mpqkern.rounding.partition import called_once, parts
from mpqkern.rounding.stretch import Stretch
from mpqkern.rounding.twin import Twin

from . import nets

IMAGES = list(torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def equal(a: mq.Rounded, b: mq.Rounded) -> bool:
    return all(torch.equal(a[name].codes, b[name].codes) and torch.equal(a[name].scales, b[name].scales) for name in b)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch):
    """Calibration without blocks: by passes through the whole model."""

    def run(*args, **how) -> mq.Rounded:
        with monkeypatch.context() as patch:
            patch.setattr(layerwise, "parts", lambda *_: [])
            return calibrate(*args, **how)

    return run


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("make", [nets.resnet, nets.transformer])
def test_codes_are_those_of_whole_passes(make, act_bits, whole):
    model, plan = make(), {"*": Scheme(2, act_bits=act_bits)}
    batches = IMAGES if make is nets.resnet else [torch.randn(6, 5, 8), torch.randn(4, 5, 8)]
    assert equal(calibrate(model, plan, batches), whole(model, plan, batches))


def counted(model: nn.Module) -> tuple[list[int], list]:
    """Calls of the model's first layer."""
    calls: list[int] = []
    return calls, model[0].register_forward_pre_hook(lambda *_: calls.append(1))


def test_passes_do_not_grow_with_the_layers_of_a_block(whole):
    counts = []
    for run in (calibrate, whole):
        model = nets.resnet()
        calls, _ = counted(model)
        run(model, {"*": 4}, IMAGES)
        counts.append(len(calls))
    assert counts[0] < 0.7 * counts[1]


def test_a_pass_ends_with_the_layers_that_are_looked_at():
    model = nets.resnet()
    last: list[int] = []
    model[6].register_forward_pre_hook(lambda *_: last.append(1))
    calibrate(model, {"0": 4}, IMAGES)
    assert len(last) <= 5  # the passes that look for layers, order and blocks


def block(model: nn.Module, index: int, memory: int = 2**30) -> tuple[Task, Stretch]:
    task, twin = Task(model, IMAGES), Twin()
    part = [part for part in parts(task, "block") if len(part.layers) > 1][index]
    return task, Stretch(task, twin, part, called_once(task), memory=memory)


def test_inputs_beyond_the_memory_are_not_kept():
    model = nets.resnet()
    needed = 2 * 2 * 8 * 6 * 8 * 8 * 4  # both ways, batches of 8 images with 6 channels
    for memory, calls in ((needed - 1, 1), (needed, 0)):
        with held(model):
            _, stretch = block(model, 0, memory)
            seen, handle = counted(model)
            stretch.run(0, rounded=True)
        handle.remove()
        assert len(seen) == calls


class Leaning(nn.Sequential):
    """Its second block reads what the model's own code has left behind for this batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self[3].conv1.lean = float(x.mean())
        return super().forward(x)


def test_a_block_that_depends_on_more_than_its_inputs(caplog: pytest.LogCaptureFixture, whole):
    model = Leaning(*nets.resnet())
    model[3].act = nn.Identity()
    inner = model[3].norm1

    def lean(module: nn.Module, args: tuple) -> tuple:
        return (args[0] + model[3].conv1.lean,)

    inner.register_forward_pre_hook(lean)
    with caplog.at_level(logging.WARNING):
        got = calibrate(model, {"*": 2}, IMAGES)
    assert "a block answers otherwise when it is called alone" in caplog.text
    assert equal(got, whole(model, {"*": 2}, IMAGES))


class Writing(nn.Sequential):
    """A block that writes into what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(0.5).add_(1))


def writing() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Writing(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
    return nn.Sequential(nn.Linear(8, 8), *blocks)


@pytest.mark.parametrize("make", [writing, nets.Functional, nets.Reused])
def test_nothing_is_missed_and_nothing_spoilt(make, monkeypatch: pytest.MonkeyPatch):
    """The same codes as by passes that never end early, through the whole model."""
    model, x = make(), torch.randn(30, 8)
    got = calibrate(model, {"*": 2}, [x])
    monkeypatch.setattr(layerwise, "called_once", lambda task: set())
    monkeypatch.setattr(layerwise, "parts", lambda *_: [])
    assert equal(got, calibrate(model, {"*": 2}, [x.clone()]))


def test_recording_a_block_ends_with_it():
    model, last = nets.resnet(), []
    handle = model[6].register_forward_pre_hook(lambda *_: last.append(1))
    with held(model):
        task = Task(model, IMAGES)
        part = next(part for part in parts(task, "block") if len(part.layers) > 1)
        once, before = called_once(task), len(last)
        Stretch(task, Twin(), part, once, memory=2**30)
    handle.remove()
    assert len(last) == before > 0
