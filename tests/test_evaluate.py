"Table 1: arms, verdicts, and the committed numbers computed again from the committed answers."

from pathlib import Path
import json
import numpy as np, pandas as pd, pytest
from PIL import Image
from selfalign.benchmarks.evaluator import Retention, TwoChoice, rows_of, to_scored
from selfalign.benchmarks.items import Benchmark, BenchmarkError
from selfalign.benchmarks.sections import scored_arms, scored_retention, section_table
from selfalign.benchmarks.vl_checklist import checklist_table
from selfalign.data.captions import is_true, web_caption
from selfalign.data.microworld import clean_caption_of
from selfalign.data.redraw import asks_for_held_out, redraw
from selfalign.data.scenes import groups, held_out
from selfalign.models.finetune import FinetuneConfig, best_rate
from selfalign.self_align.evaluate import HYPOTHESES
from selfalign.models.objective import Objective
from selfalign.self_align.arms import (
    ARMS,
    CONTROL_ARMS,
    FULL_ARMS,
    OPTION_ARMS,
    PAPER_ARMS,
    Sources,
    arm_callbacks,
    arm_config,
    arm_pairs,
    arm_rows,
    find_arm,
    trainings,
)
from selfalign.study.hypotheses import NUMBERS, Scored, arm_difference, compare_arms, judged, summarise, verdict_of
from selfalign.study.metrics import metric_of
from selfalign.study.ranking import ranks, recall_at, recall_of_pairs
from selfalign.study.settings import StudyError, resolve
from selfalign.study.statistics import Interval

REPORT = Path(__file__).resolve().parents[1] / "reports" / "published" / "micro"

# --- arms --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path):
    "Four microworld pairs and their generated sisters, all images of one colour."
    rows = []
    for i in range(4):
        caption, *_ = web_caption("study", i)
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"o{i}.png")
        Image.new("RGB", (64, 64), (i, 9, 0)).save(tmp_path / f"g{i}.png")
        rows.append(
            dict(
                key=f"study-{i:07d}",
                image=f"o{i}.png",
                caption=caption.text,
                claims=json.dumps(caption.claims),
                truth="{}",
                width=64,
                folder=str(tmp_path),
            )
        )
    pairs = pd.DataFrame(rows)
    generated = pairs.assign(parent=pairs.key, key=pairs.key + "-g", image=[f"g{i}.png" for i in range(4)])
    kept = dict(selected=(0, 1), oracle=(2,)) | {"random-drop": (1, 3)}
    selection = pd.concat(
        [pd.DataFrame(dict(key=generated.key, selection=s, kept=[i in k for i in range(4)])) for s, k in kept.items()]
    )
    conditioned = generated.assign(image=[f"o{3 - i}.png" for i in range(4)])
    texts = dict(
        long={pairs.key[i]: f"longer {i}" for i in (0, 2)},
        positive={pairs.key[1]: "the same"},
        negative={pairs.key[3]: "something else"},
    )
    return Sources(pairs, generated, selection, conditioned, texts)


def first_pixels(images):
    return [np.asarray(p)[0, 0].tolist() for p in images]


def pairs_of(name, sources):
    arm = find_arm(name)
    return arm_pairs(arm, arm_rows(arm, sources), sources.texts)


SEEN = {
    "lora-originals": [[i, 0, 0] for i in range(4)],
    "lora-generated": [[i, 9, 0] for i in range(4)],
    "lora-selected": [[0, 9, 0], [1, 9, 0]],
    "lora-random-drop": [[1, 9, 0], [3, 9, 0]],
    "lora-oracle-selected": [[2, 9, 0]],
    "lora-clean-originals": [[i, 0, 0] for i in range(4)],
    "lora-mixed": [[0, 0, 0], [2, 0, 0], [1, 9, 0], [3, 9, 0]],
    "lora-grey": [[128] * 3] * 4,
    "lora-shuffled": [[2, 9, 0], [3, 9, 0], [0, 9, 0], [1, 9, 0]],
    "lora-image-conditioned": [[3 - i, 0, 0] for i in range(4)],
    "lora-augmented": [[0, 9, 0], [2, 9, 0]],
}


@pytest.mark.parametrize("name", SEEN)
def test_each_arm_sees_what_its_name_says(tables, name):
    found = pairs_of(name, tables)
    assert first_pixels(found["images"]) == SEEN[name]
    assert len(found["captions"]) == len(SEEN[name])


