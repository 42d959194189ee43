"""What `reappraisal check` checks holds for the book as committed."""

import subprocess
import sys

import pytest

from reappraisal.protocol.book import read_notebook
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


def test_no_line_of_text_is_taken_for_a_comment(root):
    """The site leaves out lines that begin with %."""
    pages = {p: [p.read_text("utf-8")] for p in (root / "nbs").rglob("*.md")}
    for path in (root / "nbs").rglob("*.ipynb"):
        pages[path] = [
            cell["source"] for cell in read_notebook(path)["cells"]
            if cell["cell_type"] == "markdown"
        ]
    lost = [
        f"{path.relative_to(root)}: {line}"
        for path, texts in pages.items() for text in texts
        for line in without_fences(text) if line.lstrip().startswith("%")
    ]
    assert pages and not lost, "\n".join(lost)


def test_lines_in_fences_are_no_text():
    text = "one\n```python\n%time\n```\n% two\n```{dropdown} Why\n% so\n```"
    assert without_fences(text) == ["one", "% two", "% so"]


def without_fences(text: str) -> list[str]:
    """Lines of Markdown that are not code; what is folded away is text."""
    lines, fences = [], []
    for line in text.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            told = line.lstrip("`~ ")
            if told or not fences:
                fences.append(not told.startswith("{dropdown}"))
            else:
                fences.pop()
        elif not any(fences):
            lines.append(line)
    return lines
