"""report: one file that needs nothing else, tells what it was given and nothing more, and survives any name."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mpqkern as mq
from mpqkern.compare import Comparison, Outcome
from mpqkern.ledger import Row, Whole
from mpqkern.reporting import colors
from mpqkern.solve import Frontier

HOSTILE = "<script>alert(1)</script>&\"'\x00\u202e\ud800"
SCHEMES = [2, 4, 8, None]
DATE = r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d"


def inputs(n: int = 6, prefix: str = "net.block") -> dict:
    """All that a report can be about; the last layer is in float."""
    rng = np.random.default_rng(n)
    widths = [32 * (i % 3 + 1) if i < n - 1 else 32 for i in range(n)]
    layers = [mq.Layer(f"{prefix}.{i}", "linear", (64, k), 64 * k) for i, k in enumerate(widths)]
    unary = np.exp(rng.normal(size=(n, 1))) * np.array([[1.0, 0.1, 0.005, 0.0]])
    pairs = rng.normal(size=(n, 4, n, 4)) * 0.01
    pairs = (pairs + pairs.transpose(2, 3, 0, 1)) / 2
    pairs[range(n), :, range(n), :] = 0
    linear = mq.Scores(layers, SCHEMES, unary)
    best = mq.solve(linear, mq.Budget(avg_bits=8), pins={layers[-1].name: None})
    times = {"float": 0.02, "w2": 0.005, "w4": 0.01, "w8": 0.03}
    budgets = ("Budget(avg_bits=3)", "Budget(avg_bits=4)")
    outcomes = [
        Outcome(method, budget, 1234.0 + k, {"loss": 0.1 + 0.01 * k, "accuracy": 0.9}, 1.5, [])
        for k, method in enumerate(("fisher", "uniform", "random"))
        for budget in budgets
    ]
    return {
        "assignment": best,
        "scores": mq.Scores(layers, SCHEMES, unary, pairs, {"method": "clado", "samples": 77, "seconds": 1.25}),
        "frontier": mq.frontier(linear, "bytes"),
        "comparison": Comparison("loss", {"loss": 0.09, "accuracy": 0.95}, outcomes, {"fisher": 0.5}),
        "ledger": mq.Ledger([row(layer, best.schemes[layer.name]) for layer in layers]),
        "latency": mq.Latency({layer.name: times for layer in layers}, total=0.03 * n, whole={"float": 0.03 * n}),
    }


def row(layer: mq.Layer, scheme: mq.Scheme | None) -> Row:
    size = 4 * layer.params
    if scheme is None:
        return Row(layer.name, layer.kind, layer.weight_shape, None, size, size, reason="chosen as float")
    return Row(layer.name, layer.kind, layer.weight_shape, scheme, size, scheme.bytes(layer.weight_shape), 0.0625)


def written(folder: Path, **given) -> tuple[str, ET.Element]:  # type: ignore[no-untyped-def]
    """The file's text, and its elements: whatever is not well-formed is an error."""
    path = mq.report(folder / "report.html", **given)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return text, ET.fromstring(text.split("\n", 1)[1])


def sections(root: ET.Element) -> dict[str, ET.Element]:
    return {s.find("h2").text: s for s in root.iter("section")}


def cells(part: ET.Element, table: int = 0) -> list[list[str]]:
    lines = list(part.iter("table"))[table].iter("tr")
    return [["".join(cell.itertext()).replace("\xa0", "") for cell in line] for line in lines]


def titles(part: ET.Element) -> list[str]:
    return [t.text for t in part.iter("title")]


def test_it_is_one_file_that_loads_and_runs_nothing(tmp_path: Path) -> None:
    text, root = written(tmp_path, title="all of it", **inputs())
    assert list(sections(root)) == [
        "Summary",
        "Bits along the network",
        "Sensitivity",
        "Pairs of layers",
        "Frontier",
        "Methods compared",
        "Ledger",
        "Latency",
        "Environment",
    ]
    assert not re.search(r"https?:|//|url\(|@import|javascript|" + DATE, text)
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base", "form"}
    for element in root.iter():
        assert element.tag not in forbidden
        assert not [name for name in element.attrib if name.startswith("on") or name == "src"]
        assert element.get("href", "#").startswith("#")
    anchors = {a.get("href")[1:] for a in root.iter("a")}
    assert anchors == {s.get("id") for s in root.iter("section")} and len(anchors) == 9
    again, _ = written(tmp_path, title="all of it", **inputs())
    assert again == text


