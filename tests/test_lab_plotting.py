"""The house style: readable by everyone, and no replicate lost."""

import base64
import io
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from PIL import Image  # noqa: E402

from reappraisal.lab import plotting as lp  # noqa: E402

hexes = st.integers(0, 0xFFFFFF).map(lambda n: f"#{n:06x}")
KINDS = "protanopia", "deuteranopia", "tritanopia"


@pytest.fixture
def ax():
    with lp.style():
        fig, ax = plt.subplots(figsize=(3, 2))
    yield ax
    plt.close("all")


@pytest.mark.parametrize("shown", [str, lp.inverted])
def test_palette_stays_apart_for_everyone(shown):
    from skimage.color import deltaE_ciede2000, rgb2lab

    drawn = [shown(c) for c in lp.PALETTE.values()]
    for see in [str] + [lambda c, k=k: lp.as_seen(c, k) for k in KINDS]:
        lab = rgb2lab(np.array([to_rgb(see(c)) for c in drawn]))
        assert min(
            deltaE_ciede2000(a, b) for a, b in combinations(lab, 2)
        ) > 9


@pytest.mark.parametrize("name", lp.PALETTE)
def test_palette_contrast_on_both_pages(name):
    colour = lp.PALETTE[name]
    assert lp.contrast(colour, "white") >= 3
    assert lp.contrast(lp.inverted(colour), "#14181e") >= 3


@given(hexes, hexes)
def test_contrast_is_symmetric_and_bounded(a, b):
    assert lp.contrast(a, b) == lp.contrast(b, a)
    assert 1 <= lp.contrast(a, b) <= 21.0001


@given(hexes)
def test_black_or_white_always_reads(cell):
    best = max(lp.contrast("black", cell), lp.contrast("white", cell))
    assert best >= 21**0.5 - 1e-6


@given(st.integers(0, 255), st.sampled_from(KINDS))
def test_greys_are_grey_for_everyone(level, kind):
    r, g, b = (
        round(255 * v)
        for v in to_rgb(lp.as_seen(f"#{level:02x}{level:02x}{level:02x}", kind))
    )
    assert max(r, g, b) - min(r, g, b) <= 1 and abs(r - level) <= 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="deficiency.*tritanopia"):
        lp.as_seen("red", "red")
    with pytest.raises(ValueError, match="mode.*'dim'.*dark"), lp.style("dim"):
        pass


def test_style_is_undone():
    before = dict(plt.rcParams)
    with lp.style("dark"):
        assert plt.rcParams["figure.facecolor"] == "#000000"
    assert dict(plt.rcParams) == before


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        arrays(float, st.integers(1, 40), elements=finite),
        min_size=1, max_size=4,
    )
)
def test_strip_shows_every_replicate_in_its_lane(columns):
    fig, ax = plt.subplots()
    given = [c.copy() for c in columns]
    lp.strip(ax, {f"g{i}": c for i, c in enumerate(columns)}, width=0.5)
    assert len(ax.collections) == len(columns)
    for i, (drawn, c) in enumerate(zip(ax.collections, given, strict=True)):
        x, y = np.asarray(drawn.get_offsets()).T
        assert np.array_equal(y, c)
        assert np.all(np.abs(x - i) <= 0.34)
        assert len(np.unique(x)) == len(c)
    again = plt.subplots()[1]
    lp.strip(again, {f"g{i}": c for i, c in enumerate(columns)})
    for a, b in zip(ax.collections, again.collections, strict=True):
        assert np.array_equal(a.get_offsets(), b.get_offsets())
    plt.close("all")


