"""The report's plots as PNG: the same marks in the same colours, whole, on white, or an error that names what lacks."""

from __future__ import annotations

import io
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import mpqkern as mq
from mpqkern.compare import Comparison
from mpqkern.reporting import colors, frontier, widths
from mpqkern.reporting.axes import PAPER, Row
from mpqkern.reporting.given import Given
from mpqkern.reporting.marks import Circle, Drawing, Group, Line, Rect, Runs, Text
from mpqkern.reporting.marks import Path as Stroke
from mpqkern.reporting.sensitivity import cell

from .test_report import HOSTILE, inputs

draws = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs matplotlib")
ALL = ["comparison", "frontier", "pairs", "sensitivity", "speed", "widths"]
DOTS = 200 / 96  # of a pixel in a drawing
MARGIN = round(8 * DOTS)


def written(folder: Path, **given) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """All files in the folder of pictures, as [height, width, RGB] of 0..255."""
    mq.report(folder / "report.html", pictures=folder / "plots", **given)
    return {file.stem: pixels(file.read_bytes()) for file in sorted((folder / "plots").iterdir())}


def pixels(contents: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(contents)) as image:
        assert image.format == "PNG" and image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert "Software" not in image.info and len(image.info["Title"]) > 10
        return np.asarray(image.convert("RGB"))


def color(name: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colors.variables(colors.PRINT)[name][1:]))


def share(image: np.ndarray, name: str) -> float:
    """Of the picture that has just this colour."""
    return float((image == color(name)).all(axis=2).mean())


def is_whole(image: np.ndarray) -> bool:
    """There is ink, and none where a cut would be."""
    ink = (image < 250).any(axis=2)
    edge = np.ones_like(ink)
    edge[MARGIN - 3 : 3 - MARGIN, MARGIN - 3 : 3 - MARGIN] = False
    return 0.005 < ink.mean() < 0.95 and not ink[edge].any()


@draws
@pytest.mark.parametrize("n", [6, 200])
def test_each_plot_is_a_file_that_fits_a_page(tmp_path: Path, n: int) -> None:
    found = written(tmp_path, **inputs(n))
    assert list(found) == ALL
    for name, image in found.items():
        assert is_whole(image), name
        assert image.shape[1] <= 7.4 * 200 or name == "pairs", name  # a triangle is as large as its cells


@draws
def test_one_layer_has_pictures_without_pairs(tmp_path: Path) -> None:
    scores = mq.Scores([mq.Layer("only", "linear", (8, 8), 64)], [2, 4], [[0.5, 0.25]], np.zeros((1, 2, 1, 2)))
    found = written(tmp_path, scores=scores, assignment=mq.solve(scores, mq.Budget(avg_bits=4)))
    assert list(found) == ["sensitivity", "widths"] and all(map(is_whole, found.values()))
    assert share(found["widths"], "b4") > 0.01 and share(found["widths"], "b2") == 0


@draws
def test_what_is_not_given_has_no_picture(tmp_path: Path) -> None:
    assert written(tmp_path) == {} and (tmp_path / "plots").is_dir()
    given = inputs()
    plain = mq.Scores(given["scores"].layers, given["scores"].schemes, given["scores"].unary)
    assert list(written(tmp_path, scores=plain, assignment=given["assignment"])) == ["sensitivity", "widths"]
    (tmp_path / "plots/widths.png").unlink()
    none = Comparison("loss", {"loss": 0.1}, [], {})
    assert list(written(tmp_path, scores=plain, comparison=none)) == ["sensitivity"]


@draws
def test_bars_have_the_colours_and_areas_of_the_drawing(tmp_path: Path) -> None:
    given = {name: inputs()[name] for name in ("scores", "assignment")}
    (drawing,) = widths.drawings(Given("", {}, **given), PAPER)
    image = written(tmp_path, **given)["widths"]
    bars = [mark for group in drawing.marks if isinstance(group, Group) for mark in group.marks]
    keys = {mark.class_: np.pi * mark.r**2 for mark in drawing.marks if isinstance(mark, Circle)}
    names = {s and s.bits for s in given["assignment"].schemes.values()}
    assert {*keys} - {"ghost"} == {colors.width_class(bits) for bits in names}
    for name in [f"b{bits}" for bits in range(1, 9)] + ["bf"]:
        area = sum(bar.width * bar.height for bar in bars if bar.class_ == name) + keys.get(name, 0.0)
        seen = (image == color(name)).all(axis=2).sum() / DOTS**2
        assert seen == pytest.approx(area, rel=0.03), name


