"Benchmarks: each distinct thing encoded once, no answer changed, nothing lost in silence, averages as published."

import hashlib, json, math
from collections import Counter
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from PIL import Image
from selfalign.benchmarks import audits as a, items as it, micro_checklist as mc, vl_checklist as vl
from selfalign.benchmarks.items import Benchmark, BenchmarkError
from selfalign.data.captions import web_caption
from selfalign.data.scenes import Scene, Thing, make_scene


class Stub:
    "An encoder that gives the same thing the same unit vector, and counts what it is asked."

    def __init__(self, dimension=8):
        self.dimension, self.images, self.texts = dimension, [], []

    def _vectors(self, seeds):
        x = np.stack(
            [
                np.random.default_rng(int(hashlib.sha256(s).hexdigest()[:8], 16)).normal(size=self.dimension)
                for s in seeds
            ]
        )
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    def encode_image(self, images):
        self.images += images
        return self._vectors([i.tobytes() for i in images])

    def encode_text(self, texts):
        self.texts += texts
        return self._vectors([t.encode() for t in texts])


def photo(i):
    return Image.new("RGB", (4, 4), (i % 256, i // 256, 90))


def toy(n=40, images=7, texts=5, seed=0):
    "Items that share images and texts."
    rng = np.random.default_rng(seed)
    pairs = [rng.choice(texts, 2, replace=False) for _ in range(n)]
    items = pd.DataFrame(
        [
            dict(
                key=f"{i}",
                category=f"c{i % 3}",
                file=f"f{i % 2}",
                image=f"p{rng.integers(images)}",
                positive=f"text {p}",
                negative=f"text {q}",
            )
            for i, (p, q) in enumerate(pairs)
        ]
    )
    return Benchmark(items, {f"p{i}": photo(i) for i in range(images)})


# --- items -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_each_distinct_thing_is_encoded_once(batch):
    stub, b = Stub(), toy()
    it.encode(b, stub, batch=batch)
    assert len(stub.images) == b.items.image.nunique()
    assert sorted(stub.texts) == sorted({*b.items.positive, *b.items.negative})


@pytest.mark.parametrize("batch", [2, 256])
def test_same_answers_as_the_plain_loop(batch):
    b, stub = toy(), Stub()
    fast = it.predict(it.encode(b, stub, batch=batch))
    for row in fast.itertuples():
        image, texts = stub.encode_image([b.images[row.image]])[0], stub.encode_text([row.positive, row.negative])
        p, n = texts.astype(np.float64) @ image.astype(np.float64)
        assert (row.score_positive, row.score_negative) == pytest.approx((p, n), abs=1e-12)
        assert row.correct == (p > n)
    assert fast.key.tolist() == b.items.key.tolist(), "in the order of the items"


def test_a_real_encoder_gives_the_plain_loops_scores(tiny_clip):
    from selfalign.models.load import load_dual_encoder

    clip, b = load_dual_encoder(f"open_clip:{tiny_clip}"), toy(12)
    fast, problems = it.evaluate(b, clip)
    loop = [
        [float(clip.encode_image([b.images[r.image]])[0] @ clip.encode_text([t])[0]) for t in (r.positive, r.negative)]
        for r in b.items.itertuples()
    ]
    assert fast[["score_positive", "score_negative"]].to_numpy() == pytest.approx(np.array(loop), abs=1e-5)
    assert not problems


def test_strictly_greater():
    b = toy(6)
    b.items["negative"] = b.items.positive
    assert not it.predict(it.encode(b, Stub())).correct.any()


def test_block_size_does_not_matter():
    rng = np.random.default_rng(0)
    x, y, i, j = (
        rng.normal(size=(5, 8)).astype("f4"),
        rng.normal(size=(6, 8)).astype("f4"),
        rng.integers(5, size=50),
        rng.integers(6, size=50),
    )
    assert (it.paired_cosines((x, i), (y, j), 7) == it.paired_cosines((x, i), (y, j))).all()


def spoiled(tmp_path):
    b = toy()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "empty.png").write_bytes(b"")
    gone = {"p0": tmp_path / "gone.png", "p1": tmp_path / "bad.png", "p2": tmp_path / "empty.png"}
    return replace(
        b,
        images={k: v for k, v in (b.images | gone).items() if k != "p3"},
        expected={"f0": 20, "f1": 20, "never read": 0},
    )


def test_missing_images_are_listed_and_counted(tmp_path):
    b = spoiled(tmp_path)
    p, problems = it.evaluate(b, Stub())
    assert [x["file"] for x in problems] == ["p0", "p1", "p2", "p3"]
    assert all(x["remedy"] for x in problems)
    assert all(f"ask about it: {(b.items.image == x['file']).sum()})" in x["what"] for x in problems)
    cover = it.coverage(b, p).set_index("file")
    assert cover.answered.sum() == len(p) == (~b.items.image.isin(["p0", "p1", "p2", "p3"])).sum()
    assert cover["items"].sum() == 40
    assert cover.share["never read"] == 0
    with pytest.raises(BenchmarkError, match="never read: 0 of unknown"):
        it.require_coverage(b, p)
    it.require_coverage(b, p, least=0)


def test_images_in_memory_are_the_same_images(tmp_path):
    b = spoiled(tmp_path)
    (p, wrong), (q, again) = it.evaluate(b, Stub()), it.evaluate(it.in_memory(b), Stub())
    pd.testing.assert_frame_equal(p, q)
    assert wrong == again


def test_no_image_at_all(tmp_path):
    b = toy()
    b.images = {k: tmp_path / k for k in b.images}
    with pytest.raises(BenchmarkError, match="none of the 7 images can be opened.*put it at"):
        it.evaluate(b, Stub())


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda i: i[:0], "holds no items"),
        (lambda i: i.drop(columns="image"), "lack image"),
        (lambda i: pd.concat([i, i]), "keys are not unique"),
    ],
)
def test_items_that_cannot_be_asked(spoil, message):
    b = toy()
    b.items = spoil(b.items)
    with pytest.raises(BenchmarkError, match=message):
        it.evaluate(b, Stub())


