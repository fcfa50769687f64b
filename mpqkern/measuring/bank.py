"""Bank: measurements while they are made, one file an item, so that a killed run goes on where it was.

    folder/bank.json       what the items depend on: model, loss, schemes, rounding, the method's options; and details,
                           the values behind some of these, to say what differs
    folder/items/KEY.npz   arrays; KEY names the batch by its contents and the item within it

Items are written to a temporary file and then renamed: they are there completely or not at all. A folder that was
filled under other conditions is refused. Under torch.distributed the ranks share the items between them.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import written
from .meter import Meter, Unfinished

log = logging.getLogger("mpqkern")

FORMAT, VERSION = "mpqkern-bank", 1
SHOWN = 5  # values that differ, in an error
Item = dict[str, np.ndarray]


class Bank:
    """Items by key; in a folder, or in memory where `path` is None.

    >>> bank = Bank(None, {"model": "f00d"})
    >>> bank.put("batch0/stem", loss=np.zeros(3))
    >>> "batch0/stem" in bank, bank["batch0/stem"]["loss"].shape
    (True, (3,))
    """

    def __init__(
        self, path: str | Path | None, fingerprint: Mapping[str, str], details: Mapping[str, Mapping[str, str]] = {}
    ) -> None:
        """`details` have the values behind entries of the fingerprint that are digests, by name."""
        self.path = None if path is None else Path(path)
        self.details = {name: dict(values) for name, values in details.items()}
        self.fingerprint = dict(fingerprint)
        self._items: dict[str, Item] = {}
        if self.path is None:
            return
        try:
            (self.path / "items").mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"bank={str(path)!r} is, or lies in, a file; wanted a folder") from None
        head = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "details": self.details}
        if not (self.path / "bank.json").is_file():
            write_file(self.path / "bank.json", json.dumps(head, indent=2).encode())
        self._require_same(self.path)

    def __contains__(self, key: str) -> bool:
        if key not in self._items and self.path is not None and self._file(key).is_file():
            try:
                self._items[key] = _read(self._file(key))
            except (ValueError, OSError, EOFError, zipfile.BadZipFile):
                log.warning("%s cannot be read and is measured again", self._file(key))
        return key in self._items

    def __getitem__(self, key: str) -> Item:
        if key not in self:
            raise KeyError(key)
        return self._items[key]

    def put(self, key: str, **arrays: np.ndarray) -> None:
        self._items[key] = {name: np.asarray(a) for name, a in arrays.items()}
        if self.path is not None:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, self._items[key])

    def merge(self, other: str | Path) -> int:
        """Takes the items of another folder that are missing here; returns how many."""
        self._require_same(Path(other))
        added = 0
        for file in sorted((Path(other) / "items").rglob("*.npz")):
            key = file.relative_to(Path(other) / "items").with_suffix("").as_posix()
            if key not in self:
                self.put(key, **_read(file))
                added += 1
        return added

    def measure(
        self, keys: Sequence[str] | Mapping[str, str], make: Callable[[str], Item], meter: Meter, each: int = 1
    ) -> list[Item]:
        """The items of `keys`; those that are missing are made, each by one rank. An item is `each` evaluations.

        A mapping has what to show for each key while it is measured.
        """
        shown = keys if isinstance(keys, Mapping) else {}
        keys = list(keys)
        with self.shared(keys):
            for key in mine(keys):
                new = key not in self
                if new:
                    self.put(key, **make(key))
                meter.step(shown.get(key, key), each, made=new)
        return [self[key] for key in keys]

    @contextmanager
    def shared(self, keys: Sequence[str]) -> Iterator[None]:
        """Afterwards every rank has the items of all, also where a rank had to stop: then all of them stop."""
        stopped = None
        try:
            yield
        except Unfinished as error:
            if not distributed():
                raise
            stopped = error
        if not distributed():
            return
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        own = {key: self[key] for key in keys if key in self._items}
        torch.distributed.all_gather_object(parts, (own, None if stopped is None else str(stopped)))
        for items, _ in parts:
            self._items.update(items)
        reasons = [reason for _, reason in parts if reason is not None]
        if reasons:
            raise Unfinished(reasons[0])

    def _file(self, key: str) -> Path:
        return self.path / "items" / f"{key}.npz"

    def _require_same(self, path: Path) -> None:
        try:
            head = json.loads((path / "bank.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"bank={str(path)!r} holds no measurements ({error})") from None
        if head.get("format") != FORMAT or head.get("version") != VERSION:
            found = f"{head.get('format')!r} version {head.get('version')!r}"
            raise ValueError(f"bank={str(path)!r} is {found}; wanted {FORMAT!r} version {VERSION}")
        there = head["fingerprint"]
        names = [n for n in {**there, **self.fingerprint} if there.get(n) != self.fingerprint.get(n)]
        if names:
            details = head.get("details", {})
            what = "; ".join(
                line
                for n in names
                for line in _differing(details.get(n), self.details.get(n))
                or [f"{n} was {there.get(n)!r} and is {self.fingerprint.get(n)!r}"]
            )
            raise ValueError(f"bank={str(path)!r} was measured under other conditions: {what}; wanted another folder")


def _differing(was: Mapping[str, str] | None, now: Mapping[str, str] | None) -> list[str]:
    """The first few values that are not the same; none where one side is not known."""
    if was is None or now is None:
        return []
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    more = [f"{len(names) - SHOWN} more attributes"] if len(names) > SHOWN else []
    return [f"{n} was {was.get(n, 'not there')} and is {now.get(n, 'not there')}" for n in names[:SHOWN]] + more


def mine(items: Sequence[str]) -> Sequence[str]:
    """What this rank has to do of a list that is the same on all ranks."""
    if not distributed():
        return items
    return items[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _read(file: Path) -> Item:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def write_file(file: Path, contents: bytes | Item) -> None:
    """All or nothing, also when the machine goes down."""
    with written(file) as out:
        if isinstance(contents, bytes):
            out.write(contents)
        else:
            np.savez(out, **contents)
