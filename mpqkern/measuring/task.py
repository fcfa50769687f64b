"""Task: a model to be measured, the batches to measure it on, how to run it and what its loss is."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .. import select
from ..catalog import Forward, batches_of, candidates, described, feed
from ..held import held
from ..scheme import Layer
from ..trees import tensors
from .attributes import attributes

log = logging.getLogger("mpqkern")

LOSSES = ("ce", "kl")
Loss = Callable[[Any, Any], Tensor]


class Task:
    """What every method works on.

    A batch is a tensor of inputs, an (inputs, labels) pair as data loaders give it, or a dict of keywords with
    the labels, if any, under "labels" (labels that repeat "input_ids" are those of a language model and are shifted
    by one); `batches` is a list or any other iterable of such, and a single tensor, tuple or dict is one batch.
    `forward(model, batch)` and `loss(output, batch)`, one loss a sample, replace what is done with anything else. The
    loss is cross-entropy where there are labels, and otherwise the Kullback-Leibler divergence from the model as it
    is; "ce" or "kl" asks for one of them.

    `layers` are the layers to score, with multiply-adds a sample. Layers that share a weight can only have one
    scheme, so they count as one, under the first one's name; `modules[i]` are all modules of layer i.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        layers: Sequence[str] | None = None,
        forward: Forward | None = None,
        loss: str | Loss | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__}; wanted a torch.nn.Module")
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss={loss!r}; wanted 'ce', 'kl' or a callable loss(output, batch)")
        if isinstance(layers, str):  # whose letters may be names of layers too
            raise TypeError(f"layers={layers!r}; wanted a list of patterns")
        self.model = model
        self.device = next((t.device for t in model.parameters()), torch.device("cpu"))
        self.batches = batches_of(batches, model)
        self.sizes = [batch_size(batch) for batch in self.batches]
        if min(self.sizes) == 0:
            raise ValueError(f"batches[{self.sizes.index(0)}] holds no samples; wanted at least one")
        odd = [b for b in self.batches if isinstance(b, (tuple, list)) and len(b) != 2]
        if odd and (forward is None or loss is None):
            raise ValueError(
                f"a batch is a {type(odd[0]).__name__} of {len(odd[0])}; wanted a tensor, an (inputs, labels) pair "
                "or a dict, or forward= and loss="
            )
        if len({self.labels(i) is None for i in range(len(self.batches))}) > 1:
            raise ValueError("some batches have labels and some have none; wanted the same kind throughout")
        self._forward, self._loss = forward, loss
        self._float_logits: dict[int, Tensor] = {}
        first, before = self.batches[0], attributes(model)
        found = described(model, lambda: self.run(first))
        after = attributes(model)  # a counter or a cache, which a run changes, is no setting
        self.attributes = {name: value for name, value in before.items() if after.get(name) == value}
        if layers is not None:
            kinds = {c.name: c.kinds for c in candidates(model) if c.reason is None}
            wanted = {name for pattern in layers for name in select.matches(pattern, kinds)}
            found = [layer for layer in found if layer.name in wanted]
        if not found:
            reasons = [f"; {c.name or 'the model'}: {c.reason}" for c in candidates(model) if c.reason]
            more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            raise ValueError(
                f"model={type(model).__name__} has no layer that can be packed{''.join(reasons[:3])}{more}"
            )
        shared: dict[int, list[Layer]] = {}
        for layer in found:
            shared.setdefault(id(model.get_submodule(layer.name).weight), []).append(layer)
        self.layers = [self._one(twins) for twins in shared.values()]
        self.modules = [[model.get_submodule(twin.name) for twin in twins] for twins in shared.values()]
        missed = [layer.name for layer in self.layers if not layer.macs]
        if missed:
            log.warning("the first batch does not reach %s: nothing can be measured there", ", ".join(missed))

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def run(self, batch: Any) -> Any:
        """The model's output for a batch."""
        if self._forward is not None:
            return self._forward(self.model, batch)
        return feed(self.model, batch)

    def answer(self, batch: Any) -> Any:
        """What the losses need of the model's output: the logits, or all of it for a loss of one's own."""
        output = self.run(batch)
        return output if callable(self._loss) else logits_of(output)

    def losses(self, output: Any, index: int) -> Tensor:
        """float64 [samples]: the loss of each sample of `self.batches[index]`; raises where one is NaN, at once and not
        after hours of measuring."""
        values = self._losses(output, index)
        if values.isnan().any():
            count = int(values.isnan().sum())
            raise ValueError(
                f"the {self.loss_name} loss is nan for {count} of the {len(values)} samples of batches[{index}]; "
                "wanted inputs and weights for which the model's outputs are finite"
            )
        return values

    def _losses(self, output: Any, index: int) -> Tensor:
        batch, size = self.batches[index], self.sizes[index]
        if callable(self._loss):
            values = self._loss(output, batch)
            if not isinstance(values, Tensor) or values.shape != (size,):
                shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"loss(output, batch) returned {shape}; wanted one loss a sample, a tensor [{size}]")
            return values.double()
        if self.loss_name == "kl":
            return self.divergences(output, index)
        labels, logits = self.labels(index), logits_of(output)
        if labels is None:
            raise ValueError("loss='ce' but the batches hold no labels; wanted (inputs, labels) pairs or loss='kl'")
        if _repeats_inputs(batch):
            labels, logits = labels[:, 1:], logits[:, :-1]
        return cross_entropy(logits, labels)

    def divergences(self, output: Any, index: int) -> Tensor:
        """float64 [samples]: Kullback-Leibler divergence from the model as it is; needs its answers, see `prepare`."""
        return divergence(self._reference(index), logits_of(output))

    def mistakes(self, output: Any, index: int) -> Tensor:
        """float64 [samples]: the share of wrong answers; without labels, of answers that have changed."""
        logits, labels = logits_of(output), self.labels(index)
        wanted = self._reference(index).argmax(-1) if labels is None else labels
        wrong = (logits.argmax(-1) != wanted) & (wanted >= 0)
        return wrong.double().flatten(1).mean(1) if wrong.dim() > 1 else wrong.double()

    @property
    def loss_name(self) -> str:
        if callable(self._loss):
            return getattr(self._loss, "__qualname__", "callable")
        return self._loss or ("ce" if self.labels(0) is not None else "kl")

    @property
    def from_itself(self) -> bool:
        """Whether the loss is the divergence from the model as it is: there it is 0, and so is its gradient."""
        return not callable(self._loss) and self.loss_name == "kl"

    def labels(self, index: int) -> Tensor | None:
        batch = self.batches[index]
        if isinstance(batch, Mapping):
            return batch.get("labels")
        return batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None

    def digest(self, index: int) -> str:
        """Names a batch by its contents."""
        return digest(tree_flatten(self.batches[index])[0])

    def fingerprint(self) -> dict[str, str]:
        """What measurements depend on besides the batch: weights, structure, loss."""
        state = [*self.model.named_parameters(), *self.model.named_buffers()]  # also buffers that are not saved
        return {
            "model": digest([str(self.model), *(item for pair in sorted(state, key=lambda p: p[0]) for item in pair)]),
            "attributes": digest(self.attributes.items()),
            "layers": digest([layer.name for layer in self.layers]),
            "loss": source(self._loss) if callable(self._loss) else self.loss_name,
            "forward": "" if self._forward is None else source(self._forward),
        }

    def split(self, most: int) -> Task:
        """The same task, not `prepare`d, in batches of at most so many samples.

        A batch with a tensor for all samples stays whole.
        """
        task = copy(self)
        task.batches = [
            part for batch, size in zip(self.batches, self.sizes, strict=True) for part in _cut(batch, size, most)
        ]
        task.sizes = [batch_size(batch) for batch in task.batches]
        task._float_logits = {}
        return task

    def _reference(self, index: int) -> Tensor:
        """Logits of the model as it is. A method of losses calls `prepare` first."""
        if index not in self._float_logits:
            raise RuntimeError("the float model's answers were not recorded; wanted Task.prepare() first")
        return self._float_logits[index]

    def prepare(self, *, answers: bool = False) -> None:
        """Records the model's own answers where the loss compares with them, or where they are asked for."""
        if not answers and (callable(self._loss) or self.loss_name == "ce"):
            return
        with held(self.model):
            for index, batch in enumerate(self.batches):
                if index not in self._float_logits:
                    self._float_logits[index] = logits_of(self.run(batch))

    def _one(self, twins: list[Layer]) -> Layer:
        """For layers that share a weight; budgets count multiply-adds of one sample."""
        return replace(twins[0], macs=sum(twin.macs or 0 for twin in twins) // self.sizes[0])


def logits_of(output: Any) -> Tensor:
    """The tensor that holds class scores: the output itself, its `logits`, or its first element."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ValueError(f"the model returned {type(output).__name__}; wanted logits, or give forward= and loss=")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [samples] from [samples, ..., classes]; over all but the samples the mean; labels < 0 are left out."""
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)} for logits {list(logits.shape)}; "
            f"wanted class numbers {list(logits.shape[:-1])}, or give loss="
        )
    classes, top = logits.shape[-1], int(labels.max()) if labels.numel() else 0
    if top >= classes:
        raise ValueError(f"labels reach {top} for logits of {classes} classes; wanted 0 to {classes - 1}, or below 0")
    counted = labels >= 0
    values = F.cross_entropy(logits.double().flatten(0, -2), labels.clamp(min=0).flatten().long(), reduction="none")
    values = values.view(labels.shape) * counted
    if values.dim() == 1:
        return values
    return values.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """float64 [samples]: KL(softmax(reference) || softmax(logits)), over all but the samples the mean."""
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(logits.double(), -1)
    values = (p.exp() * (p - q)).sum(-1)
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def _repeats_inputs(batch: Any) -> bool:
    """Labels that are the inputs again, as Hugging Face's causal language models take them and shift by one."""
    if not isinstance(batch, Mapping) or "labels" not in batch or "input_ids" not in batch:
        return False
    labels, ids = batch["labels"], batch["input_ids"]
    return labels.shape == ids.shape and labels.dim() == 2 and bool(((labels == ids) | (labels < 0)).all())


def batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension of its first tensor."""
    for leaf in tensors(batch):
        if leaf.dim() > 0:
            return leaf.shape[0]
    raise ValueError(f"a batch is {type(batch).__name__} without tensors; wanted a tensor, a pair or a dict")


def _cut(batch: Any, size: int, most: int) -> list[Any]:
    if size <= most or any(leaf.shape[:1] != (size,) for leaf in tensors(batch)):
        return [batch]

    def take(start: int) -> Callable[[Any], Any]:
        return lambda leaf: leaf[start : start + most] if isinstance(leaf, Tensor) else leaf

    return [tree_map(take(start), batch) for start in range(0, size, most)]


def source(function: Callable[..., Any]) -> str:
    """Names a function by what it does: its code, its constants and what it has closed over."""
    name = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function, "__code__", None)
    if code is None:
        return name
    inside = [cell.cell_contents for cell in function.__closure__ or () if _is_plain(cell)]
    consts = [c for c in code.co_consts if isinstance(c, (int, float, str, bool, tuple, type(None)))]
    return f"{name} {digest([code.co_code.hex(), consts, code.co_names, inside, function.__defaults__])}"


def _is_plain(cell: Any) -> bool:
    try:
        return isinstance(cell.cell_contents, (int, float, str, bool, tuple, type(None)))
    except ValueError:
        return False  # not yet filled


def digest(values: Iterable[Any]) -> str:
    """16 hexadecimal digits that name these values by their contents."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype}{list(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()[:16]
