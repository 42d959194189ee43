"""Every chapter of the book runs at smoke scale and says what it registers."""

import json
import re
from pathlib import Path

import pytest

from reappraisal.protocol.book import chapters, read_notebook
from reappraisal.protocol.cache import Store
from reappraisal.protocol.claims import Claim, load_claims
from reappraisal.protocol.ledger import recheck
from reappraisal.protocol.parity import parity_records, stored_parity
from reappraisal.protocol.runner import Run
from reappraisal.protocol.verdicts import MIME, Verdict

ROOT = Path(__file__).parent.parent
BOOK = chapters(ROOT)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Run everything once through papermill; name to outcome and notebook."""
    store = Store(tmp_path_factory.mktemp("store"))
    run = Run(store, {"scale": "smoke"}, workers=1, threads=1)
    outcomes = {outcome.chapter: outcome for outcome in run(BOOK)}
    return store, outcomes


def executed(store, outcome):
    return json.loads(store.get(outcome.key).notebook)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("chapter", BOOK, ids=str)
def test_chapter_runs_at_smoke_scale(chapter, smoke):
    store, outcomes = smoke
    outcome = outcomes[chapter.name]
    assert outcome.ok, f"{outcome.why}\n{outcome.error.get('words', '')}"
    noise = [
        output["text"]
        for cell in executed(store, outcome)["cells"]
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
    assert not noise, noise


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("id", list(load_claims(ROOT / "registrations")))
def test_claim_gets_its_verdict_from_its_chapter(id, smoke):
    store, outcomes = smoke
    claim = Claim.load(id, ROOT / "registrations")
    slug = claim.entry["chapter"].replace("-", "_")
    outcome = outcomes[f"{claim.room}/{slug}"]
    found = [
        Verdict.from_json(output["data"][MIME])
        for cell in executed(store, outcome)["cells"]
        for output in cell.get("outputs", [])
        if MIME in output.get("data", {})
    ]
    mine = [verdict for verdict in found if verdict.id == id]
    assert len(mine) == 1
    assert mine[0].record["scale"] == "smoke"
    assert recheck(mine[0], claim) == []


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", list(stored_parity(ROOT)))
def test_instruments_meet_their_oracles_again(name, smoke):
    store, outcomes = smoke
    (again,) = parity_records(executed(store, outcomes[name])["cells"])
    kept = stored_parity(ROOT)[name]
    rows = [
        [(row["instrument"], row["oracle"], row["tolerance"])
         for row in record["rows"]]
        for record in (again, kept)
    ]
    assert sorted(rows[0]) == sorted(rows[1])
    assert again["exempt"] == kept["exempt"]
    assert all(row["worst"] <= row["tolerance"] for row in again["rows"])


def test_chapters_have_title_summary_and_parameters():
    for chapter in BOOK:
        cells = read_notebook(chapter.path)["cells"]
        first = "".join(cells[0]["source"])
        assert re.match(r"# .+\n\n> .+", first), chapter.name


def test_finding_chapters_have_the_anatomy(root):
    sections = ["The claim", "Why it matters", "Mechanism", "Experiment",
                "Evidence", "What would break it", "On your own model",
                "Exercises", "References"]
    for claim in load_claims(root / "registrations").values():
        slug = claim.entry["chapter"].replace("-", "_")
        notebook = read_notebook(root / "nbs" / claim.room / f"{slug}.ipynb")
        text = "\n".join(
            "".join(cell["source"]) for cell in notebook["cells"]
            if cell["cell_type"] == "markdown"
        )
        heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
        places = [heads.index(s) for s in sections if s in heads]
        assert [s for s in sections if s not in heads] == [], slug
        assert places == sorted(places), slug
