"""mpqkern report: everything that the run has, as one HTML file, and its plots as PNG if asked."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..compare import Comparison
from ..latency import Latency
from ..ledger import Ledger
from ..reporting import report
from ..solve import Assignment, Frontier
from . import options
from .folder import Folder
from .verb import Answer, Verb

PARTS = {
    "assignment": Assignment.from_json,
    "frontier": Frontier.from_json,
    "comparison": Comparison.from_json,
    "ledger": Ledger.from_json,
    "latency": Latency.from_json,
}


def add(parser: ArgumentParser) -> None:
    parser.add_argument("--title", default="mpqkern", help="of the page")
    parser.add_argument("--out", metavar="FILE", help="where to write it (report.html of the run)")
    parser.add_argument("--png", metavar="FOLDER", help="write the plots there too, as PNG; needs matplotlib")
    options.add_method(parser)
    options.add_run(parser)


def run(args: Namespace) -> Answer:
    folder = Folder(args.run)
    parts = {name: folder.read(f"{name}.json", load) for name, load in PARTS.items()}
    method = args.method or folder.note.get("solve", {}).get("method")
    if args.method or any(folder.path.glob("scores-*.npz")):
        parts["scores"] = folder.scores(method)
    found = {name: part for name, part in parts.items() if part is not None}
    if not found:
        raise ValueError(
            f"--run {folder.path} has nothing to show; wanted `mpqkern score --run {folder.path} ...` first"
        )
    out = Path(args.out) if args.out else folder.path / "report.html"
    file = report(out, title=args.title, pictures=args.png, **found)
    plots = f", and its plots to {args.png}" if args.png else ""
    told = {"file": str(file), "parts": sorted(found), "pictures": args.png}
    return Answer(f"wrote {file}: {', '.join(sorted(found))}{plots}", told)


REPORT = Verb(
    "report",
    "one HTML file with everything that the run has",
    "Writes one self-contained page: plots, certificates and tables of whatever the run directory holds.",
    ("mpqkern report --title 'a small network'",),
    add,
    run,
)
