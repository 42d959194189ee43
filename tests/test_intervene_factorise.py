"""Factorising a layer: same function, right counts, clear refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.intervene.factorise import (
    factors,
    fold,
    kept,
    multiply,
    parameters,
    product_weight,
    schatten_penalty,
    schatten_shrinkage,
    shrink,
    svd_factorise,
)
from reappraisal.lab.models import generator

HOW = [
    {},
    {"middle": "full"},
    {"middle": "full", "basis": "random"},
    {"middle": "none"},
]


def net():
    rng = torch.Generator().manual_seed(0)
    made = nn.Sequential(
        nn.Embedding(9, 6), nn.Flatten(1), nn.Linear(18, 7), nn.ReLU(),
        nn.Linear(7, 5),
    ).double()
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=torch.float64)
    return made


@pytest.mark.parametrize("how", HOW)
def test_same_function_and_untouched_original(how):
    model, x = net(), torch.tensor([[0, 4, 8], [1, 1, 2]])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = svd_factorise(model, **how)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=1e-10)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in twin.parameters())


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 7), n=st.integers(1, 7), rank=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_truncation_is_the_best_of_its_rank(m, n, rank, seed):
    W = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    for how in HOW:
        parts = factors(W, rank, rng=generator(seed), **how)
        k = kept((m, n), rank)
        assert parts[0].shape == (m, k) and parts[-1].shape == (k, n)
        lost = (multiply(*parts) - W).square().sum()
        best = torch.linalg.svdvals(W)[k:].square().sum()
        torch.testing.assert_close(lost, best, rtol=1e-6, atol=1e-9)


def test_ranks_by_layer_and_fold():
    model = net()
    twin = svd_factorise(model, {"2": 2, "4": 0.5}, layers=["2", "4"])
    assert parameters(twin) == 9 * 6 + 2 * (18 + 7 + 1) + 7 + 2 * 13 + 5
    x = torch.tensor([[3, 1, 4]])
    plain = fold(twin)
    torch.testing.assert_close(plain(x), twin(x))
    torch.testing.assert_close(twin(x), plain(x))  # folding a copy only
    assert type(plain[2]) is nn.Linear
    assert torch.linalg.matrix_rank(product_weight(twin, "2")) == 2


def test_training_moves_the_factors():
    twin = svd_factorise(net(), 3)
    twin(torch.tensor([[3, 1, 4]])).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(2, 6), n=st.integers(2, 6), rate=st.floats(0, 5),
    p=st.floats(0.2, 2), seed=st.integers(0, 10**6),
)
def test_shrinkage_lowers_its_penalty_and_never_overshoots(
    m, n, rate, p, seed
):
    W = torch.randn(2, m, n, generator=generator(seed), dtype=torch.float64)
    smaller = shrink(W, schatten_shrinkage(W, rate, p))
    before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(smaller)
    assert (after <= before + 1e-9).all() and (after >= -1e-12).all()
    assert (schatten_penalty(smaller, p) <= schatten_penalty(W, p) + 1e-9).all()


def test_penalty_knows_the_named_norms():
    W = torch.randn(3, 5, 4, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(
        schatten_penalty(W, 2), W.square().sum((1, 2))
    )
    torch.testing.assert_close(
        schatten_penalty([W[0], W[1]], 1),
        sum(torch.linalg.matrix_norm(w, "nuc") for w in W[:2]),
    )


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: svd_factorise(net(), 0), "rank"),
        (lambda: svd_factorise(net(), 1.5), "rank"),
        (lambda: svd_factorise(net(), True), "rank"),
        (lambda: svd_factorise(net(), middle="half"), "middle"),
        (lambda: svd_factorise(net(), basis="fourier"), "basis"),
        (lambda: svd_factorise(net(), basis="random"), "basis"),
        (lambda: svd_factorise(net(), layers=["nope"]), "nope"),
        (lambda: svd_factorise(net(), {"nope": 2}), "nope"),
        (lambda: svd_factorise(nn.ReLU()), "nothing"),
        (lambda: svd_factorise(svd_factorise(net())), "once"),
        (lambda: product_weight(net(), "3"), "name"),
        (lambda: schatten_penalty(torch.eye(2), 0), "p:"),
        (lambda: schatten_shrinkage(torch.eye(2), 0.1, 3), "p:"),
    ],
)
def test_refusals_name_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()
