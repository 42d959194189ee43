"""What does the runner add to the chapters' own time?

Run by hand on a quiet machine:  python benchmarks/runner.py
Needs the extra `book`. Writes benchmarks/results/runner.json, which the
chapter lab/how_fast shows.

Twelve synthetic chapters import torch, train a small network for a fixed
number of steps and draw a figure. They are run by `reappraisal run` on two
workers and compared with the ideal (the sum of their cell times, as measured
in that same run, divided by two) and with Jupyter Book's own execution of the
same notebooks, less the time that it takes to render them without executing.
Kernels have one thread in either case (the runner sees to that by itself; left
alone, Jupyter Book's would take two for a network that is faster with one).
Whole commands are timed, from start to exit. Repetitions are interleaved, and
medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from machine import machine

from reappraisal.protocol import execute
from reappraisal.protocol.book import parameters_of, read_notebook, select
from reappraisal.protocol.cache import Store
from reappraisal.protocol.execute import notebook_bytes
from reappraisal.protocol.provenance import provenance

CHECKOUT = Path(__file__).parent.parent
CHAPTERS, WORKERS, SECONDS = 12, 2, 3.0
SETUP = """
import torch
import matplotlib.pyplot as plt
from torch import nn

generator = torch.Generator().manual_seed({seed})
X = torch.randn(512, 64, generator=generator)
y = (X[:, :8].sum(1) > 0).long()
net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
""".strip()
TRAIN = """
losses = []
for step in range(steps):
    loss = nn.functional.cross_entropy(net(X), y)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
""".strip()
DRAW = """
fig, ax = plt.subplots()
ax.plot(losses)
ax.set(xlabel="step", ylabel="loss", yscale="log")
plt.show()
""".strip()


def write_book(root: Path, steps: int) -> None:
    """Twelve chapters that differ in their seeds."""
    (root / "nbs" / "room").mkdir(parents=True)
    shutil.copy(CHECKOUT / "settings.ini", root)
    spec = {"display_name": "python3", "language": "python", "name": "python3"}
    pages = ["format: jb-book", "root: room/c00", "chapters:"]
    for seed in range(CHAPTERS):
        first = f'scale = "book"\nsteps = {steps}'
        sources = [first, SETUP.format(seed=seed), TRAIN, DRAW, "losses[-1]"]
        cells = [
            {"cell_type": "code", "id": f"c{i}", "source": source,
             "metadata": {"tags": ["parameters"]} if i == 0 else {},
             "outputs": [], "execution_count": None}
            for i, source in enumerate(sources)
        ]
        title = {"cell_type": "markdown", "id": "title", "metadata": {},
                 "source": f"# Chapter {seed}"}
        book = {"cells": [title, *cells], "metadata": {"kernelspec": spec},
                "nbformat": 4, "nbformat_minor": 5}
        path = root / "nbs" / "room" / f"c{seed:02d}.ipynb"
        path.write_bytes(notebook_bytes(book))
        if seed:
            pages.append(f"- file: room/c{seed:02d}")
    (root / "nbs" / "_toc.yml").write_text("\n".join(pages) + "\n")


def steps_for(seconds: float) -> int:
    """Steps that take about so long on one thread of this machine."""
    code = (f"steps = 300\nimport time\n{SETUP.format(seed=0)}\n"
            f"torch.set_num_threads(1)\n{TRAIN}\nbegan = time.perf_counter()\n"
            f"{TRAIN}\nprint(300 / (time.perf_counter() - began))")
    done = subprocess.run([sys.executable, "-c", code], check=True,
                          capture_output=True, text=True)
    return int(float(done.stdout) * seconds)


def timed(command: list[str], cwd: Path) -> float:
    """Wall seconds of a whole command."""
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True,
                          text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout[-2000:]}{done.stderr}")
    return seconds


def by_runner(root: Path) -> dict:
    """One run of everything, then one in which nothing is to be done."""
    store = root / "store"
    shutil.rmtree(store, ignore_errors=True)
    python = [sys.executable, "-c",
              "from reappraisal.protocol.cli import main; main()"]
    command = [*python, "run", "--cache", str(store), "--workers",
               str(WORKERS)]
    wall = timed(command, root)
    kept = Store(store)
    records = [kept.get(provenance(c).key).record for c in select(root)]
    cells = sum(r["seconds"] for r in records)
    over = sorted(r["wall"] - r["seconds"] for r in records)
    return {
        "wall_s": wall,
        "cells_s": cells,
        "ideal_s": cells / WORKERS,
        "wall_over_ideal": wall / (cells / WORKERS),
        "overhead_per_chapter_s": statistics.median(over),
        "overhead_first_chapter_s": over[-1],
        "cached_wall_s": timed(command, root),
    }


def by_jupyter_book(root: Path, mode: str) -> float:
    """Jupyter Book's own run over the same notebooks, and its rendering."""
    config = root / "nbs" / "_config.yml"
    config.write_text(f"title: Twelve\nexecute:\n  execute_notebooks: {mode}\n"
                      "  timeout: 300\n  run_in_temp: true\n")
    out = root / "built"
    shutil.rmtree(out, ignore_errors=True)
    book = str(Path(sys.executable).with_name("jupyter-book"))
    return timed([book, "build", "nbs", "--path-output", str(out), "--quiet"],
                 root)


