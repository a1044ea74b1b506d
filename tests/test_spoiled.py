"Spoiled captions: as many as asked for, wrong for sure, no trace in the texts; and how well they are found."

from collections import Counter
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from selfalign.data.augmentation import find_words
from selfalign.data.spoiled import (
    PHOTOGRAPHS,
    SPOILING,
    WordsInUse,
    damaged_caption,
    moved_captions,
    spoil,
    words_in_use,
)
from selfalign.models.embed import EmbeddingStore
from selfalign.models.features import PairedFeatures
from selfalign.models.heads import make_head
from selfalign.models.scores import text_key
from selfalign.sail import selection as sl
from selfalign.study.settings import StudyError
from selfalign.study.statistics import auc

SAID = [
    "a black dog runs on the beach",
    "two men are sitting in the snow",
    "a girl with a red ball",
    "nothing of the kind",
    "a white horse standing near a road",
]


def pairs_of(n, captions=2):
    "Pairs of n scenes with some captions each."
    text = [SAID[(i + j) % len(SAID)] + f" {i}" for i in range(n) for j in range(captions)]
    key = [f"{i}#{j}" for i in range(n) for j in range(captions)]
    image = [k.split("#")[0] for k in key]
    return pd.DataFrame(dict(key=key, image=image, scene=image, text=text))


@pytest.mark.parametrize("lists", SPOILING.values(), ids=SPOILING)
def test_a_word_has_one_kind_and_each_kind_a_choice(lists):
    words = Counter(w for groups in lists.values() for g in groups for w in g)
    assert max(words.values()) == 1
    assert all(len(groups) > 1 for groups in lists.values())
    assert all(w == w.lower() for w in words)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.integers(0, 3))
def test_captions_move_to_another_scene_and_none_is_lost(scenes, seed):
    if 2 * max(Counter(scenes).values()) > len(scenes):
        with pytest.raises(StudyError, match="of one scene"):
            moved_captions(scenes, seed)
        return
    other = moved_captions(scenes, seed)
    assert sorted(other) == list(range(len(scenes)))
    assert all(scenes[i] != scenes[j] for i, j in enumerate(other))


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 40), st.floats(0.1, 0.9), st.integers(0, 5))
def test_what_is_called_wrong_is_another_text_and_no_other_is(n, share, seed):
    pairs = pairs_of(n)
    words = words_in_use(pairs.text, PHOTOGRAPHS, least=1)
    if 2 > round(share * len(pairs) / 2):
        return
    try:
        found = spoil(pairs, words, share, seed)
    except StudyError:
        return
    own = pairs.groupby("scene").text.agg(set)
    wrong = found.wrong != ""
    assert list(found.key) == list(pairs.key) and list(found.own) == list(pairs.text)
    assert (found.drawn != "").sum() == 2 * round(share * len(pairs) / 2)
    assert (found.text[~wrong] == found.own[~wrong]).all()
    assert not any(t in own[s] for t, s in zip(found.text[wrong], found.scene[wrong]))
    assert (found.wrong[wrong] == found.drawn[wrong]).all()
    moved = found[found.wrong == "exchanged"]
    assert set(moved.text) <= set(found.own[found.drawn == "exchanged"])


def test_one_word_is_wrong_and_no_witness_says_the_new_one():
    words = words_in_use(SAID * 5, PHOTOGRAPHS, least=5)
    for seed in range(30):
        text, kind, old, new = damaged_caption(SAID[0], "k", seed, words, ["a red thing", "in the snow"])
        before, after = SAID[0].split(), text.split()
        assert sum(a != b for a, b in zip(before, after)) == 1 and len(before) == len(after)
        assert new not in ("red", "snow") and words.counts[new] >= 5
        assert kind in words.lists and (old, new) != (new, old)
    assert damaged_caption("nothing of the kind", "k", 0, words) is None


def test_a_word_comes_as_often_as_it_is_said():
    texts = ["a black dog"] * 60 + ["a white dog"] * 30 + ["a pink dog"] * 10 + ["a red dog"] * 4
    words = words_in_use(texts, dict(colour=PHOTOGRAPHS["colour"]), least=5)
    assert words.lists == dict(colour=(("pink",), ("white",), ("black",)))
    new = Counter(damaged_caption("a black dog", str(i), 0, words)[3] for i in range(400))
    assert set(new) == {"white", "pink"} and 2 < new["white"] / new["pink"] < 4.5


