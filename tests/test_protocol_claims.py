"""From a registration to a verdict: planted effects, nulls, and bad input."""

import copy
import json
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reappraisal.protocol import claims as c
from reappraisal.protocol.criteria import Finding, decide, parse
from reappraisal.protocol.ledger import claim_p, recheck
from reappraisal.protocol.logic import Outcome
from reappraisal.protocol.papers import (
    load_papers,
    registrations_dir,
    to_bibtex,
)
from reappraisal.protocol.verdicts import MIME, Verdict

ENTRY = yaml.safe_load("""
id: A02/made-up
chapter: made-up
registered: 2026-11-21
statement: The treatment saves at least half a unit.
measure: units saved per replicate
in_words: the 95% interval of the mean lies above 0.5
seeds: {smoke: 6, book: 24}
criteria:
  saving: {estimator: mean, sesoi: 0.5, refutes_below: 0.2, unit: units}
  placebo: {estimator: mean, kind: equivalence, margin: 0.2, unit: units}
  shown: {estimator: median, supports_above: 0.0}
rule: saving
control: {statement: A placebo saves nothing., rule: placebo}
qualify:
- {if: {saving: refutes, shown: supports}, say: smaller than claimed}
scales:
  smoke: {criteria: {saving: {sesoi: 0.4}}}
""")
SEEDS = range(1000, 1024)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(registrations_dir() / "papers.yml", tmp_path)
    write(tmp_path, ENTRY)
    return tmp_path


def write(folder, *entries, room="made"):
    text = yaml.safe_dump({"room": room, "claims": list(entries)})
    (folder / f"{room}.yml").write_text(text)


def judge(folder, saving, placebo=0.0, n=24, scale="book", seed=0):
    rng = np.random.default_rng(seed)
    claim = c.Claim.load("A02/made-up", folder)
    treated = rng.normal(saving, 0.1, n)
    evidence = {
        "saving": treated,
        "placebo": rng.normal(placebo, 0.1, n),
        "shown": treated,
    }
    return claim.judge(evidence, scale=scale, seeds=list(SEEDS)[:n], seconds=1)


def test_planted_effect_planted_null_and_leaking_control(folder):
    assert judge(folder, 0.8).verdict == "reproduced"
    null = judge(folder, 0.0)
    assert null.verdict == "not reproduced" and not null.record["reversed"]
    assert judge(folder, 0.8, placebo=0.8).verdict == "invalid"
    backwards = judge(folder, -0.8)
    assert backwards.label == "reversed"
    between = judge(folder, 0.35)
    assert between.verdict == "inconclusive"
    assert between["saving"]["replicates_needed"] is None
    assert judge(folder, 0.1).label == "not reproduced: smaller than claimed"


def test_an_undecided_control_blocks_reproduced_only(folder):
    assert judge(folder, 0.8, placebo=0.2).verdict == "inconclusive"
    assert judge(folder, 0.0, placebo=0.2).verdict == "not reproduced"


def test_scales_have_their_own_bounds(folder):
    assert judge(folder, 0.45, n=6, scale="smoke").record["scale"] == "smoke"
    assert judge(folder, 0.6, n=6, scale="smoke")["saving"]["sesoi"] == 0.4
    assert judge(folder, 0.6)["saving"]["sesoi"] == 0.5
    with pytest.raises(ValueError, match="no seeds at scale 'paper'"):
        judge(folder, 0.6, scale="paper")


def test_deviation_from_the_registered_number_is_said_and_refused(folder):
    verdict = judge(folder, 0.8, n=12)
    assert verdict.record["deviations"] == [
        "12 seeds instead of the 24 registered"
    ]
    claim = c.Claim.load("A02/made-up", folder)
    assert "used 12 seeds" in recheck(verdict, claim)[0]
    assert recheck(judge(folder, 0.8), claim) == []


def test_pilot_seeds_are_refused(folder):
    claim = c.Claim.load("A02/made-up", folder)
    for seeds in ([999], [], [1000, 1000]):
        with pytest.raises(ValueError, match="seeds must be distinct"):
            claim.judge({}, scale="book", seeds=seeds)


