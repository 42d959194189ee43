"""What makes the site's build fast must not change what it builds."""

import inspect
import random
from types import SimpleNamespace

import pytest
from docutils import nodes
from sphinx.domains.python import ObjectEntry, PythonDomain
from sphinx.ext.autodoc.preserve_defaults import update_defvalue

from reappraisal.protocol import ledger, power, provenance, runner
from reappraisal.protocol.reference import _domain
from reappraisal.protocol.speed import Sidebar, defaults, walk


def tree(seed, size=300):
    draw = random.Random(seed)
    root = nodes.container()
    all_ = [root]
    for i in range(size):
        parent = draw.choice(all_[-20:])
        kind = draw.choice([nodes.container, nodes.paragraph, nodes.emphasis])
        if draw.random() < 0.3:
            parent += nodes.Text(str(i))
        else:
            all_.append(kind(ids=[str(i)]))
            parent += all_[-1]
    return root


@pytest.mark.parametrize("wanted", [
    nodes.Text, nodes.paragraph, nodes.Node, nodes.title,
    lambda n: isinstance(n, nodes.Element) and len(n) == 2])
def test_walk_finds_what_docutils_finds(wanted):
    for seed in range(5):
        root = tree(seed)
        slow = list(nodes.Node.findall(root, wanted))
        assert [id(x) for x in walk(root, wanted)] == [id(x) for x in slow]


def test_walk_goes_on_where_a_node_was_replaced():
    def replace(find):
        root = tree(7)
        for node in find(root, nodes.paragraph):
            if node.parent is not None and node["ids"][0][-1] in "13579":
                new = nodes.container(ids=["new" + node["ids"][0]])
                new += nodes.paragraph(ids=[node["ids"][0] + "2"])
                node.replace_self(new)
            else:
                node += nodes.emphasis(ids=["last"])
        return root.pformat()

    assert replace(walk) == replace(lambda root, kind: root.findall(kind))


def test_defaults_are_those_that_sphinx_shows():
    app = SimpleNamespace(config=SimpleNamespace(
        autodoc_preserve_defaults=True))
    functions = [
        f for module in (ledger, power, provenance, runner)
        for f in vars(module).values()
        if inspect.isfunction(f) and f.__module__ == module.__name__]
    compared = 0
    for f in functions:
        written = defaults(f)
        try:
            update_defvalue(app, f, False)
            shown = {p.name: repr(p.default)
                     for p in inspect.signature(f).parameters.values()
                     if p.default is not p.empty}
        finally:
            vars(f).pop("__signature__", None)
        assert written == shown, f
        compared += len(shown)
    assert compared > 20


def domain(kind, objects):
    env = SimpleNamespace(
        domaindata={}, app=None, srcdir="nbs",
        get_domain=None, config=SimpleNamespace())
    found = kind(env)
    found.data["objects"] = {
        name: ObjectEntry("doc", name, of, False) for name, of in objects}
    return found, env


def test_names_are_found_as_sphinx_finds_them():
    objects = [("a.b.f", "function"), ("a.c.f", "function"),
               ("a.b.K", "class"), ("a.b.K.m", "method"), ("a", "module"),
               ("f", "data")]
    mine, env = domain(_domain(), objects)
    theirs, _ = domain(PythonDomain, objects)
    tried = 0
    for name in ("f", "f()", "b.f", "K", "K.m", "m", "a", "a.b", "nobody", "",
                 "K.x"):
        for module in (None, "a.b", "a.c"):
            for kind in (None, "obj", "func", "class"):
                for mode in (0, 1):
                    how = (env, module, None, name, kind, mode)
                    want = theirs.find_obj(*how)
                    got = mine.find_obj(*how)
                    assert got == (want if len(want) < 2 else []), how
                    tried += bool(got)
    assert tried > 30


def test_a_name_of_many_is_the_one_that_a_module_imports(tmp_path):
    for module, text in (("a/b.py", "from .c import f as g, f"),
                         ("a/d.py", "from a.b import x")):
        path = tmp_path / module
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    found, env = domain(_domain(), [("a.b.h.f", "method"),
                                    ("a.c.f", "function")])
    env.srcdir = tmp_path / "nbs"
    names = {module: [name for name, _ in found.find_obj(
        env, module, None, "f", "obj", 1)] for module in ("a.b", "a.d", None)}
    assert names == {"a.b": ["a.c.f"], "a.d": [], None: []}


def test_a_page_listed_in_no_place_is_marked_nowhere():
    html = ('<ul class="nav"><li class="l1"><a class="in" href="a.html">A</a>'
            '</li><li class="l1"><a class="in" href="https://x.org">X</a>'
            "</li></ul>")
    listed = Sidebar(html, {"a.html": "a"})
    assert listed.marked("z", lambda doc: f"{doc}.html") == html
    assert listed.marked("r/z", lambda doc: f"../{doc}.html") == html.replace(
        "a.html", "../a.html")
    assert listed.marked("a", lambda doc: "").count("current") == 3