def test_strip_accepts_interval_objects(ax):
    class Interval:
        estimate, lo, hi = 2.0, 1.5, 2.25

    lp.strip(ax, {"a": [1, 2, 3]}, {"a": Interval()})
    bar, dot = ax.lines
    assert tuple(bar.get_ydata()) == (1.5, 2.25)
    assert tuple(dot.get_ydata()) == (2.0,)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda ax: lp.strip(ax, {}), "groups"),
        (lambda ax: lp.strip(ax, {"a": []}), r"groups\['a'\]"),
        (lambda ax: lp.strip(ax, {"a": [[1, 2]]}), r"shape \(1, 2\)"),
        (lambda ax: lp.strip(ax, {"a": [1]}, {"b": (1, 0, 2)}), "'b'"),
        (lambda ax: lp.strip(ax, {"a": [1]}, {"a": (1, 2)}), "intervals"),
        (lambda ax: lp.strip(ax, {"a": [1]}, {"a": (1, 2, 0)}), "above"),
        (lambda ax: lp.strip(ax, {"a": [1]}, colours=[]), "colours"),
        (lambda ax: lp.forest(ax, {}), "intervals"),
        (lambda ax: lp.forest(ax, {"a": (1, 0, 2)}, sesoi=0), "sesoi"),
        (lambda ax: lp.forest(ax, {"a": (1, 0, 2)}, sesoi={}), "sesoi"),
        (lambda ax: lp.forest(ax, {"a": (1, 0, 2)}, {"b": [1]}), "'b'"),
        (lambda ax: lp.traces(ax, [0, 1], [[1, 2, 3]]), "Y"),
        (lambda ax: lp.traces(ax, [0, 1], [1, 2]), "Y"),
        (lambda ax: lp.survival(ax, [1, 2], [1]), "surviving"),
        (lambda ax: lp.survival(ax, [2, 1], [1, 0]), "increasing"),
        (lambda ax: lp.survival(ax, [1], [1.5]), r"\[0, 1\]"),
        (lambda ax: lp.heatmap(ax, [[1]], ["a"], [], unit="u"), "Z"),
        (lambda ax: lp.heatmap(ax, [[np.nan]], "a", "b", unit="u"), "Z"),
    ],
)
def test_bad_input_names_the_argument(ax, call, message):
    with pytest.raises(ValueError, match=message):
        call(ax)


def test_forest_divides_by_each_unit(ax):
    lp.forest(
        ax,
        {"a": (10, 5, 20), "b": (0.1, 0.0, 0.3)},
        {"a": [10.0, 20.0]},
        sesoi={"a": 5, "b": 0.1},
    )
    a, b = ax.lines[1], ax.lines[3]
    assert np.allclose(a.get_xdata(), [1, 4])
    assert np.allclose(b.get_xdata(), [0, 3])
    dots = [c for c in ax.collections if len(c.get_offsets())]
    assert np.allclose(dots[-1].get_offsets()[:, 0], [2, 4])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # first on top


def test_traces_draw_all_seeds_and_the_median(ax):
    Y = np.array([[1, 2, np.nan], [3, 4, np.nan], [8, 9, 10.0]])
    lp.traces(ax, [0, 1, 2], Y, label="x")
    thick, *thin = ax.lines
    assert np.array_equal(thick.get_ydata(), [3, 4, 10])
    assert np.array_equal([t.get_ydata() for t in thin], Y, equal_nan=True)
    assert {t.get_color() for t in thin} == {thick.get_color()}


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_survival_steps_down_at_the_event(data):
    times = sorted(
        data.draw(st.lists(st.integers(1, 100), unique=True, max_size=8))
    )
    k = len(times)
    share = np.linspace(1, 0, k + 2)[1:-1]
    fig, ax = plt.subplots()
    lp.survival(ax, times, share, [100], until=100)
    x, y = ax.lines[0].get_data()
    for t, s in zip(times, share, strict=True):
        assert y[np.searchsorted(x, t, side="right") - 1] == s
    assert y[0] == 1 and x[-1] == 100
    assert ax.lines[1].get_ydata()[0] == (share[-1] if k else 1)
    plt.close(fig)


def test_heatmap_blank_for_nan_and_labels_for_all(ax):
    lp.heatmap(ax, [[0, np.nan], [0.5, 1]], "ab", "cd", unit="share")
    assert [t.get_text() for t in ax.texts] == ["0.00", "0.50", "1.00"]
    assert ax.figure.axes[1].get_ylabel() == "share"


def labelled():
    with lp.style():
        fig, ax = plt.subplots(figsize=(3, 2))
        ax.plot([0, 1], [1, 0])
        ax.set(xlabel="steps", ylabel="loss (nats)")
    return fig


