"""Published searches: their sizes and operations come out as printed, and their problems are solved to the optimum.

OMPQ (Ma et al. 2021, arXiv 2109.07865), CSMPQ (Wang et al. 2022, arXiv 2212.10220), LIMPQ (Tang et al. 2022,
arXiv 2203.08368) and HAWQ-v3 (Yao et al. 2020, arXiv 2011.10680).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mpqkern.scheme import Layer, Scheme
from mpqkern.solve import Budget, Scores, solve
from tests.reference.networks import R18, R18_ENDS, R18_HEAD, R18_STEM, mobilenet_v2, resnet18, resnet50, units

OMPQ_PTQ = {  # MiB: widths of 18 units
    3.0: "4 3 4 4 4 4 4 3 4 4 2 2 2 2 2 2 2 2",
    3.5: "4 3 3 4 4 4 4 4 4 4 3 3 4 3 2 2 2 3",
    4.0: "4 4 4 4 4 4 4 3 3 3 3 3 4 3 2 3 3 3",
    4.5: "4 3 3 4 4 4 4 4 4 4 3 3 4 4 3 3 3 3",
    5.0: "4 3 3 3 4 4 4 3 4 3 4 3 4 3 3 4 4 4",
    5.5: "4 4 4 4 4 4 4 4 4 4 3 4 4 4 4 4 4 4",
}
OMPQ_R18 = [8] * 4 + [7] + [8] * 4 + [4, 6, 8, 4, 4, 4, 4]  # convolutions between the first and the classifier
CSMPQ_R18 = [8] * 8 + [7, 5, 8, 5, 4, 4, 4, 4]
OMPQ_R50 = {
    16.0: [8] * 21 + [8, 4, 4, 8, 4, 8, 8, 4, 8, 8, 5, 8, 8, 8, 8, 8, 4, 8] + [4] * 8 + [8],
    18.7: [8] * 21 + [8, 8, 4] + [8] * 15 + [8, 4, 4, 5, 4, 8, 8, 4, 8],
}


def spends(budget: Budget, layers: list[Layer], schemes: list[Scheme]) -> float:
    """What an assignment costs, by pinning every layer."""
    known = list(dict.fromkeys(schemes))
    scores = Scores(layers, known, np.zeros((len(layers), len(known))))
    answer = solve(scores, budget, pins={la.name: s for la, s in zip(layers, schemes, strict=True)})
    return next(iter(answer.costs.values()))


def spread(layers: list[Layer], bits: list[int], act: int | None = None) -> list[Scheme]:
    """A scheme for each layer: 8 bits at the ends, and for a downsample those of the convolution before it."""
    found, rest = [], iter(bits)
    for layer in layers:
        if layer.name in ("stem", "head"):
            found.append(Scheme(8, act_bits=act and 8))
        else:
            found.append(found[-1] if "down" in layer.name else Scheme(next(rest), act_bits=act))
    assert next(rest, None) is None
    return found


# --- sizes and bit operations ---


@pytest.mark.parametrize("published", OMPQ_PTQ)
def test_ompq_resnet18_ptq_sizes(published: float) -> None:
    schemes = [Scheme(int(b)) for b in OMPQ_PTQ[published].split()]
    got = spends(Budget(mbytes=99, count="nominal"), units([R18_STEM, *R18, R18_HEAD]), schemes)
    assert got == pytest.approx(published, abs=0.002)


@pytest.mark.parametrize(("bits", "published"), [(OMPQ_R18, 6.70), (CSMPQ_R18, 6.68)])
def test_resnet18_qat_sizes(bits: list[int], published: float) -> None:
    layers = [*units(R18), Layer("ends", "linear", (R18_ENDS, 1), R18_ENDS)]
    schemes = [Scheme(b) for b in [*bits, 8]]
    assert spends(Budget(mbytes=7, count="nominal"), layers, schemes) == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("published", OMPQ_R50)
def test_ompq_resnet50_sizes(published: float) -> None:
    layers = resnet50()
    assert len(layers) == 54 and sum(layer.params for layer in layers) == 25_502_912
    got = spends(Budget(mbytes=99, count="nominal"), layers, spread(layers, OMPQ_R50[published]))
    assert got == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize(("bits", "published"), [(4, 5.574), (2, 2.787)])
def test_uniform_resnet18(bits: int, published: float) -> None:
    layers = units([R18_STEM, *R18, R18_HEAD])
    assert sum(layer.params for layer in layers) == 11_689_512
    got = spends(Budget(mbytes=9, count="nominal"), layers, [Scheme(bits)] * 18)
    assert got == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(("bits", "published"), [(4, 1.671), (2, 0.836)])
def test_uniform_mobilenet_v2(bits: int, published: float) -> None:
    got = spends(Budget(mbytes=9, count="nominal"), units(mobilenet_v2()), [Scheme(bits)] * 53)
    assert got == pytest.approx(published, abs=5e-4)


def with_norms(layers: list[Layer]) -> list[Layer]:
    """Operations as OMPQ counts them: 5 more an output for batch norm and ReLU; in the classifier 2 K + 1."""
    found = []
    for layer in layers:
        outputs, k = layer.macs * layer.weight_shape[0] // layer.params, layer.params // layer.weight_shape[0]
        more = 5 * outputs if layer.kind == "conv2d" else outputs * (k + 1)
        found.append(replace(layer, macs=layer.macs + more))
    return found


@pytest.mark.parametrize(
    ("layers", "bits", "act", "counted", "published"),
    [
        (resnet18(), OMPQ_R18, 6, 75.1, 75),
        (resnet18(), OMPQ_R18, 8, 97.5, 97),
        (resnet18(), CSMPQ_R18, 6, 75.1, 75),
        (resnet50(stride_in=3), OMPQ_R50[16.0], 5, 139.6, 141),
        (resnet50(stride_in=3), OMPQ_R50[18.7], 5, 155.0, 156),
    ],
)
def test_bit_operations_with_norms(
    layers: list[Layer], bits: list[int], act: int, counted: float, published: int
) -> None:
    got = spends(Budget(gbops=1000), with_norms(layers), spread(layers, bits, act))
    assert got == pytest.approx(counted, abs=0.06) and got == pytest.approx(published, rel=0.012)


@pytest.mark.parametrize(("act", "counted"), [(6, 74.4), (8, 96.7)])
def test_bit_operations_of_multiply_adds_alone(act: int, counted: float) -> None:
    layers = resnet18()
    assert len(layers) == 21 and sum(layer.params for layer in layers) == 11_678_912
    assert spends(Budget(gbops=1000), layers, spread(layers, OMPQ_R18, act)) == pytest.approx(counted, abs=0.06)


@pytest.mark.parametrize(
    ("layers", "bits", "size", "gbops"),
    [(resnet18(), 8, 11.1, 116), (resnet18(), 4, 5.8, 34), (resnet50(), 8, 24.5, 247), (resnet50(), 4, 13.1, 67)],
)
def test_hawq_uniform_rows(layers: list[Layer], bits: int, size: float, gbops: int) -> None:
    schemes = spread(layers, [bits] * sum(la.name not in ("stem", "head") and "down" not in la.name for la in layers))
    assert spends(Budget(mbytes=99, count="nominal"), layers, schemes) == pytest.approx(size, rel=0.01)
    with_act = [Scheme(s.bits, act_bits=s.bits) for s in schemes]
    assert spends(Budget(gbops=1000), layers, with_act) == pytest.approx(gbops, rel=0.022)  # 34.7 is printed as 34


# --- OMPQ's LP ---


def test_ompq_lp_of_csmpq_gammas() -> None:
    """The LP with CSMPQ's published gammas ends at 8 x 9, 4, 8, 5.89, 4 x 4 for 6.7 MiB."""
    gamma = [132, 136, 128, 127, 76, 76, 91, 72, 51, 48, 67, 46, 45, 46, 49, 49]
    bits = [4, 5, 6, 7, 8]
    scores = Scores(units(R18), bits, -np.outer(gamma, bits) * 1e-4)
    budget = Budget(mbytes=6.7 - R18_ENDS / 2**20, count="nominal")
    got = solve(scores, budget, relaxation="lp", rounding="floor")
    wanted = [8] * 9 + [4, 8, 5.89] + [4] * 4
    assert list(got.relaxed.values()) == pytest.approx(wanted, abs=0.005)
    exact = solve(scores, budget)
    assert got.bound <= exact.objective <= got.objective and got.slack["mbytes"] >= 0
    assert exact.bound == exact.objective


