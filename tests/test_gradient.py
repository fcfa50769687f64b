"""Gradient scores: against closed forms, finite differences and plain backward passes; the model is left as found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.rounding.twin import rounded, rounded_input
from mpqkern.scores.gradient import _layout

BITS = (2, 4, 8)


def mse(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (output - batch[1]).double().square().flatten(1).sum(1) / 2


def line() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4))


class Tied(nn.Module):
    """One module called twice, and another one that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.a(x).tanh()).tanh()).tanh())


class Tokens(nn.Module):
    """Attention over [length, samples, features]; the first layer sees positions that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 1, 3))
        self.embed = nn.Linear(3, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x.transpose(0, 1) + self.embed(self.positions)).transpose(0, 1))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 9, 3),
    )  # fmt: skip


def case(name: str, samples: int = 5) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model and two batches of unequal sizes."""
    model = {"conv": conv_net, "tied": Tied, "tokens": Tokens}[name]()
    shape, places = {"conv": ((2, 5, 5), ()), "tied": ((6,), ()), "tokens": ((4, 8), (4,))}[name]
    x, y = torch.randn(samples + 3, *shape), torch.randint(0, 3, (samples + 3, *places))
    return model.eval(), [(x[:samples], y[:samples]), (x[samples:], y[samples:])]


def slopes(
    model: nn.Module, layer: mq.Layer, change: Tensor, value: Callable[[Tensor, Tensor], Tensor], batch: tuple
) -> Tensor:
    """d value(output, labels) / d weight along `change`, by a backward pass for each sample."""
    weight, values = model.get_submodule(layer.name).weight, value(model(batch[0]), batch[1])
    grads = [torch.autograd.grad(v, weight, retain_graph=True)[0] for v in values]
    return torch.stack([(g.double() * change.double()).sum() for g in grads])


def product(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    return F.conv2d(x, weight, module.bias, module.stride, module.padding, groups=module.groups)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    values = -F.cross_entropy(logits.double().movedim(-1, 1), labels, reduction="none", ignore_index=-1)
    return values if labels.dim() == 1 else values.sum(1) / (labels >= 0).sum(1)


# ---- fisher --------------------------------------------------------------------------------------------


def test_fisher_of_a_linear_model() -> None:
    model, x, y = line(), torch.randn(7, 6), torch.randn(7, 4)
    found = mq.score(model, [(x[:4], y[:4]), (x[4:], y[4:])], method="fisher", bits=(*BITS, None), loss=mse)
    weight = model[0].weight.detach()
    for b, bits in enumerate(BITS):
        change = (rounded(weight, Scheme(bits)) - weight).double()
        gradient = (model(x) - y).double()  # of half the squared error
        want = (gradient * (x.double() @ change.T)).square().sum() / 7
        assert found.unary[0, b] == pytest.approx(float(want.detach()), rel=1e-4)
    assert found.unary[0, 3] == 0


@pytest.mark.parametrize("name", ["conv", "tied", "tokens"])
def test_fisher_takes_each_output_by_itself(name: str) -> None:
    model, batches = case(name)
    found = mq.score(model, batches, method="fisher", bits=(2,))
    for i, layer in enumerate(found.layers):
        module, total = model.get_submodule(layer.name), 0.0
        twins = [m for m in model.modules() if getattr(m, "weight", None) is module.weight]
        packed = rounded(module.weight.detach(), Scheme(2))
        for x, y in batches:
            seen: list[tuple[nn.Module, Tensor, Tensor]] = []

            def keep(m: nn.Module, args: tuple, out: Tensor, seen: list = seen) -> Tensor:
                seen.append((m, args[0].detach().clone(), out))
                return out.clone()  # for the model to go on with, as it writes in place

            handles = [m.register_forward_hook(keep) for m in twins]
            loss = -log_likelihood(model(x), y).sum()
            for handle in handles:
                handle.remove()
            grads = torch.autograd.grad(loss, [out for _, _, out in seen])
            for (m, args, out), grad in zip(seen, grads, strict=True):
                total += float((grad * (product(m, packed, args) - out).detach()).square().sum())
        assert found.unary[i, 0] == pytest.approx(total / 8, rel=1e-3), layer.name


def test_fisher_sees_rounded_activations() -> None:
    model, x, y = line(), torch.randn(7, 6), torch.randn(7, 4)
    schemes = [Scheme(8), Scheme(8, act_bits=3)]
    found = mq.score(model, (x, y), method="fisher", bits=schemes, loss=mse)
    packed = rounded(model[0].weight.detach(), schemes[1])
    change = F.linear(rounded_input(x, schemes[1], "linear"), packed, model[0].bias) - model(x)
    want = ((model(x) - y) * change).square().sum() / 7
    assert found.unary[0, 1] == pytest.approx(float(want.detach()), rel=1e-4) and found.unary[0, 1] > found.unary[0, 0]


# ---- mpqco ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "tied", "tokens"])
@pytest.mark.parametrize("of", ["probability", "logit"])
def test_mpqco_is_the_squared_slope_of_each_sample(name: str, of: str) -> None:
    # four samples of four tokens: sizes alone do not tell which axis is which
    model, batches = case(name, samples=4)
    if name == "tokens":
        batches[0][1][1, 2:] = -1  # padding

    def logit(logits: Tensor, labels: Tensor) -> Tensor:
        own = logits.double().gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).abs().log()
        return own if labels.dim() == 1 else (own * (labels >= 0)).sum(1) / (labels >= 0).sum(1)

    found = mq.score(model, batches, method="mpqco", bits=BITS, of=of)
    for i, layer in enumerate(found.layers):
        weight = model.get_submodule(layer.name).weight.detach()
        for b, bits in enumerate(BITS):
            change = rounded(weight, Scheme(bits)) - weight
            value = log_likelihood if of == "probability" else logit
            want = sum(slopes(model, layer, change, value, batch).square().sum() for batch in batches) / (2 * 7)
            assert found.unary[i, b] == pytest.approx(float(want), rel=2e-3), (layer.name, bits)


