"""mpqkern apply: packs the model as the assignment says and saves it."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from torch import nn

from ..audit import audit
from ..catalog import candidates
from ..checkpoint import save
from ..files import require_place
from ..latency import Latency
from ..ledger import Ledger, table
from ..nn import swap_
from ..planned import planned
from ..rounding import as_rounding
from ..scheme import Scheme
from ..solve import Assignment
from . import options
from .folder import Folder
from .verb import FAILED, GOOD, Answer, Verb

FILE = "model.safetensors"


def add(parser: ArgumentParser) -> None:
    parser.add_argument("--assignment", metavar="FILE", help="another than the run's")
    parser.add_argument("--rounding", help="minmax, mse, hqq, gptq, gpfq, qronos, adaround, brecq, uwc (as scored)")
    parser.add_argument("--correct-bias", action="store_true", help="move biases by the mean error; looks at data")
    parser.add_argument("--out", metavar="FILE", help=f"where to save the model ({FILE} of the run)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and do nothing")
    options.add_model(parser)
    options.add_run(parser)


def run(args: Namespace) -> Answer:
    folder = Folder(args.run)
    setup = folder.setup(args)
    if args.assignment:
        assignment = Assignment.load(args.assignment)
    else:
        assignment = folder.need("assignment.json", Assignment.from_json, "solve --avg-bits 4")
    asked = args.rounding or folder.note.get("score", {}).get("rounding", "minmax")
    rounding = as_rounding(asked, "--rounding")
    looks = rounding.needs != "nothing" or args.correct_bias
    model = setup.make_model()
    if args.dry_run:
        return _planned(model, assignment, asked, setup.make_batches(model) if looks else [])
    out = Path(args.out) if args.out else folder.path / FILE
    require_place(out)  # rounding may take hours: what stops the end is found at the start
    known = expected(folder)
    given: dict[str, Any] = {}
    if looks:
        given = {"batches": setup.make_batches(model), "forward": setup.calls()["forward"], "seed": setup.seed}
        given |= {"correct_bias": args.correct_bias}
    ledger = swap_(model, assignment, rounding=rounding, **given)
    save(model, out)
    ledger = predicted(known, ledger, model, out)
    folder.write("ledger.json", ledger.to_json() + "\n")
    folder.keep(setup, apply={"rounding": asked, "correct_bias": args.correct_bias, "file": str(out.resolve())})
    code = GOOD if ledger.sized_as_predicted is not False else FAILED
    return Answer(f"{ledger}\nsaved as {out}", {**json.loads(ledger.to_json()), "file": str(out)}, code)


def expected(folder: Folder) -> dict[str, Any]:
    """What the run has to predict by: scores and latencies, as `audit` takes them."""
    method = folder.note.get("solve", {}).get("method")
    scores = None if method is None or not folder.scores_file(method).is_file() else folder.scores(method)
    return {"scores": scores, "latency": folder.read("latency.json", Latency.from_json)}


def predicted(
    known: dict[str, Any], ledger: Ledger, model: nn.Module, file: Path, *measured: Any, **how: Any
) -> Ledger:
    """The ledger with what the run expects, and the file's bytes."""
    latency = known["latency"]
    if latency is not None and any(r.name in latency and str(r.scheme) not in latency[r.name] for r in ledger.packed):
        known = known | {"latency": None}
    return audit(ledger, model, *measured, file=file, **known, **how)


def _planned(model: nn.Module, assignment: Assignment, rounding: str, batches: list[Any]) -> Answer:
    found = candidates(model)
    wanted = planned(assignment, found)
    rows = [_row(c.name, c.module, None if c.reason else wanted.get(c.name), c.reason) for c in found]
    lines = [("layer", "scheme", "float bytes", "bytes", "")]
    lines += [(r["name"], r["scheme"], f"{r['float_bytes']:,}", f"{r['bytes']:,}", r["reason"] or "") for r in rows]
    total = {key: sum(r[key] for r in rows) for key in ("float_bytes", "bytes")}
    lines.append(("total", "", f"{total['float_bytes']:,}", f"{total['bytes']:,}", ""))
    data = f"looks at {len(batches)} batches" if batches else "looks at no data"
    text = f"{table(lines, left=(0, 1, 4))}\nrounding {rounding} {data}; nothing is written"
    return Answer(text, {"layers": rows, "rounding": rounding, "batches": len(batches), **total})


def _row(name: str, module: nn.Module, scheme: Scheme | None, reason: str | None) -> dict[str, Any]:
    weight = module._parameters.get("weight")
    known = weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter)
    size = weight.numel() * weight.element_size() if known else 0
    packed = size if scheme is None else scheme.bytes(weight.shape)
    return {"name": name, "scheme": str(scheme or "float"), "float_bytes": size, "bytes": packed, "reason": reason}


APPLY = Verb(
    "apply",
    "pack the model as assigned, and save it",
    "Packs the run's model by assignment.json, saves it as one safetensors file, and writes ledger.json: bytes, as\n"
    "predicted and in the file, and errors. Exit code 1 means that they differ.",
    ("mpqkern apply --dry-run", "mpqkern apply --rounding gptq"),
    add,
    run,
)
