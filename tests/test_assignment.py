"""Assignment: a file to read and edit, a table, and what other choices would cost. Also Scores."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import mpqkern as mq
from mpqkern.scheme import Layer, Scheme
from mpqkern.solve import Assignment, Budget, Scores, solve

LAYERS = [Layer(f"block.{i}.fc", "linear", (8 * (i + 1), 32), 256 * (i + 1), 1000) for i in range(4)]
SCHEMES = [Scheme(2), Scheme(4, group_size=32), Scheme(8, act_bits=8, symmetric=False), None]


@pytest.fixture
def scores() -> Scores:
    unary = np.random.default_rng(0).random((4, 1)) * [1.0, 0.2, 0.03, 0.0]
    return Scores(LAYERS, SCHEMES, unary, provenance={"method": "hand", "samples": 3})


def test_json_round_trip(scores: Scores, tmp_path) -> None:
    answer = solve(scores, Budget(bytes=5000), Budget(fraction=0.6), pins={"block.3.*": None})
    answer.save(tmp_path / "a.json")
    back = Assignment.load(tmp_path / "a.json")
    assert back == answer and list(back.schemes) == list(answer.schemes) and back.to_json() == answer.to_json()
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert '    "block.3.fc": null' in lines and sum('"block.' in line for line in lines) == 4


def test_an_edit_by_hand_takes_the_proof_away(scores: Scores) -> None:
    text = solve(scores, Budget(bytes=4000), pins={"block.0.fc": 2}).to_json()
    edited = text.replace('"block.0.fc": {"bits": 2}', '"block.0.fc": {"bits": 4, "group_size": 64}')
    answer = Assignment.from_json(edited)
    assert answer.schemes["block.0.fc"] == Scheme(4, group_size=64)
    assert (answer.status, answer.objective, answer.bound, answer.gap, answer.costs) == ("edited", None, None, None, {})
    assert "edited" in str(answer)
    assert Assignment.from_json(text.replace('{"bits": 2}', "2", 1)).status == "optimal"  # a number will do


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "wanted an object with format 'mpqkern-assignment' and version 1"),
        ('{"bits": 2}', '{"bits": 9}', r"layers\['block.0.fc'\]: bits=9; wanted an integer from 1 to 8"),
        ('{"bits": 2}', '{"bit": 2}', r"layers\['block.0.fc'\].*only the keys bits"),
        ('"block.1.fc"', '"block.0.fc"', "'block.0.fc' comes twice"),
        ("{", "[", "is no JSON"),
        ("{", "[" * 100_000 + "{", "is nested too deeply"),
        ('"objective": ', '"objective": "x", "was": ', "objective='x'; wanted a finite number"),
        ('"bound": ', '"bound": -Infinity, "was": ', "bound=-inf; wanted a finite number"),
        ('"seconds": ', '"seconds": null, "was": ', "seconds=None; wanted a finite number"),
        ('"costs": ', '"costs": [1], "was": ', r"costs=\[1\]; wanted an object of finite numbers"),
        ('"slack": ', '"slack": {"bytes": "z"}, "was": ', "slack=.*'z'.*; wanted an object of finite numbers"),
    ],
)
def test_a_broken_file_says_where(scores: Scores, old: str, new: str, message: str) -> None:
    text = solve(scores, pins={"block.0.fc": 2}).to_json()
    assert old in text
    with pytest.raises(ValueError, match=message):
        Assignment.from_json(text.replace(old, new, 1))


def test_what_is_written_is_json_whatever_the_numbers(scores: Scores) -> None:
    names = dict.fromkeys(scores.names, Scheme(2))
    odd = Assignment(names, 1.5, -np.inf, "limit", {"bytes": 3}, {"bytes": 1}, {"bytes": np.inf, "ms": 2.0})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads(odd.to_json(), parse_constant=refuse)
    assert (written["bound"], written["prices"]) == (None, {"ms": 2.0})
    back = Assignment.from_json(odd.to_json())
    assert (back.objective, back.bound, back.gap, back.status, back.costs) == (1.5, None, None, "limit", {"bytes": 3})


def test_gap_is_relative_to_the_objective() -> None:
    assert Assignment({}, objective=-2.0, bound=-3.0, status="feasible").gap == 0.5
    assert Assignment({}, objective=2.0, bound=2.0, status="optimal").gap == 0.0
    assert Assignment({}).gap is None


def test_explain_equals_solving_with_that_pin(scores: Scores) -> None:
    budget = Budget(avg_bits=5)
    answer = solve(scores, budget, ties=[["block.0.fc", "block.2.fc"]])
    lines = {line.split()[0]: line.split() for line in answer.explain("block.2.fc").splitlines()[3:]}
    assert answer.explain("block.2.fc").startswith("block.2.fc (and block.0.fc)\n")
    for scheme, cells in zip(SCHEMES, lines.values(), strict=True):
        pins = {**answer.schemes, "block.0.fc": scheme, "block.2.fc": scheme}
        other = solve(scores, Budget(avg_bits=99), pins=pins)
        assert float(cells[1]) == pytest.approx(other.objective - answer.objective, rel=1e-3, abs=1e-12)
        assert float(cells[2]) == pytest.approx(other.costs["avg_bits"] - answer.costs["avg_bits"], rel=1e-3, abs=1e-12)
        if scheme == answer.schemes["block.0.fc"]:
            assert cells[3] == "chosen"
        else:
            assert (cells[3] == "over") == (other.costs["avg_bits"] > 5)
    with pytest.raises(ValueError, match=r"layer='block.9.fc'.*did you mean 'block"):
        answer.explain("block.9.fc")
    with pytest.raises(ValueError, match="wanted one from solve"):
        Assignment.from_json(answer.to_json()).explain("block.2.fc")


def test_diff_lists_what_changed(scores: Scores) -> None:
    one, two = solve(scores, pins={"*": 2}), solve(scores, pins={"*": 2, "block.1.fc": None})
    assert one.diff(two) == {"block.1.fc": (Scheme(2), None)} and one.diff(one) == {}
    with pytest.raises(ValueError, match="layer='other'"):
        one.diff(Assignment({"other": None}))


def test_table_shows_layers_proof_and_budgets(scores: Scores) -> None:
    text = str(solve(scores, Budget(bytes=4000), pins={"block.0.fc": 8}))
    assert "block.0.fc  w8a8-asym     8" in text and "optimal: objective" in text and "gap 0 %" in text
    assert "bytes: " in text and " left, price " in text


def test_price_is_what_more_budget_saves() -> None:
    scores = Scores(LAYERS[:1], [2, 4], [[3.0, 1.0]])
    answer = solve(scores, Budget(avg_bits=3))
    assert answer.prices == {"avg_bits": 1.0} and answer.bits == {"block.0.fc": 2}


def test_swap_takes_it_as_it_is(scores: Scores) -> None:
    model = torch.nn.ModuleDict({"block": torch.nn.ModuleList()})
    model["block"].extend(torch.nn.ModuleDict({"fc": torch.nn.Linear(32, 8 * (i + 1))}) for i in range(4))
    answer = solve(scores, Budget(bytes=4000), pins={"block.0.fc": None})
    ledger = mq.swap_(model, answer)
    assert {row.name: row.scheme for row in ledger.rows} == dict(answer.schemes)


def test_assignments_are_frozen(scores: Scores) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        solve(scores).objective = 0.0
    with pytest.raises(ValueError, match=r"schemes\['a'\]=4; wanted"):
        Assignment({"a": 4})


# --- scores ---


def test_scores_round_trip(scores: Scores, tmp_path) -> None:
    pairwise = np.zeros((4, 4, 4, 4))
    pairwise[0, 1, 2, 3] = pairwise[2, 3, 0, 1] = 0.5
    for one in (scores, Scores(LAYERS, SCHEMES, scores.unary, pairwise)):
        one.save(tmp_path / "s.npz")
        back = Scores.load(tmp_path / "s.npz")
        assert (back.layers, back.schemes, back.provenance) == (one.layers, one.schemes, one.provenance)
        assert np.array_equal(back.unary, one.unary)
        assert (back.pairwise is None) == (one.pairwise is None)
    assert np.array_equal(back.pairwise, pairwise)
    assert back.cost([0, 1, 3, 3]) == pytest.approx(scores.unary[range(4), [0, 1, 3, 3]].sum())
    assert back.cost([1, 0, 3, 0]) == pytest.approx(scores.unary[range(4), [1, 0, 3, 0]].sum() + 0.5)


def test_scores_refuse_pickles_and_other_versions(scores: Scores, tmp_path) -> None:
    np.savez(tmp_path / "p.npz", note=np.array([{}], dtype=object))
    np.savez(tmp_path / "v.npz", note=np.frombuffer(b'{"format": "mpqkern-scores", "version": 9}', np.uint8))
    (tmp_path / "t.npz").write_text("no archive")
    for name in ("p", "t"):
        with pytest.raises(ValueError, match="holds no scores"):
            Scores.load(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="version 9; wanted 'mpqkern-scores' version 1"):
        Scores.load(tmp_path / "v.npz")


def test_damaged_scores_are_an_error_or_the_scores(scores: Scores, tmp_path) -> None:
    path = tmp_path / "s.npz"
    scores.save(path)
    good = path.read_bytes()
    np.save(tmp_path / "n.npy", scores.unary)
    broken = [b"", b"junk", (tmp_path / "n.npy").read_bytes(), good[: len(good) // 2], good[:-1]]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"s\.npz' holds no scores \(.+\)") as caught:
            Scores.load(path)
        assert "allow_pickle" not in str(caught.value)
    refused = 0
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        try:
            assert np.array_equal(Scores.load(path).unary, scores.unary)
        except ValueError as error:
            refused += "holds no scores" in str(error)
    assert refused > len(good) / 7 / 2


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 5},
        {"layers": [{}]},
        {"layers": [{"name": "a", "what": 1, "weight_shape": [1]}]},
        {"layers": [{"name": 5, "kind": "linear", "weight_shape": [2, 2], "params": 4}]},
        {"layers": [{"name": "a", "kind": "linear", "weight_shape": [2, 2], "params": "4"}]},
        {"schemes": [4]},
        {"schemes": None},
        {"provenance": 7},
        None,
    ],
)
def test_notes_of_the_wrong_types(change: dict | None, tmp_path) -> None:
    layer = {"name": "a", "kind": "linear", "weight_shape": [2, 2], "params": 4, "macs": None}
    note = {"format": "mpqkern-scores", "version": 1, "layers": [layer], "schemes": [{"bits": 4}], "provenance": {}}
    for text, works in ((note, True), ([] if change is None else note | change, False)):
        np.savez(tmp_path / "s.npz", note=np.frombuffer(json.dumps(text).encode(), np.uint8), unary=[[1.0]])
        if works:
            assert Scores.load(tmp_path / "s.npz").names == ["a"]
            continue
        with pytest.raises(ValueError, match="holds no scores"):
            Scores.load(tmp_path / "s.npz")


def test_a_file_that_is_no_assignment_is_named(tmp_path) -> None:
    for contents, why in ((b"{", "text is no JSON"), (b"[]", "wanted an object with format"), (b"\xff", "utf-8")):
        (tmp_path / "bits.json").write_bytes(contents)
        with pytest.raises(ValueError, match=rf"bits\.json: .*{why}"):
            Assignment.load(tmp_path / "bits.json")


def test_scores_merge_layers_or_schemes(scores: Scores) -> None:
    pairwise = np.zeros((2, 4, 2, 4))
    pairwise[0, 1, 1, 2] = pairwise[1, 2, 0, 1] = 0.5
    top, rest = Scores(LAYERS[:2], SCHEMES, scores.unary[:2], pairwise), Scores(LAYERS[2:], SCHEMES, scores.unary[2:])
    whole = rest.merge(top)
    assert whole.names == [la.name for la in LAYERS[2:] + LAYERS[:2]] and whole.pairwise[2, 1, 3, 2] == 0.5
    assert whole.pairwise.sum() == 1.0 and np.array_equal(whole.unary, np.roll(scores.unary, 2, axis=0))
    left, right = (Scores(LAYERS, SCHEMES[s], scores.unary[:, s]) for s in (slice(0, 3), slice(3, 4)))
    assert left.merge(right).schemes == SCHEMES and np.array_equal(left.merge(right).unary, scores.unary)
    with pytest.raises(ValueError, match="wanted different layers under the same schemes"):
        scores.merge(scores)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda u: Scores(LAYERS, SCHEMES, u[:3]), r"unary has the shape \[3, 4\]; wanted \[4, 4\]"),
        (lambda u: Scores(LAYERS, SCHEMES, np.where(u == u[1, 2], np.nan, u)), r"unary\[1, 2\]=nan; wanted a finite"),
        (
            lambda u: Scores(LAYERS, SCHEMES, np.where(u == u[1, 2], 1e308, u)),
            r"unary\[1, 2\]=1e\+308; wanted costs that",
        ),
        (
            lambda u: Scores(LAYERS, SCHEMES, u, 2e280 * _entry(0, 1, 2, 3)),
            r"pairwise\[0, 1, 2, 3\]=2e\+280; wanted costs",
        ),
        (lambda u: Scores(LAYERS, SCHEMES, u.astype(complex)), "unary holds complex numbers; wanted real ones"),
        (lambda u: Scores(["a"], SCHEMES, u), "layers: found 'a'; wanted Layer objects"),
        (lambda u: Scores(LAYERS, [2, 2.5], u), "schemes: found 2.5; wanted Scheme"),
        (lambda u: Scores(LAYERS, [2, 4, 2, 8], u), "schemes: 'w2' comes twice"),
        (lambda u: Scores([], SCHEMES, u[:0]), "there are 0 layers and 4 schemes"),
        (lambda u: Scores(LAYERS, SCHEMES, u, _entry(0, 1, 2, 3)), "pairwise.*but 0.0 the other way round"),
        (lambda u: Scores(LAYERS, SCHEMES, u, _entry(1, 1, 1, 1)), "within layer 'block.1.fc' is not zero"),
    ],
)
def test_scores_errors_name_argument_value_and_wish(scores: Scores, make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(scores.unary)


def _entry(*at: int) -> np.ndarray:
    pairwise = np.zeros((4, 4, 4, 4))
    pairwise[at] = 1.0
    return pairwise
