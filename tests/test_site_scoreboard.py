"""Scoreboard, rooms and gallery of the built site, in a real browser."""

import csv
import io
import json
import time
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import pytest

from reappraisal.protocol.board import Board
from reappraisal.protocol.forest import line
from reappraisal.protocol.gallery import WIDTH
from reappraisal.protocol.scoreboard import COLUMNS, NOT_YET, SCHEMA

pytestmark = pytest.mark.browser
ROOM = "compression/index.html"
DRAWN = ("index.html", "scoreboard.html", "gallery.html", ROOM,
         "theory/index.html", "measure/index.html")


@pytest.fixture(scope="module")
def board(root):
    return Board.read(root)


@pytest.fixture
def scoreboard(visit):
    page = visit("scoreboard.html")
    page.wait_for_selector(".rp-scoreboard[data-ready]")
    return page


def papers(page):
    return page.eval_on_selector_all(
        ".rp-table tbody:not([hidden])", "all => all.map(b => b.dataset.paper)"
    )


def says(page, text):
    page.wait_for_function(
        "text => document.querySelector('.rp-shown').textContent === text",
        arg=text,
    )


def test_every_paper_has_a_row_without_javascript(site, browser, board):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site[1]}/scoreboard.html")
    assert papers(page) == list(board.papers)
    assert not page.locator(".rp-filters").is_visible()
    text = page.locator(".rp-table").text_content()
    for paper in board.papers.values():
        assert paper.title in text
        row = page.locator(f"#paper-{paper.id.lower()} .rp-paper")
        row = row.text_content()
        assert (NOT_YET in row) == (paper.id not in board.entries)
        assert ("not confirmed" in row) == (not paper.verified)
    context.close()


def test_filters_by_room_verdict_and_words(scoreboard, board):
    page, entries = scoreboard, board.ledger.entries
    page.get_by_role("combobox", name="Room").select_option("dynamics")
    wanted = [p.id for p in board.of_room("dynamics")]
    claims = [e for e in entries if e.claim.room == "dynamics"]
    says(page, f"{len(wanted)} of 296 papers, {len(claims)} of "
               f"{len(entries)} judged claims.")
    assert papers(page) == wanted
    assert "?room=dynamics" in page.url

    page.get_by_role("combobox", name="Verdict").select_option("inconclusive")
    open_ = [e for e in claims if e.verdict.verdict == "inconclusive"]
    left = {e.claim.paper.id for e in open_}
    assert left and papers(page) == [id for id in wanted if id in left]
    assert page.locator(".rp-claim:visible").count() == len(open_)

    page.get_by_role("button", name="Show all").click()
    says(page, f"296 of 296 papers, {len(entries)} of {len(entries)} judged "
               "claims.")
    page.locator(".rp-filters [name=q]").fill("git RE-basin")
    says(page, f"1 of 296 papers, 0 of {len(entries)} judged claims.")
    assert papers(page) == ["D135"]
    page.locator(".rp-filters [name=q]").fill("delay-shrinks")
    says(page, f"1 of 296 papers, 1 of {len(entries)} judged claims.")
    page.locator(".rp-filters [name=q]").fill("")
    page.get_by_role("combobox", name="Verdict").select_option(NOT_YET)
    says(page, f"{296 - len(board.entries)} of 296 papers, 0 of "
               f"{len(entries)} judged claims.")
    assert page.complaints == []


def test_an_address_carries_the_filter(visit, board):
    page = visit("scoreboard.html?room=signal&verdict=any")
    page.wait_for_selector(".rp-scoreboard[data-ready]")
    assert papers(page) == [p.id for p in board.of_room("signal")
                            if p.id in board.entries]


def test_sorts_by_column_with_mouse_and_keyboard(scoreboard, board):
    page = scoreboard
    title = page.get_by_role("columnheader", name="Title and claims")
    title.get_by_role("button").click()
    assert title.get_attribute("aria-sort") == "ascending"
    titles = [board.papers[id].title.casefold() for id in papers(page)]
    plain = ["".join(c for c in t if c.isalnum() or c == " ") for t in titles]
    assert plain[0] < plain[100] < plain[200] < plain[295]

    head = page.get_by_role("columnheader", name="n", exact=True)
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert title.get_attribute("aria-sort") is None
    sizes = [max(e.verdict.record["n"] for e in board.entries[id])
             for id in papers(page)[:len(board.entries)]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]

    head = page.get_by_role("columnheader", name="p, Holm")
    head.get_by_role("button").click()
    within = page.eval_on_selector_all(
        "#paper-a04 .rp-claim [data-c=p_holm]",
        "all => all.map(c => c.dataset.v === undefined ? 9 : +c.dataset.v)",
    )
    assert len(within) > 3 and within == sorted(within)
    assert page.complaints == []


def test_downloads_by_click(scoreboard, board):
    with scoreboard.expect_download() as got:
        scoreboard.get_by_role("link", name="CSV").click()
    with open(got.value.path(), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(io.StringIO(file.read())))
    assert list(rows[0]) == list(COLUMNS)
    assert list(dict.fromkeys(r["paper"] for r in rows)) == list(board.papers)
    with scoreboard.expect_download() as got:
        scoreboard.get_by_role("link", name="JSON").first.click()
    with open(got.value.path(), encoding="utf-8") as file:
        data = json.load(file)
    assert data["schema"] == SCHEMA and len(data["rows"]) == len(rows)
    judged = [r for r in data["rows"] if r["lo"] is not None]
    assert len(judged) > 20
    assert all(r["lo"] <= r["estimate"] <= r["hi"] for r in judged)


