"""The box shows what decided, folds the rest, and loses nothing."""

import re

import pytest

from reappraisal.protocol.verdicts import Verdict, box, headline


def row(name, outcome, role="evidence", **fields):
    return {
        "name": name, "role": role, "kind": "effect", "measure": "m",
        "unit": "", "outcome": outcome, "estimate": 0.6, "lo": 0.5, "hi": 0.7,
        "level": 0.95, "p": 0.01, "p_reversed": None, "n": 24, "method": "t",
        "power": 0.9, "replicates_needed": None, "sesoi": 0.5,
        "supports_above": 0.5, "refutes_below": 0.5, **fields,
    }


def record(verdict, *rows, control="holds", **fields):
    return Verdict.from_json({
        "schema": "reappraisal.verdict/1", "claim": "made-up", "paper": "A00",
        "statement": "Small & <big>.", "verdict": verdict, "reversed": False,
        "qualifier": None, "scale": "book", "criteria": list(rows),
        "control": {"statement": "Nothing.", "outcome": control}, "n": 24,
        "seeds": list(range(1000, 1024)), "seconds": 1.0, "versions": {},
        "registration": "sha256:0", "amended": False, "deviations": [],
        **fields,
    }).record


MIXED = (
    row("a", "supports"), row("b", "refutes"), row("c", "undecided"),
    row("d", "supports"), row("e", "supports"),
    row("x", "supports", "control"), row("y", "refutes", "control"),
)


@pytest.mark.parametrize("verdict, control, first", [
    ("reproduced", "holds", ["a", "d"]),
    ("not reproduced", "holds", ["b"]),
    ("inconclusive", "holds", ["c"]),
    ("invalid", "fails", ["y"]),
    ("invalid", "holds", ["a", "b"]),  # a gate failed: nothing to single out
])
def test_headline_is_what_decided(verdict, control, first):
    found = headline(record(verdict, *MIXED, control=control))
    assert [r["name"] for r in found] == first


def test_an_undecided_control_is_the_headline_of_an_open_verdict():
    rows = [row(name, "supports") for name in "abc"]
    rows += [row("x", "undecided", "control")]
    found = headline(record("inconclusive", *rows, control="undecided"))
    assert [r["name"] for r in found] == ["x"]


def test_two_criteria_are_both_shown():
    found = headline(record("not reproduced", *MIXED[:2]))
    assert [r["name"] for r in found] == ["a", "b"]


def test_box_folds_every_criterion_and_counts_them():
    html = box(record("not reproduced", *MIXED))
    shown, folded = html.split("<details>")
    assert "5 criteria: supports 3, refutes 1, undecided 1." in shown
    assert shown.count("<li ") == 1 and "Control holds." in shown
    assert len(re.findall(r"<td[^>]*>[a-z]: m</td>", folded)) == len(MIXED)
    assert 'id="verdict-a00-made-up"' in shown
    assert 'id="verdict-a00-made-up-criteria"' in folded
    assert "Small &amp; &lt;big&gt;." in shown


def test_box_stays_short_however_many_criteria():
    few = box(record("reproduced", *MIXED))
    many = box(record("reproduced", *(MIXED[:5] * 20)))
    assert abs(len(many.split("<details>")[0])
               - len(few.split("<details>")[0])) < 10


def test_box_says_what_would_settle_it_and_what_deviated():
    rows = (row("a", "undecided", replicates_needed=40),
            row("b", "undecided", replicates_needed=90),
            row("c", "undecided", replicates_needed=7, role="control"))
    html = box(record("inconclusive", *rows, deviations=["23 seeds"]))
    assert "would need about 40 to 90 replicates" in html
    assert "<strong>Deviation.</strong> 23 seeds" in html
    settled = box(record("reproduced", *rows))
    assert "To settle it" not in settled
