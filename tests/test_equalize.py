"""equalize_: both sides of a pair get the same ranges, channel by channel, and the function stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpqkern as mq

from . import nets
from .reference.rewriting import Around, bits, distance, stopping


def ranges(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    return weight.detach().abs().amax(dims)


def uneven(model: nn.Module) -> nn.Module:
    """Weights whose outputs differ by orders of magnitude, as folded batch norms leave them."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            factor = torch.empty(len(module.weight)).uniform_(-4, 4).exp2()
            module.weight.data *= factor.view(-1, *[1] * (module.weight.dim() - 1))
    return model.eval()


def test_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[8.0, -2.0], [1.0, 0.5], [0.0, 0.0]])
    model[0].bias.data = torch.tensor([4.0, 1.0, 5.0])
    model[2].weight.data = torch.tensor([[0.5, 4.0, 1.0], [0.25, -1.0, 2.0]])
    report = mq.equalize_(model, torch.randn(5, 2))
    # s = sqrt(8 * 0.5) / 0.5 = 4, sqrt(1 * 4) / 4 = 1/2; the third output has no weights
    assert model[0].weight.tolist() == [[2.0, -0.5], [2.0, 1.0], [0.0, 0.0]]
    assert model[0].bias.tolist() == [1.0, 2.0, 5.0]
    assert model[2].weight.tolist() == [[2.0, 2.0, 1.0], [1.0, -0.5, 2.0]]
    assert [(row.name, row.note) for row in report.done] == [("0 -> 2", "3 channels divided by 0.5 to 4")]
    assert [row.note for row in report.left] == ["its output goes into an output of the model, or is kept"]


def test_a_chain_with_a_depthwise_layer_is_even_throughout() -> None:
    depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)  # two outputs an input
    model = uneven(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), depthwise, nn.ReLU(inplace=True), nn.Conv2d(12, 4, 1)))
    x = torch.randn(2, 3, 5, 5)
    want = model(x)
    report = mq.equalize_(model, x)
    assert [row.name for row in report.done] == ["0 -> 2", "2 -> 4"] and distance(want, model(x)) < 1e-5
    first, middle, last = (model[i].weight for i in (0, 2, 4))
    read = ranges(middle, (1, 2, 3)).view(6, 2).amax(1)
    torch.testing.assert_close(ranges(first, (1, 2, 3)), read, rtol=1e-3, atol=0)
    torch.testing.assert_close(ranges(middle, (1, 2, 3)), ranges(last, (0, 2, 3)), rtol=1e-3, atol=0)
    assert mq.equalize_(model, x, iterations=1).done[0].note.endswith("by 1 to 1")


def test_one_round_is_not_enough_for_a_chain() -> None:
    model = uneven(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    mq.equalize_(model, torch.randn(2, 3), iterations=1)
    assert not torch.allclose(ranges(model[0].weight, (1,)), ranges(model[2].weight, (0,)), rtol=1e-3)
    mq.equalize_(model, torch.randn(2, 3))
    assert torch.allclose(ranges(model[0].weight, (1,)), ranges(model[2].weight, (0,)), rtol=1e-3)


@pytest.mark.parametrize("leaves", [nn.Identity(), nn.LeakyReLU(0.1), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))])
def test_a_layer_behind_views_reads_each_channel_in_several_places(leaves: nn.Module) -> None:
    size = 4 if isinstance(leaves, nn.Sequential) else 16
    model = uneven(nn.Sequential(nn.Conv2d(3, 5, 1), leaves, nn.Flatten(), nn.Linear(5 * size, 2)))
    x = torch.randn(3, 3, 4, 4)
    want = model(x)
    assert len(mq.equalize_(model, x).done) == 1 and distance(want, model(x)) < 1e-5
    read = model[3].weight.view(2, 5, size)
    torch.testing.assert_close(ranges(model[0].weight, (1, 2, 3)), ranges(read, (0, 2)), rtol=1e-4, atol=0)


def test_groups_and_shuffled_channels() -> None:
    class Shuffle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 4, 3, groups=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            return self.second(y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2))

    model, x = uneven(Shuffle()), torch.randn(2, 4, 5, 5)
    want = model(x)
    mq.equalize_(model, x)
    assert distance(want, model(x)) < 1e-5
    made, read = ranges(model.first.weight, (1, 2, 3)), ranges(model.second.weight.view(2, 2, 3, 3, 3), (1, 3, 4))
    torch.testing.assert_close(made[[0, 3, 1, 4, 2, 5]], read.flatten(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.ReLU6(), "its output goes into hardtanh (ReLU6)"),
        (nn.SiLU(), "its output goes into silu"),
        (nn.LayerNorm(4), "it feeds 1, a LayerNorm"),
        (nn.PReLU(), "it feeds 1, a PReLU"),
    ],
)
def test_what_is_not_homogeneous_is_left(between: nn.Module, reason: str) -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 4)))
    before = bits(model)
    report = mq.equalize_(model, torch.randn(3, 4))
    assert bits(model) == before and not report.done and report.left[0].note == reason
    assert "as they were" in str(report)


def test_two_readers_are_left() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b", "c")})
    report = mq.equalize_(
        model, torch.randn(3, 4), forward=lambda m, x: m["b"](m["a"](x)) * m["c"](m["a"].bias + 0 * x)
    )
    assert report.left[0].note == "its weight is read outside its own calls"

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        y = m["a"](x)
        return m["b"](y) * m["c"](y)

    assert mq.equalize_(model, torch.randn(3, 4), forward=forward).left[0].note == "it feeds b and c"


@pytest.mark.parametrize(
    ("make", "batch", "done"),
    [
        (nets.resnet, torch.randn(4, 3, 8, 8), 2),
        (nets.Functional, torch.randn(4, 8), 0),
        (nets.Reused, torch.randn(4, 8), 0),
        (nets.Tied, torch.randn(4, 12), 0),
        (nets.transformer, torch.randn(4, 5, 8), 2),
        (nets.Keywords, {"ids": torch.tensor([[3, 1, 2]]), "mask": torch.ones(1, 3)}, 0),
    ],
)
def test_odd_models_keep_their_answers(make: type[nn.Module], batch: object, done: int) -> None:
    model = make().eval()

    def run() -> object:
        with torch.no_grad():
            return model(**batch) if isinstance(batch, dict) else model(batch)

    if make is nets.resnet:
        mq.fold_batchnorm_(model, batch)
    before, want = bits(model), run()
    assert len(mq.equalize_(model, batch).done) == done and distance(want, run()) < 1e-5
    assert (bits(model) == before) == (not done)


def test_a_change_of_the_outputs_is_refused_and_named() -> None:
    model = uneven(Around(nn.Linear(4, 4), nn.Linear(4, 4)))
    before = bits(model)
    with pytest.raises(ValueError, match="rewriting 'first -> second' moves the outputs by"):
        mq.equalize_(model, torch.randn(3, 4))
    assert bits(model) == before


@pytest.mark.parametrize("at", [1, 3, 5])
def test_stopped_at_any_pass_the_model_is_as_found(at: int) -> None:
    model = uneven(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        mq.equalize_(model, torch.randn(3, 4), forward=stopping(at, KeyboardInterrupt))
    assert bits(model) == before


@pytest.mark.parametrize("iterations", [0, -1])
def test_iterations_is_checked(iterations: object) -> None:
    with pytest.raises(ValueError, match=f"iterations={iterations}; wanted a whole number, at least 1"):
        mq.equalize_(nn.Linear(2, 2), torch.randn(1, 2), iterations=iterations)  # type: ignore[arg-type]
