"""Models that a run from the middle could get wrong: measured right, by whole passes where nothing else will do."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpqkern as mq
from mpqkern import Budget
from mpqkern.rounding.twin import rounded


def layers(*widths: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))


class Mixing(nn.Module):
    """Every sample sees the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = layers(16, 16, 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x - x.mean(0)))
        return x


@dataclass
class Out:
    logits: Tensor


class Part(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.inner = nn.Linear(a, b)

    def forward(self, x: Out) -> Out:
        return Out(torch.tanh(self.inner(x.logits)))


class Objects(nn.Module):
    """Its modules hand on objects, and it answers with one; the first is used again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.last = nn.ModuleList(Part(16, 16) for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Out:
        out, seen = Out(x), []
        for part in self.parts:
            out = part(out)
            seen.append(out)
        return Out(self.last(out.logits + 2 * seen[0].logits))


class Remembering(nn.Module):
    """A module keeps its output for one that comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.early = nn.Linear(16, 16), Keeping()
        self.middle, self.late = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.middle(self.early(torch.tanh(self.front(x)))))
        return self.late(y + self.early.kept)


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.relu(self.inner(x))
        return self.kept.mean(1, keepdim=True) + x


class Routing(nn.Module):
    """Which layers run is decided by a layer that is not the first, and otherwise once it is rounded to 2 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.experts = nn.Linear(16, 16), nn.Linear(16, 16), layers(16, 16, 16)
        self.last, self.limit = nn.Linear(16, 4), 0.0

    def forward(self, x: Tensor) -> Tensor:
        y, gate = torch.tanh(self.first(x)), self.gate(x)
        return self.last(self.experts[int(gate.sum() > self.limit)](y))


@pytest.mark.parametrize("seed", range(3))
def test_routes_that_change_on_the_way(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Routing(), torch.randn(8, 16)
    clean = model.gate(x).sum().item()
    coarse = rounded(model.gate.weight.detach(), mq.Scheme(2))
    changed = nn.functional.linear(x, coarse, model.gate.bias).sum().item()
    model.limit = (clean + changed) / 2
    assert_agrees(model, (x, torch.arange(8) % 4))


class SequenceFirst(nn.Module):
    """[T, N, 16] with as many steps as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(len(x), 1, 16).repeat(1, 8, 1).transpose(0, 1)
        return self.last(self.inner(y + torch.arange(8.0).view(8, 1, 1)).mean(0))


@pytest.mark.parametrize("kind", [Mixing, Objects, Remembering, SequenceFirst])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_those_of_whole_passes(kind: type[nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    assert_agrees(kind().eval(), (torch.randn(8, 16), torch.arange(8) % 4))


def assert_agrees(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    got, want = (mq.score(model, [batch], method="clado", engine=engine) for engine in ("frontier", "naive"))
    np.testing.assert_allclose(got.unary, want.unary, atol=2e-6)
    np.testing.assert_allclose(got.pairwise, want.pairwise, atol=4e-6)
    assert np.abs(want.pairwise).max() > 1e-4
    alone = mq.score(model, [batch], method="single")
    np.testing.assert_allclose(alone.unary, want.unary, atol=2e-6)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5))


def test_random_answers_are_told(caplog: pytest.LogCaptureFixture) -> None:
    mq.score(Noisy(), [torch.randn(8, 16)], method="single")
    assert "differ from run to run" in caplog.text


def test_scores_that_tell_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    mq.score(nn.Sequential(nn.Linear(16, 1)), [torch.randn(8, 16)], method="kl")  # one class: no divergence
    assert "finds all layers and schemes alike" in caplog.text


class Language(nn.Module):
    """Knows that the next token is the last one plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 10), nn.Linear(10, 10)
        nn.init.eye_(self.table.weight)
        self.head.weight.data = 9 * torch.eye(10).roll(1, 0)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.table(input_ids))


def test_labels_that_repeat_the_inputs_are_shifted() -> None:
    ids = (torch.arange(8) + torch.arange(4).unsqueeze(1)) % 10
    batch = UserDict(input_ids=ids, labels=ids.clone())  # any mapping will do
    task = mq.measuring.task.Task(Language(), [batch])
    assert task.losses(task.run(task.batches[0]), 0).max() < 0.01
    wanted = {"input_ids": ids, "labels": (ids + 1) % 10}
    same = mq.measuring.task.Task(Language(), [wanted])
    assert same.losses(same.run(same.batches[0]), 0).max() < 0.01


def test_banks_tell_losses_and_buffers_apart(tmp_path) -> None:
    model, batch = nn.Sequential(nn.Linear(16, 4)), (torch.randn(8, 16), torch.arange(8) % 4)

    def scaled(by: float):
        return lambda output, batch: by * output.square().mean(1)

    mq.score(model, [batch], method="single", bank=tmp_path, loss=scaled(1.0))
    mq.score(model, [batch], method="single", bank=tmp_path, loss=scaled(1.0))
    for other in (scaled(2.0), lambda output, batch: output.abs().mean(1)):
        with pytest.raises(ValueError, match="loss was"):
            mq.score(model, [batch], method="single", bank=tmp_path, loss=other)
    model.register_buffer("extra", torch.ones(1), persistent=False)
    with pytest.raises(ValueError, match="model was"):
        mq.score(model, [batch], method="single", bank=tmp_path, loss=scaled(1.0))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.randn(0, 16)], r"batches\[0\] holds no samples"),
        ([(torch.randn(2, 16), torch.zeros(2), torch.zeros(2))], "a batch is a tuple of 3; wanted a tensor, an"),
        ([(torch.randn(2, 16), torch.zeros(2).long()), torch.randn(2, 16)], "some batches have labels and some"),
    ],
)
def test_batches_that_would_be_misread(batches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mq.score(nn.Sequential(nn.Linear(16, 4)), batches, method="single")


def test_compare_takes_a_generator() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = (torch.randn(4, 32) for _ in range(2))
    found = mq.compare(model, batches, lambda m: 0.0, [Budget(avg_bits=4)], methods=["roundoff", "ompq"])
    assert {o.method for o in found.outcomes} >= {"roundoff", "ompq"}


@pytest.mark.slow
def test_compiled_models() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(8, 16)
    want = mq.score(model, [batch], method="clado")
    got = mq.score(torch.compile(model, backend="eager"), [batch], method="clado")
    assert got.names == [f"_orig_mod.{name}" for name in want.names]
    np.testing.assert_allclose(got.pairwise, want.pairwise, atol=1e-6)
