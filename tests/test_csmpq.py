"""CSMPQ: TF-IDF by hand and by loops, pooling for every kind of layer, both directions, guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.models import ResNet8
from mpqkern import Budget, Unfinished, score, solve
from mpqkern.scores.csmpq import separability


def tf_idf(z: np.ndarray, kappa: float = 1.0) -> float:
    """The definition in loops."""
    samples, channels = z.shape
    total = 0.0
    for c in range(channels):
        words = [n for n in range(samples) if z[n, c] >= z[:, c].mean()]
        tf = sum(kappa * z[n, c] / z[n].sum() for n in words if z[n].sum() > 0) / len(words)
        total += tf * math.log(samples / (len(words) + 1))
    return total / channels


class Mixed(nn.Module):
    """A convolution, a linear layer on places, and one on samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(2, 6, 3), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(x.relu()).mean(1))


def gammas(model: nn.Module, x: object, **options: object) -> np.ndarray:
    return np.array(score(model, x, method="csmpq", **options).provenance["gamma"])


def test_by_hand() -> None:
    """Means 2 and 2. Above are samples 1, 2 in channel 0, idf ln 1, and sample 0 in channel 1: 5/6, idf ln 3/2."""
    z = np.array([[1.0, 5.0], [3.0, 1.0], [2.0, 0.0]])
    assert separability(z) == pytest.approx(5 / 6 * math.log(3 / 2) / 2, rel=1e-12)
    assert separability(z, balance=0.5) == pytest.approx((1 + math.log(4)) * separability(z), rel=1e-12)
    assert tf_idf(z) == pytest.approx(separability(z), rel=1e-12)


@torch.no_grad()
def test_convolutions_tokens_and_rows() -> None:
    m, x = Mixed().eval(), torch.randn(10, 2, 5, 5)
    conv = m.conv(x)
    tokens = m.mix(conv.flatten(2).transpose(1, 2).relu())
    pooled = [conv.relu().double().mean((2, 3)), tokens.relu().double().mean(1), m(x).relu().double()]
    wanted = [tf_idf(z.numpy()) for z in pooled]
    np.testing.assert_allclose(gammas(m, x), wanted, rtol=1e-5)
    kappas = [1 + math.log(c / 4) for c in (6, 8, 3)]
    np.testing.assert_allclose(gammas(m, x, balance=4), np.multiply(wanted, kappas), rtol=1e-5)
    assert min(wanted) > 0


@torch.no_grad()
def test_block_taps_see_norm_and_shortcut() -> None:
    m, x = ResNet8(width=4).eval(), torch.randn(12, 1, 8, 8)
    y = m.blocks[0](m.norm(m.stem(x)).relu())
    got = dict(zip(*[score(m, x, method="csmpq", taps="block").provenance[k] for k in ("order", "gamma")], strict=True))
    assert got["blocks.0.conv2"] == pytest.approx(tf_idf(y.double().mean((2, 3)).numpy()), rel=1e-5)
    assert got["blocks.1.conv2"] == got["blocks.1.shortcut"] != got["blocks.1.conv1"]


def test_directions_and_objectives() -> None:
    model, x = Mixed(), torch.randn(16, 2, 5, 5)
    gamma, bits = gammas(model, x), np.array([2, 4, 8])
    up = score(model, x, method="csmpq", bits=(2, 4, 8))
    np.testing.assert_allclose(up.unary, np.outer(gamma / gamma.max(), 8 - bits), rtol=1e-12)
    down = score(model, x, method="csmpq", bits=(2, 4, 8), direction="decreasing", beta=3.3)
    np.testing.assert_allclose(down.unary, np.outer(np.exp(-3.3 * (gamma - gamma.min())), 8 - bits), rtol=1e-12)
    spread = score(model, x, method="csmpq", direction="decreasing").provenance["importance"]
    assert max(spread) == 1 and min(spread) == pytest.approx(math.exp(-1))
    convex = score(model, x, method="csmpq", bits=(2, 4, 8), objective="convex")
    np.testing.assert_allclose(convex.unary, np.outer(gamma / gamma.max(), 4.0**-bits - 4**-8), rtol=1e-12)
    assert solve(up, Budget(avg_bits=4)).costs["avg_bits"] <= 4


def test_samples_without_any_channel_and_channels_that_are_constant() -> None:
    z = np.array([[0.0, 0.0], [1.0, 2.0], [4.0, 1.0], [0.0, 0.0]])
    assert separability(z) == pytest.approx(tf_idf(z), rel=1e-12) and separability(np.zeros((4, 3))) == 0
    model, x = Mixed(), torch.randn(30, 2, 5, 5)
    with torch.no_grad():
        model.mix.weight.zero_()
        model.mix.bias.fill_(0.1)  # all samples are the same, and above a mean that must not be rounded up
        model.head.bias.fill_(-100.0)  # nothing is left by the ReLU
    found = score(model, x, method="csmpq").provenance
    assert found["gamma"][1] == pytest.approx(math.log(30 / 31) / 8, rel=1e-9) and found["gamma"][2] == 0
    assert found["importance"] == [1.0, 0.0, 0.0]


def test_statistics_are_over_all_batches() -> None:
    model, x = ResNet8(width=4), torch.randn(24, 1, 8, 8)
    whole = gammas(model, x)
    np.testing.assert_allclose(gammas(model, [x[:16], x[16:]]), whole, rtol=1e-5)
    np.testing.assert_allclose(gammas(model, x[torch.randperm(24)]), whole, rtol=1e-5)
    assert not np.allclose((gammas(model, x[:16]) * 2 + gammas(model, x[16:])) / 3, whole, rtol=1e-2)


def test_a_stopped_run_goes_on_from_its_bank(tmp_path) -> None:
    model, x = ResNet8(width=4), list(torch.randn(5, 8, 1, 8, 8))
    wanted = score(model, x, method="csmpq")
    with pytest.raises(Unfinished, match="max_evals=3"):
        score(model, x, method="csmpq", bank=tmp_path, max_evals=3)
    got = score(model, x, method="csmpq", bank=tmp_path)
    assert got.provenance["evaluations"] == 2 and np.array_equal(got.unary, wanted.unary)
    assert np.array_equal(score(model, x, method="csmpq").unary, wanted.unary)


def test_modes_do_not_matter_and_the_model_is_left_as_found() -> None:
    model, x = ResNet8(width=4), torch.randn(16, 1, 8, 8)
    model(x)
    wanted = score(model.eval(), x, method="csmpq").unary
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    assert np.array_equal(score(model, x, method="csmpq").unary, wanted)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"direction": "up"}, "direction='up'; wanted 'increasing' or 'decreasing'"),
        ({"balance": 0.0}, "balance=0.0; wanted a number of channels above 0, or None"),
        ({"taps": "blocks"}, "taps='blocks'; wanted 'layer' or 'block'"),
        ({"objective": "sum"}, "objective='sum'; wanted 'linear' or 'convex'"),
        ({"direction": "decreasing", "beta": -1.0}, "beta=-1.0; wanted a number of 0 or more, or None"),
        ({}, "the batches hold 1 sample; wanted at least 2"),
    ],
)
def test_errors_name_argument_value_and_wish(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(Mixed(), torch.randn(2 if options else 1, 2, 5, 5), method="csmpq", **options)
