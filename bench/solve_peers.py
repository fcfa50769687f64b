"""One problem, one other solver, in a process of its own (some cannot share one with HiGHS).

    python bench/solve_peers.py gurobi problem.npz 60

Prints a JSON object: objective, bound, CPU seconds, wall seconds; or {"missing": why}.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def main() -> None:
    solver, path, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
    data = np.load(path)
    pairs = data.get("pairwise")
    try:
        run = {"gurobi": gurobi, "scip": scip, "cpsat": cpsat, "cbc": cbc, "highs": highs}[solver]
        start, began = time.process_time(), time.perf_counter()
        children = _children()
        extra = {"form": data["form"]} if solver == "gurobi" and pairs is not None else {}
        objective, bound = run(data["unary"], pairs, data["rows"], data["caps"], limit, **extra)
        seconds = time.process_time() - start + _children() - children
        wall = time.perf_counter() - began
        print(json.dumps({"objective": objective, "bound": bound, "seconds": seconds, "wall": wall}))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
    except Exception as error:
        print(json.dumps({"missing": f"{type(error).__name__}: {error}"[:120]}))


def _children() -> float:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def gurobi(unary, pairs, rows, caps, limit, form=None):  # type: ignore[no-untyped-def]
    """As CLADO's code states it: the matrix with its diagonal as one quadratic form."""
    import gurobipy as gp

    layers, choices = unary.shape
    with gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        model = gp.Model(env=env)
        model.Params.TimeLimit, model.Params.Threads, model.Params.MIPGap = limit, 1, 1e-9
        x = model.addMVar(layers * choices, vtype="B")
        model.addConstr(np.kron(np.eye(layers), np.ones(choices)) @ x == 1)
        model.addConstr(rows.reshape(len(rows), -1).astype(float) / caps[:, None] @ x <= 1)
        if form is None:
            model.setObjective(unary.ravel() @ x)
        else:
            model.setObjective(x @ form @ x)
            model.Params.NonConvex = 2
        model.optimize()
        return model.ObjVal, model.ObjBound


def scip(unary, pairs, rows, caps, limit):  # type: ignore[no-untyped-def]
    import pyscipopt

    layers, choices = unary.shape
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/time", limit)
    x = [model.addVar(vtype="B") for _ in range(layers * choices)]
    for layer in range(layers):
        model.addCons(pyscipopt.quicksum(x[layer * choices : (layer + 1) * choices]) == 1)
    for row, cap in zip(rows.reshape(len(rows), -1), caps, strict=True):
        model.addCons(pyscipopt.quicksum(float(c / cap) * v for c, v in zip(row, x, strict=True)) <= 1)
    terms = [float(c) * v for c, v in zip(unary.ravel(), x, strict=True)]
    if pairs is None:
        model.setObjective(pyscipopt.quicksum(terms))
    else:
        matrix = pairs.reshape(layers * choices, -1)
        pick = zip(*np.nonzero(np.triu(matrix, 1)), strict=True)
        terms += [float(matrix[i, j]) * x[i] * x[j] for i, j in pick]
        value = model.addVar(vtype="C", lb=None)
        model.addCons(pyscipopt.quicksum(terms) <= value)
        model.setObjective(value)
    model.optimize()
    return model.getObjVal(), model.getDualbound()


def cpsat(unary, pairs, rows, caps, limit):  # type: ignore[no-untyped-def]
    """A Boolean for every product; costs in whole numbers of 1e-9 of the largest."""
    from ortools.sat.python import cp_model

    layers, choices = unary.shape
    flat = unary.ravel()
    matrix = np.zeros((flat.size, flat.size)) if pairs is None else pairs.reshape(flat.size, -1)
    scale = 1e9 / max(np.abs(flat).max(), np.abs(matrix).max())
    model = cp_model.CpModel()
    x = [model.NewBoolVar("") for _ in range(flat.size)]
    for layer in range(layers):
        model.AddExactlyOne(x[layer * choices : (layer + 1) * choices])
    for row, cap in zip(rows.reshape(len(rows), -1), caps, strict=True):
        model.Add(cp_model.LinearExpr.WeightedSum(x, row.tolist()) <= int(cap))
    terms, costs = list(x), np.rint(flat * scale).astype(np.int64).tolist()
    for i, j in zip(*np.nonzero(np.triu(matrix, 1)), strict=True):
        both = model.NewBoolVar("")
        if matrix[i, j] > 0:
            model.AddBoolOr(both, x[i].Not(), x[j].Not())
        else:
            model.AddImplication(both, x[i])
            model.AddImplication(both, x[j])
        terms.append(both)
        costs.append(round(matrix[i, j] * scale))
    model.Minimize(cp_model.LinearExpr.WeightedSum(terms, costs))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds, solver.parameters.num_workers = limit, 1
    if solver.Solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise RuntimeError("no assignment found in time")
    return solver.ObjectiveValue() / scale, solver.BestObjectiveBound() / scale


def cbc(unary, pairs, rows, caps, limit):  # type: ignore[no-untyped-def]
    """PuLP with its bundled CBC: what most tools of the field use for the linear problem."""
    import pulp

    if pairs is not None:
        raise ValueError("CBC takes no quadratic objective")
    layers, choices = unary.shape
    model = pulp.LpProblem("bits", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j in range(choices)] for i in range(layers)]
    model += pulp.lpSum(float(unary[i, j]) * x[i][j] for i in range(layers) for j in range(choices))
    for i in range(layers):
        model += pulp.lpSum(x[i]) == 1
    for row, cap in zip(rows, caps, strict=True):
        model += pulp.lpSum(float(row[i, j] / cap) * x[i][j] for i in range(layers) for j in range(choices)) <= 1
    model.solve(pulp.PULP_CBC_CMD(msg=0, timeLimit=limit, gapRel=0, threads=1))
    return float(pulp.value(model.objective)), None  # PuLP does not pass the bound on


def highs(unary, pairs, rows, caps, limit):  # type: ignore[no-untyped-def]
    """HiGHS on the products (RLT), as mpqkern's own cross-check states it."""
    from mpqkern.solve import quadratic

    out = quadratic.minimise(unary, pairs, rows, caps, engine="highs", time_limit=limit)
    return out.objective, out.bound


if __name__ == "__main__":
    main()
