"""OMPQ: the metric against its definition in feature space, the factors against their formulas, and the search."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.models import ResNet8
from mpqkern import Budget, Scheme, Unfinished, score, solve
from mpqkern.scores.importance import decayed
from mpqkern.scores.ompq import orm

BITS = (2, 3, 4, 8)


class Spread(nn.Module):
    """Layers beside each other, all with the same input, so that their features are plain to see."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


def exact(*widths: int) -> tuple[Spread, Tensor]:
    """Small whole numbers and 16 samples: fp32 makes no error in means and Grams."""
    model = Spread(*widths)
    for parameter in model.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape).float()
    return model, torch.randint(-3, 4, (16, 6)).float()


def features(model: Spread, x: Tensor) -> list[Tensor]:
    return [layer(x).detach().double() for layer in model.layers]


def centred(feature: Tensor) -> Tensor:
    return feature - feature.mean(0)


def chain(dropout: float = 0.0) -> nn.Sequential:
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


# --- the metric ---


@pytest.mark.parametrize("center", [True, False])
def test_orm_is_its_definition_in_feature_space(center: bool) -> None:
    model, x = exact(5, 3, 40, 1)
    wanted = np.eye(4)
    rows = [centred(f) if center else f for f in features(model, x)]
    for i, j in itertools.permutations(range(4), 2):
        own = (rows[i].T @ rows[i]).norm() * (rows[j].T @ rows[j]).norm()
        wanted[i, j] = (rows[j].T @ rows[i]).square().sum() / own
    got = orm(model, x, center=center)
    for dtype, close in ((torch.float32, 1e-12), (torch.bfloat16, 0.05)):
        np.testing.assert_allclose(orm(model.to(dtype), x.to(dtype), center=center), wanted, rtol=close)
    assert (got == got.T).all() and (got.diagonal() == 1).all() and got.min() >= 0 and got.max() <= 1
    assert got[0, 1] < 0.999


def test_centred_is_cka_of_doubly_centred_grams() -> None:
    model, x = exact(5, 3)
    middle = torch.eye(16).double() - 1 / 16
    a, b = (middle @ f @ f.T @ middle for f in features(model, x))
    assert orm(model, x)[0, 1] == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-12)


def test_debiased_is_the_unbiased_estimate_of_hsic() -> None:
    model, x = exact(5, 3)

    def hsic(k: Tensor, m: Tensor) -> float:
        """Song et al. 2012, eq. 5."""
        n = len(k)
        k, m = (g - g.diag().diag() for g in (k, m))
        last = 2 / (n - 2) * (k @ m).sum()
        return float((k @ m).trace() + k.sum() * m.sum() / (n - 1) / (n - 2) - last) / (n * (n - 3))

    a, b = (f @ f.T for f in features(model, x))
    wanted = hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5
    assert orm(model, x, debiased=True)[0, 1] == pytest.approx(wanted, rel=1e-10)
    noise = Spread(5, 3)
    noise.forward = lambda x: [layer(part) for layer, part in zip(noise.layers, x.split(6, dim=1), strict=True)]
    unrelated = [torch.randn(5, 12) for _ in range(40)]
    assert abs(orm(noise, unrelated, debiased=True)[0, 1]) < 0.1 < orm(noise, unrelated)[0, 1]


def test_turned_scaled_and_reordered_features_are_the_same() -> None:
    model, x = Spread(5, 5, 4), torch.randn(16, 6)
    turn, _ = torch.linalg.qr(torch.randn(5, 5))
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(model.layers[1], name).copy_(3 * turn @ getattr(model.layers[0], name))
    for options in ({}, {"center": False}, {"debiased": True}):
        got = orm(model, x, **options)
        assert got[0, 1] == pytest.approx(1, abs=1e-6) and got[0, 2] == pytest.approx(got[1, 2], abs=1e-6)
        np.testing.assert_allclose(orm(model, x[torch.randperm(16)], **options), got, atol=1e-6)
        assert got[0, 2] < 0.99


def test_layers_called_twice_have_both_outputs_side_by_side() -> None:
    model, x = exact(5, 3)
    model.forward = lambda x: (model.layers[0](x), model.layers[1](x), model.layers[0](x.flip(1)))
    both = torch.cat([features(model, x)[0], features(model, x.flip(1))[0]], dim=1)
    a, b = centred(both), centred(features(model, x)[1])
    wanted = (b.T @ a).square().sum() / (a.T @ a).norm() / (b.T @ b).norm()
    assert orm(model, x)[0, 1] == pytest.approx(float(wanted), rel=1e-12)


