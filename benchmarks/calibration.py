"""How fast is the calibration error of an ensemble? Against torchmetrics.

Run by hand on a quiet machine:  python benchmarks/calibration.py
Writes benchmarks/results/calibration.json.

All compute the expected calibration error of every member from the same
probabilities and labels, checks of the input included; torchmetrics one
member after the other, as it has no member dimension, by its function and by
its metric object. That all find the same numbers is checked. Repetitions are
interleaved, and each is of a few calls in a row; ratios are taken within a
repetition, and their median is reported, for one thread and for two. By the
CPU clock, two threads need OMP_WAIT_POLICY=passive, or waiting counts as work.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torchmetrics
from machine import machine
from torchmetrics.classification import MulticlassCalibrationError
from torchmetrics.functional.classification import multiclass_calibration_error

from reappraisal.measure.calibration import ece


def case(members: int, samples: int, classes: int) -> tuple:
    g = torch.Generator().manual_seed(1000)
    logits = 2 * torch.randn(members, samples, classes, generator=g)
    y = torch.randint(classes, (samples,), generator=g)
    return logits.softmax(-1), y


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(function, clock, calls: int) -> tuple[float, torch.Tensor]:
    """Seconds a call, of several in a row, and what the last one found."""
    t0 = clock()
    for _ in range(calls):
        found = function()
    return (clock() - t0) / calls, found


def by_object(probs, y, classes: int, bins: int) -> torch.Tensor:
    """One metric object, updated, read and reset for every member."""
    metric, found = MulticlassCalibrationError(classes, bins), []
    for p in probs:
        metric.update(p, y)
        found.append(metric.compute())
        metric.reset()
    return torch.stack(found)


def compare(members, samples, classes, bins, repeat, *how) -> dict:
    probs, y = case(members, samples, classes)
    ways = {
        "reappraisal": lambda: ece(probs, y, bins, closed="left"),
        "torchmetrics function": lambda: torch.stack(
            [multiclass_calibration_error(p, y, classes, bins) for p in probs]
        ),
        "torchmetrics object": lambda: by_object(probs, y, classes, bins),
    }
    seconds: dict[str, list[float]] = {k: [] for k in ways}
    for r in range(repeat + 1):
        found = {}
        for name, way in ways.items():
            took, found[name] = timed(way, *how)
            if r:
                seconds[name].append(took)
    ours = found.pop("reappraisal")
    far = max((ours - f).abs().max().item() for f in found.values())
    if far > 1e-5:
        raise SystemExit(f"they differ by {far}")
    ratios = {
        name: statistics.median(
            t / o for o, t in zip(seconds["reappraisal"], seconds[name], strict=True)
        )
        for name in found
    }
    return {
        "members": members,
        "samples": samples,
        "classes": classes,
        "bins": bins,
        "milliseconds": {
            k: round(1e3 * statistics.median(v), 3) for k, v in seconds.items()
        },
        "times_faster_than": {k: round(v, 2) for k, v in ratios.items()},
        "largest_difference": far,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=128)
    parser.add_argument(
        "--samples", type=int, nargs="+", default=[360, 1000, 10000]
    )
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--bins", type=int, default=15)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="in a row")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu, with one thread, is fair on a busy machine too",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "calibration.json",
    )
    a = parser.parse_args()
    started, tables = machine(), {}
    for threads in a.threads:
        torch.set_num_threads(threads)
        rows = tables[threads] = []
        for n in a.samples:
            how = CLOCKS[a.clock], a.calls
            row = compare(a.members, n, a.classes, a.bins, a.repeat, *how)
            rows.append(row)
            print(threads, row)
    first, *others = a.threads
    report = {
        "machine": {**started, "threads": first},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
        },
        "clock": a.clock,
        "calls_in_a_row": a.calls,
        "ece": tables[first],
        **{f"ece, {k} threads": tables[k] for k in others},
    }
    a.output.parent.mkdir(exist_ok=True)
    a.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