@draws
def test_marks_are_where_and_what_they_say() -> None:
    from mpqkern.reporting.png import png

    drawing = Drawing(
        96,
        96,
        "one of each",
        [
            Rect(0, 0, 96, 96, "ghost"),
            Rect(10, 10, 20, 20, "b2"),
            Group([Rect(20, 20, 20, 20, "b8"), Rect(-9, -9, 120, 120, "hit")], ("not", "drawn"), "column"),
            Circle(70, 20, 8, "point"),
            Line(50, 50, 90, 50, "float"),
            Stroke([(10, 70), (40, 70), (40, 90)], "frame"),
            Runs(60, 60, 8, {"d0": [(0, 0, 2)], "d14": [(1, 1, 3)]}),
            Text("MM", 12, 60, class_="strong"),
        ],
    )
    image = pixels(png([drawing]))

    def at(x: float, y: float) -> tuple[int, ...]:
        return tuple(image[round(y * DOTS) + MARGIN, round(x * DOTS) + MARGIN].tolist())

    assert image.shape == pytest.approx((96 * DOTS + 2 * MARGIN, 96 * DOTS + 2 * MARGIN, 3), abs=2)
    assert at(5, 5) == at(90, 90) == color("line") and at(-4, 50) == at(100, 50) == (255, 255, 255)
    assert at(15, 15) == color("b2") and at(25, 25) == at(38, 38) == color("b8")  # what comes later is on top
    assert at(70, 20) == color("mark") and at(63, 13) == color("line")
    assert at(70, 50) == color("accent") and at(25, 70) == at(40, 80) == color("text")
    assert at(64, 64) == at(74, 64) == color("d0") and at(82, 64) == color("line")
    assert at(62, 72) == color("line") and at(70, 72) == at(82, 72) == color("d14")
    letters = image[round(52 * DOTS) + MARGIN : round(60 * DOTS) + MARGIN, MARGIN + 24 : MARGIN + 60]
    assert (letters.sum(axis=2) < 200).mean() > 0.1
    two = pixels(png([drawing, drawing]))
    assert two.shape[0] == image.shape[0] and two.shape[1] > 2 * image.shape[1] - 2 * MARGIN


@draws
@pytest.mark.parametrize("n", [22, 54, 88])
def test_neighbours_leave_no_line_between_them(n: int) -> None:
    from mpqkern.reporting.png import png

    row = Row(["layer"] * n, PAPER)
    cells = [mark for i in range(n) for mark in cell(row, i, 0, "", "", "d0")]
    image = pixels(png([Drawing(PAPER.width, 30, "cells of one colour", cells)]))
    assert share(image[MARGIN + 1 : -MARGIN - 1, MARGIN + 1 : -MARGIN - 1], "d0") == 1


@draws
def test_settings_of_matplotlib_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    given = inputs()
    mq.report(tmp_path / "a.html", pictures=tmp_path / "a", **given)
    own = {"savefig.facecolor": "black", "font.size": 30, "lines.antialiased": False, "path.sketch": (1, 100, 2)}
    with matplotlib.rc_context(own):
        mq.report(tmp_path / "b.html", pictures=str(tmp_path / "b"), **given)
        assert matplotlib.rcParams["font.size"] == 30
    for name in ALL:
        assert (tmp_path / f"a/{name}.png").read_bytes() == (tmp_path / f"b/{name}.png").read_bytes()
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


@draws
def test_many_small_cells_leave_no_line_between_them() -> None:
    from mpqkern.reporting.png import png

    runs = {f"d{k}": [(a, i, i + 1) for a in range(20) for i in range(30) if (a + i) % 2 == k] for k in (0, 1)}
    image = pixels(png([Drawing(96, 96, "two colours", [Runs(3, 3, 2.5, runs)])]))
    inside = image[MARGIN + 1 : -MARGIN - 1, MARGIN + 1 : -MARGIN - 1]
    assert share(inside, "d0") + share(inside, "d1") == 1


