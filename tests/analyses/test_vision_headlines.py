"""Chief sentences of pictures: only what rows have in common that uniform attention has not."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from lens_analyses.steps.vision_headlines import crossing, of_flow, of_sinks, strongest

import lens
from lens.runs.headlines import those_that_stand
from lens.vision.routes import ROUTES, TextFlow
from tests.lens.pictures import planted
from tests.lens.test_windows import built

MAPS = ["L0", "L0H0", "L0H1", "L0H2", "mean"]


def told(patterns, special=0):
    trace = planted(patterns[None], 6, 6, special=special)
    return those_that_stand(strongest("a picture", "p000", trace, MAPS, 0))


def test_no_patch_is_a_headline_where_rows_have_none_in_common():
    """Of 36 patches some receives most: 1.6 times the mean and more, in every draw."""
    random = np.random.default_rng(0)
    found = 0
    for _ in range(20):
        patterns = random.dirichlet(np.full(36, 0.3), (3, 36))
        assert patterns.sum(1).max() > 1.6
        found += len(told(patterns))
    assert found <= 2  # an interval of 95 % misses now and then
    assert told(np.full((3, 36, 36), 1 / 36)) == ()


def test_the_patch_that_rows_look_at_is_one():
    patterns = np.random.default_rng(1).dirichlet(np.full(37, 0.3), (3, 37))
    patterns[2] *= 0.5
    patterns[2, :, 1 + 8] += 0.5  # patch (1, 2)
    (one,) = told(patterns, special=1)
    assert "L0H2: patches look at the patch (1, 2)" in one.text
    assert "(on the 18 that had no part in choosing it)" in one.text
    assert one.value == pytest.approx(37 * patterns[2, 2::2, 9].mean(), rel=1e-4)
    assert 1 < one.low < one.value < one.high


def test_where_keys_are_a_smaller_grid_all_rows_of_the_larger_one_count():
    root, inputs = built("segformer")
    trace = lens.capture(lens.load(root), inputs, keep_qk=True, progress=False).stage0
    (one,) = strongest("a picture", "p000", trace, ["L0H1"], 0)
    own = trace.tile(0, 1, (0, 36), (0, 9)) * 9
    place = int(own[::2].mean(0).argmax())
    assert f"L0H1: positions look at the patch {divmod(place, 3)} " in one.text
    assert "on the 18 that had no part" in one.text
    assert one.value == pytest.approx(own[1::2, place].mean(), rel=1e-5)


def test_a_head_is_said_to_keep_to_its_cross_where_it_does():
    """Of 12 heads of noise the one with most is chosen by every second patch, and seldom has more on the others."""
    random = np.random.default_rng(2)
    row, column = np.divmod(np.arange(36), 6)
    cross = (row[:, None] == row) | (column[:, None] == column)
    found = []
    for _ in range(12):
        patterns = random.dirichlet(np.full(36, 0.5), (12, 36))
        shares = (patterns * cross).sum(-1).mean(-1)
        assert shares.max() > 11 / 36 + 0.01
        found += crossing("a picture", "p000", planted(patterns[None], 6, 6), 0)
    assert len(found) <= 2
    patterns[7] = patterns[7] * 0.5 + 0.5 * cross / 11
    (one,) = crossing("a picture", "p000", planted(patterns[None], 6, 6), 0)
    assert "L0H7 keeps" in one.text
    assert one.baseline == pytest.approx(11 / 36)
    expected = (patterns[7] * cross)[1::2].sum(-1).mean()
    assert one.value == pytest.approx(expected, rel=1e-4)


def flow(part, others):
    """Of two layers, in the second of which the text depends on the image: so much by these tokens, and by as many others."""
    kl = np.full((len(ROUTES), 2, 4), 0.01)
    kl[0, 1], kl[2, 1], kl[3, 1] = 0.9, part, others
    few = np.ones((len(ROUTES), 4))
    return TextFlow(
        layers=(3, 4),
        last=(3, 4),
        keys=few,
        mass=np.full_like(kl, 0.2),
        delta_loss=kl,
        kl=kl,
        window=1,
        seed=0,
    )


def test_image_tokens_are_told_beside_others_where_the_paired_difference_holds():
    (one,) = of_flow(flow([0.5, 0.6, 0.7, 0.6], [0.1, 0.2, 0.3, 0.2]))
    assert (one.value, one.baseline, one.many) == (pytest.approx(0.6), pytest.approx(0.2), 2)
    assert one.spread > 0.03
    assert "move by 0.6 [0." in one.text
    assert "as many others by 0.2 [0." in one.text
    assert not list(of_flow(flow([0.1, 0.9, 0.2, 0.6], [0.3, 0.2, 0.3, 0.4])))


def test_visual_sinks_are_told_beside_others_where_the_paired_difference_holds():
    def hidden(low):
        rows = [("edit", 0.4, 0.3, 0.5, np.nan, np.nan), ("size", 0.1, 0.05, 0.2, low, 0.4)]
        names = [
            "condition",
            "delta_loss",
            "delta_loss_low",
            "delta_loss_high",
            "excess_low",
            "excess_high",
        ]
        return SimpleNamespace(table=lambda: pd.DataFrame(rows, columns=names).assign(mass=0.3))

    (one,) = of_sinks(hidden(0.2))
    assert (one.value, one.baseline, one.spread) == (0.4, 0.1, pytest.approx(0.075))
    assert "changes by +0.4 [+0.3, +0.5] nats a token" in one.text
    assert "tokens of the image by +0.1 [+0.05, +0.2]." in one.text
    assert not list(of_sinks(hidden(-0.1)))
