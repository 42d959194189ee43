"""The chapter on distillation: would its rules notice if nothing were there?"""

from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch

from reappraisal.compression.kd_functional_perspective import (
    ARCHITECTURES,
    CONDITIONS,
    CONTROLS,
    DOSES,
    FRESH,
    MEASURES,
    PUBLISHED_CONDITIONS,
    Condition,
    Readings,
    Windows,
    best_dose,
    closer,
    closest,
    control_suite,
    crossfit,
    evidence_closer,
    evidence_errors,
    evidence_matches,
    evidence_small,
    evidence_tops,
    evidence_tracks,
    false_alarms,
    read_suite,
    simulated_power,
    target_entropy,
    targets,
)
from reappraisal.intervene.distil import Teacher
from reappraisal.lab.data import mnist1d
from reappraisal.lab.ensemble import SGD
from reappraisal.measure.functional import AgreementGain
from reappraisal.measure.reading import read_outputs
from reappraisal.protocol.claims import Claim
from reappraisal.protocol.multiplicity import holm

SEEDS = list(range(1000, 1024))
ARCHS = ("mlp", "conv", "attention")
TRAINING = {"steps": 20, "optimiser": SGD(0.1, momentum=0.9)}


def judge(slug, evidence):
    return Claim.load(f"A05/{slug}").judge(
        evidence, scale="book", seeds=SEEDS, seconds=0.0
    )


def world(near=1.0, noise_gain=0.0, real_gain=0.0, seed=0, agree=0.3):
    """Readings in which distilled students are `near` times as far."""
    found = {}
    for k, arch in enumerate(ARCHS):
        n = 24 if arch == "mlp" else 12
        rng = np.random.default_rng(seed + k)
        luck = rng.uniform(0.9, 1.1, n)
        distance, accuracy = {}, {}
        for name, c in CONDITIONS.items():
            factor = {"model": near, "uniform": 2, "gaussian": 2}.get(
                c.teacher, 1.0)
            factor = 3.0 if c.stranger else factor
            distance[name] = {
                m: agree * factor * luck * rng.normal(1, 0.03, n)
                for m in MEASURES
            }
            gain = {"model": real_gain, "uniform": noise_gain,
                    "gaussian": noise_gain}.get(c.teacher, 0.0)
            centre = 0.1 if c.alpha == 1 else 0.5 + gain
            accuracy[name] = centre + 0.05 * (luck - 1) * (
                c.alpha < 1) + rng.normal(0, 0.004, n)
        distance["copy"] = {m: np.zeros(n) for m in MEASURES}
        found[arch] = Readings(
            distance, distance, accuracy, accuracy,
            {"none": np.ones(n)}, np.full(n, 0.5), np.full(n, 0.1),
        )
    return found


@pytest.fixture(scope="module")
def data():
    d = mnist1d(260, seed=3)
    x = d.X.float()
    return (x[:160], d.y[:160]), (x[160:], d.y[160:])


# planted effects are found, planted nulls are not

def test_a_planted_transfer_is_found_and_none_is_not():
    slug = "kd-closer-than-four-controls"
    assert judge(slug, evidence_closer(world(0.8))).verdict == "reproduced"
    assert judge(slug, evidence_closer(world(1.0))).verdict == "not reproduced"


def test_small_and_large_transfers_are_told_apart():
    slug = "transfer-is-small"
    for near, expected in ((0.8, "reproduced"), (0.2, "not reproduced"),
                           (1.3, "inconclusive")):
        r = world(near)
        assert judge(slug, evidence_small(r)).verdict == expected


def test_an_agreement_of_95_percent_is_no_small_transfer():
    r = world(0.55, agree=0.08)  # 92 % agreement without a teacher: easy
    e = evidence_small(r)
    assert e["easy_mlp"] == [0]
    hard = world(0.1, agree=0.3)  # 97 % with, 70 % without
    e = evidence_small(hard)
    assert e["easy_mlp"][0] > 0.1 and (e["agree_mlp"] < 0).all()


def test_noise_that_helps_is_found_and_noise_that_does_not_is_not():
    for slug, evidence in (
        ("noise-teacher-tops-accuracy", lambda r: evidence_tops(r)),
        ("noise-teacher-matches-accuracy",
         lambda r: evidence_matches(r, fresh(r))),
    ):
        better = judge(slug, evidence(world(noise_gain=0.03)))
        worse = judge(slug, evidence(world(noise_gain=-0.03, real_gain=0.01)))
        assert better.verdict == "reproduced", slug
        assert worse.verdict == "not reproduced", slug


