"""Shared fixtures: the checkout, one thread a worker, and the built site."""

import functools
import os
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
CHROMIUM = os.environ.get("CI_CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def built(root, tmp_path_factory):
    """The site, built once somewhere else, whichever process comes first."""
    if not CHROMIUM:
        pytest.skip("no chromium, and apt-get may not be used to install it")
    base = tmp_path_factory.getbasetemp()
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    out = (base if alone else base.parent) / "site"
    with FileLock(f"{out}.lock"):
        if not (out / "done").exists():
            _build(root, out)
            (out / "done").touch()
    return out / "_build" / "html"


def _build(root, out):
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


@pytest.fixture(scope="session")
def site(built):
    """The built site, served: its folder and its address."""
    handler = functools.partial(Quiet, directory=str(built))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield built, f"http://127.0.0.1:{server.server_port}"
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