def test_accuracy_is_clustered():
    p = pd.DataFrame(
        dict(
            category="c", image=np.repeat(np.arange(20), 10).astype(str), correct=np.repeat(np.arange(20) % 2 == 0, 10)
        )
    )
    wide, narrow = it.accuracy(p).iloc[0], it.accuracy(p.assign(image=np.arange(200))).iloc[0]
    assert wide.value == narrow.value == 0.5
    assert wide.high - wide.low > 2.5 * (narrow.high - narrow.low)
    assert wide.images == 20


# --- audits ------------------------------------------------------------------------------------------------------


def test_mean_of_others_by_hand():
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    for i, v in enumerate(a.mean_of_others(x)):
        m = np.delete(x, i, 0).mean(0)
        assert v == pytest.approx(m / np.linalg.norm(m), abs=1e-5)
    with pytest.raises(BenchmarkError, match="at least two"):
        a.mean_of_others(x[:1])


def test_blind_does_not_see_its_own_image():
    "Another image in the item's place changes nothing."
    b = toy()
    stub = Stub()
    other = replace(b, images=b.images | {"p0": photo(999)})
    one, two = (a.blind(it.encode(x, stub)).set_index("image").loc[["p0"]] for x in (b, other))
    assert one.score_positive.to_numpy() == pytest.approx(two.score_positive.to_numpy(), abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_derangement(n):
    d = a.derangement(n, np.random.default_rng(n))
    assert sorted(d) == list(range(n))
    assert (d != np.arange(n)).all()


def test_shuffled_shows_another_image_of_the_category():
    e = it.encode(toy(), Stub())
    p, again, other = a.shuffled(e, 1), a.shuffled(e, 1), a.shuffled(e, 2)
    assert (p.seen != p.image).all()
    assert p.seen.tolist() == again.seen.tolist() != other.seen.tolist()
    for _, part in p.groupby("category"):
        assert set(part.seen) == set(part.image)
        assert part.groupby("image").seen.nunique().max() == 1
    row = p.iloc[5]
    stub = Stub()
    assert row.score_positive == pytest.approx(
        float(
            stub.encode_image([toy().images[row.seen]])[0].astype("f8")
            @ stub.encode_text([row.positive])[0].astype("f8")
        )
    )


@pytest.mark.parametrize(
    "positive, negative, correct",
    [
        ("red car", "teal car", 1),
        ("teal car", "red car", 0),
        ("Red car", "red car", 0.5),
        ("cup left car", "car left cup", 0.5),
        ("the red car", "teal car", 1),
        ("pink car", "lilac car", 0.5),
        ("red", "red red", 0.5),
        ("", "red", 0),
    ],
)
def test_the_rule_that_never_looks(positive, negative, correct):
    items = pd.DataFrame([dict(positive=positive, negative=negative)])
    assert a.word_frequency(items, ["a red car", "the red cup, teal", "red"]).correct.tolist() == [correct]


def test_the_rule_needs_words():
    with pytest.raises(BenchmarkError, match="no words"):
        a.word_frequency(toy().items, ["", "!"])


# --- VL-CheckList ------------------------------------------------------------------------------------------------


def write(folder, file, rows, root="vg/", anno=None, text=None):
    "One corpus file with its annotations."
    anno = anno or f"data/{file}.json"
    for path, content in (
        (folder / f"corpus/v1/{file}.yaml", f'ANNO_PATH: "{anno}"\r\nIMG_ROOT: "{root}"\r\nTYPE: "TUPLE_JSON"'),
        (folder / f"data/{file}.json", json.dumps(rows) if text is None else text),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    return folder


def pair(i, n=1, image=None):
    return [
        image or f"VG_100K/{i}.png",
        dict(POS=[f"red thing {i}", "unused"][:n], NEG=[f"blue thing {i}", "unused"][:n]),
    ]


def images_for(folder, numbers, root="vg"):
    (folder / root / "VG_100K").mkdir(parents=True, exist_ok=True)
    for i in numbers:
        photo(i).save(folder / root / f"VG_100K/{i}.png")
    return folder


def test_reads_the_layout(tmp_path):
    write(tmp_path, "Attribute/color/vg", [pair(0), pair(1, 2)], root="vg")
    write(tmp_path, "Object/Size/small/vg_obj", [pair(1)])
    b = vl.read_checklist(images_for(tmp_path, (0, 1)))
    assert b.items[["category", "file", "dataset", "image"]].values.tolist() == [
        ["Object/Size/small", "Object/Size/small/vg_obj", "vg", "vg/VG_100K/1.png"],
        ["Attribute/color", "Attribute/color/vg", "vg", "vg/VG_100K/0.png"],
        ["Attribute/color", "Attribute/color/vg", "vg", "vg/VG_100K/1.png"],
    ]
    stub = Stub()
    p, problems = it.evaluate(b, stub)
    assert len(p) == 3, "vg and vg/ are one folder"
    assert not problems, "vg and vg/ are one folder"
    assert len(stub.images) == 2, "vg and vg/ are one folder"
    assert b.items.positive.tolist() == ["red thing 1", "red thing 0", "red thing 1"]
    assert b.items.key.is_unique


def test_images_may_lie_elsewhere(tmp_path):
    write(tmp_path / "texts", "Attribute/color/vg", [pair(0)])
    images_for(tmp_path / "photos", (0,))
    assert len(it.evaluate(vl.read_checklist(tmp_path / "texts", tmp_path / "photos"), Stub())[0]) == 1


@pytest.mark.parametrize("wanted, files", [((), 3), (("vg",), 2), ("vg_subj", 1), (("hake",), 1)])
def test_chosen_datasets(tmp_path, wanted, files):
    for f in ("vg_obj", "vg_subj", "hake"):
        write(tmp_path, f"Object/Location/mid/{f}", [pair(0)])
    assert vl.read_checklist(tmp_path, datasets=wanted).items.file.nunique() == files


def test_unknown_dataset_and_empty_folder(tmp_path):
    with pytest.raises(BenchmarkError, match="no corpus file such as corpus/v1"):
        vl.read_checklist(tmp_path)
    with pytest.raises(BenchmarkError, match="did you mean 'hake'"):
        vl.read_checklist(write(tmp_path, "Relation/action/hake", [pair(0)]), datasets="hakr")


def test_missing_annotations_are_a_problem_and_uncovered(tmp_path):
    write(tmp_path, "Attribute/color/vg", [pair(0)])
    write(tmp_path, "Attribute/color/vaw", [pair(0)])
    (tmp_path / "data/Attribute/color/vaw.json").unlink()
    b = vl.read_checklist(images_for(tmp_path, (0,)))
    p, problems = it.evaluate(b, Stub())
    assert [x["what"] for x in problems] == ["data/Attribute/color/vaw.json is not there"]
    with pytest.raises(BenchmarkError, match="Attribute/color/vaw"):
        it.require_coverage(b, p)


@pytest.mark.parametrize(
    "text, message", [("[]", "holds no items"), ('{"a": 1}', "holds a dict"), ("[[", "not JSON"), ("", "not JSON")]
)
def test_damaged_annotations(tmp_path, text, message):
    with pytest.raises(BenchmarkError, match=message) as e:
        vl.read_checklist(write(tmp_path, "Attribute/color/vg", [], text=text))
    assert "color" in str(e.value)
    assert "vg.json" in str(e.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("ANNO_PATH: x", "lacks IMG_ROOT"),
        ("- 1", "lacks ANNO_PATH"),
        ("a: [", "not a corpus file"),
        ("!!python/object/apply:os.getcwd []", "not a corpus file"),
        ("{ANNO_PATH: ../x.json, IMG_ROOT: vg}", "leads out"),
        ("{ANNO_PATH: /etc/passwd, IMG_ROOT: vg}", "leads out"),
        ("{ANNO_PATH: x, IMG_ROOT: ../..}", "leads out"),
        ("{ANNO_PATH: x, IMG_ROOT: 5}", "leads out"),
        ("{ANNO_PATH: x, IMG_ROOT: vg, TYPE: PICKLE}", "only TUPLE_JSON"),
    ],
)
def test_damaged_or_hostile_corpus_files(tmp_path, content, message):
    path = tmp_path / "corpus/v1/Attribute/color/vg.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        vl.read_checklist(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        5,
        None,
        [],
        ["a.png"],
        ["a.png", {}],
        ["a.png", {"POS": ["x"]}],
        ["a.png", {"POS": [], "NEG": ["x"]}],
        ["a.png", {"POS": [None], "NEG": ["x"]}],
        ["a.png", {"POS": ["\x1b[31m"], "NEG": ["x"]}],
        pair(0, image="../../etc/passwd"),
        pair(0, image="/etc/passwd"),
        pair(0, image="a\\b.png"),
        pair(0, image=7),
    ],
)
def test_a_bad_row_is_named_and_counts_as_unanswered(tmp_path, row):
    b = vl.read_checklist(images_for(write(tmp_path, "Attribute/color/vg", [pair(0), row]), (0,)))
    assert [(x["file"].endswith("vg.json"), x["row"]) for x in b.problems] == [(True, "1")]
    assert len(b) == 1
    assert b.expected == {"Attribute/color/vg": 2}
    with pytest.raises(BenchmarkError, match="1 of 2 items"):
        it.require_coverage(b, it.evaluate(b, Stub())[0])