def fresh(readings):
    r = readings["mlp"]
    accuracy = {name: r.accuracy[name.removeprefix("fresh ")]
                for name in FRESH}
    return Readings({}, {}, accuracy, accuracy, {}, r.teacher_accuracy,
                    r.teacher_loss)


def test_a_ceiling_makes_the_accuracy_claim_invalid():
    r = world(noise_gain=0.03)
    for one in r.values():
        for name in one.accuracy:
            if CONDITIONS[name].alpha < 1:
                one.accuracy[name] += 0.45
    found = judge("noise-teacher-tops-accuracy", evidence_tops(r))
    assert found.verdict == "invalid"


def test_the_best_of_equals_gains_nothing():
    found = evidence_tops(world())
    verdict = judge("noise-teacher-tops-accuracy", found)
    assert verdict.verdict in ("inconclusive", "not reproduced")


@pytest.mark.parametrize(("sign", "expected"),
                         [(1, "reproduced"), (-1, "not reproduced")])
def test_loss_and_share(sign, expected):
    rng = np.random.default_rng(0)
    loss = rng.uniform(0, 1, 16)
    share = {"real": sign * loss + rng.normal(0, 0.1, 16),
             "gaussian": rng.normal(0, 1, 16) - loss,
             "class_mean": rng.normal(0, 1, 16) - loss}
    found = judge("transfer-tracks-teacher-training-loss",
                  evidence_tracks(loss, share))
    assert found.verdict == expected


def errors(right, wrong, near=0.8):
    rng = np.random.default_rng(1)
    r = world(near)["mlp"]

    def gain(a, b):
        return AgreementGain(
            torch.as_tensor(a + rng.normal(0, 0.003, 24)),
            torch.as_tensor(b + rng.normal(0, 0.003, 24)),
            torch.full((24,), 0.1), torch.full((24,), 0.3), 4000,
        )

    r.gains.update({"real 0.9": gain(right, wrong),
                    "class_shuffled 0.9": gain(0.02, 0.02)})
    return judge("errors-travel-better-than-successes", evidence_errors(r))


def test_errors_that_travel_and_errors_that_do_not():
    assert errors(0.01, 0.1).verdict == "reproduced"
    assert errors(0.05, 0.05).verdict == "not reproduced"
    assert errors(0.01, 0.1, near=1.0).verdict == "inconclusive"


# breaking the mechanism

def test_a_teacher_that_is_a_copy_of_noise_teaches_no_function(data):
    part, rest = data
    few = {k: CONDITIONS[k] for k in
           ("none", "real 0.9", "uniform 0.9", "gaussian 0.9")}
    suite = control_suite(ARCHITECTURES["mlp"], part, range(6), few,
                          steps=150, optimiser=SGD(0.1, momentum=0.9))
    r = read_suite(suite, part, rest, rest)
    js = {k: v["js"].mean() for k, v in r.distance.items()}
    assert js["uniform 0.9"] > 2 * js["real 0.9"]
    assert js["gaussian 0.9"] > 2 * js["real 0.9"]
    assert r.train_accuracy["none"].mean() > 0.5


def test_a_taught_network_and_the_same_without_its_teacher():
    d = mnist1d(1800, seed=3)
    cuts = [1000, 200, 600]
    parts = list(zip(d.X.float().split(cuts), d.y.split(cuts), strict=True))
    names = {"real 0.9", "none 2", "none 3", *CONTROLS}
    suite = control_suite(
        ARCHITECTURES["mlp"], parts[0], SEEDS,
        {k: CONDITIONS[k] for k in names}, steps=200,
        optimiser=SGD(0.1, momentum=0.9),
    )
    taught = read_suite(suite, *parts)
    # the mechanism off: a third network that never met a teacher
    off = replace(taught, distance={
        **taught.distance, "real 0.9": taught.distance["none 3"]})
    for r, expected in ((taught, "reproduced"), (off, "not reproduced")):
        found = judge("kd-closer-than-four-controls",
                      evidence_closer(dict.fromkeys(ARCHS, r)))
        assert found.verdict == expected


def test_alpha_zero_removes_the_teacher(data):
    part, _ = data
    names = {"none": CONDITIONS["none"], "idle": Condition("model", 0.0),
             "noise": Condition("gaussian", 0.0)}
    suite = control_suite(ARCHITECTURES["mlp"], part, [5, 6], names,
                          **TRAINING)
    for k, v in suite.students["none"].params.items():
        assert torch.equal(v, suite.students["idle"].params[k])
        assert torch.equal(v, suite.students["noise"].params[k])


