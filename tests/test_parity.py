"""Every public instrument has an oracle, and its stored table holds up."""

import ast

import pytest

from reappraisal.protocol.parity import ENOUGH, stored_parity

ROOMS = "measure", "intervene"


def functions(path):
    """Public functions of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    return {name for name in defined if name in public}, set(public)


def modules(root):
    return sorted(
        f"{room}/{path.stem}"
        for room in ROOMS
        for path in (root / "reappraisal" / room).glob("[!_]*.py")
    )


@pytest.fixture(scope="module")
def tables(root):
    return stored_parity(root)


def test_every_public_function_has_an_oracle_or_a_reason(root, tables):
    missing = {}
    for name in modules(root):
        path = root / "reappraisal" / f"{name}.py"
        wanted, public = functions(path)
        record = tables.get(name, {"rows": [], "exempt": {}})
        named = [row["instrument"] for row in record["rows"]]
        have = {
            name.split(".")[0] for name in (*named, *record["exempt"])
        }
        assert have <= public, f"{name}: {sorted(have - public)} are not there"
        if gap := wanted - have:
            missing[name] = sorted(gap)
    assert missing == {}


def test_stored_errors_are_within_tolerance_over_enough_cases(tables):
    assert tables
    for name, record in tables.items():
        assert record["module"] == name.replace("/", ".")
        for row in record["rows"]:
            assert row["cases"] >= ENOUGH, (name, row)
            assert row["worst"] <= row["tolerance"], (name, row)
