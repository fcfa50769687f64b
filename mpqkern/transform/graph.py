"""graph: which layer's output goes into which, for any model, seen in one pass and without tracing its code.

    stem ---> relu ---> conv1 ---> norm1          edges: stem -> conv1 through relu, conv1 -> norm1
                  \\---> add                       stem's output also goes into add: not conv1's alone

Nodes are the calls of layers and norms; what runs between them is seen as aten operations. From the output of a node
on, every tensor that is a copy, a view or a positively homogeneous function of it *carries* its channels: were
channel c of the output multiplied by s[c] > 0, each element of a carrier would be multiplied by the s of one channel,
and a tensor of labels, taken through the same views, says of which. A node that reads a carrier is an edge; whatever
else reads one (arithmetic, a softmax, a table of results) is a use out of which nobody can take the scale again. So is
being kept: a carrier that somebody still holds when the pass is over is an output of the model, or something like it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, strided
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..catalog import candidates
from ..held import held
from ..trees import stored

BY_CHANNEL = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # norms whose channels are axis 1

# Names of aten operations. Elements keep their place, and channels the scale:
SAME = {"clone", "relu", "relu_", "leaky_relu", "leaky_relu_", "abs", "neg"}
BY_NUMBER = {"mul", "mul_", "div", "div_"}  # the same, if the other operand is a number
# Elements move; labels move with them.
RESHAPES = {"view", "_unsafe_view", "_reshape_alias"}
VIEWS = {"transpose", "t", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "detach", "alias"}
VIEWS |= {"split", "split_with_sizes", "unbind"}
# Elements are merged within the last two axes, or over axes that are given.
POOLS = {"avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d"}
SUMS = {"mean", "sum", "amax"}
SPOKEN = {"hardtanh": "hardtanh (ReLU6)", "hardtanh_": "hardtanh (ReLU6)"}


@dataclass(frozen=True)
class Edge:
    consumer: str
    index: Tensor  # int64 [channels the consumer reads]: which channel of the producer each of them is
    ops: tuple[str, ...]  # what lies between, copies and views aside


@dataclass
class Node:
    """A layer (Linear, Conv2d) or a norm, and where its output went."""

    name: str
    module: nn.Module
    is_layer: bool
    trouble: str | None = None
    calls: int = 0
    reached: bool = False  # called, or its weight read by somebody else
    edges: list[Edge] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # uses that are no edge, for the reader

    @property
    def blocked(self) -> str | None:
        """Why its weights may not be changed; None if they may."""
        if self.calls != 1 and self.trouble is None:
            return f"it is called {self.calls} times in a pass" if self.calls else "the batch does not reach it"
        return self.trouble

    @property
    def axis(self) -> int:
        """Where the channels are, in what it reads and in what it gives."""
        return -3 if isinstance(self.module, nn.Conv2d) else 1 if isinstance(self.module, BY_CHANNEL) else -1


def graph(model: nn.Module, run: Callable[[], Any]) -> dict[str, Node]:
    """The nodes of `model` by their names, in order, as one `run()` of it shows them."""
    nodes = _nodes(model)
    flow = _Flow(_owners(model, nodes))
    with torch.inference_mode(False), held(model):  # which takes the hooks off again
        for node in nodes.values():
            # next to the module itself: what hooks of the user's own do with its output is outside
            node.module.register_forward_pre_hook(partial(flow.enter, node), with_kwargs=True)
            node.module.register_forward_hook(partial(flow.leave, node), prepend=True)
        with flow:
            output = run()
        flow.close()
    del output  # up to here it held what the model hands out
    return nodes


def unshared(node: Node, nodes: dict[str, Node]) -> str | None:
    """Why a scale of the node's output cannot be taken out again by layers that read it; None if it can."""
    if node.blocked:
        return node.blocked
    if node.others:
        return f"its output goes into {node.others[0]}"
    for edge in node.edges:
        consumer = nodes[edge.consumer]
        if not consumer.is_layer:
            return f"it feeds {edge.consumer}, a {type(consumer.module).__name__}"
        if consumer.blocked:
            return f"it feeds {edge.consumer}: {consumer.blocked}"
        if (other := rival(node, consumer, nodes)) is not None:
            return other
    return None if node.edges else "its output is not used"


