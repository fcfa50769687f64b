"""Features: what is handed out for each layer, on every shape of model, written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import mpqkern as mq
from bench.models import ResNet8
from mpqkern.held import held
from mpqkern.measuring.task import Task
from mpqkern.scores.features import visit


def taken(model: nn.Module, x: Tensor, taps: str = "block", **how: object) -> dict[str, Tensor]:
    """By name; of several calls of a layer the last one."""
    task, found = Task(model, x, **how), {}
    with held(model):
        visit(task, 0, taps, lambda layer, feature: found.update({task.layers[layer].name: feature.clone()}))
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@torch.no_grad()
def test_resnet_with_functional_relu() -> None:
    model, x = ResNet8(width=8).eval(), torch.randn(4, 1, 8, 8)
    own = {"stem": model.stem(x)}
    block = {"stem": (y := model.norm(own["stem"]).relu())}
    for i, part in enumerate(model.blocks):
        name = f"blocks.{i}"
        own[f"{name}.conv1"] = part.conv1(y)
        block[f"{name}.conv1"] = inner = part.norm1(own[f"{name}.conv1"]).relu()
        own[f"{name}.conv2"], short = part.conv2(inner), part.shortcut(y)
        y = (part.norm2(own[f"{name}.conv2"]) + short).relu()
        block[f"{name}.conv2"] = y
        if i:
            own[f"{name}.shortcut"], block[f"{name}.shortcut"] = short, y
    own["head"] = block["head"] = model.head(y.mean((2, 3)))
    assert_same(taken(model, x, "layer"), own)
    assert_same(taken(model, x), block)


class InPlace(nn.Module):
    """A block in the manner of torchvision: one ReLU module for all, which writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.pool = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.MaxPool2d(2)
        self.conv1, self.bn1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.stem(x))))
        short = self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += short
        return self.fc(self.relu(out).mean((2, 3)))


@torch.no_grad()
def test_relu_in_place_and_shortcut_first() -> None:
    m, x = InPlace().eval(), torch.randn(4, 3, 8, 8)
    stem = F.relu(m.bn(m.stem(x)))
    inner = F.relu(m.bn1(m.conv1(m.pool(stem))))
    out = F.relu(m.bn2(m.conv2(inner)) + m.downsample(m.pool(stem)))
    wanted = {"stem": stem, "conv1": inner, "conv2": out, "downsample.0": out, "fc": m.fc(out.mean((2, 3)))}
    assert_same(taken(m, x), wanted)
    assert torch.equal(taken(m, x, "layer")["stem"], m.stem(x))


@torch.no_grad()
def test_chain_with_relu_in_place_right_after_a_layer() -> None:
    m, x = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 7), nn.Tanh()), torch.randn(4, 5)
    a = m[0](x)
    b = m[2](a.relu())
    assert_same(taken(m, x, "layer"), {"0": a, "2": b})
    assert_same(taken(m, x), {"0": a.relu(), "2": b.tanh()})


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out, self.up, self.down, self.head = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm(x)))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(*x.shape[:2], 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


@torch.no_grad()
def test_transformer() -> None:
    m, x = Transformer().eval(), torch.randn(3, 5, 8)
    attended = m.attend(m.norm(x))
    first = x + m.out(attended)
    second = first + m.down(F.gelu(m.up(first)))
    wanted = {name: m.get_submodule(name)(m.norm(x)) for name in "qkv"}
    wanted |= {"out": first, "up": F.gelu(m.up(first)), "down": second, "head": m.head(second.mean(1))}
    assert_same(taken(m, x), wanted)


class Branches(nn.Module):
    """Two ways from the same input, one of them longer, written side by side into a buffer; then into another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b1, self.b2, self.c, self.last = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 2, 4)
        out[:, 0] = self.a(x)
        out[:, 1] = self.b2(self.b1(x).clamp(min=0.1))
        total = torch.zeros_like(out)
        total += self.c(out)
        return self.last(total.tanh())


@torch.no_grad()
def test_only_what_was_computed_from_a_layer_counts() -> None:
    m, x = Branches(), torch.randn(3, 4)
    got = taken(m, x)
    assert torch.equal(got["a"], m.a(x)) and torch.equal(got["b1"], m.b1(x).clamp(min=0.1))
    assert torch.equal(got["b2"], m.b2(m.b1(x).clamp(min=0.1)))
    assert torch.equal(got["c"], m.c(torch.stack([got["a"], got["b2"]], dim=1)).tanh())


@torch.no_grad()
def test_masks_do_not_count_and_layers_that_are_not_scored_do() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x, x > 0

    m = nn.Sequential(nn.Linear(4, 4), Masked(), _First(), nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    assert torch.equal(taken(m, x)["0"], m[0](x))
    assert_same(taken(m, x, layers=["0"]), {"0": m[0](x)})


class _First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


@pytest.mark.parametrize("taps", ["layer", "block"])
def test_rows_of_a_sample_and_calls_of_a_layer(taps: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x.flatten(0, 1))).unflatten(0, x.shape[:2])

    model, seen = Twice(), []
    task = Task(model, torch.randn(3, 5, 4))
    with held(model):
        order = visit(task, 0, taps, lambda layer, feature: seen.append((layer, feature.shape)))
    assert order == [0] and seen == [(0, (3, 5, 4))] * 2
    flat = Task(model, torch.randn(3, 5, 4), forward=lambda m, x: m(x[:1, :4])[:, :1].expand(3, 1, 4))
    with held(model), pytest.raises(ValueError, match=r"layer 'fc' gives \[4, 4\] for a batch of 3; wanted samples"):
        visit(flat, 0, taps, lambda layer, feature: None)


@pytest.mark.parametrize("taps", ["layer", "block"])
def test_features_are_dropped_at_once(taps: str) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(8)])
    task, alive, most = Task(model, torch.randn(4, 6)), [], []

    def take(layer: int, feature: Tensor) -> None:
        most.append(sum(not storage.expired() for storage in alive))
        alive.append(StorageWeakRef(feature.untyped_storage()))

    with held(model):
        assert visit(task, 0, taps, take) == list(range(8))
    assert max(most) <= 1 and all(storage.expired() for storage in alive)


def test_model_is_left_as_found_after_an_exception() -> None:
    model = ResNet8(width=8)
    task = Task(model, torch.randn(4, 1, 8, 8))

    def take(layer: int, feature: Tensor) -> None:
        raise KeyError(layer)

    for taps in ("layer", "block"):
        with pytest.raises(KeyError), held(model):
            visit(task, 0, taps, take)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="taps='blocks'; wanted 'layer' or 'block'"):
        visit(task, 0, "blocks", take)


@pytest.mark.parametrize("method", ["ompq", "csmpq"])
def test_sequences_first(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(5, 3, 6)
    how = {"method": method, "forward": lambda model, batch: model(batch.transpose(0, 1)).transpose(0, 1)}
    with pytest.raises(ValueError, match=r"layer '0' gives \[3, 5, 8\] for a batch of 5; wanted .* sample_dim=1"):
        mq.score(model, x, **how)
    assert np.allclose(mq.score(model, x, sample_dim=1, **how).unary, mq.score(model, x, method=method).unary)
    with pytest.raises(ValueError, match="sample_dim=2; wanted 0 or 1"):
        mq.score(model, x, sample_dim=2, **how)
