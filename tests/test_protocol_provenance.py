"""Keys: prose leaves them alone, everything that matters changes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_book import TinyBook, notebook

from reappraisal.protocol import provenance as p
from reappraisal.protocol.book import BadNotebook, UnknownName, select
from reappraisal.protocol.execute import notebook_bytes

USES = "from reappraisal.lab import near\nnear.two"


@pytest.fixture
def book(tmp_path):
    book = TinyBook(tmp_path)
    book.module("reappraisal.lab.far", '"""Prose."""\none = 1\n')
    book.module("reappraisal.lab.near",
                "from .far import one\n\ndef two():\n    return 2 * one\n")
    book.module("reappraisal.lab.late",
                "def f():\n    from reappraisal.lab.far import one\n")
    book.module("reappraisal.lab.aside", "zero = 0\n")
    book.add("theory/width", USES)
    return book


def key(book, **given):
    return p.provenance(book.chapter("theory/width"), given).key


def test_prose_comments_docstrings_and_layout_keep_the_key(book):
    before = key(book)
    book.add("theory/width", USES + "  # shown\n\n", prose="Other words.")
    assert key(book) == before
    book.add("theory/width", "# a cell of remarks", USES)
    assert key(book) == before
    book.module("reappraisal.lab.far", '"""Better."""\n\none = 1  # unity\n')
    book.module("reappraisal.lab.near",
                'from .far import one\ndef two():\n    "Two."\n'
                "    return (2 * one)\n")
    assert key(book) == before


def test_outputs_and_metadata_keep_the_key(book):
    before = key(book)
    path = book.path("theory/width")
    data = json.loads(path.read_bytes())
    data["metadata"]["reappraisal"] = {"key": "x"}
    data["cells"][-1]["outputs"] = [{"output_type": "stream", "text": "1"}]
    path.write_bytes(notebook_bytes(data))
    assert key(book) == before


@pytest.mark.parametrize("change", [
    lambda b: b.add("theory/width", USES + " + 1"),
    lambda b: b.add("theory/width", USES, "1 + 1"),
    lambda b: b.add("theory/width", USES, parameters='scale = "book"'),
    lambda b: b.module("reappraisal.lab.near", "two = 2"),
    lambda b: b.module("reappraisal.lab.far", "one = 2"),
    lambda b: (b.root / "settings.ini").write_text(
        "[DEFAULT]\nrequirements = numpy>=2\n"),
], ids=["code", "cell", "parameter", "module", "far module", "requirements"])
def test_what_matters_changes_the_key(book, change):
    before = key(book)
    change(book)
    assert key(book) != before


def test_a_module_that_is_not_imported_keeps_the_key(book):
    before = key(book)
    book.module("reappraisal.lab.aside", "zero = 1\n")
    book.module("reappraisal.lab.quite_new", "ten = 10\n")
    assert key(book) == before


def test_imports_inside_functions_and_by_name_are_followed(book):
    for line in ("from reappraisal.lab.late import f",
                 "import importlib\n"
                 "importlib.import_module('reappraisal.lab.far')"):
        book.add("theory/width", line)
        chapter = book.chapter("theory/width")
        assert "reappraisal.lab.far" in p.provenance(chapter).modules
    book.add("theory/width", "from typing import TYPE_CHECKING\n"
             "if TYPE_CHECKING:\n    from reappraisal.lab.far import one")
    assert not p.provenance(book.chapter("theory/width")).modules


def test_the_top_of_the_package_is_followed_for_the_names_taken(book):
    top = book.root / "reappraisal/__init__.py"
    top.write_text('_HOMES = {"lab.near": ("two",), "lab.aside": ("zero",)}')
    for line in ("from reappraisal import two", "import reappraisal as r\nr.two"):
        book.add("theory/width", line)
        found = p.provenance(book.chapter("theory/width")).modules
        assert set(found) == {"reappraisal.lab.near", "reappraisal.lab.far"}
    before = key(book)
    top.write_text(top.read_text() + "\nmore = {'lab.late': ('f',)}")
    assert key(book) == before


def test_registered_rules_of_this_chapter_only(book):
    rules = book.root / "registrations"
    rules.mkdir()
    claim = "room: theory\nclaims:\n- id: A/x\n  chapter: {}\n  rule: {}\n"
    (rules / "theory.yml").write_text(claim.format("depth", 1))
    before = key(book)
    (rules / "theory.yml").write_text(claim.format("depth", 2))
    assert key(book) == before
    (rules / "theory.yml").write_text(claim.format("width", 1))
    one = key(book)
    (rules / "theory.yml").write_text("# why\n" + claim.format("width", 1))
    assert key(book) == one != before
    (rules / "theory.yml").write_text(claim.format("width", 2))
    assert key(book) != one


def test_parameters_count_by_value(book):
    assert key(book, scale="book", width=3) == key(book)
    assert key(book, width=4) != key(book)
    with pytest.raises(UnknownName, match="'widht'.*did you mean width"):
        key(book, widht=4)


def test_declared_inputs_count_and_cannot_leave_the_checkout(book):
    (book.root / "data.json").write_text("1")
    book.add("theory/width", "#| inputs: *.json\nopen('../../data.json')")
    before = key(book)
    (book.root / "data.json").write_text("2")
    assert key(book) != before
    book.add("theory/width", "#| inputs: ../*.json\n1")
    with pytest.raises(ValueError, match="leaves the checkout"):
        key(book)


def test_versions_are_public_ones():
    found = p.versions("[DEFAULT]\nrequirements = torch==2.13.0 nowhere>=1")
    assert "+" not in found["torch"] and found["nowhere"] == "missing"


NAMES = st.sampled_from(["x", "y", "alpha"])
LINES = st.lists(
    st.builds("{} = {} + {}".format, NAMES, NAMES, st.integers(0, 9)),
    min_size=1, max_size=5,
)


@given(LINES, st.data())
def test_comments_anywhere_never_matter_and_code_always_does(lines, data):
    source = "\n".join(lines)
    remarks = data.draw(st.lists(st.text("ab #'\""), min_size=len(lines),
                                 max_size=len(lines)))
    noted = "\n\n".join(
        f"{line}   # {remark}"
        for line, remark in zip(lines, remarks, strict=True)
    )
    assert p.cell_digest(noted) == p.cell_digest(source)
    assert p.cell_digest(source + "\nz = 1") != p.cell_digest(source)


@given(st.text())
def test_any_text_has_a_digest(text):
    assert p.cell_digest(text) == p.cell_digest(text)


@pytest.mark.parametrize("source", [
    "%matplotlib inline\nx = 1", "!ls\n", "%%bash\nls | wc", "x = (",
    "match x:\n    case None:\n        1", "f'{a!r:>{w}}' 'b'",
])
def test_cells_that_are_not_plain_python(source):
    changed = source.replace("ls", "ll").replace("x", "q").replace("a!", "b!")
    assert p.cell_digest(source) != p.cell_digest(changed)


def test_stored_outputs_say_why_they_are_stale(book):
    chapter = book.chapter("theory/width")
    assert p.staleness(chapter).state == "never"
    data = json.loads(chapter.path.read_bytes())
    now = p.provenance(chapter)
    data["metadata"]["reappraisal"] = now.parts | {
        "key": now.key, "outputs": p.outputs_digest(data), "seconds": 1.0}
    chapter.path.write_bytes(notebook_bytes(data))
    assert p.staleness(chapter) == p.Staleness("fresh", (), 1.0)
    book.module("reappraisal.lab.far", "one = 7")
    assert p.staleness(chapter).why == ("module reappraisal.lab.far",)
    data["cells"][-1]["outputs"] = [{"output_type": "stream", "text": "mine"}]
    chapter.path.write_bytes(notebook_bytes(data))
    assert "outputs edited" in p.staleness(chapter).why
    data["metadata"]["reappraisal"]["versions"]["numpy"] = "1.0"
    chapter.path.write_bytes(notebook_bytes(data))
    assert "version of numpy" in p.staleness(chapter).why
    assert "version of numpy" not in p.staleness(chapter, True).why


def test_what_cannot_be_a_chapter_is_said_so(book):
    path = book.path("theory/width")
    path.write_bytes(notebook_bytes(notebook("1", parameters=None)))
    with pytest.raises(BadNotebook, match="width.ipynb.*'parameters'"):
        key(book)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BadNotebook, match="width.ipynb is not JSON"):
        key(book)


def test_names_that_people_type(book):
    for name in ("theory", "width", "theory/width", "nbs/theory/width.ipynb"):
        assert [c.name for c in select(book.root, [name])] == ["theory/width"]
    with pytest.raises(UnknownName, match="did you mean.*theory/width"):
        select(book.root, ["theory/widht"])