@draws
@pytest.mark.parametrize("name", [HOSTILE, "$\\frac{1}{$", "a" * 300, "\n", ""])
def test_names_may_hold_anything(tmp_path: Path, name: str) -> None:
    layers = [mq.Layer(name, "linear", (8, 8), 64), mq.Layer(f"x{name}", "linear", (8, 8), 64)]
    scores = mq.Scores(layers, [2, 4], [[0.5, 0.25]] * 2, np.zeros((2, 2, 2, 2)))
    found = written(tmp_path, scores=scores)
    assert list(found) == ["pairs", "sensitivity"] and all(map(is_whole, found.values()))


@draws
@pytest.mark.parametrize("fails", ["drawing", "writing"])
def test_all_pictures_are_replaced_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    given, plots = inputs(), tmp_path / "plots"
    plots.mkdir()
    (plots / "widths.png").write_bytes(b"before")
    (plots / "mine.txt").write_bytes(b"mine")
    write = Path.write_bytes

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "drawing":
            patch.setattr(frontier, "drawings", full)
        else:
            patch.setattr(Path, "write_bytes", lambda p, c: full() if p.name == "frontier.png" else write(p, c))
        with pytest.raises(OSError, match="No space"):
            mq.report(tmp_path / "r.html", pictures=plots, **given)
    reader = (plots / "widths.png").open("rb")
    assert sorted(p.name for p in plots.iterdir()) == ["mine.txt", "widths.png"]
    assert (plots / "widths.png").read_bytes() == b"before" and not (tmp_path / "r.html").exists()
    mq.report(tmp_path / "r.html", pictures=plots, **given)
    with reader:
        assert reader.read() == b"before"  # whoever has it open keeps what it was
    assert sorted(p.name for p in plots.iterdir()) == sorted([*(f"{name}.png" for name in ALL), "mine.txt"])
    assert is_whole(pixels((plots / "widths.png").read_bytes())) and (plots / "mine.txt").read_bytes() == b"mine"


@draws
def test_a_folder_that_cannot_be_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o555)
    if os.access(sealed, os.W_OK):  # nothing is sealed to root but this
        sealed = Path("/proc")
    for folder, error, told in (
        (3, TypeError, "pictures=3; wanted a folder's name or None"),
        (tmp_path / "file", NotADirectoryError, "file' is a file; wanted a folder"),
        (tmp_path / "no" / "where", FileNotFoundError, "where'; wanted a folder, or a new one in a folder that exists"),
        (sealed, PermissionError, r"takes no files \(.+\); wanted a folder that does"),
    ):
        with pytest.raises(error, match=told):
            mq.report(tmp_path / "r.html", pictures=folder, **inputs())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "sealed"]


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pictures need matplotlib \(.+\); wanted: pip install matplotlib"):
        mq.report(tmp_path / "r.html", pictures=tmp_path / "plots", **inputs())
    assert not list(tmp_path.iterdir())
    mq.report(tmp_path / "r.html", **inputs())  # which nothing else asks for


def score(cli) -> None:  # type: ignore[no-untyped-def]
    assert cli("score --model mpqkern.cli.example:net --data mpqkern.cli.example:batches --method size")[0] == 0


@draws
def test_the_command_writes_them(cli) -> None:  # type: ignore[no-untyped-def]
    score(cli)
    code, out, err = cli("report --png plots")
    assert code == 0 and out == "wrote mpqkern-run/report.html: scores, and its plots to plots\n", err
    assert [p.name for p in Path("plots").iterdir()] == ["sensitivity.png"]
    assert json.loads(cli("report --png plots --json")[1])["pictures"] == "plots"


def test_the_command_says_what_to_install(cli, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    score(cli)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = cli("report --png plots")
    assert code == 2 and not out and err.startswith("mpqkern: pictures need matplotlib (")
    assert err.count("\n") == 1 and not Path("plots").exists() and not Path("mpqkern-run/report.html").exists()