def test_names_and_titles_are_text_whatever_they_hold(tmp_path: Path) -> None:
    given = inputs(prefix=HOSTILE)
    given["ledger"] = mq.Ledger([replace(r, reason=HOSTILE) for r in given["ledger"].rows])
    o = given["comparison"].outcomes[0]
    given["comparison"] = replace(given["comparison"], outcomes=[replace(o, method=HOSTILE, budget=HOSTILE)])
    text, root = written(tmp_path, title=HOSTILE, **given)
    assert "<script" not in text and "alert(1)" in text
    clean = "<script>alert(1)</script>&\"'\ufffd\ufffd\ufffd"
    assert root.find("head/title").text == clean == root.find("body/header/h1").text
    assert all(line[0].startswith(clean) for line in cells(sections(root)["Ledger"])[1:-1])
    for name in ("\x00", "\x1b[31m", "\u2028", "\ufffe", "]]>", "-->", "</style>", "</title>"):
        written(tmp_path, title=name, scores=mq.Scores([mq.Layer(name, name, (4, 4), 16)], [2], [[1.0]]))


def test_what_is_not_given_is_left_out(tmp_path: Path) -> None:
    assert list(sections(written(tmp_path)[1])) == ["Environment"]
    given = inputs()
    own = {
        "assignment": {"Summary", "Bits along the network"},
        "scores": {"Sensitivity", "Pairs of layers"},
        "frontier": {"Frontier"},
        "comparison": {"Methods compared"},
        "ledger": {"Summary", "Bits along the network", "Ledger"},
        "latency": {"Latency"},
    }
    for name, wanted in own.items():
        assert set(sections(written(tmp_path, **{name: given[name]})[1])) == wanted | {"Environment"}
    plain = mq.Scores(given["scores"].layers, given["scores"].schemes, given["scores"].unary)
    assert "Pairs of layers" not in sections(written(tmp_path, scores=plain)[1])


def test_the_summary_has_the_figures_of_its_inputs(tmp_path: Path) -> None:
    given = inputs()
    best, ledger, latency = given["assignment"], given["ledger"], given["latency"]
    text = " ".join(sections(written(tmp_path, **given)[1])["Summary"].itertext())
    assert f"{ledger.float_bytes:,} \u2192 {ledger.bytes:,} bytes" in text
    layers = given["scores"].layers
    params = [layer.params for layer in layers]
    average = np.dot(list(best.bits.values()), params) / sum(params)
    assert f"{average:.4g} bits" in text
    assert f"{best.objective:.4g}" in text and f"bound {best.bound:.4g}, gap {100 * best.gap:.3g} %" in text
    assert "Proven optimal" in text and "77 samples in 1.25 s" in text and "In float: net.block.5." in text
    assert f"{latency.predict(best):.4g} ms" in text and f"float {latency.total:.4g} ms" in text
    sizes = [
        4 * la.params if s is None else s.bytes(la.weight_shape)
        for la, s in zip(layers, best.schemes.values(), strict=True)
    ]
    alone = " ".join(sections(written(tmp_path, scores=given["scores"], assignment=best)[1])["Summary"].itertext())
    assert f"{4 * sum(params):,} \u2192 {sum(sizes):,} bytes" in alone  # predicted, without a ledger
    # the only figures of an assignment that was read from a file are its own
    late = replace(best, status="limit", bound=best.objective * 0.75)
    words = " ".join(sections(written(tmp_path, assignment=late)[1])["Summary"].itertext())
    assert f"Objective {best.objective:.4g} bound {late.bound:.4g}, gap 25 % limit" in words
    assert "ran out of time; what it had proven by then is the bound. No assignment that fits costs less than" in words
    lost = sections(written(tmp_path, assignment=replace(late, bound=-np.inf))[1])["Summary"]
    assert "no bound is known" in "".join(lost.itertext()) and "inf" not in "".join(lost.itertext())
    edited = replace(best, status="edited", objective=None, bound=None)
    words = " ".join(written(tmp_path, assignment=edited)[1].itertext())
    assert "Proven" not in words and "nothing is claimed of it" in words