def test_the_same_order_and_no_teacher_is_the_teacher(data):
    part, _ = data
    suite = control_suite(ARCHITECTURES["mlp"], part, [5, 6],
                          {"none": CONDITIONS["none"]}, orders=[5, 6],
                          **TRAINING)
    for k, v in suite.teachers.params.items():
        torch.testing.assert_close(v, suite.students["none"].params[k])


def test_shuffled_labels_leave_chance(data):
    (x, y), rest = data
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    suite = control_suite(ARCHITECTURES["mlp"], (x, y), range(4),
                          {"none": CONDITIONS["none"]}, steps=100,
                          optimiser=SGD(0.1, momentum=0.9))
    r = read_suite(suite, (x, y), rest, rest)
    assert abs(r.accuracy["none"].mean() - 0.1) < 0.06


# oracles, determinism, bad input

@pytest.mark.parametrize(("size", "stride", "length"),
                         [(5, 2, 40), (5, 2, 18), (3, 3, 10), (4, 1, 4)])
def test_windows_are_a_convolution(size, stride, length):
    layer = Windows(3, 4, size, stride)
    x = torch.randn(2, length, 3)
    want = torch.nn.functional.conv1d(
        x.mT, layer.linear.weight.view(4, 3, size), layer.linear.bias, stride
    ).mT
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("arch", ARCHS)
def test_determinism_bit_for_bit_and_alone(arch, data):
    part, rest = data
    few = {k: CONDITIONS[k] for k in ("none", "gaussian 0.5")}
    few["drawn"] = FRESH["fresh uniform 0.5"]
    one, two = (control_suite(ARCHITECTURES[arch], part, [1, 2], few,
                              **TRAINING) for _ in range(2))
    alone = control_suite(ARCHITECTURES[arch], part, [2], few, **TRAINING)
    for name in few:
        for k, v in one.students[name].params.items():
            assert torch.equal(v, two.students[name].params[k])
            torch.testing.assert_close(
                v[1:], alone.students[name].params[k], rtol=1e-3, atol=1e-4
            )


def test_neither_stacks_nor_twins_change_a_network(data):
    part, _ = data
    few = {k: CONDITIONS[k] for k in ("none", "real 0.9", "uniform 0.5")}
    whole, cut = (
        control_suite(ARCHITECTURES["conv"], part, [1, 2, 1], few,
                      orders=[7, 8, 9], at_once=n, **TRAINING)
        for n in (None, 4)
    )
    plain = control_suite(ARCHITECTURES["conv"], part, [1, 2], few,
                          orders=[7, 8], **TRAINING)
    for k, v in whole.teachers.params.items():
        assert torch.equal(v[0], v[2]) and not torch.equal(v[0], v[1])
        for name in few:
            a = whole.students[name].params[k]
            for b in (cut, plain):
                b = b.students[name].params[k]
                torch.testing.assert_close(
                    a[: len(b)], b, rtol=1e-3, atol=1e-4
                )
            assert not torch.equal(a[0], a[2])


def test_targets(data):
    (x, y), _ = data
    said = torch.randn(3, len(x), 10)
    rows = torch.arange(100).expand(3, -1)
    for kind in ("class_shuffled", "class_mean", "uniform"):
        got = targets(kind, said, (x, y), rows, [1, 2, 3])
        assert got.shape == said.shape and (got[:, 100:] == 0).all()
        source = None if kind == "uniform" else said[1, :100]
        want = Teacher(kind, source, seed=2).logits((x[:100], y[:100]), 10)
        torch.testing.assert_close(got[1, :100], want)
    assert not targets("none", said, (x, y), rows, [1, 2, 3]).any()


