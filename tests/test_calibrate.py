"""calibrate: layers in order, each on what it meets; resumable, bounded, and the model as it was."""

import copy

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.measuring.task import Task
from mpqkern.rounding import calibrate
from mpqkern.rounding.layerwise import collect
from mpqkern.rounding.statistics import Statistics
from mpqkern.rounding.twin import Twin

from . import nets

IMAGES = list(torch.randn(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


VECTORS = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))


def same(a: mq.Rounded, b: mq.Rounded) -> bool:
    parts = ("codes", "scales", "zeros", "shift")
    pairs = [(getattr(a[n], p), getattr(b[n], p)) for n in a for p in parts]
    return list(a) == list(b) and all(x is y if x is None else torch.equal(x, y) for x, y in pairs)


def test_a_layer_meets_what_the_layers_before_have_become():
    """The third layer's statistics, by hand."""
    model = mlp()
    task = Task(model, VECTORS)
    rounded = calibrate(model, {"0": 2, "2": 4, "4": 2}, VECTORS)
    twin = Twin()
    for layer in (0, 1):
        twin.put(
            task.layers[layer].name,
            task.modules[layer],
            rounded[task.layers[layer].name],
            [Scheme(2), Scheme(4)][layer],
        )
    found = collect(task, [2], twin, memory=2**20, seed=0)[2]
    with torch.no_grad():
        x = model[:4](VECTORS)
        with twin:
            y = model[:4](VECTORS)
    assert not torch.equal(x, y)
    by_hand = Statistics.of(model[4], products=True, sums=True)
    by_hand.add(y[None], x[None])
    for name in ("h", "g", "y", "x"):
        torch.testing.assert_close(getattr(found, name), getattr(by_hand, name))
    want = mq.rounding.GPTQ().round(model[4].weight.detach(), Scheme(2), found)
    assert torch.equal(want.codes, rounded["4"].codes)
    alike = collect(task, [2], twin, products=False, memory=2**20, seed=0)[2]
    assert alike.g is alike.h
    torch.testing.assert_close(alike.x, by_hand.x)
    torch.testing.assert_close(alike.h, by_hand.h)


def test_better_than_nearest_where_it_counts():
    """Two bits on inputs that were never seen."""
    model = nets.resnet().eval()
    x = torch.randn(256, 3, 8, 8)
    with torch.no_grad():
        want, errors = model(x), {}
        for rounding in ("minmax", "gptq"):
            packed = copy.deepcopy(model)
            mq.swap_(packed, {"*": 2}, rounding=rounding, batches=[torch.randn(64, 3, 8, 8) for _ in range(4)])
            errors[rounding] = float((packed(x) - want).square().mean())
    assert errors["gptq"] < 0.3 * errors["minmax"]


def test_the_mismatch_is_made_up_for():
    """Later layers that aim at the float model's outputs undo a part of what earlier ones have done."""
    wins = 0
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(24, 24), nn.ReLU())], nn.Linear(24, 8))
        x, calibration = torch.randn(512, 24), torch.randn(512, 24)
        with torch.no_grad():
            want, errors = model(x), []
            for mismatch in (True, False):
                packed = copy.deepcopy(model)
                mq.swap_(packed, {"*": 2}, rounding=mq.rounding.GPTQ(mismatch=mismatch), batches=calibration)
                errors.append(float((packed(x) - want).square().mean()))
        wins += errors[0] < errors[1]
    assert wins >= 5


def test_a_corrected_bias_takes_the_mean_error_away():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.rand(64, 3, 8, 8)
    packed = copy.deepcopy(model)
    mq.swap_(packed, {"*": 2}, batches=x, correct_bias=True)
    plain = copy.deepcopy(model)
    mq.swap_(plain, {"*": 2})
    with torch.no_grad():
        want = model(x).mean(0)
        assert (packed(x).mean(0) - want).abs().max() < 1e-5  # its last layer meets all rows, none are picked
        assert (plain(x).mean(0) - want).abs().max() > 1e-2
        conv = (model[0](x).mean((0, 2, 3)) - packed[0](x).mean((0, 2, 3))).abs().max()
        assert conv < 1e-5 < (model[0](x).mean((0, 2, 3)) - plain[0](x).mean((0, 2, 3))).abs().max()
    assert packed[0].bias is not None and plain[0].bias is None


