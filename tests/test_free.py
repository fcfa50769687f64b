"""Ways to round that look at weights alone."""

import pytest
import torch
from torch import nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.rounding import MSE, MinMax
from mpqkern.rounding.grid import Codes

SCHEMES = [Scheme(2), Scheme(4, group_size=32), Scheme(3, symmetric=False), Scheme(4, symmetric=False, group_size=32)]


def weight(seed: int = 0) -> torch.Tensor:
    """With a few large values, as those of real layers."""
    w = torch.randn(6, 70, generator=torch.Generator().manual_seed(seed))
    return w**3


def error(w: torch.Tensor, codes: Codes, p: float) -> torch.Tensor:
    return (w - codes.values()).double().abs().pow(p).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_search_over_other_powers_is_that_of_the_kernel(scheme: Scheme, monkeypatch: pytest.MonkeyPatch):
    """With p = 2, which it does not get to see otherwise."""
    fused = MSE().round(weight(), scheme)
    monkeypatch.setattr(MSE, "fused", False)
    other = MSE().round(weight(), scheme)
    for name in ("codes", "scales", "zeros", "group_size"):
        assert torch.equal(torch.as_tensor(getattr(fused, name)), torch.as_tensor(getattr(other, name)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("p", [0.7, 2.4, 4])
def test_each_power_is_best_at_its_own(p: float, scheme: Scheme):
    w = weight()
    best = error(w, MSE(p=p).round(w, scheme), p)
    for other in (MinMax(), MSE(), MSE(p=1), MSE(p=8)):
        assert (best <= error(w, other.round(w, scheme), p) * (1 + 1e-6)).all()
    assert (best < error(w, MinMax().round(w, scheme), p) * (1 - 1e-3)).any()


def test_by_hand():
    """Ten weights of 1 and one of 3: a large power spans all, a small one gives the large weight up."""
    w = torch.tensor([[1.0] * 10 + [3.0]])
    scheme = Scheme(2, scale_dtype="float32")
    assert MSE(p=20).round(w, scheme).values()[0, -1] > 2.2
    assert MSE(p=0.5).round(w, scheme).values()[0, 0] == pytest.approx(1, abs=0.03)


def test_packed_as_it_was_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8))
    want, other = (m.round(model[0].weight.detach(), Scheme(4)).values() for m in (MSE(p=8), MSE()))
    mq.swap_(model, {"0": 4}, rounding=MSE(p=8))
    assert torch.equal(model[0].weight, want)
    assert not torch.equal(model[0].weight, other)


@pytest.mark.parametrize("p", [0, -1, "2", True, float("nan"), float("inf")])
def test_bad_powers(p: object):
    with pytest.raises(ValueError, match=f"p={p!r}; wanted a number above 0"):
        MSE(p=p)


def test_infinities_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="row 1"):
        MSE(p=3).round(torch.tensor([[1.0, 2.0], [float("inf"), 0.0]]), Scheme(4))