def test_evidence_must_match_the_registration(folder):
    claim = c.Claim.load("A02/made-up", folder)
    with pytest.raises(ValueError, match=r"missing \['placebo', 'shown'\]"):
        claim.judge({"saving": [1, 2]}, scale="book", seeds=[1000])
    data = dict.fromkeys(ENTRY["criteria"], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"not registered \['more'\]"):
        claim.judge(data | {"more": [1]}, scale="book", seeds=[1000])
    with pytest.raises(ValueError, match="A02/made-up: criterion 'saving'"):
        claim.judge(data | {"saving": [1, np.nan]}, scale="book", seeds=[1000])


@pytest.mark.parametrize("effect, most", [(0.5, 0.025), (0.3, 0.001)])
def test_nulls_are_called_reproduced_at_no_more_than_alpha(folder, effect, most):
    """True saving at the bound, or below it: 600 experiments."""
    trials = 600
    called = [judge(folder, effect, n=8, scale="book", seed=i).verdict
              for i in range(trials)]
    share = called.count("reproduced") / trials
    assert share <= most + 3 * (most * (1 - most) / trials) ** 0.5


def test_verdict_survives_json_and_says_the_same_twice(folder):
    verdict = judge(folder, 0.8)
    again = Verdict.from_json(verdict.to_json())
    assert again == verdict == judge(folder, 0.8)
    bundle = verdict._repr_mimebundle_()
    assert bundle[MIME] == json.loads(verdict.to_json())
    assert bundle["text/html"] == again._repr_html_()
    assert set(bundle) == {"text/plain", "text/html", MIME}
    wanted = {"schema", "claim", "paper", "verdict", "scale", "criteria",
              "control", "n", "seeds", "seconds", "versions", "registration",
              "amended"}
    assert wanted <= set(verdict.record)


# --- silent changes ----------------------------------------------------------


def test_a_moved_threshold_is_noticed_and_an_amended_one_is_not(folder):
    assert c.changed_silently(folder) == [
        "A02/made-up: has no stored hash (`reappraisal register`)"
    ]
    assert c.register(folder) == ["A02/made-up"]
    assert c.changed_silently(folder) == []
    moved = copy.deepcopy(ENTRY)
    moved["criteria"]["saving"]["sesoi"] = 0.1
    moved["criteria"]["saving"]["refutes_below"] = 0.05
    write(folder, moved)
    assert c.register(folder) == []
    assert "without an amendment" in c.changed_silently(folder)[0]
    moved["amendments"] = [
        {"date": "2026-12-01", "reason": "undecidable",
         "field": "criteria.saving.sesoi", "old": 0.5, "new": 0.1},
        {"date": "2026-12-01", "reason": "undecidable",
         "field": "criteria.saving.refutes_below", "old": 0.2, "new": 0.05},
    ]
    write(folder, moved)
    assert c.changed_silently(folder) == []
    claim = c.Claim.load("A02/made-up", folder)
    assert claim.amended and "undecidable" in claim._repr_html_()
    assert judge(folder, 0.8).record["amended"]


def test_fields_added_or_removed_by_an_amendment_can_be_undone():
    entry = {"id": "x", "criteria": {"a": {"sesoi": 1}}}
    first = c.registration_hash(entry)
    changed = copy.deepcopy(entry)
    changed["criteria"]["a"] = {"sesoi": 1, "at_least": 2}
    base = {"date": "2026-12-01", "reason": "why"}
    changed["amendments"] = [base | {"field": "criteria.a.at_least", "new": 2}]
    assert c.registration_hash(c.original(changed)) == first
    changed["criteria"]["a"] = {}
    changed["amendments"] = [base | {"field": "criteria.a.sesoi", "old": 1}]
    assert c.registration_hash(c.original(changed)) == first


def test_a_claim_that_vanishes_is_noticed(folder):
    c.register(folder)
    write(folder, ENTRY | {"id": "A02/other"})
    assert c.changed_silently(folder)[0] == "A02/made-up: was registered and is gone"


