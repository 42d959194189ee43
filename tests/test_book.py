"""What `reappraisal check` checks holds for the book as committed."""

import subprocess
import sys

import pytest

from reappraisal.protocol.checks import CHECKS
from reappraisal.protocol.ledger import Ledger


@pytest.mark.parametrize("name", list(CHECKS))
def test_check(name, root):
    assert CHECKS[name](root) == []


def test_the_ledger_believes_every_stored_verdict(root):
    ledger = Ledger.read(root)
    assert ledger.entries
    assert [str(refusal) for refusal in ledger.refusals] == []
    rows = ledger.rows()
    for row in rows:
        assert row["p_holm"] is None or row["p"] <= row["p_holm"] <= 1
        assert row["p_bh"] is None or row["p"] <= row["p_bh"] <= row["p_holm"]


def test_code_style(root):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--quiet", "."],
        cwd=root, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stdout
