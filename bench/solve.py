"""How fast is the bit assignment proven, and what do other solvers do with the same problem?

    OMP_NUM_THREADS=1 python bench/solve.py                # linear, quadratic and frontiers, no other solvers
    OMP_NUM_THREADS=1 python bench/solve.py --peers gurobi scip cpsat highs cbc --grid --limit 10 \\
        --data tables/*.npz --out solve.json

Times are CPU seconds, so numpy's second thread would count as well (and spins on a busy machine). Limits are on the
wall clock: where a row's wall time is far above its CPU time, the machine was busy and its gap means little. Other
solvers are optional installs and run in processes of their own. Files given with --data hold measured pair losses
(see solve_instances.measured).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import write
from solve_instances import Instance, linear, measured, quadratic

import mpqkern as mq
from mpqkern.ledger import table
from mpqkern.solve import linear as exact_linear
from mpqkern.solve import quadratic as exact_quadratic


def ours(problem: Instance, limit: float) -> dict[str, float]:
    start, began = time.process_time(), time.perf_counter()
    if problem.pairwise is None:
        allowed = np.ones(problem.unary.shape, bool)
        found = exact_linear.minimise(problem.unary, problem.rows, problem.caps, allowed, time_limit=limit)
    else:
        arrays = problem.unary, problem.pairwise, problem.rows, problem.caps
        found = exact_quadratic.minimise(*arrays, psd=problem.psd, time_limit=limit)
    seconds, wall = time.process_time() - start, time.perf_counter() - began
    choice = np.asarray(found.choice)
    assert (problem.rows[:, np.arange(len(choice)), choice].sum(1) <= problem.caps).all()
    return {"objective": problem.objective(choice), "bound": float(found.bound), "seconds": seconds, "wall": wall}


def peer(name: str, problem: Instance, limit: float) -> dict[str, float]:
    unary, pairwise, form = problem.costs
    arrays = {"unary": unary, "rows": problem.rows, "caps": problem.caps}
    if pairwise is not None:
        arrays |= {"pairwise": pairwise, "form": form}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(path, **arrays)
        command = [sys.executable, Path(__file__).with_name("solve_peers.py"), name, path, str(limit)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=4 * limit + 60, check=False)
        except subprocess.TimeoutExpired:
            return {"missing": "did not stop at its time limit"}
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"missing": done.stderr[-100:]}


def compared(data: list[Path]) -> list[Instance]:
    """Of every kind one, for other solvers to try as well."""
    problems = [linear(100, 4, k, 4.0) for k in (1, 2, 3)] + [linear(1000, 4, k, 4.0) for k in (1, 3)]
    problems += [quadratic(n, 3, 4.0) for n in (20, 53, 74, 150, 300)] + [quadratic(53, 4, 4.0), quadratic(74, 6, 4.0)]
    problems += [quadratic(74, 3, 4.0, budgets=2), quadratic(74, 3, 4.0, project=False, noise=0.02)]
    problems += [quadratic(300, 3, 4.0, near=0.4)]
    return problems + [measured(path, 4.0, project=p) for path in data for p in (True, False)]


def grid(data: list[Path]) -> list[Instance]:
    """From tight to loose."""
    problems = [
        quadratic(n, b, average, project=p, noise=0.0 if p else 0.02)
        for n in (20, 53, 74, 150, 300)
        for b in (3, 4)
        for average in (3.0, 4.0, 5.0)
        for p in (True, False)
    ]
    return problems + [
        measured(path, average, project=p) for path in data for average in (3.0, 5.0) for p in (True, False)
    ]


def frontiers() -> list[dict[str, float | str]]:
    """50 points of a linear problem with 100 layers, 20 of a quadratic one with 53."""
    rows = []
    for name, problem, points in (
        ("linear L100", linear(100, 4, 1, 4.0), 50),
        ("quadratic L53", quadratic(53, 3, 4.0), 20),
    ):
        start = time.process_time()
        for average in np.linspace(2.3, 7.5, points):
            caps = np.array([int(average / 4.0 * problem.caps[0])])
            got = ours(replace(problem, name=name, caps=caps), 60)
            assert got["bound"] >= got["objective"] - 1e-6 * abs(got["objective"])
        rows.append({"what": f"{points} budgets, {name}", "seconds": time.process_time() - start})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", default=[], choices=["gurobi", "scip", "cpsat", "cbc", "highs"])
    parser.add_argument("--limit", type=float, default=20, help="seconds for each problem and solver")
    parser.add_argument("--data", nargs="*", default=[], type=Path, help="files of measured tables")
    parser.add_argument("--grid", action="store_true", help="all lengths, widths and averages, without other solvers")
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    problems = compared(args.data)
    known = {problem.name for problem in problems}
    alone = [problem for problem in grid(args.data) if problem.name not in known] if args.grid else []
    ours(linear(20, 4, 2, 4.0), args.limit)  # imports and first calls are not what is timed
    fronts = frontiers()
    results, lines = [], [("problem", "solver", "CPU s", "wall s", "objective", "gap")]
    for problem in problems + alone:
        found = {"mpqkern": ours(problem, args.limit)}
        for name in args.peers if problem in problems else []:
            if (problem.pairwise is None) == (name == "cbc"):
                found[name] = peer(name, problem, args.limit)
        for name, f in found.items():
            results.append({"problem": problem.name, "solver": name, **f})
            if "missing" in f:
                lines.append((problem.name, name, "", "", "", str(f["missing"])[:60]))
                continue
            left = (
                ""
                if f["bound"] is None
                else f"{max(f['objective'] - f['bound'], 0) / max(abs(f['objective']), 1e-300):.2%}"
            )
            times = f"{f['seconds']:.3f}", f"{f['wall']:.1f}"
            lines.append((problem.name, name, *times, f"{f['objective']:.6g}", left))
        head = {"bench": "solve", "limit": args.limit, "mpqkern": mq.__version__, "frontiers": fronts}
        write(args.out, head | {"rows": results})  # after each problem: a long run may be cut short
    print(table(lines, left=(0, 1, 5)))
    print(table([("frontier", "CPU s"), *[(str(f["what"]), f"{f['seconds']:.2f}") for f in fronts]]))


if __name__ == "__main__":
    main()