@given(st.permutations(list(ENTRY)))
def test_hash_does_not_depend_on_layout(keys):
    assert c.registration_hash({k: ENTRY[k] for k in keys}) == \
        c.registration_hash(ENTRY)


# --- malformed registrations -------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"measure": None}, "measure: must be text"),
        ({"sesoi": 1}, "sesoi: unknown field"),
        ({"id": "Z99/made-up"}, "id: must be"),
        ({"seeds": {"books": 3}}, "seeds: maps"),
        ({"registered": "soon"}, "registered: must be a date"),
        ({"criteria": {}}, "criteria: expected at least one"),
        ({"criteria": {"saving": {"estimator": "mode", "sesoi": 1}}},
         "criteria.saving.estimator: unknown 'mode'"),
        ({"criteria": {"saving": {"estimator": "mean"}}},
         "criteria.saving.sesoi: missing"),
        ({"criteria": {"saving": {"kind": "magic"}}},
         "criteria.saving.kind: 'magic'"),
        ({"rule": {"xor": ["saving"]}}, "rule: unknown rule node 'xor'"),
        ({"rule": "savings"}, r"rule: names \['savings'\]"),
        ({"rule": "placebo"}, "rule: shares every criterion"),
        ({"control": {"statement": "none"}}, "control: needs exactly"),
        ({"qualify": [{"if": {"saving": "maybe"}, "say": "x"}]}, r"qualify\[0\]"),
        ({"amendments": [{"field": "rule", "old": 1, "date": "d"}]},
         "amendments: .*reason: missing"),
    ],
)
def test_bad_registrations_name_file_claim_and_field(folder, changes, message):
    write(folder, ENTRY | changes)
    with pytest.raises(c.RegistrationError, match=message) as error:
        c.load_claims(folder)
    assert "made.yml" in str(error.value)


def test_missing_field_duplicate_id_and_wrong_room(folder):
    for key in ("statement", "criteria", "control", "seeds"):
        write(folder, {k: v for k, v in ENTRY.items() if k != key})
        with pytest.raises(c.RegistrationError, match=f"A02/made-up: {key}: missing"):
            c.load_claims(folder)
    write(folder, ENTRY, ENTRY)
    with pytest.raises(c.RegistrationError, match="registered twice"):
        c.load_claims(folder)
    (folder / "made.yml").write_text("room: other\nclaims: []\n")
    with pytest.raises(c.RegistrationError, match="room: is 'other'"):
        c.load_claims(folder)
    (folder / "made.yml").write_text("room: made\nclaims: [\n")
    with pytest.raises(ValueError, match="made.yml: not valid YAML"):
        c.load_claims(folder)


def test_unknown_claim_names_the_nearest(folder):
    with pytest.raises(KeyError, match="nearest: A02/made-up"):
        c.Claim.load("A02/made-out", folder)


# --- criteria ----------------------------------------------------------------

numbers = st.floats(-3, 3).map(lambda x: round(x, 3))


@settings(max_examples=60)
@given(numbers, st.floats(0.01, 1), st.integers(4, 40), st.integers(0, 99))
def test_interval_and_p_value_never_disagree(mean, sd, n, seed):
    criterion = parse("x", {"estimator": "mean", "supports_above": 0.2}, 0.05)
    data = np.random.default_rng(seed).normal(mean, sd, n)
    found = decide({"x": criterion}, {"x": data})["x"]
    assert (found.p < 0.025) == (found.outcome is Outcome.SUPPORTS)