def test_texts_are_made_harmless_and_unanswerable_items_are_listed(tmp_path):
    rows = [
        ["VG_100K/0.png", dict(POS=["a \x1b[31mred\x1b[0m cup"], NEG=[" apron"])],
        ["VG_100K/0.png", dict(POS=["cup"], NEG=["cup "])],
    ]
    b = vl.read_checklist(write(tmp_path, "Attribute/color/vg", rows))
    assert b.items.iloc[0][["positive", "negative"]].tolist() == ["a red cup", "apron"]
    assert len(b) == 2
    assert ["escapes" in x["what"] or "both texts" in x["what"] for x in b.problems] == [True, True]


def test_first_k_takes_items_whose_image_is_there(tmp_path):
    images_for(write(tmp_path, "Attribute/color/vg", [pair(i) for i in range(6)]), (1, 3, 4, 5))
    b = vl.read_checklist(tmp_path, first_k=2)
    assert b.items.image.tolist() == ["vg/VG_100K/1.png", "vg/VG_100K/3.png"]
    assert len(b.problems) == 2
    assert b.expected == {"Attribute/color/vg": 2}
    short = vl.read_checklist(tmp_path, first_k=5)
    assert len(short) == 4
    assert short.expected == {"Attribute/color/vg": 5}


# --- averages ----------------------------------------------------------------------------------------------------


