"""HAWQ's score: traces against Hessians that are known or computed in full."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq
from mpqkern import Scheme
from mpqkern.rounding.twin import rounded


def mse(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (output - batch[1]).double().square().sum(1) / 2


class Attention(nn.Module):
    """Fused attention, which has no second derivative of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)


def exact_trace(layer: nn.Module, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the layer's block of the Hessian of mean cross-entropy, entry by entry."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), layer.weight, create_graph=True)
        rows = [torch.autograd.grad(g, layer.weight, retain_graph=True)[0] for g in grad.flatten()]
    return sum(float(row.flatten()[i]) for i, row in enumerate(rows))


def test_diagonal_hessians_need_one_round() -> None:
    # The Hessian of half the squared error is I (x) mean xx'. With orthogonal inputs that is diagonal, and v'Hv its
    # trace for every v of signs.
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    found = mq.score(model, (x, torch.randn(4, 3)), method="hawq", bits=(2, 4, None), loss=mse)
    trace = 3 * 30 / 4
    assert found.provenance["traces"]["0"] == pytest.approx(trace, rel=1e-5)
    assert found.provenance["probes"] == 8  # a second round, which changes nothing
    weight = model[0].weight.detach()
    errors = [float((rounded(weight, Scheme(bits)) - weight).double().square().sum()) for bits in (2, 4)]
    assert found.unary[0] == pytest.approx([trace / 12 * errors[0], trace / 12 * errors[1], 0.0], rel=1e-4)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_traces_come_out(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) if name == "mlp" else Attention()
    x, y = torch.randn(6, *((4,) if name == "mlp" else (3, 4))), torch.randint(0, 3, (6,))
    found = mq.score(model, [(x[:4], y[:4]), (x[4:], y[4:])], method="hawq", tol=0, max_probes=200)
    got, errors = (np.array(list(found.provenance[key].values())) for key in ("traces", "trace_errors"))
    want = np.array([exact_trace(model.get_submodule(name), model, x, y) for name in found.names])
    assert found.provenance["probes"] == 200
    assert (np.abs(got - want) < 4 * errors).all() and (errors < 0.2 * np.abs(want).max()).all()


def test_divergence_from_itself_has_a_hessian() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)), torch.randn(200, 4)
    found = mq.score(model, x, method="hawq", tol=0, max_probes=400)
    chances = model(x).softmax(1)
    want = float(((chances * (1 - chances)).sum(1) * x.square().sum(1)).mean().detach())  # the Fisher information
    assert found.provenance["traces"]["0"] == pytest.approx(want, rel=0.05)


def test_it_stops_when_traces_stand_still() -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(9, 4), torch.arange(9) % 3
    probes = [
        mq.score(model, (x, y), method="hawq", tol=tol, max_probes=most).provenance["probes"]
        for tol, most in ((0.5, 64), (0.02, 400), (0.0, 18))
    ]
    assert probes[0] < probes[1] < 400 and probes[2] == 20  # whole rounds


def test_negative_curvature_is_no_gain() -> None:
    def saddle(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -mse(output, batch)

    model, batch = nn.Sequential(nn.Linear(4, 3)), (torch.randn(9, 4), torch.randn(9, 3))
    found = mq.score(model, batch, method="hawq", loss=saddle)
    assert found.provenance["traces"]["0"] < 0 and not found.unary.any()


def test_weights_that_are_shared_or_unused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    model, x, y = Net(), torch.randn(6, 3), torch.arange(6) % 3
    found = mq.score(model, (x, y), method="hawq", tol=0, max_probes=200)
    want, error = exact_trace(model.a, model, x, y), found.provenance["trace_errors"]["a"]
    assert found.names == ["a", "unused"] and not found.unary[1].any()
    assert abs(found.provenance["traces"]["a"] - want) < 4 * error


def test_a_loss_that_is_linear_has_no_curvature() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    found = mq.score(model, torch.randn(5, 4), method="hawq", loss=lambda out, batch: out.sum(1))
    assert not found.unary.any()


def test_more_batches_reuse_what_was_measured(tmp_path: Path) -> None:
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(12, 4), torch.randint(0, 3, (12,))
    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    how = {"method": "hawq", "tol": 0, "max_probes": 8}
    mq.score(model, batches[:2], bank=tmp_path, **how)
    found = mq.score(model, batches, bank=tmp_path, **how)
    assert found.provenance["evaluations"] == 2
    assert np.array_equal(found.unary, mq.score(model, batches, **how).unary)
    again = mq.score(model, batches[::-1], **how)
    assert found.unary == pytest.approx(again.unary, rel=1e-12)  # a batch's probes are its own


@pytest.mark.parametrize("options, text", [({"tol": -1}, "tol=-1"), ({"max_probes": 0}, "max_probes=0")])
def test_wrong_options(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        mq.score(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), method="hawq", **options)
