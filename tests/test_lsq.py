"""Learned steps: the quantizer's gradients, and the copy of a model that computes at all widths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mpqkern import Scheme
from mpqkern.measuring.task import Task
from mpqkern.scores import limpq, lsq
from mpqkern.scores.lsq import Level, Supernet

from .reference.small_nets import convnet, mlp, transformer

LEVELS = [Level(8, 8), Level(4, 4), Level(2, 2)]


def supernet(make: Callable[[], tuple[nn.Module, list]], **options) -> Supernet:
    task = Task(*make())
    task.prepare()
    return Supernet(task, LEVELS, **{"first_last": True, "init": "statistics", "train_weights": True, **options})


# --- the quantizer ---


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (2, False), (4, True), (8, False)])
def test_step_gradient_is_that_of_the_surrogate(bits: int, signed: bool) -> None:
    """Rounding replaced by the constant it added, s (clamp(v / s) + residue), and that by finite differences."""
    low, high = lsq.limits(bits, signed)
    values, gradient = torch.randn(500).double() * high, torch.randn(500).double()
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    out = lsq.lsq(values, step, bits, signed)
    assert torch.equal(out, (values / step).round().clamp(low, high) * step)
    out.backward(gradient)
    codes = (values / step.detach()).clamp(low, high)
    residue = codes.round() - codes

    def surrogate(s: float) -> float:
        return float((gradient * s * ((values / s).clamp(low, high) + residue)).sum())

    slope = (surrogate(0.7 + 1e-7) - surrogate(0.7 - 1e-7)) / 2e-7
    assert float(step.grad) == pytest.approx(slope / math.sqrt(high * 500), rel=1e-4)


def test_value_gradient_passes_inside_the_range_only() -> None:
    values = torch.tensor([-2.1, -1.9, 0.3, 0.9, 1.1], requires_grad=True)
    lsq.lsq(values, torch.tensor(1.0), 2, True).sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_half_precision_is_rounded_in_single() -> None:
    values = torch.arange(1.0, 2.0, 1 / 128).bfloat16()
    step = torch.tensor(0.0123, dtype=torch.float64)
    wanted = ((values.float() / step).clamp(0, 255).round() * step).bfloat16()
    assert torch.equal(lsq.lsq(values, step, 8, False), wanted)


def test_steps_begin_with_the_statistics_of_weights_and_first_inputs() -> None:
    net = supernet(mlp)
    net.choose([0, 0])
    with torch.no_grad():
        net.task.run(net.task.batches[0])
        x = net.model[:2](net.task.batches[0])  # the first layer is in float
    steps, weight = net.steps[0], net.task.modules[1][0].weight.detach().double()
    mean, sigma = weight.mean(), weight.std(correction=0)
    reach = float(max((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()))
    assert steps.weight.tolist() == pytest.approx([reach / 128, reach / 8, reach / 2])
    assert steps.act[0].item() == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(255))
    assert steps.seen.tolist() == [True, False, False] and net.indicators() == {}
    same = supernet(mlp, init="same").steps[0]
    assert same.weight.tolist() == same.act.tolist() == [0.1 / 8, 0.1 / 4, 0.1 / 2]


# --- the model at all widths ---


def test_first_and_last_layer_stay_in_float() -> None:
    both = [supernet(transformer, first_last=on) for on in (True, False)]
    names = [[net.task.layers[layer].name for layer in net.layers] for net in both]
    assert names == [["out", "up", "down"], ["qkv", "out", "up", "down", "head"]]
    task = Task(*mlp(), layers=["2", "6"])
    net = Supernet(task, LEVELS, first_last=True, init="same", train_weights=True)
    assert [task.layers[layer].name for layer in net.layers] == ["2"]  # it is not the model's first


def test_inputs_below_zero_get_a_signed_range() -> None:
    assert all(steps.signed for steps in supernet(transformer, first_last=False).steps)
    assert [steps.signed for steps in supernet(mlp, first_last=False).steps] == [True, False, False, False]


def test_layers_compute_with_rounded_weights_and_inputs() -> None:
    net = supernet(convnet)
    net.choose([2, 1, 0])
    seen = {}
    conv = net.model[3]
    conv.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad():
        net.task.run(net.task.batches[0])
        steps = net.steps[0]
        x, w = lsq.lsq(seen["x"], steps.act[2], 2, False), lsq.lsq(conv.weight, steps.weight[2], 2, True)
    assert len(w.unique()) <= 4 and len(x.unique()) <= 4
    assert torch.equal(seen["y"], nn.functional.conv2d(x, w, None, 1, 1))


def test_each_width_has_its_batchnorm() -> None:
    task = Task(*convnet())
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    net = Supernet(task, LEVELS, first_last=True, init="statistics", train_weights=True)
    # the norm behind the stem, which stays in float, has a single state
    assert len(net.norms) == 3 and "forward" not in vars(net.model[1]) and net.model[1].training
    for level in (0, 2):
        limpq._backward(net, [level] * 3, 0, 0.1)
    eight, four, two = (norm.running_mean for norm in net.norms[1].each)
    assert not torch.equal(eight, two) and torch.equal(four, before["7.running_mean"])
    assert net.norms[1].each[0].weight.grad.any() and net.norms[1].each[1].weight.grad is None
    net.choose([0, 1, 2])
    assert [norms.level for norms in net.norms] == [0, 1, 2]
    after = task.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_frozen_weights_leave_steps_and_batchnorms_to_train() -> None:
    lite, whole = supernet(convnet, train_weights=False), supernet(convnet)
    parts = [{n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad} for net in (lite, whole)]
    assert parts == [{"steps", "norms"}, {"steps", "norms", "model"}]
    assert not lite.model[1].training and all(norm.training for norm in lite.norms[0].each)


def test_layers_that_share_a_weight_share_steps() -> None:
    model, batches = mlp()
    model[4].weight = model[2].weight
    net = Supernet(Task(model, batches), LEVELS, first_last=True, init="same", train_weights=True)
    assert len(net.layers) == 1 and net.model[4].weight is net.model[2].weight is not model[2].weight
    net.choose([2])
    seen = []
    net.steps[0].round_weight = lambda weight: seen.append(weight) or weight
    net.task.run(batches[0])
    assert len(seen) == 2


def test_steps_stay_in_bounds() -> None:
    net = supernet(mlp)
    net.steps[0].weight.data[0], net.steps[1].act.data[1] = -3.0, 3.0
    net.bound_steps(None)
    assert net.steps[0].weight[0] == lsq.SMALLEST and net.steps[1].act[1] == 3.0
    net.bound_steps(1.0)
    assert net.steps[1].act[1] == 1.0


def test_widths_of_weights_and_inputs_go_down_side_by_side() -> None:
    pairs = [Scheme(w, act_bits=a) for w in (2, 3, 4, 5, 6) for a in (4, 8)]
    assert limpq.levels_of(pairs) == [Level(6, 8), Level(5, 8), Level(4, 8), Level(3, 4), Level(2, 4)]
    assert limpq.levels_of([None, Scheme(4), Scheme(2)]) == [Level(4, None), Level(2, None)]