def answers(sizes, share=0.6, seed=0):
    "Answers for files of these sizes."
    rows = [
        dict(
            category=f.rpartition("/")[0],
            dataset=f.rpartition("/")[2].split("_")[0],
            file=f,
            key=f"{f}:{i}",
            image=f"{f}:{i // 2}",
            positive=str(i),
            negative="",
        )
        for f, n in sizes.items()
        for i in range(n)
    ]
    return pd.DataFrame(rows).assign(correct=np.random.default_rng(seed).random(len(rows)) < share)


FULL = {
    f"{c}/{f}": 20
    for c in vl.categories
    if c.startswith("Object")
    for f in ("vg_obj", "vg_subj", "swig_agent", "swig_destination", "swig_item", "swig_tool", "hake")
}


def test_the_category_formula():
    "C = 1/3 [1/2 (vg_obj + vg_subj) + 1/4 (four of swig) + hake], whatever the sizes."
    rng = np.random.default_rng(1)
    p = answers({f: int(rng.integers(1, 60)) for f in FULL})
    m = p.groupby("file").correct.mean()
    by_hand = {}
    for c in {f.rpartition("/")[0] for f in FULL}:
        vg, swig = (
            [m[f"{c}/vg_{x}"] for x in ("obj", "subj")],
            [m[f"{c}/swig_{x}"] for x in ("agent", "destination", "item", "tool")],
        )
        by_hand[c] = (sum(vg) / 2 + sum(swig) / 4 + m[f"{c}/hake"]) / 3
    table = vl.checklist_table(p, repeats=50).set_index("row")
    for c, v in by_hand.items():
        assert table.value[c] == pytest.approx(v)
    assert table.value["Object"] == pytest.approx(np.mean(list(by_hand.values())))
    assert table.value["Object/Size"] == pytest.approx(
        np.mean([by_hand[f"Object/Size/{s}"] for s in ("large", "medium", "small")])
    )
    assert table.item_mean["Object"] == pytest.approx(p.correct.mean())
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()