def rival(producer: Node, consumer: Node, nodes: dict[str, Node]) -> str | None:
    """Why other data might go other ways: a layer that the batch does not reach has the channels to feed the consumer
    or to read the producer."""
    for node in nodes.values():
        if not node.reached and (_width(node, 0) == _width(producer, 0) or _width(node, 1) == _width(consumer, 1)):
            return f"{node.name}, which the batch does not reach, might on other data feed the same or read the same"
    return None


def _width(node: Node, side: int) -> int | None:
    """How many channels it gives (side 0) or reads (side 1)."""
    weight = node.module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return None
    if weight.dim() == 1 or side == 0:
        return weight.shape[0]
    return weight.shape[1] * getattr(node.module, "groups", 1)


def _nodes(model: nn.Module) -> dict[str, Node]:
    nodes = {c.module: Node(c.name, c.module, True, c.reason) for c in candidates(model)}
    for name, module in model.named_modules():
        if module not in nodes and _is_norm(module):
            own = "its forward was replaced on the instance" if "forward" in vars(module) else None
            nodes[module] = Node(name, module, False, own)
    return {nodes[m].name: nodes[m] for m in model.modules() if m in nodes}


def _is_norm(module: nn.Module) -> bool:
    """Batch norms, and whatever holds one weight a channel and perhaps a bias, and nothing else."""
    if "running_mean" in module._buffers:
        return True
    weight = module._parameters.get("weight")
    alone = not module._modules and set(module._parameters) <= {"weight", "bias"}
    return alone and weight is not None and not nn.parameter.is_lazy(weight) and weight.dim() == 1