def test_ompq_mobilenet_rounds_over_its_budget_and_says_so() -> None:
    sizes = mobilenet_v2()
    assert len(sizes) == 53 and sum(sizes) == 3_504_872
    scores = Scores(units(sizes), [2, 3, 4], np.tile([-2.0, -3.0, -4.0], (53, 1)))
    budget = Budget(mbytes=1.5, count="nominal")
    near = solve(scores, budget, relaxation="lp", rounding="nearest")
    assert list(near.bits.values()) == [4] * 52 + [3]
    assert near.status == "over budget" and near.costs["mbytes"] == pytest.approx(1.519, abs=5e-4)
    assert near.slack["mbytes"] < 0 and near.bound <= near.objective
    for rounding in ("floor", "dfs", "exact"):
        got = solve(scores, budget, relaxation="lp", rounding=rounding)
        assert got.costs["mbytes"] <= 1.5 and got.status in ("optimal", "feasible")


# --- searches of the same shape, on made-up sensitivities ---


def test_limpq_joint_widths_under_two_budgets() -> None:
    """LIMPQ's ResNet-50 search: 52 layers, 25 pairs of widths, bit operations of 3 x 4 and 12.2-fold compression."""
    rng = np.random.default_rng(0)
    bits = [6, 5, 4, 3, 2]
    pairs = [(w, a) for w in bits for a in bits]
    layers = resnet50(stride_in=3)[1:-1]
    weight, act = (rng.uniform(0.01, 0.1, (52, 1)) * [0.2, 0.3, 0.45, 0.65, 1.0] for _ in range(2))
    unary = [[act[i][bits.index(a)] + 2 * weight[i][bits.index(w)] for w, a in pairs] for i in range(52)]
    scores = Scores(layers, [Scheme(w, act_bits=a) for w, a in pairs], unary)
    total, room = sum(la.macs for la in layers), int(32 * 25_502_912 / 12.2) - 8 * (25_502_912 - 23_445_504)
    rows = [[la.params * w for w, a in pairs] for la in layers]
    got = solve(scores, Budget(gbops=12 * total / 1e9), Budget(limit=room, rows=rows, name="bits"))
    assert got.status == "optimal" and got.gap == 0.0
    spent = sum(la.macs * s.bits * s.act_bits for la, s in zip(layers, got.schemes.values(), strict=True))
    assert spent <= 12 * total and got.costs["bits"] <= room
    # Two checks that do not trust the solver: by its prices almost nothing is left to win, and no single change wins.
    gbops, width = got.prices["gbops"] / 1e9, got.prices["bits"]
    priced = [
        [u + gbops * la.macs * w * a + width * la.params * w for u, (w, a) in zip(line, pairs, strict=True)]
        for la, line in zip(layers, unary, strict=True)
    ]
    bound = sum(map(min, priced)) - gbops * 12 * total - width * room
    assert bound <= got.objective <= bound * 1.005
    for name in got.schemes:
        lines = [line.split() for line in got.explain(name).splitlines() if line.endswith("fits")]
        assert all(float(cells[1]) > 0 for cells in lines)


