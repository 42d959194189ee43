"""Notebooks and stores are data from elsewhere."""

import ast
import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_book import CHECKOUT, TinyBook, notebook

from reappraisal.protocol import cache, execute
from reappraisal.protocol import runner as r
from reappraisal.protocol.book import select
from reappraisal.protocol.execute import notebook_bytes

KEY = hashlib.sha256(b"key").hexdigest()
HOSTILE = st.one_of(
    st.text(max_size=300),
    st.lists(st.sampled_from(["..", ".", "", "a", "/", "\0", "~", "\\",
                              "x" * 300, "C:", "con", "*"]),
             max_size=8).map("/".join),
    st.sampled_from(["/etc/passwd", "../" * 9 + "x", KEY + "/..", "a\0b",
                     "x" * 5000, "~/x", "..", KEY + "\n"]),
)
relaxed = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None)


def everything(folder):
    return {p for p in folder.rglob("*")}


# Names


@relaxed
@given(name=HOSTILE)
@example(name=KEY + "\n")
def test_no_key_leads_out_of_the_store(tmp_path, name):
    store = cache.Store(tmp_path / "in" / "store")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        store.path(name)
    with pytest.raises(ValueError):
        store.lock(name)


@relaxed
@given(name=HOSTILE)
def test_no_chapter_leads_out_of_the_store(tmp_path, name):
    store = cache.Store(tmp_path / "in" / "store")
    outside = {p for p in everything(tmp_path)
               if not p.is_relative_to(store.folder)}
    try:
        path = store.put_failure(name, {"key": KEY}, b"{}")
        assert path.resolve().is_relative_to(store.folder.resolve())
        store.clear_failure(name)
    except (ValueError, OSError):
        pass
    assert {p for p in everything(tmp_path)
            if not p.is_relative_to(store.folder)} == outside


@relaxed
@given(name=HOSTILE)
@example(name="../../x")
def test_no_file_of_a_job_leads_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "in" / "job"
    folder.mkdir(parents=True, exist_ok=True)
    for job in (execute.Job("a/b", KEY, b"", {}, {name: b"x"}, {}),
                execute.Job(name, KEY, b"", {}, {}, {})):
        try:
            execute.unpack_job(job, folder)
        except (ValueError, OSError):
            pass
    found = {p for p in everything(tmp_path)
             if not p.is_relative_to(folder)}
    assert found == {tmp_path / "in"}


# Links


@pytest.mark.parametrize("link", [
    "results", f"results/{KEY[:2]}", f"results/{KEY[:2]}/{KEY}.result",
    "locks", f"locks/{KEY}", "failed", "failed/a", "failed/a/b.ipynb",
    "failed/a/b.json", "damaged", ".gitignore",
])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_link_is_refused_and_not_followed(tmp_path, link, late):
    store, outside = tmp_path / "store", tmp_path / "outside"
    outside.mkdir()
    (outside / "b.ipynb").write_text("precious")
    target = outside if "." not in Path(link).name else outside / "b.ipynb"
    opened = cache.Store(store) if late else None
    (store / link).parent.mkdir(parents=True, exist_ok=True)
    (store / link).unlink(missing_ok=True)
    (store / link).symlink_to(target)
    if not late:
        with pytest.raises(cache.Untrusted, match="holds a link"):
            cache.Store(store)
        return
    for deed in (lambda: opened.put(KEY, {}, b"{}"),
                 lambda: opened.get(KEY),
                 lambda: opened.set_aside(KEY, "why"),
                 lambda: opened.lock(KEY).release(),
                 lambda: opened.put_failure("a/b", {}, b"{}"),
                 lambda: opened.clear_failure("a/b")):
        try:
            deed()
        except cache.Untrusted:
            pass
    assert [p.name for p in outside.iterdir()] == ["b.ipynb"]
    assert (outside / "b.ipynb").read_text() == "precious"


def test_a_store_with_a_link_is_refused_in_one_line(tmp_path):
    book = TinyBook(tmp_path / "book")
    book.add("a/b", "1")
    (book.root / ".reappraisal/results").symlink_to("/tmp")
    code, text = book.command("run")
    assert code == 2 and "holds a link, results" in text
    assert "Traceback" not in text


# Content


@given(st.one_of(st.binary(max_size=300), st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9),
                                                    inner),
).map(lambda value: json.dumps(value).encode() + b"\n{}")))
def test_any_content_is_an_entry_or_damaged(body):
    head = {"schema": cache.SCHEMA, "size": len(body),
            "sha256": hashlib.sha256(body).hexdigest()}
    for data in (body, json.dumps(head).encode() + b"\n" + body):
        with pytest.raises(cache.Damaged):
            cache.unpack(data, KEY)


def test_an_entry_nested_without_end_is_damaged():
    deep = b"[" * 100_000
    with pytest.raises(cache.Damaged):
        cache.unpack(deep + b"\n", KEY)


@pytest.mark.parametrize("forge", [
    lambda record, data: (record | {"code": "0" * 64}, data),
    lambda record, data: (record | {"modules": {"x": "y"}}, data),
    lambda record, data: ({k: v for k, v in record.items()
                           if k != "seconds"}, data),
    lambda record, data: (record, b"not a notebook"),
    lambda record, data: (record, b'{"cells": [1, 2], "nbformat": 4}'),
    lambda record, data: (record, data.replace(b"1 + 1", b"1 + 2")),
    lambda record, data: (record, b"[" * 100_000),
], ids=["code", "modules", "seconds", "bytes", "cells", "source", "deep"])
def test_an_entry_of_something_else_is_set_aside(tmp_path, forge):
    book = TinyBook(tmp_path / "book")
    book.add("a/b", "1 + 1")
    (outcome,) = r.Run(book.store)(select(book.root))
    entry = book.store.get(outcome.key)
    book.store.put(outcome.key, *forge(entry.record, entry.notebook))
    (outcome,) = r.Run(book.store, write=True)(select(book.root))
    assert outcome.state == "ran" and "damaged" in outcome.notes[0]
    assert r.status(book.chapter("a/b"), book.store).state == "fresh"


