"""The command: what it says, how it ends, and that it answers at once."""

import json
import shutil
import subprocess
import sys

import papermill
import pytest
from tiny_book import CHECKOUT, TinyBook

from reappraisal.protocol import checks, cli
from reappraisal.protocol.progress import EVENTS, EVENTS_SCHEMA


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    book = TinyBook(tmp_path_factory.mktemp("cli") / "book")
    book.add("theory/edge_of_chaos", "scale, width")
    book.add("theory/width", "width")
    book.add("dynamics/width", "raise ValueError('no')")
    return book


@pytest.mark.parametrize("words, said", [
    (["run", "theory/edge_of_caos"], "did you mean theory/edge_of_chaos"),
    (["run", "teory"], "did you mean theory"),
    (["run", "width"], "in several rooms: dynamics/width, theory/width"),
    (["run", "theory", "--scale", "papers"], "'papers': did you mean paper?"),
    (["run", "theory", "-p", "widht", "4"], "'widht': did you mean width?"),
    (["run", "theory", "-p", "width"], "a NAME and a VALUE are needed"),
    (["run", "theory", "-p", "scale", "tiny"], "unknown scale 'tiny'"),
    (["run", "theory", "--write", "--scale", "smoke"], "--write stores"),
    (["run", "theory", "--write", "-p", "width", "4"], "--write stores"),
    (["run", "theory", "--workers", "many"], "'--workers'"),
    (["run", "theory", "--workers", "-1"], "'--workers'"),
    (["run", "theory", "--timeout", "0"], "'--timeout'"),
    (["run", "theory", "--root", "/"], "not inside a checkout"),
    (["run", "theory", "--scheduler", "tcp://127.0.0.1:9"],
     "no Dask scheduler answers at tcp://127.0.0.1:9"),
    (["status", "teory"], "did you mean theory"),
    (["verdicts", "teory"], "did you mean theory"),
    (["check", "layers"], "did you mean layering"),
    (["new", "theory", "--paper", "A02"], "ROOM/SLUG"),
    (["walk"], "walk"),
])
def test_mistakes_end_with_code_2_and_say_what_would_be_right(
    book, words, said, monkeypatch
):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    code, text = book.command(*words)
    assert code == 2, text
    assert said in " ".join(text.split()), text
    assert "Traceback" not in text
    assert not book.results()


def test_a_failure_ends_with_code_1_and_is_seen_in_status(tmp_path):
    book = TinyBook(tmp_path / "book")
    book.add("theory/good", "1")
    book.add("theory/bad", "x = 1", "raise ValueError('width is 0')")
    (tmp_path / "book/nbs/theory/deep").mkdir()
    code, text = book.command("run", "--workers", 1,
                              cwd=tmp_path / "book/nbs/theory/deep")
    assert code == 1
    assert "FAILED  theory/bad: cell 4: ValueError: width is 0" in text
    assert "failed/theory/bad.ipynb" in text
    assert "2 chapters: 1 failed, 1 ran" in text
    code, text = book.command("status", "--json")
    rows = {row["chapter"]: row for row in json.loads(text)}
    assert code == 0
    assert rows["theory/bad"]["state"] == "failed"
    assert rows["theory/bad"]["why"] == ["ValueError: width is 0"]
    assert rows["theory/good"]["state"] == "never"
    book.add("theory/bad", "x = 1")
    code, text = book.command("run", "--write", "--stale", "--workers", 1)
    assert code == 0 and "1 cached, 1 ran" in text and "written" in text
    code, text = book.command("run", "--write", "--stale")
    assert code == 0 and "nothing to do" in text
    assert book.command("status")[1].count("fresh") == 3


