"""Which method finds the better bits? Every method, the same budgets, held-out data, several calibration sets.

    python bench/compare.py --models resnet8 vit --methods size roundoff fisher mpqco delta_loss hawq --seeds 3
    python bench/compare.py --models efficientnet --averages 3 4 --samples 32 --out bench/results/compare-enet.json

A seed picks the calibration samples and feeds what is random in a method; models and held-out data stay. Columns are
means over seeds, +- half the range between the least and the greatest of them. Budgets are average bits.
"""

from __future__ import annotations

import argparse
import json

import torch
from harness import write
from models import CASES

import mpqkern as mq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet8"], choices=list(CASES))
    parser.add_argument("--methods", nargs="+", default=list(mq.methods()), choices=list(mq.methods()))
    parser.add_argument("--averages", type=float, nargs="+", default=[2.5, 3, 4], help="average bits")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="calibration samples; each model has a number of its own")
    parser.add_argument("--psd", default="none", choices=["none", "clip", "shift"], help="of pairs, when solving")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds for each cross-layer solve")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budgets = [mq.Budget(avg_bits=average) for average in args.averages]
    rows: list[dict[str, object]] = []
    for name in args.models:
        runs = []
        for seed in range(args.seeds):
            try:
                case = CASES[name](seed=seed, **({} if args.samples is None else {"samples": args.samples}))
            except ImportError as error:
                print(f"{name} is skipped: {error}")
                rows.append({"model": name, "skipped": str(error)})
                break
            run = mq.compare(
                case.model, case.calibration, case.evaluate, budgets,
                methods=args.methods, bits=args.bits, seed=seed,
                solver={"time_limit": args.time_limit, "psd": args.psd},
            )  # fmt: skip
            runs.append(run)
            rows.append({"model": name, "seed": seed, **json.loads(run.to_json())})
            write(args.out, {"bench": "compare", "arguments": vars(args), "rows": rows})  # what there is so far
        if runs:
            print(f"\n{name}, {args.seeds} calibration sets\n{mq.Repeated(runs)}")


if __name__ == "__main__":
    main()
