"""How long does the site of a whole book take to build, and to open?

Run by hand on a quiet machine:  python benchmarks/site.py
Needs the extras `book` and `dev`, and Chromium. Writes
benchmarks/results/site.json.

A book of 213 stub chapters, one under each slug of the bibliography, is built
in a temporary folder with this checkout's configuration, opening pages,
scoreboard and gallery. A stub has the text and code of a chapter (about 9000
characters and 400 lines, taken from chapters that exist), three of the stored
figures, and four claims of its own that are registered and judged on made-up
numbers, so that ledger, scoreboard, forest plots and gallery have as much to do
as in the finished book. Whole commands are timed, from start to exit: a cold
build, and a build after a word of one chapter was changed. Then page sizes are
read off the files, and the scoreboard is opened in Chromium.
"""

from __future__ import annotations

import argparse
import base64
import copy
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import numpy as np
import yaml
from machine import machine

from reappraisal.protocol.book import chapters, code_cells, read_notebook
from reappraisal.protocol.claims import Claim, register
from reappraisal.protocol.execute import notebook_bytes
from reappraisal.protocol.papers import load_papers
from reappraisal.protocol.provenance import outputs_digest, provenance
from reappraisal.protocol.verdicts import MIME

CHECKOUT = Path(__file__).parent.parent
FIGURES, CLAIMS, LINES, CHARACTERS = 3, 4, 400, 9000
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def material(room: set[str]) -> tuple[list[str], list[str], list[bytes]]:
    """Text cells, code cells and figures of the chapters that exist."""
    text, code, figures = [], [], []
    for chapter in chapters(CHECKOUT):
        if chapter.room not in room:
            continue
        for cell in read_notebook(chapter.path)["cells"][3:]:
            if cell["cell_type"] == "markdown":
                text.append(re.sub(r"\{cite.*?`.*?`|\(\S+\)=|```", "",
                                   cell["source"]).replace("# ", "## "))
            elif "default_exp" not in cell["source"]:
                code.append(cell["source"])
            for output in cell.get("outputs", []):
                html = "".join(output.get("data", {}).get("text/html", ""))
                if "rp-figure" in html:
                    figures.append(html)
    return text, code, figures


def entry(paper: str, slug: str, i: int) -> dict:
    """A claim that asks for a mean of at least a half."""
    return {
        "id": f"{paper}/claim-{i}", "chapter": slug,
        "registered": date(2026, 1, 1),
        "statement": f"Stub claim {i}: the effect is at least half as large "
                     "as the paper says, on data that nobody has seen.",
        "measure": "made-up numbers", "in_words": "The interval is above 0.5.",
        "seeds": {"book": 16},
        "criteria": {
            "effect": {"measure": "difference", "unit": "points",
                       "estimator": "mean", "sesoi": 0.5},
            "control": {"measure": "the same without", "unit": "points",
                        "kind": "equivalence", "estimator": "mean",
                        "margin": 0.5},
        },
        "rule": "effect",
        "control": {"statement": "The effect is gone.", "rule": "control"},
    }


def own_figure(html: str, number: int) -> dict:
    """The same figure in another file, as if it had been drawn anew."""
    head, data = html.split("base64,", 1)
    data, tail = data.split('"', 1)
    png = base64.b64decode(data) + str(number).encode()
    data = base64.b64encode(png).decode()
    return {"text/html": f'{head}base64,{data}"{tail}', "image/png": data,
            "text/plain": "Figure"}


