"""Compare: planted differences are found, planted nulls are not."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reappraisal
from reappraisal.intervene.quantise import quantise
from reappraisal.intervene.symmetry import permute_hidden, rescale_neurons
from reappraisal.lab.data import load
from reappraisal.lab.ensemble import SGD, train
from reappraisal.lab.models import mlp
from reappraisal.measure.calibration import ece
from reappraisal.measure.functional import DISTANCES, compare_outputs
from reappraisal.measure.reading import Outputs, read_outputs
from reappraisal.practice.compare import compare, compare_read

CLASSES, N = 8, 400


def drawn(seed, harm=0.0, n=N, classes=CLASSES, count=2, spread=1.0):
    """Models with independent noise; harm in class 0 of the second."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    signal = 2.5 * F.one_hot(y) + torch.randn(n, classes, generator=g)
    z = [signal + spread * torch.randn(n, classes, generator=g)
         for _ in range(count)]
    z[1] += harm * (y == 0)[:, None] * torch.randn(n, classes, generator=g)
    return [Outputs(v, y) for v in z]


@pytest.fixture(scope="module")
def digits():
    parts = load("digits").split(1000).standardised()
    nets = train(mlp([64, 32, 10]), parts.train, seeds=range(1000, 1006),
                 steps=150, batch_size=64, optimiser=SGD(0.1))
    return nets, parts.test


# --- against oracles ------------------------------------------------------


def test_numbers_are_those_of_the_instruments():
    a, b = drawn(0)
    found = compare_read(a, b, n_boot=199)
    theirs = compare_outputs(a, b)
    for name, v in found.distances.items():
        assert math.isclose(v.estimate, theirs[name], abs_tol=1e-12)
        assert v.lo < v.estimate < v.hi
    for name, v in vars(theirs.churn).items():
        assert torch.equal(getattr(found.churn, name), v)
    y = a.y
    for i, o in enumerate((a, b)):
        values = {k: v[i] for k, v in found.values.items()}
        assert math.isclose(
            values["NLL (nats)"], F.cross_entropy(o.logits.double(), y))
        onehot = F.one_hot(y, CLASSES)
        assert math.isclose(values["Brier"], (
            (o.probs.double() - onehot) ** 2).sum(1).mean(), rel_tol=1e-6)
        assert math.isclose(values["accuracy"], o.correct.double().mean())
        assert math.isclose(values["overconfidence"], (
            o.probs.amax(1).double() - o.correct.double()).mean(),
            abs_tol=1e-12)
        assert math.isclose(values["ECE"], ece(o.probs, y))
    for k, v in found.changes.items():
        assert math.isclose(
            v.estimate, found.values[k][1] - found.values[k][0],
            abs_tol=1e-9), k


def test_mcnemar_and_holm():
    a, b = drawn(1, harm=4.0)
    found = compare_read(a, b, n_boot=199, slices={"half": np.arange(N) < 200})

    def exact(rows):
        p, q = a.correct[rows], b.correct[rows]
        table = [[int(((p == i) & (q == j)).sum()) for j in (True, False)]
                 for i in (True, False)]
        return min(1.0, mcnemar(table, exact=True).pvalue)

    raw = {"accuracy": exact(torch.ones(N).bool())}
    assert math.isclose(found.changes["accuracy"].p, raw["accuracy"])
    ps = [v.p for v in found.changes.values()]
    theirs = multipletests(ps, method="holm")[1]
    for p, v in zip(theirs, found.adjusted.values(), strict=True):
        assert math.isclose(v, min(1, 2 * p))
    assert [s.name for s in found.slices] == [
        *(f"class {i}" for i in range(CLASSES)),
        *(f"{q} quarter of confidence"
          for q in ("lowest", "second", "third", "highest")), "half"]
    middle = (a.probs.double() + b.probs.double()).amax(1).argsort(stable=True)
    rows = [a.y == i for i in range(CLASSES)]
    rows += [torch.isin(torch.arange(N), middle[i * 100:(i + 1) * 100])
             for i in range(4)]
    rows.append(torch.arange(N) < 200)
    theirs = multipletests([exact(r) for r in rows], method="holm")[1]
    for s, r, p in zip(found.slices, rows, theirs, strict=True):
        assert s.n == r.sum() and math.isclose(s.p, min(1, 2 * p))
        assert math.isclose(s.a, a.correct[r].double().mean())
        assert math.isclose(
            s.disagreement.estimate,
            (a.predictions != b.predictions)[r].double().mean())