def test_rows_keep_members_apart(data):
    (x, y), rest = data
    z = torch.cat([y, y.roll(7)])
    rows = torch.stack([torch.arange(160), torch.arange(160, 320)])
    suite = control_suite(
        ARCHITECTURES["mlp"], (x.repeat(2, 1), z), [1, 1],
        {"none": CONDITIONS["none"], "real 0.9": CONDITIONS["real 0.9"]},
        rows=rows, **TRAINING,
    )
    plain = control_suite(
        ARCHITECTURES["mlp"], (x, y), [1],
        {"none": CONDITIONS["none"], "real 0.9": CONDITIONS["real 0.9"]},
        **TRAINING,
    )
    for name in suite.students:
        a = read_outputs(suite.students[name], rest).logits[0]
        b = read_outputs(plain.students[name], rest).logits[0]
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_closer_against_scipy_and_by_hand():
    rng = np.random.default_rng(0)
    student, controls = rng.random((4, 12)), 0.3 + rng.random((4, 4, 12))
    found = closer(student, controls)
    raw = np.array([[scipy.stats.wilcoxon(
        controls[k, m] - student[m], alternative="greater").pvalue
        for k in range(4)] for m in range(4)])
    assert (found.p >= raw - 1e-12).all()
    assert found.p.min() == pytest.approx(16 * raw.min())
    assert (closer(student, student[None]).p == 1).all()


@pytest.mark.parametrize("n", [5, 9, 14])
def test_ties_and_zeros_are_tested_as_scipy_does(n):
    rng = np.random.default_rng(n)
    student, control = rng.integers(0, 6, (2, 3, n)) / 64
    p = closer(student, control[None]).p
    raw = [scipy.stats.wilcoxon(row, alternative="greater").pvalue
           for row in control - student]
    np.testing.assert_allclose(p.ravel(), holm(raw), rtol=1e-12)


def test_no_false_alarms_and_power_that_grows():
    d = world(1.0)["mlp"].distance
    assert false_alarms(d) <= 0.05
    power = [simulated_power(d, s).mean() for s in (0.0, 0.02, 0.1)]
    assert power[0] < 0.1 and power[0] <= power[1] <= power[2]
    assert power[2] > 0.9


def test_crossfit_by_hand():
    scores = np.array([[1.0, 0, 1, 0], [0, 2, 0, 2]])
    assert crossfit(scores).tolist() == [0, 0, 0, 0]
    assert crossfit(np.array([[3.0, 3], [1, 1]])).tolist() == [3, 3]


def test_choices_look_at_validation_only():
    r = world()["mlp"]
    r.check_accuracy["real 0.5"] = r.check_accuracy["real 0.5"] + 1
    assert best_dose(r, "real") == "real 0.5"
    r.check["hot 0.1"] = {m: 0 * v for m, v in r.check["none"].items()}
    assert closest(r, "js") == "hot 0.1"


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_entropy_against_draws(classes):
    for kind in ("uniform", "gaussian"):
        z = Teacher(kind, seed=4).logits(torch.zeros(40_000, 1), classes)
        h = torch.special.entr(z.double().softmax(-1)).sum(-1)
        gap = abs(h.mean() - target_entropy(kind, classes))
        assert gap < 5 * h.std() / 200


@pytest.mark.parametrize(("call", "match"), [
    (lambda: target_entropy("cauchy", 10), "kind"),
    (lambda: target_entropy("uniform", 1), "classes"),
    (lambda: crossfit(np.zeros((3, 1))), "scores"),
    (lambda: closer(np.zeros(3), np.zeros((2, 3))), "shapes"),
    (lambda: closer(np.full((4, 3), np.nan), np.zeros((2, 4, 3))), "finite"),
    (lambda: control_suite(ARCHITECTURES["mlp"], (0, 0), [1], {},
                           **TRAINING), "conditions"),
    (lambda: control_suite(ARCHITECTURES["mlp"], (0, 0), [1, 2], CONDITIONS,
                           orders=[1], **TRAINING), "orders"),
    (lambda: closer(np.zeros((4, 3)), np.zeros((4, 4, 2))), "shapes"),
    (lambda: ARCHITECTURES["conv"](0, inputs=12), "inputs"),
    (lambda: ARCHITECTURES["attention"](0, inputs=41), "patch"),
])
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_readings_of_students_that_are_not_there(data):
    part, rest = data
    suite = control_suite(ARCHITECTURES["mlp"], part, [1],
                          {"real 0.9": CONDITIONS["real 0.9"]}, **TRAINING)
    read_suite(suite, part, rest, rest, fitted=())
    for asked in ({}, {"gains": ["real 0.9"], "fitted": ()},
                  {"fitted": ["real 0.5"]}):
        with pytest.raises(ValueError, match="no students"):
            read_suite(suite, part, rest, rest, **asked)


def test_conditions_are_the_published_ones():
    assert len(PUBLISHED_CONDITIONS) == 10 and len(DOSES) == 3
    assert set(CONTROLS) <= set(CONDITIONS)
    assert all(c.temperature == 1 for c in PUBLISHED_CONDITIONS.values())
