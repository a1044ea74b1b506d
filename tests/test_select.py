"Select: who filters and who judges, how many, which, and what a random drop and the truth would keep."

import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from selfalign.data.selection import (
    choose_scorers,
    difference,
    how_many,
    keep_best,
    precision_curve,
    select,
    selection_table,
    short_name,
)
from selfalign.study.settings import StudyError
from selfalign.study.statistics import precision_at

BOTH = ["open_clip:data/micro/clip", "transformers:data/micro/judge"]


def table(n=60, groups=3, seed=0, truth=True):
    rng = np.random.default_rng(seed)
    made = pd.DataFrame(
        dict(key=[f"k{i}" for i in range(n)], group=rng.integers(0, groups, n), score=rng.normal(25, 3, n).round(1))
    )
    return made.assign(faithful=(rng.random(n) < 0.3).astype(float), held=rng.integers(0, 5, n) / 4) if truth else made


# --- who ---------------------------------------------------------------------------------------------------------


def test_the_other_one_judges():
    assert choose_scorers(BOTH) == tuple(BOTH)
    assert choose_scorers(pd.Series(BOTH * 3), BOTH[1]) == tuple(BOTH[::-1])
    assert choose_scorers(BOTH, "judge") == tuple(BOTH[::-1])
    assert choose_scorers(BOTH[:1]) == (BOTH[0], None)
    assert choose_scorers([*BOTH, "open_clip:x/y"], "x/y") == ("open_clip:x/y", BOTH[0])


def test_unknown_scorer():
    with pytest.raises(StudyError, match="did you mean 'clip'"):
        choose_scorers(BOTH, "clp")
    with pytest.raises(StudyError, match="did you mean 'open_clip:data/micro/clip'"):
        choose_scorers(BOTH, "open_clip:data/micro/clp")


def test_short_names():
    assert [short_name(b) for b in BOTH] == ["clip", "judge"]
    assert short_name("open_clip:ViT-B-32/openai") == "ViT-B-32/openai"


# --- how many ----------------------------------------------------------------------------------------------------


def test_a_share_of_each_group():
    t = table()
    quota = how_many(t.score, t.group, 0.3)
    assert quota.to_dict() == {g: max(1, round(0.3 * n)) for g, n in t.group.value_counts().items()}
    assert (how_many(t.score, t.group, 1) == t.group.value_counts().sort_index()).all()
    assert (how_many(t.score, t.group, 1e-9) == 1).all()


@pytest.mark.parametrize("keep", [0, -1, 1.01, 30])
def test_not_a_share(keep):
    with pytest.raises(StudyError, match="it is a share"):
        how_many([1.0, 2], [0, 0], keep)


def test_threshold():
    assert how_many([10, 20, 30], [0, 0, 1], threshold=20).to_dict() == {0: 1, 1: 1}
    assert how_many([10, 20, 30], [0, 0, 1], threshold=30).to_dict() == {0: 0, 1: 1}
    with pytest.raises(StudyError, match="the best one has 30.00"):
        how_many([10, 20, 30], [0, 0, 1], threshold=30.5)


def test_threshold_keeps_what_reaches_it():
    t = table()
    kept = select(t, threshold=25.0)
    assert (kept["selected"] == (t.score >= 25)).all()
    assert (kept["random-drop"].groupby(t.group).sum() == kept["selected"].groupby(t.group).sum()).all()


# --- which -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.floats(0.05, 1), st.integers(0, 5))
def test_selections_of_one_size(n, groups, keep, seed):
    t = table(n, groups, seed)
    kept = select(t, keep, seed=seed)
    quota = how_many(t.score, t.group, keep)
    for k in kept.values():
        assert k.dtype == bool
        assert k.index.equals(t.index)
        assert (k.groupby(t.group).sum() == quota).all()
    for g, part in t.groupby("group"):
        if (~kept["selected"][part.index]).any():
            assert part.score[kept["selected"]].min() >= part.score[~kept["selected"]].max()