def test_batches_are_averaged_by_their_samples() -> None:
    model, x = chain(), torch.randn(24, 6)
    parts = [orm(model, x[:16]), orm(model, x[16:])]
    np.testing.assert_allclose(orm(model, [x[:16], x[16:]]), (2 * parts[0] + parts[1]) / 3, rtol=1e-12)


@pytest.mark.parametrize("samples", [4, 30])
def test_features_without_information_give_numbers(samples: int, caplog: pytest.LogCaptureFixture) -> None:
    model = Spread(5, 3, 4)
    with torch.no_grad():
        model.layers[1].weight.zero_()
        model.layers[1].bias.fill_(0.1)  # the mean of 30 such numbers is not 0.1 in fp32
    got = orm(model, torch.randn(samples, 6))
    np.testing.assert_array_equal(got[1], [0, 1, 0])
    assert got[0, 2] > 0 and "layers.1 resemble no other layer" in caplog.text


# --- the factors ---


def test_theta_is_finite_where_it_would_underflow() -> None:
    gamma = np.array([15.0, 17.0, 15.5, 16.2])
    assert (np.exp(-100 * gamma) == 0).all()
    got = decayed(gamma, 100.0)
    assert got.max() == 1 and np.isfinite(got).all() and got[2] == pytest.approx(np.exp(-50))
    np.testing.assert_allclose(decayed(gamma, 0.3), np.exp(-0.3 * gamma) / np.exp(-0.3 * 15), rtol=1e-12)
    assert decayed(gamma, None).min() == pytest.approx(np.exp(-1))
    assert (decayed(np.full(3, 7.0), None) == 1).all()


def test_importance_follows_the_order_of_the_calls() -> None:
    model = Spread(5, 3, 4)
    model.forward = lambda x: [model.layers[i](x) for i in (2, 0, 1)]
    x = torch.randn(12, 6)
    gamma = orm(model, x)[[2, 0, 1]].sum(1) - 1
    theta = np.exp(-2 * (gamma - gamma.min()))
    later = np.array([theta.mean(), theta[1:].mean(), theta[2]])
    for options, wanted in (({}, later), ({"later": False}, theta)):
        got = score(model, x, method="ompq", bits=BITS, beta=2.0, **options)
        factors = (wanted / wanted.max())[[1, 2, 0]]
        np.testing.assert_allclose(got.unary, np.outer(factors, [6, 5, 4, 0]), rtol=1e-12)
        assert got.provenance["order"] == ["layers.2", "layers.0", "layers.1"]
        np.testing.assert_allclose(got.provenance["gamma"], gamma, rtol=1e-12)
    convex = score(model, x, method="ompq", bits=BITS, beta=2.0, objective="convex")
    np.testing.assert_allclose(convex.unary, np.outer((later / later.max())[[1, 2, 0]], 0.25 ** np.array(BITS) - 4**-8))


@pytest.mark.parametrize("decrease", ["exp", "log", "linear", "cubic", "negexp"])
def test_every_map_falls_from_one_to_above_zero(decrease: str) -> None:
    got = score(chain(), torch.randn(20, 6), method="ompq", decrease=decrease, later=False).provenance
    order = np.argsort(got["gamma"])
    factors = np.array(got["importance"])[order]
    assert factors[0] == 1 and (np.diff(factors) < 0).all() and factors[-1] > 0


# --- as a method ---


def test_modes_do_not_matter_and_the_model_is_left_as_found() -> None:
    model, x = chain(dropout=0.5), [torch.randn(16, 6), torch.randn(16, 6)]
    model(x[0])
    wanted = score(model.eval(), x, method="ompq").unary
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    for taps in ("layer", "block"):
        got = score(model, x, method="ompq", taps=taps)
        assert np.array_equal(got.unary, wanted) == (taps == "layer")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_stopped_run_goes_on_from_its_bank(tmp_path) -> None:
    model, x = ResNet8(width=4), list(torch.randn(5, 8, 1, 8, 8))
    wanted = score(model, x, method="ompq", taps="block")
    for _ in range(2):
        with pytest.raises(Unfinished, match="max_evals=2"):
            score(model, x, method="ompq", taps="block", bank=tmp_path, max_evals=2)
    got = score(model, x, method="ompq", taps="block", bank=tmp_path)
    assert got.provenance["evaluations"] == 1 and np.array_equal(got.unary, wanted.unary)
    more = score(model, [*x, x[0] + 1], method="ompq", taps="block", bank=tmp_path)
    assert more.provenance["evaluations"] == 1 and not np.array_equal(more.unary, wanted.unary)


