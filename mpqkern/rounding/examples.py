"""Examples: what a part of a model is given in the rounded model so far, and what it returns in the float model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..held import hooked
from ..measuring.task import Task
from ..trees import bytes_in, copied, tensors
from .partition import Part
from .twin import Twin

log = logging.getLogger("mpqkern")

Given = tuple[tuple, dict]  # arguments and keywords of a call
Chain = tuple[nn.Module, ...]
Run = Callable[[nn.Module, tuple, dict], Any]

TOLERANCE = 1e-3  # of the largest output: sums may run in another order for fewer samples


class CannotRepeat(RuntimeError):
    """A part returns something else when it is called again, or nothing that can be compared."""


@dataclass(frozen=True)
class Example:
    """One call of a part. Its samples lie along the first axis and can be taken apart, unless `whole`."""

    chain: Chain
    given: Given
    float_given: Given | None  # None: it was not asked for
    wanted: Tensor
    whole: bool

    @property
    def size(self) -> int:
        return len(self.wanted)

    @property
    def bytes(self) -> int:
        return bytes_in((self.given, self.float_given, self.wanted))

    def piece(self, picked: Tensor | None, drop: float, draw: torch.Generator) -> tuple[Given, Tensor]:
        """Samples `picked` (None: all) and what is wanted for them; of the float model's inputs a share `drop`."""
        given = taken(self.given, self.size, picked)
        if drop:
            given = _mixed(given, taken(self.float_given, self.size, picked), drop, draw)
        return given, self.wanted if picked is None else self.wanted[picked]


def examples(task: Task, part: Part, twin: Twin | None, *, both: bool, memory: int) -> list[Example]:
    """Of all batches, or of as many as fit into `memory` bytes. `both` is whether the float model's inputs are kept."""
    found: list[Example] = []
    used = 0
    for index in range(len(task.batches)):
        floats = list(_calls(task, index, part))
        with twin or nullcontext():
            met = floats if twin is None else list(_calls(task, index, part))
        if [_shape(call) for call in floats] != [_shape(call) for call in met]:
            log.warning("batch %d goes another way in the rounded model: %s does not use it", index, part.name)
            continue
        new = []
        for (chain, float_given, wanted), (_, given, _) in zip(floats, met, strict=True):
            whole = not _comes_apart(chain, float_given, wanted)
            new.append(Example(chain, given, float_given if both else None, wanted, whole))
        used += sum(example.bytes for example in new)
        if used > memory:
            if not found:
                raise ValueError(f"memory={memory}; wanted at least {used} bytes for one batch of {part.name}")
            log.warning("memory=%d holds %d of %d batches of %s", memory, index, len(task.batches), part.name)
            break
        found += new
    if not found:
        raise CannotRepeat("the rounded model goes another way for all batches")
    return found


def run(chain: Chain, given: Given, call: Run = lambda module, args, kwargs: module(*args, **kwargs)) -> Tensor:
    """What the chain returns, each module called by `call`."""
    args, kwargs = given
    for module in chain:
        output = call(module, args, kwargs)
        args, kwargs = (output,), {}
    return _main(output)


def taken(given: Given, size: int, picked: Tensor | None) -> Given:
    """A copy of what a call of `size` samples is given, or of some of them; what is for all of them stays whole."""

    def take(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[picked] if leaf.shape[:1] == (size,) else leaf.clone()

    return copied(given) if picked is None else tree_map(take, given)


def _calls(task: Task, index: int, part: Part) -> Iterator[tuple[Chain, Given, Tensor]]:
    """The part's calls in a pass over a batch: what is given, and the output."""
    found: list[tuple[Chain, Given, Tensor]] = []
    pending: dict[Chain, Given] = {}

    def begin(chain: Chain) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            pending[chain] = copied((args, kwargs))

        return hook

    def end(chain: Chain) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if chain in pending:
                found.append((chain, pending.pop(chain), _main(output).detach().clone()))

        return hook

    begins = (chain[0].register_forward_pre_hook(begin(chain), with_kwargs=True) for chain in part.chains)
    ends = (chain[-1].register_forward_hook(end(chain)) for chain in part.chains)
    with hooked(begins), hooked(ends):
        task.run(task.batches[index])
    for _, _, wanted in found:
        if not wanted.isfinite().all():
            raise ValueError(f"{part.name!r} returns infinities or NaN; wanted finite outputs")
    yield from found


def _main(output: Any) -> Tensor:
    """The tensor that is compared: the output, or the first of its tensors."""
    for leaf in tensors(output):
        if leaf.is_floating_point() and leaf.dim() > 0:
            return leaf
    raise CannotRepeat(f"it returns {type(output).__name__} without a tensor of numbers")


def _shape(call: tuple[Chain, Given, Tensor]) -> Any:
    chain, given, wanted = call
    return chain, wanted.shape, [leaf.shape for leaf in tensors(given)]


def _comes_apart(chain: Chain, given: Given, wanted: Tensor) -> bool:
    """Whether each sample's output is its own, found by trying. Calling the chain again has to give the same."""
    if not close(run(chain, copied(given)), wanted, TOLERANCE):
        raise CannotRepeat("it returns something else when it is called again")
    picked = torch.arange(1, len(wanted), 2, device=wanted.device)
    if not len(picked):
        return False
    try:
        return close(run(chain, taken(given, len(wanted), picked)), wanted[picked], TOLERANCE)
    except Exception:  # whatever the model's own code does with fewer samples than it expects
        return False


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether `a` is off by no more than so much of the largest of `b`; what is not float has to be the same."""
    if a.shape != b.shape or not a.is_floating_point() or a.numel() == 0:
        return torch.equal(a, b)
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _mixed(given: Given, others: Given, share: float, draw: torch.Generator) -> Given:
    """Each element from `others` with probability `share`."""
    leaves, spec = tree_flatten(given)
    mixed = [
        torch.where((torch.rand(a.shape, generator=draw) < share).to(a.device), b, a)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a, b in zip(leaves, tree_flatten(others)[0], strict=True)
    ]
    return tree_unflatten(mixed, spec)
