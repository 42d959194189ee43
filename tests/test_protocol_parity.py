"""The parity table finds wrong instruments and is stored whole."""

import json
import math

import numpy as np
import pytest
import torch

from reappraisal.protocol.parity import (
    MIME,
    Parity,
    difference,
    parity_records,
    stored_parity,
)


@pytest.mark.parametrize(
    ("got", "want", "relative", "error"),
    [
        (1, 1.0, False, 0),
        (float("nan"), float("nan"), False, 0),
        (float("nan"), 0.0, False, math.inf),
        (math.inf, math.inf, False, 0),
        (math.inf, -math.inf, False, math.inf),
        ([1.0, 2.0], [1.0, 2.5], False, 0.5),
        ([10.0, 20.0], [10.0, 25.0], True, 0.2),
        ([0.0], 0.0, False, math.inf),
        ([], [], True, 0),
        (torch.tensor([True, False]), [1, 0], False, 0),
        (torch.ones(2, dtype=torch.bfloat16), [1, 1], False, 0),
        (torch.ones(1, requires_grad=True), [2.0], False, 1),
        (1j, 1, False, 2**0.5),
    ],
)
def test_difference(got, want, relative, error):
    assert difference(got, want, relative) == error


def shifted(by, tolerance=0.1):
    parity = Parity("room.module")
    parity.check(
        "mean", oracle="numpy", ours=lambda x: x.mean() + by,
        theirs=np.mean, cases=[(np.arange(k),) for k in range(1, 9)],
        tolerance=tolerance,
    )
    return parity


def test_a_planted_error_is_found_and_a_small_one_is_kept():
    assert shifted(0.05).rows[0].worst == pytest.approx(0.05)
    with pytest.raises(AssertionError, match="mean is 0.2 away from numpy"):
        shifted(0.2)


def test_no_cases_or_another_tolerance_is_refused():
    parity = shifted(0)
    with pytest.raises(ValueError, match="cases: empty"):
        parity.check("mean", oracle="numpy", ours=abs, theirs=abs, cases=[],
                     tolerance=0.1)
    with pytest.raises(ValueError, match="tolerance: got 0.3"):
        parity.compare("mean", 0, 0, oracle="numpy", tolerance=0.3)


def test_it_comes_back_from_a_notebook(tmp_path):
    parity = shifted(0.05)
    parity.exempt("draw", "a figure")
    bundle = parity._repr_mimebundle_()
    assert "mean" in bundle["text/html"] and "mean" in bundle["text/plain"]
    cells = [{"outputs": [{"data": bundle}]}]
    (tmp_path / "nbs" / "room").mkdir(parents=True)
    path = tmp_path / "nbs" / "room" / "module.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert stored_parity(tmp_path) == {"room/module": parity.record}
    assert json.loads(json.dumps(bundle[MIME])) == parity.record
    assert parity.record["exempt"] == {"draw": "a figure"}
    assert len(parity.to_frame()) == 1
    path.write_text(json.dumps({"cells": cells * 2}))
    with pytest.raises(ValueError, match="2 parity tables"):
        stored_parity(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a notebook"):
        stored_parity(tmp_path)
    assert parity_records([{}]) == []
