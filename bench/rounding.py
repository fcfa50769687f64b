"""Which rounding keeps a model whole? Each way to round, at uniform and mixed widths, on data held out.

    python bench/rounding.py --models resnet8 vit chargpt
    python bench/rounding.py --models efficientnet --fold --samples 64 --average 4.6 --pairs block --assign-bits 4 8

The mixed assignments share one budget of average bits and are found once, on weights rounded by GPTQ; every rounding
then gets the same. Seconds are process time of one thread, for rounding and packing. "8a8" has 8-bit activations too.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from harness import write
from models import CASES
from models.cases import Case

import mpqkern as mq
from mpqkern.ledger import table
from mpqkern.rounding import AdaRound, Rounding, as_rounding

ROUNDINGS = ["minmax", "mse", "hqq", "gptq", "gpfq", "qronos", "adaround", "brecq", "uwc"]
PLANS = {"8a8": mq.Scheme(8, act_bits=8), "8": mq.Scheme(8), "4": mq.Scheme(4), "2": mq.Scheme(2)}


def plans(case: Case, args: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """By name: what each layer gets."""
    found: dict[str, Mapping[str, Any]] = {name: {"*": PLANS[name]} for name in args.plans}
    for method in args.mixed:
        start = time.process_time()
        how: dict[str, Any] = {"rounding": "gptq", "bits": args.assign_bits, "solver": {"time_limit": args.time_limit}}
        if method == "clado":
            how["pairs"] = args.pairs
        batches = case.calibration[: args.assign_batches]
        best = mq.assign(case.model, batches, mq.Budget(avg_bits=args.average), method=method, **how)
        print(f"{method} at {args.average} bits: {best.status}, {time.process_time() - start:.1f} s")
        found[f"{args.average:g} {method}"] = best.schemes
    return found


def measured(case: Case, rounding: Rounding, plan: Mapping[str, Any]) -> dict[str, float]:
    """What a model rounded in this way is worth."""
    model, data = copy.deepcopy(case.model), {}
    if rounding.needs != "nothing":
        data["batches"] = case.calibration
    start = time.process_time()
    ledger = mq.swap_(model, plan, rounding=rounding, **data)
    seconds = time.process_time() - start
    return {**case.evaluate(model), "bytes": ledger.bytes, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet8"], choices=list(CASES))
    parser.add_argument("--roundings", nargs="+", default=ROUNDINGS)
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--mixed", nargs="*", default=["clado", "ompq"], choices=list(mq.methods()))
    parser.add_argument("--average", type=float, default=4, help="average bits of the mixed assignments")
    parser.add_argument("--assign-bits", type=int, nargs="+", default=[2, 4, 8], help="widths to choose from")
    parser.add_argument("--pairs", default="all", choices=["all", "block"], help="those that CLADO measures")
    parser.add_argument("--assign-batches", type=int, help="batches to measure on for the mixed assignments; all")
    parser.add_argument("--iterations", type=int, help="for those that learn, in place of their own")
    parser.add_argument("--samples", type=int, help="calibration samples; each model has a number of its own")
    parser.add_argument("--fold", action="store_true", help="fold the batch norms first")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds for a cross-layer solve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        case = CASES[name](**({} if args.samples is None else {"samples": args.samples}))
        if args.fold:
            print(mq.fold_batchnorm_(case.model, case.calibration[0]))
        lines = [("weights", "rounding", "loss", "accuracy", "bytes", "seconds")]
        base = case.evaluate(case.model)
        rows.append({"model": name, "plan": "float", **base})
        lines.append(("float", "", f"{base['loss']:.4f}", f"{base['accuracy']:.2%}", "", ""))
        for label, plan in plans(case, args).items():
            for rounding in args.roundings:
                how = as_rounding(rounding)
                if args.iterations and isinstance(how, AdaRound):
                    how = replace(how, iterations=args.iterations)
                got = measured(case, how, plan)
                rows.append({"model": name, "plan": label, "rounding": rounding, **got})
                shown = f"{got['loss']:.4f}", f"{got['accuracy']:.2%}", f"{got['bytes']:,}", f"{got['seconds']:.1f}"
                lines.append((label, rounding, *shown))
                write(args.out, {"bench": "rounding", "arguments": vars(args), "rows": rows})  # what there is so far
        print(f"\n{name}\n{table(lines, left=(0, 1))}")


if __name__ == "__main__":
    main()
