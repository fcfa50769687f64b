"""mpqkern solve and mpqkern frontier: the best assignment under budgets, and for all budgets of a kind."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser, Namespace
from typing import Any

from ..ledger import table
from ..scores.table import Scores
from ..solve import Assignment, Frontier, frontier, solve
from ..solve.budget import COUNTS
from . import options
from .bench import latency_of
from .folder import Folder
from .verb import GOOD, INTERRUPTED, Answer, Verb

KINDS = tuple(options.BUDGETS)


def add_solve(parser: ArgumentParser) -> None:
    options.add_method(parser)
    options.add_budgets(parser)
    options.add_constraints(parser)
    parser.add_argument("--objective", choices=("sum", "minimax"), default="sum", help="all layers, or the worst one")
    parser.add_argument("--rel-gap", type=float, default=0.0, metavar="X", help="good enough is this close (0)")
    parser.add_argument("--explain", nargs="+", default=[], metavar="LAYER", help="what other choices would change")
    options.add_model(parser)
    options.add_run(parser)


def run_solve(args: Namespace) -> Answer:
    folder = Folder(args.run)
    scores, setup = folder.scores(args.method), folder.setup(args)
    limits = options.budgets(args)
    if args.ms is not None:
        limits.append(latency_of(folder, setup, scores.schemes).budget(args.ms))
    how = {"objective": args.objective, "rel_gap": args.rel_gap, "time_limit": args.time_limit}
    found = solve(scores, *limits, **options.constraints(args), **how)
    reasons = [found.explain(layer) for layer in args.explain]
    file = folder.write("assignment.json", found.to_json())
    folder.keep(setup, solve={"method": _method(folder, args, scores), "budgets": [repr(b) for b in limits]})
    code = INTERRUPTED if found.status == "interrupted" else GOOD
    data = {**json.loads(found.to_json()), "gap": found.gap, "bits": found.bits, "file": str(file)}
    return Answer("\n\n".join([_text(found, scores), *reasons]), data | {"explained": reasons}, code)


def _text(found: Assignment, scores: Scores) -> str:
    params = {layer.name: layer.params for layer in scores.layers}
    mean = sum(found.bits[name] * params[name] for name in params) / max(1, sum(params.values()))
    return f"{found}\n{mean:.4g} bits on average"


def _method(folder: Folder, args: Namespace, scores: Scores) -> str | None:
    return args.method or folder.note.get("score", {}).get("method") or scores.provenance.get("method")


def add_frontier(parser: ArgumentParser) -> None:
    options.add_method(parser)
    parser.add_argument("--kind", choices=KINDS, default="bytes", help="of the budget (bytes)")
    parser.add_argument("--count", choices=("packed", "nominal"), help="whether bytes count scales and padding")
    parser.add_argument("--points", type=int, default=16, metavar="N", help="limits, where they have to be spread (16)")
    parser.add_argument("--at", type=float, nargs="+", metavar="X", help="these limits, each solved exactly")
    options.add_constraints(parser)
    options.add_model(parser)
    options.add_run(parser)


def run_frontier(args: Namespace) -> Answer:
    folder = Folder(args.run)
    scores, setup = folder.scores(args.method), folder.setup(args)
    more: dict[str, Any] = {} if args.time_limit is None else {"time_limit": args.time_limit}
    if args.kind == "ms":
        more["table"] = latency_of(folder, setup, scores.schemes)
    elif "packed" in COUNTS[args.kind]:
        more["count"] = args.count
    found = frontier(scores, args.kind, at=args.at, points=args.points, **options.constraints(args), **more)
    file = folder.write("frontier.json", found.to_json())
    folder.keep(setup, frontier={"method": _method(folder, args, scores), "kind": args.kind})
    return Answer(_points(found), {**json.loads(found.to_json()), "file": str(file)})


def _points(found: Frontier) -> str:
    lines = [(found.kind, "objective", "bound", "status", "")]
    for i, point in enumerate(found):
        bound = f"{found.bound[i]:.6g}" if math.isfinite(found.bound[i]) else "none"
        knee = "knee" if i == found.knee and len(found) > 2 else ""
        lines.append((f"{found.use[i]:,.10g}", f"{point.objective:.6g}", bound, point.status, knee))
    return table(lines, left=(3, 4))


SOLVE = Verb(
    "solve",
    "the best assignment under your budgets, with a proof",
    "Takes scores of the run and writes assignment.json, which may be edited by hand. Exit code 1 means that nothing\n"
    "fits; the message says what clashes.",
    (
        "mpqkern solve --avg-bits 4",
        "mpqkern solve --mbytes 0.01 --pin 0=8 --forbid 'Linear=2' --at-most 2=1 --explain 5",
    ),
    add_solve,
    run_solve,
)
FRONTIER = Verb(
    "frontier",
    "the least cost for every budget of a kind",
    "Takes scores of the run and writes frontier.json: points of least cost, each with what is proven of it.",
    ("mpqkern frontier --kind bytes",),
    add_frontier,
    run_frontier,
)