def test_pickles_and_archives_in_a_store_stay_closed(tmp_path):
    mark = tmp_path / "mark"
    book = TinyBook(tmp_path / "book")
    book.add("a/b", "1 + 1")
    (outcome,) = r.Run(book.store)(select(book.root))
    evil = (f"cposix\nsystem\n(S'touch {mark}'\ntR.").encode()
    path = book.store.path(outcome.key)
    path.write_bytes(evil)
    (path.parent / "x.pkl").write_bytes(evil)
    with zipfile.ZipFile(path.parent / "x.result", "w") as archive:
        archive.writestr("../../../escaped", "x")
    (outcome,) = r.Run(book.store)(select(book.root))
    assert outcome.state == "ran" and not mark.exists()
    assert not list(tmp_path.rglob("escaped"))


# A notebook that is not in the book


def test_a_foreign_notebook_needs_trust(tmp_path):
    book = TinyBook(tmp_path / "book")
    book.add("a/b", "1")
    mark, path = tmp_path / "mark", tmp_path / "foreign.ipynb"
    path.write_bytes(notebook_bytes(notebook(
        f"open({str(mark)!r}, 'w').close()\nprint(scale, width)")))
    for name in (path, "../foreign.ipynb"):
        code, text = book.command("run", name, "--workers", 1)
        assert code == 2 and "--trust" in text and str(path) in text
        assert not mark.exists() and not book.results()
    code, text = book.command("run", path, "--trust", "--workers", 1)
    assert code == 0 and "1 ran" in text and mark.exists()
    code, text = book.command("run", path, "--trust", "--workers", 1)
    assert code == 0 and "1 cached" in text
    inside = book.path("a/b")
    code, text = book.command("run", inside, "--workers", 1)
    assert code == 0 and "a/b" in text


def test_a_link_in_the_book_to_a_foreign_notebook_needs_trust(tmp_path):
    book = TinyBook(tmp_path / "book")
    path = tmp_path / "foreign.ipynb"
    path.write_bytes(notebook_bytes(notebook("1")))
    book.path("a/link").parent.mkdir()
    book.path("a/link").symlink_to(path)
    code, text = book.command("run", "--workers", 1)
    assert code == 2 and "--trust" in text and not book.results()
    assert book.command("run", "--trust", "--workers", 1)[0] == 0


# The package itself

_NEVER = {
    "pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve",
    "marshal", "tarfile", "zipfile",
}


def unsafe(tree):
    """Calls and imports that could execute or unpack what they read."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names]
            names.append(getattr(node, "module", None) or "")
            for name in names:
                if name.split(".")[0] in _NEVER:
                    yield f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = called.rpartition(".")[2]
        if called == "torch.load" and words.get("weights_only") != "True":
            yield "torch.load without weights_only"
        if words.get("allow_pickle") == "True":
            yield f"{called} with allow_pickle"
        if last in ("unpack_archive", "extractall", "read_pickle"):
            yield called
        if called in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"):
            yield called
        if called == "yaml.load":
            loader = words.get("Loader") or (
                ast.unparse(node.args[1]) if node.args[1:] else "")
            if not re.fullmatch(r"(yaml\.)?C?SafeLoader|loader|Strict",
                                loader):
                yield f"yaml.load with {loader or 'no loader'}"


@pytest.mark.parametrize("code, found", [
    ("import pickle", True), ("from tarfile import open", True),
    ("torch.load(f)", True), ("torch.load(f, weights_only=True)", False),
    ("np.load(f, allow_pickle=True)", True), ("np.load(f)", False),
    ("yaml.load(f)", True), ("yaml.load(f, yaml.SafeLoader)", False),
    ("shutil.unpack_archive(f)", True), ("eval(x)", True),
    ("model.eval()", False),
])
def test_the_audit_sees_what_it_should(code, found):
    assert bool(list(unsafe(ast.parse(code)))) is found


#: What may be imported all the same, and why.
ALLOWED = {
    # work and results between processes of one run; never from a file
    "parts.py: import cloudpickle", "parts.py: import joblib",
    # to recognise the error of torch's own restricted loader
    "command.py: import pickle",
}


def test_the_package_loads_nothing_that_can_execute():
    complaints = []
    for path in (CHECKOUT / "reappraisal").rglob("*.py"):
        for complaint in unsafe(ast.parse(path.read_bytes())):
            complaints.append(f"{path.name}: {complaint}")
    assert set(complaints) == ALLOWED


def test_the_loader_of_yaml_is_a_safe_one(tmp_path):
    import yaml

    from reappraisal.protocol.papers import read_yaml

    path = tmp_path / "evil.yml"
    path.write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises((yaml.YAMLError, ValueError)):
        read_yaml(path)


def test_weights_are_kept_as_safetensors_only(tmp_path):
    import torch

    from reappraisal.lab.ensemble import SGD
    from reappraisal.lab.zoo import ZooWarning, parents

    data = torch.randn(20, 3), torch.randint(2, (20,))
    how = {"seeds": [1], "steps": 1, "optimiser": SGD(0.1)}
    parents(torch.nn.Linear(3, 2), data, folder=tmp_path, **how)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    json.loads(path.read_bytes()[8:8 + length])  # a table, then numbers
    torch.save({"a": torch.ones(2)}, path)  # a pickle in its place
    with pytest.warns(ZooWarning, match="damaged"):
        parents(torch.nn.Linear(3, 2), data, folder=tmp_path, **how)
