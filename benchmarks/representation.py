"""How fast is a table of CKA? Against a loop over pairs of layers.

Run by hand on a quiet machine:  python benchmarks/representation.py
Writes benchmarks/results/representation.json.

Twenty layers against twenty layers on 5000 samples, float32. The loop is what
one writes from the definition, and not badly: activations are centred once,
and each pair takes the three products in features or in samples, whichever
is smaller. Two networks share nothing but the samples; in the second task
the table is that of one network's layers among themselves, in the third
layers differ in width, and in the fourth they are narrow, where there is
little to save but the two products that each pair repeats. Both sides must agree to 1e-4. Repetitions are
interleaved and ratios are taken within a repetition; their median is
reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

from reappraisal.measure.representation import cka_matrix


def machine() -> dict:
    """What the numbers depend on, without saying whose machine it is."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [x.split(":")[1].strip() for x in lines if "model name" in x]
        model = models[0] if models else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
    }


def network(widths, samples: int, seed: int) -> list[torch.Tensor]:
    """Activations that share a signal and add noise, layer by layer."""
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    signal = torch.randn(samples, 32, generator=shared)
    layers = []
    for width in widths:
        mixing = torch.randn(32, width, generator=own) / 32**0.5
        noise = torch.randn(samples, width, generator=own)
        layers.append(torch.relu(signal @ mixing + noise))
    return layers


def one_pair(x, y):
    def dot(a, b):
        if max(a.shape[1], b.shape[1]) <= len(a):
            return (a.T @ b).square().sum()
        return ((a @ a.T) * (b @ b.T)).sum()

    return dot(x, y) / (dot(x, x) * dot(y, y)).sqrt()


def loop(xs, ys):
    xs, ys = ([t - t.mean(0) for t in ts] for ts in (xs, ys))
    return torch.tensor([[one_pair(x, y) for y in ys] for x in xs])


def main(repeat: int, samples: int, width: int, out: Path) -> None:
    flat, narrow = [width] * 20, [width // 4] * 20
    mixed = [width // 8, width // 4, width // 2, width] * 5
    first = network(flat, samples, 1)
    tasks = {
        f"two networks, width {width}": (first, network(flat, samples, 2)),
        f"one network, width {width}": (first, first),
        f"two networks, widths {min(mixed)} to {width}": (
            network(mixed, samples, 1), network(mixed, samples, 2)
        ),
        f"two networks, width {narrow[0]}": (
            network(narrow, samples, 1), network(narrow, samples, 2)
        ),
    }
    results = {}
    for name, (xs, ys) in tasks.items():
        seconds = {"loop": [], "table": []}
        for _ in range(repeat):
            t0 = time.perf_counter()
            table = cka_matrix(xs, None if ys is xs else ys).values
            t1 = time.perf_counter()
            pairs = loop(xs, ys)
            t2 = time.perf_counter()
            seconds["table"].append(t1 - t0)
            seconds["loop"].append(t2 - t1)
        worst = float((table - pairs).abs().max())
        assert worst < 1e-4, (name, worst)
        ratios = [
            a / b for a, b in zip(seconds["loop"], seconds["table"], strict=True)
        ]
        results[name] = {
            "times_faster_than_the_loop": statistics.median(ratios),
            "seconds": {k: statistics.median(v) for k, v in seconds.items()},
            "worst_difference": worst,
        }
        print(name, json.dumps(results[name]))
    result = {
        "task": f"linear CKA of 20 x 20 layers on {samples} samples, float32",
        "results": results,
        "repetitions": repeat,
        "machine": machine(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument(
        "--out", type=Path,
        default=Path(__file__).parent / "results" / "representation.json",
    )
    main(**vars(parser.parse_args()))
