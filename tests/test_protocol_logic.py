"""Three-valued logic: the rules that registrations are written in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reappraisal.protocol.logic import Outcome, at_least, evaluate, leaves

S, R = Outcome.SUPPORTS, Outcome.REFUTES
U, N = Outcome.UNDECIDED, Outcome.INAPPLICABLE
names = st.sampled_from(list("abcd"))
outcomes = st.fixed_dictionaries(
    {name: st.sampled_from([S, R, U]) for name in "abcd"}
)
trees = st.recursive(
    names,
    lambda inner: st.one_of(
        st.builds(lambda xs: {"all": xs}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda xs: {"any": xs}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda xs: {"at_least": {"k": (len(xs) + 1) // 2, "of": xs}},
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda x: {"not": x}, inner),
    ),
    max_leaves=8,
)


def boolean(tree, values):
    """Ordinary two-valued evaluation, written independently."""
    if isinstance(tree, str):
        return values[tree]
    ((key, body),) = tree.items()
    if key == "not":
        return not boolean(body, values)
    parts = body["of"] if key == "at_least" else body
    need = {"all": len(parts), "any": 1}.get(key) or body["k"]
    return sum(boolean(part, values) for part in parts) >= need


@given(trees, st.fixed_dictionaries({n: st.booleans() for n in "abcd"}))
def test_agrees_with_boolean_logic_when_everything_is_decided(tree, values):
    said = evaluate(tree, {k: S if v else R for k, v in values.items()})
    assert said is (S if boolean(tree, values) else R)


@given(trees, outcomes, st.data())
def test_deciding_an_open_part_never_overturns_a_settled_rule(tree, values, data):
    before = evaluate(tree, values)
    after = dict(values)
    for name, value in values.items():
        if value is U:
            after[name] = data.draw(st.sampled_from([S, R, U]))
    if before is not U:
        assert evaluate(tree, after) is before


@given(trees, outcomes)
def test_negation_swaps_support_and_refutation(tree, values):
    assert evaluate({"not": tree}, values) is ~evaluate(tree, values)


@given(trees, outcomes)
def test_a_side_condition_never_refutes(tree, values):
    said = evaluate({"not_refuted": tree}, values)
    assert said is (U if evaluate(tree, values) is R else S)


@pytest.mark.parametrize(
    "premise, conclusion, expected",
    [(S, S, S), (S, R, R), (S, U, U), (R, S, N), (R, R, N), (U, S, U), (U, R, U)],
)
def test_gate(premise, conclusion, expected):
    rule = {"gate": {"applies_if": "a", "then": "b"}}
    assert evaluate(rule, {"a": premise, "b": conclusion}) is expected


def test_cautious_refutation_leaves_a_middle():
    assert at_least(2, [S, R], refuted_by=2) is U
    assert at_least(2, [R, R], refuted_by=2) is R
    with pytest.raises(ValueError, match="hold and fail at once"):
        at_least(1, [S, R], refuted_by=1)


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"xor": ["a", "b"]}, "unknown rule node 'xor'"),
        ({"all": []}, "non-empty list"),
        ({"all": ["a"], "any": ["b"]}, "one of the keys"),
        (["a", "b"], "one of the keys"),
        ({"gate": {"then": "a"}}, "applies_if"),
        ({"at_least": {"k": 3, "of": ["a", "b"]}}, "k is 3"),
    ],
)
def test_malformed_rules_are_named(rule, message):
    with pytest.raises(ValueError, match=message):
        list(leaves(rule))


def test_missing_outcome_is_named():
    with pytest.raises(ValueError, match=r"\['b'\]"):
        evaluate({"all": ["a", "b"]}, {"a": S})
