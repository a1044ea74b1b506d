"SugarCrepe, Winoground, retrieval, the catalogue: read as published, scored by the official definitions, or refused."

import hashlib, io, json, math, os, tarfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from typer.testing import CliRunner
from selfalign.benchmarks import (
    audits as au,
    beside as bs,
    catalogue as ct,
    checklist_averages as ca,
    overlap as ov,
    power as pw,
    retrieval as rt,
    sugarcrepe as sc,
    winoground as wg,
)
from selfalign.benchmarks.audits import WITH_IMAGE
from selfalign.benchmarks.items import Benchmark, BenchmarkError, coverage, encode, evaluate, predict, require_coverage
from selfalign.benchmarks.vl_checklist import categories, read_checklist
from selfalign.study.ranking import ranks


def unit(x):
    x = np.asarray(x, float)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class Hand:
    "An encoder whose vectors are set by hand: images by colour, texts by themselves; others random, always the same."

    def __init__(self, photos={}, texts={}, dimension=6):
        self.photos, self.texts, self.dimension, self.asked = photos, texts, dimension, []

    def _of(self, known, key):
        if key in known:
            return known[key]
        return np.random.default_rng(int(hashlib.sha256(repr(key).encode()).hexdigest()[:8], 16)).normal(
            size=self.dimension
        )

    def encode_image(self, images):
        self.asked += images
        return unit([self._of(self.photos, i.getpixel((0, 0))) for i in images])

    def encode_text(self, texts):
        return unit([self._of(self.texts, t) for t in texts])


def colour(i):
    return (i % 256, i // 256, 90)


def save(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour(i)).save(path)
    return path


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# --- SugarCrepe --------------------------------------------------------------------------------------------------


def crepe(folder, n=4, **files):
    "Seven files of n items; some may be given."
    for f, file in enumerate(sc.COUNTS):
        rows = {
            str(i): dict(filename=f"{i}.png", caption=f"{file} true {i}", negative_caption=f"{file} false {i}")
            for i in range(n)
        }
        if files.get(file, rows) is not None:
            dump(folder / f"data/{file}.json", files.get(file, rows))
    for i in range(n):
        save(folder / f"val2017/{i}.png", i)
    return folder


def test_sugarcrepe_by_hand(tmp_path):
    "Right in add_att only: three of four, then means over items and over files."
    b = sc.read_sugarcrepe(crepe(tmp_path))
    texts = {
        t: [1, 0] if ("add_att true" in t and not t.endswith("3")) else [0, 1] if "true" in t else [0.6, 0.8]
        for t in {*b.items.positive, *b.items.negative}
    }
    p, problems = evaluate(b, Hand({colour(i): [1, 0] for i in range(4)}, texts))
    t = sc.sugarcrepe_table(p, repeats=50).set_index(["row", "metric"]).value
    assert not problems
    assert t["add_att", "accuracy"] == 0.75
    assert t["swap_obj", "accuracy"] == 0
    assert t["add", "accuracy"] == 3 / 8
    assert t["overall", "mean over files"] == pytest.approx(0.75 / 7)
    assert b.expected == dict(
        add_att=692, add_obj=2062, replace_att=788, replace_obj=1652, replace_rel=1406, swap_att=666, swap_obj=245
    )


def test_the_beginning_of_each_file(tmp_path):
    b = sc.read_sugarcrepe(crepe(tmp_path), first=2)
    assert len(b) == 14
    assert set(b.expected.values()) == {2}
    require_coverage(b, evaluate(b, Hand())[0], 1.0)


def test_sugarcrepes_two_averages_differ_with_the_sizes(tmp_path):
    rows = {str(i): dict(filename="0.png", caption=f"a {i}", negative_caption="b") for i in range(30)}
    p, _ = evaluate(
        sc.read_sugarcrepe(crepe(tmp_path, add_obj=rows)),
        Hand({colour(0): [1, 0]}, {**{f"a {i}": [1, 0] for i in range(30)}, "b": [0, 1]}, 2),
    )
    t = sc.sugarcrepe_table(p, repeats=50).set_index(["row", "metric"]).value
    m = p.groupby("file").correct.mean()
    assert t["overall", "accuracy"] == pytest.approx(p.correct.mean())
    assert t["overall", "mean over files"] == pytest.approx(m.mean())
    assert t["add", "mean over files"] == pytest.approx((m.add_att + 1) / 2)
    assert m.mean() != pytest.approx(p.correct.mean())


def test_sugarcrepes_missing_files_images_and_rows(tmp_path):
    bad = {
        "0": dict(filename="0.png", caption="a", negative_caption="b"),
        "x7": dict(filename="0.png", caption="a"),
        "8": dict(filename="../../etc/passwd", caption="a", negative_caption="b"),
        "9": 5,
        "10": dict(filename="0.png", caption="\x1b[31m", negative_caption="b"),
    }
    b = sc.read_sugarcrepe(crepe(tmp_path, add_att=bad, swap_obj=None))
    (tmp_path / "val2017/2.png").unlink()
    p, problems = evaluate(b, Hand())
    cover = coverage(b, p).set_index("file").answered
    assert [x["row"] for x in problems if "add_att.json" in x["file"]][:4] == ["x7", "8", "9", "10"]
    assert any("swap_obj.json is not there" in x["what"] for x in problems)
    assert cover.add_att == 1
    assert cover.swap_obj == 0
    assert cover.add_obj == 3
    with pytest.raises(BenchmarkError, match="0 of 245"):
        require_coverage(b, p)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"0": {"filename":\n', "line 2"),
        ("[1]", "holds a list"),
        ("{}", "holds no items"),
        ("\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_damaged_json_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(BenchmarkError, match=message) as e:
        sc.read_sugarcrepe(crepe(tmp_path, replace_rel=text))
    assert "replace_rel.json" in str(e.value)


def test_no_sugarcrepe_there(tmp_path):
    with pytest.raises(BenchmarkError, match="none of add_att"):
        sc.read_sugarcrepe(tmp_path)


# --- Winoground --------------------------------------------------------------------------------------------------


def wino(folder, n=30, spoil={}):
    lines = [
        json.dumps(
            dict(
                id=i,
                image_0=f"ex_{i}_img_0",
                image_1=f"ex_{i}_img_1",
                caption_0=f"a b {i}",
                caption_1=f"b a {i}",
                tag="T",
                collapsed_tag="Object",
            )
        )
        for i in range(n)
    ]
    for i in range(n):
        for j in (0, 1):
            save(folder / f"images/ex_{i}_img_{j}.png", 2 * i + j)
    dump(folder / "examples.jsonl", "\n".join(spoil.get(i, l) for i, l in enumerate(lines)) + "\n")
    return folder


def official(s):
    "The scores as the paper writes them, s[caption, image]."
    text = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
    image = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
    return text, image, text and image


def test_winoground_against_the_official_definition(tmp_path):
    hand = Hand(dimension=3)
    p = predict(encode(wg.read_winoground(wino(tmp_path)), hand))
    scores = wg.winoground_scores(p).set_index("example")
    seen = []
    for i in range(30):
        x, t = (
            hand.encode_image([Image.new("RGB", (1, 1), colour(2 * i + j)) for j in (0, 1)]).astype(float),
            hand.encode_text([f"a b {i}", f"b a {i}"]).astype(float),
        )
        seen.append(official(t @ x.T))
        assert tuple(scores.loc[str(i), ["text", "image", "group"]]) == seen[-1], i
    table = wg.winoground_table(p, repeats=50).set_index("row")
    assert table.value.tolist() == pytest.approx(np.mean(seen, 0).tolist())
    assert 0 < table.value["group"] < 1
    assert table.n.tolist() == [30] * 3
    assert table.chance.tolist() == pytest.approx([0.25, 0.25, 1 / 6])


def test_winoground_by_hand(tmp_path):
    "One example that only the text score counts, one that only the image score counts."
    images = {colour(0): [1, 0.2], colour(1): [0.9, 0.4], colour(2): [1, 0], colour(3): [0.6, 0.8]}
    s = wg.winoground_scores(
        predict(
            encode(
                wg.read_winoground(wino(tmp_path, 2)),
                Hand(images, {"a b 0": [1, 0.25], "b a 0": [1, 0.4], "a b 1": [1, 0], "b a 1": [0.6, 0.8]}, 2),
            )
        )
    ).set_index("example")
    assert s.loc["1", ["text", "image", "group"]].all()
    assert s.loc["0"].text == (s.loc["0"].c0_i0 > s.loc["0"].c1_i0 and s.loc["0"].c1_i1 > s.loc["0"].c0_i1)


@pytest.mark.parametrize("constant", ["images", "texts", "both"])
def test_whoever_does_not_look_or_read_gets_nothing(tmp_path, constant):
    same = {colour(i): [1, 2, 3] for i in range(60)}, {f"{w} {i}": [3, 1, 1] for i in range(30) for w in ("a b", "b a")}
    hand = Hand(same[0] if constant != "texts" else {}, same[1] if constant != "images" else {}, 3)
    p = predict(encode(wg.read_winoground(wino(tmp_path)), hand))
    group = wg.winoground_scores(p).group.sum()
    assert group == 0
    assert constant != "both" or wg.winoground_table(p, repeats=20).value.sum() == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 1',
        "5",
        '{"id": 1, "image_0": "a", "image_1": "b", "caption_0": "x"}',
        json.dumps(dict(id=1, image_0="../x", image_1="b", caption_0="x", caption_1="y")),
        "[" * 50_000,
    ],
)
def test_a_bad_line_is_named_and_its_example_missed(tmp_path, line):
    b = wg.read_winoground(wino(tmp_path, 5, {2: line}), first=5)
    p, problems = evaluate(b, Hand())
    assert [(Path(x["file"]).name, x["row"]) for x in problems] == [("examples.jsonl", "3")]
    assert len(wg.winoground_scores(p)) == 4
    with pytest.raises(BenchmarkError, match="8 of 10 items"):
        require_coverage(b, p)


def test_half_an_example_is_none(tmp_path):
    wino(tmp_path, 5)
    (tmp_path / "images/ex_3_img_1.png").unlink()
    b = wg.read_winoground(tmp_path, first=5)
    found, problems = ct.TASKS["winoground"].ask(b, Hand())
    looking = found[found["mode"] == WITH_IMAGE]
    assert "3" not in set(looking.example)
    assert len(looking) == 8
    assert len(problems) == 1
    with pytest.raises(BenchmarkError, match="8 of 10"):
        require_coverage(b, looking)
    with pytest.raises(BenchmarkError, match="9 of 10"):
        ct.run_task("winoground", Hand(), tmp_path, out=tmp_path / "out", first=5)
    with pytest.raises(BenchmarkError, match="10 of 800"):
        ct.run_task("winoground", Hand(), wino(tmp_path, 5), out=tmp_path / "out")


def vectors(n=40, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(n, d)).astype("f4") for k in wg.VECTORS}