def write_book(root: Path) -> int:
    """All chapters of the bibliography, as stubs."""
    for name in ("settings.ini", "_config.yml", "references.bib"):
        shutil.copy(CHECKOUT / name, root)
    shutil.copytree(CHECKOUT / "reappraisal", root / "reappraisal",
                    ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(CHECKOUT / "nbs" / "_static", root / "nbs" / "_static")
    (root / "registrations").mkdir()
    shutil.copy(CHECKOUT / "registrations" / "papers.yml",
                root / "registrations")
    for page in ("index.ipynb", "scoreboard.md", "gallery.md",
                 "bibliography.md"):
        shutil.copy(CHECKOUT / "nbs" / page, root / "nbs")
    papers = load_papers(root / "registrations")
    slugs: dict[tuple[str, str], str] = {}
    for paper in papers.values():
        slugs.setdefault((paper.room, paper.chapter), paper.id)
    rooms = list(dict.fromkeys(room for room, _ in slugs))
    toc = []
    for room in rooms:
        mine = {s: p for (r, s), p in slugs.items() if r == room}
        claims = [entry(paper, slug, i) for slug, paper in mine.items()
                  for i in range(CLAIMS)]
        (root / "registrations" / f"{room}.yml").write_text(
            yaml.safe_dump({"room": room, "claims": claims}, sort_keys=False))
        (root / "nbs" / room).mkdir()
        shutil.copy(CHECKOUT / "nbs" / room / "index.md", root / "nbs" / room)
        toc.append({"file": f"{room}/index", "sections": [
            {"file": f"{room}/{slug.replace('-', '_')}"} for slug in mine]})
    register(root / "registrations")
    tail = [{"file": name} for name in ("scoreboard", "gallery",
                                        "bibliography")]
    (root / "_toc.yml").write_text(yaml.safe_dump({
        "format": "jb-book", "root": "index",
        "parts": [{"caption": "Findings", "chapters": toc},
                  {"caption": "Reference", "chapters": tail}],
    }, sort_keys=False))
    text, code, figures = material(set(rooms))
    for k, ((room, slug), paper) in enumerate(slugs.items()):
        path = root / "nbs" / room / (slug.replace("-", "_") + ".ipynb")
        path.write_bytes(stub(root, k, slug, paper, text, code, figures))
    for chapter in chapters(root):
        if chapter.room:
            sign(chapter)
    return len(slugs)


def stub(root, k, slug, paper, text, code, figures) -> bytes:
    """One chapter, not yet signed."""
    def cell(kind, source, **more):
        return {"cell_type": kind, "id": f"c{len(cells)}", "metadata": {},
                "source": source.splitlines(keepends=True)} | more

    def run(source, *outputs, tags=()):
        shown = [{"output_type": "display_data", "data": data,
                  "metadata": metadata} for data, metadata in outputs]
        cells.append(cell("code", source, outputs=shown, execution_count=None,
                          metadata={"tags": list(tags)} if tags else {}))

    cells: list[dict] = []
    title = slug.replace("-", " ").capitalize()
    cells.append(cell("markdown", f"# {title}\n\n> A stub of one line."))
    run('scale = "book"\nseed = 1000', tags=["parameters"])
    rng = np.random.default_rng(k)
    claims = [Claim.load(f"{paper}/claim-{i}", root / "registrations")
              for i in range(CLAIMS)]
    for claim in claims:
        run(f'Claim.load("{claim.id}")',
            ({"text/html": claim._repr_html_()}, {}))
    written = lines = at = 0
    while written < CHARACTERS or lines < LINES:
        if written < CHARACTERS:
            words = text[(17 * k + at) % len(text)]
            cells.append(cell("markdown", words))
            written += len(words)
        if lines < LINES:
            source = code[(13 * k + at) % len(code)]
            run(source)
            lines += source.count("\n") + 1
        at += 1
    for i in range(FIGURES):
        html = figures[(FIGURES * k + i) % len(figures)]
        run("show(fig)", (own_figure(html, FIGURES * k + i), {}))
    for claim in claims:
        effect = rng.normal(rng.normal(0.5, 0.6), 0.5, 16)
        verdict = claim.judge(
            {"effect": effect, "control": rng.normal(0, 0.3, 16)},
            scale="book", seeds=range(1000, 1016), seconds=30.0,
        )
        shown = verdict._repr_mimebundle_()
        assert MIME in shown[0]
        run("verdict", shown)
    return notebook_bytes({"cells": cells, "nbformat": 4, "nbformat_minor": 5,
                           "metadata": {"kernelspec": KERNEL}})


def sign(chapter) -> None:
    """Note that a stub's outputs are those of its code."""
    book = read_notebook(chapter.path)
    now = provenance(chapter, notebook=copy.deepcopy(book))
    book["metadata"]["reappraisal"] = now.parts | {
        "key": now.key, "parameters": now.parts["parameters"],
        "scale": "book", "seconds": 30.0, "threads": 1,
        "outputs": outputs_digest(book),
    }
    chapter.path.write_bytes(notebook_bytes(book))


def build(root: Path) -> float:
    """Seconds that `make site` takes."""
    began = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), "build", "nbs",
         "--quiet", "--path-output", ".", "--config", root / "_config.yml",
         "--toc", root / "_toc.yml"],
        cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return seconds