def test_the_same_draw_again_and_other_seeds_other_words():
    words = words_in_use(SAID * 5, PHOTOGRAPHS)
    assert damaged_caption(SAID[0], "k", 1, words) == damaged_caption(SAID[0], "k", 1, words)
    assert len({damaged_caption(SAID[0], "k", s, words) for s in range(20)}) > 3


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.5])
def test_a_share_that_is_none(share):
    with pytest.raises(StudyError, match="above 0 and below 1"):
        spoil(pairs_of(4), WordsInUse({}, Counter()), share)


# --- found and selected ------------------------------------------------------------------------------------------


def store(folder, keys, d, seed):
    "A store with random vectors."
    kind = dict(model="m", weights="w", kind="text", preprocessing="p", pooling="mean", dimension=d)
    made = EmbeddingStore(folder, kind)
    made.append(list(keys), np.random.default_rng(seed).normal(size=(len(keys), d)))
    return made


@pytest.fixture
def spoken(tmp_path):
    "Pairs whose second captions are in a store of their own."
    pairs = pairs_of(6)
    first, second = pairs[::2], pairs[1::2]
    texts = [store(tmp_path / f"{i}", [text_key(t) for t in part.text], 5, i) for i, part in enumerate((first, second))]
    return pairs, store(tmp_path / "images", pairs.image.unique(), 7, 9), texts


def test_rows_from_two_stores(spoken):
    pairs, images, texts = spoken
    order = pairs.sample(frac=1, random_state=0)
    rows = sl.text_rows(order.text, *texts)
    for text, row in zip(order.text, rows):
        assert np.allclose(row, texts[text_key(text) not in texts[0]].read([text_key(text)])[0])
    made = sl.spoken_pairs(order, images, texts, draws=2)
    assert isinstance(made, PairedFeatures) and len(made) == 6 and len(made.sets) == 2
    assert made.sets[0].counts.tolist() == [2] * 6


def test_the_blind_score_does_not_see_its_image(spoken):
    pairs, images, texts = spoken
    heads = make_head("linear", 7, 4, seed=0), make_head("linear", 5, 4, seed=1)
    found = sl.cosines(heads, sl.spoken_pairs(pairs, images, texts))
    assert len(found) == len(pairs) and found.abs().max().max() <= 1 + 1e-5
    assert not np.allclose(found.looking, found.blind)


def test_the_mean_over_seeds_and_an_interval_that_knows_scenes():
    rng = np.random.default_rng(0)
    truth, seeds, scenes = rng.random(600) < 0.5, np.repeat([0, 1, 2], 200), np.tile(np.arange(200), 3)
    rows = np.column_stack([rng.normal(size=600) + truth, truth]).astype(float)
    found = sl.over_seeds(rows, seeds, scenes, auc, 100)
    assert found.value == pytest.approx(np.mean([auc(rows[seeds == s]) for s in range(3)]))
    assert found.low < found.value < found.high and (found.n, found.seeds) == (200, 3)
    few = sl.over_seeds(rows, seeds, scenes // 40, auc, 100)
    assert few.value == found.value


def test_arms_of_one_size_and_the_truth_on_top():
    rng = np.random.default_rng(0)
    wrong = rng.choice(["", "exchanged", "damaged"], 100, p=[0.6, 0.2, 0.2])
    pairs = pd.DataFrame(dict(key=[f"{i}" for i in range(100)], wrong=wrong, score=rng.normal(size=100)))
    arms = sl.pairs_of_arms(pairs, 0.5, 1)
    assert tuple(arms) == sl.ARMS
    assert {int(arms[a].sum()) for a in ("selected", "random-drop", "clean")} == {50}
    assert (pairs.wrong[arms["clean"]] == "").all() and (pairs.wrong[arms["spoiled"]] != "").all()
    assert pairs.score[arms["selected"]].min() >= pairs.score[~arms["selected"]].max()
    assert arms["all"].all() and arms["shuffled"].all()


def test_the_claims_name_arms():
    for claim in sl.HYPOTHESES:
        assert {claim.arm, claim.against} <= set(sl.ARMS) and claim.claim
    assert {sl.CONTROL.helped, sl.CONTROL.spoiled, sl.CONTROL.before} <= set(sl.ARMS)


def test_words_are_found_whole():
    assert [w for _, _, w, *_ in find_words("A catfish and a skateboarder on Snowy roads", PHOTOGRAPHS)] == []
