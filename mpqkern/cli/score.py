"""mpqkern score: what each layer suffers at each width, measured into a bank that survives a kill."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..catalog import catalog
from ..ledger import table
from ..scheme import Scheme
from ..scores.entry import METHODS, plan, score
from ..scores.table import Scores
from . import options, values
from .folder import Folder, Setup
from .loading import relative
from .verb import Answer, Verb


def add(parser: ArgumentParser) -> None:
    options.add_model(parser)
    options.add_loss(parser)
    known = [name for name, (file, *_) in METHODS.items() if file is not None]
    parser.add_argument("--method", default="clado", choices=known, metavar="NAME", help=f"one of {', '.join(known)}")
    options.add_schemes(parser)
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="names or patterns; all that can be packed")
    parser.add_argument("--rounding", default="minmax", help="of the weights that are tried (minmax)")
    parser.add_argument("--option", type=values.option, action="append", metavar="NAME=VALUE", help="of the method")
    parser.add_argument("--time-limit", type=float, metavar="S", help="stop after so many seconds; to be gone on with")
    parser.add_argument("--max-evals", type=int, metavar="N", help="stop after so many evaluations; the same")
    parser.add_argument("--memory", type=values.size, default="1GiB", help="to hold at once beside the model (1GiB)")
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and do nothing")
    options.add_run(parser)


def run(args: Namespace) -> Answer:
    folder = Folder(args.run)
    setup, schemes = folder.setup(args), options.schemes(args)
    model = setup.make_model()
    batches = setup.make_batches(model)
    asked = {"method": args.method, "bits": schemes, "layers": args.layers, "memory": args.memory}
    asked |= {**setup.calls(), **dict(args.option or ())}
    if args.dry_run:
        work = plan(model, batches, **asked)
        sizes = _sizes(model, schemes)
        lines = [("scheme", "bytes"), *((name, f"{size:,}") for name, size in sizes.items())]
        minutes = f" (about {work.seconds / 60:.3g} minutes)" if work.seconds and work.seconds >= 60 else ""
        text = f"{args.method}: {work}{minutes}\n{table(lines)}\nnothing is written"
        return Answer(text, {"method": args.method, **vars(work), "sizes": sizes})
    folder.keep(setup)
    limits = {"time_limit": args.time_limit, "max_evals": args.max_evals}
    found = _scored(folder, model, batches, asked | limits | {"rounding": args.rounding, "seed": setup.seed})
    found.save(folder.scores_file(args.method))
    words = {"method": args.method, "bits": [str(s or "float") for s in schemes], "layers": args.layers}
    folder.keep(setup, score=words | {"rounding": args.rounding, "options": dict(args.option or ())})
    return Answer(_text(found, setup), _data(found, str(folder.scores_file(args.method))))


def _scored(folder: Folder, model: Any, batches: Any, asked: dict[str, Any]) -> Scores:
    try:
        return score(model, batches, bank=folder.path / "bank", **asked)
    except ValueError as error:
        if "under other conditions" not in str(error):
            raise
        raise ValueError(f"{str(error).removesuffix('; wanted another folder')}; wanted another --run") from error


def _sizes(model: Any, schemes: list[Scheme | None]) -> dict[str, int]:
    """Bytes of all layers by scheme; without scales and padding for a width that does not pack."""
    layers, found = catalog(model), {}
    for s in schemes:
        try:
            size = sum(4 * layer.params if s is None else s.bytes(layer.weight_shape) for layer in layers)
        except ValueError:
            size = sum(layer.params for layer in layers) * s.bits // 8
        found[str(s or "float")] = size
    return found


def _text(found: Scores, setup: Setup) -> str:
    note = found.provenance
    lines = [("layer", *(str(s or "float") for s in found.schemes))]
    lines += [(name, *(f"{v:.4g}" for v in row)) for name, row in zip(found.names, found.unary, strict=True)]
    pairs = "" if found.pairwise is None else ", and of every two layers together"
    kept = f"{note['method']} on {note['samples']} samples of {relative(setup.data)}: cost of each layer{pairs}"
    return f"{table(lines)}\n{kept}; {note['evaluations']} evaluations in {note['seconds']:.3g} s"


def _data(found: Scores, file: str) -> dict[str, Any]:
    schemes = [str(s or "float") for s in found.schemes]
    costs = {
        name: dict(zip(schemes, row, strict=True)) for name, row in zip(found.names, found.unary.tolist(), strict=True)
    }
    return {"file": file, "costs": costs, "pairwise": found.pairwise is not None, "provenance": found.provenance}


SCORE = Verb(
    "score",
    "measure what each layer suffers at each width",
    "Measures, by one method, what each scheme costs in each layer. A run that was stopped or killed goes on when the\n"
    "same command is given again; several methods can be in one run.",
    (
        "mpqkern score --model mpqkern.cli.example:net --data mpqkern.cli.example:batches --method clado --dry-run",
        "mpqkern score --model mpqkern.cli.example:net --data mpqkern.cli.example:batches --method clado",
    ),
    add,
    run,
    again="what is measured is kept: the same command goes on from there",
)
