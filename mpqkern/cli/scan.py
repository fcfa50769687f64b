"""mpqkern scan: the layers of a model, what each would take, and what stands against packing it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from torch import nn

from ..catalog import candidates, described, feed, kind_of
from ..ledger import table
from ..measuring.task import batch_size
from ..scheme import Scheme
from . import options
from .folder import Folder
from .verb import Answer, Verb


def add(parser: ArgumentParser) -> None:
    options.add_model(parser, "callable without arguments -> batches; for the multiply-adds")
    options.add_schemes(parser)
    options.add_run(parser)


def run(args: Namespace) -> Answer:
    setup, schemes = Folder(args.run).setup(args), [s for s in options.schemes(args) if s is not None]
    model = setup.make_model()
    macs: dict[str, int] = {}
    if setup.data is not None:
        batch, forward = setup.make_batches(model)[0], setup.calls()["forward"] or feed
        found = described(model, lambda: forward(model, batch))
        macs = {layer.name: (layer.macs or 0) // batch_size(batch) for layer in found}
    rows = [_row(c.name, c.module, c.reason, macs.get(c.name), schemes) for c in candidates(model)]
    return Answer(_text(rows, schemes), {"layers": rows})


def _row(name: str, module: nn.Module, reason: str | None, macs: int | None, schemes: list[Scheme]) -> dict[str, Any]:
    weight = module._parameters.get("weight")
    known = weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter)
    shape, size = (tuple(weight.shape), weight.numel() * weight.element_size()) if known else ((), 0)
    sizes = {} if reason else {str(s): s.bytes(shape) for s in schemes}
    params = weight.numel() if known else 0
    return {"name": name, "kind": kind_of(module), "weight_shape": shape, "params": params, "macs": macs,
            "float_bytes": size, "bytes": sizes, "reason": reason}  # fmt: skip


def _text(rows: list[dict[str, Any]], schemes: list[Scheme]) -> str:
    names = [str(s) for s in schemes]
    lines = [("layer", "kind", "weight", "params", "macs", "float bytes", *names, "")]
    for row in rows:
        sizes = [f"{row['bytes'][name]:,}" if row["bytes"] else "" for name in names]
        shape, macs = "x".join(map(str, row["weight_shape"])), "" if row["macs"] is None else f"{row['macs']:,}"
        note = f"stays in float: {row['reason']}" if row["reason"] else ""
        lines.append(
            (row["name"], row["kind"], shape, f"{row['params']:,}", macs, f"{row['float_bytes']:,}", *sizes, note)
        )
    total = [f"{sum(row['bytes'].get(name, row['float_bytes']) for row in rows):,}" for name in names]
    known = [row["macs"] for row in rows if row["macs"] is not None]
    macs = f"{sum(known):,}" if known else ""
    params, floats = (f"{sum(row[key] for row in rows):,}" for key in ("params", "float_bytes"))
    lines.append(("total", "", "", params, macs, floats, *total, ""))
    return table(lines, left=(0, 1, 2, len(lines[0]) - 1))


SCAN = Verb(
    "scan",
    "the layers of a model, and their bytes by width",
    "Lists every layer that could be packed: shape, parameters, multiply-adds a sample (with --data), bytes as\n"
    "packed, and the reason where one has to stay in float. Nothing is measured and nothing written.",
    ("mpqkern scan --model mpqkern.cli.example:net --data mpqkern.cli.example:batches --bits 2 4 w8g64",),
    add,
    run,
)
