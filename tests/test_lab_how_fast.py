"""The benchmarks' files are read as they were written, or refused."""

import json

import pytest

from reappraisal.lab.how_fast import read_benchmark, setting, speedups


def test_files_are_read_missed_or_refused(tmp_path):
    machine = {"cpu": "X", "cores": 2, "memory_gib": 8, "threads": 2}
    report = {"machine": machine, "versions": {"torch": "2"}}
    assert read_benchmark(tmp_path, "a") is None
    (tmp_path / "a.json").write_text(json.dumps(report))
    assert read_benchmark(tmp_path, "a") == report
    assert setting(report) == "X, 2 cores, 8 GiB, 2 threads used; torch 2"
    (tmp_path / "a.json").write_text(json.dumps(report)[:-5])
    with pytest.raises(ValueError, match="no JSON"):
        read_benchmark(tmp_path, "a")
    (tmp_path / "a.json").write_text('{"machine": {}}')
    with pytest.raises(ValueError, match="lacks .'versions'"):
        read_benchmark(tmp_path, "a")


def test_ratios_are_paired_by_repetition():
    seconds = {"stacked": [1.0, 2.0], "serial": [3.0, 8.0]}
    ratios = speedups({"seconds": seconds})
    assert list(ratios) == ["serial"] and ratios["serial"].tolist() == [3, 4]