def test_every_kind_supports_refutes_and_stays_open():
    def outcome(entry, estimate=0.0, lo=0.0, hi=0.0, p=None, p_reversed=None):
        criterion = parse("x", entry, 0.05)
        return Finding(criterion, estimate, lo, hi, criterion.level, p, 9,
                       "", p_reversed).outcome.value

    same = {"kind": "equivalence", "estimator": "mean", "margin": 0.2}
    assert outcome(same, 0, -0.1, 0.1) == "supports"
    assert outcome(same, 0, -0.1, 0.3) == "undecided"
    assert outcome(same, 0, 0.21, 0.3) == "refutes"
    fine = {"kind": "noninferiority", "estimator": "mean", "margin": 0.2}
    assert outcome(fine, 0, -0.1, 0.9) == "supports"
    assert outcome(fine, 0, -0.3, 0.9) == "undecided"
    assert outcome(fine, 0, -0.5, -0.3) == "refutes"
    trend = {"kind": "trend", "test": "page"}
    assert outcome(trend, p=0.01, p_reversed=0.99) == "supports"
    assert outcome(trend, p=0.4, p_reversed=0.6) == "undecided"
    assert outcome(trend, p=0.99, p_reversed=0.01) == "refutes"
    test = {"kind": "test", "test": "logrank", "refutes_above": 0.5}
    assert outcome(test, p=0.04, p_reversed=0.96) == "supports"
    assert outcome(test, p=0.4, p_reversed=0.6) == "undecided"
    assert outcome(test, p=0.6, p_reversed=0.4) == "refutes"
    exact = {"kind": "exact", "tolerance": 1e-9}
    assert outcome(exact, 1e-10) == "supports"
    assert outcome(exact, 1e-8) == "refutes"
    floor = {"estimator": "mean", "supports_above": 0, "at_least": 0.5,
             "refutes_below": None}
    assert outcome(floor, 0.6, 0.1, 0.9) == "supports"
    assert outcome(floor, 0.4, 0.1, 0.9) == "undecided"
    assert outcome(floor, -0.6, -0.9, -0.1) == "undecided"


def test_a_family_is_corrected_together():
    """Holm on intervals agrees with Holm on the t-tests' p-values."""
    from scipy import stats
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(3)
    together = 0
    for _ in range(40):
        data = {f"k{i}": rng.normal(0.25 * i, 1, 12) for i in range(5)}
        family = {
            name: parse(name, {"estimator": "mean", "supports_above": 0.0,
                               "family": "ranks"}, 0.05)
            for name in data
        }
        found = decide(family, data)
        p = [stats.ttest_1samp(x, 0, alternative="greater").pvalue
             for x in data.values()]
        expected = multipletests(p, alpha=0.025, method="holm")[0]
        said = [f.outcome is Outcome.SUPPORTS for f in found.values()]
        assert said == list(expected)
        together += sum(said)
    assert together > 20


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_claim_p_matches_the_textbook_combinations(ps):
    p = {f"k{i}": v for i, v in enumerate(ps)}
    assert claim_p({"all": list(p)}, p) == max(ps)
    assert claim_p({"any": list(p)}, p) == min(1.0, min(ps) * len(ps))


# --- the project's own registrations -----------------------------------------


def test_registrations_of_the_book_are_valid_and_unchanged():
    claims = c.load_claims()
    assert claims, "nothing is registered"
    assert c.changed_silently() == []
    rooms = {p.room for p in load_papers().values()}
    assert {claim.room for claim in claims.values()} <= rooms


def test_bibliography_is_generated_from_the_list_of_papers():
    bib = registrations_dir().parent / "references.bib"
    assert bib.read_text(encoding="utf-8") == to_bibtex(load_papers())
    assert len(load_papers()) == 296


@given(
    st.floats(-2, 2), st.floats(0.01, 2), st.integers(5, 30),
    st.integers(0, 99),
)
@settings(deadline=None)
def test_an_estimate_and_a_bound_below_it_exclude_each_other(
    mean, sd, n, seed
):
    entry = {"estimator": "mean", "supports_above": 0.0, "at_least": 0.5,
             "refutes_below": 0.5}
    x = np.random.default_rng(seed).normal(mean, sd, n)
    found = decide({"a": parse("a", entry, 0.05)}, {"a": x})["a"]
    want = Outcome.UNDECIDED
    if found.lo > 0 and found.estimate >= 0.5:
        want = Outcome.SUPPORTS
    elif found.hi < 0.5:
        want = Outcome.REFUTES
    assert found.outcome is want


def test_a_bound_that_could_refute_what_supports_is_refused():
    entry = {"estimator": "mean", "supports_above": 0.0, "at_least": 0.5,
             "refutes_below": 0.6}
    with pytest.raises(ValueError, match="could do both"):
        parse("a", entry, 0.05)
