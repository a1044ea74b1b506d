"Statistics: each method against a hand calculation or a library, and against a simulated world."

import numpy as np, pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as sm_mcnemar
from statsmodels.stats.proportion import proportion_confint
from selfalign.study import statistics as s
from selfalign.study.statistics import StatisticsError

rng = lambda seed=0: np.random.default_rng(seed)
width = lambda i: i.high - i.low

# --- shares ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (9, 10), (81, 100), (1, 1)])
def test_proportion_is_wilson(right, n):
    found = s.proportion([1] * right + [0] * (n - right))
    z = stats.norm.ppf(0.975)
    centre, half = (
        (right / n + z * z / (2 * n)) / (1 + z * z / n),
        z / (1 + z * z / n) * np.sqrt(right / n * (1 - right / n) / n + z * z / (4 * n * n)),
    )
    assert found[:3] == pytest.approx((right / n, centre - half, centre + half), abs=1e-9)
    assert found.n == n
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_proportion_level():
    assert s.proportion([1] * 8 + [0] * 2, level=0.9)[1:3] == pytest.approx(proportion_confint(8, 10, 0.1, "wilson"))


@pytest.mark.parametrize(
    "bad, message",
    [([], "nothing can be said"), ([1, float("nan")], "1 of 2 values are missing"), ([0.5], "true or false")],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(StatisticsError, match=message):
        s.proportion(bad)


# --- bootstrap ---------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean_is_scipys():
    x = rng().exponential(3, 300)
    theirs = stats.bootstrap([x], np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    mine = s.bootstrap(x, repeats=20_000)
    assert mine.value == pytest.approx(x.mean())
    assert mine[1:3] == pytest.approx(theirs, abs=0.03)


def test_fast_and_general_way_agree():
    x, groups = rng().normal(size=500), rng(1).integers(0, 60, 500)
    fast, general = s.bootstrap(x, groups, repeats=4000), s.bootstrap(x, groups, np.mean, repeats=4000)
    assert fast.value == pytest.approx(general.value)
    assert fast[1:3] == pytest.approx(general[1:3], abs=0.01)
    assert fast[1:3] == s.bootstrap(x, groups, repeats=4000)[1:3], "the same seed gives the same interval"


def test_many_repeats_in_several_blocks_say_the_same():
    x = rng().normal(size=50)
    one_block, three = s.bootstrap(x, repeats=40_000), s.bootstrap(x, repeats=100_001)
    assert three[1:3] == pytest.approx(one_block[1:3], abs=0.01)


def test_clusters_by_any_label_in_any_order():
    x, names = rng().normal(size=40), np.repeat([f"image {i}" for i in range(10)], 4)
    order = rng(3).permutation(40)
    a, b = s.bootstrap(x, names, repeats=4000), s.bootstrap(x[order], names[order], repeats=4000)
    assert a[1:3] == pytest.approx(b[1:3])


def test_one_cluster_has_no_width():
    assert width(s.bootstrap([1, 2, 3], ["a"] * 3)) == 0


def test_bootstrap_of_rows():
    x = rng().normal([2, 4], 0.1, (400, 2))
    ratio = s.bootstrap(x, statistic=lambda rows: rows[:, 1].mean() / rows[:, 0].mean(), repeats=500)
    assert ratio.low < 2 < ratio.high
    assert width(ratio) < 0.05


def test_clusters_must_match():
    with pytest.raises(StatisticsError, match="2 cluster labels for 3 values"):
        s.bootstrap([1, 2, 3], ["a", "b"])


def test_coverage_with_clusters():
    "Images with three captions each: the cluster interval holds the truth as often as it says, the naive one does not."
    r, inside = rng(), {True: 0, False: 0}
    for _ in range(300):
        x = np.repeat(r.normal(0, 1, 80), 3) + r.normal(0, 0.3, 240)
        for clustered in inside:
            found = s.bootstrap(x, np.repeat(np.arange(80), 3) if clustered else None, repeats=400, seed=1)
            inside[clustered] += found.low <= 0 <= found.high
    assert inside[True] / 300 > 0.9 and inside[False] / 300 < 0.85


def test_twenty_thousand_items_are_quick():
    import time

    x, begin = rng().normal(size=20_000), time.process_time()
    s.bootstrap(x)
    assert time.process_time() - begin < 5


# --- pairs -------------------------------------------------------------------------------------------------------


def test_paired_difference():
    x, difference = rng().normal(0, 10, 400), rng(1).normal(1, 1, 400)
    found = s.paired_difference(x + difference, x)
    half = stats.t.ppf(0.975, 399) * difference.std(ddof=1) / 20
    assert found[:3] == pytest.approx((difference.mean(), difference.mean() - half, difference.mean() + half), abs=0.02)
    with pytest.raises(StatisticsError, match="come in pairs: 2 against 3"):
        s.paired_difference([1, 2], [1, 2, 3])


@pytest.mark.parametrize("seed", range(3))
def test_mcnemar_is_statsmodels_and_a_binomial_test(seed):
    a, b = rng(seed).random((2, 60)) < [[0.7], [0.5]]
    found = s.mcnemar(a, b)
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    assert found.p == pytest.approx(sm_mcnemar(table, exact=True).pvalue)
    assert found.p == pytest.approx(stats.binomtest(found.only_a, found.only_a + found.only_b).pvalue)


def test_mcnemar_without_disagreement():
    assert s.mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)


def test_holm_by_hand():
    "Sorted .005·4, .01·3, .03·2, .04·1, made monotone: .02, .03, .06, .06."
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# --- seeds -------------------------------------------------------------------------------------------------------


def test_seeds_interval_is_a_t_interval():
    x = [0.71, 0.74, 0.69, 0.75, 0.72]
    assert s.seeds_interval(x)[1:3] == pytest.approx(stats.t.interval(0.95, 4, np.mean(x), stats.sem(x)))
    assert s.seeds_interval(x)._asdict()["seeds"] == 5
    with pytest.raises(StatisticsError, match="at least two"):
        s.seeds_interval([1])


def test_items_and_seeds_extremes():
    x = rng().normal(size=100)
    only_items = s.items_and_seeds(np.tile(x, (4, 1)))
    assert only_items[1:3] == pytest.approx(stats.t.interval(0.95, 99, x.mean(), stats.sem(x)))
    only_seeds = s.items_and_seeds(np.repeat([[1.0], [2.0], [4.0]], 30, 1))
    assert only_seeds[1:3] == pytest.approx(s.seeds_interval([1, 2, 4])[1:3])
    assert width(s.items_and_seeds(np.ones((2, 2)))) == 0


def test_items_and_seeds_with_clusters():
    x = np.repeat(rng().normal(size=50), 4)
    found = s.items_and_seeds(np.tile(x, (3, 1)), np.repeat(np.arange(50), 4))
    assert width(found) == pytest.approx(2 * stats.t.ppf(0.975, 49) * x[::4].std(ddof=1) / np.sqrt(50))
    with pytest.raises(StatisticsError, match="shape .1, 5."):
        s.items_and_seeds(np.ones((1, 5)))


# --- a score against the truth -----------------------------------------------------------------------------------


def test_auc_is_the_share_of_pairs_in_order():
    rows = np.stack([rng().normal(size=300).round(1), rng(1).random(300) < 0.3], 1)
    right, wrong = (rows[rows[:, 1] == t, 0][:, None] for t in (1, 0))
    in_order = (right > wrong.T).mean() + (right == wrong.T).mean() / 2
    assert s.auc(rows) == pytest.approx(in_order)


def test_auc_needs_both_kinds():
    assert np.isnan(s.auc([[1, 1], [2, 1]]))
    assert np.isnan(s.auc([[1, 0], [2, 0]]))


def test_precision_of_everything_is_the_share_of_the_right():
    rows = np.stack([rng().normal(size=50), rng(1).random(50) < 0.3], 1)
    assert s.precision_at(rows, 1) == pytest.approx(rows[:, 1].mean())
    assert s.precision_at([[3, 1], [2, 0], [1, 1]], 0.01) == 1, "at least one is kept"
