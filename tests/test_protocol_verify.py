"""A result is run again: what differs is said, what is alike passes."""

import json
import re

import pytest
from tiny_book import TinyBook

from reappraisal.protocol import verify as v
from reappraisal.protocol.execute import notebook_bytes
from reappraisal.protocol.runner import Run
from reappraisal.protocol.verdicts import MIME, Verdict

ROW = dict.fromkeys(
    "unit lo hi p_reversed power replicates_needed supports_above "
    "refutes_below".split()
) | {"name": "saving", "role": "evidence", "kind": "effect", "level": 0.95,
     "measure": "share", "outcome": "supports", "estimate": 0.62, "sesoi": 0.5,
     "p": 0.004, "n": 24, "method": "t"}
RECORD = {
    "schema": "reappraisal.verdict/2", "claim": "made-up", "paper": "A00",
    "statement": "An example.", "verdict": "reproduced", "reversed": False,
    "qualifier": None, "scale": "book", "criteria": [ROW], "control": {},
    "n": 24, "seeds": [1000, 1001], "versions": {}, "amended": False,
    "registration": "sha256:12", "deviations": [],
}
CODE = f"""
from IPython.display import display
record = {RECORD!r}
record["scale"] = scale
record["criteria"][0]["estimate"] = width / 3
data = {{"text/plain": "a verdict in 3 s", {MIME!r}: record}}
display(data, raw=True)
"""


@pytest.fixture
def book(tmp_path):
    """A book whose only chapter has been run and written."""
    book = TinyBook(tmp_path)
    book.add("a/b", CODE)
    (outcome,) = Run(book.store, write=True, threads=1)([book.chapter("a/b")])
    assert outcome.written
    return book


def edit(book, change):
    """Change the notebook's JSON in place."""
    data = json.loads(book.path("a/b").read_bytes())
    change(data)
    book.path("a/b").write_bytes(notebook_bytes(data))


def verdict(data):
    return data["cells"][-1]["outputs"][0]["data"][MIME]


def verify(book, **options):
    before = book.path("a/b").read_bytes(), [
        (p, p.read_bytes()) for p in book.results()]
    found = v.verify(book.chapter("a/b"), book.store, **options)
    assert before == (book.path("a/b").read_bytes(), [
        (p, p.read_bytes()) for p in book.results()])
    return found


def test_remarks_prose_and_a_stored_time_change_nothing(book):
    def change(data):
        data["cells"][0]["source"] = ["# Other\n", "words"]
        data["cells"][2]["source"] += ["\n", "\n", "# a remark   "]
        data["metadata"]["reappraisal"]["seconds"] = 99.0

    edit(book, change)
    found = verify(book, rtol=0, atol=0)
    assert found.same and found.verdicts == 1 and found.numbers == 2
    assert not found.context and not found.cells, found


def test_a_tampered_number_is_named_with_claim_criterion_and_both(book):
    def change(data):
        verdict(data)["criteria"][0]["estimate"] = 1.02

    edit(book, change)
    found = verify(book)
    edited, number = found.differences
    assert not found.same and edited.field == "stored outputs edited"
    assert (number.claim, number.criterion, number.field, number.stored,
            number.now) == ("A00/made-up", "saving", "estimate", 1.02, 1.0)
    assert number.allowed == pytest.approx(0.005 + 1.02e-6)
    assert "A00/made-up: saving: estimate: stored 1.02, now 1.0" in str(found)
    loose = verify(book, atol=0.03)
    assert [d.field for d in loose.differences] == ["stored outputs edited"]


def test_a_tampered_verdict_is_named(book):
    edit(book, lambda data: verdict(data).update(verdict="not reproduced"))
    found = verify(book)
    fields = {d.field: (d.stored, d.now) for d in found.differences}
    assert fields.pop("verdict") == ("not reproduced", "reproduced")
    assert set(fields) == {"stored outputs edited"}