def test_samples_are_told_apart_by_gradients() -> None:
    for shape, axis in (((3, 5), 0), ((6, 5), None), ((3, 3, 2), 1), ((4, 3, 2), 1), ((2, 5, 3), 2)):
        output = torch.zeros(shape)
        if axis is None:  # two rows a sample
            output[:2] = 1
            want = torch.arange(30.0).view(3, 10)
        else:
            output.select(axis, 0).fill_(1)
            want = torch.arange(float(output.numel())).view(shape).movedim(axis, 0).reshape(3, -1)
        by_sample = _layout(output, 3)
        assert by_sample is not None and torch.equal(by_sample(torch.arange(float(output.numel())).view(shape)), want)
    assert _layout(torch.ones(3, 5), 3) is None and _layout(torch.ones(4, 5), 3) is None


def test_mpqco_of_a_linear_model() -> None:
    model, x, y = line(), torch.randn(9, 6), torch.randint(0, 4, (9,))
    found = mq.score(model, (x, y), method="mpqco", bits=(2,))
    change = (rounded(model[0].weight.detach(), Scheme(2)) - model[0].weight.detach()).double()
    z, chances = x.double() @ change.T, model(x).detach().double().softmax(1)
    slope = z.gather(1, y[:, None])[:, 0] - (chances * z).sum(1)  # of log softmax
    assert found.unary[0, 0] == pytest.approx(float(slope.square().mean() / 2), rel=1e-4)


@pytest.mark.parametrize("method", ["mpqco", "fisher"])
def test_without_labels_the_divergence_is_predicted(method: str) -> None:
    model, x = line(), torch.randn(3000, 6)
    found = mq.score(model, x, method=method, bits=(8,), seed=1)
    again = [mq.score(model, x, method=method, bits=(8,), seed=seed).unary for seed in (1, 2)]
    assert np.array_equal(found.unary, again[0]) and not np.array_equal(found.unary, again[1])
    weight = model[0].weight.detach()
    z = F.linear(x, rounded(weight, Scheme(8)) - weight).double()
    chances = model(x).detach().double().softmax(1)
    # one layer, so the Fisher information is known: the covariance of labels, along z
    spread = (chances * z.square()).sum(1) - (chances * z).sum(1).square()
    diagonal = (chances * (1 - chances) * z.square()).sum(1)
    want = spread.mean() / 2 if method == "mpqco" else diagonal.mean()
    assert found.unary[0, 0] == pytest.approx(float(want), rel=0.1)  # labels are drawn: 3000 of them


# ---- delta_loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["float", "quantized"])
def test_delta_loss_against_finite_differences(at: str) -> None:
    model, x, y = line(), torch.randn(7, 6), torch.randn(7, 4)
    found = mq.score(model, (x, y), method="delta_loss", bits=(2, 4), loss=mse, at=at)
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    for b, bits in enumerate((2, 4)):
        packed = rounded(model[0].weight.detach(), Scheme(bits)).double()
        base, total, step = weight if at == "float" else packed, 0.0, 1e-6
        for i in range(4):
            for j in range(6):
                moved = [base.clone(), base.clone()]
                moved[0][i, j] += step
                moved[1][i, j] -= step
                up, down = ((F.linear(x.double(), w, bias) - y.double()).square().sum(1).mean() / 2 for w in moved)
                total += abs(float((up - down) / (2 * step) * (packed - weight)[i, j]))
        assert found.unary[0, b] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", ["conv", "tied", "tokens"])
