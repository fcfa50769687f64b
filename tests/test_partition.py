"""Which layers are rounded together, for every kind of wiring."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.models.networks import ResNet8, ViT
from mpqkern.held import held
from mpqkern.measuring.task import Task
from mpqkern.rounding.partition import parts

from . import nets
from .test_held import everything

IMAGES, ROWS = torch.randn(4, 3, 8, 8), torch.randn(4, 8)


def names(model, batches, partition):
    task = Task(model.eval(), batches)
    with held(model):
        found = parts(task, partition)
    reached = [layer for part in found for layer in part.layers]
    assert len(set(reached)) == len(reached)
    return [part.name for part in found]


class Expand(nn.Module):
    """As in mobile networks: a row of layers, one of which is a small module with two layers of its own."""

    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, x):
            return x * torch.sigmoid(self.up(F.relu(self.down(x))))

    def __init__(self):
        super().__init__()
        self.row = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), self.Squeeze(), nn.Linear(8, 8))

    def forward(self, x):
        return x + self.row(x)


class Two(nn.Module):
    """Two layers with something of one's own between them."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 8), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def test_a_residual_network():
    model = ResNet8(8)
    x = torch.randn(2, 1, 8, 8)
    assert names(model, x, "layer")[:3] == ["stem", "blocks.0.conv1", "blocks.0.conv2"]
    assert names(model, x, "block") == ["stem", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert names(model, x, "unit:2") == ["stem", "blocks.0, blocks.1", "blocks.2", "head"]
    assert names(model, x, "unit:3") == ["stem", "blocks.0, blocks.1, blocks.2", "head"]


def test_a_vision_transformer():
    blocks = [f"layers.{i}" for i in range(4)]
    assert names(ViT(8), torch.randn(2, 1, 8, 8), "block") == ["embed", *blocks, "head"]
    units = ["layers.0, layers.1", "layers.2, layers.3"]
    assert names(ViT(8), torch.randn(2, 1, 8, 8), "unit:2") == ["embed", *units, "head"]


def test_modules_without_layers_join_those_around_them():
    assert names(nets.resnet(), IMAGES, "unit:2") == ["0, 2", "3, 6"]
    assert names(nets.resnet(), IMAGES, "unit:9") == ["0, 2, 3, 6"]
    assert names(nn.Sequential(Two(nn.ReLU(inplace=True))), ROWS, "unit:2") == ["0"]


@pytest.mark.parametrize("between, joined", [(nn.ReLU(), True), (nn.ReLU(inplace=True), True), (F.relu_, False)])
def test_what_is_done_between_modules_keeps_them_apart(between, joined):
    assert names(Two(between), ROWS, "unit:2") == (["a, b"] if joined else ["a", "b"])


def test_blocks_are_the_rows_that_hold_no_rows():
    row = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Expand(), Expand()), nn.Sequential(Expand()), nn.Linear(8, 2))
    assert names(row, ROWS, "block") == ["0", "1.0", "1.1", "2", "3"]


def test_torch_transformers():
    assert names(nets.transformer(), torch.randn(2, 5, 8), "block") == ["0", "1.layers.0", "1.layers.1", "2"]


def test_shared_weights_and_repeated_calls_are_parts_of_their_own(caplog):
    task = Task(nets.Tied(), torch.randn(4, 12))
    with held(task.model):
        tied = parts(task, "block")
    assert [(part.name, len(part.chains)) for part in tied] == [("a", 2), ("middle", 1)]
    assert names(nets.Functional(), ROWS, "unit:9") == ["first", "twice", "last"]
    assert names(nets.Reused(), ROWS, ["block"]) == ["block.0", "between", "branch", "last"]
    assert "block is rounded layer by layer: it is called 2 times in a pass" in caplog.text
    model = nn.Sequential(Two(nn.ReLU()), Two(nn.ReLU()))
    model[1].b.weight = model[0].a.weight
    assert names(model, ROWS, "block") == ["0.a", "0.b", "1.a"]
    assert "0 is rounded layer by layer: 0.a shares its weight with a layer outside" in caplog.text


def test_names_and_patterns():
    model = nets.resnet()
    assert names(model, IMAGES, ["Residual"]) == ["0", "2", "3", "6"]
    assert names(model, IMAGES, ["re:[23]", "6"]) == ["0", "2", "3", "6"]
    assert names(model, IMAGES, ["3"]) == ["0", "2.conv1", "2.conv2", "3", "6"]
    with pytest.raises(ValueError, match=r"has '3.conv1' within '3'; wanted no part within another"):
        names(model, IMAGES, ["3", "3.conv1"])
    with pytest.raises(ValueError, match="pattern='4x' matches no layer"):
        names(model, IMAGES, ["4x"])


@pytest.mark.parametrize("bad", ["", "blocks", "unit", "unit:0", "unit:x", [], [1], None, 2])
def test_other_partitions_are_refused(bad):
    with pytest.raises(ValueError, match=r"partition=.*; wanted 'layer', 'block', 'unit:2'"):
        names(nets.resnet(), IMAGES, bad)


def test_layers_that_only_other_batches_reach():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.c(self.a(x) if x.sum() > 0 else self.b(x))

    assert names(Either(), [torch.ones(2, 8), -torch.ones(2, 8)], "block") == ["a", "c", "b"]


def test_the_model_is_left_as_it_was():
    model = nets.resnet()
    task, before = Task(model, IMAGES), everything(model)
    parts(task, "unit:2")
    assert everything(model) == before
