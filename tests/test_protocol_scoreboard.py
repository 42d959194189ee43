"""What the scoreboard, the forest plots, the rooms and the gallery are drawn
from: nothing here needs a browser or a build."""

import base64
import csv
import io
import json
import math
import re

import pytest
from PIL import Image

from reappraisal.protocol.board import Board, Front, front, listed
from reappraisal.protocol.forest import forest, line, place
from reappraisal.protocol.gallery import WIDTH, take
from reappraisal.protocol.ledger import Ledger, headline, measured, size
from reappraisal.protocol.logic import leaves
from reappraisal.protocol.rooms import named, path, sections, waiting
from reappraisal.protocol.scoreboard import (
    COLUMNS,
    NOT_YET,
    SCHEMA,
    overview,
    rows,
    table,
    to_csv,
    to_json,
)
from reappraisal.protocol.verdicts import VERDICTS


@pytest.fixture(scope="module")
def board(root):
    ledger = Ledger.read(root, stale=lambda chapter: None)
    return Board.read(root, ledger)


def href(doc):
    return f"{doc}.html"


def test_the_form_of_the_downloads_is_a_promise():
    assert SCHEMA == "reappraisal.scoreboard/1"
    assert list(COLUMNS) == [
        "paper", "key", "title", "year", "authors", "venue", "link",
        "verified", "room", "chapter", "page", "claim", "statement",
        "verdict", "label", "scale", "criterion", "measure", "unit",
        "estimate", "lo", "hi", "level", "size", "control", "p", "p_holm",
        "p_bh", "power", "n", "amended", "seconds", "registration",
        "paper_scale",
    ]


def test_every_paper_and_every_claim_is_in_both_files(board):
    data = json.loads(to_json(board))
    assert data["schema"] == SCHEMA and data["columns"] == COLUMNS
    lines = list(csv.DictReader(io.StringIO(to_csv(board))))
    assert len(lines) == len(data["rows"])
    assert {r["paper"] for r in lines} == set(board.papers)
    claims = [r["claim"] for r in lines if r["claim"]]
    known = {e.claim.id for e in board.ledger.entries}
    assert sorted(claims) == sorted(known | set(board.ledger.pending))
    for row in data["rows"]:
        assert list(row) == list(COLUMNS)
        known = set(VERDICTS) | {"to run", NOT_YET}
        assert row["verdict"] in known
        if row["verdict"] in VERDICTS:
            assert row["page"].endswith(
                "#claim-" + row["claim"].lower().replace("/", "-"))
            assert row["p"] is None or row["p"] <= row["p_bh"] <= row["p_holm"]
        if not row["verified"]:
            assert row["authors"] == [] and row["venue"] is None


def test_a_paper_without_a_claim_says_not_yet(board):
    fresh = Board(board.papers, Ledger((), (), ()), board.fronts)
    assert {r["verdict"] for r in rows(fresh)} == {NOT_YET}
    assert len(rows(fresh)) == len(board.papers)
    html = table(fresh, href)
    assert html.count("<tbody") == len(board.papers)
    assert "rp-badge" not in html


def test_the_squares_of_the_overview_are_the_papers(board):
    html = overview(board, href)
    assert html.count('class="rp-square"') == len(board.papers)
    heights = {}
    for tone, height in re.findall(
            r'<rect class="rp-([a-z-]+)" x="\d+" y="[\d.]+" width="8" '
            r'height="([\d.]+)"', html):
        heights[tone] = heights.get(tone, 0) + float(height)
    filled = sum(v for tone, v in heights.items() if tone != "square")
    assert filled == pytest.approx(8 * len(board.entries), abs=0.2)


def test_the_criterion_shown_is_chosen_by_the_rule_alone(board):
    for e in board.ledger.entries:
        rule = e.claim.at("book")[1]
        by_name = {r["name"]: r for r in e.verdict.record["criteria"]}
        shown = headline(rule, by_name)
        assert shown is e.primary
        # other numbers, the same choice
        other = {n: r | {"estimate": 0.0, "outcome": "undecided"}
                 for n, r in by_name.items()}
        assert headline(rule, other)["name"] == shown["name"]
        assert shown["name"] in set(measured(rule)) or not list(measured(rule))
        assert set(measured(rule)) <= set(leaves(rule))


