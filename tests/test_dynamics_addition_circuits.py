"""Carries by integer arithmetic, circuits by hand, planted verdicts."""

import numpy as np
import pytest
import torch

from reappraisal.dynamics import addition_circuits as c
from reappraisal.lab.ensemble import Adam, Batch, FirstStep, fit
from reappraisal.lab.models import generator
from reappraisal.protocol.claims import Claim

SEEDS = range(1000, 1006)


def every(n):
    a, b = torch.cartesian_prod(*[torch.arange(10**n)] * 2).T
    return c.questions(a, b, n)


@pytest.fixture(scope="module")
def hundred():
    return every(2)


def test_questions_spell_sums(hundred):
    tokens, answer = hundred
    a, b = tokens[:, :2], tokens[:, 3:5]
    ten = torch.tensor([10, 1])
    assert torch.equal(answer @ torch.tensor([100, 10, 1]), (a + b) @ ten)
    assert torch.equal(tokens[:, 6:], answer[:, :-1])
    assert (tokens[:, 2] == c.PLUS).all() and (tokens[:, 5] == c.EQUALS).all()


def test_automata_by_integer_arithmetic(hundred):
    tokens, answer = hundred
    assert torch.equal(c.automaton(tokens, 2, 2), answer)
    sums = c.column_sums(tokens, 2)
    assert torch.equal(sums, tokens[:, :2] + tokens[:, 3:5])
    blind = c.automaton(tokens, 2, 0)
    assert torch.equal(blind[:, 1:], sums % 10) and (blind[:, 0] == 0).all()


def test_one_column_fails_exactly_where_a_carry_passes_a_nine():
    g = generator(1, "numbers")
    a, b = torch.randint(10**5, (2, 4000), generator=g)
    tokens, answer = c.questions(a, b, 5)
    cases = c.carry_cases(tokens, 5)
    for back in range(5):
        wrong = c.automaton(tokens, 5, back) != answer
        if back == 1:
            assert torch.equal(wrong, cases == 2)
        if back:
            long = c.cascade_length(cases) >= back
            assert torch.equal(wrong.any(1), long)


def test_cases_of_sums_by_hand():
    tokens, _ = c.questions(
        torch.tensor([999, 190, 555]), torch.tensor([1, 805, 555]), 3)
    # 999 + 1: two nines in a row; 190 + 805: idle; 555 + 555: carries
    assert c.carry_cases(tokens, 3).tolist() == [
        [2, 2, 1, 0], [3, 3, 0, 0], [1, 1, 1, 0]]
    assert c.cascade_length(c.carry_cases(tokens, 3)).tolist() == [2, 0, 0]


def test_arms_have_their_frequencies():
    g = generator(4, "numbers")
    a, b = torch.randint(1000, (2, 5000), generator=g)
    cases = c.carry_cases(c.questions(a, b, 3)[0], 3)
    through = (cases == 2).any(1)
    natural, enriched, equal = (
        c.weights_of(cases, arm) for arm in ("natural", "enriched", "equal"))
    assert natural[through].sum().item() == pytest.approx(0.09, abs=0.02)
    assert enriched[through].sum().item() == pytest.approx(0.2)
    share = [(equal @ (cases[:, :-1] == k).sum(1).double()).item()
             for k in range(3)]
    assert share == pytest.approx([share[0]] * 3)
    # tilted weights depend on the numbers of cases alone
    same = (cases[:, :-1] == 0).all(1)
    assert equal[same].std() < 1e-12


def test_raking_matches_marginals_and_leaves_matched_alone():
    g = generator(2, "digits")
    want = torch.randint(10, (500, 3), generator=g)
    have = torch.randint(10, (2, 3000, 3), generator=g).amax(0)
    w = c.raked(want, have, 100)
    for x, y in zip(want.T, have.T, strict=True):
        target = x.bincount(minlength=10) / 500
        assert (y.bincount(w, minlength=10) - target).abs().max() < 1e-3
    torch.testing.assert_close(
        c.raked(have, have), torch.full((3000,), 1 / 3000).double())


@pytest.mark.parametrize("n", [2, 4])
def test_the_hand_coded_adder_looks_back_one_column(n):
    g = generator(3, "numbers")
    a, b = torch.randint(10**n, (2, 600), generator=g)
    tokens, _ = c.questions(a, b, n)
    said = c.automaton(tokens, n, 1)
    net = c.look_back_one(n)
    scores, share = c.read(net, tokens, n, 1)
    assert torch.equal(scores[0].argmax(-1), said)
    stream, seen = c.streams(n)
    assert (share[0, :, 0][:, ~seen] == 0).all()
    inside, outside = c.stream_damage(net, tokens, said, n, 1)
    assert (inside > 1).all() and outside.abs().max() < 1e-9


def test_stream_of_each_digit():
    stream, seen = c.streams(2)  # a1 a0 + b1 b0 = s2 s1
    assert stream.int().tolist() == [
        [1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 0]]
    assert seen.sum(1).tolist() == [6, 7, 8]