def test_no_selection_of_this_size_has_more_faithful_pairs_than_the_oracle():
    t = table()
    kept = select(t, 0.3)
    for g, part in t.groupby("group"):
        assert part.faithful[kept["oracle"]].sum() == min(kept["oracle"][part.index].sum(), part.faithful.sum())
    left = t[(t.faithful == 0)]
    inside = left[kept["oracle"][left.index]]
    for g, part in inside.groupby("group"):
        assert part.held.min() >= left[(left.group == g) & ~kept["oracle"][left.index]].held.max()


def test_what_nobody_read_comes_last():
    t = table(6, 1)
    t["faithful"] = [np.nan, 0, 1, 0, np.nan, 0]
    t["held"] = [np.nan, 0.5, 1, 0.25, np.nan, 0]
    assert t.key[select(t, 4 / 6)["oracle"]].tolist() == ["k1", "k2", "k3", "k5"]


def test_no_truth_no_oracle():
    assert list(select(table(truth=False))) == ["selected", "random-drop"]
    assert list(select(table().assign(faithful=np.nan, held=np.nan))) == ["selected", "random-drop"]


def test_the_order_of_the_table_does_not_matter():
    t = table().assign(score=25.0)
    shuffled = t.sample(frac=1, random_state=1)
    for name, k in select(t, seed=7).items():
        assert set(t.key[k]) == set(shuffled.key[select(shuffled, seed=7)[name]])


def test_seeds_change_the_random_drop_only():
    t = table()
    t["score"] += np.arange(len(t)) * 1e-3
    one, two = select(t, seed=1), select(t, seed=2)
    assert (one["selected"] == two["selected"]).all()
    assert (one["random-drop"] != two["random-drop"]).any()


def test_random_drop_is_fair():
    t = table(40, 1)
    often = sum(select(t, 0.25, seed=s)["random-drop"].astype(int) for s in range(100))
    assert abs(often - 25).max() < 5 * np.sqrt(100 * 0.25 * 0.75)


def test_long_table():
    t = table()
    long = selection_table(t, select(t, 0.4))
    assert list(long.columns) == ["key", "selection", "kept", "score"]
    assert long.groupby("selection").size().eq(len(t)).all()
    assert long.kept.dtype == bool
    assert not long.duplicated(["key", "selection"]).any()


# --- what it is worth --------------------------------------------------------------------------------------------


def test_difference():
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    a = x > 0
    b = rng.random(400) < 0.5
    i = difference(x, a, b, np.arange(400))
    assert i.value == pytest.approx(x[a].mean() - x[b].mean())
    assert 0 < i.low < i.value < i.high
    same = difference(x, a, a, np.arange(400))
    assert same.value == same.low == same.high == 0


def test_difference_resamples_scenes():
    x = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    a = np.tile([True] * 5 + [False] * 5, 40)
    value = x + a
    wide, narrow = difference(value, a, ~a, np.arange(400)), difference(value, a, ~a, np.repeat(np.arange(40), 10))
    assert narrow.value == wide.value == pytest.approx(1)
    assert narrow.high - narrow.low < 1e-9 < wide.high - wide.low


def test_precision_curve():
    t = table(200, 1)
    curve = precision_curve(t.score, t.faithful, 20)
    assert curve.keep.iloc[-1] == 1
    assert curve.precision.iloc[-1] == pytest.approx(t.faithful.mean())
    assert curve.keep.is_monotonic_increasing
    for c in curve.itertuples():
        assert c.precision == pytest.approx(precision_at(t[["score", "faithful"]], c.keep))
    assert (precision_curve(t.faithful, t.faithful).precision.to_numpy() >= curve.precision.max() - 1).all()
    assert len(precision_curve([1.0], [1])) == 1


def test_filtering_and_judging_by_one_model_deceives():
    rng = np.random.default_rng(0)
    q, a, b = rng.normal(size=(3, 20_000))
    a, b = q + a, q + b
    t = pd.DataFrame(dict(key=[str(i) for i in range(20_000)], group=0, score=a))
    k = select(t, 0.5)["selected"]
    rise = lambda x: x[k].mean() - x.mean()
    assert rise(a) == pytest.approx(2 * rise(q), rel=0.1)
    assert rise(b) == pytest.approx(rise(q), rel=0.1)
