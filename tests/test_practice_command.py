"""`reappraisal audit`: exit codes, messages, files."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reappraisal.practice.command import main
from reappraisal.practice.report import read_thresholds

SHOP = """
import torch
from torch import nn

def make_model():
    return nn.Linear(8, 3)

def loader():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=g)
    return x, x[:, :3].argmax(1)

pair = loader()
def broken():
    raise OSError("disk gone")
number = 3
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("shop", None)
    net = nn.Linear(8, 3)
    with torch.no_grad():
        net.weight.copy_(3 * torch.eye(3, 8))
        net.bias.zero_()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    return tmp_path


def call(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    out = capsys.readouterr()
    return stop.value.code, out.out, out.err


BASE = ("audit shop:make_model --test shop:loader --instrument accuracy "
        "--instrument calibration --budget 10 ")


def test_a_report_and_its_files(shop, capsys):
    code, out, _ = call(
        BASE + "--weights w.safetensors --html r.html", capsys)
    assert code == 0 and "Accuracy" in out and "100.0 %" in out
    assert (shop / "r.html").is_file()
    data = json.loads((shop / "r.json").read_text())
    assert data["lines"][0]["value"] == 1.0


def test_json_and_plain_tensors(shop, capsys):
    code, out, _ = call(BASE + "--weights w.pt --json --test shop:pair",
                        capsys)
    assert code == 0
    assert json.loads(out)["lines"][0]["value"] == 1.0


def test_thresholds_gate(shop, capsys):
    words = BASE + "--weights w.safetensors --thresholds gate.yml"
    gate = shop / "gate.yml"
    gate.write_text("accuracy.all: {min: 0.9, sure: true}\n")
    assert call(words, capsys)[0] == 0
    gate.write_text("accuracy.all: {max: 0.5}\nflags: {max: 20}\n")
    code, _, err = call(words, capsys)
    assert code == 1
    assert "accuracy.all: value 1, bound max 0.5" in err
    gate.write_text("sharpness.trace: {max: 5}\n")  # not measured
    code, _, err = call(words, capsys)
    assert code == 1 and "not measured" in err


@pytest.mark.parametrize("text, word", [
    ("accuracy.al: {min: 0.9}", "accuracy.al"),
    ("accuracy.all: 0.9", "min, max"),
    ("accuracy.all: {min: high}", "high"),
    ("accuracy.all: {min: 0.1, shure: true}", "shure"),
    ("[1, 2]", "mapping"), ("a: {min: 1", "YAML"),
])
def test_bad_thresholds_are_bad_input(shop, capsys, text, word):
    (shop / "gate.yml").write_text(text)
    code, _, err = call(BASE + "--thresholds gate.yml", capsys)
    assert code == 2 and word in err and err.startswith("Error: ")


@pytest.mark.parametrize("words, word", [
    ("audit shop:nothing --test shop:loader", "nothing"),
    ("audit shop --test shop:loader", "package.module:object"),
    ("audit nowhere:x --test shop:loader", "nowhere"),
    ("audit shop:number --test shop:loader", "model"),
    ("audit shop:make_model --test shop:broken", "disk gone"),
    ("audit shop:make_model --test shop:number", "test"),
    ("audit shop:make_model --test shop:loader --weights no.pt", "no.pt"),
    ("audit shop:make_model --test shop:loader --weights shop.py",
     "cannot be read|run code"),
    ("audit shop:make_model --test shop:loader --html no/r.html", "html"),
    ("audit shop:make_model --test shop:loader --instrument x", "x"),
    ("audit shop:make_model --test shop:loader --thresholds no.yml",
     "no.yml"),
])
def test_bad_input_is_two(shop, capsys, words, word):
    code, _, err = call(words, capsys)
    assert code == 2
    import re

    assert re.search(word, err), err
    assert "Traceback" not in err


def test_files_that_run_code_are_refused(shop, capsys):
    torch.save({"w": print}, shop / "evil.pt")
    code, _, err = call(BASE + "--weights evil.pt", capsys)
    assert code == 2 and "run code" in err
    save_file({"other": torch.ones(2)}, shop / "other.safetensors")
    code, _, err = call(BASE + "--weights other.safetensors", capsys)
    assert code == 2 and "do not fit" in err


def test_thresholds_are_read(tmp_path):
    path = tmp_path / "g.yml"
    path.write_text("a.b: {min: 1, max: 2.5, sure: false}\n")
    assert read_thresholds(path) == {"a.b": {
        "min": 1, "max": 2.5, "sure": False}}


def test_help_is_fast_and_light(root):
    code = (
        "import sys\n"
        "from reappraisal.practice.command import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print(*{'torch', 'numpy', 'pandas'} & set(sys.modules),\n"
        "      file=sys.stderr)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == ""
    assert "audit" in done.stdout and "verdicts" in done.stdout
    assert time.monotonic() - began < 5