@pytest.mark.parametrize(
    "name", ["lora-originals", "lora-generated", "lora-perfect-generator", "lora-shuffled", "lora-grey"]
)
def test_captions_as_found(tables, name):
    assert pairs_of(name, tables)["captions"] == list(tables.originals.caption)


def test_other_captions(tables):
    assert pairs_of("lora-clean-originals", tables)["captions"] == [clean_caption_of(k) for k in tables.originals.key]
    assert pairs_of("lora-augmented", tables)["captions"] == ["longer 0", "longer 2"]


@pytest.mark.parametrize("arm", [a for a in (*OPTION_ARMS, *PAPER_ARMS) if a.per_caption == 1], ids=lambda a: a.name)
def test_options_learn_from_generated_images(tables, arm):
    assert first_pixels(pairs_of(arm.name, tables)["images"]) == SEEN["lora-generated"]


def test_two_images_a_caption(tables):
    found = pairs_of("lora-two-images", tables)
    assert [p[1] for p in first_pixels(found["images"])] == [9, 0] * 4
    assert found["captions"] == [c for c in tables.originals.caption for _ in "ab"]
    assert arm_rows(find_arm("lora-four-images"), tables) is None


def test_selected_originals(tables):
    kept = pd.DataFrame(dict(key=tables.originals.key, selection="selected", kept=[True, False, True, False]))
    sources = tables._replace(selection=kept)
    assert first_pixels(pairs_of("lora-originals-selected", sources)["images"]) == [[0, 0, 0], [2, 0, 0]]


def test_several_images_of_one_stage(tables):
    generated, conditioned = tables.generated, tables.conditioned
    other = generated.assign(key=generated.key + "1", image=conditioned.image)
    some = tables._replace(generated=pd.concat([generated, other[:3]]), conditioned=None)
    rows = arm_rows(find_arm("lora-two-images"), some)
    assert list(rows.key) == [k for key in generated.key[:3] for k in (key, key + "1")]
    rows = arm_rows(find_arm("lora-four-images"), tables._replace(generated=pd.concat([generated, other, other])))
    assert rows.parent.value_counts().eq(4).all()
    assert list(rows.image[:4]) == ["g0.png", "o3.png", "o3.png", "o3.png"]


BASE = FinetuneConfig(steps=24, options=dict(rank=3, alpha=3.0, rslora=False, towers=("image", "text")))


def test_which_arms_are_trained_otherwise():
    changed = {name for name, arm in ARMS.items() if arm_config(arm, BASE) != BASE}
    named = {a.name for a in (*OPTION_ARMS, *PAPER_ARMS)} - {"lora-rank-3"}
    named |= {a.name for a in (*CONTROL_ARMS, *FULL_ARMS) if a.adapter == "all-weights"}
    assert changed == named | {"lora-text-tower", "lora-image-tower"}


def test_the_papers_training():
    config = arm_config(find_arm("faithful"), BASE)
    assert config.adapter == "paper"
    assert config.options == dict(rank=3, alpha=1.0)
    assert config.warmup == pytest.approx(1 / 0.7)
    assert config.objective == Objective(positives=1.0)
    assert (config.clip, config.eps) == (float("inf"), 1e-6)
    assert [c.least for c in arm_callbacks(find_arm("faithful"))] == [0.9]


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("faithful-zero-start", "options", dict(rank=3, alpha=1.0, xavier=False)),
        ("faithful-blocks-only", "options", dict(rank=3, alpha=1.0, conv=False)),
        ("faithful-scale-1", "options", dict(rank=3, alpha=4.0)),
        ("faithful-warm-up-ends", "warmup", 0.05),
        ("faithful-plain-loss", "objective", Objective()),
    ],
)
def test_one_peculiarity_is_undone(name, field, value):
    found, whole = vars(arm_config(find_arm(name), BASE)), vars(arm_config(find_arm("faithful"), BASE))
    assert found[field] == value
    assert {k for k in found if found[k] != whole[k]} == {field}
    assert len(arm_callbacks(find_arm(name))) == 1


def test_crops_undone():
    assert arm_config(find_arm("faithful-no-crops"), BASE) == arm_config(find_arm("faithful"), BASE)
    assert arm_callbacks(find_arm("faithful-no-crops")) == []


def test_texts_beside_captions(tables):
    captions = list(tables.generated.caption)
    assert pairs_of("lora-positives", tables)["positives"] == [captions[0], "the same", *captions[2:]]
    assert pairs_of("lora-negatives", tables)["negatives"] == ["", "", "", "something else"]
    assert pairs_of("lora-generated", tables)["positives"] == []