def test_weights_sum_to_one_and_hake_is_an_eighteenth():
    p = answers(FULL | {"Object/Size/small/swig_destination": 9, "Attribute/color/vg": 5, "Relation/spatial/vg": 5})
    w = vl.item_weights(p)
    assert w.groupby(p.category.map(vl.section_of)).sum().tolist() == pytest.approx([1, 1, 1])
    assert w.groupby(p.file).sum()["Object/Size/small/hake"] == pytest.approx(1 / 18)
    assert w[p.file == "Object/Size/small/swig_destination"].iloc[0] * 100 == pytest.approx(0.154, abs=0.001)


def test_item_values():
    p = answers({"Relation/action/vg": 9, "Relation/action/swig": 400, "Relation/spatial/vg": 100})
    v = vl.item_values(p)
    assert v.mean() == pytest.approx((p.correct * vl.item_weights(p)).sum())
    assert vl.item_values(p.assign(correct=True)).std() == pytest.approx(0, abs=1e-12)
    plain = answers({"Relation/spatial/vg": 50})
    assert vl.item_values(plain).to_numpy() == pytest.approx(plain.correct.to_numpy(float))


def test_interval_of_a_weighted_mean_holds_the_truth():
    "Nine in ten of the 90 % intervals, or nearly."
    from selfalign.study.statistics import bootstrap

    sizes = {"Relation/action/vg": 60, "Relation/action/swig": 300, "Relation/spatial/vg": 120}
    inside = 0
    for s in range(120):
        p = answers(sizes, seed=s)
        i = bootstrap(vl.item_values(p), p.index, repeats=300, level=0.9)
        inside += i.low <= 0.6 <= i.high
    assert 97 <= inside <= 118


def test_the_same_question_twice_counts_once_in_distinct():
    p = answers({"Object/Size/small/vg_obj": 4, "Object/Location/mid/vg_obj": 4}).assign(
        image="x", correct=[True] * 4 + [False] * 4
    )
    assert vl.checklist_table(p, repeats=20).set_index("row").distinct["Object"] == 1.0


