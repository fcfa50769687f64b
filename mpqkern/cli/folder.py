"""The run directory: what one verb leaves for the next.

run.json            what was asked: model, data, and the options of each verb
bank/               measurements while they are made
scores-METHOD.npz   latency.json   assignment.json   frontier.json   ledger.json   comparison.json (of `compare`)
model.safetensors   report.html
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..measuring.bank import write_file
from ..scores.table import Scores
from . import loading

T = TypeVar("T")
FORMAT, VERSION = "mpqkern-run", 1
FIXED = ("model", "checkpoint", "seed")  # one run is about one model


@dataclass(frozen=True)
class Setup:
    """What is measured, on what; callables by their names, see `loading`."""

    model: str | None = None
    checkpoint: str | None = None
    seed: int = 0
    data: str | None = None
    batches: int | None = None
    forward: str | None = None
    loss: str | None = None

    def make_model(self, weights: bool = True) -> nn.Module:
        if self.model is None:
            raise ValueError(f"there is no model; wanted --model {loading.FORM}")
        model = loading.make_model(self.model, self.seed)
        if weights and self.checkpoint is not None:
            loading.load_weights(model, Path(self.checkpoint))
        return model

    def make_batches(self, model: nn.Module) -> list[Any]:
        if self.data is None:
            raise ValueError(f"there is no data; wanted --data {loading.FORM}")
        return loading.make_batches(self.data, model, self.batches, self.seed)

    def calls(self) -> dict[str, Any]:
        """`forward` and `loss` as `score` takes them."""
        forward = None if self.forward is None else loading.find("--forward", self.forward, 2)
        own = self.loss is not None and ":" in self.loss
        return {"forward": forward, "loss": loading.find("--loss", self.loss, 2) if own else self.loss}


class Folder:
    """A run directory; it comes to be with the first thing that is kept."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--run {path} is a file; wanted a folder")
        self.note: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        file = self.path / "run.json"
        if file.is_file():
            self.note = self._read(file, json.loads)
            known = (self.note.get("format"), self.note.get("version")) if isinstance(self.note, dict) else self.note
            if known != (FORMAT, VERSION):
                raise ValueError(f"{file} is no run of this version; wanted another --run")

    def setup(self, args: Namespace) -> Setup:
        """What was asked for now, or else before."""
        before, now = self.note.get("setup", {}), {}
        for name in Setup.__annotations__:
            value = getattr(args, name, None)
            if value is not None and name == "checkpoint":
                value = str(Path(value).resolve())
            elif isinstance(value, str) and ":" in value:
                value = loading.absolute(value)
            if name in FIXED and value is not None and before.get(name, value) != value:
                given, was = loading.relative(str(value)), loading.relative(str(before[name]))
                raise ValueError(f"--{name} {given}, but --run {self.path} is about {was}; wanted that, or another run")
            now[name] = before.get(name) if value is None else value
        return Setup(**now | {"seed": now["seed"] or 0})

    def keep(self, setup: Setup, **asked: Any) -> None:
        """Writes down what was asked for."""
        self.note.update({"setup": asdict(setup), **asked})
        self.write("run.json", json.dumps(self.note, indent=1) + "\n")

    def write(self, name: str, text: str) -> Path:
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(self.path / name, text.encode())
        return self.path / name

    def read(self, name: str, load: Callable[[str], T]) -> T | None:
        """A file as text, through `load`; None where it is not there."""
        file = self.path / name
        return self._read(file, load) if file.is_file() else None

    def need(self, name: str, load: Callable[[str], T], verb: str) -> T:
        found = self.read(name, load)
        if found is None:
            raise ValueError(f"--run {self.path} has no {name}; wanted `mpqkern {verb} --run {self.path}` first")
        return found

    def scores_file(self, method: str) -> Path:
        return self.path / f"scores-{method}.npz"

    def scores(self, method: str | None = None) -> Scores:
        """By a method, or by the one that was scored last."""
        there = sorted(p.stem.removeprefix("scores-") for p in self.path.glob("scores-*.npz"))
        method = method or self.note.get("score", {}).get("method")
        if method not in there:
            has = f"scores by {', '.join(there)}" if there else "no scores"
            wanted = "one of these" if there else f"`mpqkern score --run {self.path} ...` first"
            raise ValueError(f"--run {self.path} has {has}{f', none by {method}' if method else ''}; wanted {wanted}")
        return Scores.load(self.scores_file(method))

    @staticmethod
    def _read(file: Path, load: Callable[[str], T]) -> T:
        try:
            return load(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
