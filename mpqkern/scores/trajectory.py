"""Trajectory: the path of a search, every point of which is an assignment and its damage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..ledger import table
from ..scheme import Layer, Scheme


@dataclass(frozen=True)
class Step:
    changed: tuple[int, ...]  # layers that this step made narrower; none at the start
    choice: tuple[int, ...]  # the scheme of each layer after it
    value: float  # of the metric, lower is better; for accuracy, the share of wrong answers
    loss: float
    size: float  # by what the search counted


@dataclass(frozen=True)
class Trajectory:
    """From wide to narrow: damage against size, measured at every step.

    >>> layers = [Layer("stem", "conv2d", (8, 3, 3, 3), 216), Layer("head", "linear", (10, 8), 80)]
    >>> steps = [Step((), (1, 1), 0.1, 0.1, 148.0), Step((1,), (1, 0), 0.3, 0.3, 128.0)]
    >>> print(Trajectory(layers, [Scheme(4), Scheme(8)], "loss", steps))
    step  layer  scheme  size  loss
    ----  -----  ------  ----  ----
       0  all            148   0.1
       1  head   w4      128   0.3
    """

    layers: Sequence[Layer]
    schemes: Sequence[Scheme | None]
    metric: str
    steps: list[Step]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Step:
        return self.steps[i]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def assigned(self, i: int) -> dict[str, Scheme | None]:
        """The scheme of each layer after step i, as `swap_` takes it."""
        return {layer.name: self.schemes[b] for layer, b in zip(self.layers, self.steps[i].choice, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as JSON has them."""
        layers = [{**asdict(layer), "weight_shape": list(layer.weight_shape)} for layer in self.layers]
        schemes = [None if scheme is None else scheme.to_dict() for scheme in self.schemes]
        steps = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(step).items()} for step in self.steps]
        return {"metric": self.metric, "layers": layers, "schemes": schemes, "steps": steps}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trajectory:
        layers = [Layer(**{**layer, "weight_shape": tuple(layer["weight_shape"])}) for layer in values["layers"]]
        schemes = [None if scheme is None else Scheme.from_dict(scheme) for scheme in values["schemes"]]
        steps = [
            Step(**{k: tuple(v) if isinstance(v, list) else v for k, v in step.items()}) for step in values["steps"]
        ]
        return cls(layers, schemes, values["metric"], steps)

    def to_json(self) -> str:
        """One JSON object, a step a line."""
        values = self.to_dict()
        head = "".join(f"  {json.dumps(k)}: {json.dumps(values[k])},\n" for k in ("metric", "layers", "schemes"))
        return f'{{\n{head}  "steps": [\n    ' + ",\n    ".join(map(json.dumps, values["steps"])) + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Trajectory:
        return cls.from_dict(json.loads(text))

    def __str__(self) -> str:
        shown = {"loss": ("loss",), "accuracy": ("accuracy", "loss"), "kl": ("kl", "loss")}[self.metric]
        lines = [("step", "layer", "scheme", "size", *shown)]
        for i, step in enumerate(self.steps):
            names = ", ".join(self.layers[layer].name for layer in step.changed) or "all"
            scheme = str(self.schemes[step.choice[step.changed[0]]] or "float") if step.changed else ""
            value = 1 - step.value if self.metric == "accuracy" else step.value
            numbers = (value, step.loss)[: len(shown)]
            lines.append((str(i), names, scheme, f"{step.size:.6g}", *(f"{number:.6g}" for number in numbers)))
        return table(lines, left=(1, 2))