def test_bootstrap_is_near_the_t_interval():
    a, b = drawn(2, n=1000)
    found = compare_read(a, b, n_boot=1999).changes["NLL (nats)"]
    each = [F.cross_entropy(o.logits.double(), o.y, reduction="none")
            for o in (b, a)]
    test = stats.ttest_rel(*(e.numpy() for e in each))
    lo, hi = test.confidence_interval(0.95)
    width = hi - lo
    assert abs(found.lo - lo) < 0.1 * width > abs(found.hi - hi)
    assert abs(found.p - test.pvalue) < 0.05


def test_disagreement_has_the_exact_interval():
    a, b = drawn(3)
    found = compare_read(a, b, n_boot=99).disagreement
    k = int((a.predictions != b.predictions).sum())
    exact = stats.binomtest(k, N).proportion_ci(0.95, "exact")
    assert math.isclose(found.lo, exact.low)
    assert math.isclose(found.hi, exact.high)


# --- planted nulls and differences ----------------------------------------


def test_another_set_of_weights_of_the_same_function(digits):
    nets, test = digits
    old = nets.member(0)
    x = test.X[:8]
    moved = rescale_neurons(permute_hidden(old, x, seed=1), x, 1.0, seed=2)
    found = compare(old, moved, test, nets[1:])
    assert found.same and not found.found and found.disagreement.hi < 0.02
    assert found.verdict.startswith("the same function")
    assert all(v.estimate == v.lo == v.hi for k, v in found.changes.items()
               if k != "accuracy")
    # a constant added to all logits is in no probability
    out = read_outputs(old, test)
    assert compare_read(out, Outputs(out.logits + 5, out.y)).same
    assert not compare_read(out, Outputs(out.logits * 1.1, out.y)).same


def test_false_alarms_are_kept_at_alpha():
    times = 80
    found = [compare_read(*drawn(s), n_boot=299) for s in range(times)]
    alarms = sum(bool(r.found) for r in found)
    assert stats.binomtest(alarms, times, 0.05, "greater").pvalue > 0.001
    for name in "NLL (nats)", "Brier", "overconfidence":
        alone = sum(r.changes[name].p < 0.05 for r in found)
        assert stats.binomtest(alone, times, 0.05).pvalue > 0.001


@pytest.mark.slow
def test_false_alarms_over_many_seeds():
    times = 400
    found = [compare_read(*drawn(s), n_boot=499)
             for s in range(5000, 5000 + times)]
    alarms = sum(bool(r.found) for r in found)
    assert stats.binomtest(alarms, times, 0.05, "greater").pvalue > 0.01
    for name in "NLL (nats)", "Brier", "overconfidence":
        alone = sum(r.changes[name].p < 0.05 for r in found)
        assert stats.binomtest(alone, times, 0.05).pvalue > 0.01


def test_a_planted_loss_is_found_and_named():
    named = 0
    for s in range(12):
        found = compare_read(*drawn(s, 6.0), n_boot=299)
        named += found.worst.name == "class 0" and found.worst.p < 0.05
        if "class 0" in found.found:
            assert "class 0" in found.verdict
    assert named >= 9


def test_a_planted_loss_in_a_slice_of_ones_own():
    a, b = drawn(5)
    wing = np.arange(N) % 10 == 3
    z = b.logits.clone()
    z[wing] = z[wing].roll(1, 1)
    found = compare_read(a, Outputs(z, b.y), slices={"wing": wing},
                         n_boot=299)
    assert found.worst.name == "wing" and "wing" in found.found


def test_overconfidence_alone_is_found():
    a, _ = drawn(6)
    found = compare_read(a, Outputs(3 * a.logits, a.y), n_boot=999)
    assert found.disagreement.estimate == 0 and not found.same
    assert found.adjusted["accuracy"] == 1
    assert {"overconfidence", "ECE"} <= set(found.found)
    assert found.changes["overconfidence"].lo > 0


# --- twins ----------------------------------------------------------------


def test_a_twin_stands_anywhere_in_line():
    """The place of a true twin is uniform: an exact test."""
    places = []
    for s in range(60):
        a, b, *twins = drawn(s, count=6, n=60)
        found = compare_read(a, b, twins, n_boot=99)
        place = found.twins["JS divergence (nats)"]
        assert math.isclose(place.nearer + place.farther, 6 / 5)
        places.append(round(place.nearer * 5))
        assert place.lowest < 1 < place.highest
    counts = np.bincount(places, minlength=6)[1:]
    assert stats.chisquare(counts).pvalue > 0.001
    # in units of twins, a twin is about one away
    assert abs(place.ratio.estimate - 1) < 0.4