# --- the micro benchmark -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captions():
    return [web_caption("study", 5000 + i)[0].text for i in range(400)]


@pytest.fixture(scope="module")
def made():
    return mc.make_rows(24, captions=[web_caption("study", i)[0].text for i in range(400)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made):
    place = tmp_path_factory.mktemp("micro") / "checklist"
    mc.write_layout(place, *made, "evaluation", 64)
    return place


def test_all_categories_and_nothing_missing(folder):
    for variant in ("balanced", "biased"):
        b = vl.read_checklist(folder, datasets=variant)
        p, problems = it.evaluate(b, Stub())
        assert b.items.groupby("category").size().to_dict() == {c: 24 for c in vl.categories}
        assert not problems
        assert len(p) == len(b)
        assert not b.items.duplicated(["category", "image"]).any(), "a scene is asked once a category"
        it.require_coverage(b, p, 1.0)


CLAIM = {
    "crimson": ("colour", "red"),
    "golden": ("colour", "yellow"),
    "emerald": ("colour", "green"),
    "azure": ("colour", "blue"),
    "violet": ("colour", "purple"),
    "dark": ("colour", "black"),
    "kitten": ("object", "cat"),
    "automobile": ("object", "car"),
    "ship": ("object", "boat"),
    "sailboat": ("object", "boat"),
    "airplane": ("object", "plane"),
    "aircraft": ("object", "plane"),
    "toadstool": ("object", "mushroom"),
    "fir": ("object", "tree"),
    "blossom": ("object", "flower"),
    "mug": ("object", "cup"),
    "seat": ("object", "chair"),
    "parasol": ("object", "umbrella"),
    "tiny": ("size", "small"),
    "little": ("size", "small"),
    "medium-sized": ("size", "medium"),
    "mid-sized": ("size", "medium"),
    "big": ("size", "large"),
    "huge": ("size", "large"),
    "stripy": ("pattern", "striped"),
    "spotted": ("pattern", "dotted"),
    "upright": ("state", ""),
    "moving": ("action", "moving"),
    "jumping": ("action", "jumping"),
}
for _key, _values in (("colour", mc.colours), ("object", mc.objects), ("size", mc.sizes), ("pattern", mc.patterns)):
    CLAIM |= {v: (_key, v) for v in _values if v not in CLAIM}


def says_true(text, scene):
    "Read a phrase back, independently of the code that made it."
    text = text.replace("upside down", "upside_down").replace("moving fast", "moving").replace("to the ", "")
    for phrase, relation in (
        ("left of", "left of"),
        ("right of", "right of"),
        ("above", "above"),
        ("under", "below"),
        ("below", "below"),
        ("carrying", "carrying"),
        ("pulling", "pulling"),
        ("chasing", "chasing"),
        ("following", "chasing"),
    ):
        subject, found, other = text.partition(f" {phrase} ")
        if not found or len(scene.things) < 2:
            continue
        a, b = (next((t for t in scene.things if t.object == name), None) for name in (subject, other))
        if a is None or b is None or a == b:
            return False
        if relation in ("carrying", "pulling", "chasing"):
            return scene.relation == relation and scene.things[0] == a
        return {
            "left of": a.x < b.x - 0.3,
            "right of": a.x > b.x + 0.3,
            "above": a.y < b.y - 0.3,
            "below": a.y > b.y + 0.3,
        }[relation]
    said = [("state", "upside down") if w == "upside_down" else CLAIM[w] for w in text.split()]
    return any(all(getattr(t, k) == v for k, v in said) for t in scene.things)


@pytest.mark.parametrize("variant", ["balanced", "biased"])
def test_positives_are_true_and_negatives_false(folder, variant):
    for row in vl.read_checklist(folder, datasets=variant).items.itertuples():
        scene = make_scene("evaluation", int(row.image[-11:-4]))
        assert says_true(row.positive, scene), (
            row.positive,
            row.negative,
            scene,
        )
        assert not says_true(row.negative, scene), (
            row.positive,
            row.negative,
            scene,
        )


def test_categories_follow_the_things(folder):
    for row in (
        vl.read_checklist(folder, datasets="balanced").items.query('category.str.startswith("Object")').itertuples()
    ):
        colour, name = row.positive.split()
        scene = make_scene("evaluation", int(row.image[-11:-4]))
        kind = row.category.rpartition("/")[2]
        assert any(t.object == name and t.colour == colour and kind in (t.location, t.size) for t in scene.things)


def test_balanced_is_blind_proof_for_any_rule_of_the_text(folder, captions):
    b = vl.read_checklist(folder, datasets="balanced")
    for _, part in b.items.groupby("category"):
        assert Counter(zip(part.positive, part.negative)) == Counter(zip(part.negative, part.positive))
    assert vl.checklist_table(a.word_frequency(b.items, captions), repeats=20).value.to_numpy() == pytest.approx(0.5)
    shortest = b.items.positive.str.len().sub(b.items.negative.str.len())
    assert (shortest < 0).sum() == (shortest > 0).sum()


def test_biased_is_as_biased_as_the_original(folder, captions):
    "Measured with the words of other captions than it was made with."
    b = vl.read_checklist(folder, datasets="biased")
    found = vl.checklist_table(a.word_frequency(b.items, captions), repeats=20).set_index("row").value
    for section in ("Object", "Attribute", "Relation"):
        wanted = np.mean([v for c, v in mc.published_bias.items() if c.startswith(section)])
        assert found[section] == pytest.approx(wanted, abs=0.1)
        assert found[section] > 0.6


def test_the_same_call_writes_the_same_bytes(made, folder, tmp_path):
    scenes, variants = mc.make_rows(24, captions=[web_caption("study", i)[0].text for i in range(400)])
    assert variants == made[1]
    few = {v: {c: rows[:1] for c, rows in by.items()} for v, by in variants.items()}
    for name in ("one", "two"):
        mc.write_layout(tmp_path / name, scenes, few, "evaluation", 32)
    listed = {p.relative_to(tmp_path / "one"): p.read_bytes() for p in (tmp_path / "one").rglob("*") if p.is_file()}
    assert listed == {
        p.relative_to(tmp_path / "two"): p.read_bytes() for p in (tmp_path / "two").rglob("*") if p.is_file()
    }


def test_more_items_begin_with_the_same_ones(made):
    assert [mc.balanced_rows(p, "evaluation") for p in mc.gather(6)[1].values()] == [
        rows[:6] for rows in made[1]["balanced"].values()
    ]


def test_written_whole_or_not_at_all(tmp_path, monkeypatch, made):
    monkeypatch.setattr(
        mc, "make_rows", lambda *_: (made[0], {v: {c: rows[:1] for c, rows in by.items()} for v, by in made[1].items()})
    )
    place = mc.write_micro_checklist(tmp_path / "c")
    before = sorted(place.rglob("*"))

    def fail(*_):
        raise OSError("disk")

    with monkeypatch.context() as m:
        m.setattr(mc, "render", fail)
        with pytest.raises(OSError):
            mc.write_micro_checklist(place)
    assert sorted(place.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    mc.write_micro_checklist(place)
    assert sorted(place.rglob("*")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BenchmarkError, match="holds something else"):
        mc.write_micro_checklist(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    "items, limit, message", [(3, 10, "even number"), (0, 10, "even number"), (20, 30, "ask for fewer items")]
)
def test_too_much_asked(items, limit, message):
    with pytest.raises(BenchmarkError, match=message):
        mc.gather(items, limit=limit)


def test_holds_reads_from_either_end():
    scene = Scene((Thing("cat", "red"), Thing("cup", "blue")), "left of")
    say = lambda *f: mc.holds(mc.phrase(*f).claims, scene)
    assert say("Relation/spatial", ("cat", "cup"), "left of")
    assert say("Relation/spatial", ("cup", "cat"), "right of")
    assert not say("Relation/spatial", ("cup", "cat"), "left of")
    assert not say("Relation/action", ("cat", "cup"), "chasing")
    assert say("Attribute/color", ("cup",), "blue")
    assert not say("Attribute/color", ("cup",), "red")
    assert say("Attribute/state", ("cup",), "upright")


# --- text-only rules -----------------------------------------------------------------------------------------------


def _checklist(folder, rows, category="Object/Size/large", name="vg"):
    "One annotation file in the published layout, no images."
    (folder / f"corpus/v1/{category}").mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    (folder / f"corpus/v1/{category}/{name}.yaml").write_text(
        f'ANNO_PATH: "data/{name}.json"\nIMG_ROOT: "vg/"\nTYPE: "TUPLE_JSON"\n'
    )
    (folder / f"data/{name}.json").write_text(json.dumps(rows))


def test_the_rule_is_the_written_one(tmp_path):
    "Against the formula, written out anew on random texts."
    import re
    from collections import Counter
    from selfalign.benchmarks.text_only import annotated_texts, answer_blind, by_frequency, unused_counts

    rng = np.random.default_rng(0)
    word = lambda: "the dog's a man lamp Yak 3 tree".split()[min(rng.geometric(0.3) - 1, 7)]
    text = lambda: " ".join(word() for _ in range(rng.integers(1, 5)))
    rows = [[f"{i // 2}.jpg", dict(POS=[text() for _ in range(rng.integers(1, 3))], NEG=[text()])] for i in range(300)]
    rows[0][1]["NEG"] = rows[0][1]["POS"][:1]
    _checklist(tmp_path, rows)
    files, problems = annotated_texts(tmp_path)
    counts = unused_counts(files, 100)
    (found, wrong) = answer_blind(files, by_frequency(counts), 100)
    tokens = lambda t: re.findall(r"[a-z']+", t.lower())
    c = Counter(w for _, d in rows[100:] for t in d["POS"] for w in tokens(t))
    total, size = sum(c.values()), len(c)

    def f(ws):
        return np.mean([math.log((c[w] + 0.5) / (total + 0.5 * size)) for w in ws.elements()]) if ws else -30

    for (_, d), got in zip(rows, found.correct):
        p, n = Counter(tokens(d["POS"][0])), Counter(tokens(d["NEG"][0]))
        a, b = f(p - n), f(n - p)
        assert got == (0.5 if abs(a - b) < 1e-12 else float(a > b)), d
    assert not problems + wrong
    assert len(found) == 100
    assert set(found.correct) == {0, 0.5, 1}


def test_what_is_asked_is_not_counted(tmp_path):
    from selfalign.benchmarks.text_only import annotated_texts, unused_counts

    _checklist(
        tmp_path, [["a.jpg", dict(POS=["secret"], NEG=["x"])]] * 3 + [["b.jpg", dict(POS=["open"], NEG=["secret"])]]
    )
    files, _ = annotated_texts(tmp_path)
    assert dict(unused_counts(files, 3)) == {"open": 1}
    files["again"] = [["c.jpg", dict(POS=["x"], NEG=["y"])]] * 3 + files["Object/Size/large/vg"][::-1]
    assert dict(unused_counts(files, 3)) == {"open": 2, "secret": 3}
    assert dict(unused_counts(files, 3, unasked=True)) == {"open": 2}
    with pytest.raises(BenchmarkError, match="at least one"):
        unused_counts(files, 0)
    with pytest.raises(BenchmarkError, match="nothing to count"):
        unused_counts(files, 9)


def test_lacking_files_and_damaged_rows(tmp_path):
    from selfalign.benchmarks.text_only import annotated_texts, answer_blind, by_length, unused_counts

    _checklist(
        tmp_path,
        [
            ["a.jpg", dict(POS=["ab"], NEG=["a"])],
            None,
            ["b.jpg"],
            ["c.jpg", dict(POS=[], NEG=["x"])],
            ["d.jpg", dict(POS=[3], NEG=["x"])],
            ["e.jpg", dict(POS=["y"], NEG=["z"])],
        ],
    )
    _checklist(tmp_path, [], name="gone")
    (tmp_path / "data/gone.json").unlink()
    files, problems = annotated_texts(tmp_path)
    assert list(files) == ["Object/Size/large/vg"]
    assert "gone.json is not there" in problems[0]["what"]
    found, wrong = answer_blind(files, by_length, 9)
    assert list(found.correct) == [1, 0.5]
    assert [p["row"] for p in wrong] == list("1234")
    assert dict(unused_counts(files, 1)) == {"y": 1}
    (tmp_path / "data/vg.json").unlink()
    with pytest.raises(BenchmarkError, match="none of the annotation files"):
        annotated_texts(tmp_path)
