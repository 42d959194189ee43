"""Glyphs: nested draws, ink by hand, classes that can be told apart."""

import pytest
import torch

from reappraisal.lab.glyphs import glyphs, ink, strokes


def test_classes_do_not_depend_on_other_classes():
    few, many = glyphs(3, 5, 7), glyphs(5, [5, 5, 5, 9, 1], 7)
    assert few.X.shape == (15, 1, 12, 12) and few.item == (1, 12, 12)
    for k in range(3):
        a, b = few.X[few.y == k], many.X[many.y == k]
        assert torch.equal(a, b)
    assert torch.equal(strokes(3, 7), strokes(9, 7)[:3])
    assert not torch.equal(glyphs(3, 4, 8).X, few.X)


def test_ink_adds_up_drop_by_drop():
    g = torch.Generator().manual_seed(0)
    curves = torch.rand(2, 3, 3, 2, generator=g)
    got = ink(curves, size=5, width=0.1, drops=4)
    t = torch.linspace(0, 1, 4)
    for n in range(2):
        for row in range(5):
            for column in range(5):
                pixel = torch.tensor([column + 0.5, row + 0.5]) / 5
                wet = 0.0
                for a, b, c in curves[n]:
                    for u in t:
                        drop = (1 - u) ** 2 * a + 2 * u * (1 - u) * b
                        off = pixel - drop - u**2 * c
                        wet += torch.exp(-off.square().sum() / 0.02)
                want = 1 - torch.exp(-wet)
                assert got[n, row, column] == pytest.approx(
                    float(want), abs=1e-5
                )


def test_classes_differ_more_than_samples_and_wobble_blurs_them():
    def spread(wobble):
        x = glyphs(10, 30, 1, wobble=wobble).X.view(10, 30, -1)
        within = (x - x.mean(1, keepdim=True)).square().sum(-1).mean()
        return float(within / x.mean(1).var(0).sum())

    assert spread(0.02) < spread(0.2)


@pytest.mark.parametrize("counts", [0, [1, 2], [1, 0, 1], []])
def test_counts_that_do_not_fit(counts):
    with pytest.raises(ValueError, match="n_per_class"):
        glyphs(3, counts, 0)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="per_glyph"):
        strokes(2, 0, per_glyph=0)
