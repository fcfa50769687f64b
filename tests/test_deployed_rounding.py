"""What calibrate has found is what is packed, saved, scored and compared."""

import copy

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.measuring.task import Task
from mpqkern.rounding import GPTQ, calibrate
from mpqkern.rounding.layerwise import collect

from . import nets
from .test_calibrate import IMAGES, VECTORS, mlp
from .test_held import everything


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("correct_bias", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_the_swapped_model_computes_what_its_twin_does(act_bits: int | None, correct_bias: bool, fold: bool):
    """Layer by layer within the bound that `verify` derives, and as a whole."""
    model, scheme = nets.resnet(), Scheme(4, act_bits=act_bits)
    if fold:
        mq.fold_batchnorm_(model, IMAGES[0])
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
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


def test_a_new_bias_survives_a_file(tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 5, bias=False))

    torch.manual_seed(0)
    model, x = make(), torch.rand(8, 3, 8, 8)
    mq.swap_(model, {"*": 4}, rounding="gptq", batches=x, correct_bias=True)
    mq.save(model, tmp_path / "model.safetensors")
    again = mq.load(make, tmp_path / "model.safetensors")
    assert torch.equal(again(x), model(x)) and again[0].bias is not None


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


class Watched:
    """Counts what GPTQ is asked for; `stop_at` is the one at which Ctrl-C is pressed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, self.stop_at, real = 0, None, GPTQ.round

        def watched(*args):
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(GPTQ, "round", watched)


def test_rounding_for_scores_goes_on_where_it_stopped(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    model, how, gptq = nets.resnet(), {"rounding": "gptq", "bits": (2, 4)}, Watched(monkeypatch)
    whole, total = mq.score(model, IMAGES, method="roundoff", **how), gptq.count
    gptq.count, gptq.stop_at = 0, 6
    with pytest.raises(KeyboardInterrupt):
        mq.score(model, IMAGES, method="roundoff", bank=tmp_path, **how)
    gptq.count, gptq.stop_at = 0, None
    found = mq.score(model, IMAGES, method="roundoff", bank=tmp_path, progress=True, **how)
    assert gptq.count == total - 5 and (found.unary == whole.unary).all()
    assert "gptq: 100%" in capsys.readouterr().err
    mq.score(model, IMAGES, method="kl", bank=tmp_path, **how)
    assert gptq.count == total - 5  # methods share it


def test_rounding_for_scores_keeps_to_the_time(tmp_path):
    how = {"method": "roundoff", "rounding": "gptq", "bank": tmp_path, "time_limit": 1e-6}
    with pytest.raises(mq.Unfinished, match="time_limit=1e-06 was reached after 1 of 21 evaluations"):
        mq.score(nets.resnet(), IMAGES, **how)


@pytest.mark.parametrize("method", ["ompq", "csmpq", "limpq_lite"])
def test_methods_that_round_nothing_do_not_wait_for_it(method, monkeypatch: pytest.MonkeyPatch):
    options, gptq = {"steps": 1} if method == "limpq_lite" else {}, Watched(monkeypatch)
    found = mq.score(nets.resnet(), IMAGES, method=method, rounding="gptq", **options)
    assert gptq.count == 0
    assert (found.unary == mq.score(nets.resnet(), IMAGES, method=method, **options).unary).all()


def test_codes_of_another_shape_are_not_taken_from_a_bank(tmp_path):
    model, how = mlp(), {"method": "roundoff", "rounding": "gptq", "bank": tmp_path}
    mq.score(model, VECTORS, **how)
    items = tmp_path / "codes" / "items"
    (items / "0" / "0.npz").replace(items / "1" / "0.npz")
    with pytest.raises(ValueError, match="holds no codes for layer '2'; wanted another folder"):
        mq.score(model, VECTORS, **how)


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