def hawq(layers: list[Layer], seed: int) -> tuple[Scores, list[list[str]]]:
    """HAWQ-v3's problem: 4 or 8 bits, Hessian trace times squared error, a downsample tied into its block."""
    inner = layers[1:-1]
    trace = 0.1 * np.random.default_rng(seed).lognormal(0, 0.7, len(inner)) / np.arange(1, len(inner) + 1)
    error = 1e-4 * np.array([layer.params for layer in inner]) ** 0.8
    scores = Scores(inner, [Scheme(4, act_bits=4), Scheme(8, act_bits=8)], np.outer(trace * error, [1, 1 / 256]))
    downs = [layer.name for layer in inner if "down" in layer.name]
    return scores, [[name, name.replace("down", "1")] for name in downs]


@pytest.mark.parametrize("kind", ["size", "operations", "latency"])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_hawq_resnet18_equals_all_65536_assignments(kind: str, part: float) -> None:
    scores, ties = hawq(resnet18(), seed=0)
    slow = np.random.default_rng(1).uniform(0.02, 0.4, (19, 1)) * [1, 1.7]
    whole = {"size": [la.params for la in scores.layers], "operations": [la.macs for la in scores.layers]}
    row = slow if kind == "latency" else np.outer(whole[kind], [4, 8] if kind == "size" else [16, 64])
    cap = row[:, 0].sum() + part * (row[:, 1] - row[:, 0]).sum()
    got = solve(scores, Budget(limit=float(cap), rows=row), ties=ties)
    tied = {scores.names.index(a): scores.names.index(b) for a, b in ties}
    free = [i for i in range(19) if i not in tied]
    choices = np.empty((2**16, 19), dtype=int)
    choices[:, free] = list(itertools.product((0, 1), repeat=16))
    for follower, leader in tied.items():
        choices[:, follower] = choices[:, leader]
    at = np.arange(19)
    values = np.where(row[at, choices].sum(axis=1) <= cap, scores.unary[at, choices].sum(axis=1), np.inf)
    assert got.objective == pytest.approx(values.min(), rel=1e-12) and got.gap == 0
    assert [scores.schemes.index(s) for s in got.schemes.values()] == choices[values.argmin()].tolist()


@pytest.mark.parametrize("kind", ["size", "operations"])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_hawq_resnet50_equals_dynamic_programming(kind: str, part: float) -> None:
    """Sizes are multiples of 4,096 weights and operations of 4,096 x 56 x 56: few enough to tabulate all sums."""
    scores, ties = hawq(resnet50(), seed=2)
    count = np.array([la.params if kind == "size" else la.macs for la in scores.layers])
    count //= np.gcd.reduce(count)
    room = int(part * count.sum())  # for what 8 bits take more than 4
    row = np.outer(count, [0, 1])
    got = solve(scores, Budget(limit=room, rows=row), ties=ties)
    leader = dict(ties)
    gain, use = dict.fromkeys(scores.names, 0.0), dict.fromkeys(scores.names, 0)
    for i, name in enumerate(scores.names):
        gain[leader.get(name, name)] += scores.unary[i, 0] - scores.unary[i, 1]
        use[leader.get(name, name)] += int(count[i])
    best = np.zeros(room + 1)
    for name, weight in use.items():
        if 0 < weight <= room:
            best[weight:] = np.maximum(best[weight:], best[: room + 1 - weight] + gain[name])
    assert got.objective == pytest.approx(scores.unary[:, 0].sum() - best[-1], rel=1e-9) and got.status == "optimal"
    assert all(got.bits[a] == got.bits[b] for a, b in ties) and 8 in got.bits.values() and 4 in got.bits.values()
