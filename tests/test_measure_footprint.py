"""Prices of networks against hand counts, scipy and what must not change."""

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reappraisal.intervene.factorise import svd_factorise
from reappraisal.intervene.quantise import storage
from reappraisal.lab.ensemble import untrained
from reappraisal.lab.models import convnet, mlp, transformer
from reappraisal.measure.footprint import (
    Stored,
    compressed_bits,
    entropy_bits,
    footprint,
    index_bits,
    latency,
    operations,
    peak_activation_bytes,
)


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30),
       st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_index_against_scipy(seed, rows, columns, density):
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    table = scipy.sparse.csr_array(mask)
    # enough bits for the largest column number and pointer, and not more
    column = max(columns - 1, 0).bit_length()
    pointer = int(table.indptr.max()).bit_length()
    want = len(table.indices) * column + len(table.indptr) * pointer
    assert index_bits(mask, "csr") == want
    assert index_bits(mask, "bitmap") == mask.size
    assert index_bits(mask, "dense") == 0


def test_filters_are_rows():
    mask = torch.rand(4, 3, 2, 2) < 0.5
    assert index_bits(mask, "csr") == index_bits(mask.flatten(1), "csr")


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_entropy_does_not_see_names_or_order(values):
    v = np.array(values)
    base = entropy_bits(v)
    assert math.isclose(entropy_bits(-5 * v[::-1] + 2), base, abs_tol=1e-9)
    assert 0 <= base <= len(v) * math.log2(len(np.unique(v))) + 1e-9


def test_entropy_closed_forms():
    assert entropy_bits(torch.ones(10)) == 0
    assert entropy_bits(torch.arange(16)) == 64
    assert math.isclose(entropy_bits([0, 0, 0, 1]), 4 * 0.8112781245)


def test_compressors_stay_above_the_entropy_of_independent_values():
    v = np.random.default_rng(0).integers(0, 16, 20_000)
    for method in "zlib", "lzma":
        length = compressed_bits(v, method)
        assert entropy_bits(v) < length < 1.3 * entropy_bits(v)
        assert compressed_bits(np.zeros(20_000), method) < 2000
    many = torch.randn(70_000)
    assert compressed_bits(many) > 0.85 * 32 * 70_000


NETS = {
    "mlp": (lambda: mlp([6, 8, 3]), (6,)),
    "convnet": (lambda: convnet((1, 4, 4), 3), (1, 6, 6)),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(64, 3),
        ),
        (2, 6, 6),
    ),
    "attention": (
        lambda: transformer(4, 3, 5, width=8, heads=2, depth=1, tokens=False),
        (5, 4),
    ),
}


@pytest.mark.parametrize("kind", NETS)
def test_networks_are_left_alone_and_batches_do_not_matter(kind):
    build, shape = NETS[kind]
    m = build().train()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    random = torch.random.get_rng_state()
    one, five = torch.zeros(1, *shape), torch.zeros(5, *shape)
    assert operations(m, one) == operations(m, five)
    assert peak_activation_bytes(m, five) == 5 * peak_activation_bytes(m, one)
    f = footprint(m, five, repeats=5)
    assert m.training and torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert f.measured_ms > 0 and f.measured.batch == 5
    tensors = [*m.parameters(), *m.buffers()]
    assert f.parameters == sum(t.numel() for t in tensors)
    assert f.stored_bits == sum(8 * t.nbytes for t in tensors)
    assert f.macs == sum(operations(m, one).values())
    assert str(f).startswith("stored")


def test_attention_scores_have_a_row_of_their_own():
    build, shape = NETS["attention"]
    f = footprint(build(), torch.zeros(1, *shape))
    rows = {k.name: k for k in f.layers}
    # two heads, five places, four numbers each, keys and values
    assert rows["blocks.0.body.1 (no weights)"].macs == 2 * 2 * 5 * 5 * 4
    assert rows["blocks.0.body.1.read.weight"].macs == 5 * 8 * 24


def test_residual_connections_hold_memory():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)

        def forward(self, x):
            h = self.a(x)
            return h + self.b(torch.relu(h))

    # input, h and relu(h), the output of b or the sum
    assert peak_activation_bytes(Skip(), torch.zeros(2, 10)) == 4 * 2 * 40


def test_views_are_free():
    m = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.Flatten())
    assert peak_activation_bytes(m, torch.zeros(4, 2, 3)) == 4 * 24


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 16))
@settings(max_examples=40, deadline=None)
def test_best_index_is_the_cheapest(seed, density, bits):
    g = torch.Generator().manual_seed(seed)
    m = nn.Linear(9, 7, bias=False)
    masks = {"weight": torch.rand(7, 9, generator=g) < density}
    price = {
        index: footprint(m, masks=masks, bits=bits, index=index).stored_bits
        for index in ("dense", "bitmap", "csr", "best")
    }
    assert price.pop("best") == min(price.values())
    assert price["dense"] == 63 * bits


