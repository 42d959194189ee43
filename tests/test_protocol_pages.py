"""What the site puts around a chapter, and one page a module, without Sphinx."""

import base64
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest

from reappraisal.protocol import export, pages, reference
from reappraisal.protocol.book import UnknownName
from reappraisal.protocol.ledger import Ledger, Refusal
from reappraisal.protocol.papers import load_papers


def cell(source, kind="code", **metadata):
    return {"cell_type": kind, "source": source, "metadata": metadata}


# --- folding -----------------------------------------------------------------


@pytest.mark.parametrize("lines, tags", [(30, []), (31, ["hide-input"])])
def test_code_is_folded_by_its_length(lines, tags):
    source = "\n".join(["x = 1"] * lines)
    (found,) = pages.folded({"cells": [cell(source)]})["cells"]
    assert found["metadata"]["tags"] == tags


def test_a_fold_names_what_is_public_in_it_and_keeps_other_tags():
    source = "def _own(): ...\nclass Fit: ...\ndef fit(): ...\n" + "x\n" * 40
    (found,) = pages.folded({"cells": [cell(source, tags=["a"])]})["cells"]
    assert found["metadata"]["tags"] == ["a", "hide-input"]
    shown = found["metadata"]["mystnb"]["code_prompt_show"]
    assert shown == "Fit, fit (43 lines)"


def test_solutions_that_are_hidden_already_stay_as_they_are():
    source = "x\n" * 50
    (found,) = pages.folded(
        {"cells": [cell(source, tags=["hide-cell"])]})["cells"]
    assert found["metadata"]["tags"] == ["hide-cell"]
    assert "mystnb" not in found["metadata"]


# --- light pages -------------------------------------------------------------


def test_images_leave_the_page_byte_for_byte_and_once():
    files = {}
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    body = f'<img alt="a" src="data:image/png;base64,{text}">' * 2
    out = pages.lighter(body, lambda n, d: files.setdefault(n, d) and n)
    assert list(files.values()) == [data]
    (name,) = files
    assert out == f'<img alt="a" src="{name}">' * 2


def test_colours_of_code_stay_and_text_outside_code_is_left_alone():
    code = ('<div class="highlight"><pre><span class="n">x</span>'
            '<span class="k">if</span></pre></div>')
    outside = '<p><span class="n">x</span></p>'
    assert pages.lighter(code + outside, None) == (
        '<div class="highlight"><pre>x<span class="k">if</span></pre></div>'
        + outside)


# --- badges ------------------------------------------------------------------


def made_up(verdict="reproduced"):
    claim = SimpleNamespace(
        id="A00/b", room="hall", anchor="claim-a00-b", amended=True,
        entry={"chapter": "the-means"})
    said = SimpleNamespace(verdict=verdict, label=f"{verdict}: <small>",
                           anchor="verdict-a00-b")
    return claim, SimpleNamespace(claim=claim, verdict=said)


def test_a_badge_links_to_its_box_and_says_when_the_rule_was_amended():
    claim, entry = made_up()
    html = pages.badges("hall", "the_means", {"A00/b": claim},
                        Ledger((entry,), (), ()))
    assert 'href="#verdict-a00-b"' in html and "rule amended" in html
    assert "✔ reproduced: &lt;small&gt;" in html


def test_a_refused_verdict_is_not_shown_as_one():
    claim, _ = made_up()
    refusal = Refusal("x.ipynb", "A00/b", "stale")
    html = pages.badges("hall", "the_means", {"A00/b": claim},
                        Ledger((), (refusal,), ("A00/b",)))
    assert "to be run again" in html and 'href="#claim-a00-b"' in html
    assert "reproduced" not in html


# --- addresses ---------------------------------------------------------------


def test_addresses_come_from_settings(root):
    cfg = pages.settings(root)
    assert cfg["address"] == "https://reappraisal.github.io/reappraisal/"
    links = pages.launch_links(cfg, "lab/data")
    assert links["Colab"] == (
        "https://colab.research.google.com/github/reappraisal/reappraisal/"
        "blob/main/nbs/lab/data.ipynb")
    assert set(links) == {"Colab", "Binder", "GitHub"}


def test_citations_parse_as_bibtex(root):
    from pybtex.database import parse_string

    cfg = pages.settings(root)
    text = pages.cite_chapter(cfg, "lab/data_of", "Data & more_or less")
    (entry,) = parse_string(text, "bibtex").entries.values()
    assert entry.key == "reappraisal-lab-data-of"
    assert entry.fields["url"].endswith("/lab/data_of.html")
    assert str(entry.persons["author"][0]) == "{The Reappraisal authors}"


def test_sitemap_is_xml():
    tree = ET.fromstring(pages.sitemap("https://x.org/b/", ["b/c", "a"]))
    assert [loc.text for loc in tree.iter() if loc.tag.endswith("loc")] == [
        "https://x.org/b/a.html", "https://x.org/b/b/c.html"]


# --- reference ---------------------------------------------------------------


def test_every_public_name_of_the_package_has_a_home(root):
    found = reference.surfaces(root)
    assert len(found) > 60
    for it in found.values():
        for name, kind in it.names.items():
            if "." in kind:
                assert kind.startswith("reappraisal."), (it.module, name)
                home = found[kind.removeprefix("reappraisal.").replace(
                    ".", "/")]
                assert name in home.names, (it.module, name)


def test_a_name_in_all_that_is_nowhere_defined_is_an_error(tmp_path):
    path = tmp_path / "x.py"
    path.write_text('__all__ = ["a", "b"]\ndef a(): ...\n')
    with pytest.raises(ValueError, match=r"\['b'\], nowhere defined"):
        reference.surface(path, "p.x")


def test_docstrings_keep_marks_that_mean_nothing():
    keys = {p.key for p in load_papers().values()}
    key = "masonwilliams2025sharp"
    assert key in keys
    assert reference.prepared([f"|x| of clean_ `a*b` {key}"], keys) == [
        rf"\|x\| of clean\_ `a*b` :cite:t:`{key}`"]


# --- export ------------------------------------------------------------------


def test_unknown_room_is_named(root):
    with pytest.raises(UnknownName, match="landscape"):
        export.room_pages(root, "landscap")
    assert export.room_pages(root, "dynamics")


def test_export_says_how_it_failed(root, tmp_path):
    from typer.testing import CliRunner

    from reappraisal.protocol.cli import app

    words = ["export", "dynamics", "--root", str(root), "--site",
             str(tmp_path), "--output", str(tmp_path / "x.html")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "No such file" in done.output
    assert not (tmp_path / "x.html").exists()
    done = CliRunner().invoke(app, ["export", "nowhere", "--root", str(root)])
    assert done.exit_code == 2


# --- bibliography ------------------------------------------------------------


def test_bibliography_has_every_paper_as_registered(root):
    from pybtex.database import parse_file

    entries = parse_file(str(root / "references.bib"), "bibtex").entries
    papers = load_papers(root / "registrations").values()
    assert len(papers) == 296 and set(entries) == {p.key for p in papers}
    for p in papers:
        entry = entries[p.key]
        assert entry.fields["year"] == str(p.year)
        assert len(entry.persons.get("author", [])) == len(p.authors), p.key
