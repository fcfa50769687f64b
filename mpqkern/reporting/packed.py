"""The ledger: what packing made of each layer, and in words why a layer is still in float."""

from __future__ import annotations

from .given import Given, text
from .markup import paragraph, table

TITLE = "Ledger"


def section(given: Given) -> str | None:
    ledger = given.ledger
    if ledger is None or not ledger.rows:
        return None
    rows = [
        (
            row.name,
            "x".join(map(str, row.weight_shape)),
            text(row.scheme),
            f"{row.float_bytes:,}",
            f"{row.bytes:,}",
            "" if row.error is None else f"{row.error:.4f}",
            row.reason or "",
        )
        for row in ledger.rows
    ]
    rows.append(("total", "", "", f"{ledger.float_bytes:,}", f"{ledger.bytes:,}", "", ""))
    head = ("layer", "weight", "scheme", "float bytes", "bytes", "rel. error", "why in float")
    count = f"{len(ledger.packed)} of {len(ledger.rows)} layers are packed."
    note = "Errors are |weight - packed| / |weight|. Bytes are as stored: codes with padding, scales and zeros."
    return paragraph(count, note) + table(head, rows, left=(0, 1, 2, 6), foot=True)