class Heads(nn.Module):
    """Queries, keys and values of one tensor, which is then written to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.q, self.k, self.v, self.last = (nn.Linear(12, 12) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y = self.q(x) * self.k(x) + self.v(x)
        return self.last(y + x.zero_())


def test_layers_called_with_one_tensor_share_a_pass(monkeypatch: pytest.MonkeyPatch):
    passes, run = [], Task.run
    monkeypatch.setattr(Task, "run", lambda self, batch: passes.append(1) or run(self, batch))
    calibrate(Heads(), {"*": 4}, VECTORS)
    assert len(passes) == 4 + 1 + 2 * 2  # first to look; then the first layer, q, k, v, the last


def test_a_tensor_that_was_written_to_is_another_one():
    """One residual stream, added to in place: the second layer depends on the first."""

    class Stream(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            for layer in self:
                x += layer(x)
            return x

    model = Stream(nn.Linear(12, 12), nn.Linear(12, 12))
    rounded = calibrate(model, {"*": 2}, VECTORS)
    twin = Twin()
    twin.put("0", [model[0]], rounded["0"], Scheme(2))
    want = collect(Task(model, VECTORS), [1], twin, memory=2**20, seed=0)[1]
    assert torch.equal(rounded["1"].codes, mq.rounding.GPTQ().round(model[1].weight.detach(), Scheme(2), want).codes)
    alike = collect(Task(model, VECTORS), [1], memory=2**20, seed=0)[1]
    assert not torch.equal(
        rounded["1"].codes, mq.rounding.GPTQ().round(model[1].weight.detach(), Scheme(2), alike).codes
    )


def test_equal_batches_show_other_positions():
    model, image = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 40, 40)
    once, twice = (collect(Task(model, [image] * n), [0], memory=2**20, seed=0)[0] for n in (1, 2))
    assert not torch.allclose(2 * once.h, twice.h)


def test_inputs_that_are_overwritten_later_on():
    model = Heads()
    found = collect(Task(model, VECTORS), [1], memory=2**20, seed=0)[1]
    x = torch.relu(model.first(VECTORS)).detach().double()
    torch.testing.assert_close(found.h[0], x.T @ x)


WIRINGS = {
    "functional": (nets.Functional, torch.randn(40, 8)),
    "reused": (nets.Reused, torch.randn(40, 8)),
    "tied": (nets.Tied, torch.randn(40, 12)),
    "transformer": (nets.transformer, torch.randn(8, 5, 8)),
    "keywords": (nets.Keywords, {"ids": torch.randint(20, (8, 6)), "mask": torch.ones(8, 6)}),
    "in place": (Heads, VECTORS),
    "resnet": (nets.resnet, (IMAGES[0], torch.zeros(16).long())),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_wiring(wiring: str, caplog: pytest.LogCaptureFixture):
    make, batch = WIRINGS[wiring]
    model = make()
    ledger = mq.swap_(model, {"*": 8}, rounding="gptq", batches=[batch], correct_bias=True)
    assert ledger.packed and all(row.error < 0.05 for row in ledger.packed)
    assert ("do not reach unused" in caplog.text) == (wiring == "functional")


def test_tied_layers_are_rounded_as_one():
    model = nets.Tied()
    rounded = calibrate(model, {"a": 4, "middle": 4}, torch.randn(40, 12), correct_bias=True)
    assert list(rounded) == ["a", "middle"]
    with rounded.twin(model):
        want = model(torch.ones(2, 12)).detach()
    mq.swap_(model, {"a": 4, "middle": 4}, rounding=rounded)
    assert model.a.qweight is model.b.qweight
    torch.testing.assert_close(model(torch.ones(2, 12)), want)


class Named(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(input=self.a(input=x).relu())


@pytest.mark.parametrize("rounding", ["gptq", mq.rounding.BRECQ(iterations=2, start="minmax")])
def test_layers_that_are_called_by_keyword(rounding: str | mq.rounding.Rounding):
    model, plan = Named(), {"*": Scheme(8, act_bits=8)}
    rounded = calibrate(model, plan, VECTORS, rounding=rounding)
    with rounded.twin(model):
        want = model(VECTORS)
    mq.swap_(model, plan, rounding=rounded)
    torch.testing.assert_close(model(VECTORS), want)
    assert (mq.score(Named(), VECTORS, method="single", bits=[Scheme(8, act_bits=8)]).unary > 0).all()


def test_batches_of_another_make():
    """Three tensors, of which `forward` uses two: no loss is asked for where none is looked at."""
    model, x = mlp(), VECTORS
    found = calibrate(model, {"*": 4}, [(x / 2, x / 2, x)], forward=lambda m, batch: m(batch[0] + batch[1]))
    want = calibrate(model, {"*": 4}, x)
    assert all(torch.equal(found[name].codes, want[name].codes) for name in want)
