"""Planted effects are found, planted nulls are not, and mechanisms break."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from reappraisal.lab import data
from reappraisal.lab.ensemble import SGD, accuracy
from reappraisal.protocol.claims import Claim
from reappraisal.protocol.power import selected
from reappraisal.reproducibility import signal_to_noise as sn

SEEDS = list(range(1000, 1128))


def planted(effects, correlation=0.6, seed=0):
    """A bank of normal runs with known effects, in accuracy points."""
    rng = np.random.default_rng(seed)
    arms, size = len(effects) + 1, len(SEEDS)

    def together(*shape):  # metrics and checkpoints of one run
        common = rng.normal(size=(*shape, 1, 1))
        return 2 * common + rng.normal(size=(*shape, 3, 4))

    noise = math.sqrt(correlation) * together(size)
    noise = noise + math.sqrt(1 - correlation) * together(arms, size)
    noise -= noise.mean(1, keepdims=True)
    noise /= noise.std(1, keepdims=True)
    shift = np.array([0.0, *effects])[:, None, None, None]
    sign = np.array(list(sn.METRICS.values()))
    values = 0.8 + 0.01 * (noise + shift * sign)
    names = ("baseline", *(f"trick{i}" for i in range(len(effects))))
    return sn.RunBank(names, tuple(SEEDS), (1, 2, 3), values)


def judge(slug, evidence):
    claim = Claim.load(f"A04/{slug}")
    return claim.judge(evidence, scale="book", seeds=SEEDS)


MODERATE = (0.45, 0.5, 0.6, -0.55, 0.7, -0.65, 0.5)
SMALL = (0.05, -0.05, 0.1, -0.1, 0.02, 0.06)


# ----------------------------------------------------------- the table


def test_published_table_passes_and_a_wrong_one_fails():
    claim = Claim.load("A04/computing-publishes-fastest")

    def verdict(counts):
        found = sn.evidence_growth(counts)
        return claim.judge(found, scale="book", seeds=[1000]).verdict

    assert verdict(sn.COUNTS) == "reproduced"
    wrong = dict(sn.COUNTS)
    row, _ = wrong["economics"]
    wrong["economics"] = (row, 34.285)
    assert verdict(wrong) == "not reproduced"


def test_growth():
    assert sn.growth(50, 75) == 50
    with pytest.raises(ValueError, match="first"):
        sn.growth([0, 1], [1, 2])


# ------------------------------------------------------------- studies


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), st.integers(0, 10**6))
def test_t_tests_are_scipys_and_ignore_order_and_unit(k, seed):
    a, b = np.random.default_rng(seed).normal(0.3, 1, (2, k))
    study = sn.t_unpaired(a, b)
    assert math.isclose(study.p, stats.ttest_ind(a, b).pvalue)
    other = sn.t_unpaired(7 * a[::-1] + 2, 7 * np.roll(b, 1) + 2)
    assert math.isclose(study.p, other.p, rel_tol=1e-6)
    pairs = sn.t_paired(a - b)
    assert math.isclose(pairs.p, stats.ttest_rel(a, b).pvalue)
    up = stats.ttest_rel(a, b, alternative="greater").pvalue
    assert math.isclose(pairs.p_up, up)


def test_unequal_groups():
    a, b = np.random.default_rng(0).normal(size=20)[:5], np.arange(15.0)
    mine = sn.t_unpaired(a, b)
    assert math.isclose(mine.p, stats.ttest_ind(a, b).pvalue)


def test_runs_without_spread():
    still = sn.t_paired(np.array([[1.0, 1, 1], [-1, -1, -1], [0, 0, 0]]))
    assert still.p.tolist() == [0, 0, 1]
    assert still.p_up.tolist() == [0, 1, 0.5]


def test_dropping_finds_the_farthest():
    a = np.array([[0.0, 0.1, 9.0, -0.1]])
    b = np.array([[1.0, 1.1, 1.2, 0.9]])
    left = np.delete(a[0], 2)
    mine = sn.without_farthest(a, b)
    assert math.isclose(mine.p[0], stats.ttest_ind(left, b[0]).pvalue)
    assert math.isclose(mine.effect[0], left.mean() - b.mean())
    swapped = sn.without_farthest(b, a)
    assert math.isclose(swapped.effect[0], -mine.effect[0])


@pytest.mark.parametrize("call", [
    lambda: sn.t_paired(np.zeros((3, 1))),
    lambda: sn.t_unpaired(np.zeros(1), np.zeros(3)),
    lambda: sn.without_farthest(np.zeros((4, 2))),
    lambda: sn.t_paired(1.0),
])
def test_too_few_seeds(call):
    with pytest.raises(ValueError, match="seeds or more"):
        call()


# ---------------------------------------------------- meta-analysis


def test_pool_and_egger():
    rng = np.random.default_rng(3)
    effect, sem = rng.normal(size=(6, 9)), rng.uniform(0.3, 2, (6, 9))
    kept = rng.random((6, 9)) < 0.7
    mean, variance = sn.pool(effect, sem**2, kept)
    p = sn.egger(effect, sem, kept)
    for i in range(6):
        e, s = effect[i, kept[i]], sem[i, kept[i]]
        row = combine_effects(e, s**2).summary_frame().loc["fixed effect"]
        assert math.isclose(row["eff"], mean[i])
        assert math.isclose(row["sd_eff"], math.sqrt(variance[i]))
        line = stats.linregress(1 / s, e / s)
        t = line.intercept / line.intercept_stderr
        assert math.isclose(p[i], 2 * stats.t.sf(abs(t), len(e) - 2))
    none = np.zeros((6, 9), bool)
    assert np.isnan(sn.pool(effect, sem**2, none)[0]).all()
    assert np.isnan(sn.egger(effect, sem, none)).all()
    with pytest.raises(ValueError, match="variance"):
        sn.pool(effect, np.zeros(9))


# ---------------------------------------------------------------- bank


def test_bank_knows_what_was_planted():
    bank = planted(MODERATE)
    np.testing.assert_allclose(bank.true, MODERATE, atol=1e-9)
    np.testing.assert_allclose(bank.d, MODERATE, atol=1e-9)
    assert np.abs(bank.correlation - 0.6).max() < 0.2
    gains = bank.gains
    np.testing.assert_allclose(gains[..., 0].mean(1), MODERATE)
    np.testing.assert_allclose(
        gains[..., 0], bank.accuracy[1:] - bank.base)
    # every analysis is oriented and in the unit of the first
    np.testing.assert_allclose(
        gains.mean(1), np.tile(np.array(MODERATE)[:, None], 12), atol=1e-9)


def test_bank_round_trip_and_refusals():
    pd = pytest.importorskip("pandas")
    bank = planted((0.5, -0.2))
    frame = bank.to_frame().sample(frac=1, random_state=0)
    again = sn.RunBank.from_frame(frame)
    order = [again.arms.index(a) for a in bank.arms]
    assert np.array_equal(again.values[order], bank.values)
    with pytest.raises(ValueError, match="lacks"):
        sn.RunBank.from_frame(frame.drop(columns="ece"))
    with pytest.raises(ValueError, match="baseline"):
        sn.RunBank.from_frame(frame, "nobody")
    with pytest.raises(ValueError, match="rows"):
        sn.RunBank.from_frame(frame.iloc[1:])
    with pytest.raises(ValueError, match="rows"):
        sn.RunBank.from_frame(pd.concat([frame, frame.iloc[:1]]))
    with pytest.raises(ValueError, match="shape"):
        replace(bank, seeds=(1, 2))
    with pytest.raises(ValueError, match="two of both"):
        sn.RunBank.from_frame(frame[frame["seed"] == SEEDS[0]])
    with pytest.raises(ValueError, match="NaN"):
        replace(bank, values=bank.values * np.nan)
    with pytest.raises(ValueError, match="vary"):
        _ = replace(bank, values=np.zeros_like(bank.values)).gains


@pytest.fixture(scope="module")
def task():
    return sn.digits_task(data.digits(), 30)


def test_training_is_deterministic_and_paired(task):
    seeds = (1000, 1001, 1002)
    one, two = (sn.train_bank(sn.ARMS, seeds, task) for _ in range(2))
    assert np.array_equal(one.values, two.values)
    assert one.values.shape == (13, 3, 3, 4)
    # a trick that does nothing is the baseline, run for run
    idle = {"baseline": sn.Arm("a"), "idle": sn.Arm("b")}
    bank = sn.train_bank(idle, seeds, task)
    assert np.array_equal(bank.values[0], bank.values[1])
    assert np.array_equal(bank.values[0], one.values[0])


def test_every_trick_does_something(task):
    bank = sn.train_bank(sn.ARMS, (1000, 1001), task)
    for i in range(1, 13):
        assert not np.array_equal(bank.values[i], bank.values[0])


def test_scores_by_hand(task):
    seeds = (1000, 1001)
    order = torch.stack([torch.randperm(
        len(task.data), generator=torch.Generator().manual_seed(s)
    ) for s in seeds])
    nets = sn.train_arm(sn.ARMS["dropout"], seeds, task, order[:, :200])
    found = sn.score(nets, task.data, order[:, 500:])
    for s in range(2):
        member = nets[-1].member(s)
        rows = order[s, 500:]
        with torch.no_grad():
            logits = member(task.data.X[rows])
        y = task.data.y[rows]
        own = accuracy(logits[None], y[None])[0]
        assert math.isclose(found[s, -1, 0], own, abs_tol=1e-6)
        loss = torch.nn.functional.cross_entropy(logits, y)
        assert math.isclose(found[s, -1, 1], loss, rel_tol=1e-4)
        hits = (logits.argmax(1) == y).double()
        worst = min(hits[y == c].mean() for c in range(10))
        assert math.isclose(found[s, -1, 3], worst, abs_tol=1e-9)


def test_averaged_weights_are_the_average(task):
    seeds, rows = (1000,), torch.arange(200)[None]
    arm = sn.Arm("x", average=0.9)
    found = sn.train_arm(arm, seeds, task, rows)[-1]
    every = replace(task, steps=tuple(range(31)))
    path = sn.train_arm(sn.Arm("y"), seeds, every, rows)
    for name, value in found.params.items():
        mean = path[0].params[name]
        for step in path[1:]:
            mean = 0.9 * mean + 0.1 * step.params[name]
        torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-5)


def test_other_networks_can_be_trained(task):
    from reappraisal.lab.models import convnet

    images = replace(task.data, X=task.data.X.view(-1, 1, 8, 8))
    small = replace(
        task, data=images, steps=(2, 4),
        model=lambda activation: convnet((1, 4), activation=activation))
    arms = {k: sn.ARMS[k] for k in ("baseline", "dropout", "shift", "mixup")}
    bank = sn.train_bank(arms, (1000, 1001), small)
    assert bank.values.shape == (4, 2, 2, 4)


def test_bad_tasks(task):
    with pytest.raises(ValueError, match="testing"):
        sn.train_bank(sn.ARMS, (1,), replace(task, train=1700))
    with pytest.raises(ValueError, match="linear"):
        sn.masked(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(ValueError, match="moves"):
        sn.shifted(torch.zeros(2, 3, 4), torch.zeros(1, 3, 2))


def test_gradient_noise_has_its_size():
    class P:
        flat = torch.zeros(1, 50_000)

    noisy = sn.Jolted(lr=0.1, noise=0.3, seed=5)
    g = P()
    noisy.gradient(None, g, {}, lambda: torch.zeros(1))
    assert abs(g.flat.std() - 0.3) < 0.01
    assert isinstance(noisy, SGD)


# ------------------------------------------------ planted and broken


def test_moderate_effects_are_exaggerated():
    found = sn.evidence_winners(planted(MODERATE))
    assert judge("winners-curse", found).verdict == "reproduced"


def test_without_a_threshold_nothing_is_exaggerated(monkeypatch):
    monkeypatch.setattr(sn.Studies, "p", property(
        lambda self: np.zeros_like(self.effect)))
    bank = planted((0.9, 1.0, -1.1, 1.15))
    found = sn.evidence_winners(bank)
    assert judge("winners-curse", found).verdict == "not reproduced"


def test_too_few_tricks_decide_nothing():
    found = sn.evidence_winners(planted((0.5, 0.6, 0.05)))
    assert judge("winners-curse", found).verdict == "inconclusive"


def test_pairing_helps_where_runs_correlate_only():
    near = sn.evidence_power(planted(MODERATE, 0.8), shuffles=50)
    slug = "customary-seeds-underpowered"
    assert judge(slug, near).verdict == "reproduced"
    far = sn.evidence_power(planted(MODERATE, 0.0), shuffles=50)
    assert judge(slug, far).verdict == "not reproduced"


def test_forking_needs_freedom(monkeypatch):
    bank = planted(MODERATE, correlation=0.0)
    found = sn.evidence_forking(bank, 3000)
    assert judge("forking-paths", found).verdict == "reproduced"
    only = dict.fromkeys(sn.STEPWISE, sn.Freedoms())
    monkeypatch.setattr(sn, "STEPWISE", only)
    found = sn.evidence_forking(bank, 3000)
    assert judge("forking-paths", found).verdict == "not reproduced"


def test_every_analyst_is_a_subset():
    p = sn.forking(*sn.null_studies(planted(SMALL), 500))
    reports = [f.reports(p) for f in sn.STEPWISE.values()]
    for less, more in zip(reports, reports[1:], strict=False):
        assert (more >= less).all()
    for freedom in sn.SINGLY.values():
        assert (freedom.reports(p) >= reports[0]).all()
    with pytest.raises(ValueError, match="seeds or more"):
        sn.forking(np.zeros((2, 5, 3, 4)), np.zeros((2, 5, 3, 4)))


def test_large_effects_replicate_small_ones_do_not():
    slug = "replications-fail-like-elsewhere"
    small = sn.evidence_replications(planted(MODERATE + SMALL))
    assert judge(slug, small).verdict == "reproduced"
    # seeds that hardly vary: every trick is far beyond the threshold
    bank = planted((1.1, 1.15, 1.2, 1.18, 1.12))
    sure = sn.evidence_replications(bank)
    share = 1 - sure["share_5"][0].sum() / sure["share_5"][1].sum()
    assert share < 1 - small["share_5"][0].sum() / small["share_5"][1].sum()


def test_without_a_threshold_findings_replicate(monkeypatch):
    bank = planted(tuple(np.linspace(1.0, 1.19, 12)))
    slug = "replications-fail-like-elsewhere"
    found = sn.evidence_replications(bank)
    assert judge(slug, found)["share_5"]["outcome"] == "supports"
    monkeypatch.setattr(sn.Studies, "p", property(
        lambda self: np.zeros_like(self.effect)))
    found = sn.evidence_replications(bank)
    verdict = judge(slug, found)
    for name in ("share_3", "share_5", "ratio_3", "ratio_5"):
        assert verdict[name]["outcome"] == "refutes"


def test_replication_rate_is_the_theorys():
    bank = planted((0.8,))
    published, again, first, second = sn.replications(bank, 0, 5, 40_000)
    law = selected(0.8, 5)
    assert abs(again / published - law.up) < 0.03
    assert abs(first / law.mean_up - 1) < 0.05
    assert abs(second / 0.8 - 1) < 0.05


def test_nulls_matter_until_power_is_high():
    found = sn.evidence_nulls(planted(2 * MODERATE), 200, 4)
    verdict = judge("nulls-repair-the-record", found)
    assert verdict["k3"]["outcome"] == verdict["k5"]["outcome"] == "supports"
    assert verdict["n95"]["estimate"] > 0.85
    for name in ("random_3", "random_5"):
        assert verdict[name]["outcome"] == "supports"


def test_without_selection_nulls_repair_nothing(monkeypatch):
    monkeypatch.setattr(sn.Studies, "p", property(
        lambda self: np.zeros_like(self.effect)))
    found = sn.evidence_nulls(planted(2 * MODERATE), 100, 1)
    verdict = judge("nulls-repair-the-record", found)
    assert verdict["k3"]["outcome"] == verdict["k5"]["outcome"] == "refutes"
    assert verdict.verdict != "reproduced"


def test_an_editor_who_prints_everything_repairs_the_slope(monkeypatch):
    gains = planted(MODERATE + SMALL).gains
    records = sn.write_records(gains, 60)
    slug = "speed-needs-standards"
    found = sn.evidence_speed(gains, records)
    assert judge(slug, found).verdict == "reproduced"
    # all studies preregistered, all published: nothing is left to lose
    sealed = {k: (pair[0], pair[0]) for k, pair in records.items()}
    monkeypatch.setattr(sn, "read", lambda studies, nulls, alpha=0.05: (
        studies.effect.mean(-1),
        np.full(studies.effect.shape[:2], studies.effect.shape[2])))
    verdict = judge(slug, sn.evidence_speed(gains, sealed))
    assert verdict.verdict != "reproduced"
    assert verdict["none"]["estimate"] == 0
    assert verdict["none"]["outcome"] != "supports"


def test_where_metrics_conflict_size_does_harm():
    """An honest but conflicting metric turns the claim around."""
    bank = planted(MODERATE + SMALL)
    at = list(sn.METRICS).index("ece")
    values = bank.values.copy()
    values[1:, :, :, at] -= 0.004 * np.arange(1, 14)[::-1, None, None]
    bank = replace(bank, values=values)
    records = sn.write_records(bank.gains, 60)
    found = sn.evidence_speed(bank.gains, records)
    verdict = judge("speed-needs-standards", found)
    assert verdict.verdict == "not reproduced"


def test_the_split_does_not_matter_when_all_is_published():
    gains = planted(MODERATE).gains
    runs = np.random.default_rng(0).integers(0, 128, (5, 7, 120))
    means = [sn.read(sn.report(gains, runs, k)[0], True)[0]
             for k in sn.SPLITS]
    assert np.ptp(means, axis=0).max() < 1e-12
    with pytest.raises(ValueError, match="divisor"):
        sn.report(gains, runs, 7)


def test_flexible_reports_never_look_worse():
    gains = planted(SMALL).gains
    runs = np.random.default_rng(0).integers(0, 128, (20, 6, 120))
    for k in (3, 15):
        fixed, free = sn.report(gains, runs, k)
        assert (free.p_up <= fixed.p_up + 1e-12).all()


def test_policy_and_its_silent_control():
    gains = planted(MODERATE + SMALL).gains
    records = sn.write_records(gains, 80, splits=(3, 15))
    found = sn.evidence_policy(gains, records)
    verdict = judge("policy-signal-at-equal-compute", found)
    assert verdict["prereg"]["outcome"] == "supports"
    assert verdict["nulls"]["outcome"] == "supports"
    assert verdict["noiseless"]["outcome"] == "supports"
    # by arithmetic: nothing left to gain from size once all is told
    assert np.abs(found["power_full"]).max() < 1e-9
    # analysts without a choice: preregistration has nothing to mend
    sealed = {k: (pair[0], pair[0]) for k, pair in records.items()}
    verdict = judge(
        "policy-signal-at-equal-compute",
        sn.evidence_policy(gains[..., :1], sealed))
    assert verdict["prereg"]["outcome"] != "supports"
    assert verdict.verdict != "reproduced"
    # tricks without any effect leave nothing to regret
    none = planted((0.0,) * 6)
    cells = sn.factorial(
        sn.write_records(none.gains, 20, splits=(3, 15)), none.true)
    assert max(np.abs(v[1]).max() for v in cells.values()) < 1e-9


def test_regret_by_hand():
    true = np.array([1.0, 3.0, -2.0])
    estimate = np.array([[5.0, 1, 0], [0, 0, 0], [0, 0, 4]])
    count = np.array([[1, 1, 1], [0, 0, 0], [0, 0, 2]])
    assert sn.regret(estimate, count, true).tolist() == [2, 3, 5]


def test_records_are_reproducible():
    gains = planted(SMALL).gains
    one, two = (sn.write_records(gains, 5, 3, (5,))[5][1] for _ in "ab")
    assert np.array_equal(one.effect, two.effect)
    other = sn.write_records(gains, 5, 4, (5,))[5][1]
    assert not np.array_equal(one.effect, other.effect)


def test_shuffled_labels_leave_nothing_to_find(task):
    """The mechanism is broken where there is nothing to learn."""
    shuffled = replace(task, data=replace(
        task.data, y=task.data.shuffle_labels(1000).y))
    arms = {k: sn.ARMS[k] for k in ("baseline", "smoothing", "tanh")}
    bank = sn.train_bank(arms, range(1000, 1024), shuffled)
    assert abs(bank.base.mean() - 10) < 2
    assert np.abs(bank.true).max() < 2
