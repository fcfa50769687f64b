"""LIMPQ: the training that learns the steps, its bank, and the method as a whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpqkern import Budget, Scheme, Scores, Unfinished, plan, score, solve
from mpqkern.measuring.task import Task
from mpqkern.scores import limpq, lsq
from mpqkern.scores.indicators import from_indicators
from mpqkern.scores.lsq import Supernet

from . import nets
from .reference.small_nets import convnet, mlp, transformer

PAIRS = [Scheme(w, act_bits=a) for w in (2, 4, 8) for a in (2, 4, 8)]
LEVELS = limpq.levels_of(PAIRS)


def run(make: Callable[[], tuple[nn.Module, list]] = convnet, **options) -> Scores:
    torch.manual_seed(1)
    model, batches = make()
    return score(model, batches, **{"method": "limpq", "bits": PAIRS, "steps": 4, **options})


# --- training ---


def test_a_step_adds_up_one_pass_a_width_and_a_mixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, rounded = [], []
    backward, quantize = limpq._backward, lsq.lsq

    def spy(net: Supernet, choice: list[int], *rest) -> None:
        steps = net.steps[0].weight
        before = torch.zeros(3) if steps.grad is None else steps.grad.clone()
        rounded.clear()
        backward(net, choice, *rest)
        passes.append((choice, list(rounded), (steps.grad - before).nonzero().flatten().tolist(), before.any().item()))

    monkeypatch.setattr(limpq, "_backward", spy)
    monkeypatch.setattr(lsq, "lsq", lambda v, s, bits, signed: rounded.append(bits) or quantize(v, s, bits, signed))
    found = run(steps=3)
    assert len(passes) == found.provenance["evaluations"] == 3 * 4
    for level, (choice, _, touched, _) in enumerate(passes[:3]):
        assert choice == [level] * 3 and touched == [level]
    assert [had for *_, had in passes] == [False, True, True, True] * 3
    mixed = [passes[i][0] for i in (3, 7, 11)]
    assert any(len(set(choice)) > 1 for choice in mixed) and mixed[0] != mixed[1]
    for choice, bits, *_ in passes:  # weight and input of a layer have one width
        assert bits == [LEVELS[level].weight for level in choice for _ in range(2)]


def test_an_update_is_momentum_descent_on_clipped_gradients() -> None:
    p, still = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(2))
    sgd = limpq.Sgd([p, still], 0.1, 2, 0.9, 0.01)
    velocity, value = np.zeros(2), np.array([1.0, 2.0])
    for step, rate in enumerate([0.1, (0.1 + 1e-5) / 2]):
        p.grad = torch.tensor([0.5, -7.0])
        sgd.update(step)
        velocity = 0.9 * velocity + [0.5, -1.0] + 0.01 * value
        value = value - rate * velocity
        assert p.detach().numpy() == pytest.approx(value, rel=1e-6) and p.grad is None
    assert still.tolist() == [1.0, 1.0]


def test_loss_is_smoothed_cross_entropy() -> None:
    task = Task(*convnet())
    x, y = task.batches[1]
    wanted = F.cross_entropy(task.model.eval()(x).double(), y, label_smoothing=0.1)
    assert limpq._loss(task, 1, 0.1).item() == pytest.approx(wanted.item())
    task = Task(*transformer())
    x, y = task.batches[0].values()
    y[:, 2] = -100
    wanted = F.cross_entropy(task.model(x).double().flatten(0, 1), y.flatten(), label_smoothing=0.1)
    assert limpq._loss(task, 0, 0.1).item() == pytest.approx(wanted.item())
    y[:] = -100
    assert limpq._loss(task, 0, 0.1).item() == 0.0


def test_training_lowers_the_loss_at_every_width() -> None:
    net = Supernet(Task(*convnet()), LEVELS, first_last=True, init="statistics", train_weights=True)
    sgd = limpq.Sgd(net.trained(), 0.05, 20, 0.9, 0.0)

    def losses() -> list[float]:
        found = []
        for level in range(3):
            net.choose([level] * 3)
            found.append(limpq._loss(net.task, 0, 0.1).item())
        return found

    first = losses()
    for step in range(20):
        for level in range(3):
            limpq._backward(net, [level] * 3, 0, 0.1)
        sgd.update(step)
    assert all(b < 0.95 * a for a, b in zip(first, losses(), strict=True))


def test_seeds_and_options_matter_and_repeat() -> None:
    first = run()
    assert np.array_equal(first.unary, run().unary)
    changes = {"seed": 1, "lr": 0.02, "smoothing": 0.0, "momentum": 0.0, "init": "same", "method": "limpq_lite"}
    for name, value in changes.items():
        assert not np.array_equal(first.unary, run(**{name: value}).unary), name
    bounded = run(step_max=0.01).provenance["indicators"]
    assert max(s for both in bounded.values() for steps in both.values() for s in steps.values()) == 0.01


def test_batches_come_in_a_new_order_each_time_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(limpq, "_backward", lambda net, choice, index, smoothing: seen.append(index))
    model, batches = mlp()
    score(model, batches * 2, method="limpq", bits=(2, 4), steps=18)
    rounds = [seen[i : i + 18 : 3] for i in (0, 18, 36)]
    assert all(sorted(order) == list(range(6)) for order in rounds) and rounds[0] != rounds[1] != rounds[2]


def test_a_loss_that_runs_away_says_so() -> None:
    with pytest.raises(ValueError, match=r"the loss of batch \d became .* wanted a smaller lr"):
        run(make=mlp, lr=1e30, steps=20, loss=lambda output, batch: output.square().sum(1))


# --- bank ---


@pytest.mark.parametrize("method", ["limpq", "limpq_lite"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    monkeypatch.setattr(limpq, "SAVE_EVERY", 2)
    options = {"steps": 7, "method": method}
    whole = run(**options)
    with pytest.raises(Unfinished, match="12 of 28"):
        run(**options, bank=tmp_path, max_evals=9)
    loss, calls = limpq._loss, itertools.count()

    def broken(*args) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(limpq, "_loss", broken)
    with pytest.raises(KeyboardInterrupt):  # in step 5, from step 3 on; the state after step 4 was saved
        run(**options, bank=tmp_path)
    last = run(**options, bank=tmp_path)
    assert next(calls) == 6 + 3 * 4
    assert np.array_equal(whole.unary, last.unary) and last.provenance["indicators"] == whole.provenance["indicators"]
    again = run(**options, bank=tmp_path)
    assert again.provenance["evaluations"] == 0 and np.array_equal(again.unary, whole.unary)


def test_a_bank_serves_every_alpha_and_rounding(tmp_path) -> None:
    made = []
    for options in ({}, {"alpha": 5.0}, {"wired": "forbid"}, {"rounding": "mse"}):
        made.append(run(bank=tmp_path, **options).provenance["evaluations"])
        alone = run(**options)
        assert np.array_equal(run(bank=tmp_path, **options).unary, alone.unary)
    assert made[0] > 0 and not any(made[1:])


def test_other_batches_are_another_training(tmp_path) -> None:
    model, batches = convnet()
    first = score(model, batches, method="limpq", steps=2, bank=tmp_path)
    second = score(model, batches[:2], method="limpq", steps=2, bank=tmp_path)
    assert first.provenance["evaluations"] == second.provenance["evaluations"] == 8


# --- the method ---


@pytest.mark.parametrize("make", [mlp, convnet, transformer])
@pytest.mark.parametrize("method", ["limpq", "limpq_lite"])
def test_steps_shrink_with_width_and_the_model_is_left_alone(make: Callable, method: str) -> None:
    model, batches = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = score(model.train(), batches, method=method, bits=PAIRS, steps=8)
    for both in found.provenance["indicators"].values():
        for steps in both.values():
            assert steps["2"] > steps["4"] > steps["8"] > 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(random, torch.get_rng_state())
    for module in model.modules():
        assert module.training and "forward" not in vars(module) and not module._forward_pre_hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_saved_table_gives_its_steps_back(tmp_path) -> None:
    first = run()
    first.save(tmp_path / "scores.npz")
    kept = Scores.load(tmp_path / "scores.npz").provenance["indicators"]
    assert kept == first.provenance["indicators"] and len(kept) == 3
    w, a = ({name: both[kind] for name, both in kept.items()} for kind in "wa")
    assert np.array_equal(from_indicators(first.layers, w, a, schemes=first.schemes).unary, first.unary)
    other = from_indicators(first.layers, w, a, schemes=first.schemes, alpha=1.0).unary
    assert np.array_equal(other, run(alpha=1.0).unary) and not np.array_equal(other, first.unary)


def test_weights_alone_leave_inputs_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    signs, quantize = [], lsq.lsq
    monkeypatch.setattr(lsq, "lsq", lambda v, s, bits, signed: signs.append(signed) or quantize(v, s, bits, signed))
    found = run(bits=(2, 4, 8, None))
    assert signs == [True] * (4 * 4 * 3)  # steps, passes, layers
    steps = found.provenance["indicators"]["3"]
    assert steps["a"] == {} and found.unary[1].tolist() == [*(2 * steps["w"][b] for b in "248"), 0.0]


def test_first_and_last_are_narrowed_last() -> None:
    found = run(bits=(8, 2, 4))
    ends = [found.names[0], found.names[-1]]
    assert found.provenance["without_steps"] == ends and ends[0] == "0"
    bits = sum(layer.params * (8 if layer.name in ends else 2) for layer in found.layers)
    got = solve(found, Budget(bytes=bits // 8, count="nominal"))
    assert list(got.bits.values()) == [8, 2, 2, 2, 8]
    assert run(first_last=False).provenance["without_steps"] == []


def test_a_layer_that_is_not_reached_has_no_steps() -> None:
    model, batches = mlp()
    model.add_module("spare", nn.Linear(3, 3))
    found = score(model, batches, method="limpq", steps=2, forward=lambda model, batch: model[:7](batch))
    assert found.provenance["without_steps"] == ["0", "6", "spare"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0; wanted a whole number above 0"),
        ({"lr": 0.0}, "lr=0.0; wanted a number above 0"),
        ({"smoothing": 1.0}, "smoothing=1.0; wanted at least 0 and below 1"),
        ({"init": "zero"}, "init='zero'; wanted 'statistics' or 'same'"),
        ({"step_max": 0.0}, "step_max=0.0; wanted None or a number above 1e-05"),
        ({"wired": "keep"}, "wired='keep'; wanted 'repair' or 'forbid'"),
        ({"bits": (1, 2)}, "bits=w1, w2; wanted widths of 2 bits or more"),
        ({"layers": ["0"]}, "first_last=True: no layer is left to learn steps for"),
        ({"epochs": 3, "method": "limpq_lite"}, "epochs=3 is no option of method 'limpq_lite'"),
    ],
)
def test_errors_say_what_is_wanted(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        run(**options)
    assert message in str(caught.value)


def test_plan_counts_what_is_done() -> None:
    model, batches = convnet()
    options = {"bits": PAIRS, "steps": 6}
    found = plan(model, batches, method="limpq_lite", **options)
    assert found.evaluations == 24 and found.forwards == 24.0  # 3 batches, and a backward pass counts twice
    assert plan(model, batches, method="limpq", **options).bytes > found.bytes > 0
    assert score(model, batches, method="limpq_lite", **options).provenance["evaluations"] == 24


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part", "its forward"])
def test_a_compiled_model_is_trained_as_it_was_written(how: str) -> None:
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    wanted = score(nets.resnet().eval(), [batch], method="limpq", steps=2).unary
    model = nets.resnet().eval()
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a part":
        model[2] = torch.compile(model[2], backend="eager")
    else:
        model[2].forward = torch.compile(model[2].forward, backend="eager")
    model(batch[0])
    assert np.array_equal(score(model, [batch], method="limpq", steps=2).unary, wanted)


def test_a_forward_that_a_copy_would_share_is_refused() -> None:
    model = nets.resnet()
    own = model[2].forward
    model[2].forward = lambda x: own(x)
    with pytest.raises(ValueError, match="module '2' has a function as its forward, which a copy to train would share"):
        score(model, torch.randn(4, 3, 8, 8), method="limpq", steps=1)