def test_arms_that_need_what_is_not_there_are_left_out(tables):
    selection = tables.selection[tables.selection.selection != "oracle"]
    real = Sources(tables.originals.assign(truth=None), tables.generated, selection)
    assert [name for name, arm in ARMS.items() if arm_rows(arm, real) is None] == [
        "lora-clean-originals",
        "lora-perfect-generator",
        "lora-oracle-selected",
        "lora-image-conditioned",
        "lora-augmented",
        "all-weights",
        "all-weights-wrong-60",
        "lora-wrong-60",
        "round-trip",
        "all-weights-perfect-generator",
        "lora-two-images",
        "lora-four-images",
        "lora-positives",
        "lora-negatives",
    ]
    with pytest.raises(StudyError, match="did you mean 'lora-selected'"):
        find_arm("lora-slected")


def test_every_rate_is_taken_from_an_arm_that_chooses_its_own():
    for arm in ARMS.values():
        assert not arm.rate_of or not find_arm(arm.rate_of).rate_of


def test_clean_captions_are_true_and_equal_where_nothing_was_done():
    for i in range(150):
        noisy, _, done = web_caption("study", i)
        clean = clean_caption_of(f"study-{i:07d}")
        if not done:
            assert noisy.text == clean


def test_a_perfect_generator_never_errs_and_shows_no_pair_kept_back():
    for i in range(300):
        claims = web_caption("study", i)[0].claims
        scene = redraw(claims, str(i))
        assert is_true(claims, scene) and scene == redraw(claims, str(i)) and len(scene.things) == len(claims["things"])
        for said, t in zip(claims["things"], scene.things):
            assert (t.object, t.colour) not in held_out or {"object", "colour"} <= set(said)
        for t in scene.things:
            assert (
                not t.action
                or t.object in groups["animal"] + groups["vehicle"]
                or "action" in said
                or scene.relation == "chasing"
            )
    assert redraw(claims, "x", 0) != redraw(claims, "x", 1)
    assert (
        0 < sum(asks_for_held_out(web_caption("study", i)[0].claims) for i in range(600)) < 20
    )  # only wrong captions do


def test_trainings_and_rates():
    assert trainings(["lora-originals", "lora-rank-1"], 3, 1) == [
        ("lora-originals", 0),
        ("lora-originals", 1),
        ("lora-originals", 2),
        ("lora-rank-1", 0),
    ]
    assert best_rate({3e-3: 1.0, 1e-3: 1.0}) == 1e-3


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, low, high, p, harmless, verdict",
    [
        (0.05, 0.03, 0.07, 0.01, False, "supported"),
        (0.05, 0.03, 0.07, 0.06, False, "undecided"),
        (0.019, 0.001, 0.03, 0.001, False, "undecided"),
        (0.0, -0.01, 0.01, 0.9, False, "not supported"),
        (-0.1, -0.2, -0.05, 0.001, False, "not supported"),
        (0.03, -0.01, 0.07, 0.2, False, "undecided"),
        (-0.01, -0.015, 0.0, 0.01, True, "supported"),
        (-0.03, -0.05, -0.021, 0.01, True, "not supported"),
        (-0.01, -0.04, 0.02, 1.0, True, "undecided"),
    ],
)
def test_the_rule(value, low, high, p, harmless, verdict):
    assert verdict_of(Interval(value, low, high, 100), p, harmless) == verdict


def test_section_table_is_the_mean_of_means():
    rng = np.random.default_rng(0)
    items = pd.DataFrame(
        [
            dict(category=c, dataset=d, file=f"{c}/{d}", key=f"{c}{d}{i}", image=str(i), positive="a", negative="b")
            for c in ("Object/Size/large", "Object/Location/mid", "Relation/action")
            for d in ("vg", "hake")
            for i in range(3 + 9 * (d == "vg"))
        ]
    )
    correct = [rng.random(len(items)) < 0.7 for _ in range(2)]
    table = section_table(items, correct, "Object")
    assert table.shape == (2, 30)
    for c, row in zip(correct, table):
        assert row.mean() == pytest.approx(checklist_table(items.assign(correct=c)).set_index("row").value["Object"])