def test_captioned_bundle():
    made = lp.captioned(labelled(), caption="a < b", alt='say "cheese"')
    assert not plt.get_fignums()  # closed, so not drawn twice
    bundle = made._repr_mimebundle_()
    assert "a &lt; b</figcaption>" in bundle["text/html"]
    assert 'alt="say &quot;cheese&quot;"' in bundle["text/html"]
    assert bundle["text/plain"] == "Figure: a < b"
    png = base64.b64decode(bundle["image/png"])
    assert Image.open(io.BytesIO(png)).size == (432, 288)
    assert made.width == 300 and not made.photo
    again = lp.captioned(labelled(), caption="a < b", alt='say "cheese"')
    assert again == made  # the same bytes every time


def test_show_displays_one_output(monkeypatch):
    import IPython.display

    seen = []
    monkeypatch.setattr(IPython.display, "display", seen.append)
    assert lp.show(labelled(), caption="c", alt="a") is None
    assert [s.caption for s in seen] == ["c"]


@pytest.mark.parametrize("missing", ["caption", "alt"])
@pytest.mark.parametrize("blank", ["", "  ", None])
def test_caption_and_alt_are_required(missing, blank):
    words = {"caption": "c", "alt": "a", missing: blank}
    with pytest.raises(ValueError, match=missing):
        lp.captioned(labelled(), **words)
    plt.close("all")


def test_nameless_numbers_are_refused():
    fig = labelled()
    fig.axes[0].set_xlabel("")
    with pytest.raises(ValueError, match="x axis of panel 0"):
        lp.captioned(fig, caption="c", alt="a")
    fig.axes[0].set_xticks([0, 1], ["before", "after"])  # names need none
    assert lp.captioned(fig, caption="c", alt="a")
    fig, axes = plt.subplots(1, 2, sharey=True)
    axes[0].set(xlabel="steps", ylabel="loss (nats)")
    axes[1].set_xlabel("steps")
    assert lp.captioned(fig, caption="c", alt="a")
    fig, ax = plt.subplots()
    ax.set(xscale="log", xlim=(1, 1000), ylabel="loss (nats)")
    with pytest.raises(ValueError, match="x axis of panel 0"):
        lp.captioned(fig, caption="c", alt="a")
    plt.close("all")


@pytest.mark.parametrize(
    "picture, cmap, photo",
    [
        (np.zeros((4, 4, 3)), None, True),
        (np.eye(4), "gray", True),
        (np.eye(4), "cividis", False),
    ],
)
def test_photographs_keep_their_colours(picture, cmap, photo):
    fig, ax = plt.subplots(figsize=(1, 1))
    ax.imshow(picture, cmap=cmap)
    ax.axis("off")
    made = lp.captioned(fig, caption="c", alt="a")
    assert made.photo is photo
    kind = "rp-photo" if photo else "rp-ink"
    assert f'class="{kind} ' in made._repr_mimebundle_()["text/html"]


def test_one_label_for_the_whole_figure_is_enough():
    fig, axes = plt.subplots(1, 2, figsize=(4, 2))
    with pytest.raises(ValueError, match="x axis of panel 0"):
        lp.captioned(fig, caption="c", alt="a")
    fig.supxlabel("steps")
    with pytest.raises(ValueError, match="no label.*y axis of panel 1"):
        lp.captioned(fig, caption="c", alt="a")
    fig.supylabel("loss (nats)")
    assert lp.captioned(fig, caption="c", alt="a")


def test_rare_hues_stay_themselves_among_many_shades(ax):
    ax.set(xlabel="arm", ylabel="share")
    for k, colour in enumerate(lp.PALETTE.values()):
        ax.bar(k, 1 + k, color=colour, alpha=0.3)
        ax.plot([k], [k + 1.5], "x", color=colour)
    bundle = lp.captioned(ax.figure, caption="c", alt="a")
    png = base64.b64decode(bundle._repr_mimebundle_()["image/png"])
    seen = np.unique(
        np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3),
        axis=0,
    )
    for colour in lp.PALETTE.values():
        wanted = 255 * np.array(to_rgb(colour))
        assert np.abs(seen - wanted).max(1).min() < 12, colour
