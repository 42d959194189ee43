"""Phases against closed forms, memories against plain loops, planted verdicts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from reappraisal.dynamics import noisy_labels_early_and_streaming as m
from reappraisal.lab import data, models
from reappraisal.lab.ensemble import Adam, train
from reappraisal.protocol.claims import Claim

DIGITS = data.load("digits")
X = DIGITS.X.float().flatten(1)
DIGITS = replace(DIGITS, X=(X - X.mean()) / X.std())


@pytest.mark.parametrize(("sigma", "flip"), [(0.15, 0.2), (0.3, 0.1),
                                             (0.25, 0.35)])
def test_first_step_is_the_closed_form(sigma, flip):
    cloud = m.two_clusters(range(60), 100, 300, sigma, flip)
    path = m.logistic_path(cloud, 1)
    cosine, share = m.first_step(100, 300, sigma, flip)
    assert path.cosine[:, 0].mean() == pytest.approx(cosine, abs=0.02)
    assert path.share[:, 0].mean() == pytest.approx(share, abs=0.05)


def test_clusters_are_as_asked():
    c = m.two_clusters([3], 4000, 30, 0.2, 0.25)
    assert (c.label != c.clean).double().mean() == 0.25
    along = (c.x[0] @ c.direction[0]) * c.clean[0]
    assert along.mean() == pytest.approx(1, abs=0.02)
    rest = c.x[0] - (c.clean[0][:, None] * c.direction[0])
    assert rest.std() == pytest.approx(0.2, abs=0.005)


def test_early_phase_needs_information_and_memory_needs_dimensions():
    main = m.logistic_path(m.two_clusters([1, 2], 60, 240, 0.15, 0.2), 600)
    assert (main.share[:, 0] > 0.9).all() and (main.share[:, -1] == 0).all()
    lost = m.logistic_path(m.two_clusters([1, 2], 60, 240, 0.15, 0.5), 600)
    assert (lost.share[:, :60].mean(1) < 0.4).all()
    many = m.two_clusters([1, 2], 600, 6, 0.15, 0.2)
    flat = m.logistic_path(many, 400)
    assert (flat.share[:, -1] == 1).all()
    fitted = LogisticRegression(C=1e6, fit_intercept=False).fit(
        many.x[0].numpy(), many.label[0].numpy()).coef_[0]
    w = flat.weights[0].numpy()
    assert w @ fitted / np.linalg.norm(w) / np.linalg.norm(fitted) > 0.98


def test_elr_term_pulls_towards_the_past():
    g = models.generator(0, "elr")
    z = torch.randn(3, 6, 5, generator=g, dtype=torch.float64)
    t = torch.randn(3, 6, 5, generator=g, dtype=torch.float64).softmax(-1)
    rule = m.ELR((3, 6, 5), 1.0, 0.5)
    z.requires_grad_()
    (got,) = torch.autograd.grad(rule.term(z, t).sum(), z)
    p = z.detach().softmax(-1)
    inner = (p * t).sum(-1, keepdim=True)
    torch.testing.assert_close(got, -p * (t - inner) / (1 - inner))
    stepped = z.detach() - 0.1 * got
    assert (((stepped.softmax(-1) - p) * t).sum(-1) > 0).all()


def elr_run(lam, shuffle=False, steps=150):
    noisy = DIGITS.subset(range(200)).corrupt_labels(0.4, 1)
    partner = torch.randperm(200, generator=models.generator(
        0, "p"))[None] if shuffle else None
    rule = m.ELR((1, 200, 10), lam, 0.9, partner)
    e = train(models.mlp([64, 64, 10]), (noisy.X, noisy.y), steps=steps,
              loss=rule, optimiser=Adam(0.005), seeds=[1])
    out = e.member(0)(noisy.X).argmax(-1)[None]
    test = e.member(0)(DIGITS.X[300:]).argmax(-1) == DIGITS.y[300:]
    curves = m.phase_curves(out, noisy.y[None], noisy.clean[None])
    return curves["memorised"].item(), test.float().mean().item(), e


def test_elr_forgets_lies_only_with_its_own_targets():
    plain, held, other = elr_run(0.0), elr_run(4.0), elr_run(4.0, True)
    assert plain[0] > 0.9 > 0.4 > held[0]
    assert held[1] > plain[1] + 0.05 and other[1] < held[1] - 0.05
    again = elr_run(4.0)[2]
    for k, v in again.params.items():
        assert torch.equal(v, held[2].params[k])


def test_without_strength_elr_is_cross_entropy():
    noisy = DIGITS.subset(range(50))
    e = train(models.mlp([64, 16, 10]), (noisy.X, noisy.y), steps=20,
              optimiser=Adam(0.01), seeds=[4])
    rule = m.ELR((1, 50, 10), 0.0, 0.7)
    f = train(models.mlp([64, 16, 10]), (noisy.X, noisy.y), steps=20,
              optimiser=Adam(0.01), seeds=[4], loss=rule)
    for k, v in e.params.items():
        torch.testing.assert_close(v, f.params[k], atol=1e-5, rtol=1e-4)


def test_rivals():
    z = torch.randn(2, 8, 4, generator=models.generator(2, "z"))
    y = torch.randint(4, (2, 8), generator=models.generator(2, "y"))
    ce = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(m.bootstrapping(0.0)(z, y), ce.view(2, 8))
    guess = z.argmax(-1)
    torch.testing.assert_close(
        m.bootstrapping(1.0)(z, y), m.bootstrapping(0.0)(z, guess))
    teach = m.CoTeaching(0.5, 1)
    torch.testing.assert_close(teach(z, y), ce.view(2, 8))  # nothing left out
    second = teach(z, y)
    for mine, other in ((0, 1), (1, 0)):
        easy = ce.view(2, 8)[other].argsort()[:4]
        assert set(second[mine].nonzero().flatten().tolist()) == set(
            easy.tolist())


def test_phase_curves_by_counting():
    g = models.generator(0, "curves")
    guess, given, clean = (torch.randint(3, (2, 50), generator=g)
                           for _ in range(3))
    got = m.phase_curves(guess, given, clean)
    for s in range(2):
        rows = list(zip(guess[s].tolist(), given[s].tolist(),
                        clean[s].tolist(), strict=True))
        lies = [r for r in rows if r[1] != r[2]]
        assert got["memorised"][s] == pytest.approx(
            sum(a == b for a, b, _ in lies) / len(lies))
        assert got["corrected"][s] == pytest.approx(
            sum(a == c for a, _, c in lies) / len(lies))


def stream(noise=0.4, seeds=(0, 1), length=500, blur=0.1):
    s = m.fuzzy_tasks(DIGITS, seeds, noise=noise, length=length, blur=blur)
    test = torch.stack([
        torch.tensor(sorted(set(range(len(DIGITS))) - set(r.tolist())))
        for r in s.rows])
    return s, test


def run(names, noise=0.4, length=500, **more):
    s, test = stream(noise, length=length)
    return m.run_stream(models.mlp([64, 32, 10]), DIGITS, s,
                        {k: m.POLICIES[k] for k in names}, [0, 1], test,
                        memory=60, **more)


def test_streams_are_fuzzy_and_noisy_as_asked():
    sharp, _ = stream(0.0, blur=0.0)
    assert torch.equal(sharp.labels, sharp.clean)
    for s in range(2):
        for t in range(5):
            assert len(sharp.clean[s][sharp.task[s] == t].unique()) == 2
        assert len(sharp.rows[s].unique()) == 500
    other, _ = stream(0.2, blur=0.3)
    assert (other.labels != other.clean).double().mean() == 0.2
    home = [other.clean[0][other.task[0] == t].unique() for t in range(5)]
    assert max(map(len, home)) > 4


def test_reservoir_is_uniform_over_arrivals():
    """What is kept of 300 arrivals has the mean of a uniform draw."""
    S, g = 200, models.generator(0, "luck")
    memory = m._Memory([m.POLICIES["reservoir"]], S, 30, 1, 10, "cpu")
    none, label = torch.zeros(S), torch.zeros(S, dtype=torch.long)
    for t in range(300):
        slot = memory.slot(label, none, none, none,
                           torch.rand(S, 31, generator=g),
                           torch.rand(S, generator=g), t)
        memory.put(slot, torch.full((S, 1), float(t)), label, label == 0,
                   none, none, none, none)
    kept = memory.x[..., 0]
    assert kept.mean() == pytest.approx(149.5, abs=3 * 86.6 / 6000**0.5)
    assert all(len(row.unique()) == 30 for row in kept)


def test_memories_do_what_their_switches_say():
    r = run(["reservoir", "balanced reservoir", "NTD", "no debiasing",
             "oracle"])
    assert (r.counts.sum(-1) == 60).all()
    for name in ("balanced reservoir", "NTD", "oracle"):
        counts = r.counts[r.names.index(name)]
        assert (counts.amax(-1) - counts.amin(-1)).max() <= 3
    spread = r.counts[r.names.index("no debiasing")]
    assert (spread.amax(-1) - spread.amin(-1)).min() > 3
    assert (r["oracle"]["purity"] > r["reservoir"]["purity"] + 15).all()
    assert r["oracle"]["purity"].mean() == r.purity.mean(1).max()


def test_mechanism_off_is_a_no_op_or_no_gain():
    r = run(["no views", "same views", "permuted", "NTD", "reservoir"],
            length=1200, rate=0.01)
    for key in ("purity", "accuracy", "worst"):
        np.testing.assert_array_equal(r["no views"][key],
                                      r["same views"][key])
    pure = {k: r[k]["purity"].mean() for k in r.names}
    assert pure["permuted"] < pure["reservoir"] + 5 < pure["NTD"]
    clean = run(["NTD", "reservoir"], noise=0.0)
    assert (clean.purity == 100).all()


def test_policies_do_not_touch_each_other():
    alone = run(["reservoir"])["reservoir"]
    among = run(["NTD", "reservoir"])["reservoir"]
    for k in alone:
        np.testing.assert_allclose(alone[k], among[k], atol=1.0)
    again = run(["reservoir"])["reservoir"]
    for k in alone:
        np.testing.assert_array_equal(alone[k], again[k])


def test_passes_are_counted():
    count = {k: p.passes(150, 10, 32) for k, p in m.POLICIES.items()}
    assert count["reservoir"] == count["oracle"] == pytest.approx(6.4)
    assert count["NTD"] == pytest.approx(4 + 6.4)
    assert count["no views"] == pytest.approx(1 + 6.4)
    assert count["purity and diversity"] == pytest.approx(16 + 6.4)


def test_two_means_splits_a_mixture():
    g = models.generator(0, "mix")
    low = 0.1 + 0.02 * torch.randn(3, 40, generator=g)
    high = 0.8 + 0.02 * torch.randn(3, 20, generator=g)
    cut = m.two_means(torch.cat([low, high], 1))
    assert (cut > low.amax(1, keepdim=True)).all()
    assert (cut < high.amin(1, keepdim=True)).all()


def judged(slug, evidence, n):
    return Claim.load(slug).judge(
        evidence, scale="book", seeds=range(1000, 1000 + n)).verdict


def noisy(**means):
    rng = np.random.default_rng(0)
    return {k: rng.normal(v, s, n) for k, (v, s, n) in means.items()}


@pytest.mark.parametrize(("passing", "off", "lost", "verdict"), [
    (20, 0.01, 0.05, "reproduced"), (15, 0.01, 0.05, "not reproduced"),
    (19, 0.01, 0.05, "inconclusive"), (20, 0.1, 0.05, "not reproduced"),
    (20, 0.01, 0.8, "invalid")])
def test_linear_planted(passing, off, lost, verdict):
    found = noisy(independent=(0.5 - lost, 0.01, 20), few=(0.1, 0.001, 20))
    found |= {"both": np.arange(20) < passing, "cosine": off}
    assert judged("D206/early-learning-even-linear", found, 20) == verdict


@pytest.mark.parametrize(("how", "verdict"), [
    ({}, "reproduced"), ({"gain": 0.0}, "not reproduced"),
    ({"stopped": -4.0}, "not reproduced"), ({"kept": 0.6}, "not reproduced"),
    ({"memorised": 0.5}, "invalid"), ({"shuffled": 20.0}, "invalid"),
    ({"clean": 5.0}, "invalid")])
def test_elr_planted(how, verdict):
    h = {"gain": 20.0, "stopped": 0.0, "kept": 0.1, "memorised": 0.99,
         "shuffled": 0.0, "clean": 0.0} | how
    found = noisy(
        memorised=(h["memorised"] - 0.9, 0.01, 32), gain=(h["gain"], 1, 32),
        stopped=(h["stopped"], 1, 32), share=(0.25 - h["kept"], 0.02, 32),
        clean=(1 - h["clean"], 0.3, 32), clean_equal=(h["clean"], 0.3, 32),
        shuffled=(5 - h["shuffled"], 1, 32))
    assert judged("D206/elr-prevents-memorisation", found, 32) == verdict


@pytest.mark.parametrize(("how", "verdict"), [
    ({}, "reproduced"), ({"gain": 0.0}, "not reproduced"),
    ({"accuracy": -5.0}, "not reproduced"), ({"passes": 0.7},
                                             "not reproduced"),
    ({"no_noise": 5.0}, "invalid"), ({"permuted": 20.0}, "invalid")])
def test_memory_planted(how, verdict):
    h = {"gain": 20.0, "accuracy": 1.0, "passes": 0.4, "no_noise": 0.0,
         "permuted": 0.0} | how
    found = noisy(
        reservoir=(h["gain"], 3, 24), balanced=(h["gain"], 3, 24),
        accuracy=(h["accuracy"], 1, 24), no_noise=(h["no_noise"], 0.5, 24),
        permuted=(-h["permuted"], 2, 24))
    assert judged("D097/ntd-purer-memory-cheaper",
                  found | {"passes": h["passes"]}, 24) == verdict


@pytest.mark.parametrize(("views", "other", "same", "verdict"), [
    (2.0, 10.0, 0.0, "reproduced"), (0.0, 10.0, 0.0, "not reproduced"),
    (2.0, -10.0, 0.0, "not reproduced"), (2.0, 10.0, 1.0, "invalid")])
def test_parts_planted(views, other, same, verdict):
    found = noisy(
        grouping=(2, 0.5, 24), views=(views, 0.5, 24),
        debiasing=(10, 1, 24), worst_grouping=(10, 2, 24),
        worst_views=(other, 2, 24))
    assert judged("D097/each-part-earns-its-place",
                  found | {"same": same}, 24) == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: m.ELR((1, 2, 3), 1.0, 1.0), "beta: got"),
    (lambda: m.CoTeaching(0.2, 5)(torch.zeros(3, 4, 2), None),
     "outputs: got 3"),
    (lambda: m.fuzzy_tasks(DIGITS, [0], length=5000), "length: got 5000"),
    (lambda: m.fuzzy_tasks(DIGITS, [0], n_tasks=20), "n_tasks: got 20"),
    (lambda: m.run_stream(None, DIGITS, stream()[0], m.POLICIES, [0], None),
     "seeds: got 1"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
