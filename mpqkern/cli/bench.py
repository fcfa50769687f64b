"""mpqkern bench: how long the layers of a model take with each scheme, or the kernels on shapes that are given."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import torch

from ..latency import Latency, measure_latency
from ..latency.kernels import bench_linear
from ..latency.table import FLOAT
from ..numbers import check_number
from ..scheme import PACKABLE_BITS, Scheme
from . import options, values
from .folder import Folder, Setup
from .verb import Answer, Verb


def add(parser: ArgumentParser) -> None:
    options.add_schemes(parser)
    parser.add_argument("--linear", type=values.shape, nargs="+", metavar="NxK", help="kernels for these, and no model")
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16], help="rows of activations, with --linear (1 16)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="to take the median of (15)")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch (as it has them)")
    parser.add_argument("--no-cache", action="store_true", help="measure anew what is known of this machine")
    options.add_model(parser, "callable without arguments -> batches; the first one is timed")
    options.add_run(parser)


def run(args: Namespace) -> Answer:
    check_number("--rounds", args.rounds, "a whole number above 0", lambda v: v > 0, whole=True)
    schemes = [s for s in options.schemes(args) if s is not None]
    if args.threads is None:
        return _run(args, schemes)
    check_number("--threads", args.threads, "a whole number above 0", lambda v: v > 0, whole=True)
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        return _run(args, schemes)
    finally:
        torch.set_num_threads(before)


def _run(args: Namespace, schemes: list[Scheme]) -> Answer:
    if args.linear:
        check_number("--m", min(args.m), "rows above 0", lambda v: v > 0, whole=True)
        found = bench_linear(args.linear, m=args.m, bits=schemes, rounds=args.rounds)
        return Answer(str(found), found.to_dict())
    folder = Folder(args.run)
    setup = folder.setup(args)
    latency = _measured(folder, setup, schemes, rounds=args.rounds, cache=not args.no_cache)
    file = folder.path / "latency.json"
    text = f"milliseconds, {torch.get_num_threads()} thread(s)\n{latency}\nkept as {file}"
    return Answer(text, {"ms": {n: dict(row) for n, row in latency.items()}, "whole": dict(latency.whole),
                         "rest": latency.rest, "file": str(file)})  # fmt: skip


def latency_of(folder: Folder, setup: Setup, schemes: Sequence[Scheme | None]) -> Latency:
    """What the run has, if it knows these schemes; else measured now."""
    known = folder.read("latency.json", Latency.from_json)
    wanted = {FLOAT if s is None else str(s) for s in schemes}
    if known is not None and all(wanted <= row.keys() for row in known.values()):
        return known
    return _measured(folder, setup, [s for s in schemes if s is not None and s.bits in PACKABLE_BITS])


def _measured(folder: Folder, setup: Setup, schemes: Sequence[Scheme], **how: object) -> Latency:
    model = setup.make_model()
    batch, forward = setup.make_batches(model)[0], setup.calls()["forward"]
    latency = measure_latency(model, batch, bits=schemes, forward=forward, **how)
    folder.write("latency.json", latency.to_json())
    folder.keep(setup, bench={"schemes": [str(s) for s in schemes], "threads": torch.get_num_threads()})
    return latency


BENCH = Verb(
    "bench",
    "milliseconds of each layer by width, or of kernels",
    "Times the layers of the run's model inside of it, on the first batch, and writes latency.json, by which\n"
    "`solve --ms` goes. With --linear, times packed kernels on weights of these shapes: against torch's float\n"
    "product, and the bytes of the weight a second as a share of what was measured to be read from memory.",
    (
        "mpqkern bench --model mpqkern.cli.example:net --data mpqkern.cli.example:batches --rounds 3",
        "mpqkern bench --linear 64x256 --m 1 16 --bits 2 4 8 --rounds 3 --threads 1 --json",
    ),
    add,
    run,
)
