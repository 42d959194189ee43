"""Audit: budget, interruption, honesty of lines, and planted flaws."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reappraisal
from reappraisal.practice.audit import audit
from reappraisal.practice.audit_your_model import FLAWS, healthy, planted
from reappraisal.practice.instruments import INSTRUMENTS, parts_of
from reappraisal.practice.subject import Clock, OutOfTime, gather

CHEAP = ["accuracy", "calibration", "selective"]
#: Everything but what raises no flags.
LOOKING = [k for k in INSTRUMENTS if k not in ("layers", "sharpness")]


@pytest.fixture(scope="module")
def case():
    return healthy(1000)


@pytest.fixture(scope="module")
def report(case):
    return case.audit(budget_s=30.0, progress=False)


def test_the_top_has_it():
    assert reappraisal.audit is audit


def test_every_line_is_complete(report):
    assert {x.instrument for x in report.lines} == set(INSTRUMENTS)
    for x in report.lines:
        assert x.meaning.endswith("."), x.key
        if x.lo is not None:
            assert x.lo <= x.value <= x.hi, x.key
            assert x.method, x.key
        assert x.key.partition(".")[2] in {
            *INSTRUMENTS[x.instrument].lines, "ood", "ood.best"}, x.key
    assert report["weights.alpha"].bearing
    assert all(b.link.startswith("http") for x in report.lines
               for b in x.bearing)


def test_numbers_agree_with_plain_arithmetic(case, report):
    x, y = case.test
    with torch.no_grad():
        p = case.model(x).softmax(1)
    right = p.argmax(1) == y
    assert report["accuracy.all"].value == pytest.approx(
        float(right.double().mean()))
    gap = float(p.amax(1).double().mean() - right.double().mean())
    assert report["calibration.gap"].value == pytest.approx(gap, abs=1e-6)
    onehot = nn.functional.one_hot(y, 6)
    assert report["calibration.brier"].value == pytest.approx(
        float((p - onehot).square().sum(1).mean()), rel=1e-5)


def test_a_healthy_model_is_left_in_peace_and_as_it_was(case):
    model = healthy(1000).model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    found = case.audit(budget_s=8.0, instruments=LOOKING, progress=False)
    assert len(found.flags) <= 1
    assert model.training and not model._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k])
               for k, v in model.state_dict().items())
    model.eval()


@pytest.mark.parametrize("name", list(FLAWS))
def test_each_flaw_has_a_line_that_exists(name):
    for key in FLAWS[name][1]:
        instrument, _, line = key.partition(".")
        assert line in (*INSTRUMENTS[instrument].lines, "ood")


@pytest.mark.slow
def test_planted_flaws_are_found():
    hits, wrong, missed = [], [], []
    for seed in (1003, 1004):
        for name, (_, wanted) in FLAWS.items():
            found = planted(name, seed).audit(
                budget_s=20.0, instruments=LOOKING, progress=False)
            hit = {x.key for x in found.flags} & set(wanted)
            hits.append(bool(hit))
            if not hit:
                missed.append((name, seed))
        found = planted("healthy", seed).audit(
            budget_s=20.0, instruments=LOOKING, progress=False)
        wrong += found.flags
    assert np.mean(hits) >= 0.9, missed
    assert len(wrong) <= 2


@pytest.mark.parametrize(
    "name", ["overconfident", "collapsed_class", "leaked_test", "overflow"])
def test_cheap_flaws_are_found_and_named(name):
    wanted = FLAWS[name][1]
    instruments = [k.partition(".")[0] for k in wanted]
    found = planted(name, 1001).audit(
        budget_s=10.0, instruments=instruments, progress=False)
    assert {x.key for x in found.flags} & set(wanted)
    sound = planted("healthy", 1001).audit(
        budget_s=10.0, instruments=instruments, progress=False)
    assert not sound.flags


# ------------------------------------------------------------------ the time
class Slow(nn.Module):
    """Ten milliseconds a sample."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        time.sleep(0.01 * len(x) if x.ndim == 2 else 0.01)
        return self.net(x)


@pytest.mark.parametrize("budget", [3.0])
def test_the_budget_is_kept_and_what_was_left_out_is_said(budget):
    data = torch.randn(500, 8), torch.randint(3, (500,))
    began = time.monotonic()
    found = audit(Slow(), test=data, budget_s=budget, progress=False)
    assert time.monotonic() - began < 1.1 * budget
    assert "accuracy.all" in found
    said = {o.instrument for o in found.omitted} | {
        x.instrument for x in found.lines}
    assert said == set(INSTRUMENTS)
    assert any("would need" in o.why or "time" in o.why
               for o in found.omitted)
    assert found["accuracy.all"].cautions  # a subsample, and it says so


class Impatient(nn.Module):
    """Is interrupted after some calls."""

    def __init__(self, calls):
        super().__init__()
        self.net, self.calls = nn.Linear(8, 3), calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.net(x)


def test_an_interrupt_gives_what_was_found():
    data = torch.randn(400, 8), torch.randint(3, (400,))
    found = audit(Impatient(12), test=data, progress=False)
    assert found.interrupted and "accuracy.all" in found
    assert any(o.why == "interrupted" for o in found.omitted)
    assert "interrupted" in repr(found)
    assert audit(Impatient(0), test=data, progress=False).interrupted


def test_the_clock_stops_copies_too():
    clock, net = Clock(10.0), nn.Linear(2, 2)
    with clock.on(net), clock.within(0.0):
        time.sleep(0.001)
        with pytest.raises(OutOfTime):
            net(torch.zeros(1, 2))
    net(torch.zeros(1, 2))