def test_near_and_far_in_units_of_twins():
    a, b, *twins = drawn(7, count=6)
    z = a.logits + 0.05 * (b.logits - a.logits)
    near = compare_read(a, Outputs(z, a.y), twins, n_boot=199)
    far = compare_read(a, Outputs(torch.roll(a.logits, 1, 1), a.y), twins,
                       n_boot=199)
    for name in near.twins:
        assert near.twins[name].ratio.hi < 1 < far.twins[name].ratio.lo
        assert near.twins[name].nearer == far.twins[name].farther == 1 / 5
    # by hand
    d = [DISTANCES["JS divergence (nats)"](twins[i], twins[j])
         for i in range(4) for j in range(i)]
    ours = near.twins["JS divergence (nats)"].ratio.estimate
    own = DISTANCES["JS divergence (nats)"](a, Outputs(z))
    assert math.isclose(ours, own / np.mean(d), rel_tol=1e-9)


def test_an_ensemble_or_a_list_of_twins(digits):
    nets, test = digits
    old, eight = nets.member(0), quantise(nets.member(0), 8)
    one = compare(old, eight, test, nets[1:4], n_boot=99)
    two = compare(old, eight, test, [nets.member(i) for i in (1, 2, 3)],
                  n_boot=99)
    assert one.to_json() == two.to_json() and one.n_twins == 3
    assert one.twins["JS divergence (nats)"].ratio.hi < 0.2


# --- forms ----------------------------------------------------------------


def test_shuffled_loaders_and_foreign_forms(digits):
    nets, test = digits
    old, new = nets.member(0), nets.member(1)

    class Spoken(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, pixels):
            return {"logits": self.net(pixels)}

    plain = compare(old, new, test, n_boot=99)
    loader = DataLoader(TensorDataset(test.X, test.y), 50, shuffle=True)
    mixed = compare(old, Spoken(new).double(), loader, n_boot=99)
    assert math.isclose(
        plain.distances["JS divergence (nats)"].estimate,
        mixed.distances["JS divergence (nats)"].estimate, rel_tol=1e-5)
    assert torch.equal(plain.churn.broken, mixed.churn.broken)


def test_without_labels():
    a, b, *twins = drawn(8, count=4)
    bare = [Outputs(o.logits) for o in (a, b, *twins)]
    found = compare_read(*bare[:2], bare[2:], n_boot=99)
    assert not found.changes and found.churn is None and found.worst is None
    assert found.slices[0].name.startswith("predicted")
    assert "other predictions" in found.verdict
    assert math.isnan(found.slices[0].a)
    json.loads(found.to_json())
    assert found.plot().png and len(found.to_frame()) and repr(found)
    # labels of either are enough
    assert compare_read(bare[0], b, n_boot=99).changes


def test_it_shows_itself():
    a, b, *twins = drawn(9, 6.0, count=5)
    found = compare_read(a, b, twins, n_boot=199)
    text, page = repr(found), found._repr_html_()
    for part in ("class 0", "NLL (nats)", "broken", "of twins'"):
        assert part in text and part.replace("'", "&#x27;") in page
    data = json.loads(found.to_json())
    assert data["found"] == list(found.found)
    assert data["schema"] == "reappraisal.compare/1"
    frame = found.to_frame()
    assert set(frame.kind) == {
        "change", "slice", "distance", "share of twins' distance"}
    row = frame[frame.name == "accuracy"].iloc[0]
    assert math.isclose(row.b - row.a, row.estimate, abs_tol=1e-12)
    figure = found.plot()
    assert "class 0" in figure.caption and "twins" in figure.alt


def test_from_the_top():
    assert reappraisal.compare is compare


def test_the_same_seed_gives_the_same_bits():
    pair = drawn(10)
    one, two = (compare_read(*pair, n_boot=199).to_json() for _ in range(2))
    other = compare_read(*pair, n_boot=199, seed=1).to_json()
    assert one == two != other


def test_many_classes_skip_pairs_of_them():
    a, b = drawn(11, classes=200)
    found = compare_read(a, b, n_boot=99)
    assert "rank disagreement" not in found.distances


@pytest.mark.parametrize(("change", "message"), [
    ({"alpha": 5}, "alpha"), ({"level": 95}, "level"),
    ({"atol": -1}, "atol"), ({"n_boot": 9}, "n_boot"),
    ({"slices": {"wing": [1]}}, "'wing' has shape"),
    ({"twins": []}, "twins: got 0"), ({"twins": drawn(0)[:1]}, "got 1"),
    ({"twins": [drawn(0)[0], drawn(1)[0]]}, "answer alike"),
    ({"twins": drawn(1, classes=4)}, r"twins\[0\]: logits"),
    ({"b": drawn(0, n=200)[0]}, "b: logits"),
    ({"b": Outputs(drawn(0)[1].logits, drawn(0)[1].y.flip(0))}, "b: other"),
])
def test_refusals(change, message):
    a, b = drawn(0)
    with pytest.raises(ValueError, match=message):
        compare_read(**({"a": a, "b": b, "n_boot": 99} | change))