def test_zeros_found_are_those_masked():
    m = mlp([6, 8, 3], seed=0)
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        m[1].weight *= mask
    by_mask = footprint(m, masks={"1.weight": mask})
    found = footprint(m, masks="zeros")
    assert found.nonzeros == by_mask.nonzeros == 6 * 8 + 35 - int((~mask).sum())
    assert footprint(m).nonzeros == 83


def test_factors_by_rank_and_by_hand():
    m, x = mlp([60, 80, 3]), torch.zeros(1, 60)
    by_rank = footprint(m, x, factors={"1.weight": 4})
    parts = torch.zeros(80, 4), torch.zeros(4, 60)
    assert by_rank.stored_bits == footprint(
        m, x, factors={"1.weight": parts}
    ).stored_bits
    assert by_rank.parameters == 4 * 140 + 80 + 240 + 3
    assert by_rank.macs == 4 * 140 + 240
    trained = footprint(svd_factorise(m, 4, layers=["1"]))
    assert trained.parameters == by_rank.parameters + 4  # the middle


def test_half_precision_integers_and_shared_weights():
    assert footprint(mlp([6, 3]).half()).stored_bits == 16 * 21
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    m[1].weight = m[0].weight
    assert footprint(m).parameters == 16 + 8


def test_bits_and_scales_by_name():
    m = mlp([6, 8, 3])
    f = footprint(m, bits={"1.weight": Stored(4, 8, 16), "3.weight": 2})
    assert f.stored_bits == 48 * 4 + 8 * 16 + 24 * 2 + 32 * 11
    assert footprint(m, bits=8).stored_bits == 8 * 72 + 32 * 11
    formats = storage(m, "affine4", granularity=4, scale_bits=8)
    assert footprint(m, bits=formats).stored_bits == (
        4 * 72 + 8 * 2 * (8 * 2 + 3 * 2) + 32 * 11
    )


def test_bit_operations():
    m = mlp([6, 8, 3])
    f = footprint(m, torch.zeros(1, 6), bits=4, activation_bits=8)
    assert f.bops == 4 * 8 * f.macs and f.flops == 2 * f.macs == 144


def test_ensembles_are_priced_member_by_member():
    e = untrained(mlp([6, 8, 3]), [1, 2])
    mask = torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    both = footprint(e, torch.zeros(1, 6), masks={"1.weight": mask})
    for i, f in enumerate(both):
        alone = footprint(
            e.member(i), torch.zeros(1, 6), masks={"1.weight": mask[i]}
        )
        assert f.layers == alone.layers
        assert f.nonzeros == 83 - int((~mask[i]).sum())


def test_frame_has_a_row_per_tensor():
    pytest.importorskip("pandas")
    f = footprint(mlp([6, 8, 3]), bits=4)
    frame = f.to_frame()
    assert frame["stored_bits"].sum() == f.stored_bits
    assert list(frame["name"]) == ["1.weight", "1.bias", "3.weight", "3.bias"]


def test_latency_is_a_median_with_an_interval():
    t = latency(mlp([6, 8, 3]), torch.zeros(2, 6), repeats=15, warmup=1)
    i = t.interval()
    assert len(t.ms) == 15 and 0 < i.lo <= t.median <= i.hi
    assert "15 passes" in repr(t)


NET = mlp([6, 8, 3])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: footprint(nn.ReLU()), "no parameters"),
        (lambda: footprint("net"), "model"),
        (lambda: footprint(NET, masks={"2.weight": 1}), "masks"),
        (lambda: footprint(NET, masks={"1.weight": torch.ones(6, 8)}), "shape"),
        (lambda: footprint(NET, masks="ones"), "zeros"),
        (lambda: footprint(NET, bits={"x": 2}), "bits"),
        (lambda: footprint(NET, bits=math.nan), "bits"),
        (lambda: footprint(NET, bits="four"), "bits"),
        (lambda: Stored(4, -1), "scales"),
        (lambda: footprint(NET, index="coo"), "index"),
        (lambda: footprint(NET, factors={"1.weight": 0}), "rank"),
        (lambda: footprint(NET, factors={"1.weight": 2},
                           masks={"1.weight": torch.ones(8, 6)}), "both"),
        (lambda: footprint(NET, activation_bits=-1), "bits"),
        (lambda: footprint(NET, repeats=5), "example"),
        (lambda: operations(NET, torch.zeros(0, 6)), "example"),
        (lambda: operations(None, torch.zeros(1, 6)), "model"),
        (lambda: peak_activation_bytes(NET, torch.tensor(1.0)), "example"),
        (lambda: latency(NET, torch.zeros(1, 6), repeats=2), "repeats"),
        (lambda: latency(NET, torch.zeros(1, 6), warmup=-1), "warmup"),
        (lambda: index_bits(torch.ones(2, 2), "best"), "index"),
        (lambda: entropy_bits([]), "values"),
        (lambda: entropy_bits([math.nan]), "values"),
        (lambda: compressed_bits([1], "bz2"), "method"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
