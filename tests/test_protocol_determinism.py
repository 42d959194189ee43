"""The same evidence, bit for bit: in any order, on one worker or two."""

import json

import pytest

from reappraisal.protocol.book import code_cells, select
from reappraisal.protocol.cache import Store
from reappraisal.protocol.records import without_times
from reappraisal.protocol.runner import Run
from reappraisal.protocol.verdicts import MIME

HEART = [
    "signal/metrics_without_data", "dynamics/svd_factors_and_grokking",
    "landscape/sharp_minima_reappraisal",
    "landscape/explicit_regularisation", "reproducibility/signal_to_noise",
    "compression/kd_functional_perspective",
    "compression/compression_functional_perspective",
    "compression/what_makes_a_good_prune",
]
QUICK = ["compression/kd_functional_perspective",
         "reproducibility/signal_to_noise"]


def shown(root, folder, names, order, workers):
    """Every output of the chapters at smoke scale, times left aside.

    Returns the verdicts' JSON as text, by chapter and cell, and the rest.
    """
    store = Store(folder)
    run = Run(store, {"scale": "smoke"}, workers=workers, threads=1,
              timeout=600)
    outcomes = run(order(select(root, names)))
    assert all(o.ok for o in outcomes), [o.why for o in outcomes]
    verdicts, rest = {}, {}
    for o in outcomes:
        notebook = json.loads(store.get(o.key).notebook)
        for i, cell in enumerate(code_cells(notebook)):
            for j, output in enumerate(cell["outputs"]):
                data = output.get("data", {"text": output.get("text")})
                verdict = data.pop(MIME, None)
                if verdict is not None:
                    verdicts[o.chapter, i, j] = json.dumps(verdict)
                rest[o.chapter, i, j] = without_times(json.dumps(data))
    return verdicts, rest


@pytest.mark.parametrize("names", [
    pytest.param(QUICK, id="two chapters",
                 marks=pytest.mark.timeout(600)),
    pytest.param(HEART, id="all", marks=[
        pytest.mark.slow, pytest.mark.timeout(3600)]),
])
def test_verdicts_are_the_same_bit_for_bit(root, tmp_path, names):
    orders = [(sorted, 1), (lambda c: sorted(c, reverse=True), 1),
              (lambda c: sorted(c, key=lambda x: x.slug), 2)]
    (first, drawn), *others = (
        shown(root, tmp_path / str(i), names, order, workers)
        for i, (order, workers) in enumerate(orders))
    assert len(first) >= len(names)
    for verdicts, rest in others:
        assert verdicts == first
        differ = {k[:2] for k in drawn if drawn[k] != rest.get(k)}
        assert not differ, f"other figures or words in {sorted(differ)}"