def test_no_gain_is_claimed_where_there_is_none(tmp_path: Path) -> None:
    given = inputs()
    names = list(given["latency"])
    slower = mq.Latency({name: {"float": 0.01, "w2": 0.02, "w4": 0.02, "w8": 0.02} for name in names}, total=0.1)
    found = sections(written(tmp_path, assignment=given["assignment"], latency=slower)[1])
    assert "not faster than float" in "".join(found["Summary"].itertext())
    words = "".join(found["Latency"].itertext())
    assert "6 of 6 layers are fastest in float" in words and f"{names[0]} (0.50x of float's speed)" in words
    assert f"In float, which is fastest there: {names[-1]}." in words
    floats = mq.Ledger([row(layer, None) for layer in given["scores"].layers])
    assert "not smaller" in "".join(sections(written(tmp_path, ledger=floats)[1])["Summary"].itertext())
    untimed = mq.Latency({names[0]: {"float": 1.0}}, total=1.0)
    found = sections(written(tmp_path, assignment=given["assignment"], latency=untimed)[1])
    assert "There is no prediction of milliseconds" in "".join(found["Summary"].itertext())


def test_tables_and_hovers_have_every_figure(tmp_path: Path) -> None:
    given = inputs()
    found = sections(written(tmp_path, **given)[1])
    scores, best, front = given["scores"], given["assignment"], given["frontier"]
    lines = cells(found["Sensitivity"])
    assert lines[0] == ["layer", "float", "w8", "w4", "w2", "chosen"]
    for i, name in enumerate(scores.names):
        scheme = str(best.schemes[name] or "float")
        assert lines[1 + i] == [name, *(f"{scores.unary[i, b]:.4g}" for b in (3, 2, 1, 0)), scheme]
        assert f"{name} at w2: {scores.unary[i, 0]:.4g}" in titles(found["Sensitivity"])
    index = [scores.schemes.index(s) for s in best.schemes.values()]
    pairs = {(a, b): scores.pairwise[a, index[a], b, index[b]] for a in range(6) for b in range(a)}
    hovers = titles(found["Pairs of layers"])
    assert sorted(hovers) == sorted(f"{scores.names[b]} and {scores.names[a]}: {v:.4g}" for (a, b), v in pairs.items())
    strongest = max(pairs, key=lambda p: abs(pairs[p]))
    assert cells(found["Pairs of layers"])[1][-1] == f"{pairs[strongest]:.4g}"
    assert f"all pairs cost {sum(pairs.values()):.4g}" in "".join(found["Pairs of layers"].itertext())
    for i, line in enumerate(cells(found["Frontier"])[1:]):
        assert line[:3] == [f"{front.use[i]:,.0f}", f"{front.objective[i]:.4g}", f"{front.bound[i]:.4g}"]
        assert line[3:] == ["proven optimal", "knee" if i == front.knee else ""]
    ledger = given["ledger"]
    for line, r in zip(cells(found["Ledger"])[1:-1], ledger.rows, strict=True):
        assert line[0] == r.name and line[3:5] == [f"{r.float_bytes:,}", f"{r.bytes:,}"]
        assert (line[5], line[6]) == (("", "float: chosen as float") if r.scheme is None else ("0.0625", ""))
    assert cells(found["Ledger"])[-1][3:5] == [f"{ledger.float_bytes:,}", f"{ledger.bytes:,}"]
    assert cells(found["Latency"])[1][1:5] == ["0.0200", "0.0050", "0.0100", "0.0300"]
    fisher = ["avg_bits=3", "fisher", "1,234", "0.1", "0.9", "1.50", "0.50", "100%", "100%"]
    assert fisher in cells(found["Methods compared"])


