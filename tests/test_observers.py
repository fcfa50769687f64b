"""Observers against what they stand for, computed from all values at once."""

from __future__ import annotations

import pytest
import torch

from mpqkern.measuring.observers import BINS, OBSERVERS, STEPS, Ema, Gauss, Max, Mse, Observer, Percentile


def stream(seen: Observer, *parts: torch.Tensor) -> float:
    for part in parts:
        seen.update(part)
    return seen.limit()


def values(kind: str, count: int = 40000) -> torch.Tensor:
    x = torch.randn(count)
    return {
        "normal": x,
        "relu": x.relu(),
        "laplace": torch.distributions.Laplace(0, 1).sample((count,)),
        "outliers": torch.where(torch.rand(count) < 2e-4, 40 * x, x),
        "uniform": torch.rand(count) - 0.5,
    }[kind]


KINDS = ("normal", "relu", "laplace", "outliers", "uniform")


def squared_error(x: torch.Tensor, limit: float, most: int = 127) -> float:
    scale = limit / most
    return float((x.double() - (x.double() / scale).round().clamp(-most, most) * scale).square().sum())


def test_max_and_ema() -> None:
    parts = torch.tensor([1.0, -0.5]), torch.tensor([[-3.0]]), torch.tensor([2.0])
    assert stream(Max(), *parts) == 3.0
    assert stream(Ema(), *parts) == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 3) + 0.1 * 2)
    assert stream(Ema(0.0), *parts) == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_histogram_counts_every_value_once_however_it_grew(kind: str) -> None:
    x = values(kind)
    small_first = x[x.abs().argsort()]
    grown = Mse()
    stream_of = [0 * x[:5], small_first[:100], small_first[100:101], small_first[101:]]
    for part in stream_of:
        grown.update(part)
    at_once = torch.histc(x.abs()[x != 0].double(), BINS, 0, grown.top)
    assert grown.zeros == 5 + int((x == 0).sum()) and grown.largest == float(x.abs().max()) <= grown.top
    assert int((grown.counts - at_once).abs().sum()) <= 4  # values at the very edges of bins
    assert int(grown.counts.sum()) == int((x != 0).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percent", [60.0, 99.0, 99.9, 100.0])
def test_percentiles(kind: str, percent: float) -> None:
    x = values(kind)
    exact = float(x.abs().double().quantile(percent / 100))
    got = stream(Percentile(percent), *x.split(7777))
    assert abs(got - exact) <= 2 * float(x.abs().max()) * 2 / BINS + 0.002 * exact
    assert percent < 100 or got == float(x.abs().max())


def test_a_percentile_of_zeros_is_the_maximum() -> None:
    x = torch.zeros(1000)
    x[3] = -2
    assert stream(Percentile(99.0), x) == 2 and stream(Percentile(99.99), x) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_finds_the_least_error_of_its_grid(kind: str) -> None:
    x = values(kind)
    best = min(squared_error(x, float(x.abs().max()) * f / 100) for f in range(1, 101))
    limit = stream(Mse(), *x.split(9999))
    assert squared_error(x, limit) <= 1.01 * best
    assert kind not in ("laplace", "outliers") or squared_error(x, limit) < 0.9 * squared_error(x, stream(Max(), x))


@pytest.mark.parametrize("most", [1, 7])
def test_mse_at_fewer_bits(most: int) -> None:
    x = values("normal")
    best = min(squared_error(x, float(x.abs().max()) * f / 100, most) for f in range(1, 101))
    assert squared_error(x, stream(Mse(most), x), most) <= 1.01 * best


@pytest.mark.parametrize("kind", ["normal", "relu"])
def test_gauss_is_the_best_step_for_normal_values(kind: str) -> None:
    x = values(kind)
    limit = stream(Gauss(), *x.split(9999))
    assert limit == pytest.approx(127 * STEPS[8] * float(x.square().mean().sqrt()), rel=1e-5)
    if kind == "normal":
        grid = torch.linspace(2.5, 6, 71).tolist()
        assert squared_error(x, limit) <= 1.02 * min(squared_error(x, point) for point in grid)


@pytest.mark.parametrize("name", OBSERVERS)
def test_zeros_and_extreme_values(name: str) -> None:
    assert OBSERVERS[name]().limit() == 0 == stream(OBSERVERS[name](), torch.zeros(5), torch.zeros(2))
    for value in (1e-45, 1e-30, torch.finfo(torch.float32).max):
        limit = stream(OBSERVERS[name](), torch.zeros(3), torch.tensor([1e-40]), torch.full((64,), -value))
        assert 0 < limit < torch.inf and (limit > 1e37 or value < 1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="percent=0; wanted a number above 0, at most 100"):
        Percentile(0)
    with pytest.raises(ValueError, match="momentum=1; wanted a number from 0 to below 1"):
        Ema(1)