@pytest.mark.parametrize("kind", ["npz", "safetensors", "parquet"])
def test_stored_vectors(tmp_path, kind):
    from safetensors.numpy import save_file

    v, path = vectors(), tmp_path / f"v.{kind}"
    if kind == "npz":
        np.savez(path, **v, id=np.arange(40) * 7)
    if kind == "safetensors":
        save_file(v, path)
    if kind == "parquet":
        pd.DataFrame({k: list(x) for k, x in v.items()}).to_parquet(path)
    u = {k: unit(x).astype(float) for k, x in v.items()}
    by_hand = [
        official(np.array([[u[f"caption_{c}"][i] @ u[f"image_{j}"][i] for j in (0, 1)] for c in (0, 1)]))
        for i in range(40)
    ]
    table = ct.run_task("winoground", "some-model", path, out=tmp_path / "out", least=0.1)
    assert table[table["mode"] == WITH_IMAGE].value.tolist() == pytest.approx(np.mean(by_hand, 0).tolist())
    assert 0 < np.mean(by_hand) < 1
    if kind == "npz":
        assert pd.read_parquet(tmp_path / "out/predictions.parquet").example.iloc[2] == "7"


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda v: v | {"image_0": v["image_0"][:3]}, "one shape"),
        (lambda v: v | {"image_0": v["image_0"] * np.nan}, "row 0 of image_0"),
        (lambda v: v | {"caption_1": v["caption_1"] * 0}, "row 0 of caption_1"),
        (lambda v: {k: x for k, x in v.items() if k != "caption_0"}, "lacks caption_0"),
        (lambda v: v | {"image_0": np.array([{}], dtype=object)}, "plain numbers"),
        (lambda v: {k: x[:0] for k, x in v.items()}, "one shape"),
    ],
)
def test_damaged_vectors(tmp_path, spoil, message):
    np.savez(tmp_path / "v.npz", **spoil(vectors()))
    with pytest.raises(BenchmarkError, match=message):
        wg.read_vectors(tmp_path / "v.npz")