# ------------------------------------------------------------------ the data
def test_samples_are_a_random_part_and_say_so():
    x, y = torch.arange(5000.0)[:, None], torch.arange(5000) % 4
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    part = gather(loader, 300, seed=3)
    assert len(part) == 300 and part.x.max() > 4000 and not part.whole
    assert "300 of 5,000" in part.note
    assert torch.equal(part.x[:, 0].long() % 4, part.y)
    assert torch.equal(part.x, gather(loader, 300, seed=3).x)
    first = gather((b for b in loader), 300)
    assert "first" in first.note and first.x.max() < 400
    assert gather((x, y), 10_000).whole
    assert len(gather((x, y), 10_000, memory=4 * 100)) == 100


def test_parts_tile_the_input():
    for shape in ((24,), (3, 32, 32), (1, 8, 8), (20, 5), (300,)):
        parts = parts_of(shape)
        assert torch.equal(parts.sum(0), torch.ones(shape).long())
        assert 4 <= len(parts) <= 64


def test_answers_that_are_not_finite_are_counted_and_set_aside():
    class Broken(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return torch.where(x[:, :1] > 1.5, torch.nan, z)

    x, y = torch.randn(400, 8), torch.randint(3, (400,))
    found = audit(Broken(8, 3), test=(x, y), budget_s=20.0,
                  instruments=["numerics", "accuracy"], progress=False)
    count = int((x[:, 0] > 1.5).sum())
    assert found["numerics.broken"].value == pytest.approx(count / 400)
    assert found["numerics.broken"].flag
    assert any("left out" in c for c in found["accuracy.all"].cautions)


def test_tokens_and_half_precision_are_read():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(11, 8), nn.Flatten(), nn.Linear(40, 3)
    ).bfloat16()
    data = torch.randint(11, (300, 5)), torch.randint(3, (300,))
    found = audit(net, test=data, budget_s=10.0, progress=False)
    why = {o.instrument: o.why for o in found.omitted}
    assert "real numbers" in why["corruption"]
    assert "shortcut.drop" in found


@pytest.mark.parametrize("options, word", [
    ({"test": None}, "test"), ({"budget_s": -1.0}, "budget_s"),
    ({"instruments": ["nonsense"]}, "nonsense"),
    ({"tolerance": 0.0}, "tolerance"), ({"groups": [1, 2]}, "groups"),
])
def test_errors_name_the_argument(case, options, word):
    given = {"test": case.test, "progress": False} | options
    with pytest.raises(ValueError, match=word):
        audit(case.model, **given)


def test_given_groups_are_looked_at(case):
    x, y = case.test
    wrong = case.model(x).argmax(1) != y
    groups = torch.where(wrong | (torch.arange(len(y)) % 10 == 0), 1, 0)
    found = audit(case.model, test=case.test, groups=groups,
                  instruments=["slices"], progress=False)
    assert "group 1" in found["slices.worst"].label
    assert found["slices.worst"].flag


# ------------------------------------------------------------------ as text
def test_it_is_text_frame_json_and_html(report, tmp_path):
    text = repr(report)
    assert f"{100 * report['accuracy.all'].value:.1f} %" in text
    assert ("Left out" in text) == bool(report.omitted)
    assert "In the book" in text
    frame = report.to_frame()
    assert len(frame) == len(report.lines)
    data = json.loads(report.to_json())
    assert data["schema"] == "reappraisal.audit/1"
    assert data["lines"][0]["key"] == "accuracy.all"
    page = report.to_html(tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "r.json").read_text()) == data
    assert "src=\"http" not in page and "<script" not in page
    assert page.count("<img") == page.count("alt=\"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json"]
    with pytest.raises(ValueError, match="html"):
        report.to_html(tmp_path / "r.txt")


def test_foreign_text_cannot_break_the_page(report, tmp_path):
    line = replace(report.lines[0], label="<b>&", flag="<script>x</script>")
    page = replace(report, lines=(line,)).to_html(tmp_path / "r.html")
    assert "<script" not in page.read_text()
    assert "<b>" not in page.read_text()


@pytest.mark.slow
def test_a_hundred_million_parameters_in_16_gb(root):
    import subprocess
    import sys

    code = (
        "import resource, time, torch\n"
        "from torch import nn\n"
        "from reappraisal.practice.audit import audit\n"
        "layer = nn.TransformerEncoderLayer(1024, 8, 4096, dropout=0.0,\n"
        "    batch_first=True, norm_first=True)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.TransformerEncoder(layer, 8,\n"
        "            enable_nested_tensor=False)\n"
        "        self.into, self.out = nn.Linear(16, 1024),"
        " nn.Linear(1024, 10)\n"
        "    def forward(self, x):\n"
        "        return self.out(self.inner(self.into(x)).mean(1))\n"
        "net = Net()\n"
        "assert sum(p.numel() for p in net.parameters()) > 1e8\n"
        "data = torch.randn(300, 8, 16), torch.randint(10, (300,))\n"
        "began = time.monotonic()\n"
        "r = audit(net, test=data, budget_s=120.0, progress=False)\n"
        "print(time.monotonic() - began, len(r.lines),\n"
        "    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)\n"
        "print([str(o) for o in r.omitted])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, lines, peak = map(float, done.stdout.splitlines()[0].split())
    assert peak < 16 and seconds < 1.1 * 120
    assert lines > 12