def test_a_batch_that_comes_twice_counts_twice() -> None:
    model, a, b = chain(), torch.randn(16, 6), torch.randn(16, 6)
    got = score(model, [a, a, b], method="ompq").provenance["gamma"]
    parts = [np.array(score(model, x, method="ompq").provenance["gamma"]) for x in (a, b)]
    np.testing.assert_allclose(got, (2 * parts[0] + parts[1]) / 3, rtol=1e-12)


@pytest.mark.parametrize("beta", [None, 100.0, 1e6])
def test_the_published_search(beta: float | None) -> None:
    """The LP raises widths in order of c / params, at most one ends in between, and rounding to nearest may not fit."""
    schemes = [Scheme(b, act_bits=8) for b in BITS]
    scores = score(ResNet8(width=4), torch.randn(16, 1, 8, 8), method="ompq", bits=schemes, beta=beta, taps="block")
    factors = np.array(scores.provenance["importance"])
    assert np.isfinite(factors).all() and factors.max() / factors.min() > 1.01
    got = solve(scores, Budget(avg_bits=4), relaxation="lp", rounding="nearest")
    params = np.array([layer.params for layer in scores.layers])
    widths, rest = np.full(len(params), 2.0), 2.0 * params.sum()
    for unit in np.argsort(-factors / params):
        widths[unit] += min(6.0, rest / params[unit])
        rest -= (widths[unit] - 2) * params[unit]
    np.testing.assert_allclose(list(got.relaxed.values()), widths, atol=1e-9)
    exact = solve(scores, Budget(avg_bits=4))
    assert exact.costs["avg_bits"] <= 4 and exact.objective >= got.bound - 1e-9
    assert {s.act_bits for s in exact.schemes.values()} == {8}


def test_flat_importance_is_told_and_leaves_sizes(caplog: pytest.LogCaptureFixture) -> None:
    model, x = chain(), torch.randn(16, 6)
    with caplog.at_level(logging.WARNING, "mpqkern"):
        score(model, x, method="ompq")
        assert "sizes alone" not in caplog.text
        flat = score(model, x, method="ompq", beta=0.0)
    assert "importance is the same in all layers" in caplog.text
    assert np.array_equal(flat.unary, score(model, x, method="size").unary)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"taps": "blocks"}, "taps='blocks'; wanted 'layer' or 'block'"),
        ({"beta": -1.0}, "beta=-1.0; wanted a number of 0 or more, or None"),
        ({"decrease": "sqrt"}, "decrease='sqrt'; wanted 'exp', 'log', 'linear', 'cubic' or 'negexp'"),
        ({"objective": "sum"}, "objective='sum'; wanted 'linear' or 'convex'"),
        ({"debiased": True, "center": False}, "debiased=True with center=False; wanted center=True"),
        ({"debiased": True}, "a batch holds 3 samples; wanted at least 4 in each"),
    ],
)
def test_errors_name_argument_value_and_wish(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(chain(), torch.randn(3, 6), method="ompq", **options)


def test_batches_of_more_than_the_kernel_takes() -> None:
    assert orm(chain(), torch.randn(1024, 6)).shape
    with pytest.raises(ValueError, match="a batch holds 1025 samples; wanted at most 1024 in each, and more batches"):
        score(chain(), torch.randn(1025, 6), method="ompq")


def test_a_bank_serves_every_option_that_acts_afterwards(tmp_path):
    model, batches = chain(), [torch.randn(6, 6) for _ in range(2)]
    first = score(model, batches, method="ompq", bank=tmp_path)
    again = score(model, batches, method="ompq", bank=tmp_path, beta=3.0, later=False, bits=(3, 8))
    assert (first.provenance["evaluations"], again.provenance["evaluations"]) == (2, 0)
    with pytest.raises(ValueError, match="options was"):
        score(model, batches, method="ompq", bank=tmp_path, center=False)
