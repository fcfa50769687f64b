"""partition: which layers of a model are rounded together, so that an error in one can be made up for in another.

Told by hooks on one pass, without reading the model's code. What is called several times, or shares a weight with
something outside, cannot be a part as a whole: its layers are parts of their own.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import select
from ..held import hooked
from ..measuring.task import Task

log = logging.getLogger("mpqkern")

Partition = str | Sequence[str]
WANTED = "'layer', 'block', 'unit:2' (or more), or names of modules"


@dataclass(frozen=True)
class Part:
    """Layers (by their index in the task) in the order of their first calls, and what computes with them.

    A chain's modules are called one after the other, each with nothing but the output of the one before. There is
    more than one chain where modules share a weight.
    """

    name: str
    layers: tuple[int, ...]
    chains: tuple[tuple[nn.Module, ...], ...]


@dataclass(eq=False)
class Call:
    """One call of a module, and the calls that returned just what it is given, if that is a single tensor."""

    module: nn.Module
    start: int  # of a clock that ticks at each start
    given: list[Call] = field(default_factory=list)


def checked(partition: Partition) -> Partition:
    """A partition as an option may hold it, or an error."""
    if isinstance(partition, str):
        kind, _, count = partition.partition(":")
        if partition in ("layer", "block") or (kind == "unit" and count.isdecimal() and int(count) > 0):
            return partition
    elif isinstance(partition, Sequence) and partition and all(isinstance(name, str) for name in partition):
        return tuple(partition)
    raise ValueError(f"partition={partition!r}; wanted {WANTED}")


def parts(task: Task, partition: Partition) -> list[Part]:
    """The parts in the order in which the model calls them; layers that no batch reaches are in none.

    "layer"   every layer alone
    "block"   residual blocks, transformer layers: what stands in a row in an nn.Sequential or nn.ModuleList and
              holds two layers or more, but no such row itself; other layers alone
    "unit:k"  up to k parts of "block" where each one's output is all that the next is given; modules in between
              that hold no layer are taken in (Gu et al. 2022, arXiv 2201.06376)
    names     of modules, or patterns for them; other layers alone
    """
    partition = checked(partition)
    calls = trace(task, 0)
    if partition == "layer":
        blocks = []
    elif isinstance(partition, str):
        blocks = list(_blocks(task, calls))
    else:
        blocks = _named(task, partition)
    blocks = [block for block in blocks if _whole(task, block, calls)]
    found = _ordered(task, blocks, calls)
    if isinstance(partition, str) and partition.startswith("unit:"):
        found = _units(task, found, calls, int(partition.removeprefix("unit:")))
    reached = {layer for part in found for layer in part.layers}
    for index in range(1, len(task.batches)):  # a model may call other layers for other batches
        if len(reached) == len(task.layers):
            break
        others = [p for p in _ordered(task, [], trace(task, index)) if p.layers[0] not in reached]
        found += others
        reached |= {part.layers[0] for part in others}
    return found


def alone(task: Task, layer: int) -> Part:
    return Part(task.layers[layer].name, (layer,), tuple((module,) for module in task.modules[layer]))


def trace(task: Task, index: int) -> list[Call]:
    """All calls in a pass over batch `index`, in the order of their starts."""
    calls: list[Call] = []
    pending: list[Call] = []
    # Outputs by id: who returned them and how often they had been written to by then. They are not kept alive.
    returned: dict[int, list[tuple[weakref.ref[Tensor], int, Call]]] = {}

    def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = Call(module, len(calls))
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not args[0].is_inference():
            x = args[0]
            call.given = [who for ref, version, who in returned.get(id(x), []) if ref() is x and version == x._version]
        calls.append(call)
        pending.append(call)

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        call = pending.pop()
        if isinstance(output, Tensor) and not output.is_inference():
            returned.setdefault(id(output), []).append((weakref.ref(output), output._version, call))

    modules = list(task.model.modules())
    begins = (module.register_forward_pre_hook(begin, with_kwargs=True) for module in modules)
    ends = (module.register_forward_hook(end) for module in modules)
    with hooked(begins), hooked(ends):
        task.run(task.batches[index])
    return calls


def called_once(task: Task) -> set[nn.Module]:
    """The modules that a pass over the first batch calls just once."""
    return {module for module, count in Counter(call.module for call in trace(task, 0)).items() if count == 1}


def _inside(task: Task, module: nn.Module) -> list[int]:
    """Layers with a module in `module`."""
    own = set(module.modules())
    return [layer for layer, modules in enumerate(task.modules) if own & set(modules)]


def _blocks(task: Task, calls: Sequence[Call]) -> Iterator[nn.Module]:
    called = {call.module for call in calls}
    rows: dict[nn.Module, list[nn.Module]] = {}  # containers, and what may be a block in each
    for container in task.model.modules():
        if isinstance(container, (nn.Sequential, nn.ModuleList)):
            rows[container] = [m for m in container if m in called and len(_inside(task, m)) > 1]
    taken: set[nn.Module] = set()
    for row in rows.values():  # from the outside to the inside
        for module in row:
            deeper = any(len(rows[m]) > 1 for m in module.modules() if m in rows)
            if not deeper and module not in taken:
                taken |= set(module.modules())
                yield module


def _named(task: Task, patterns: Sequence[str]) -> list[nn.Module]:
    kinds = {name: select.type_names(type(m).__mro__) for name, m in task.model.named_modules() if name}
    names = dict.fromkeys(name for pattern in patterns for name in select.matches(pattern, kinds))
    modules = [m for m in map(task.model.get_submodule, names) if _inside(task, m)]
    for a, outer in zip(names, modules, strict=False):
        for b, inner in zip(names, modules, strict=False):
            if outer is not inner and inner in set(outer.modules()):
                raise ValueError(f"partition={list(patterns)!r} has {b!r} within {a!r}; wanted no part within another")
    return modules


def _whole(task: Task, module: nn.Module, calls: Sequence[Call]) -> bool:
    """Whether a module can be a part; says why not."""
    own, count = set(module.modules()), sum(call.module is module for call in calls)
    shared = [task.layers[layer].name for layer in _inside(task, module) if not set(task.modules[layer]) <= own]
    why = f"it is called {count} times in a pass" if count != 1 else ""
    if shared:
        why = f"{shared[0]} shares its weight with a layer outside"
    if why:
        log.warning("%s is rounded layer by layer: %s", _name(task, module), why)
    return not why


def _name(task: Task, module: nn.Module) -> str:
    return next(name for name, m in task.model.named_modules() if m is module)


def _ordered(task: Task, blocks: Sequence[nn.Module], calls: Sequence[Call]) -> list[Part]:
    starts: dict[nn.Module, int] = {}
    for call in calls:
        starts.setdefault(call.module, call.start)
    first = {
        layer: min(starts[m] for m in modules if m in starts)
        for layer, modules in enumerate(task.modules)
        if any(m in starts for m in modules)
    }
    found: dict[Part, int] = {}
    for block in blocks:
        layers = sorted((layer for layer in _inside(task, block) if layer in first), key=first.__getitem__)
        if layers:
            found[Part(_name(task, block), tuple(layers), ((block,),))] = starts[block]
    covered = {layer for part in found for layer in part.layers}
    found |= {alone(task, layer): start for layer, start in first.items() if layer not in covered}
    return sorted(found, key=found.__getitem__)


def _units(task: Task, found: Sequence[Part], calls: Sequence[Call], most: int) -> list[Part]:
    once: dict[nn.Module, Call | None] = {}
    for call in calls:
        once[call.module] = None if call.module in once else call
    layers = {module for modules in task.modules for module in modules}
    units: list[Part] = []
    held = 0  # parts in the last unit
    for part in found:
        glue = None
        if units and held < most and len(part.chains) == len(units[-1].chains) == 1:
            last, first = once[units[-1].chains[0][-1]], once[part.chains[0][0]]
            glue = None if last is None or first is None else _between(last, first, layers)
        if glue is None:
            units.append(part)
            held = 1
        else:
            before = units[-1]
            chain = (*before.chains[0], *glue, *part.chains[0])
            units[-1] = Part(f"{before.name}, {part.name}", before.layers + part.layers, (chain,))
            held += 1
    return units


def _between(last: Call, first: Call, layers: set[nn.Module]) -> list[nn.Module] | None:
    """The modules from the output of `last` to the input of `first`, none of which holds a layer; None: no way."""
    for call in first.given:
        if call is last:
            return []
    for call in first.given:
        if not layers & set(call.module.modules()):
            way = _between(last, call, layers)
            if way is not None:
                return [*way, call.module]
    return None
