"""The built site in a real browser, with every other host out of reach."""

import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reappraisal.protocol.ledger import Ledger

CHROMIUM = os.environ.get("CI_CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM,
        reason="no chromium, and apt-get may not be used to install it",
    ),
]
CHAPTER = "dynamics/svd_factors_and_grokking.html"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """Build the site somewhere else and serve it."""
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", "nbs",
         "--config", str(root / "_config.yml"), "--toc", str(root / "_toc.yml"),
         "--path-output", str(out)],
        cwd=root, capture_output=True, text=True,
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    warnings = [
        line for line in (built.stdout + built.stderr).splitlines()
        if "WARNING" in line or "ERROR" in line
    ]
    assert not warnings, "\n".join(warnings)
    html = out / "_build" / "html"
    handler = functools.partial(Quiet, directory=str(html))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield html, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu",
                  "--disable-background-networking",
                  "--disable-component-update", "--disable-sync"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(site, browser):
    """Open a page of the site; every complaint it makes is collected."""
    _, address = site
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.complaints = []
    complain = page.complaints.append
    page.on("console", lambda m: m.type == "error" and complain(m.text))
    page.on("pageerror", lambda error: complain(str(error)))
    page.on("requestfailed", lambda r: complain(f"failed: {r.url}"))
    page.on("response",
            lambda r: r.status >= 400 and complain(f"{r.status}: {r.url}"))

    def only_here(route):
        if route.request.url.startswith((address, "data:")):
            route.continue_()
        else:
            complain(f"left the site: {route.request.url}")
            route.abort()

    context.route("**/*", only_here)

    def go(path):
        page.goto(f"{address}/{path}", wait_until="networkidle")
        return page

    yield go
    context.close()


def test_every_page_opens_without_a_complaint(site, visit):
    html, _ = site
    pages = sorted(p.relative_to(html).as_posix() for p in html.rglob("*.html"))
    pages = [path for path in pages if not path.startswith("_static/")]
    assert CHAPTER in pages and "index.html" in pages
    for path in pages:
        page = visit(path)
        assert page.title(), path
        assert page.complaints == [], path


def test_front_page_shows_the_verdicts_of_the_ledger(root, visit):
    page = visit("index.html")
    text = page.inner_text("main")
    ledger = Ledger.read(root)
    assert ledger.entries
    for entry in ledger.entries:
        assert entry.claim.id in text and entry.verdict.label in text
    first = next(e for e in ledger.entries if e.claim.room in CHAPTER)
    link = page.locator(f"a:text-is('{first.claim.id}')").first
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
