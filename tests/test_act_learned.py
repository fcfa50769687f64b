"""Fixed scales of inputs, learned with the rounding of weights: gradients, what is kept of them, where they end up."""

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern.held import held
from mpqkern.measuring.observers import Mse
from mpqkern.rounding import BRECQ, AdaRound, calibrate
from mpqkern.rounding.adaround import Search
from mpqkern.rounding.twin import rounded_input, saturated

from . import nets
from .test_held import everything

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PLAN = {"*": mq.Scheme(2, act_bits=8)}
METHOD = BRECQ(act_scales=True, iterations=4)


def loud():
    """A layer, inputs of which the largest says nothing of the outputs, and a plan."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 8, generator=draw)
    x[:, 0] = 60 * x[:, 0].sign()
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model[0].weight.data = torch.randn(4, 8, generator=draw)
    model[0].weight.data[:, 0] = 0
    return model, x, {"*": mq.Scheme(8, act_bits=8)}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name].codes, b[name].codes)
        and (a[name].act_scale is None) == (b[name].act_scale is None)
        and (a[name].act_scale is None or torch.equal(a[name].act_scale, b[name].act_scale))
        for name in a
    )


def off(model, rounded, batch):
    with held(model):
        wanted = model(batch)
        with rounded.twin(model):
            return float((model(batch) - wanted).double().square().mean())


@pytest.mark.parametrize("act_bits", [2, 8])
def test_gradients_are_those_with_the_rounding_held(act_bits):
    most, h = 2 ** (act_bits - 1) - 1, 1e-6
    x = torch.randn(64, dtype=torch.float64) * 40
    scale = torch.tensor([60 / most], dtype=torch.float64)
    weight = torch.randn(64, dtype=torch.float64)
    inside = x.abs() < 60
    steps = x / scale
    held_fast = torch.where(inside, steps.round() - steps, 0)  # nothing is rounded where it saturates

    def smooth(x, scale):
        return (((x / scale).clamp(-most, most) + held_fast) * scale * weight).sum()

    a, b = x.float().requires_grad_(), scale.float().requires_grad_()
    by_x, by_scale = torch.autograd.grad((saturated(a, b, act_bits) * weight.float()).sum(), (a, b))
    difference = (smooth(x, scale + h) - smooth(x, scale - h)) / (2 * h)
    assert float(by_scale) == pytest.approx(float(difference), rel=1e-4, abs=1e-4)
    assert inside.any() and not inside.all()
    torch.testing.assert_close(by_x, torch.where(inside, weight, 0).float())
    # beyond the range nothing is held: there it is the slope of rounding itself
    rounding = [(saturated(x[~inside], scale + d, act_bits) * weight[~inside]).sum() for d in (h, -h)]
    (beyond,) = torch.autograd.grad((saturated(x[~inside].float(), b, act_bits) * weight[~inside].float()).sum(), b)
    assert float(beyond) == pytest.approx(float(rounding[0] - rounding[1]) / (2 * h), rel=1e-2)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("group_size", [None, 32])
def test_what_gradients_go_through_is_what_packed_layers_round_to(kind, group_size):
    x, scale = torch.randn(5, 70, 3, 4) if kind == "conv2d" else torch.randn(5, 70), torch.tensor([0.0123])
    scheme = mq.Scheme(4, act_bits=8, group_size=group_size)
    assert torch.equal(saturated(x, scale, 8), rounded_input(x, scheme, kind, scale))
    assert (saturated(x, scale, 8).abs() == 127 * scale).any()


def test_a_learned_scale_leaves_out_what_says_nothing():
    model, x, plan = loud()
    dynamic, first, learned = (
        calibrate(model, plan, x, rounding=AdaRound(act_scales=on, iterations=n))
        for on, n in ((False, 1), (True, 1), (True, 300))
    )
    assert dynamic["0"].act_scale is None and learned["0"].act_scale.shape == (1,)
    assert off(model, learned, x) < 0.85 * min(off(model, first, x), off(model, dynamic, x))


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("rate", [0.1, 30.0])
def test_never_worse_than_either_start(bits, rate):
    model, plan = nets.resnet(), {"*": mq.Scheme(bits, act_bits=8)}
    method = BRECQ(act_scales=True, iterations=20, rate=rate, partition="unit:9", start="minmax")
    dynamic = off(model, calibrate(model, plan, IMAGES, rounding="minmax"), IMAGES)
    found = calibrate(model, plan, IMAGES, rounding=method)
    assert off(model, found, IMAGES) <= dynamic * (1 + 1e-5)


def test_scales_that_lead_nowhere_are_dropped(monkeypatch):
    model, x, plan = loud()
    error = Search.error
    monkeypatch.setattr(Search, "error", lambda self, hard, scales: error(self, hard, scales) + bool(scales))
    found = calibrate(model, plan, x, rounding=AdaRound(act_scales=True, iterations=40))
    assert found["0"].act_scale is None
    monkeypatch.setattr(Search, "error", lambda self, hard, scales: error(self, hard, scales) + (not scales))
    assert calibrate(model, plan, x, rounding=AdaRound(act_scales=True, iterations=40))["0"].act_scale is not None


def test_scales_start_where_errors_of_what_comes_in_are_least(monkeypatch):
    starts, best, seen = {}, Search.best, Mse(7)
    monkeypatch.setattr(Search, "best", lambda self: starts.update(self.scales()) or best(self))
    method = BRECQ(act_scales=True, iterations=1, partition="unit:9")
    calibrate(nets.resnet(), {"*": mq.Scheme(2, act_bits=4)}, list(IMAGES.split(24)), rounding=method)
    seen.update(IMAGES)
    assert sorted(starts) == list(range(7)) and float(starts[0]) == pytest.approx(seen.limit() / 7, rel=1e-5)


def test_what_meets_only_zeros_or_asks_for_no_bits_has_no_scale(monkeypatch):
    model, x, _ = loud()
    model = nn.Sequential(*model, nn.Threshold(1e9, 0), nn.Linear(4, 3), nn.Linear(3, 2))
    seen, best = [], Search.best
    monkeypatch.setattr(Search, "best", lambda self: seen.append(sorted(self.logs)) or best(self))
    plan = {"0": mq.Scheme(4, act_bits=8), "2": mq.Scheme(4, act_bits=8), "3": 4}
    calibrate(model, plan, x, rounding=BRECQ(act_scales=True, iterations=2, partition="unit:9"))
    assert [layer for layers in seen for layer in layers] == [0]


def test_the_same_on_every_run_and_after_one_that_was_stopped(tmp_path):
    model = nets.resnet()
    whole = calibrate(model, PLAN, IMAGES, rounding=METHOD)
    assert any(codes.act_scale is not None for codes in whole.values())
    assert any(codes.act_scale is None for codes in whole.values())
    for _ in range(3):  # of four parts
        with pytest.raises(mq.Unfinished):
            calibrate(model, PLAN, IMAGES, rounding=METHOD, bank=tmp_path, time_limit=1e-9)
    for _ in range(2):  # the second time all are in the bank
        assert same(calibrate(model, PLAN, IMAGES, rounding=METHOD, bank=tmp_path), whole)


def test_a_packed_model_computes_what_was_found_and_keeps_it(tmp_path):
    model, x, plan = loud()
    rounded = calibrate(model, plan, x, rounding=AdaRound(act_scales=True, iterations=40), correct_bias=True)
    with held(model), rounded.twin(model):
        wanted = model(x)
    mq.swap_(model, plan, rounding=rounded)
    assert torch.equal(model[0].act_scale, rounded["0"].act_scale)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    mq.save(model, tmp_path / "model.mpqk")
    again = mq.load(lambda: loud()[0], tmp_path / "model.mpqk")
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and torch.equal(again[0].act_scale, model[0].act_scale)


def test_a_learned_scale_goes_before_one_that_is_remembered():
    model, x, plan = loud()
    mq.swap_(model, plan, keep_float=True)
    model[0].set_act_scale_(torch.tensor([3.0]))
    mq.unswap_(model)
    mq.swap_(model, plan, rounding=AdaRound(act_scales=True, iterations=2), batches=x)
    assert float(model[0].act_scale) < 1


def test_parts_that_stay_dynamic_are_as_without():
    model, x, plan = nets.resnet(), IMAGES, {"*": mq.Scheme(8, act_bits=8)}
    found, without = (
        calibrate(model, plan, x, rounding=BRECQ(act_scales=on, iterations=10, start="minmax")) for on in (True, False)
    )
    assert all(codes.act_scale is None for codes in found.values()) and same(found, without)


def test_hooks_of_a_part_are_those_that_round_and_go_with_it(monkeypatch):
    model, best, extra = nets.resnet(), Search.best, []

    def counted(search):
        extra.append(sum(len(m._forward_pre_hooks) for m in model.modules()) - len(search.soft))
        return best(search)

    monkeypatch.setattr(Search, "best", counted)
    calibrate(model, PLAN, IMAGES, rounding=METHOD)
    assert len(extra) >= 4 and not any(extra)


@pytest.mark.parametrize("place", [(Mse, "update"), (Search, "tried"), (Search, "sampled")])
def test_ctrl_c_leaves_the_model_as_it_was(place, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    model = nets.resnet()
    before = everything(model)
    monkeypatch.setattr(*place, pressed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, PLAN, IMAGES, rounding=METHOD)
    assert everything(model) == before
