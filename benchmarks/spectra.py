"""How fast is a weight-only analysis? Against WeightWatcher and bare SVDs.

Run by hand on a quiet machine:  python benchmarks/spectra.py
Needs the packages `weightwatcher` and `powerlaw`. Writes
benchmarks/results/spectra.json.

All contenders get the same state dict: the weights of a ResNet-50 in shape,
Gaussian in value. WeightWatcher runs with its defaults (norms, ranks,
entropy, power law), which is what `analyse_weights` computes by default; the
bare contender only takes the singular values, slice by slice, with whichever
of SciPy and PyTorch is faster here. Repetitions are interleaved and ratios
are taken within a repetition; their median is reported. Alphas must agree to
1e-3 in every layer.

WeightWatcher is kept from seeing a GPU: where there is one, it rounds the
weights to half precision and takes their singular values in single, which
moves the start of some tails, and with it their alphas, by more than that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import scipy
import scipy.linalg
import torch
from machine import machine

from reappraisal.measure.spectra import analyse_weights, slices


def resnet50(seed: int = 0, width: int = 64) -> dict[str, torch.Tensor]:
    """Gaussian weights of variance 2 / fan_in in the shapes of a ResNet-50."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"conv1": (width, 3, 7, 7)}
    inputs = width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for block in range(blocks):
            name = f"layer{stage + 1}.{block}"
            shapes[f"{name}.conv1"] = (inner, inputs, 1, 1)
            shapes[f"{name}.conv2"] = (inner, inner, 3, 3)
            shapes[f"{name}.conv3"] = (4 * inner, inner, 1, 1)
            if not block:
                shapes[f"{name}.downsample.0"] = (4 * inner, inputs, 1, 1)
            inputs = 4 * inner
    shapes["fc"] = (1000, inputs)
    return {
        f"{k}.weight": torch.randn(s, generator=g)
        * (2 / np.prod(s[1:])) ** 0.5
        for k, s in shapes.items()
    }


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def ours(state):
    report = analyse_weights(state)
    return dict(zip(report.layers, report["alpha"].tolist(), strict=True))


def weightwatcher(state):
    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch("torch.cuda.is_available", lambda: False),
    ):
        import weightwatcher as ww
    logging.disable(logging.CRITICAL)
    with (
        contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings()
    ):
        warnings.simplefilter("ignore")
        details = ww.WeightWatcher(model=state).analyze()
    return dict(zip(details["name"], details["alpha"], strict=True))


def bare_scipy(state):
    for w in state.values():
        for matrix in slices(w).numpy():
            scipy.linalg.svdvals(matrix)


def bare_torch(state):
    for w in state.values():
        torch.linalg.svdvals(slices(w))


def main(
    repeat: int, width: int, threads: int, clock: str, out: Path
) -> None:
    torch.set_num_threads(threads)
    now, started = CLOCKS[clock], machine(torch.get_num_threads())
    state = resnet50(width=width)
    contenders = {
        "ours": ours, "weightwatcher": weightwatcher,
        "bare_scipy": bare_scipy, "bare_torch": bare_torch,
    }
    small = {k: v for k, v in state.items() if v.numel() < 10_000}
    for run in contenders.values():  # imports and warm-up
        run(small)
    seconds = {name: [] for name in contenders}
    alphas = {}
    for _ in range(repeat):
        for name, run in contenders.items():
            t0 = now()
            alphas[name] = run(state)
            seconds[name].append(now() - t0)
    assert set(alphas["weightwatcher"]) == set(alphas["ours"])
    differences = {
        k: abs(alphas["weightwatcher"][k] - a)
        for k, a in alphas["ours"].items()
    }
    # not (some larger), for NaN
    assert all(d < 1e-3 for d in differences.values()), differences
    worst = max(differences.values())
    bare = map(min, seconds["bare_scipy"], seconds["bare_torch"])
    rows = list(zip(seconds["ours"], seconds["weightwatcher"], bare, strict=True))
    result = {
        "task": f"weight-only analysis, ResNet-50 shapes, width {width}",
        "layers": len(alphas["ours"]),
        "parameters": sum(v.numel() for v in state.values()),
        "seconds": {k: statistics.median(v) for k, v in seconds.items()},
        "times_faster_than_weightwatcher": statistics.median(
            w / o for o, w, _ in rows
        ),
        "times_the_bare_decompositions": statistics.median(
            o / b for o, _, b in rows
        ),
        "worst_alpha_difference": worst,
        "repetitions": repeat,
        "clock": clock,
        "machine": started,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "numpy": np.__version__, "scipy": scipy.__version__,
            "weightwatcher": version("weightwatcher"),
            "powerlaw": version("powerlaw"),
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu, with one thread, is fair on a busy machine too",
    )
    parser.add_argument(
        "--out", type=Path,
        default=Path(__file__).parent / "results" / "spectra.json",
    )
    main(**vars(parser.parse_args()))