def _owners(model: nn.Module, nodes: dict[str, Node]) -> dict[StorageWeakRef, Node]:
    """Whose weights each piece of memory holds; two modules that share one are both in trouble."""
    by_module = {node.module: node for node in nodes.values()}
    users: dict[StorageWeakRef, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and not nn.parameter.is_lazy(tensor) and tensor.layout == strided and tensor.numel():
                users.setdefault(StorageWeakRef(tensor.untyped_storage()), []).append((f"{name}.{key}", module))
    owners: dict[StorageWeakRef, Node] = {}
    for place, found in users.items():
        for i, (_, module) in enumerate(found):
            if module in by_module:
                owners[place] = node = by_module[module]
                if len(found) > 1:
                    node.trouble = node.trouble or f"its weight is shared with {found[i - 1][0]}"
    return owners


@dataclass
class _Carrier:
    tensor: Tensor  # kept, so that nothing else gets its id
    node: Node
    labels: Tensor  # of the tensor's shape: the channel of the node's output whose scale each element has
    ops: tuple[str, ...]


class _Flow(TorchDispatchMode):
    """Follows carriers from node to node."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; to say so, torch would import its compiler, which takes seconds

    def __init__(self, owners: dict[StorageWeakRef, Node]) -> None:
        super().__init__()
        self.owners = owners
        self.inside: list[Node] = []  # whose forward is running
        self.carriers: dict[int, _Carrier] = {}  # by the id of the tensor
        self.places: dict[StorageWeakRef, Node] = {}  # memory that carriers lie in, also through views not seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = stored((args, kwargs))
        for tensor in read:
            owner = self.owners.get(StorageWeakRef(tensor.untyped_storage()))
            if owner is not None:
                owner.reached = True
                if not self.inside or self.inside[-1] is not owner:
                    owner.trouble = owner.trouble or "its weight is read outside its own calls"
        if not self.inside:
            met = [tensor for tensor in read if StorageWeakRef(tensor.untyped_storage()) in self.places]
            if met:
                self._pass_on(func, args, kwargs, output, met)
        return output

    def enter(self, node: Node, module: nn.Module, args: tuple, kwargs: dict) -> None:
        for tensor in stored((args, kwargs)):
            producer = self.places.get(StorageWeakRef(tensor.untyped_storage()))
            if producer is None:
                continue
            carrier = self.carriers.get(id(tensor))
            index = None if carrier is None else _index(carrier.labels, node.axis)
            if carrier is None or index is None:
                producer.others.append(f"{node.name} with its channels rearranged")
            else:
                producer.edges.append(Edge(node.name, index, carrier.ops))
        node.calls, node.reached = node.calls + 1, True
        self.inside.append(node)

    def leave(self, node: Node, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside.pop()
        if not isinstance(output, Tensor) or output.layout != strided:
            return
        if output.dim() < (node.axis + 1 if node.axis >= 0 else -node.axis):
            return
        weight, channels = module._parameters.get("weight"), output.shape[node.axis]
        if weight is not None and weight.shape[0] != channels:
            return
        labels = torch.arange(channels, dtype=torch.int32)
        labels = labels.view(-1, *[1] * (output.dim() - node.axis % output.dim() - 1)).expand(output.shape)
        self._carry(_Carrier(output, node, labels, ()))

    def close(self) -> None:
        """After the pass: lets go of everything and sees what others still hold."""
        self.carriers.clear()
        gc.collect()
        for place, node in self.places.items():
            if not place.expired():
                node.others.append("an output of the model, or is kept")

    def _carry(self, carrier: _Carrier) -> None:
        self.carriers[id(carrier.tensor)] = carrier
        self.places[StorageWeakRef(carrier.tensor.untyped_storage())] = carrier.node

    def _pass_on(self, func: Any, args: tuple, kwargs: dict, output: Any, met: list[Tensor]) -> None:
        """An operation outside all nodes has read carriers: is its output one too?"""
        name = func._schema.name.removeprefix("aten::")
        carrier = self.carriers.get(id(met[0]))
        labels = None
        if carrier is not None and len(met) == 1 and args and args[0] is met[0]:
            labels = _labels(name, func, args, kwargs, carrier, output)
        if carrier is None or labels is None:
            for tensor in met:
                self.places[StorageWeakRef(tensor.untyped_storage())].others.append(SPOKEN.get(name, name))
            return
        moved = name == "clone" or name in RESHAPES | VIEWS
        ops = carrier.ops if moved else (*carrier.ops, name.rstrip("_"))
        if func._schema.is_mutable:  # so it has been done to all that lie in the same memory
            place = StorageWeakRef(carrier.tensor.untyped_storage())
            for other in self.carriers.values():
                if StorageWeakRef(other.tensor.untyped_storage()) == place:
                    other.ops = ops
            return
        for tensor, named in zip(stored(output), labels, strict=False):  # indices of a pool come second
            self._carry(_Carrier(tensor, carrier.node, named, ops))


def _labels(name: str, func: Any, args: tuple, kwargs: dict, carrier: _Carrier, output: Any) -> list[Tensor] | None:
    """The labels of what an operation made of a carrier; None where a scale of channels does not get through."""
    labels, outputs = carrier.labels, stored(output)
    if not outputs or outputs[0].dtype != carrier.tensor.dtype:
        return None
    shape = outputs[0].shape
    number = name in BY_NUMBER and isinstance(args[1], (int, float)) and not kwargs
    if name in SAME or number:
        return [labels]
    if name in RESHAPES:
        return [labels.reshape(shape)]
    if name in VIEWS:
        return stored(func(labels, *args[1:], **kwargs))
    if name in SUMS and len(args) > 1:
        return _merged(labels, args[1], shape)
    zeros = name == "constant_pad_nd" and len(args[1]) <= 4 and not (args[2] if len(args) > 2 else kwargs.get("value"))
    if (name in POOLS or zeros) and labels.shape[:-2] == shape[:-2]:
        return _merged(labels, [-2, -1], shape)
    return None


def _merged(labels: Tensor, axes: Any, shape: torch.Size) -> list[Tensor] | None:
    """Labels after elements along `axes` were merged: they must have been the same there."""
    low, high = (reduce(axes, keepdim=True) for reduce in (labels.amin, labels.amax))
    if not torch.equal(low, high):
        return None
    return [low.expand(shape) if len(shape) == labels.dim() else low.reshape(shape)]


def _index(labels: Tensor, axis: int) -> Tensor | None:
    """One label for each channel along `axis`, if all elements there have the same."""
    if not labels.numel() or labels.dim() < (axis + 1 if axis >= 0 else -axis):
        return None
    flat = labels.movedim(axis, 0).flatten(1)
    index = flat[:, 0]
    return index.long() if torch.equal(flat, index.unsqueeze(1).expand_as(flat)) else None