def test_delta_loss_has_all_layers_rounded(name: str) -> None:
    model, batches = case(name)
    found = mq.score(model, batches, method="delta_loss", bits=(None, 2, 4))
    assert not found.unary[:, 0].any()
    for b, bits in ((1, 2), (2, 4)):
        other = copy.deepcopy(model)
        weights = [other.get_submodule(layer.name).weight for layer in found.layers]
        before = [w.detach().clone() for w in weights]
        for w in weights:
            w.data = rounded(w.detach(), Scheme(bits))
        want = np.zeros(len(weights))
        for x, y in batches:
            grads = torch.autograd.grad(-log_likelihood(other(x), y).mean(), weights)
            parts = [
                float((g * (w.detach() - w0)).abs().sum()) for g, w, w0 in zip(grads, weights, before, strict=True)
            ]
            want += np.array(parts) * len(x) / 8
        assert found.unary[:, b] == pytest.approx(want, rel=1e-3)


def test_delta_loss_of_rounded_activations() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    x, y, scheme = torch.randn(7, 6), torch.randn(7, 4), Scheme(4, act_bits=4)
    found = mq.score(model, (x, y), method="delta_loss", bits=[scheme], loss=mse)
    first, second = (rounded(m.weight.detach(), scheme).double() for m in model)
    xq = rounded_input(x, scheme, "linear").double()
    hidden = xq @ first.T
    hq = rounded_input(hidden.float(), scheme, "linear").double()
    out = (hq @ second.T - y.double()) / 7
    back = out @ second  # rounding is passed straight through
    moved = [w - m.weight.detach().double() for w, m in zip((first, second), model, strict=True)]
    want = [
        ((back.T @ xq) * moved[0]).abs().sum() + ((back @ first) * (xq - x)).abs().sum(),
        ((out.T @ hq) * moved[1]).abs().sum() + (back * (hq - hidden)).abs().sum(),
    ]
    assert found.unary[:, 0] == pytest.approx([float(w) for w in want], rel=1e-4)


def test_delta_loss_needs_a_slope() -> None:
    model, x = line(), torch.randn(7, 6)
    with pytest.raises(ValueError, match="flat there"):
        mq.score(model, x, method="delta_loss", at="float")
    assert (mq.score(model, x, method="delta_loss").unary[0, :2] > 0).all()


# ---- all -----------------------------------------------------------------------------------------------

METHODS = ["fisher", "mpqco", "delta_loss", "hawq"]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_found(method: str) -> None:
    model, batches = case("conv")
    model.train()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()

    def fails(output: Tensor, batch: tuple) -> Tensor:
        raise ArithmeticError

    mq.score(model, batches, method=method, bits=(2, Scheme(4, act_bits=8)))
    with pytest.raises(ArithmeticError):
        mq.score(model, batches, method=method, loss=fails)
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 7
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] + [True] * 3
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_frozen_models_score_the_same(method: str) -> None:
    model, batches = case("tied")
    want = mq.score(model, batches, method=method).unary
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert np.array_equal(mq.score(model, batches, method=method).unary, want)


@pytest.mark.parametrize("method", ["fisher", "mpqco"])
def test_what_is_written_to_afterwards(method: str) -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head, self.last = nn.Linear(6, 6), nn.Linear(6, 3), 1.0

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            out = self.head(hidden)
            hidden.mul_(self.last)
            return out

    model, x, y = Overwriting(), torch.randn(5, 6), torch.arange(5) % 3
    want = mq.score(model, (x, y), method=method).unary
    model.last = 0.0
    assert np.array_equal(mq.score(model, (x, y), method=method).unary, want)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on(method: str, tmp_path: Path) -> None:
    model, batches = case("conv")
    want = mq.score(model, batches, method=method, seed=3)
    with pytest.raises(mq.Unfinished):
        mq.score(model, batches, method=method, seed=3, bank=tmp_path, max_evals=1)
    found = mq.score(model, batches, method=method, seed=3, bank=tmp_path)
    assert np.array_equal(found.unary, want.unary)
    assert found.provenance["evaluations"] == want.provenance["evaluations"] - 1


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_without_gradient_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="no gradient"):
        mq.score(line(), torch.randn(4, 6), method=method, loss=lambda out, batch: torch.zeros(4))


def test_plans_count_what_is_done() -> None:
    model, batches = case("conv")
    for method in ("fisher", "mpqco", "delta_loss"):
        done = mq.score(model, batches, method=method, bits=(2, 4, None)).provenance["evaluations"]
        work = mq.plan(model, batches, method=method, bits=(2, 4, None))
        assert work.evaluations == done and work.bytes > 0 and work.forwards > 0
