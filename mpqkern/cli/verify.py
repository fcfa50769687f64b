"""mpqkern verify: the saved file against fp64 references, against what was predicted, and against the float model."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path

from ..catalog import feed
from ..checkpoint import load
from ..ledger import Ledger
from ..verify import verify
from . import options
from .apply import expected, predicted
from .folder import Folder
from .verb import FAILED, GOOD, Answer, Verb


def add(parser: ArgumentParser) -> None:
    parser.add_argument("--file", metavar="FILE", help="the saved model (as `apply` saved it)")
    parser.add_argument("--max-rise", type=float, metavar="X", help="the loss may rise by this; else exit code 1")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of timing (15)")
    options.add_model(parser)
    options.add_loss(parser)
    options.add_run(parser)


def run(args: Namespace) -> Answer:
    folder = Folder(args.run)
    setup = folder.setup(args)
    ledger = folder.need("ledger.json", Ledger.from_json, "apply")
    file = Path(args.file or folder.note.get("apply", {}).get("file", folder.path / "model.safetensors"))
    known = expected(folder)
    before = setup.make_model()
    batches, calls = setup.make_batches(before), setup.calls()
    model = load(lambda: setup.make_model(weights=False), file).eval()
    checked = verify(model, batches[0], forward=calls["forward"] or feed)
    ledger = predicted(known, ledger, model, file, batches, float_model=before, rounds=args.rounds, **calls)
    folder.write("ledger.json", ledger.to_json() + "\n")
    whole, findings = ledger.whole, []
    findings.append(("kernels compute what the codes say", checked.ok))
    findings.append(("bytes in the file are those predicted", ledger.sized_as_predicted is not False))
    if args.max_rise is not None and whole.rise is not None:
        findings.append((f"{whole.loss} rises by at most {args.max_rise:g}", whole.rise <= args.max_rise))
    good = all(ok for _, ok in findings)
    text = "\n".join(f"{'ok   ' if ok else 'FAIL '} {what}" for what, ok in findings)
    data = {"ok": good, "checks": dict(findings), "file": str(file), "ledger": json.loads(ledger.to_json())}
    kernels = [asdict(check) | {"ok": check.ok} for check in (*checked.layers, checked.end_to_end)]
    data |= {"kernels": kernels, "unreached": checked.unreached}
    return Answer(f"{checked}\n\n{ledger}\n\n{text}", data, GOOD if good else FAILED)


VERIFY = Verb(
    "verify",
    "the saved file: does it compute, and was it as predicted?",
    "Loads the saved model and holds each packed layer against an fp64 reference, bytes in the file and milliseconds\n"
    "against what was predicted, and the loss against the float model's; completes ledger.json. Exit code 1 means\n"
    "that a check failed. Other data than for scoring (--data) says what the loss is on data that was not looked at.",
    ("mpqkern verify --max-rise 1",),
    add,
    run,
)