def test_comparisons_are_corrected_together():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 1, (3, 200))
    of = lambda t: Scored(t, None, (0, 1, 2))
    tables = {("a", "m"): of(base + 0.3), ("b", "m"): of(base + rng.normal(0, 0.05, (3, 200))), ("c", "m"): of(base)}
    found = compare_arms(tables, [("a", "c", "m"), ("b", "c", "m"), ("z", "c", "m")])
    assert list(found.arm) == ["a", "b"]
    assert (found.p_holm >= found.p).all()
    assert found.p_holm[0] < 1e-6 < found.p_holm[1]
    apart = compare_arms(tables, [("a", "c", "m"), ("b", "c", "m")], [False, True])
    assert np.isnan(apart.p_holm[0])
    assert apart.p_holm[1] == apart.p[1]


def test_seeds_are_paired_by_number_and_one_training_is_not_held_against_five():
    rng = np.random.default_rng(2)
    seeds = rng.normal(0, 0.1, (5, 1))
    base = rng.normal(0, 1, 100) + seeds
    lacking = Scored(base[[0, 2, 4]], None, (0, 2, 4))
    whole = Scored(base, None, (0, 1, 2, 3, 4))
    difference, p, n = arm_difference(lacking, whole)
    assert difference.value == 0 and p == 1 and n == 3
    assert arm_difference(Scored(base[[3]], None, (3,)), whole)[2] == 1
    assert arm_difference(Scored(base[[3]], None), whole)[2] == 5
    with pytest.raises(StudyError, match="without a common seed"):
        arm_difference(Scored(base[[0]], None, (7,)), whole)


def test_retention_checks():
    x = np.eye(4)
    assert recall_of_pairs(x, x, list("abcd")).tolist() == [1] * 4
    assert recall_of_pairs(x, x[[1, 0, 2, 3]], list("abcd")).tolist() == [0, 0, 1, 1]
    assert recall_of_pairs(x * 0, x, list("abcd")).tolist() == [0] * 4, "a tie with all others finds nothing"
    assert recall_at(ranks(x[:2], x[:2], [0, 0], [0, 1])).tolist() == [1, 0]


def test_intervals_of_shares_stay_between_nothing_and_all():
    i = summarise(np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]]), None)
    assert 0 <= i.low <= i.value <= i.high <= 1


def test_hypotheses_name_known_arms():
    assert {a for h in HYPOTHESES for a in (h.arm, h.against)} <= {*ARMS, "zero-shot"} and len(
        {h.name for h in HYPOTHESES}
    ) == len(HYPOTHESES)


# --- the committed report ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    results = pd.read_csv(REPORT / "results.csv")
    results = results[(results.chapter == "self-align") & results.table.str.match(r"table1(-biased)?$")]
    assert len(results), "the committed report has no Table 1"
    return (
        results,
        pd.read_parquet(REPORT / "evaluate/tables/predictions.parquet"),
        pd.read_parquet(REPORT / "evaluate/tables/retention.parquet"),
    )


@pytest.mark.slow
def test_every_accuracy_follows_from_the_committed_answers(published):
    results, predictions, retained = published
    checked = 0
    for r in results.itertuples():
        if r.metric in ("retrieval-r1", "zero-shot-accuracy"):
            value = retained[(retained.arm == r.row) & (retained.metric == r.metric)].correct.mean()
        else:
            section, _, mode = r.metric.partition("-")
            part = predictions[predictions.dataset == ("biased" if r.table.endswith("biased") else "balanced")]
            score = lambda mode: np.mean(
                [
                    checklist_table(part.assign(correct=part[c]), repeats=2)
                    .set_index("row")
                    .value[section.capitalize()]
                    for c in part
                    if c.startswith(f"{r.row}/") and c.endswith(f"/{mode}")
                ]
            )
            value = score("looking") - score("blind") if mode == "seen" else score(mode or "looking")
        assert r.value == pytest.approx(value, abs=1e-9), (r.table, r.row, r.metric)
        checked += 1
    assert checked > 30


@pytest.fixture(scope="module")
def recomputed(published):
    _, predictions, retained = published
    return {v: scored_arms(predictions, v) | scored_retention(retained) for v in ("balanced", "biased")}


def test_every_interval_follows_from_the_committed_answers(published, recomputed):
    for r in published[0].itertuples():
        of = recomputed["biased" if r.table.endswith("biased") else "balanced"][r.row, r.metric]
        found = summarise(of.table, of.clusters, r.metric != "object-seen")
        assert (r.value, r.low, r.high, r.n) == pytest.approx(found[:4], abs=1e-9) and (len(of.seeds) or None) == (
            None if np.isnan(r.seeds) else r.seeds
        ), (r.table, r.row, r.metric)


