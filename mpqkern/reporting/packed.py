"""The ledger: what packing made of each layer, was it as predicted, and in words why a layer is still in float."""

from __future__ import annotations

from dataclasses import replace

from ..ledger import Ledger
from .given import Given
from .markup import number, paragraph, table

TITLE = "Ledger"


def section(given: Given) -> str | None:
    ledger = given.ledger
    if ledger is None or not ledger.rows:
        return None
    *columns, reasons = ledger.columns
    if ledger.left:
        columns.append(replace(reasons, heading="why", total=""))
    rows = [*zip(*(column.cells for column in columns), strict=True), [column.total for column in columns]]
    left = [i for i, column in enumerate(columns) if column.left]
    figures = table([column.heading for column in columns], rows, left=left, foot=True)
    return _words(ledger, reasons.total) + figures


def _words(ledger: Ledger, total: str) -> str:
    count = f"{len(ledger.packed)} of {len(ledger.rows)} layers are packed{f': {total}' if total else ''}."
    note = "Errors are |weight - packed| / |weight|. Bytes are as stored: codes with padding, scales and zeros."
    return paragraph(count, note) + paragraph(*_as_predicted(ledger))


def _as_predicted(ledger: Ledger) -> list[str]:
    """What an audit has found."""
    found, whole = [], ledger.whole
    if ledger.sized_as_predicted is not None:
        wrong = [row.name for row in ledger.packed if row.disk_bytes not in (None, row.predicted_bytes)]
        exact = "In the file, every packed layer takes exactly the bytes that its scheme predicts."
        found.append(f"Not as predicted in the file: {', '.join(wrong)}." if wrong else exact)
    if whole.ms is not None and whole.predicted_ms is not None:
        found.append(f"Predicted {number(whole.predicted_ms)} ms, measured {number(whole.ms)} ms.")
    if whole.rise is not None:
        found.append(f"The {whole.loss or 'loss'} of the packed model is {whole.rise:+.4g} from float's.")
    return found