def test_parameters_and_scale_reach_the_chapter(tmp_path):
    book = TinyBook(tmp_path / "book")
    book.add("theory/edge_of_chaos", "print(scale, width)")
    process = book.start(
        "run", "edge-of-chaos", "--scale", "smoke", "-p", "width", "[1, 2]",
        "--json", "--cache", tmp_path / "store", "--workers", 1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert [e["event"] for e in events if e["event"] != "cell"] == [
        "begin", "pool", "start", "end", "summary"]
    assert events[0]["schema"] == EVENTS_SCHEMA == "reappraisal.events/1"
    for e in events:
        assert set(e) == {"event", "elapsed", "left", *EVENTS[e["event"]]}
    assert events[0]["left"] is None and events[-1]["left"] == 0
    assert events[-1]["report"]["slowest"][0][0] == "theory/edge_of_chaos"
    assert events[-1]["exit"] == 0 and events[-1]["states"] == {"ran": 1}
    (path,) = (tmp_path / "store").rglob("*.result")
    assert b"smoke [1, 2]" in path.read_bytes()


def test_help_is_prompt_because_nothing_heavy_is_imported():
    code = ("import sys\nfrom reappraisal.protocol import cli\n"
            "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'numpy', 'distributed', 'papermill', 'yaml',"
            " 'nbformat', 'jupyter_client', 'scipy'}\n"
            "sys.exit(' '.join(heavy & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("run", "status", "verify", "verdicts", "check", "new",
                 "register", "keep"):
        assert f" {name} " in done.stdout


def test_a_new_chapter_passes_and_its_verdict_is_printed(tmp_path):
    book = TinyBook(tmp_path / "book")
    shutil.copytree(CHECKOUT / "reappraisal", book.root / "reappraisal")
    rules = book.root / "registrations"
    rules.mkdir()
    shutil.copy(CHECKOUT / "registrations/papers.yml", rules)
    code, text = book.command("new", "dynamics/my-finding", "--paper", "A02")
    assert code == 0, text
    code, text = book.command("run", "my-finding", "--scale", "smoke")
    assert code == 0, text
    code, text = book.command("register")
    assert code == 0 and "registered A02/my-finding" in text
    assert book.command("run", "my-finding", "--write")[0] == 0
    code, text = book.command("verdicts")
    assert code == 0 and "reproduced" in text and "A02/my-finding" in text
    assert "1 verdicts, 0 claims without one" in text
    assert book.command("check", "registrations", "outputs")[0] == 0
    code, text = book.command("new", "dynamics/my_finding", "--paper", "A02")
    assert code == 2 and "exists" in text
    path = book.path("dynamics/my_finding")
    path.write_text(path.read_text().replace("size + np", "size - np"))
    code, text = book.command("verdicts")
    assert code == 1 and "stale" in text
    code, text = book.command("verdicts", "--json")
    assert "refused" in text


def test_a_run_at_paper_scale_is_kept_beside_its_chapter(tmp_path):
    book = TinyBook(tmp_path / "book")
    shutil.copytree(CHECKOUT / "reappraisal", book.root / "reappraisal")
    rules = book.root / "registrations"
    rules.mkdir()
    shutil.copy(CHECKOUT / "registrations/papers.yml", rules)
    assert book.command("new", "dynamics/mine", "--paper", "A02")[0] == 0
    entry = rules / "dynamics.yml"
    entry.write_text(entry.read_text().replace(
        "{smoke: 8, book: 32}", "{smoke: 8, book: 32, paper: 64}"))
    assert book.command("register")[0] == 0
    executed = tmp_path / "out.ipynb"
    papermill.execute_notebook(
        book.path("dynamics/mine"), executed, {"scale": "paper"},
        cwd=book.root / "nbs/dynamics", progress_bar=False)
    words = "keep", "dynamics/mine", executed, "--machine", "one GPU"
    code, text = book.command(*words)
    kept = book.root / "nbs/dynamics/mine_paper.json"
    assert code == 0 and str(kept) in text
    record, = json.loads(kept.read_text())["verdicts"]
    assert (record["scale"], record["n"]) == ("paper", 64)
    problems = checks.outputs(book.root)
    assert problems == [p for p in problems if "_paper" not in p]
    kept.write_text(kept.read_text().replace("sha256:", "sha256:0"))
    assert [p for p in checks.outputs(book.root) if "_paper" in p]
    code, text = book.command("keep", "dynamics/mine", book.path(
        "dynamics/mine"), "--machine", "one GPU")
    assert code == 1 and "no verdict at paper scale" in text


def test_a_command_line_as_papermill_would_have_it():
    assert cli.joined(["run", "-p", "a", "1", "-p", "b=2", "x"]) == [
        "run", "-p", "a=1", "-p", "b=2", "x"]


def test_lines_for_a_log():
    failed = {"event": "end", "chapter": "a/b", "state": "failed",
              "kept": "there", "error": {
                  "name": "DeadKernel", "message": "it died", "cell": 3,
                  "words": "Fatal\nmore"}}
    text = cli.one_line(failed)
    assert text.startswith("FAILED  a/b: cell 3: DeadKernel: it died")
    assert "Fatal" in text and text.endswith("see there")