def test_the_line_says_what_the_outcome_says(board):
    """Inside the band is support, for every criterion that is drawn."""
    drawn = 0
    for e in board.ledger.entries:
        x = line(e)
        if not x.sized:
            continue
        drawn += 1
        row = e.primary
        assert x.unit == size(row) > 0
        inside = x.zone[0] < x.lo and x.hi < x.zone[1]
        enough = row["at_least"] is None or row["estimate"] >= row["at_least"]
        assert (inside and enough) == (row["outcome"] == "supports"), e.claim.id
    assert drawn > 30


def test_the_axis_is_odd_and_rising():
    xs = [-50, -10, -1, -0.1, 0, 0.1, 1, 10, 50]
    at = [place(x, 40) for x in xs]
    assert at == sorted(at) and len(set(at)) == len(at)
    assert all(math.isclose(a + b, 100) for a, b in zip(
        at, reversed(at), strict=True))


def test_a_plot_names_every_claim_once(board):
    html = forest(board.ledger.entries, href)
    for e in board.ledger.entries:
        assert html.count(f">{e.claim.id}</a>") == 1


def test_a_chapter_needs_its_notebook_and_a_line(board):
    """A new chapter in the contents is on its room's page."""
    new = Front("theory/convex_relu", "Convex?", "A *program*.")
    more = Board(board.papers, board.ledger, {**board.fronts, new.name: new})
    assert path(board, "theory", href) == ""
    assert "theory/convex_relu.html" in path(more, "theory", href)
    before = [head for head, _ in sections(board, "theory", href)]
    after = [head for head, _ in sections(more, "theory", href)]
    assert set(after) - set(before) == {"The chapters, from easy to deep"}


def test_every_room_has_a_page_in_the_contents(root, board):
    pages = listed(root)
    for room in board.rooms:
        assert f"{room}/index" in pages
        text = (root / "nbs" / room / "index.md").read_text(encoding="utf-8")
        assert f"{{room}} {room}" in text
        waits = waiting(board, room, href).count("<li>")
        tested = sum(p.id in board.entries for p in board.of_room(room))
        assert waits + tested == len(board.of_room(room))
    for name, said in board.fronts.items():
        assert said.title != name and said.summary, name


def test_unknown_rooms_are_named(board):
    with pytest.raises(ValueError, match="room: got 'kitchen'; expected"):
        sections(board, "kitchen", href)


def test_front_reads_title_and_summary():
    assert front("a/b", "no heading") == Front("a/b", "a/b", "")
    said = front("a/b", "# T\n\n> one\n> two\n\nmore")
    assert (said.title, said.summary) == ("T", "one two")


def test_arrows_of_the_navigation_get_names():
    html = ('<li><a href="x">Theory: x</a><details><summary><span></span>'
            "</summary></details></li>")
    assert 'summary aria-label="Chapters of Theory: x"' in named(html)
    assert named("<p>nothing</p>") == "<p>nothing</p>"


@pytest.mark.parametrize("mode, width, height", [
    ("RGB", 1600, 400), ("RGBA", 300, 200), ("P", 2000, 1000)])
def test_thumbnails_are_small_and_keep_their_shape(tmp_path, mode, width,
                                                   height):
    png = io.BytesIO()
    Image.new(mode, (width, height)).save(png, "png")
    data = base64.b64encode(png.getvalue()).decode()
    html = (f'<figure class="rp-figure"><img alt="A &lt; B" '
            f'src="data:image/png;base64,{data}"><figcaption>c'
            f"</figcaption></figure>")
    out, figure = take(html, 7, tmp_path)
    assert out.startswith('<figure id="figure-7"')
    assert figure.alt == "A < B" and not figure.ink
    with Image.open(tmp_path / figure.file) as small:
        assert small.size == (figure.width, figure.height)
        assert small.width == min(width, WIDTH)
        assert abs(small.width / small.height - width / height) < 0.02


def test_a_run_at_paper_scale_stands_beside_the_verdict(board):
    assert board.larger
    kept = {r["claim"]: r["paper_scale"] for r in rows(board)
            if r["paper_scale"]}
    assert kept == {k: v.label for k, v in board.larger.items()}
    assert table(board, href).count("at paper scale: ") == len(kept)