def test_usable_within_two_seconds(site, browser):
    page = browser.new_page()
    start = time.monotonic()
    page.goto(f"{site[1]}/scoreboard.html", wait_until="commit")
    page.wait_for_selector(".rp-scoreboard[data-ready]")
    assert time.monotonic() - start < 2
    page.close()


class Page(HTMLParser):
    """Ids and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img" and found.get("src"):
            self.links.append(found["src"])


def test_links_lead_to_what_exists(site, board):
    html, _ = site
    pages, followed = {}, 0

    def read(path):
        if path not in pages:
            pages[path] = Page(path)
        return pages[path]

    for name in DRAWN:
        here = html / name
        for link in read(here).links:
            if "://" in link or link.startswith(("data:", "mailto:", "#")):
                continue
            address, anchor = urldefrag(link)
            target = (here.parent / unquote(address.partition("?")[0]))
            assert target.exists(), f"{name}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in read(target).ids, f"{name}: {link}"
                followed += 1
    assert followed > 3 * len(board.ledger.entries)


@pytest.mark.parametrize("words, where", [
    ("Git Re-Basin: Merging Models modulo Permutation Symmetries",
     ("bibliography", "scoreboard")),
    ("friedman_nemenyi", ("protocol/multiplicity",)),
])
def test_search_finds_a_paper_and_a_function(visit, words, where):
    page = visit(f"search.html?q={words}")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all(
        "#search-results li a", "all => all.map(a => a.getAttribute('href'))"
    )
    assert any(link.startswith(where) for link in found), found


def test_a_room_shows_its_path_its_effects_and_what_waits(visit, board):
    page = visit(ROOM)
    steps = page.locator(".rp-path > li")
    names = [f for f in board.fronts.values() if f.room == "compression"]
    assert steps.count() == len(names) >= 3
    assert names[0].summary[:30] in steps.first.text_content()
    entries = [e for e in board.ledger.entries
               if e.claim.room == "compression"]
    lines = page.locator(".rp-forest li")
    assert lines.count() == len(entries)
    drawn = [line(e) for e in entries]
    pictures = page.locator(".rp-forest li svg[role=img]")
    assert pictures.count() == sum(x.unit is not None for x in drawn) > 10
    assert all("interval" in pictures.nth(i).get_attribute("aria-label")
               for i in range(pictures.count()))
    left = [p for p in board.of_room("compression")
            if p.id not in board.entries]
    assert page.locator(".rp-waiting li").count() == len(left)
    for path in ("theory/index.html", "measure/index.html"):
        page = visit(path)
        assert page.locator(".rp-forest").count() == 0
    assert page.locator(".rp-path code").count() >= 15


def test_the_mark_lies_where_the_effect_is(visit, board):
    """An effect as claimed is right of zero, one the other way left of it."""
    page = visit(ROOM)
    for e in board.ledger.entries:
        x = line(e)
        if e.claim.room != "compression" or x.unit is None:
            continue
        row = page.locator(".rp-forest li").filter(has=page.get_by_role(
            "link", name=e.claim.id, exact=True))
        strip = row.locator("svg[role=img]").bounding_box()
        mark = row.locator("svg.rp-mark > *").bounding_box()
        middle = strip["x"] + strip["width"] / 2
        at = mark["x"] + mark["width"] / 2
        if abs(x.estimate) > 0.05:
            assert (at > middle) == (x.estimate > 0), e.claim.id


def test_gallery_shows_every_figure_small(site, visit, board):
    html, _ = site
    page = visit("gallery.html")
    images = page.locator(".rp-gallery img")
    whole = sum(
        (html / f"{name}.html").read_text(encoding="utf-8").count("<figure id=")
        for name in board.fronts
    )
    assert images.count() == whole > 80
    for alt in images.evaluate_all("all => all.map(i => i.alt)"):
        assert len(alt) > 20
    images.last.scroll_into_view_if_needed()
    page.wait_for_function("i => i.complete && i.naturalWidth > 0",
                           arg=images.last.element_handle())
    assert images.last.evaluate("i => i.naturalWidth") <= WIDTH
    files = list((html / "_images" / "gallery").glob("*.webp"))
    assert max(f.stat().st_size for f in files) < 100_000
    assert (html / "gallery.html").stat().st_size < 400_000
    images.first.click()
    page.wait_for_load_state()
    assert page.url.endswith("#figure-1")
    assert page.complaints == []


@pytest.mark.parametrize("width", [380, 1440])
@pytest.mark.parametrize("path", DRAWN)
def test_fits_the_width(visit, path, width):
    page = visit(path)
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(100)
    assert page.evaluate(
        "() => document.documentElement.scrollWidth - innerWidth") <= 0


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", ["index.html", "scoreboard.html", ROOM])
def test_axe_finds_nothing_serious(site, browser, path, theme):
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(color_scheme=theme)
    page = context.new_page()
    page.goto(f"{site[1]}/{path}", wait_until="networkidle")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    found = Axe().run(page).response["violations"]
    serious = [
        f"{v['id']} ({v['impact']}): {n['html'][:200]}"
        for v in found if v["impact"] in ("serious", "critical")
        for n in v["nodes"]
    ]
    context.close()
    assert not serious, "\n".join(serious)
