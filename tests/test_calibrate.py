"""calibrate: layers in order, each on what it meets; resumable, bounded, and the model as it was."""

import copy

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.measuring.task import Task
from mpqkern.rounding import calibrate, layerwise
from mpqkern.rounding.layerwise import collect
from mpqkern.rounding.statistics import Statistics
from mpqkern.rounding.twin import Twin

from . import nets
from .test_held import everything

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


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("correct_bias", [False, True])
def test_the_swapped_model_computes_what_its_twin_does(act_bits: int | None, correct_bias: bool):
    model, scheme = nets.resnet(), Scheme(4, act_bits=act_bits)
    rounded = calibrate(model, {"*": scheme}, IMAGES, correct_bias=correct_bias)
    x = torch.randn(5, 3, 8, 8)
    model.eval()
    with torch.no_grad():
        before = model(x)
        with rounded.twin(model):
            want = model(x)
        assert torch.equal(model(x), before)
        mq.swap_(model, {"*": scheme}, rounding=rounded)
        got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (before - want).abs().max() > 1e-3
    assert mq.verify(model, x).ok


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


def test_a_new_bias_survives_a_file(tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 5, bias=False))

    torch.manual_seed(0)
    model, x = make(), torch.rand(8, 3, 8, 8)
    mq.swap_(model, {"*": 4}, rounding="gptq", batches=x, correct_bias=True)
    mq.save(model, tmp_path / "model.safetensors")
    again = mq.load(make, tmp_path / "model.safetensors")
    assert torch.equal(again(x), model(x)) and again[0].bias is not None


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


def test_scores_are_measured_with_the_rounding_that_is_deployed():
    model, batches = nets.resnet(), [(x, torch.arange(16) % 5) for x in IMAGES]
    found = {r: mq.score(model, batches, method="kl", rounding=r) for r in ("minmax", "gptq")}
    assert (found["gptq"].unary[:, 0] < found["minmax"].unary[:, 0]).mean() > 0.8
    # one layer alone is the same in scoring and in deployment: before it there is nothing to make up for
    layer = 4
    name = found["gptq"].names[layer]
    with calibrate(model, {name: 2}, batches).twin(model):
        task = Task(model, batches, loss="kl")
        alone = [task.run(b) for b in batches]
    task.prepare()
    losses = torch.cat([task.losses(out, i) for i, out in enumerate(alone)]).detach()
    assert found["gptq"].unary[layer, 0] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_statistics_for_scores_keep_to_the_memory(monkeypatch: pytest.MonkeyPatch):
    model, seen = nets.resnet(), []
    monkeypatch.setattr(
        "mpqkern.scores.variants.collect",
        lambda task, layers, **how: seen.append(layers) or collect(task, layers, **how),
    )
    whole = mq.score(model, IMAGES, method="roundoff", rounding="gptq")
    assert seen == [list(range(len(whole.names)))]
    largest = max(32 * layer.weight_shape[1] ** 2 * 81 for layer in mq.catalog(model))
    parts = mq.score(model, IMAGES, method="roundoff", rounding="gptq", memory=largest)
    assert len(seen) > 3 and (parts.unary == whole.unary).all()
    with pytest.raises(ValueError, match=r"memory=100; wanted at least .* bytes for the statistics of 0"):
        mq.score(model, IMAGES, method="roundoff", rounding="gptq", memory=100)


def test_compare_judges_what_would_be_deployed():
    model, x = nets.resnet().eval(), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        want = model(x)

    def error(other: nn.Module) -> float:
        with torch.no_grad():
            return float((other(x) - want).square().mean())

    found = {
        r: mq.compare(
            model, list(IMAGES), error, [mq.Budget(avg_bits=2.5)], methods=["size"], rounding=r, metric="loss"
        )
        for r in ("minmax", "gptq")
    }
    by_size = [found[r].of("size")[0] for r in ("minmax", "gptq")]
    assert by_size[1].metrics["loss"] < 0.7 * by_size[0].metrics["loss"]
    packed = copy.deepcopy(model)
    mq.swap_(packed, by_size[1].bits[0], rounding="gptq", batches=IMAGES)
    assert error(packed) == pytest.approx(by_size[1].metrics["loss"], rel=1e-4)


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


def test_codes_are_for_the_weights_that_they_were_found_for():
    model = mlp()
    rounded = calibrate(model, {"*": 4}, VECTORS)
    assert repr(rounded).startswith("Rounded(3 layers, GPTQ(")
    with torch.no_grad():
        model[2].weight[0, 0] += 1
    before = everything(model)
    for use in (lambda: rounded.twin(model), lambda: mq.swap_(model, {"*": 4}, rounding=rounded)):
        with pytest.raises(ValueError, match="layer '2' has another weight than it was rounded from"):
            use()
    assert everything(model) == before
    mq.swap_(copy.deepcopy(model), {"0": 4}, rounding=rounded)


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


def test_nothing_to_round():
    assert len(calibrate(mlp(), {"*": None}, VECTORS)) == 0


def test_batches_of_another_make():
    """Three tensors, of which `forward` uses two: no loss is asked for where none is looked at."""
    model, x = mlp(), VECTORS
    found = calibrate(model, {"*": 4}, [(x / 2, x / 2, x)], forward=lambda m, batch: m(batch[0] + batch[1]))
    want = calibrate(model, {"*": 4}, x)
    assert all(torch.equal(found[name].codes, want[name].codes) for name in want)
