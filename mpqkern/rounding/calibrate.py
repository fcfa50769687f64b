"""calibrate: a model, what is planned for its layers and some batches in, codes for every weight out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..catalog import candidates
from ..held import held
from ..measuring.bank import Bank
from ..measuring.meter import Meter
from ..measuring.task import Forward, Task, digest
from ..numbers import check_flag, check_number
from ..packed import weight_rows
from ..planned import planned
from ..scheme import Scheme
from ..version import __version__
from .grid import Codes
from .layerwise import layer_by_layer
from .method import Rounding, as_rounding
from .reconstruct import part_by_part
from .twin import Twin

log = logging.getLogger("mpqkern")


@dataclass(frozen=True, repr=False)
class Rounded(Mapping[str, Codes]):
    """The codes of each layer by its name, and by what they were found; `swap_(model, plan, rounding=...)` takes it."""

    codes: Mapping[str, Codes]
    schemes: Mapping[str, Scheme]
    rounding: Rounding
    weights: Mapping[str, str]  # digests of the float weights that the codes stand for

    def __repr__(self) -> str:
        return f"Rounded({len(self)} layers, {self.rounding!r})"

    def __getitem__(self, name: str) -> Codes:
        return self.codes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.codes)

    def __len__(self) -> int:
        return len(self.codes)

    def check_weight(self, name: str, weight: Tensor) -> None:
        """Codes for another weight, of a model that was trained or rewritten since, would be noise."""
        if digest([weight]) != self.weights[name]:
            raise ValueError(f"layer {name!r} has another weight than it was rounded from; wanted calibrate once more")

    def twin(self, model: nn.Module) -> Twin:
        """Within `with rounded.twin(model):` the float model computes with these codes, as its packed self would."""
        found, twin = candidates(model), Twin()
        for c in found:
            if c.name in self.codes:
                self.check_weight(c.name, c.module.weight)
                modules = [o.module for o in found if o.module._parameters.get("weight") is c.module.weight]
                twin.put(c.name, modules, self.codes[c.name], self.schemes[c.name])
        return twin


@dataclass
class Calibration:
    """One run: what there is to round, and what is done already. Layers go by their index in `task.layers`."""

    task: Task
    schemes: list[Scheme]
    rounding: Rounding
    correct_bias: bool
    bank: Bank
    meter: Meter
    memory: int
    seed: int
    twin: Twin = field(default_factory=Twin)
    done: dict[int, Codes] = field(default_factory=dict)

    def rows(self, layer: int) -> Tensor:
        """The float weight [N, K], on the CPU as all that is decided is. Not inside the twin."""
        return weight_rows(self.task.modules[layer][0].weight.detach()).float().cpu()

    def recall(self, layer: int) -> bool:
        """Whether the bank has this layer; if so it is taken over."""
        found = self._banked(layer)
        if found is not None:
            self._take(layer, found, made=False)
        return layer in self.done

    def recall_all(self, layers: Sequence[int]) -> bool:
        """Whether the bank has all of these layers; if so they are taken over, else none of them."""
        return all(layer in self.done or self._banked(layer) is not None for layer in layers) and all(
            [self.recall(layer) for layer in layers]
        )

    def _banked(self, layer: int) -> Codes | None:
        """What the bank has for a layer that is not done yet."""
        key, scheme = self._key(layer), self.schemes[layer]
        if layer in self.done or key not in self.bank:
            return None
        codes = Codes.read(self.bank[key], *weight_rows(self.task.modules[layer][0].weight).shape, scheme)
        if codes is None:
            name = self.task.layers[layer].name
            log.warning("bank=%r holds no codes for layer %r; it is rounded again", str(self.bank.path), name)
        return codes

    def put(self, layer: int, codes: Codes) -> None:
        """Keeps the result for a layer; whatever is measured afterwards in the twin reckons with it."""
        self.put_all({layer: codes})

    def put_all(self, found: Mapping[int, Codes]) -> None:
        """The same for layers that were rounded together: all are in the bank before a limit can stop the run."""
        for layer, codes in found.items():
            self.bank.put(self._key(layer), **codes.arrays())
        for layer, codes in found.items():
            self._take(layer, codes, made=True)

    def _take(self, layer: int, codes: Codes, made: bool) -> None:
        self.done[layer] = codes
        self.twin.put(self.task.layers[layer].name, self.task.modules[layer], codes, self.schemes[layer])
        self.meter.step(self.task.layers[layer].name, made=made)

    @staticmethod
    def _key(layer: int) -> str:
        return f"layer{layer}"


def calibrate(
    model: nn.Module,
    plan: Mapping[str | type, Scheme | int | None] | Scheme | int | Any,
    batches: Any,
    *,
    rounding: str | Rounding = "gptq",
    correct_bias: bool = False,
    forward: Forward | None = None,
    bank: str | os.PathLike[str] | None = None,
    seed: int = 0,
    memory: int = 2**30,
    time_limit: float | None = None,
    progress: bool | None = None,
) -> Rounded:
    """Rounds the layers that `plan` selects (see `swap_`), in the order in which the model calls them.

    Each layer is rounded on what it will meet: the inputs of a model whose earlier layers are rounded already, their
    8-bit activations included. The model is left as it was found, whatever happens; `swap_` packs the result.

    batches       a list of tensors, (inputs, labels) pairs or dicts, as `score` takes them; labels are not looked at
    rounding      a name, or one of the classes of `mpqkern.rounding` with options
    correct_bias  moves each bias by the mean error of its output (Nagel et al. 2019, arXiv 1906.04721)
    forward       forward(model, batch), for models that are called in another way
    bank          a folder for what is done: a run that was stopped goes on from there, to the same result
    seed          of whatever is drawn: positions in images, samples of a step
    memory        bytes that statistics or, for reconstruction, examples may take at once; as many batches as fit
                  are examples
    time_limit    seconds after which `Unfinished` is raised
    progress      whether to show a bar; None: on a terminal

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> rounded = calibrate(model, {"*": 4}, torch.randn(64, 32))
    >>> rounded["2"].codes.shape
    torch.Size([4, 16])
    """
    method = as_rounding(rounding)
    check_number("memory", memory, "bytes, above 0", lambda v: v > 0)
    check_number("seed", seed, "a whole number", whole=True)
    check_flag("correct_bias", correct_bias)
    found = candidates(model)
    chosen = planned(plan, found)
    schemes = {c.name: chosen[c.name] for c in found if chosen.get(c.name) is not None and not c.reason}
    if not schemes:
        return Rounded({}, {}, method, {})
    task = Task(model, batches, layers=list(schemes), forward=forward, loss="kl")  # which asks for no labels
    wanted = [schemes[layer.name] for layer in task.layers]
    # Most of what is said of a task is of its losses, which play no part here.
    depends = {name: text for name, text in task.fingerprint().items() if name != "loss"} | {
        "batches": ", ".join(task.digest(i) for i in range(len(task.batches))),
        "schemes": ", ".join(map(repr, wanted)),
        "rounding": f"{method!r}, correct_bias={correct_bias}",
        "seed": str(seed),
        "version": __version__,
    }
    store = Bank(None if bank is None else Path(bank), depends)
    meter = Meter(time_limit=time_limit, progress=progress)
    job = Calibration(task, wanted, method, correct_bias, store, meter, memory, seed)
    meter.begin(method.name, len(wanted))
    try:
        with held(model):
            steps(method)(job)
    finally:
        meter.end()
    names = [layer.name for layer in task.layers]
    weights = {name: digest([modules[0].weight]) for name, modules in zip(names, task.modules, strict=True)}
    return Rounded({names[i]: job.done[i] for i in range(len(names))}, schemes, method, weights)


def steps(method: Rounding) -> Callable[[Calibration], None]:
    """How a way to round goes through a model."""
    return part_by_part if method.needs == "outputs" else layer_by_layer
