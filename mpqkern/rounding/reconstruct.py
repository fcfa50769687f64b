"""AdaRound, BRECQ, UWC: weights rounded up or down so that a part of the model returns what it does in float.

One engine: they differ in what a part is. A part starts from a way of rounding that looks at one layer after the
other; then gradients move each weight between the two points around it, and the best that was met is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import packed
from ..numbers import check_number
from ..scheme import Scheme
from .adaround import Rows, Runner, Scales, Search, Softened
from .examples import CannotRepeat, Example, Given, examples, run
from .gptq import GPTQ
from .grid import Codes
from .inputs import first_scales, rounding_inputs
from .layerwise import by_weights_alone, codes_by, collect, shift
from .method import Rounding, as_rounding
from .partition import Part, Partition, alone, called_once, checked, parts
from .statistics import Statistics
from .stretch import Stretch

if TYPE_CHECKING:
    from .calibrate import Calibration

log = logging.getLogger("mpqkern")


@dataclass(frozen=True, kw_only=True)
class AdaRound(Rounding):
    """Layer by layer (Nagel et al. 2020, arXiv 2004.10568).

    iterations  steps of Adam for each part
    batch       samples a step
    rate        length of a step
    lam         weight of the pull towards the grid; 1 weighs what is undecided as much as the error at the start
    warmup      share of the steps before that pull begins
    drop        share of the inputs' elements that are the float model's (QDrop, Wei et al. 2022, arXiv 2203.05740)
    patience    checks of the hardened weights (20 in all) without a gain after which to stop, from the end of the
                warm-up on; None: never
    start       the way of rounding to start from, by name or with options; the result is never worse on the
                examples that it was found on
    act_scales  learns a fixed scale for the inputs of each layer with `act_bits` as well (LSQ, Esser et al. 2020,
                arXiv 1902.08153); where dynamic ones do better, a part is rounded once more, as without
    partition   "layer", "block", "unit:k", or names of modules; see `mpqkern.rounding.partition`
    """

    name: ClassVar[str] = "adaround"
    needs: ClassVar[str] = "outputs"
    mismatch: ClassVar[bool] = True

    iterations: int = 1000
    batch: int = 32
    rate: float = 0.05
    lam: float = 100.0
    warmup: float = 0.2
    drop: float = 0.0
    patience: int | None = None
    start: str | Rounding = "gptq"
    act_scales: bool = False
    partition: Partition = "layer"

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            check_number(name, getattr(self, name), "a whole number, at least 1", lambda v: v > 0, whole=True)
        wanted = "a whole number, at least 1, or None"
        check_number("patience", self.patience, wanted, lambda v: v > 0, whole=True, optional=True)
        for name in ("rate", "lam"):
            check_number(name, getattr(self, name), "a finite number above 0", lambda v: 0 < v < inf)
        for name in ("warmup", "drop"):
            check_number(name, getattr(self, name), "a number from 0 to 1", lambda v: 0 <= v <= 1)
        if not isinstance(self.act_scales, bool):
            raise TypeError(f"act_scales={self.act_scales!r}; wanted True or False")
        if as_rounding(self.start, "start").needs == "outputs":
            raise ValueError(f"start={self.start!r}; wanted a way of rounding that needs no outputs")
        object.__setattr__(self, "partition", checked(self.partition))

    def round(self, rows: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> Codes:
        raise TypeError(f"{self.name!r} looks at the outputs of parts of a model; wanted calibrate(model, ...)")

    def alone(self) -> Rounding:
        """GPTQ: for one layer by itself the aim is the same, e H e' summed over its rows."""
        return GPTQ()


@dataclass(frozen=True, kw_only=True)
class BRECQ(AdaRound):
    """Residual blocks and transformer layers as wholes (Li et al. 2021, arXiv 2102.05426); options of `AdaRound`."""

    name: ClassVar[str] = "brecq"

    iterations: int = 2000
    partition: Partition = "block"


@dataclass(frozen=True, kw_only=True)
class UWC(AdaRound):
    """Two blocks in a row as one (Gu et al. 2022, arXiv 2201.06376); options of `AdaRound`.

    What hangs together over more layers takes more steps to settle.
    """

    name: ClassVar[str] = "uwc"

    iterations: int = 3000
    partition: Partition = "unit:2"