def change(root: Path) -> None:
    """Another word in one chapter's text."""
    path = next(iter(sorted(root.glob("nbs/dynamics/*.ipynb"))))
    book = read_notebook(path)
    cell = next(c for c in book["cells"][1:] if c["cell_type"] == "markdown")
    cell["source"] += "\n\nOne more word."
    path.write_bytes(notebook_bytes(book))


def open_scoreboard(html: Path, repeats: int) -> dict:
    """Seconds until the scoreboard can be filtered, and a filter's own."""
    from playwright.sync_api import sync_playwright

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0),
                                 partial(Quiet, directory=str(html)))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/scoreboard.html"
    ready, filtered = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CI_CHROMIUM")
            or shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu"],
        )
        for _ in range(repeats):
            page = browser.new_context().new_page()
            began = time.perf_counter()
            page.goto(address, wait_until="commit")
            page.wait_for_selector(".rp-scoreboard[data-ready]")
            ready.append(time.perf_counter() - began)
            filtered.append(page.evaluate("""() => {
                const began = performance.now();
                const form = document.querySelector(".rp-filters");
                form.q.value = "network";
                form.dispatchEvent(new Event("input"));
                document.body.offsetHeight;
                return (performance.now() - began) / 1000;
            }"""))
            page.context.close()
        browser.close()
    server.shutdown()
    return {"ready_s": statistics.median(ready),
            "filter_s": statistics.median(filtered)}


def run(repeats: int, keep: Path | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(keep or folder)
        root.mkdir(exist_ok=True)
        began = time.perf_counter()
        n = write_book(root)
        print(f"{n} stubs in {time.perf_counter() - began:.0f} s", flush=True)
        runs = []
        for _ in range(repeats):
            shutil.rmtree(root / "_build", ignore_errors=True)
            load = os.getloadavg()[0]
            cold = build(root)
            change(root)
            runs.append({"cold_s": cold, "after_one_change_s": build(root),
                         "load_before": load})
            print(runs[-1], flush=True)
        html = root / "_build" / "html"
        names = [c.name for c in chapters(root) if c.room]
        sizes = [(html / f"{name}.html").stat().st_size for name in names]
        book = read_notebook(chapters(root)[0].path)
        return {
            "what": f"{n} stub chapters with {FIGURES} figures and {CLAIMS} "
                    f"claims each, median of {repeats}",
            "cold_s": statistics.median(r["cold_s"] for r in runs),
            "after_one_change_s": statistics.median(
                r["after_one_change_s"] for r in runs),
            "chapter_page_median_bytes": statistics.median(sizes),
            "chapter_page_largest_bytes": max(sizes),
            "scoreboard_bytes": (html / "scoreboard.html").stat().st_size,
            "gallery_bytes": (html / "gallery.html").stat().st_size,
            "gallery_images_bytes": sum(
                f.stat().st_size
                for f in (html / "_images" / "gallery").glob("*")),
            "site_bytes": sum(f.stat().st_size for f in html.rglob("*")
                              if f.is_file()),
            "scoreboard": open_scoreboard(html, 5),
            "cells_in_a_stub": len(code_cells(book)),
            "repeats": runs,
            "machine": machine(),
            "versions": {
                name: metadata.version(name)
                for name in ("jupyter-book", "sphinx", "myst-nb",
                             "sphinx-book-theme", "playwright")
            } | {"python": platform.python_version()},
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write the book here")
    arguments = parser.parse_args()
    result = run(arguments.repeats, arguments.keep)
    out = CHECKOUT / "benchmarks" / "results" / "site.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