def test_attention_is_causal_and_networks_do_not_mix():
    net = c.fresh(2, [1, 2], depth=2)
    tokens = every(2)[0][::997]
    whole, share = c.read(net, tokens, 2, 3)
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % 10  # what only the last digit sees
    changed, _ = c.read(net, later, 2, 3)
    torch.testing.assert_close(changed[:, :, :-1], whole[:, :, :-1])
    assert not torch.allclose(changed[:, :, -1], whole[:, :, -1])
    one = {k: v[1:] for k, v in net.items()}
    torch.testing.assert_close(c.read(one, tokens, 2, 3)[0], whole[1:])
    own = torch.stack([tokens, later])
    both, _ = c.read(net, own, 2, 3)
    torch.testing.assert_close(both[0], whole[0])
    torch.testing.assert_close(both[1], changed[1])


def test_ablation_of_nothing_and_of_everything():
    net = {k: 2 * v for k, v in c.fresh(2, [1]).items()}
    tokens, answer = (x[::97] for x in every(2))
    whole, _ = c.read(net, tokens, 2, 3)
    none, _ = c.read(net, tokens, 2, 3, cut=torch.zeros(3, 8))
    torch.testing.assert_close(none, whole)
    still, _ = c.read(net, tokens, 2, 3, still=torch.ones(
        3, 3, dtype=torch.bool))
    # the first digit's position sees no other question's numbers then
    torch.testing.assert_close(
        still[:, :, 0], still[:, :1, 0].expand_as(still[:, :, 0]))
    damage = c.head_damage(net, tokens, answer, 2, 3)
    assert damage.shape == (1, 3, 3) and damage.abs().max() > 1e-3


def test_a_small_network_learns_and_repeats():
    tokens, answer = every(1)

    def loss(params, batch):
        return c.nats(c.read(params, tokens, 1, 3)[0], answer).mean((1, 2))

    def once():
        return fit(c.fresh(1, [1, 2]), loss, optimiser=Adam(lr=0.01),
                   steps=150)

    run = once()
    assert (loss(run.params, Batch(0, torch.arange(2))) < 0.1).all()
    assert torch.equal(run.params["out"], once().params["out"])


def test_order_needs_strict_times():
    first = FirstStep(
        np.array([[1, 2, 9], [2, 1, 9], [1, 1, 9], [1, 9, 9]]),
        np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]], bool))
    assert c.in_order(first).tolist() == [True, False, False, False]


def judged(slug, evidence):
    return Claim.load(f"D124/{slug}").judge(
        evidence, scale="book", seeds=SEEDS)


def normal(mean, spread, size=6, seed=0):
    return np.random.default_rng(seed).normal(mean, spread, size)


@pytest.mark.parametrize(("mass", "ratio", "accuracy", "before", "verdict"), [
    (0.9, 0.02, 0.999, 0.0, "reproduced"),
    (0.5, 0.02, 0.999, 0.0, "not reproduced"),
    (0.9, 0.8, 0.999, 0.0, "not reproduced"),
    (0.9, 0.02, 0.9, 0.0, "inconclusive"),
    (0.9, 0.02, 0.999, 0.4, "invalid"),
])
def test_streams_planted(mass, ratio, accuracy, before, verdict):
    clusters = np.repeat(SEEDS, 4)

    def at(mean, seed):
        return {"values": normal(mean, 0.02, 24, seed), "clusters": clusters}

    found = judged("digit-streams", {
        "mass": at(mass, 0), "excess": at(mass - 0.32, 0),
        "damage": at(0.25 - ratio, 1), "accurate": normal(accuracy, 1e-4),
        "untrained": at(before, 2),
    })
    assert found.verdict == verdict


@pytest.mark.parametrize(("hard", "rare", "enough", "nine", "verdict", "say"), [
    (30, 30, 6, 1.0, "reproduced", None),
    (3, 30, 6, 1.0, "not reproduced", "only when rare"),
    (3, 3, 6, 1.0, "not reproduced", None),
    (3, 30, 3, 1.0, "inconclusive", "only when rare"),
    (30, 30, 3, 1.0, "inconclusive", None),
    (30, 30, 6, 5.0, "invalid", None),
])
def test_cascades_planted(hard, rare, enough, nine, verdict, say):
    found = judged("cascade-is-the-hard-case", {
        "enriched": normal(np.log(hard), 0.05),
        "rare": normal(np.log(rare), 0.05),
        "enough": (np.arange(6) < enough).astype(int),
        "nines": np.log(2) - normal(np.log(nine), 0.05),
    })
    assert (found.verdict, found.record["qualifier"]) == (verdict, say)


@pytest.mark.parametrize(("order", "equal", "later", "mixed", "verdict"), [
    (6, 5, 2.0, 0.0, "reproduced"), (1, 6, 2.0, 0.0, "not reproduced"),
    (6, 1, 2.0, 0.0, "not reproduced"), (6, 6, 1.1, 0.0, "inconclusive"),
    (6, 6, 2.0, 0.5, "invalid"),
])
def test_order_planted(order, equal, later, mixed, verdict):
    found = judged("simple-first", {
        "order": (np.arange(6) < order).astype(int),
        "equal": (np.arange(6) < equal).astype(int),
        "carry_later": normal(later, 0.05), "nine_later": normal(2, 0.05),
        "mixed": normal(mixed, 0.03),
    })
    assert found.verdict == verdict


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: c.questions(torch.tensor([100]), torch.tensor([1]), 2), "a, b:"),
    (lambda: c.weights_of(torch.zeros(3, 2).long(), "rare"), "arm: got"),
    (lambda: c.weights_of(torch.zeros(3, 2).long(), "equal"), "cases: one"),
    (lambda: c.fresh(2, [1], 10, 3), "heads: got 3"),
])
def test_bad_input(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