def kernel_overhead(root: Path, warm: bool) -> float:
    """Seconds a chapter takes beyond its cells, without any scheduling."""
    honest = execute.warm_server
    if not warm:
        execute.warm_server = lambda *_: None
    try:
        found = []
        for chapter in select(root)[:4]:
            data = chapter.path.read_bytes()
            now = provenance(chapter, {"steps": 1})
            defaults = parameters_of(read_notebook(chapter.path))
            job = execute.make_job(chapter, now, data, defaults)
            began = time.perf_counter()
            assert execute.execute(job).status == "ok"
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])
    finally:
        execute.warm_server = honest
        execute.close_servers()


def wait_for_quiet(patience: float) -> float:
    """Wait until one more process would have a core; the load then."""
    end = time.monotonic() + patience
    while os.getloadavg()[0] > 0.3 and time.monotonic() < end:
        time.sleep(5)
    return os.getloadavg()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--patience", type=float, default=120,
        help="seconds to wait for a quiet machine before each repetition",
    )
    parser.add_argument(
        "--out", type=Path,
        default=Path(__file__).parent / "results" / "runner.json",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "book"
        steps = steps_for(SECONDS)
        write_book(root, steps)
        ours, force, off, load = [], [], [], []
        for repeat in range(options.repeats):
            load.append(wait_for_quiet(options.patience))
            ours.append(by_runner(root))
            force.append(by_jupyter_book(root, "force"))
            off.append(by_jupyter_book(root, "off"))
            print(repeat, ours[-1], force[-1], off[-1], flush=True)
        start_up = {kind: kernel_overhead(root, kind == "warm")
                    for kind in ("warm", "ordinary")}
    middle = {k: statistics.median(o[k] for o in ours) for k in ours[0]}
    executed = [a - b for a, b in zip(force, off, strict=True)]
    report = {
        "what": f"{CHAPTERS} synthetic chapters of about {SECONDS:g} s, "
                f"{WORKERS} workers, median of {options.repeats}",
        "steps": steps,
        "runner": middle,
        "jupyter_book": {
            "executed_and_rendered_s": statistics.median(force),
            "rendered_only_s": statistics.median(off),
            "executed_s": statistics.median(executed),
        },
        "jupyter_book_over_runner": statistics.median(
            a / o["wall_s"] for a, o in zip(executed, ours, strict=True)
        ),
        "chapter_of_nothing_s": start_up,
        "repeats": [
            o | {"jupyter_book_s": a, "load_before": x}
            for o, a, x in zip(ours, executed, load, strict=True)
        ],
        "machine": machine(),
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "papermill", "distributed", "ipykernel",
                         "jupyter-book")
        } | {"python": platform.python_version()},
    }
    options.out.parent.mkdir(exist_ok=True)
    text = json.dumps(report, indent=1, default=float)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
