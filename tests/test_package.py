"""The installed package: what it carries and what it can do without."""

import subprocess
import sys
import zipfile
from configparser import ConfigParser

import pytest

BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    names = set({names!r})
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{{name}} is an extra")

sys.meta_path.insert(0, Blocked())
"""
EXTRAS = ["nbdev", "execnb", "fastcore", "jupyter_book", "papermill",
          "distributed", "dask", "sphinx", "IPython", "ipykernel", "nbformat",
          "nbclient", "jupyter_client", "pytest", "hypothesis", "playwright",
          "importlinter", "torchmetrics", "jax", "zmq"]


def modules(root):
    for path in sorted((root / "reappraisal").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] not in ("__init__", "_modidx"):
            yield ".".join(parts)


def test_every_module_imports_without_any_extra(root):
    code = BLOCK.format(names=EXTRAS) + (
        "import importlib\n"
        f"for name in {list(modules(root))!r}:\n"
        "    importlib.import_module(name)\n"
        "import reappraisal\n"
        "for name in reappraisal.__all__:\n"
        "    getattr(reappraisal, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_top_brings_nothing_heavy(root):
    code = ("import sys, reappraisal; "
            "print(*{'torch', 'numpy', 'yaml'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], cwd=root,
                          capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation",
         "--outdir", str(out), "."],
        cwd=root, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_wheel_carries_types_registrations_and_metadata(root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(n for n in names if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert {"reappraisal/py.typed", "reappraisal/registrations/papers.yml",
            "reappraisal/protocol/claims.py"} <= names
    assert not any(n.startswith(("tests/", "nbs/")) for n in names)
    parser = ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    cfg = parser["DEFAULT"]
    assert f"Version: {cfg['version']}" in text
    assert f"Requires-Python: >={cfg['min_python']}" in text
    for requirement in cfg["requirements"].split():
        assert f"Requires-Dist: {requirement}\n" in text, requirement
    for extra in ("book", "chapters", "cluster", "dev"):
        assert f"Provides-Extra: {extra}" in text


def test_registrations_are_found_in_an_installed_package(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = ("from reappraisal.protocol.claims import load_claims; "
            "import reappraisal; print(reappraisal.__file__); "
            "print(len(load_claims()))")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
        text=True, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    where, count = done.stdout.split()
    assert where.startswith(str(tmp_path)) and int(count) > 0


def test_verdicts_are_found_in_an_installed_package(root, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = ("from reappraisal.practice.bearing import bearing, stored; "
            "print(len(stored())); "
            "print(*(b.link for b in bearing('weights')))")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
        text=True, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    count, links = done.stdout.splitlines()
    assert int(count) > 0
    assert all(x.startswith("https://") for x in links.split())
    assert "/signal/metrics_without_data.html#claim-a01-" in links


def test_a_wheel_from_a_source_archive_has_verdicts_too(root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir",
         str(tmp_path), "."], cwd=root, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        assert b"A01" in archive.read("reappraisal/verdicts.json")
