"""Collect how long chapters took, from the records of their results.

    python benchmarks/chapters.py [STORE ...]

Reads the records in the notebooks and in the given stores (folders such as
`.reappraisal`), and writes benchmarks/results/chapters.json.
"""

import json
import sys
from pathlib import Path

from reappraisal.protocol.book import find_root
from reappraisal.protocol.cache import Store
from reappraisal.protocol.execute import machine
from reappraisal.protocol.planning import timings
from reappraisal.protocol.provenance import versions


def main(folders: list[str]) -> None:
    root = find_root(Path(__file__).parent)
    rows = timings(root, [Store(folder) for folder in folders])
    report = {
        "what": "seconds of each finding chapter's runs, from their records",
        "machine": machine(),
        "versions": versions((root / "settings.ini").read_text()),
        "runs": rows,
    }
    out = Path(__file__).parent / "results" / "chapters.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(rows)} runs of {len({r['chapter'] for r in rows})} chapters")


if __name__ == "__main__":
    main(sys.argv[1:])
