"""Cues against their code and their reliability."""

import pytest
import torch

from reappraisal.dynamics.planted_features import planted_cue


def read(images):
    weights = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    return (images[..., :2, :2] * weights).sum((-2, -1)).round().long() - 1


@pytest.mark.parametrize("classes", [2, 10, 15])
@pytest.mark.parametrize("reliability", [0.0, 0.5, 1.0])
def test_code_names_the_cue_and_reliability_holds(classes, reliability):
    y = torch.arange(4000) % classes
    images = torch.rand(4000, 1, 4, 5)
    before = images.clone()
    out, cue = planted_cue(images, y, reliability, 3, classes=classes)
    assert torch.equal(images, before)
    assert torch.equal(read(out)[:, 0], cue)
    assert torch.equal(out[..., 2:, :], images[..., 2:, :])
    assert torch.equal(out[..., :2, 2:], images[..., :2, 2:])
    assert (cue == y).float().mean().item() == pytest.approx(
        reliability, abs=0.03)
    if reliability == 0 and classes == 10:  # the others, all alike
        shift = torch.bincount((cue - y) % classes, minlength=classes)
        assert shift[0] == 0 and shift[1:].min() > 350


def test_seeds_decide():
    y, images = torch.arange(100) % 3, torch.zeros(100, 2, 2)
    one, two, other = (planted_cue(images, y, 0.5, s).cue for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(("args", "match"), [
    ((torch.zeros(3, 2, 2), torch.arange(3), 1.5, 0), "reliability: got 1.5"),
    ((torch.zeros(3, 2, 1), torch.arange(3), 0.5, 0), "images: got shape"),
    ((torch.zeros(2, 2, 2), torch.arange(3), 0.5, 0), "images: got shape"),
    ((torch.zeros(3, 2, 2), torch.arange(3) + 20, 0.5, 0), "classes: got 23"),
])
def test_bad_input_is_named(args, match):
    with pytest.raises(ValueError, match=match):
        planted_cue(*args)
    with pytest.raises(ValueError, match="classes: got 2"):
        planted_cue(torch.zeros(3, 2, 2), torch.arange(3), 0.5, 0, classes=2)
