"""The built site in a real browser, with every other host out of reach."""

import pytest

from reappraisal.protocol.ledger import Ledger

pytestmark = pytest.mark.browser
CHAPTER = "dynamics/svd_factors_and_grokking.html"


def test_every_page_opens_without_a_complaint(site, visit):
    html, _ = site
    pages = sorted(p.relative_to(html).as_posix() for p in html.rglob("*.html"))
    pages = [path for path in pages if not path.startswith("_static/")]
    assert CHAPTER in pages and "index.html" in pages
    for path in pages:
        page = visit(path)
        assert page.title(), path
        assert page.complaints == [], path


def test_scoreboard_shows_the_verdicts_of_the_ledger(root, visit):
    page = visit("scoreboard.html")
    text = page.inner_text("main")
    ledger = Ledger.read(root)
    assert ledger.entries
    for entry in ledger.entries:
        claim = entry.verdict.record["claim"]
        assert claim in text and entry.verdict.label in text
    first = next(e for e in ledger.entries if e.claim.room in CHAPTER)
    claim = first.verdict.record["claim"]
    link = page.locator(f"a:text-is('{claim}')").first
    link.click()
    page.wait_for_load_state("networkidle")
    assert CHAPTER in page.url
    anchor = page.url.split("#")[1]
    assert page.locator(f"[id='{anchor}']").count() == 1
    assert page.complaints == []


def test_verdicts_can_be_downloaded(site, visit):
    page = visit("index.html")
    for kind in ("csv", "json"):
        answer = page.request.get(f"{site[1]}/verdicts.{kind}")
        assert answer.ok and "A02/" in answer.text()


def test_chapter_shows_mathematics_figures_and_verdict_boxes(visit):
    page = visit(CHAPTER)
    page.wait_for_selector("mjx-container")
    box = page.locator("mjx-container").first.bounding_box()
    assert box["width"] > 0 and box["height"] > 0
    images = page.evaluate(
        """() => [...document.querySelectorAll('article img')].map(
             i => ({alt: i.alt, width: i.naturalWidth}))"""
    )
    assert len(images) >= 3
    for image in images:
        assert image["width"] > 100
        assert len(image["alt"]) > 20
    assert page.locator(".reappraisal-claim").count() == 7
    assert page.locator(".reappraisal-verdict").count() == 7


def test_search_finds_a_word(site, visit):
    page = visit("search.html?q=grokking")
    page.wait_for_selector("#search-results li")
    assert CHAPTER.split("/")[1] in page.inner_html("#search-results")
    assert page.complaints == []


@pytest.mark.parametrize("width", [380, 1440])
def test_pages_fit_the_width(visit, width):
    for path in ("index.html", CHAPTER):
        page = visit(path)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(200)
        beyond = page.evaluate(
            "() => document.documentElement.scrollWidth - innerWidth"
        )
        assert beyond <= 0, f"{path} is {beyond} px too wide"
