"""Where this was written: versions, processor, and which kernel serves what."""

from __future__ import annotations

from .given import Given
from .markup import details, table

TITLE = "Environment"


def section(given: Given) -> str:
    found = given.environment
    facts = [(key.replace("_", " "), _plain(value)) for key, value in found.items() if key != "kernels"]
    kernels = [
        (k["op"], k["device"], "any" if k["bits"] is None else k["bits"], k["kernel"], k["why"] or "")
        for k in found["kernels"]
    ]
    parts = [table((), facts, left=(0, 1))]
    if given.scores is not None and given.scores.provenance:
        notes = [(key, _plain(value)) for key, value in given.scores.provenance.items()]
        parts.append(details("How the scores were made", table((), notes, left=(0, 1))))
    parts.append(details("Kernels", table(("op", "device", "bits", "kernel", "why"), kernels, left=(0, 1, 2, 3, 4))))
    return "".join(parts)


def _plain(value: object) -> str:
    return "none" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
