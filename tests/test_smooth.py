"""smooth_: outliers of activations move into the weights that read them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mpqkern as mq

from . import nets
from .reference.rewriting import Around, bits, distance, stopping


class Scaled(nn.Module):
    """A norm of somebody's own; `offset=1` is the make whose weight is learned around 0."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.rand(width)), offset

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.offset + self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (m(y) for m in (self.q, self.k, self.v))
        return x + self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[16.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    model[0].bias.data = torch.tensor([0.0, 0.0, 0.0])
    model[1].weight.data = torch.tensor([[0.5, 4.0, 1.0], [1.0, -1.0, 2.0]])
    # max |X| = 16, 4, 0 over the two batches; max |W| = 1, 4, 2; s = sqrt(X / W) = 4, 1 and nothing
    batches = [torch.tensor([[1.0, 1.0]]), torch.tensor([[-0.5, -4.0]])]
    report = mq.smooth_(model, batches)
    assert model[0].weight.tolist() == [[4.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    assert model[1].weight.tolist() == [[2.0, 4.0, 1.0], [4.0, -1.0, 2.0]]
    assert [(row.name, row.note) for row in report.done] == [("0 -> 1", "3 channels divided by 1 to 4")]


@pytest.mark.parametrize(
    ("alpha", "wanted"), [(0.0, [2.0, 0.25]), (1.0, [4.0, 4.0]), (0.75, [2**1.75, 2.0]), (0.5, [2**1.5, 1.0])]
)
def test_alpha_divides_the_range(alpha: float, wanted: list[float]) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data, model[1].weight.data = torch.eye(2), torch.tensor([[0.5, 4.0]])
    mq.smooth_(model, torch.tensor([[4.0, -4.0]]), alpha=alpha)
    torch.testing.assert_close(1 / model[0].weight.detach().diagonal(), torch.tensor(wanted), rtol=1e-6, atol=0)


def test_queries_keys_and_values_share_one_scale() -> None:
    model, x = Attention().eval(), torch.randn(3, 5, 16)
    model.norm.weight.data[2], model.norm.bias.data[4] = 40.0, -30.0
    want = model(x)
    y = model.norm(x).detach().abs().amax((0, 1))
    w = torch.stack([m.weight.detach().abs().amax(0) for m in (model.q, model.k, model.v)]).amax(0)
    before = model.norm.weight.detach().clone()
    report = mq.smooth_(model, x)
    assert [row.name for row in report.done] == ["norm -> q, k, v"] and distance(want, model(x)) < 1e-5
    torch.testing.assert_close(before / model.norm.weight.detach(), (y / w).sqrt(), rtol=1e-5, atol=0)
    assert [row.name for row in report.left] == ["q", "k", "v", "out"]


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.LayerNorm(6, bias=False), nn.RMSNorm(6), Scaled(6), nn.BatchNorm1d(6)]
)
def test_norms_of_any_make_take_the_scale(norm: nn.Module) -> None:
    model, x = nn.Sequential(norm, nn.Linear(6, 4)).eval(), torch.randn(8, 6)
    norm.weight.data[1] = 20.0
    want, spread = model(x), float(norm(x).detach().abs().max())
    assert [row.name for row in mq.smooth_(model, x).done] == ["0 -> 1"]
    assert distance(want, model(x)) < 1e-5 and float(norm(x).detach().abs().max()) < spread / 2


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Scaled(6, offset=1.0), "its output does not scale with its weight"),
        (nn.LayerNorm(6, elementwise_affine=False), None),
        (nn.BatchNorm1d(6, affine=False), "it has no weight that could take a scale"),
    ],
)
def test_norms_that_cannot_take_it_are_left(norm: nn.Module, reason: str | None) -> None:
    model = nn.Sequential(norm, nn.Linear(6, 4)).eval()
    before = bits(model)
    report = mq.smooth_(model, torch.randn(8, 6))
    assert bits(model) == before and not report.done
    assert {row.name: row.note for row in report.left}.get("0") == reason


def test_a_norm_that_is_also_read_elsewhere_is_left() -> None:
    model = nets.transformer()  # its norms come last, and the shortcut takes their output
    report = mq.smooth_(model, torch.randn(3, 5, 8))
    assert report.left[[row.name for row in report.left].index("1.layers.0.norm1")].note == "its output goes into add"
    assert "1.layers.1.norm2 -> 2" in [row.name for row in report.done]


def test_rounding_activations_to_8_bits_hurts_less() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    model[0].weight.data[[5, 40]] = 60.0  # two channels that leave few codes to the others
    batches = [torch.randn(32, 64) for _ in range(3)]
    x = torch.randn(64, 64)

    def error(float_model: nn.Module) -> float:
        packed = copy.deepcopy(float_model)
        mq.swap_(packed, {"*": mq.Scheme(8, act_bits=8)})
        with torch.no_grad():
            return float((packed(x) - float_model(x)).norm() / float_model(x).norm())

    before = error(model)
    mq.smooth_(model, batches)
    assert error(model) < before / 2


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (nets.resnet, torch.randn(4, 3, 8, 8)),
        (nets.Functional, torch.randn(4, 8)),
        (nets.Reused, torch.randn(4, 8)),
        (nets.Tied, torch.randn(4, 12)),
        (nets.transformer, torch.randn(4, 5, 8)),
        (nets.Keywords, {"ids": torch.tensor([[3, 1, 2]]), "mask": torch.ones(1, 3)}),
    ],
)
def test_odd_models_keep_their_answers(make: type[nn.Module], batch: object) -> None:
    model = make().eval()

    def run() -> object:
        with torch.no_grad():
            return model(**batch) if isinstance(batch, dict) else model(batch)

    want = run()
    mq.smooth_(model, [batch])
    assert distance(want, run()) < 1e-5


def test_a_change_of_the_outputs_is_refused_and_named() -> None:
    model = Around(nn.LayerNorm(4), nn.Linear(4, 4)).eval()
    model.first.weight.data[0] = 30.0
    before = bits(model)
    with pytest.raises(ValueError, match="rewriting 'first -> second' moves the outputs by"):
        mq.smooth_(model, torch.randn(3, 4))
    assert bits(model) == before


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), Scaled(4)])
@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_stopped_at_any_pass_the_model_is_as_found(at: int, norm: nn.Module) -> None:
    model = nn.Sequential(norm, nn.Linear(4, 4))
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        mq.smooth_(model, torch.randn(3, 4), forward=stopping(at, KeyboardInterrupt))
    assert bits(model) == before


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_is_checked(alpha: object) -> None:
    with pytest.raises(ValueError, match=r"alpha=.*; wanted a number from 0 to 1"):
        mq.smooth_(nn.Linear(2, 2), torch.randn(1, 2), alpha=alpha)  # type: ignore[arg-type]
