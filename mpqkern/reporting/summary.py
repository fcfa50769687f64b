"""The answer in figures and in words: how small, how wide, how good and how certain, how fast."""

from __future__ import annotations

import math

from ..ledger import Whole
from .given import Given
from .markup import el, esc, listed, number, paragraph, size, table

TITLE = "Summary"
CERTIFICATES = {
    "optimal": "Proven optimal: by these scores, nothing that fits the budgets costs less.",
    "feasible": "Proven to be within the gap that was asked for.",
    "heuristic": "Found by a search that proves nothing of its own.",
    "limit": "The search ran out of time; what it had proven by then is the bound.",
    "interrupted": "The search was interrupted; what it had proven by then is the bound.",
    "over budget": "Rounded from a relaxation, and over a budget: this does not fit.",
    "edited": "Changed by hand since it was solved, so nothing is claimed of it.",
}


def section(given: Given) -> str | None:
    tiles = [tile for tile in (_bytes(given), _bits(given), _objective(given), _milliseconds(given)) if tile]
    if not tiles and given.assignment is None:
        return None
    return (el("div", *tiles, class_="tiles") if tiles else "") + _words(given) + _budgets(given)


def _tile(name: str, figure: str, *below: str) -> str:
    lines = [el("div", esc(line), class_="below") for line in below if line]
    return el(
        "div", el("div", esc(name), class_="name"), el("div", esc(figure), class_="figure"), *lines, class_="tile"
    )


def totals(given: Given) -> tuple[int, int] | None:
    """Bytes of the weights in float, and as packed; None where a width does not pack or nothing is chosen."""
    if given.ledger is not None:
        return given.ledger.float_bytes, given.ledger.bytes
    facts = [fact for fact in given.facts if fact.chosen]
    if not facts or any(fact.bytes is None for fact in facts):
        return None
    return sum(fact.float_bytes for fact in facts), sum(fact.bytes for fact in facts)


def _bytes(given: Given) -> str:
    found = totals(given)
    if found is None or not found[1]:
        return ""
    before, after = found
    times = before / after
    # rounded down, so that the text never claims more than there is
    claim = f"{int(times * 100) / 100:.2f} times smaller" if times >= 1.005 else "not smaller"
    return _tile("Weights", f"{size(before)} \u2192 {size(after)}", f"{before:,} \u2192 {after:,} bytes", claim)


def average_bits(given: Given) -> float | None:
    """Of a parameter, without scales; layers count that the assignment is about, else those of the ledger."""
    names = given.assignment.schemes if given.assignment else None
    facts = [f for f in given.facts if f.chosen and f.params and (names is None or f.name in names)]
    return sum(f.bits * f.params for f in facts) / sum(f.params for f in facts) if facts else None


def _bits(given: Given) -> str:
    average = average_bits(given)
    facts = [fact for fact in given.facts if fact.chosen]
    counts = {width: sum(f.bits == width for f in facts) for width in sorted({f.bits for f in facts})}
    spread = ", ".join(f"{n} at {'float' if width == 32 else width}" for width, n in counts.items())
    return _tile("Average width", f"{number(average)} bits", f"layers: {spread}") if average is not None else ""


def _objective(given: Given) -> str:
    found = given.assignment
    if found is None or found.objective is None:
        return ""
    known = found.gap is not None and math.isfinite(found.gap)
    gap = "no bound is known" if not known else f"bound {number(found.bound)}, gap {100 * found.gap:.3g} %"
    return _tile("Objective", number(found.objective), gap, found.status)


def predicted(given: Given) -> tuple[float | None, str]:
    """Milliseconds of the assignment, or why there is no prediction."""
    if given.latency is None or given.assignment is None:
        return None, ""
    try:
        return given.latency.predict(given.assignment), ""
    except ValueError as error:
        return None, f"There is no prediction of milliseconds: {error}."


def _milliseconds(given: Given) -> str:
    """Measured, if a ledger was audited; else predicted."""
    whole = given.ledger.whole if given.ledger is not None else Whole()
    if whole.ms is not None and whole.float_ms is not None:
        name, ms, plain = "Measured time", whole.ms, whole.float_ms
    elif (ms := predicted(given)[0]) is not None:
        name, plain = "Predicted time", given.latency.total
    else:
        return ""
    times = plain / ms if ms > 0 else 0.0
    claim = f"{int(times * 100) / 100:.2f} times faster" if times >= 1.005 else "not faster than float"
    return _tile(name, f"{number(ms)} ms", f"float {number(plain)} ms", claim)


def _words(given: Given) -> str:
    found = given.assignment
    certificate = CERTIFICATES[found.status] if found is not None else ""
    if (
        found is not None
        and found.gap
        and math.isfinite(found.gap)
        and found.status in ("heuristic", "limit", "interrupted", "feasible")
    ):
        certificate += f" No assignment that fits costs less than {number(found.bound)}: {100 * found.gap:.3g} % lower."
    left = [fact for fact in given.facts if fact.chosen and fact.scheme is None]
    kept = f"In float: {listed([f.name for f in left])}." if left else ""
    other = f"The ledger is of other schemes than the assignment: {listed(given.repacked)}." if given.repacked else ""
    return paragraph(certificate, other, predicted(given)[1], kept, _measured(given))


def _measured(given: Given) -> str:
    """How the scores came about; whatever their notes lack is left out."""
    notes = given.scores.provenance if given.scores is not None else {}
    if "method" not in notes:
        return ""
    known = {
        key: notes[key] for key in ("samples", "seconds", "evaluations") if isinstance(notes.get(key), (int, float))
    }
    samples = f" on {known['samples']:,} samples" if "samples" in known else ""
    seconds = f" in {number(float(known['seconds']))} s" if "seconds" in known else ""
    evaluations = f", {known['evaluations']:,} evaluations" if known.get("evaluations") else ""
    return f"Costs were measured by {notes['method']}{samples}{seconds}{evaluations}."


def _budgets(given: Given) -> str:
    found = given.assignment
    if found is None or not found.costs:
        return ""
    rows = [
        (name, number(used), number(found.slack.get(name)), number(found.prices.get(name)))
        for name, used in found.costs.items()
    ]
    note = "A price is by how much the objective would fall for one unit more of a budget."
    return table(("budget", "spent", "left", "price"), rows) + (paragraph(note) if found.prices else "")
