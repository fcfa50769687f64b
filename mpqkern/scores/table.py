"""Scores: what it costs to give a layer a scheme, alone and beside another layer."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..files import written
from ..scheme import Layer, Scheme

VERSION = 1
FLOAT_BITS = 32  # what a layer left in float counts as
MOST = 1e280  # of the sum of all costs: times what is spent (2**61 at most), it is still a float


class Scores:
    """Costs of every layer under every scheme; a lower sum is a better assignment.

    `unary[l, b]` is what scheme b costs in layer l. `pairwise[l, b, m, c]`, if there is one, is what the
    two choices cost together beyond that: symmetric, zero within a layer. An assignment x costs
    `sum_l unary[l, x_l] + 1/2 sum_lm pairwise[l, x_l, m, x_m]`, so each pair of layers counts once.
    `schemes` are the choices, the same for all layers: `Scheme`s, bit widths, or None (stay in float).

    >>> layers = [Layer("stem", "conv2d", (8, 3, 3, 3), 216), Layer("head", "linear", (10, 8), 80)]
    >>> scores = Scores(layers, [2, 4, 8], [[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]])
    >>> scores.cost([1, 0])
    0.7
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        schemes: Sequence[Scheme | int | None],
        unary: Any,
        pairwise: Any = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.schemes = [Scheme(s) if isinstance(s, int) and not isinstance(s, bool) else s for s in schemes]
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise ValueError(f"layers: found {layer!r}; wanted Layer objects")
        for scheme in self.schemes:
            if scheme is not None and not isinstance(scheme, Scheme):
                raise ValueError(f"schemes: found {scheme!r}; wanted Scheme objects, bit widths or None")
        _require_unique("layers", self.names)
        _require_unique("schemes", self.schemes)
        size = (len(self.layers), len(self.schemes))
        if 0 in size:
            raise ValueError(f"there are {size[0]} layers and {size[1]} schemes; wanted at least one of each")
        self.unary = _array("unary", unary, size)
        self.pairwise = None if pairwise is None else _array("pairwise", pairwise, size + size)
        if self.pairwise is not None:
            _check_pairwise(self.pairwise, self.names)
        self.provenance = dict(provenance or {})

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @property
    def bits(self) -> list[int]:
        """Width of each scheme; 32 for float."""
        return [FLOAT_BITS if s is None else s.bits for s in self.schemes]

    def cost(self, choice: Sequence[int]) -> float:
        """The objective of scheme `choice[l]` in each layer l."""
        return cost(self.unary, self.pairwise, choice)

    def merge(self, other: Scores) -> Scores:
        """Both together: other layers under the same schemes, or the same layers under other schemes.

        Layers that were scored apart have no pairwise cost with each other.
        """
        note = {"merged": [self.provenance, other.provenance]}
        if self.schemes == other.schemes and not set(self.names) & set(other.names):
            pairwise = None
            if self.pairwise is not None or other.pairwise is not None:
                n, first, width = len(self.layers) + len(other.layers), len(self.layers), len(self.schemes)
                pairwise = np.zeros((n, width, n, width))
                for part, scores in ((slice(0, first), self), (slice(first, n), other)):
                    if scores.pairwise is not None:
                        pairwise[part, :, part, :] = scores.pairwise
            unary = np.concatenate([self.unary, other.unary])
            return Scores(self.layers + other.layers, self.schemes, unary, pairwise, note)
        if self.layers == other.layers and not set(self.schemes) & set(other.schemes):
            if self.pairwise is not None or other.pairwise is not None:
                raise ValueError(
                    "other: pairwise costs between the two sets of schemes are missing; score them at once"
                )
            unary = np.concatenate([self.unary, other.unary], axis=1)
            return Scores(self.layers, self.schemes + other.schemes, unary, None, note)
        raise ValueError(
            f"other has {len(other.layers)} layers and the schemes {', '.join(map(str, other.schemes))}; "
            "wanted different layers under the same schemes, or the same layers under different schemes"
        )

    def save(self, path: str | Path) -> None:
        """Writes one .npz: the arrays, and everything else as JSON."""
        note = {
            "format": "mpqkern-scores",
            "version": VERSION,
            "layers": [vars(layer) for layer in self.layers],
            "schemes": [None if s is None else s.to_dict() for s in self.schemes],
            "provenance": self.provenance,
        }
        arrays = {"unary": self.unary} | ({} if self.pairwise is None else {"pairwise": self.pairwise})
        text = np.frombuffer(json.dumps(note).encode(), np.uint8)  # bytes, so that nothing is pickled
        with written(Path(path)) as file:
            np.savez(file, note=text, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        try:
            with Path(path).open("rb") as file:
                note, arrays = _read(file)
            known = note.get("format"), note.get("version")
            if known == ("mpqkern-scores", VERSION):
                layers = [_layer(fields) for fields in note["layers"]]
                schemes = [None if s is None else Scheme.from_dict(s) for s in note["schemes"]]
                return cls(layers, schemes, arrays["unary"], arrays.get("pairwise"), note["provenance"])
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged archive fails in all the ways of zipfile, zlib, json and numpy
            raise ValueError(f"path={str(path)!r} holds no scores ({str(error) or type(error).__name__})") from None
        found = f"{known[0]!r} version {known[1]!r}"
        raise ValueError(f"path={str(path)!r} is {found}; wanted 'mpqkern-scores' version {VERSION}")

    def __repr__(self) -> str:
        kind = "unary" if self.pairwise is None else "pairwise"
        return f"Scores({len(self.layers)} layers, {', '.join(str(s or 'float') for s in self.schemes)}, {kind})"


def widest_first(schemes: Sequence[Scheme | None]) -> list[int]:
    """Indices from the widest scheme to the narrowest; of two of one width, that of wider activations comes first.

    >>> widest_first([Scheme(2), Scheme(4, act_bits=8), None, Scheme(4)])
    [2, 3, 1, 0]
    """
    wide = [(FLOAT_BITS, FLOAT_BITS) if s is None else (s.bits, s.act_bits or FLOAT_BITS) for s in schemes]
    return sorted(range(len(wide)), key=lambda b: (-wide[b][0], -wide[b][1], b))


def cost(unary: np.ndarray, pairwise: np.ndarray | None, choice: Sequence[int]) -> float:
    at = np.arange(len(unary)), np.asarray(choice)
    total = float(np.sum(unary[at]))
    if pairwise is not None:
        total += float(np.sum(pairwise[at][:, at[0], at[1]])) / 2
    return total


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The note and the arrays that `save` wrote."""
    if not zipfile.is_zipfile(file):
        raise ValueError("no .npz archive")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        arrays = {}
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except ValueError as error:
                raise ValueError(f"{name} is no plain array") from error
    note = json.loads(arrays.pop("note").tobytes())
    if not isinstance(note, dict):
        raise ValueError("its note is no JSON object")
    return note, arrays


def _layer(fields: Mapping[str, Any]) -> Layer:
    layer = Layer(**{**fields, "weight_shape": tuple(fields["weight_shape"])})
    counts = [*layer.weight_shape, layer.params, *([] if layer.macs is None else [layer.macs])]
    if not isinstance(layer.name, str) or not isinstance(layer.kind, str) or any(type(n) is not int for n in counts):
        raise ValueError(f"found {layer!r}; wanted names as text and sizes as whole numbers")
    return layer


def _array(argument: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    if np.iscomplexobj(value if hasattr(value, "dtype") else np.asarray(value)):
        raise ValueError(f"{argument} holds complex numbers; wanted real ones")
    array = np.array(value, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{argument} has the shape {list(array.shape)}; wanted {list(shape)} (layers, schemes)")
    if not np.isfinite(array).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise ValueError(f"{argument}{at}={array[tuple(at)]}; wanted a finite number (to rule a choice out: forbid)")
    with np.errstate(over="ignore"):
        size = np.abs(array).sum()
    if not size < MOST:
        at = [int(i) for i in np.unravel_index(np.abs(array).argmax(), shape)]
        raise ValueError(f"{argument}{at}={array[tuple(at)]}; wanted costs that add up to less than {MOST:g}")
    array.flags.writeable = False
    return array


def _check_pairwise(pairwise: np.ndarray, names: list[str]) -> None:
    skew = np.abs(pairwise - pairwise.transpose(2, 3, 0, 1))
    if skew.max() > 1e-9 * np.abs(pairwise).max():
        at = [int(i) for i in np.unravel_index(skew.argmax(), skew.shape)]
        there = pairwise[at[2], at[3], at[0], at[1]]
        raise ValueError(
            f"pairwise{at}={pairwise[tuple(at)]} but {there} the other way round; wanted a symmetric array"
        )
    for layer, name in enumerate(names):
        if pairwise[layer, :, layer, :].any():
            raise ValueError(f"pairwise within layer {name!r} is not zero; wanted it in unary")


def _require_unique(argument: str, names: list) -> None:
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{argument}: {str(twice[0])!r} comes twice; wanted each once")