def test_an_audited_ledger_says_what_came_true(tmp_path: Path) -> None:
    given = inputs()
    rows = [replace(r, predicted_bytes=r.bytes, disk_bytes=r.bytes, ms=0.25) for r in given["ledger"].rows]
    whole = Whole(file_bytes=99_999, predicted_ms=1.5, ms=1.75, float_ms=3.5, loss="ce", rise=-0.125)
    found = sections(written(tmp_path, ledger=mq.Ledger(rows, whole), latency=given["latency"])[1])
    words = "".join(found["Ledger"].itertext())
    assert "every packed layer takes exactly the bytes" in words and "Predicted 1.5 ms, measured 1.75 ms." in words
    assert "The ce of the packed model is -0.125 from float's." in words and "file 99,999 bytes" in words
    assert [line[6] for line in cells(found["Ledger"])[1:-1]] == ["0.250"] * 6
    summary = "".join(found["Summary"].itertext())
    assert "Measured time1.75 msfloat 3.5 ms2.00 times faster" in summary
    rows[2] = replace(rows[2], disk_bytes=rows[2].bytes + 1)
    words = "".join(sections(written(tmp_path, ledger=mq.Ledger(rows, whole))[1])["Ledger"].itertext())
    assert f"Not as predicted in the file: {rows[2].name}." in words and "exactly the bytes" not in words


def test_a_ledger_of_other_schemes_is_told(tmp_path: Path) -> None:
    given = {name: inputs()[name] for name in ("assignment", "ledger", "scores")}
    assert "other schemes" not in "".join(written(tmp_path, **given)[1].itertext())
    name, *_ = given["assignment"].schemes
    given["assignment"] = replace(given["assignment"], schemes={**given["assignment"].schemes, name: mq.Scheme(2)})
    found = sections(written(tmp_path, **given)[1])
    assert f"The ledger is of other schemes than the assignment: {name}." in "".join(found["Summary"].itertext())
    size = mq.Scheme(2).bytes((64, 32))
    assert any(
        f"{name}\nlinear 64x32\nw2\n8,192 bytes in float, {size:,} now" in t
        for t in titles(found["Bits along the network"])
    )


def test_a_frontier_read_from_a_file_is_drawn_the_same(tmp_path: Path) -> None:
    given = {name: inputs()[name] for name in ("frontier", "assignment", "scores")}
    text, _ = written(tmp_path, **given)
    given["frontier"] = Frontier.from_json(given["frontier"].to_json())
    assert given["frontier"].problem is None and written(tmp_path, **given)[0] == text


def test_bars_are_as_high_as_the_numbers(tmp_path: Path) -> None:
    given = inputs()
    ledger = given["ledger"]
    part = sections(written(tmp_path, ledger=ledger)[1])["Bits along the network"]
    wide = next(svg for svg in part.iter("svg") if "Bits and bytes" in svg.get("aria-label", ""))
    columns = [[r for r in g.iter("rect")] for g in wide.iter("g")]
    assert len(columns) == len(ledger.rows)
    biggest = max(r.float_bytes for r in ledger.rows)
    for (_, bits, whole, packed), r in zip(columns, ledger.rows, strict=True):
        width = None if r.scheme is None else r.scheme.bits
        assert bits.get("class") == colors.width_class(width) == packed.get("class")
        assert float(whole.get("height")) == pytest.approx(130 * r.float_bytes / biggest, abs=0.1)
        assert float(packed.get("height")) == pytest.approx(130 * r.bytes / biggest, abs=0.1)


def test_chosen_cells_are_framed(tmp_path: Path) -> None:
    given = inputs()
    best = given["assignment"]
    found = sections(written(tmp_path, assignment=best, scores=given["scores"], latency=given["latency"])[1])
    for title, order in (("Sensitivity", ["float", "w8", "w4", "w2"]), ("Latency", ["float", "w2", "w4", "w8"])):
        for svg in found[title].iter("svg"):  # for desks and phones
            hovers = {r.find("title").text.split(":")[0]: r for r in svg.iter("rect") if r.find("title") is not None}
            frames = [r for r in svg.iter("rect") if r.get("class") == "frame"]
            assert len(hovers) == 24 and len(frames) == 6
            for name, scheme in best.schemes.items():
                cell = hovers[f"{name} at {scheme or 'float'}"]
                assert float(cell.get("y")) == 8 + 30 * order.index(str(scheme or "float"))
                x, y = float(cell.get("x")) + 2, float(cell.get("y")) + 2
                assert any(abs(float(f.get("x")) - x) < 0.2 and float(f.get("y")) == y for f in frames)