def test_other_files_of_vectors_are_refused(tmp_path):
    for name in ("v.pkl", "v.pt", "v.npy"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(BenchmarkError, match="nothing else"):
            wg.read_vectors(tmp_path / name)
    (tmp_path / "v.safetensors").write_bytes(b"x")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        wg.read_vectors(tmp_path / "v.safetensors")


# --- retrieval ---------------------------------------------------------------------------------------------------


def hits(scores, positive, k):
    "CLIP_benchmark: among the k best of each row, is there any that belongs to it?"
    top = np.argsort(-scores, 1)[:, :k]
    recall = np.take_along_axis(positive, top, 1).sum(1) / positive.sum(1)
    return (recall > 0).mean()


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_ranks_against_brute_force(block):
    rng = np.random.default_rng(0)
    x, t, owner = rng.normal(size=(30, 4)), rng.normal(size=(90, 4)), rng.permutation(np.repeat(np.arange(30), 3))
    found = {
        "t2i": ranks(t, x, owner, np.arange(30), block=block),
        "i2t": ranks(x, t, np.arange(30), owner, block=block),
    }
    s = t @ x.T
    for q in range(90):
        assert found["t2i"][q] == 1 + sum(s[q, j] >= s[q, owner[q]] for j in range(30) if j != owner[q])
    for q in range(30):
        assert found["i2t"][q] == 1 + sum(
            s[c, q] >= max(s[o, q] for o in np.flatnonzero(owner == q)) for c in range(90) if owner[c] != q
        )
    positive = owner[:, None] == np.arange(30)
    for k in (1, 5, 10):
        assert (found["t2i"] <= k).mean() == pytest.approx(hits(s, positive, k))
        assert (found["i2t"] <= k).mean() == pytest.approx(hits(s.T, positive.T, k))


def test_collapsed_vectors_find_no_more_than_chance():
    owner = np.repeat(np.arange(40), 5)
    one = unit(np.random.default_rng(0).normal(size=64))
    found = rt.search(np.repeat(one[None], 40, 0), np.repeat(one[None], 200, 0), owner)
    for direction, pool, own in (("text to image", 40, 1), ("image to text", 200, 5)):
        for k in (1, 5, 10):
            assert (found[direction] <= k).mean() <= rt.chance_of_hit(k, pool, own)
    few = rt.search(np.eye(4)[[0, 0, 1, 1]], np.eye(4)[[0, 0, 1, 1]], np.arange(4))
    assert all((r == 2).all() for r in few.values()), "two that are the same: second place for both"


def test_chance_of_hit_is_that_of_dice():
    rng = np.random.default_rng(0)
    drawn = np.mean([(rng.permutation(50)[:5] < 4).any() for _ in range(20_000)])
    assert rt.chance_of_hit(5, 50, 4) == pytest.approx(drawn, abs=0.012)
    assert rt.chance_of_hit(5, 50, 1) == pytest.approx(0.1)
    assert rt.chance_of_hit(10, 5, 1) == 1


def karpathy(folder, n=12, flickr=False, captions=5, **spoil):
    rows = [
        dict(
            filename=f"{i}.png",
            split="test" if i % 3 else "train",
            sentences=[dict(raw=f"text {i} {j}", tokens=[]) for j in range(captions)],
            **({} if flickr else dict(filepath="val2014", cocoid=i)),
        )
        for i in range(n)
    ]
    for i in range(n):
        save(folder / ("" if flickr else "val2014") / f"{i}.png", i)
    rows = [spoil.get(f"row{i}", r) for i, r in enumerate(rows)]
    return dump(
        folder / ("dataset_flickr30k.json" if flickr else "dataset_coco.json"), dict(images=rows, dataset="coco")
    )


def near(n=12, captions=5, right=lambda i, j: True):
    "Image i on its own axis, right captions near it, wrong ones between it and the next but two, nearer to that."
    axes = np.eye(n)
    return Hand(
        {colour(i): axes[i] for i in range(n)},
        {
            f"text {i} {j}": (axes[i] if right(i, j) else axes[(i + 3) % n] + 0.5 * axes[i]) + 0.01 * (j + 1) / (1 + i)
            for i in range(n)
            for j in range(captions)
        },
        n,
    )


@pytest.mark.parametrize("flickr", [False, True])
def test_retrieval_by_hand(tmp_path, flickr):
    b = rt.read_karpathy(karpathy(tmp_path, flickr=flickr))
    p, problems = rt.ask_retrieval(b, near())
    looking = p[p["mode"] == WITH_IMAGE]
    assert len(b.items) == 8 * 6
    assert not problems
    assert (looking["rank"] == 1).all()
    assert coverage(b, looking).share.tolist() == [1.0]
    p, _ = rt.ask_retrieval(b, near(right=lambda i, j: j > 0))
    t = rt.retrieval_table(p[p["mode"] == WITH_IMAGE], repeats=20).set_index(["row", "metric"]).value
    assert t["text to image, pool of 8", "recall@1"] == pytest.approx(0.8)
    assert t["text to image, pool of 8", "recall@5"] == 1
    assert t["image to text, pool of 40", "recall@1"] == 1
    assert t["text to image, pool of 8", "median rank"] == 1


def test_five_captions_of_seven_and_another_split(tmp_path):
    path = karpathy(tmp_path, captions=7)
    assert len(rt.read_karpathy(path, split="train").items) == 4 * 6
    assert len(rt.read_karpathy(path, captions=0).items) == 8 * 8
    assert len(rt.read_karpathy(path, first=2).items) == 12
    with pytest.raises(BenchmarkError, match="no split 'tset'; did you mean 'test'"):
        rt.read_karpathy(path, split="tset")


def test_images_without_the_folders_that_the_file_names(tmp_path):
    path = karpathy(tmp_path / "a")
    (tmp_path / "a/val2014").rename(tmp_path / "flat")
    assert not rt.ask_retrieval(rt.read_karpathy(path, tmp_path / "flat"), near())[1]


@pytest.mark.parametrize(
    "row",
    [
        5,
        dict(split="test"),
        dict(split="test", filename="1.png", sentences=[5]),
        dict(split="test", filename="../1.png", sentences=[]),
        dict(split="test", filename=7, sentences=[dict(raw="x")]),
    ],
)
def test_a_bad_entry_is_named_and_missed(tmp_path, row):
    b = rt.read_karpathy(karpathy(tmp_path, row1=row))
    p, problems = rt.ask_retrieval(b, near())
    assert [(Path(x["file"]).name, x["row"]) for x in problems] == [("dataset_coco.json", "1")]
    with pytest.raises(BenchmarkError, match="42 of 48"):
        require_coverage(b, p[p["mode"] == WITH_IMAGE])


def test_a_missing_image_makes_the_pool_smaller_and_is_missed(tmp_path):
    path = karpathy(tmp_path)
    (tmp_path / "val2014/4.png").unlink()
    b = rt.read_karpathy(path)
    p, problems = rt.ask_retrieval(b, near())
    looking = p[p["mode"] == WITH_IMAGE]
    assert set(looking.pool) == {7, 35}
    assert (looking["rank"] == 1).all()
    assert problems[0]["file"] == "val2014/4.png"
    with pytest.raises(BenchmarkError, match="42 of 48"):
        require_coverage(b, looking)


@pytest.mark.parametrize(
    "text, message", [('{"images": [', "not JSON"), ('{"a": 1}', 'no list "images"'), ("[]", "holds a list")]
)
def test_damaged_karpathy_files(tmp_path, text, message):
    with pytest.raises(BenchmarkError, match=message) as e:
        rt.read_karpathy(dump(tmp_path / "dataset_coco.json", text))
    assert "dataset_coco.json" in str(e.value)


def shard(folder, n=6):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(n):
            png = io.BytesIO()
            Image.new("RGB", (4, 4), colour(i)).save(png, "PNG")
            for kind, data in (
                ("png", b"broken" if i == n - 1 else png.getvalue()),
                ("txt", f"text {i} 0".encode()),
                ("json", json.dumps(dict(captions=[f"text {i} {j}" for j in range(3)] if i else [])).encode()),
            ):
                info = tarfile.TarInfo(f"{i:03d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


def test_any_source_of_pairs(tmp_path):
    "Three captions each, one where there is no list; a broken image is listed and missed."
    b = ct.TASKS["retrieval"].read(str(shard(tmp_path / "shards")))
    p, problems = rt.ask_retrieval(b, near())
    looking = p[p["mode"] == WITH_IMAGE]
    assert len(b.items) == 2 + 5 * 4
    assert (looking["rank"] == 1).all()
    assert set(looking.pool) == {5, 13}
    assert [x["file"] for x in problems] == ["005"]
    with pytest.raises(BenchmarkError, match="18 of 22"):
        require_coverage(b, looking)


# --- the catalogue -----------------------------------------------------------------------------------------------


def checklist(folder, files, images=7, gone=()):
    "Annotation files of these sizes in the published layout."
    for f, n in files.items():
        dump(folder / f"corpus/v1/{f}.yaml", f'ANNO_PATH: "data/{f}.json"\nIMG_ROOT: "vg/"\nTYPE: "TUPLE_JSON"')
        dump(
            folder / f"data/{f}.json",
            [
                [
                    f"{(i * i + len(f)) % images}.png",
                    dict(POS=[f"thing {i} ON {f[-6:]}", "x"], NEG=[f"other {i % 5} ON {f[-6:]}", "y"]),
                ]
                for i in range(n)
            ],
        )
    for i in set(range(images)) - set(gone):
        save(folder / f"vg/{i}.png", i)
    return folder


FILES = (
    {
        f"{c}/{f}": 3 + (len(c) * i) % 17
        for c in categories
        if c.startswith("Object")
        for i, f in enumerate(("vg_obj", "vg_subj", "swig_agent", "swig_destination", "swig_item", "swig_tool", "hake"))
    }
    | {f"{c}/{f}": 5 + len(c) % 4 for c in categories if c.startswith("Attribute") for f in ("vg", "vaw")}
    | {"Relation/action/vg": 6, "Relation/action/swig": 9, "Relation/action/hake": 1300, "Relation/spatial/vg": 8}
)


def official_loop(folder, hand):
    "The original's evaluation, from its description: the first thousand, strictly greater, four digits, plain means."
    by = {}
    for corpus in sorted((folder / "corpus/v1").rglob("*.yaml")):
        name = corpus.relative_to(folder / "corpus/v1").with_suffix("").as_posix()
        category, _, file = name.rpartition("/")
        rows = [r for r in json.loads((folder / f"data/{name}.json").read_text()) if (folder / "vg" / r[0]).exists()][
            :1000
        ]
        right = 0
        for photo, texts in rows:
            image = hand.encode_image([Image.open(folder / "vg" / photo)])[0].astype(float)
            positive, negative = hand.encode_text([texts["POS"][0], texts["NEG"][0]]).astype(float)
            right += image @ positive > image @ negative
        by.setdefault(category, {}).setdefault(file.split("_")[0], []).append(round(right / len(rows), 4))
    found = {c: np.mean([np.mean(files) for files in d.values()]) for c, d in by.items()}
    return found | {
        s: np.mean([v for c, v in found.items() if c.startswith(s)])
        for s in ("Object/Location", "Object/Size", "Object", "Attribute", "Relation")
    }


@pytest.mark.slow
def test_vl_checklist_against_the_official_loop(tmp_path):
    folder, hand = checklist(tmp_path / "vl", FILES, gone=(6,)), Hand()
    table = ct.run_task("vl-checklist", hand, folder, out=tmp_path / "out", least=0)
    found = table[(table["mode"] == WITH_IMAGE) & (table.metric == "official")].set_index("row").value
    by_hand = official_loop(folder, hand)
    assert set(found.index) == set(by_hand)
    assert {k: found[k] for k in by_hand} == pytest.approx({k: float(v) for k, v in by_hand.items()}, abs=1e-12)
    usual = table[(table["mode"] == WITH_IMAGE) & (table.metric == "accuracy")].set_index("row").value
    assert (usual - found).abs().max() < 1e-4
    assert (usual != found).any()
    assert pd.read_csv(tmp_path / "out/coverage.csv").set_index("file").answered["Relation/action/hake"] == 1000


def test_broken_negatives_are_left_out(tmp_path):
    folder = checklist(tmp_path / "vl", {"Object/Size/small/vg_obj": 10, "Object/Size/small/vg_subj": 10})
    path = folder / "data/Object/Size/small/vg_obj.json"
    rows = json.loads(path.read_text())
    dump(path, [[p, t | dict(NEG=[" apron"])] if i < 4 else [p, t] for i, (p, t) in enumerate(rows)])
    t = ct.run_task("vl-checklist", Hand(), folder, out=tmp_path / "out")
    t = t[(t["mode"] == WITH_IMAGE) & (t.row == "Object")].set_index("metric")
    p = pd.read_parquet(tmp_path / "out/predictions.parquet").query('mode == "with the image"')
    m = p[p.negative != "apron"].groupby("file").correct.mean()
    assert t.n["accuracy"] == 20
    assert t.n["without broken negatives"] == 16
    assert t.value["without broken negatives"] == pytest.approx(m.mean())
    assert t.value["mean over items"] == pytest.approx(p.correct.mean())


@pytest.mark.parametrize(
    "positive, negative, broken",
    [
        ("bicycle ON sidewalk", "apron", True),
        ("lounge chair next to table", "office chair", True),
        ("traffic light above car", "light brown island", True),
        ("train has wheels", "train has mixing bowl", False),
        ("lady has hair", "person has ketchup bottle", False),
        ("red car", "teal car", False),
        ("car", "apron", False),
    ],
)
def test_what_is_broken(positive, negative, broken):
    assert ca.broken_negative(positive, negative) == broken


def test_gains_are_tested_row_by_row(tmp_path):
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    t = ct.run_task(
        "vl-checklist",
        Hand(),
        checklist(
            tmp_path / "vl",
            {f: 40 for f in ("Attribute/color/vg", "Attribute/size/vg", "Relation/spatial/vg")},
            images=20,
        ),
        out=tmp_path / "out",
    )
    p = pd.read_parquet(tmp_path / "out/predictions.parquet")
    rows, ps = ["Attribute/color", "Attribute/size", "Relation/spatial", "Attribute", "Relation"], []
    gain, corrected = (t[t.metric == m].set_index("row").value for m in ("gain over blind", "corrected p"))
    for row in rows:
        a, b = (
            p[(p["mode"] == m) & p.category.str.startswith(row)].set_index("key").correct.astype(bool).sort_index()
            for m in (WITH_IMAGE, "blind")
        )
        ps.append(mcnemar([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]], exact=True).pvalue)
        assert gain[row] == pytest.approx(a.mean() - b.mean())
    assert corrected[rows].tolist() == pytest.approx(multipletests(ps, method="holm")[1].tolist())
    assert set(t["mode"]) == {WITH_IMAGE, "blind", "shuffled", "word frequency", "smallest difference", ""}


def test_the_smallest_difference_stands_beside_each_number(tmp_path):
    folder = checklist(tmp_path / "vl", {"Attribute/color/vg": 400}, images=400)
    t = ct.run_task("vl-checklist", Hand(), folder, out=tmp_path / "out").set_index(["row", "metric", "mode"])
    at, found = (
        t.loc["Attribute", "mean over items", WITH_IMAGE],
        t.loc["Attribute", "mean over items", "smallest difference"],
    )
    sure = at.value * (1 - at.value) * (3.92 / (at.high - at.low)) ** 2
    assert found.value == pytest.approx(pw.smallest_difference(min(sure, 400)))
    assert pw.smallest_difference(400) <= found.value < pw.smallest_difference(100)
    assert found.n == 400
    assert np.isnan(found.chance)
    r = pd.read_csv(tmp_path / "out/results.csv").set_index(["row", "metric"])
    assert r.value["Attribute", "mean over items, smallest difference"] == pytest.approx(found.value)
    assert r.unit["Attribute", "mean over items, smallest difference"] == "fraction"
    wide = bs.side_by_side(t.reset_index()).set_index(["row", "metric"])
    assert wide["smallest difference"]["Attribute", "mean over items"] == found.value
    assert len(wide) == (t.index.get_level_values("mode") == WITH_IMAGE).sum()


# --- classification and agreement with people, through the catalogue ----------------------------------------------


def classes(folder, sizes):
    "Class folders of one-coloured images, numbered through."
    i = iter(range(1000))
    for name, n in sizes.items():
        for _ in range(n):
            k = next(i)
            save(folder / name / f"{k}.png", k)
    return folder


def test_classification_by_hand(tmp_path):
    "Six cats of which one looks like a dog, three dogs: 8 of 9; blind everything is a cat."
    home = classes(tmp_path / "set", dict(cat=6, dog=3))
    hand = Hand({colour(k): [1, 0.1] if k < 5 else [0.1, 1] for k in range(9)}, dict(cat=[1, 0], dog=[0, 1]), 2)
    table = ct.run_task("classification", hand, home, out=tmp_path / "out", templates="{}")
    t = table.set_index(["metric", "mode"]).value
    assert t["top-1 accuracy", WITH_IMAGE] == pytest.approx(8 / 9)
    assert t["top-1 accuracy", "blind"] == pytest.approx(6 / 9)
    assert t["mean per-class accuracy", WITH_IMAGE] == pytest.approx((5 / 6 + 1) / 2)
    assert t["mean per-class accuracy", "blind"] == 0.5
    assert t["gain over blind", ""] == pytest.approx(2 / 9)
    assert "corrected p" in t.index.get_level_values(0)
    assert table[table["mode"] == WITH_IMAGE].chance.eq(0.5).all()
    p = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert p.groupby("mode").size().to_dict() == {WITH_IMAGE: 9, "blind": 9, "shuffled": 9}
    assert (p[p["mode"] == "blind"].predicted == "cat").all()
    seen = [hand.encode_image([Image.new("RGB", (1, 1), colour(k))])[0].argmax() for k in range(9)]
    moved = p[p["mode"] == "shuffled"]
    assert (moved.predicted == "dog").sum() == sum(seen), "the same images, each at another place"
    side = bs.side_by_side(table).set_index("metric")
    assert side.blind["top-1 accuracy"] == pytest.approx(6 / 9)
    assert {
        "shuffled",
        "smallest difference",
        "gain over blind",
    } <= set(side)


def test_the_beginning_of_each_class(tmp_path):
    home = classes(tmp_path / "set", dict(cat=6, dog=3, emu=2))
    t = ct.run_task("classification", Hand(), home, out=tmp_path / "out", first=2, templates="a {}")
    assert t.n.dropna().eq(6).all()
    assert pd.read_csv(tmp_path / "out/coverage.csv")["items"].tolist() == [2, 2, 2]
    assert sorted(pd.read_parquet(tmp_path / "out/predictions.parquet").image.unique())[:2] == [
        "cat/0.png",
        "cat/1.png",
    ]
    (home / "emu/9.png").write_bytes(b"broken")
    with pytest.raises(BenchmarkError, match="the worst is emu: 1 of 2 items"):
        ct.run_task("classification", Hand(), home, out=tmp_path / "out", first=2)


def test_a_list_that_comes_with_open_clip_is_no_path(tmp_path):
    with pytest.raises(BenchmarkError, match="2 class folders for 1000 classes"):
        ct.run_task("classification", Hand(), "imagenet", classes(tmp_path / "set", dict(n01=1, n02=1)))


def judged(folder, n=6, crowd=True):
    "Images, captions and the judgements of people who go by the distance of two numbers."
    for i in range(n):
        save(folder / f"Flicker8k_Dataset/{i}.png", i)
    dump(folder / "Flickr8k.token.txt", "\n".join(f"{i}.png#0\tcaption {'x ' * i}of {i}" for i in range(n)))
    fit = lambda i, j: 4 - min(3, abs(i - j))
    dump(
        folder / "ExpertAnnotations.txt",
        "\n".join(
            f"{i}.png\t{j}.png#0\t{fit(i, j)}\t{fit(i, j)}\t{max(1, fit(i, j) - (i + j) % 2)}"
            for i in range(n)
            for j in range(n)
        ),
    )
    if crowd:
        dump(
            folder / "CrowdFlowerAnnotations.txt",
            "\n".join(
                f"{i}.png\t{j}.png#0\t{y / 3:.4f}\t{y}\t{3 - y}"
                for i in range(n)
                for j in range(n)
                for y in [fit(i, j) - 1]
            ),
        )
    return folder


def numbers(n=6):
    return Hand(
        {colour(i): [np.cos(i / 4), np.sin(i / 4)] for i in range(n)},
        {f"caption {'x ' * i}of {i}": [np.cos(i / 4), np.sin(i / 4)] for i in range(n)},
        2,
    )


@pytest.mark.slow
def test_agreement_by_hand(tmp_path):
    "The score is the order of the crowd, but for its ties; the others are not."
    from scipy.stats import kendalltau

    table = ct.run_task("human-agreement", numbers(), judged(tmp_path / "f"), out=tmp_path / "out", prompt="{}")
    t = table.set_index(["row", "metric", "mode"]).sort_index()
    far = [(abs(i - j), min(3, abs(i - j))) for i in range(6) for j in range(6)]
    p = pd.read_parquet(tmp_path / "out/predictions.parquet")
    looking = p[(p.category == "crowd") & (p["mode"] == WITH_IMAGE)]
    assert kendalltau(looking.score.round(5), looking.yes).statistic == pytest.approx(kendalltau(*zip(*far)).statistic)
    assert set(p["mode"]) == set(table["mode"]) == {WITH_IMAGE, "blind", "shuffled", "length"}
    for mode, part in p[p.category == "crowd"].groupby("mode"):
        assert t.value["crowd: score", "tau-b", mode] == pytest.approx(kendalltau(part.score, part.yes).statistic), mode
    assert t.value["crowd: score", "tau-b"].drop(WITH_IMAGE).max() < 0.5 < t.value["crowd: score", "tau-b", WITH_IMAGE]
    assert t.value["expert: another expert", "tau-b"].index.tolist() == [WITH_IMAGE]
    side = bs.side_by_side(table).set_index(["row", "metric"])
    assert side.blind["expert: score", "tau-c"] == t.value["expert: score", "tau-c", "blind"]
    assert "smallest difference" not in side
    assert np.isnan(side.length["expert: another expert", "tau-c"])
    assert set(pd.read_csv(tmp_path / "out/results.csv").unit) == {"ratio"}


def test_another_image_is_another_one_for_each_and_the_same_for_all_its_captions(tmp_path):
    hand = numbers()
    p, _ = ct.TASKS["human-agreement"].ask(
        ct.TASKS["human-agreement"].read(str(judged(tmp_path)), own="kept", prompt="{}"), hand
    )
    moved = p[p["mode"] == "shuffled"]
    x = hand.encode_image([Image.new("RGB", (1, 1), colour(i)) for i in range(6)]).astype(float)
    t = hand.encode_text(sorted(p.caption.unique(), key=lambda c: int(c[-1]))).astype(float)
    shown = [
        {j for j in range(6) if np.allclose(part.score, (t @ x[j])[part.caption.str[-1].astype(int)], atol=1e-6)}
        for _, part in moved[moved.category == "crowd"].groupby("image")
    ]
    assert all(len(s) == 1 for s in shown)
    assert len(set().union(*shown)) == 6
    assert not any(i in s for i, s in enumerate(shown))


@pytest.mark.slow
def test_the_first_images_and_one_set_alone(tmp_path):
    t = ct.run_task(
        "human-agreement", numbers(), judged(tmp_path / "f", crowd=False), out=tmp_path / "out", first=3, only="expert"
    )
    assert set(t.row) == {"expert: score", "expert: another expert", "expert: mean of the experts"}
    assert t.n.eq(3 * 5).all()
    assert pd.read_csv(tmp_path / "out/coverage.csv").answered.tolist() == [15]
    with pytest.raises(BenchmarkError, match="CrowdFlowerAnnotations.txt: 0 of unknown"):
        ct.run_task("human-agreement", numbers(), tmp_path / "f", out=tmp_path / "out")
    for only, message in (("experts", "did you mean 'expert'"), ("crowd", "CrowdFlowerAnnotations.txt is not there")):
        with pytest.raises(BenchmarkError, match=message):
            ct.run_task("human-agreement", numbers(), tmp_path / "f", only=only)
    (tmp_path / "f/Flicker8k_Dataset/2.png").unlink()
    with pytest.raises(BenchmarkError, match="10 of 15 items"):
        ct.run_task("human-agreement", numbers(), tmp_path / "f", out=tmp_path / "out", first=3, only="expert")


def test_words_are_counted_in_other_items():
    one = pd.DataFrame([dict(positive="red cat", negative="azure cat")] * 6)
    assert au.by_words(one).correct.tolist() == [0.5] * 6, "its own texts tell nothing"
    many = pd.DataFrame([dict(positive=f"red {i}", negative=f"azure {i}") for i in range(9)], index=range(5, 14))
    found = au.by_words(many)
    alone = au.by_words(
        pd.concat([pd.DataFrame([dict(positive="a zebra", negative="a yak")]), many], ignore_index=True)
    )
    assert alone.correct.tolist() == [0.5] + [1] * 9, "a word of its own text only"
    assert found.correct.eq(1).all()
    assert found.index.tolist() == many.index.tolist()
    assert found.positive.tolist() == many.positive.tolist()


def test_blind_answers_are_clustered_by_their_texts():
    "Who does not look gives the same answer to the same texts, whatever the image and whichever text is true."
    items = pd.DataFrame(
        [
            dict(image=f"{i}.png", positive=("a", "b")[i % 2], negative=("b", "a")[i % 2], correct=i % 2 == 0)
            for i in range(6)
        ]
    )
    found = (
        ct.stack_modes({m: items for m in (WITH_IMAGE, "blind", "shuffled", "word frequency")})
        .groupby("mode")
        .cluster.nunique()
    )
    assert found.to_dict() == {WITH_IMAGE: 6, "blind": 1, "shuffled": 6, "word frequency": 1}
    p = pd.concat(
        [
            items.assign(
                category="add_att",
                file="add_att",
                key=[f"{t}{i}" for i in range(6)],
                positive=t,
                negative=f"not {t}",
                correct=t == "x",
            )
            for t in "xy"
        ],
        ignore_index=True,
    )
    t = {m: sc.sugarcrepe_table(q).iloc[0] for m, q in ct.stack_modes({WITH_IMAGE: p, "blind": p}).groupby("mode")}
    assert (t["blind"].low, t["blind"].high) == (0, 1)
    assert (t[WITH_IMAGE].low, t[WITH_IMAGE].high) == (0.5, 0.5)


def test_results_appear_whole_and_in_the_studys_columns(tmp_path):
    from selfalign.study.stage import PROBLEM_COLUMNS, RESULT_COLUMNS, UNITS

    folder = checklist(tmp_path / "vl", {"Attribute/color/vg": 8})
    table = ct.run_task("vl-checklist", Hand(), folder, out=tmp_path / "a/out")
    assert sorted(p.name for p in (tmp_path / "a").rglob("*")) == sorted(["out", *ct.FILES])
    r = pd.read_csv(tmp_path / "a/out/results.csv")
    assert list(r) == RESULT_COLUMNS
    assert len(r) == len(table)
    assert set(r.chapter) == {"benchmarks"}
    assert set(r.unit) <= set(UNITS)
    assert not r.duplicated(["table", "row", "metric"]).any()
    assert r.set_index(["row", "metric"]).value["Attribute", "accuracy, blind"] == pytest.approx(
        table[(table.row == "Attribute") & (table.metric == "accuracy") & (table["mode"] == "blind")].value.item()
    )
    assert list(pd.read_csv(tmp_path / "a/out/problems.csv")) == PROBLEM_COLUMNS
    assert json.loads((tmp_path / "a/out/benchmark.json").read_text())["options"]["first"] == 1000
    seen = r[
        (r.row == "Attribute")
        & r.metric.isin(["accuracy", "accuracy, blind", "accuracy, shuffled", "accuracy, word frequency"])
    ]
    assert len(seen) == 4
    assert seen.chance.eq(0.5).all()
    assert seen[["low", "high", "n"]].notna().all().all()


def test_refused_before_the_model_is_asked(tmp_path):
    folder, hand = checklist(tmp_path / "vl", {"Attribute/color/vg": 9}), Hand()
    ct.run_task("vl-checklist", hand, folder, out=tmp_path / "out")
    before = (tmp_path / "out/results.csv").read_bytes()
    (folder / "vg/4.png").unlink()
    hand.asked.clear()
    asked = json.loads((folder / "data/Attribute/color/vg.json").read_text())
    lost = sum(r[0] == "4.png" for r in asked)
    assert lost
    with pytest.raises(BenchmarkError, match=f"{9 - lost} of 9 items.*out.refused"):
        ct.run_task("vl-checklist", hand, folder, out=tmp_path / "out", first=0)
    assert not hand.asked
    assert (tmp_path / "out/results.csv").read_bytes() == before
    assert pd.read_csv(tmp_path / "out.refused/problems.csv").file.tolist() == ["vg/4.png"]
    table = ct.run_task("vl-checklist", hand, folder, out=tmp_path / "out", first=0, least=0.1)
    assert table[table["mode"] == WITH_IMAGE].n.iloc[0] == 9 - lost


def test_a_damaged_image_is_found_when_it_is_opened(tmp_path):
    folder = checklist(tmp_path / "vl", {"Attribute/color/vg": 9})
    (folder / "vg/4.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(BenchmarkError, match="of 9 items"):
        ct.run_task("vl-checklist", Hand(), folder, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pd.read_csv(tmp_path / "out.refused/problems.csv").file.tolist() == ["vg/4.png"]


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("x")
    with pytest.raises(BenchmarkError, match="holds something else"):
        ct.run_task("vl-checklist", Hand(), checklist(tmp_path / "vl", {"Attribute/color/vg": 9}), out=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert not list(tmp_path.glob(".*"))


def test_the_bar_changes_no_vector():
    class Counts(Hand):
        calls = ()

        def encode_text(self, texts):
            self.calls += (len(texts),)
            return super().encode_text(texts)

        def encode_image(self, images, aspect="crop"):
            return super().encode_image(images) * (1 if aspect == "crop" else 2)

    hand, texts = Counts(), [f"t{i}" for i in range(2500)]
    w = ct.Watched(hand, 3)
    assert (w.encode_text(texts) == Hand().encode_text(texts)).all()
    assert hand.calls == (1024, 1024, 452)
    assert w.dimension == 6
    shown = [Image.new("RGB", (2, 2), colour(i)) for i in range(700)]
    w = ct.Watched(Counts(), 700)
    assert (
        np.concatenate([w.encode_image(shown[:350]), w.encode_image(shown[350:], aspect="pad") / 2])
        == Hand().encode_image(shown)
    ).all()


# --- leakage beside a number ---------------------------------------------------------------------------------------


def texture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)).resize(
        (48, 48), Image.Resampling.BICUBIC
    )


def leaky(tmp_path, n=20):
    "n textures, right for even numbers, and a training set with copies of the first four and the text of the fifth."
    rows = [[f"{i}.png", dict(POS=[f"true {i}"], NEG=[f"false {i}"])] for i in range(n)]
    folder = tmp_path / "vl"
    dump(folder / "corpus/v1/Attribute/color/vg.yaml", 'ANNO_PATH: "data/vg.json"\nIMG_ROOT: "vg/"\nTYPE: "TUPLE_JSON"')
    dump(folder / "data/vg.json", rows)
    (folder / "vg").mkdir()
    (tmp_path / "train").mkdir()
    for i in range(n):
        texture(i).save(folder / f"vg/{i}.png")
    for i in range(4):
        texture(i).resize((36, 36) if i else (48, 48)).save(tmp_path / f"train/copy{i}.png")
        dump(tmp_path / f"train/copy{i}.txt", "something else")
    for i in range(6):
        texture(100 + i).save(tmp_path / f"train/other{i}.png")
        dump(tmp_path / f"train/other{i}.txt", "True, 4!" if i == 0 else f"other {i}")
    (tmp_path / "train/broken.png").write_bytes(b"broken")
    dump(tmp_path / "train/broken.txt", "a broken one")
    return folder, Hand(
        texts={
            f"{w} {i}": [1, 0] if (w == "true") == (i % 2 == 0) else [0, 1] for i in range(n) for w in ("true", "false")
        },
        dimension=2,
    )


class Sees(Hand):
    "Every image points the same way, but for a trace of what it shows."

    def encode_image(self, images):
        self.asked += images
        return unit([[1, 1e-3 * np.asarray(i.convert("L").resize((8, 8))).mean() / 255] for i in images])


def test_leaks_stand_beside_the_number(tmp_path):
    "Items 0 to 3 leak by their image, 4 by its text: of the other fifteen, seven are right."
    folder, hand = leaky(tmp_path)
    table = ct.run_task(
        "vl-checklist",
        hand := Sees(texts=hand.texts, dimension=2),
        folder,
        out=tmp_path / "out",
        train=tmp_path / "train",
    )
    t = table.set_index(["row", "metric", "mode"])
    assert t.value["leakage", "near image, by hash", ""] == 4 / 20
    assert t.value["leakage", "true text, word for word", ""] == 1 / 20
    assert t.n["leakage", "near image, by hash", ""] == 20
    assert t.value["leakage", "near image, by embedding", ""] == 1, (
        "this model cannot tell images apart, so it suspects all"
    )
    assert "without leaks" not in set(table["mode"]), "nothing is left of a test that leaked whole"
    low = table[table.row == "leakage"]
    assert (low.low <= low.value).all()
    assert (low.value <= low.high).all()
    assert set(low.better) == {"down"}
    about, suspects = (
        json.loads((tmp_path / "out/benchmark.json").read_text()),
        pd.read_csv(tmp_path / "out/leakage.csv"),
    )
    assert about["leakage"].endswith("train")
    assert set(suspects.test[suspects.check == "hash"]) == {f"vg/{i}.png" for i in range(4)}
    assert suspects[suspects.check == "caption"].test.tolist() == ["true 4"]
    assert any("broken" in f for f in pd.read_csv(tmp_path / "out/problems.csv").file), (
        "a training image that does not open is listed"
    )


def test_the_number_without_leaks(tmp_path):
    class Distinct(Hand):
        def encode_image(self, images):
            return unit([[1, 0, *(np.asarray(i.convert("L").resize((5, 5)), float).ravel() - 127)] for i in images])

        def encode_text(self, texts):
            return unit([[*(hand.texts[x] if x in hand.texts else (1, 1)), *[0] * 25] for x in texts])

    folder, hand = leaky(tmp_path)
    table = ct.run_task("vl-checklist", Distinct(), folder, out=tmp_path / "out", train=tmp_path / "train")
    t = table.set_index(["row", "metric", "mode"])
    every, clean = (
        t.loc["Attribute", "mean over items", WITH_IMAGE],
        t.loc["Attribute", "mean over items", "without leaks"],
    )
    assert every.value == 10 / 20
    assert (clean.value, clean.n, clean.chance) == (pytest.approx(7 / 15), 15, 0.5)
    assert clean.low < clean.value < clean.high
    assert t.value["leakage", "items with any of these", ""] == 5 / 20
    wide = bs.side_by_side(table).set_index(["row", "metric"])
    assert wide["without leaks"]["Attribute", "mean over items"] == clean.value
    assert wide["without leaks: n"]["Attribute", "mean over items"] == 15
    assert "leakage" not in wide.index.get_level_values(0)
    r = pd.read_csv(tmp_path / "out/results.csv")
    assert not r.duplicated(["table", "row", "metric"]).any()
    assert {
        "mean over items, without leaks",
        "near image, by hash",
    } <= set(r.metric)


def test_a_query_without_a_text_leaks_with_its_captions(tmp_path):
    shard(tmp_path / "test", 7)
    dump(tmp_path / "train/a.txt", "Text 2 1")
    texture(3).save(tmp_path / "train/a.png")
    p, _ = rt.ask_retrieval(q := rt.read_source(str(tmp_path / "test")), near())
    looking = p[p["mode"] == WITH_IMAGE]
    rows, suspects, _ = bs.check_leaks(ct.TASKS["retrieval"], q, looking, ov.collection(str(tmp_path / "train")), None)
    assert suspects[suspects.check == "caption"].test.tolist() == ["text 2 1"]
    leaked = looking[bs.leaking(looking, "text", suspects[suspects.check == "caption"])].key.tolist()
    assert sorted(leaked) == ["002", "002#1"]


@pytest.mark.slow
def test_leakage_that_was_not_checked_is_called_so(tiny_clip, tmp_path):
    folder, _ = leaky(tmp_path)
    args = (
        "benchmark",
        "vl-checklist",
        "--model",
        f"open_clip:{tiny_clip}",
        "--data",
        folder,
        "--out",
        tmp_path / "out",
    )
    done = sh(*args)
    assert done.exit_code == 0, done.output
    assert "Leakage: not checked" in done.output, done.output
    assert "--train" in done.output, done.output
    assert "not checked" in json.loads((tmp_path / "out/benchmark.json").read_text())["leakage"]
    assert not (tmp_path / "out/leakage.csv").exists()
    done = sh(*args, "--train", tmp_path / "train")
    assert done.exit_code == 0, done.output
    assert "near image, by hash" in done.output, done.output
    assert "without leaks: no item is left" in done.output, done.output
    assert (tmp_path / "out/leakage.csv").exists(), done.output
    done = sh(*args, "--train", tmp_path / "nowhere")
    assert done.exit_code == 2, done.output
    assert "no such file" in done.output, done.output


def test_stored_vectors_cannot_be_compared(tmp_path):
    np.savez(tmp_path / "v.npz", **vectors())
    (tmp_path / "train").mkdir()
    texture(0).save(tmp_path / "train/x.png")
    with pytest.raises(BenchmarkError, match="stored vectors"):
        ct.run_task(
            "winoground", "some-model", tmp_path / "v.npz", out=tmp_path / "out", least=0.1, train=tmp_path / "train"
        )


@pytest.mark.parametrize(
    "options, message", [(dict(splits="val"), "did you mean 'split'"), (dict(first="three"), "is no int")]
)
def test_options_are_checked(options, message):
    with pytest.raises(BenchmarkError, match=message):
        ct.run_task("retrieval", Hand(), "microworld:evaluation", **options)


# --- the command -------------------------------------------------------------------------------------------------


def sh(*args):
    from selfalign.tools.cli import app

    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command(tiny_clip, tmp_path):
    folder = checklist(tmp_path / "vl", {"Attribute/color/vg": 12})
    done = sh(
        "benchmark",
        "vl-checklist",
        "--model",
        f"open_clip:{tiny_clip}",
        "--data",
        folder,
        "--out",
        tmp_path / "out",
        "--first",
        "10",
        "-o",
        "datasets=vg",
    )
    assert done.exit_code == 0, done.output
    assert "word frequency" in done.output
    assert "without broken negatives" in done.output
    assert len(pd.read_parquet(tmp_path / "out/predictions.parquet")) == 4 * 10


def test_the_command_searches_any_source(tiny_clip, tmp_path):
    done = sh(
        "benchmark",
        "retrieval",
        "--model",
        f"open_clip:{tiny_clip}",
        "--data",
        "microworld:evaluation?noise=0",
        "--first",
        "12",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    assert "pool of 12" in done.output, done.output
    assert "recall@10" in done.output, done.output


def test_the_command_sorts_and_is_judged(tiny_clip, tmp_path):
    done = sh(
        "benchmark",
        "classification",
        "--model",
        f"open_clip:{tiny_clip}",
        "--data",
        classes(tmp_path / "set", dict(cat=4, dog=4)),
        "--first",
        3,
        "-o",
        "templates=a {}",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    assert "mean per-class accuracy" in done.output, done.output
    assert "shuffled" in done.output, done.output
    assert "differ four times out of five" in done.output, done.output
    done = sh(
        "benchmark",
        "human-agreement",
        "--model",
        f"open_clip:{tiny_clip}",
        "--data",
        judged(tmp_path / "f"),
        "--first",
        4,
        "-o",
        "only=crowd",
        "--out",
        tmp_path / "out",
    )
    assert done.exit_code == 0, done.output
    assert "crowd: score" in done.output, done.output
    assert "length" in done.output, done.output
    assert "told apart" not in done.output, done.output


def test_the_command_lists_and_hints():
    listed = sh("benchmark", "--list")
    assert listed.exit_code == 0
    assert all(n in listed.output for n in ct.TASKS)
    assert "first=1000" in listed.output
    for args, hint in (
        (("retrieval",), "--model"),
        (("retreival", "--model", "open_clip:x", "--data", "y"), "'retrieval'"),
        (("sugarcrepe", "--model", "open_clip:x", "--data", "nowhere"), "none of add_att"),
    ):
        done = sh("benchmark", *args)
        assert done.exit_code == 2, done.output
        assert hint in done.output, done.output


def test_people_judge_an_aligned_pair(tmp_path):
    "A folder of two encoders with a layer behind each is a model as any other."
    from selfalign.models.aligned import save_aligned
    from selfalign.models.heads import make_head
    from selfalign.models.image_encoders import load_image_encoder
    from selfalign.models.text_encoders import load_text_encoder

    images = load_image_encoder("transformers:data/micro/vision-small")
    texts = load_text_encoder("transformers:data/micro/text")
    heads = make_head("linear", images.dimension, 8, seed=0), make_head("linear", texts.dimension, 8, seed=1)
    folder = save_aligned(tmp_path / "pair", images, texts, heads)
    options = ("--first", 4, "-o", "only=crowd", "--out", tmp_path / "out")
    done = sh("benchmark", "human-agreement", "--model", f"sail:{folder}", "--data", judged(tmp_path / "f"), *options)
    assert done.exit_code == 0, done.output
    assert "crowd: score" in done.output, done.output
    predictions = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert predictions[predictions["mode"] == WITH_IMAGE].score.nunique() > 1