def test_every_difference_and_verdict_follows_from_the_committed_answers(recomputed):
    results = pd.read_csv(REPORT / "results.csv").query('chapter == "self-align"').set_index(["table", "row", "metric"])
    verdicts = judged(HYPOTHESES, recomputed)
    assert (
        list(verdicts.name)
        == [h.name for h in HYPOTHESES]
        == list(dict.fromkeys(row for row, _ in results.loc["verdicts"].index))
    )
    for r in verdicts.itertuples():
        stated = results.loc[("verdicts", r.name, "difference")]
        assert (r.value, r.low, r.high) == pytest.approx((stated.value, stated.low, stated.high), abs=1e-9)
        assert results.loc[("verdicts", r.name, "verdict")].value == NUMBERS[r.verdict], r.name
    stated = results.loc["against-originals"]
    metrics = [m for m in dict.fromkeys(m for _, m in stated.index) if not m.endswith("corrected p")]
    rows = list(dict.fromkeys(row for row, _ in stated.index))
    found = compare_arms(recomputed["balanced"], [(a, "lora-originals", m) for m in metrics for a in rows])
    assert len(found) == len(metrics) * len(rows) > 20
    for r in found.itertuples():
        assert (r.value, r.low, r.high) == pytest.approx(
            tuple(stated.loc[(r.arm, r.metric)][["value", "low", "high"]]), abs=1e-9
        )
        assert stated.loc[(r.arm, f"{r.metric}, corrected p")].value == pytest.approx(r.p_holm, abs=1e-9)


def test_the_micro_benchmark_is_as_large_as_it_says(published):
    _, predictions, _ = published
    for variant, part in predictions.groupby("dataset"):
        assert (
            part.category.nunique() == 13
            and part.groupby("category").size().min() >= 300
            and part.image.nunique() >= 500
        ), variant


def test_every_row_has_interval_chance_and_n(published):
    results, *_ = published
    assert results[["low", "high", "n", "chance"]].notna().all().all()
    assert results[results.row.isin(["lora-originals", "lora-generated"])].seeds.dropna().eq(3).all() and {
        *resolve("micro").values["finetune"]["arms"],
        "zero-shot",
        "word-frequency",
    } == set(results.row)


# --- evaluators and metrics --------------------------------------------------------------------------------------


class Constant:
    "A model whose vectors are all the same."

    encode_image = encode_text = lambda self, things: np.ones((len(things), 4), np.float32)


def test_an_evaluator_asks_every_model_the_same_items():
    one, two = (Retention("microworld:evaluation", 8)(Constant()) for _ in range(2))
    assert list(one) == ["metric", "item", "value", "cluster"]
    pd.testing.assert_frame_equal(one, two)
    assert (one.value == 0).all(), "a tie counts against the model"


def test_rows_become_seeds_and_items_in_any_order():
    rows = pd.concat([rows_of("object", [s, 0, 1], cluster=list("aab")).assign(seed=s) for s in (0, 1)])
    found = to_scored(rows.sample(frac=1, random_state=0))
    assert found.table.tolist() == [[0, 0, 1], [1, 0, 1]]
    assert list(found.clusters) == ["a", "a", "b"]
    assert found.seeds == (0, 1)
    with pytest.raises(BenchmarkError, match="not every model answered every item"):
        to_scored(rows[:-1])


def test_a_question_without_its_image_keeps_the_numbers_of_the_others():
    items = pd.DataFrame(dict(key=list("abc"), category="Object/x", dataset="d", file="f", image=list("pqr")))
    images = {"p": Image.new("RGB", (8, 8)), "q": "nowhere.png", "r": Image.new("RGB", (8, 8), "red")}
    asked = TwoChoice(Benchmark(items.assign(positive="a cat", negative="a dog"), images, {"f": 3}, []))
    found = asked(Constant())
    assert sorted(set(found.item)) == [0, 2]
    assert len(asked.problems) == 1 and asked.problems[0]["file"] == "q"


@pytest.mark.parametrize(
    "name, unit, better, chance",
    [
        ("object", "fraction", "up", 0.5),
        ("object-blind", "fraction", "", 0.5),
        ("recall@5", "fraction", "up", None),
        ("median rank", "count", "down", None),
        ("retrieval-r1, corrected p", "ratio", "", None),
    ],
)
def test_a_metric_is_described_once(name, unit, better, chance):
    assert metric_of(name)[1:] == (unit, better, chance)


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(StudyError, match="did you mean 'retrieval-r1'"):
        metric_of("retrieval-r2")