def test_the_assignment_is_marked_on_the_frontier_as_the_frontier_counts(tmp_path: Path) -> None:
    given = inputs()
    front, best = given["frontier"], given["assignment"]  # the budget was in bits, the frontier is in bytes
    used = sum(r.bytes for r in given["ledger"].rows)
    part = sections(written(tmp_path, frontier=front, assignment=best)[1])["Frontier"]
    ring = [t for t in titles(part) if t.startswith("the assignment")]
    assert ring == [f"the assignment\n{used:,} bytes\nobjective {best.objective:.4g}"] * 2  # for desks and phones
    other = replace(best, schemes={"else": None})
    part = sections(written(tmp_path, frontier=front, assignment=other)[1])["Frontier"]
    assert not [t for t in titles(part) if t.startswith("the assignment")]


def test_points_without_proof_are_told_from_proven_ones(tmp_path: Path) -> None:
    front = inputs()["frontier"]
    n = len(front)
    bounds = [front.objective[0] * 0.75, -np.inf, *front.objective[2:]]
    front = replace(front, bound=bounds, states=["limit", "heuristic", *["optimal"] * (n - 2)])
    part = sections(written(tmp_path, frontier=front)[1])["Frontier"]
    assert f"{n - 2} of {n} points are proven optimal" in "".join(part.itertext())
    assert [line[3] for line in cells(part)[1:4]] == ["gap 25 %", "no bound", "proven optimal"]
    wide = next(part.iter("svg"))
    assert sum(c.get("class") == "point open" for c in wide.iter("circle")) == 2
    assert sum(c.get("class") == "whisker" for c in wide.iter("line")) == 2


def test_300_layers_take_a_second_and_a_megabyte(tmp_path: Path) -> None:
    given = inputs(300, "model.layers.encoder")
    start = time.process_time()
    text, root = written(tmp_path, **given)
    assert time.process_time() - start < 1
    assert len(text.encode()) < 1e6
    part = sections(root)["Bits along the network"]
    names = [t for t in part.iter("text") if "rotate" in t.get("transform", "")]
    places = [float(re.match(r"translate\(([\d.]+)", t.get("transform"))[1]) for t in names]
    assert 20 < len(names) < 60 and min(np.diff(places)) >= 15
    assert len([t for t in titles(part) if t.startswith("model.layers.encoder.")]) == 300


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e270])
def test_costs_of_any_size_have_a_colour(tmp_path: Path, value: float) -> None:
    layers = [mq.Layer(name, "linear", (8, 8), 64) for name in ("a", "b")]
    pairs = np.zeros((2, 2, 2, 2))
    pairs[0, :, 1, :] = pairs[1, :, 0, :] = value
    scores = mq.Scores(layers, [2, 4], np.full((2, 2), value), pairs)
    best = mq.solve(scores, mq.Budget(avg_bits=3))
    text, _ = written(tmp_path, scores=scores, assignment=best, frontier=mq.frontier(scores, points=3))
    assert "nan" not in text and not re.search(r'"-?inf', text)


def test_text_and_marks_can_be_seen_in_both_modes() -> None:
    for mode in colors.MODES:
        found = colors.variables(mode)
        for name, color in found.items():
            if "on-" + name in found:
                assert colors.contrast(color, found["on-" + name]) > 3.9
            if name[0] == "b":
                assert colors.contrast(color, found["page"]) > 3
        assert colors.contrast(found["text"], found["page"]) > 7


def test_errors_name_the_argument(tmp_path: Path) -> None:
    for name in inputs():
        with pytest.raises(TypeError, match=f"{name} is of type dict; wanted {name.title()} or None"):
            mq.report(tmp_path / "r.html", **{name: {}})
    with pytest.raises(TypeError, match="title=3; wanted text"):
        mq.report(tmp_path / "r.html", title=3)
    with pytest.raises(TypeError, match="path=None"):
        mq.report(None)
    with pytest.raises(FileNotFoundError, match=r"nowhere.*wanted a file in a folder that exists"):
        mq.report(tmp_path / "nowhere" / "r.html")
    assert not list(tmp_path.iterdir())