def test_another_version_is_said_and_is_no_difference(book):
    def change(data):
        record = data["metadata"]["reappraisal"]
        record["versions"]["numpy"] = "1.0"
        record["machine"]["model"] = "Abacus"

    edit(book, change)
    found = verify(book)
    assert found.same
    assert {c.field: c.stored for c in found.context} == {
        "version of numpy": "1.0", "model": "Abacus"}
    assert "version of numpy: stored \"1.0\"" in str(found)


def test_code_that_gives_something_else_fails_and_says_so(book):
    outputs = book.outputs("a/b")
    record = json.loads(book.path("a/b").read_bytes())["metadata"]
    book.add("a/b", CODE.replace("width / 3", "width / 4"))

    def change(data):
        data["metadata"] = record
        data["cells"][-1]["outputs"] = outputs[-1]

    edit(book, change)
    found = verify(book)
    assert [d.field for d in found.differences] == ["estimate"]
    assert [c.field for c in found.context] == ["code"] and found.cells == (3,)
    book.add("a/b", "1 / 0")
    edit(book, lambda data: data.update(metadata=record))
    found = verify(book)
    assert not found.same and "cell 3: ZeroDivisionError" in found.error


def test_the_stored_parameters_are_used(book):
    chapter = book.chapter("a/b")
    assert Run(book.store, {"width": 6, "scale": "smoke"})([chapter])[0].ok
    edit(book, lambda data: data["cells"][1].update(
        source=['scale = "book"\n', "width = 9"]))
    assert verify(book).same
    found = verify(book, scale="smoke")
    assert found.same and found.scale == "smoke" and found.verdicts == 1
    with pytest.raises(v.NothingStored, match="no stored result at paper"):
        verify(book, scale="paper")


def test_records_of_an_older_form_are_read(book):
    def change(data):
        record = data["metadata"]["reappraisal"]
        for name in ("values", "started", "machine", "wall", "cpu"):
            record.pop(name, None)
        old = verdict(data)
        old.update(schema="reappraisal.verdict/1", seconds=1.5)
        del data["metadata"]["reappraisal"]["outputs"]

    edit(book, change)
    found = verify(book)
    assert found.same and found.verdicts == 1


@pytest.mark.parametrize("changes, fields", [
    ({"estimate": 0.6249}, []), ({"estimate": 0.6251}, ["estimate"]),
    ({"estimate": None}, ["estimate"]), ({"lo": 0.5}, ["lo"]),
    ({"p": 0.0049}, []), ({"p": 0.0051}, ["p"]), ({"n": 23}, ["n"]),
    ({"estimate": float("nan")}, ["estimate"]),
    ({"outcome": "refutes"}, ["outcome"]), ({"name": "x"}, ["present"] * 2),
    ({"extra": 1}, ["extra"]),
])
def test_how_far_a_field_may_be_off(changes, fields):
    old = Verdict(RECORD)
    new = Verdict(RECORD | {"criteria": [ROW | changes]})
    assert [d.field for d, _ in v.compare(old, new) if d] == fields


def test_the_command(book):
    code, text = book.command("verify", "b", "--rtol", 0, "--atol", 0)
    assert code == 0 and text.startswith("same    a/b (book scale): 1 verdicts")
    edit(book, lambda data: verdict(data).update(n=99))
    code, text = book.command("verify", "b", "--json")
    (found,) = map(json.loads, text.splitlines())
    assert code == 1 and found["schema"] == "reappraisal.verification/1"
    assert not found["same"]
    assert {"claim": "A00/made-up", "criterion": "", "field": "n",
            "stored": 99, "now": 24, "allowed": None} in found["differences"]
    code, text = book.command("verify", "b", "--scale", "smoke")
    assert code == 2 and "has no stored result at smoke scale" in text
    assert book.command("verify", "c")[0] == 2
    assert re.search("Missing argument", book.command("verify")[1])
