"""rewriting: changes to a model, all or none, kept only if the model still answers the same.

What rounding may do to the answers is measured, not guessed: the model is run with every parameter and every statistic
of its norms off by one unit in the last place (relative 2^-23 in fp32), up or down at random. Rewriting rounds each
weight it touches once or twice, by half of that, and regroups products whose rounding errors are of the same size. A
rewritten model may be MARGIN times as far away as the worse of two such runs, as a root mean square over each output
(or as one unit of the output, if that is more); a change that is wrong moves answers by thousands of times that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..catalog import Forward, batches_of, feed, float_outputs
from ..held import held
from ..ledger import table

MARGIN = 16


@dataclass(frozen=True)
class Row:
    name: str  # "conv -> norm" for what was rewritten, else the layer or norm that was left
    done: bool
    note: str  # what was done, or why nothing was


@dataclass(frozen=True)
class Report:
    """What was rewritten and what was left. `error` and `tolerance` belong to the output that came closest to its
    tolerance, both relative to its root mean square."""

    rows: tuple[Row, ...]
    error: float
    tolerance: float

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row.done]

    @property
    def left(self) -> list[Row]:
        """The rows of what stayed as it was, each with its reason."""
        return [row for row in self.rows if not row.done]

    def __str__(self) -> str:
        lines = [("layers", "", ""), *((row.name, "done" if row.done else "left", row.note) for row in self.rows)]
        error = f"off by {self.error:.1e}, rounding allows {self.tolerance:.1e}" if self.done else "as they were"
        lines.append(("outputs", "", error))
        return table(lines, left=(0, 1, 2))


@dataclass
class Change:
    """`make` registers with the stack how to undo each step, before it takes it."""

    name: str
    note: str
    make: Callable[[ExitStack], None]


class Trial:
    """A model and the batches on which its answers must stay.

    A batch is a tensor of inputs, an (inputs, labels) pair, a dict of keywords with labels, if any, under "labels", or
    anything that `forward(model, batch)` takes; a list or another iterable of those is several.
    """

    def __init__(self, model: nn.Module, batches: Any, forward: Forward | None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__}; wanted a torch.nn.Module")
        if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
            raise ValueError("model holds tensors made in inference mode; wanted one whose weights can be changed")
        self.model, self.forward = model, forward
        with torch.inference_mode(False):
            # no inference tensors, whose operations would be seen in other pieces
            self.batches = batches_of(batches, model)
        odd = [b for b in self.batches if isinstance(b, (tuple, list)) and len(b) != 2]
        if odd and forward is None:
            raise ValueError(
                f"a batch is a {type(odd[0]).__name__} of {len(odd[0])}; wanted a tensor, an (inputs, labels) pair "
                "or a dict, or forward="
            )

    def run(self, batch: Any) -> Any:
        return feed(self.model, batch) if self.forward is None else self.forward(self.model, batch)

    @torch.inference_mode(False)  # weights made in inference mode could never be trained again
    def rewrite(self, changes: Sequence[Change], left: Sequence[Row]) -> Report:
        """Makes all changes, or raises and leaves the model as it was."""
        if not changes:
            return Report(tuple(left), 0.0, 0.0)
        before = self._answers()
        if not before:
            raise ValueError("the model's output holds no float tensor to compare; wanted at least one, or forward=")
        if not any(y.isfinite().any() for y in before):
            raise ValueError("the model's outputs are all infinities or NaN; wanted batches with outputs to compare")
        nudged = [self._answers(seed) for seed in (0, 1)]
        unit = max((torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()), default=0.0)
        # Of few numbers, both runs may by chance end where the first did: never less than a unit of the output itself.
        allowed = [MARGIN * max(unit * _rms(y), *(_rms(n[i] - y) for n in nudged)) for i, y in enumerate(before)]
        with ExitStack() as undo:
            for change in changes:
                change.make(undo)
            error, tolerance = _worst(before, self._answers(), allowed)
            if not error <= tolerance:
                undo.close()
                name, alone = self._culprit(changes, before, allowed)
                raise ValueError(
                    f"rewriting {name!r} moves the outputs by {alone:.2e} of their size, all rewrites together by "
                    f"{error:.2e}, where rounding explains {tolerance:.2e}; the model is as it was"
                )
            undo.pop_all()
        return Report((*(Row(c.name, True, c.note) for c in changes), *left), error, tolerance)

    def _answers(self, nudge: int | None = None) -> list[Tensor]:
        """The float outputs for all batches, in fp64; with `nudge`, a seed, of a model whose numbers are a bit off."""
        answers = []
        for batch in self.batches:
            with held(self.model):  # so that each run finds the same random numbers
                if nudge is not None:
                    _nudge(self.model, nudge)
                answers += [y.clone() for y in float_outputs(self.run(batch))]
        return answers

    def _culprit(self, changes: Sequence[Change], before: list[Tensor], allowed: list[float]) -> tuple[str, float]:
        """The change that alone does most harm, and its error."""
        found = []
        for change in changes:
            with ExitStack() as undo:
                change.make(undo)
                error, tolerance = _worst(before, self._answers(), allowed)
                found.append((_ratio(error, tolerance), error, change.name))
        _, error, name = max(found)
        return name, error


def assign_(parameter: nn.Parameter, value: Tensor, undo: ExitStack) -> None:
    """A new value in the parameter's own type; the old memory stays untouched and comes back on `undo`."""
    undo.callback(setattr, parameter, "data", parameter.data)
    parameter.data = value.to(parameter.dtype)


def _nudge(model: nn.Module, seed: int) -> None:
    """One unit in the last place, up or down at random; `held` takes it back."""
    random = torch.Generator().manual_seed(seed)

    def nudged(tensor: Tensor) -> Tensor:
        signs = 2 * torch.randint(2, tensor.shape, generator=random).to(tensor) - 1
        return tensor.detach() * (1 + torch.finfo(tensor.dtype).eps * signs)

    for parameter in model.parameters():
        if parameter.is_floating_point() and not nn.parameter.is_lazy(parameter):
            parameter.data = nudged(parameter)
    for module in model.modules():
        for key in ("running_mean", "running_var"):
            if module._buffers.get(key) is not None:
                module._buffers[key] = nudged(module._buffers[key])


def _worst(before: list[Tensor], after: list[Tensor], allowed: list[float]) -> tuple[float, float]:
    """Error and tolerance, relative to the output's size, where they are closest together."""
    if [y.shape for y in before] != [y.shape for y in after]:
        return torch.inf, 0.0
    found = []
    for y, other, most in zip(before, after, allowed, strict=True):
        size = _rms(y) or 1.0
        strange = not torch.equal(y.isfinite(), other.isfinite())
        found.append((torch.inf if strange else _rms(other - y) / size, most / size))
    return max(found, key=lambda f: _ratio(*f))


def _ratio(error: float, tolerance: float) -> float:
    return error / tolerance if tolerance else (torch.inf if error else 0.0)


def _rms(values: Tensor) -> float:
    """Over the finite ones."""
    values = values[values.isfinite()]
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