@torch.inference_mode(False)  # within it nothing has gradients, whatever is asked for
@torch.no_grad()
def part_by_part(job: Calibration) -> None:
    """Rounds all layers. What the model never calls is rounded by its weights alone."""
    if any(tensor.is_inference() for tensor in (*job.task.model.parameters(), *job.task.model.buffers())):
        raise ValueError("model holds tensors made in inference mode, which gradients cannot pass; wanted one without")
    todo = parts(job.task, job.rounding.partition)
    by_weights_alone(job, set(range(len(job.schemes))) - {layer for part in todo for layer in part.layers})
    once = called_once(job.task)
    while todo:
        part = todo.pop(0)
        if job.recall_all(part.layers):
            continue
        try:
            found = _examples(job, part)
        except CannotRepeat as why:
            if len(part.layers) > 1:
                log.warning("%s is rounded layer by layer: %s", part.name, why)
                todo[:0] = [alone(job.task, layer) for layer in part.layers]
                continue
            log.warning("%s stays as %s has rounded it: %s", part.name, job.rounding.start, why)
            found = []
        kept = part if len(part.layers) > 1 else None  # one layer's inputs are looked at once
        stretch = Stretch(job.task, job.twin, kept, once, memory=job.memory)
        starts = _starts(job, part, stretch)
        done = _reconstructed(job, part, starts, found) if found else starts
        job.put_all(_shifted(job, part, done, stretch) if job.correct_bias else done)


def _examples(job: Calibration, part: Part) -> list[Example]:
    twin = job.twin if job.done else None
    return examples(job.task, part, twin, both=job.rounding.drop > 0, memory=job.memory)


def _starts(job: Calibration, part: Part, stretch: Stretch) -> dict[int, Codes]:
    """Codes to start from, each layer's with those before it in the twin."""
    method, found = as_rounding(job.rounding.start), {}
    for layer in part.layers:
        statistics = None if method.needs == "nothing" else _statistics(job, layer, found, stretch, method.mismatch)
        found[layer] = codes_by(method, job, layer, statistics)
        job.twin.put(job.task.layers[layer].name, job.task.modules[layer], found[layer], job.schemes[layer])
    return found


def _shifted(job: Calibration, part: Part, done: dict[int, Codes], stretch: Stretch) -> dict[int, Codes]:
    """With the mean error of each output as a shift of its bias."""
    found: dict[int, Codes] = {}
    for layer, codes in done.items():
        job.twin.put(job.task.layers[layer].name, job.task.modules[layer], codes, job.schemes[layer])
    for layer, codes in done.items():
        statistics = _statistics(job, layer, done, stretch, mismatch=True)
        by = None if statistics is None else shift(job.rows(layer), codes, statistics)
        found[layer] = replace(codes, shift=by)
        job.twin.put(job.task.layers[layer].name, job.task.modules[layer], found[layer], job.schemes[layer])
    return found


def _statistics(
    job: Calibration, layer: int, more: dict[int, Codes], stretch: Stretch, mismatch: bool
) -> Statistics | None:
    twin = job.twin if job.done or more else None
    how = {"products": mismatch, "memory": job.memory, "seed": job.seed}
    return collect(job.task, [layer], twin, stretch=stretch, **how).get(layer)


def _reconstructed(
    job: Calibration, part: Part, starts: dict[int, Codes], found: Sequence[Example]
) -> dict[int, Codes]:
    def search(first: Scales) -> tuple[dict[int, Codes], Scales]:
        soft = {layer: Softened(job.rows(layer), codes, job.schemes[layer].bits) for layer, codes in starts.items()}
        draw = torch.Generator().manual_seed(hash((job.seed, *part.layers)) % 2**63)
        hard, by, gain = Search(job.rounding, soft, found, runner, draw, first).best()
        log.info("%s: %.4g of the error of %s", part.name, gain, job.rounding.start)
        return {layer: soft[layer].chosen(hard[layer]) for layer in part.layers}, by

    with rounding_inputs(job, part) as scales:
        runner = _runner(job, part, scales)
        first = first_scales(job, part, starts, found, runner) if job.rounding.act_scales else {}
        done, by = search(first)
        if first and not by:  # what was learned was made for fixed scales
            done, by = search({})
    return {layer: replace(codes, act_scale=by.get(layer)) for layer, codes in done.items()}


def _runner(job: Calibration, part: Part, now: Scales) -> Runner:
    """Runs an example's chain with other weights, by layer [N, K]; the model's own are not touched. What scales it is
    given are those of `now`, by which the layers round their inputs."""
    layer_of = {module: layer for layer in part.layers for module in job.task.modules[layer]}
    names = {
        module: [(f"{name}.weight".lstrip("."), layer_of[m]) for name, m in module.named_modules() if m in layer_of]
        for chain in part.chains
        for module in chain
    }
    like = {layer: job.task.modules[layer][0].weight for layer in part.layers}

    def runner(example: Example, given: Given, rows: Rows, scales: Scales) -> Tensor:
        now.clear()
        now.update(scales)
        weights = {
            layer: packed.weight_from_rows(r, tuple(like[layer].shape)).to(like[layer].dtype)
            for layer, r in rows.items()
        }

        def call(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            own = {name: weights[layer] for name, layer in names[module]}
            return functional_call(module, own, args, kwargs, tie_weights=False)

        return run(example.chain, given, call)

    return runner
