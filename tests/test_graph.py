"""Who feeds whom: seen in one pass, through views and functions, and never claimed where something else reads too."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpqkern.transform.graph import graph, rival, unshared

from . import nets
from .reference.rewriting import bits


class Between(nn.Module):
    """Two layers with a function in between."""

    def __init__(self, first: nn.Module, second: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.function = first, second, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second)


def seen(function: Callable[..., Tensor], first: nn.Module, second: nn.Module, *shape: int) -> tuple:
    """Channels that reach the second layer, the operations in between, and why the first is not its alone."""
    model = Between(first, second, function)
    nodes = graph(model, lambda: model(torch.randn(shape)))
    node = nodes["first"]
    edge = node.edges[0] if node.edges else None
    return edge and edge.index.tolist(), edge and edge.ops, unshared(node, nodes)


def conv(cin: int, cout: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 1)


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda y, m: m(y), ()),
        (lambda y, m: m(F.relu(y)), ("relu",)),
        (lambda y, m: m(F.relu_(y).clone()), ("relu",)),
        (lambda y, m: m(F.leaky_relu(y.mul_(0.5)) / 3), ("mul", "leaky_relu", "div")),
        (lambda y, m: m(F.dropout(y, training=False).contiguous()), ()),
        (lambda y, m: m(F.max_pool2d(y, 2)), ("max_pool2d_with_indices",)),
        (lambda y, m: m(F.avg_pool2d(y, 3, padding=1)), ("avg_pool2d",)),
        (lambda y, m: m(F.pad(y, (0, 1, 1, 0)).relu()), ("constant_pad_nd", "relu")),
        (lambda y, m: m(y.flatten(2).view(2, 3, 2, 8).transpose(2, 3)), ()),
        (lambda y, m: m(F.adaptive_avg_pool2d(y, 1)), ("mean",)),
    ],
)
def test_scales_of_channels_pass_through(function: Callable[..., Tensor], ops: tuple[str, ...]) -> None:
    assert seen(function, conv(4, 3), conv(3, 2), 2, 4, 4, 4) == ([0, 1, 2], ops, None)


def test_an_in_place_function_reaches_the_views_made_before() -> None:
    def function(y: Tensor, m: nn.Module) -> Tensor:
        view = y.view(2, 3, 16, 1)
        F.relu_(y)
        return m(view)

    assert seen(function, conv(4, 3), conv(3, 2), 2, 4, 4, 4) == ([0, 1, 2], ("relu",), None)


def test_channels_are_followed_through_views() -> None:
    def shuffled(y: Tensor, m: nn.Module) -> Tensor:
        return m(y.view(2, 2, 3, 16).transpose(1, 2).reshape(2, 6, 4, 4))

    assert seen(shuffled, conv(4, 6), conv(6, 2), 2, 4, 4, 4)[0] == [0, 3, 1, 4, 2, 5]
    flat = seen(lambda y, m: m(y.relu().flatten(1)), conv(4, 2), nn.Linear(8, 2), 3, 4, 2, 2)
    assert flat == ([0, 0, 0, 0, 1, 1, 1, 1], ("relu",), None)
    assert seen(lambda y, m: m(y.chunk(2, -1)[1]), nn.Linear(4, 6), nn.Linear(3, 2), 5, 4)[0] == [3, 4, 5]
    rows = seen(lambda y, m: m(y.flatten(2).transpose(1, 2)), conv(4, 3), nn.Linear(3, 2), 2, 4, 4, 4)
    assert rows == ([0, 1, 2], (), None)


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (lambda y, m: m(y) + y.mean(), "mean"),
        (lambda y, m: m(F.gelu(y)), "gelu"),
        (lambda y, m: m(F.relu6(y)), r"hardtanh \(ReLU6\)"),
        (lambda y, m: m(y + 1), "add"),
        (lambda y, m: m(y * y), "mul"),
        (lambda y, m: m(torch.div(y, 2, rounding_mode="floor")), "div"),
        (lambda y, m: m(y.mul_(torch.ones(4))), "mul_"),
        (lambda y, m: m(F.pad(y, (0, 1), value=1.0)), "constant_pad_nd"),
        (lambda y, m: m(y.mean(1, keepdim=True).expand(-1, 4, -1, -1)), "mean"),
        (lambda y, m: m(y.double().float()), "_to_copy"),
        (lambda y, m: m(y.view(torch.int32).view(torch.float32)), "view"),
        (lambda y, m: m(y) * float(y[0, 0, 0, 0]), "_local_scalar_dense"),
        (lambda y, m: m(torch.as_strided(y, (2, 4, 4, 4), y.stride())), "as_strided"),
        (lambda y, m: m(y.transpose(1, 2)), "second with its channels rearranged"),
    ],
)
def test_other_uses_are_named(function: Callable[..., Tensor], reader: str) -> None:
    reason = seen(function, conv(4, 4), conv(4, 4), 2, 4, 4, 4)[2]
    assert reason is not None and re.fullmatch(f"its output goes into {reader}", reason)


class Holder:
    """Not a type that torch knows how to look into."""

    def __init__(self, **values: object) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize("how", ["tuple", "object", "attribute", "view", "hook"])
def test_what_is_handed_out_or_kept_is_an_output(how: str) -> None:
    kept: list[Tensor] = []

    def function(y: Tensor, m: nn.Module) -> object:
        z = m(y)
        if how == "attribute":
            model.last = y
        return {"tuple": (z, y), "object": Holder(z=z, y=[y]), "view": (z, y[:, :1])}.get(how, z)

    model = Between(nn.Linear(4, 4), nn.Linear(4, 4), function)
    if how == "hook":
        model.first.register_forward_hook(lambda module, args, output: kept.append(output))
    nodes = graph(model, lambda: model(torch.randn(2, 4)))
    assert unshared(nodes["first"], nodes) == "its output goes into an output of the model, or is kept"


def test_a_hook_that_changes_the_output_lies_in_between() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output.sigmoid())
    nodes = graph(model, lambda: model(torch.randn(2, 4)))
    assert unshared(nodes["0"], nodes) == "its output goes into sigmoid"


def test_several_readers_are_several_edges() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})

    def run() -> Tensor:
        y = model["norm"](torch.randn(2, 3, 4))
        return model["q"](y) * model["k"](y.flatten(0, 1)).view(2, 3, 4)

    nodes = graph(model, run)
    assert [edge.consumer for edge in nodes["norm"].edges] == ["q", "k"] and unshared(nodes["norm"], nodes) is None
    assert unshared(nodes["q"], nodes) == "its output goes into mul"


def test_weights_that_are_not_a_layer_s_alone() -> None:
    model = nets.Functional()
    nodes = graph(model, lambda: model(torch.randn(3, 8)))
    assert [nodes[name].blocked for name in ("first", "twice", "unused")] == [
        None,
        "it is called 2 times in a pass",
        "the batch does not reach it",
    ]
    tied = nets.Tied()
    assert graph(tied, lambda: tied(torch.randn(3, 12)))["a"].blocked == "its weight is shared with b.weight"
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nodes = graph(plain, lambda: plain(torch.randn(2, 4)) + plain[0].weight.sum())
    assert nodes["0"].blocked == "its weight is read outside its own calls" and nodes["1"].blocked is None
    both = torch.randn(2, 4, 4)
    plain[0].weight.data, plain[1].weight.data = both  # two parameters, one piece of memory
    assert graph(plain, lambda: plain(torch.randn(2, 4)))["1"].blocked == "its weight is shared with 0.weight"


@pytest.mark.parametrize(("reads", "gives", "free"), [(9, 4, False), (8, 9, False), (4, 8, True)])
def test_a_layer_that_other_data_may_reach(reads: int, gives: int, free: bool) -> None:
    """4 channels of 2 pixels are read as 8: a layer with as many could be a second expert for either side."""
    model = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(8, 2))
    everything = nn.ModuleList([model, nn.Linear(reads, gives)])
    nodes = graph(everything, lambda: model(torch.randn(5, 3, 1, 2)))
    why = "1, which the batch does not reach, might on other data feed the same or read the same"
    assert unshared(nodes["0.0"], nodes) == (None if free else why)
    assert (rival(nodes["0.0"], nodes["0.2"], nodes) is None) == free


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_model_is_left_as_found(error: type[BaseException] | None) -> None:
    model = nets.resnet().train()
    before = bits(model)

    def run() -> Tensor:
        output = model(torch.randn(4, 3, 8, 8))
        if error is not None:
            raise error
        return output

    if error is None:
        graph(model, run)
    else:
        with pytest.raises(error):
            graph(model, run)
    assert bits(model) == before
