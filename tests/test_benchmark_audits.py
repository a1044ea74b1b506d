"Classification, agreement with people, leakage, power: against others' code, hand computation and simulation."

import hashlib, itertools
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from selfalign.benchmarks import (
    classification as cl,
    human_agreement as ha,
    leakage as lk,
    overlap as ov,
    planted_copies as pc,
    power as pw,
)
from selfalign.benchmarks.audits import WITH_IMAGE
from selfalign.benchmarks.items import BenchmarkError, coverage


class Stub:
    "An encoder that gives the same thing the same unit vector, and remembers the texts."

    def __init__(self, dimension=8):
        self.dimension, self.texts = dimension, []

    def _vectors(self, seeds):
        x = np.stack(
            [
                np.random.default_rng(int(hashlib.sha256(s).hexdigest()[:8], 16)).normal(size=self.dimension)
                for s in seeds
            ]
        )
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    def encode_image(self, images):
        return self._vectors([i.convert("RGB").tobytes() for i in images])

    def encode_text(self, texts):
        self.texts += texts
        return self._vectors([t.encode() for t in texts])


class Constant(Stub):
    "An encoder that cannot tell anything from anything."

    def _vectors(self, seeds):
        return np.full((len(seeds), self.dimension), self.dimension**-0.5, np.float32)


def noise(seed, side=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def said(problems):
    return " | ".join(f"{p['row']} {p['what']}" for p in problems)


# --- classification ----------------------------------------------------------------------------------------------


def class_folder(home, sizes):
    "A folder of class folders with so many images each."
    seeds = itertools.count()
    for name, n in sizes.items():
        (home / name).mkdir(parents=True)
        for i in range(n):
            noise(next(seeds)).save(home / name / f"{i}.png")
    return home


@pytest.mark.parametrize("templates", ["openai", "simple", "a photo of a {}."])
def test_class_vectors_are_open_clips(tiny_clip, templates):
    from open_clip import build_zero_shot_classifier
    from selfalign.models.load import load_dual_encoder

    clip, names = load_dual_encoder(f"open_clip:{tiny_clip}"), ["cat", "blue boat", "star"]
    theirs = (
        build_zero_shot_classifier(clip.model, clip.tokenizer, names, cl.templates_of(templates), device=clip.device)
        .T.cpu()
        .numpy()
    )
    assert np.abs(cl.class_vectors(clip, names, cl.templates_of(templates), batch=2) - theirs).max() < 1e-6


def test_folders_are_read_as_torchvision_reads_them(tmp_path):
    from torchvision.datasets import ImageFolder

    home = class_folder(tmp_path / "set", {"10": 2, "2": 1, "b": 3})
    (home / "b/deep").mkdir()
    noise(99).save(home / "b/deep/x.JPG")
    theirs, q = ImageFolder(home), cl.read_classification(home)
    assert list(q.classes) == theirs.classes == ["10", "2", "b"]
    assert sorted((q.images[i].as_posix(), t) for i, t in zip(q.items.image, q.items.truth)) == sorted(
        (p.replace("\\", "/"), t) for p, t in theirs.samples
    )


def test_a_list_names_the_folders_or_counts_them(tmp_path):
    home = class_folder(tmp_path / "set", {"zebra": 1, "ice_cream": 1})
    (tmp_path / "names.txt").write_text("zebra\nice cream\nunseen\n", encoding="utf-8")
    q = cl.read_classification(tmp_path / "names.txt", home)
    assert dict(zip(q.items.file, q.items.truth)) == {"zebra": 0, "ice_cream": 1}
    assert q.classes == (
        "zebra",
        "ice cream",
        "unseen",
    )
    home = class_folder(tmp_path / "ids", {"n02": 1, "n01": 1})
    (tmp_path / "two.txt").write_text("tench\ngoldfish", encoding="utf-8")
    assert dict(zip(*cl.read_classification(tmp_path / "two.txt", home).items[["file", "category"]].T.to_numpy())) == {
        "n01": "tench",
        "n02": "goldfish",
    }


@pytest.mark.parametrize("batch", [2, 256])
def test_ranks_are_those_of_the_plain_loop(tmp_path, batch):
    q, stub = cl.read_classification(class_folder(tmp_path / "set", {c: 3 for c in "abcdefg"}), templates="{}"), Stub()
    p, problems = cl.ask_classification(q, stub, batch=batch)
    names = stub.encode_text(list(q.classes)).astype(float)
    p = p[p["mode"] == WITH_IMAGE]
    assert not problems
    assert len(p) == 21
    assert p.key.is_unique
    for row in p.itertuples():
        cosine = names @ stub.encode_image([Image.open(q.images[row.image])])[0].astype(float)
        order = np.argsort(-cosine)
        assert row.predicted == q.classes[order[0]]
        assert q.classes[order[row.rank - 1]] == row.truth
        assert row.score == pytest.approx(cosine[q.classes.index(row.truth)], abs=1e-6)


def test_a_model_that_knows_nothing_gets_nothing(tmp_path):
    p, _ = cl.ask_classification(
        cl.read_classification(class_folder(tmp_path / "set", {c: 2 for c in "abcdefg"}), templates="{}"), Constant()
    )
    assert (p["rank"] == 7).all()
    assert set(p["mode"]) == {WITH_IMAGE, "blind", "shuffled"}
    for _, part in p.groupby("mode"):
        t = cl.classification_table(part)
        assert (t.value == 0).all()
        assert t.chance.round(6).tolist() == [round(x / 7, 6) for x in (1, 5, 1)]


def test_classes_of_one_name_tie_exactly(tmp_path):
    home = class_folder(tmp_path / "set", {"n1": 4, "n2": 4, "n3": 4})
    (tmp_path / "names.txt").write_text("missile\nmissile\ncup", encoding="utf-8")
    q = cl.read_classification(tmp_path / "names.txt", home, templates="{}")
    p, problems = cl.ask_classification(q, Stub())
    assert "2 class 'missile' has the name of class 1" in said(problems)
    assert (p["rank"][p.truth == "missile"] >= 2).all()
    assert (p["rank"][p.truth == "cup"] != 2).all()


def unequal():
    rng = np.random.default_rng(0)
    number = np.repeat([0, 1, 2], [60, 30, 10])
    right = rng.random(100) < np.array([0.9, 0.5, 0.2])[number]
    ranks = {WITH_IMAGE: np.where(right, 1, 2), "blind": np.where(number == 0, 1, 2)}
    return {
        mode: pd.DataFrame(dict(image=[f"{i}" for i in range(100)], number=number, rank=rank, classes=3))
        for mode, rank in ranks.items()
    }


def test_mean_per_class():
    from sklearn.metrics import balanced_accuracy_score
    from selfalign.study.statistics import bootstrap

    p, blind = unequal().values()
    t, b = (cl.classification_table(x).set_index("metric") for x in (p, blind))
    assert t.value["mean per-class accuracy"] == pytest.approx(
        balanced_accuracy_score(p.number, np.where(p["rank"] == 1, p.number, (p.number + 1) % 3))
    )
    assert b.value["top-1 accuracy"] == 0.6
    assert b.value["mean per-class accuracy"] == pytest.approx(1 / 3)
    assert "top-5 accuracy" not in t.index, "of three classes, five are always right"
    means = lambda rows: np.mean([rows[rows[:, 0] == c, 1].mean() for c in range(3) if (rows[:, 0] == c).any()])
    drawn = bootstrap(np.column_stack([p.number, p["rank"] == 1]), statistic=means)
    found = t.loc["mean per-class accuracy"]
    assert found.high - found.low == pytest.approx(drawn.high - drawn.low, rel=0.15)


def test_blind_is_one_answer(tmp_path):
    p, _ = cl.ask_classification(
        cl.read_classification(class_folder(tmp_path / "set", {"a": 5, "b": 1, "c": 2}), templates="{}"), Stub()
    )
    p = p[p["mode"] == "blind"]
    assert p.predicted.nunique() == 1
    assert (p["rank"] == 1).mean() == (p.truth == p.predicted.iloc[0]).mean()


def test_damaged_class_folders(tmp_path):
    home = class_folder(tmp_path / "set", {"a": 2, "b": 2, "empty": 0})
    (home / "a/notes.txt").write_text("x", encoding="utf-8")
    (home / "b/broken.png").write_bytes((home / "b/0.png").read_bytes()[:200])
    (tmp_path / "outside.png").write_bytes(b"")
    (home / "b/link.png").symlink_to(tmp_path / "outside.png")
    q = cl.read_classification(home)
    p, problems = cl.ask_classification(q, Stub())
    p = p[p["mode"] == WITH_IMAGE]
    assert len(p) == 4
    assert len(q.items) == 5
    assert len(problems) == 4
    for what in ("not an image by its ending", "a link", "a class without images", "damaged PNG"):
        assert what in said(problems)
    assert coverage(q, p).set_index("file").answered.to_dict() == {"a": 2, "b": 2, "empty": 0}


@pytest.mark.parametrize(
    "data,match",
    [
        (b"", "the list of classes is empty"),
        (b"\n \n", "the list of classes is empty"),
        (b"a\n\nb", "line 2 holds no name"),
        (b"a\n<b></b>\nc", "line 2 holds no name"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"a\nb\nc\n", "2 class folders for 3 classes"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, data, match):
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(BenchmarkError, match=match):
        cl.read_classification(tmp_path / "names.txt", class_folder(tmp_path / "set", {"x": 1, "y": 1}))


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog", encoding="utf-8")
    (tmp_path / "none").mkdir()
    with pytest.raises(BenchmarkError, match="is no folder"):
        cl.read_classification(tmp_path / "names.txt", tmp_path / "gone")
    with pytest.raises(BenchmarkError, match="No such file"):
        cl.read_classification(tmp_path / "gone.txt", class_folder(tmp_path / "one", {"cat": 1}))
    with pytest.raises(BenchmarkError, match="holds no class folders"):
        cl.read_classification(tmp_path / "none")
    with pytest.raises(BenchmarkError, match="no images in 2 class folders"):
        cl.read_classification(class_folder(tmp_path / "bare", {"cat": 0, "dog": 0}))
    with pytest.raises(BenchmarkError, match="dig bears no name.*did you mean 'dog'"):
        cl.read_classification(tmp_path / "names.txt", class_folder(tmp_path / "typo", {"cat": 1, "dig": 1}))
    with pytest.raises(BenchmarkError, match="did you mean 'simple'"):
        cl.read_classification(tmp_path / "one", templates="simpel")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/cat").symlink_to(tmp_path / "one/cat", target_is_directory=True)
    with pytest.raises(BenchmarkError, match="cat is a link"):
        cl.read_classification(tmp_path / "linked")
    (tmp_path / "one/cat/0.png").write_bytes(b"")
    with pytest.raises(BenchmarkError, match="none of the 1 images can be opened"):
        cl.ask_classification(cl.read_classification(tmp_path / "one"), Stub())


def test_class_names_are_cleaned(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\n\x1b[31mdog\x1b[0m\r\n".encode())
    names, problems = cl.class_names(tmp_path / "names.txt")
    assert names == ["cat", "dog"]
    assert "terminal escapes removed" in said(problems)


# --- agreement with people ---------------------------------------------------------------------------------------


def slow_kendall(x, y, variant):
    "From the definition, pair by pair."
    c = d = tx = ty = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        s = np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        c += s > 0
        d += s < 0
        tx += x[i] != x[j]
        ty += y[i] != y[j]
    if variant == "b":
        return (c - d) / np.sqrt(tx * ty)
    m = min(len(set(x)), len(set(y)))
    return (c - d) / (len(x) ** 2 * (m - 1) / (2 * m))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", ["b", "c"])
def test_kendall_is_its_definition(seed, variant):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6 + 30 * (seed % 2), 40), rng.integers(1, 5, 40)
    assert ha.kendall(x, y, variant) == pytest.approx(slow_kendall(x.tolist(), y.tolist(), variant), abs=1e-12)


def flickr(home, expert="", crowd="", tokens="", n=4):
    "The three files and n images, each with two captions."
    (home / "Flicker8k_Dataset").mkdir(parents=True)
    for i in range(n):
        noise(i).save(home / f"Flicker8k_Dataset/{i}.jpg")
    text = tokens or "\n".join(f"{i}.jpg#{k}\tcaption {k} of {i}" for i in range(n) for k in range(2))
    (home / "Flickr8k.token.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, rows in (("ExpertAnnotations.txt", expert), ("CrowdFlowerAnnotations.txt", crowd)):
        if rows:
            (home / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return home


EXPERT = "".join(
    f"{i}.jpg\t{j}.jpg#0\t{1 + (i + j) % 4}\t{1 + (i * j) % 4}\t{1 + j}\n" for i in range(4) for j in range(4)
)
CROWD = "".join(
    f"{i}.jpg\t{j}.jpg#1\t{v / 3:.6f}\t{v}\t{3 - v}\n" for i in range(4) for j in range(4) for v in [(i + j) % 4]
)


def test_own_captions_as_published(tmp_path):
    home = flickr(tmp_path, EXPERT, CROWD)
    count = lambda own: ha.read_human_agreement(home, own=own).items.category.value_counts().to_dict()
    assert count("published") == {"expert": 12, "crowd": 16}
    assert count("kept") == {"expert": 16, "crowd": 16}
    assert count("left out") == {"expert": 12, "crowd": 12}


def test_own_is_a_matter_of_words_not_ids(tmp_path):
    home = flickr(
        tmp_path,
        "0.jpg\t1.jpg#0\t4\t4\t4\n0.jpg\t2.jpg#0\t1\t1\t1\n",
        tokens="0.jpg#0\ta dog\n1.jpg#0\ta dog\n2.jpg#0\ta cat",
    )
    assert ha.read_human_agreement(home).items.caption.tolist() == ["a cat"]


def test_rows_and_their_numbers(tmp_path):
    q, stub = ha.read_human_agreement(flickr(tmp_path, EXPERT, CROWD), own="kept"), Stub()
    every, problems = ha.ask_human_agreement(q, stub)
    p = every[every["mode"] == WITH_IMAGE]
    assert not problems
    assert len(p) == 32
    assert p.key.is_unique
    assert all(t.startswith("A photo depicts caption ") for t in stub.texts)
    t = ha.human_agreement_table(p, repeats=20).set_index(["row", "metric"])
    e = p[p.category == "expert"]
    marks = e[["mark_1", "mark_2", "mark_3"]].to_numpy()
    x, y = e.score.repeat(3).tolist(), marks.ravel().tolist()
    for v in "bc":
        assert t.value["expert: score", f"tau-{v}"] == pytest.approx(slow_kendall(x, y, v))
    assert t.value["expert: another expert", "tau-b"] == pytest.approx(
        np.mean([slow_kendall(marks[:, i].tolist(), marks[:, j].tolist(), "b") for i, j in ((0, 1), (0, 2), (1, 2))])
    )
    c = p[p.category == "crowd"]
    assert t.value["crowd: score", "tau-b"] == pytest.approx(slow_kendall(c.score.tolist(), c.yes.tolist(), "b"))
    assert ("crowd: score", "tau-c") not in t.index
    assert (t.chance == 0).all()
    assert (t.low <= t.value).all()
    assert (t.value <= t.high).all()
    assert ha.human_agreement_table(every[every["mode"] == "length"], repeats=2).value.eq(0).all()
    assert t.n["expert: score", "tau-c"] == 16
    same = (
        ha.human_agreement_table(e.assign(score=e[["mark_1", "mark_2", "mark_3"]].mean(axis=1)), repeats=2)
        .set_index(["row", "metric"])
        .value
    )
    assert (
        same["expert: score", "tau-c"]
        == same["expert: mean of the experts", "tau-c"]
        > t.value["expert: score", "tau-c"]
    )


def test_scores_with_and_without_the_image(tmp_path):
    q, stub = ha.read_human_agreement(flickr(tmp_path, EXPERT), prompt="{}"), Stub()
    p, _ = ha.ask_human_agreement(q, stub)
    images = {n: stub.encode_image([Image.open(path).convert("RGB")])[0].astype(float) for n, path in q.images.items()}
    for key, rows in p.set_index("mode").groupby("key"):
        row = rows.loc[WITH_IMAGE]
        text = stub.encode_text([row.caption])[0].astype(float)
        rest = sum(v for n, v in images.items() if n != row.image)
        assert (rows.score[WITH_IMAGE], rows.score["blind"]) == pytest.approx(
            (text @ images[row.image], text @ rest / np.linalg.norm(rest)), abs=1e-6
        )
        assert rows.score["length"] == 4


def test_a_constant_score_agrees_with_nobody(tmp_path):
    p, _ = ha.ask_human_agreement(ha.read_human_agreement(flickr(tmp_path, EXPERT)), Constant())
    assert (
        ha.human_agreement_table(p[p["mode"] == WITH_IMAGE].assign(score=1.0), repeats=5).query(
            'row == "expert: score"'
        )[["value", "low", "high"]]
        == 0
    ).all(axis=None)


GOOD = "0.jpg\t1.jpg#0\t1\t2\t3\n"


@pytest.mark.parametrize(
    "row,what",
    [
        ("0.jpg\t2.jpg#0\t1\t2", "4 columns, not 5"),
        ("0.jpg\t2.jpg#0\t1\t2\t5", "not three of 1, 2, 3, 4"),
        ("0.jpg\t2.jpg#0\t0\t2\t3", "not three of"),
        ("0.jpg\t2.jpg#0\t1.5\t2\t3", "not three of"),
        ("0.jpg\t2.jpg#0\tx\t2\t3", "no numbers"),
        ("0.jpg\t9.jpg#0\t1\t2\t3", "unknown caption id '9.jpg#0'"),
        (GOOD.strip(), "come twice"),
        ("../0.jpg\t2.jpg#0\t1\t2\t3", "leads out of"),
        ("/etc/x.jpg\t2.jpg#0\t1\t2\t3", "leads out of"),
        (b"caf\xe9.jpg\t2.jpg#0\t1\t2\t3", "not UTF-8"),
    ],
)
def test_expert_rows_that_cannot_be_used(tmp_path, row, what):
    q = ha.read_human_agreement(
        flickr(tmp_path, GOOD.encode() + (row if isinstance(row, bytes) else row.encode()), CROWD)
    )
    problems = [p for p in q.problems if "Expert" in p["file"]]
    assert len(problems) == 1
    assert what in problems[0]["what"]
    assert problems[0]["row"] == "2"
    assert problems[0]["remedy"]
    assert (q.items.category == "expert").sum() == 1
    assert q.expected["ExpertAnnotations.txt"] == 2


@pytest.mark.parametrize(
    "row,what",
    [
        ("0.5\t1\t3", "give 0.250"),
        ("0\t0\t0", "somebody must have voted"),
        ("1\t4\t-1", "somebody must have voted"),
        ("nan\t1\t3", "give 0.250"),
        ("0.25\tone\t3", "not a share and two counts"),
    ],
)
def test_crowd_rows_that_cannot_be_used(tmp_path, row, what):
    q = ha.read_human_agreement(flickr(tmp_path, "", f"0.jpg\t1.jpg#0\t0.25\t1\t3\n0.jpg\t2.jpg#0\t{row}\n"))
    assert len(q.items) == 1
    assert what in said(q.problems)
    assert "not there" in said(q.problems)


def test_captions_that_cannot_be_used(tmp_path):
    q = ha.read_human_agreement(
        flickr(
            tmp_path,
            GOOD,
            tokens=b"0.jpg#0\ta cup\n1.jpg#0\t<b>a car</b>\n1.jpg#0\tagain\n2.jpg#0 no tab\n3.jpg#0\t\n"
            b"4.jpg#0\tcaf\xe9",
        )
    )
    assert q.items.caption.tolist() == ["a car"]
    for what in (
        "2 HTML removed",
        "3 1.jpg#0 comes twice",
        "4 1 columns, not 2",
        "5 3.jpg#0 has no caption",
        "6 not UTF-8",
    ):
        assert what in said(q.problems)


def test_agreement_files_that_are_not_there(tmp_path):
    home = flickr(tmp_path)
    with pytest.raises(BenchmarkError, match="holds neither Expert"):
        ha.read_human_agreement(home)
    (home / "ExpertAnnotations.txt").write_text("", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="no row of ExpertAnnotations.txt can be used"):
        ha.read_human_agreement(home)
    (home / "Flickr8k.token.txt").write_text("", encoding="utf-8")
    with pytest.raises(BenchmarkError, match="holds no captions"):
        ha.read_human_agreement(home)
    (home / "Flickr8k.token.txt").unlink()
    with pytest.raises(BenchmarkError, match="is not there"):
        ha.read_human_agreement(home)
    with pytest.raises(BenchmarkError, match="no place for the caption"):
        ha.read_human_agreement(home, prompt="a photo")


def test_judged_images_that_are_links(tmp_path):
    home = flickr(tmp_path, GOOD + "3.jpg\t1.jpg#0\t1\t2\t3\n")
    (home / "Flicker8k_Dataset/3.jpg").unlink()
    (home / "Flicker8k_Dataset/3.jpg").symlink_to(home / "Flicker8k_Dataset/0.jpg")
    q = ha.read_human_agreement(home)
    assert list(q.images) == ["0.jpg"]
    assert "2 3.jpg is a link" in said(q.problems)


def test_judged_images_that_are_not_there(tmp_path):
    home = flickr(tmp_path, EXPERT)
    (home / "Flicker8k_Dataset/0.jpg").unlink()
    (home / "Flicker8k_Dataset/1.jpg").write_bytes(b"")
    q = ha.read_human_agreement(home)
    p, problems = ha.ask_human_agreement(q, Stub())
    p = p[p["mode"] == WITH_IMAGE]
    assert set(p.image) == {"2.jpg", "3.jpg"}
    assert "the image is not there (items that ask about it: 3)" in said(problems)
    assert "the file is empty" in said(problems)
    assert coverage(q, p).set_index("file").share.to_dict() == {
        "ExpertAnnotations.txt": 0.5,
        "CrowdFlowerAnnotations.txt": 0,
    }


# --- leakage -----------------------------------------------------------------------------------------------------


def smooth(seed, side=64):
    return noise(seed, 6).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("most", [0, 8, 26, 64])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_hashes_as_in_the_plain_loop(most, block):
    rng = np.random.default_rng(most)
    a, b = rng.integers(0, 2**63, 20, dtype=np.uint64), rng.integers(0, 2**63, 15, dtype=np.uint64)
    b[3] = a[5]
    slow = [
        (i, j, (int(x) ^ int(y)).bit_count())
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        if (int(x) ^ int(y)).bit_count() <= most
    ]
    assert [tuple(r) for r in lk.near_hashes(a, b, most, block).tolist()] == slow
    assert (5, 3, 0) in slow


@pytest.mark.parametrize("block", [1, 3, 256])
def test_vectors_as_in_the_plain_loop(block):
    x = Stub()._vectors([bytes([i]) for i in range(12)])
    pairs, cosine = lk.near_vectors(x[:7], x[4:], 0.3, block)
    slow = {(i, j): float(x[i] @ x[4 + j]) for i in range(7) for j in range(8) if x[i] @ x[4 + j] >= 0.3}
    assert {tuple(p) for p in pairs.tolist()} == set(slow)
    assert cosine == pytest.approx([slow[tuple(p)] for p in pairs.tolist()], abs=1e-6)
    with pytest.raises(BenchmarkError, match="same encoder"):
        lk.near_vectors(x, x[:, :4])


def test_hash_from_the_definition():
    grey = np.asarray(smooth(0).convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    k = np.arange(32)
    basis = np.cos(np.pi * np.outer(k, 2 * k + 1) / 64)
    low = (basis @ grey @ basis.T)[:8, :8].ravel()
    assert f"{lk.perceptual_hash(smooth(0)):064b}" == "".join("01"[int(b)] for b in low > np.median(low))


@pytest.mark.parametrize("name", [n for n in pc.disguises if n != "cropped 5 %"])
def test_planted_copies(name):
    "Smooth images: every disguise but a cut stays near, unrelated images stay far."
    train = lk.fingerprints({f"t{i}": smooth(i) for i in range(40)})
    test = lk.fingerprints(
        {f"copy {i}": pc.disguises[name](smooth(i)) for i in range(20)}
        | {f"other {i}": smooth(100 + i) for i in range(20)}
    )
    found = lk.suspected(test, train, most=10)
    right = {(f"copy {i}", f"t{i}") for i in range(20)}
    check = "mirrored hash" if name == "mirrored" else "hash"
    hits = set(map(tuple, found[found.check == check][["test", "train"]].to_numpy()))
    assert len(hits & right) >= 18
    assert len(hits - right) <= 1
    if name == "mirrored":
        assert not found[found.check == "hash"].test.str.startswith("copy").sum() > 2


def test_sensitivity_counts(tmp_path):
    images = {f"t{i}": smooth(i) for i in range(10)}
    train = lk.fingerprints(images, Stub())
    t = (
        pc.sensitivity(
            images, {f"o{i}": smooth(50 + i) for i in range(5)}, train, Stub(), most=(0, 64), least=(0.999, -1.0)
        )
        .set_index(["check", "threshold", "disguise"])
        .found
    )
    assert t["hash", 0, "same"] == t["embedding", 0.999, "same"] == 1
    assert t["embedding", 0.999, "jpeg"] == 0
    assert (t.xs(64, level="threshold") == 1).all()
    assert t["hash", 0, "false alarm"] == 0
    assert t["embedding", -1.0, "false alarm"] == 1


def test_images_that_cannot_be_checked(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    noise(0).save(tmp_path / "good.png")
    made = lk.fingerprints(
        {"good": tmp_path / "good.png", "bad": tmp_path / "bad.png", "gone": tmp_path / "gone.png"}, Stub(), batch=1
    )
    assert made.names == ["good"]
    assert [p["file"] for p in made.problems] == ["bad", "gone"]
    assert all(p["remedy"] for p in made.problems)
    for nothing in ({}, {"bad": tmp_path / "bad.png"}):
        with pytest.raises(BenchmarkError, match="can be opened"):
            lk.fingerprints(nothing)
    with pytest.raises(BenchmarkError, match="64 bits"):
        lk.near_hashes(made.hashes, made.hashes, 65)
    with pytest.raises(BenchmarkError, match="same encoder"):
        lk.suspected(made, lk.fingerprints({"good": tmp_path / "good.png"}))


def test_fingerprints_do_not_depend_on_the_batch():
    images = {f"{i}": smooth(i) for i in range(7)}
    a, b = lk.fingerprints(images, Stub(), batch=2), lk.fingerprints(images, Stub())
    assert a.names == b.names
    assert (a.hashes == b.hashes).all()
    assert (a.vectors == b.vectors).all()
    assert a.vectors.shape == (7, 8)


@pytest.mark.parametrize("side", [64, 63, 37])
def test_the_mirrors_hash_needs_no_mirror(side):
    "But for the rounding of grey levels, which may turn a bit that lies at the median."
    from PIL import ImageOps

    for i in range(20):
        own, mirrored = lk.both_hashes(smooth(i, side))
        assert own == lk.perceptual_hash(smooth(i, side))
        assert (mirrored ^ lk.perceptual_hash(ImageOps.mirror(smooth(i, side)))).bit_count() <= 2


@pytest.mark.parametrize("portion", [1, 7, 1000])
def test_portions_find_the_same(portion):
    "Whatever part of the training set is in memory; a portion of which nothing opens stops nothing."
    train = {f"t{i}": smooth(i) for i in range(20)} | {f"x{i}": Path("gone.png") for i in range(8)}
    ours = lk.fingerprints({f"c{i}": smooth(i).resize((40, 40)) for i in range(5)}, Stub())
    whole = lk.suspected(ours, lk.fingerprints({n: p for n, p in train.items() if n[0] == "t"}, Stub()), 8, 0.98)
    found, problems = lk.near_copies(ours, train, Stub(), 8, 0.98, portion)
    assert sorted(map(tuple, found.values)) == sorted(map(tuple, whole.values))
    assert len(found) >= 5
    assert [p["file"] for p in problems] == [f"x{i}" for i in range(8)]
    with pytest.raises(BenchmarkError, match="none of 1 images"):
        lk.near_copies(ours, {"x": Path("gone.png")}, Stub())


def test_what_is_compared_is_what_both_have():
    images = {"a": smooth(0)}
    s, found, _ = lk.find_leaks(images, {"a": "x"}, {"b": smooth(0)}, {})
    assert s.check.tolist() == ["hash", "mirrored hash", "any"]
    assert found.check.tolist()[0] == "hash"
    assert lk.find_leaks({}, {"a": "A dog"}, {"b": smooth(0)}, {"b": "a dog."})[0].values.tolist()[0][:4] == [
        "caption",
        1,
        1,
        1.0,
    ]
    with pytest.raises(BenchmarkError, match="nothing can be compared"):
        lk.find_leaks(images, {}, {}, {"b": "x"})


def test_captions_seen_before():
    found = lk.caption_overlap(
        {"a": "A Dog, running!", "b": "a cat", "c": "...", "d": None},
        {"x": "a dog running", "y": "A  dog running.", "z": ""},
    )
    assert found[["test", "train", "value", "words"]].values.tolist() == [["a", "x", 2.0, 3]]
    table = lk.leakage_summary(found, "abcd").set_index("check")
    assert table["items"].to_dict() == {"hash": 0, "mirrored hash": 0, "embedding": 0, "caption": 1, "any": 1}
    assert table.share["any"] == 0.25
    assert table.n["any"] == 4
    none = lk.leakage_summary(found[:0], range(300), checks=["caption"])
    assert none.share.tolist() == [0.0, 0.0], "nothing found is not nothing there"
    assert none.high.tolist() == pytest.approx([0.01265] * 2, abs=1e-4), "nothing found is not nothing there"
    with pytest.raises(BenchmarkError, match="no test images"):
        lk.leakage_summary(found, [])


@pytest.mark.parametrize("first", [0, 3])
def test_overlap_of_two_folders(tmp_path, first):
    for name in ("train", "test"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for i in range(5):
        smooth(i).save(tmp_path / f"train/deep/{i}.png")
    smooth(2).resize((48, 48)).save(tmp_path / "test/a.png")
    smooth(4).save(tmp_path / "test/b.png")
    smooth(9).save(tmp_path / "test/c.png")
    (tmp_path / "test/d.png").write_bytes(b"broken")
    summary, pairs, problems = ov.overlap(str(tmp_path / "train"), str(tmp_path / "test"), first)
    assert set(map(tuple, pairs[["test", "train"]].values)) == {("a.png", "deep/2.png")} | (
        set() if first else {("b.png", "deep/4.png")}
    )
    assert summary.check.tolist() == ["hash", "mirrored hash", "any"]
    assert summary.n.eq(3).all()
    assert [Path(p["file"]).name for p in problems] == ([] if first else ["d.png"])
    assert ov.overlap(str(tmp_path / "train"), str(tmp_path / "test"), encoder=Stub())[1].embedding.tolist()[
        0
    ] == pytest.approx(1)


def test_nothing_in_common(tmp_path):
    for name, i in (("train", 0), ("test", 1)):
        (tmp_path / name).mkdir()
        smooth(i).save(tmp_path / name / "x.png")
    summary, pairs, _ = ov.overlap(str(tmp_path / "train"), str(tmp_path / "test"))
    assert len(pairs) == 0
    assert summary["items"].eq(0).all()
    assert list(pairs) == ["test", "train", "agree", "hash", "mirrored hash", "embedding", "words"]
    (tmp_path / "train/x.png").unlink()
    with pytest.raises(BenchmarkError, match="neither images nor tar archives"):
        ov.overlap(str(tmp_path / "train"), str(tmp_path / "test"))


def test_shared_captions_count_as_a_check():
    found = pd.DataFrame(
        [
            dict(check="hash", test="t", train="a", value=2.0),
            dict(check="hash", test="t", train="b", value=0.0),
            dict(check="caption", test="t", train="a", value=1.0),
            dict(check="caption", test="u", train="b", value=1.0),
        ]
    )
    pairs = ov.suspicious_pairs(found, dict(t={"a red car", "a car"}, u={"a"}), dict(a={"a red car", "a car"}, b={"a"}))
    assert pairs[["test", "train", "agree"]].values.tolist() == [
        ["t", "a", 2],
        ["t", "b", 1],
        ["u", "b", 1],
    ]
    assert pairs.words.fillna(0).tolist() == [3, 0, 1]


# --- power -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,d", [(300, 0.2), (400, 0.1), (2000, 0.05), (7511, 0.02), (1000, 0.5)])
def test_power_is_what_was_asked_for(n, d):
    "Answers of two models drawn 10 000 times; 0.8 within the error of the drawing and of the approximation."
    delta = pw.smallest_difference(n, d)
    won, lost, _ = np.random.default_rng(1).multinomial(n, [(d + delta) / 2, (d - delta) / 2, 1 - d], 10_000).T
    assert ((won - lost) ** 2 / (won + lost) > 3.841459).mean() == pytest.approx(0.8, abs=0.015)
    assert pw.simulated_power(n, d, delta, seed=2) == pytest.approx(0.8, abs=0.025)


def test_the_exact_test_of_the_study_is_the_exact_one_simulated():
    from selfalign.study.statistics import mcnemar

    n, d, delta = 60, 0.4, 0.2
    rng = np.random.default_rng(0)
    won, lost, _ = rng.multinomial(n, [(d + delta) / 2, (d - delta) / 2, 1 - d], 300).T
    found = np.mean([mcnemar([1] * w + [0] * l, [0] * w + [1] * l).p < 0.05 for w, l in zip(won, lost)])
    assert found == pw.simulated_power(n, d, delta, repeats=300, exact=True)


@pytest.mark.parametrize("size,correlation", [(5, 0.2), (3, 0.5), (4, 0.0)])
def test_power_with_clusters(size, correlation):
    "An item takes its cluster's draw with probability √ρ: two of a cluster correlate by ρ; the test is over clusters."
    clusters, d = 400, 0.1
    delta = pw.smallest_difference(clusters * size, d, size, correlation)
    rng = np.random.default_rng(3)
    found = []
    draw = lambda *shape: rng.choice([1, -1, 0], shape, p=[(d + delta) / 2, (d - delta) / 2, 1 - d])
    for _ in range(3000):
        x = np.where(rng.random((clusters, size)) < correlation**0.5, draw(clusters, 1), draw(clusters, size)).mean(1)
        found.append(abs(x.mean()) / (x.std(ddof=1) / clusters**0.5) > 1.965927)
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_power_over_seeds(seeds):
    from scipy.stats import ttest_1samp

    x = np.random.default_rng(seeds).normal(pw.smallest_over_seeds(seeds, 0.01), 0.01, (20_000, seeds))
    assert (ttest_1samp(x, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize("n,p", [(400, 0.3), (5000, 0.5), (50_000, 0.76)])
def test_unpaired_as_in_statsmodels(n, p):
    from statsmodels.stats.proportion import power_proportions_2indep

    delta = pw.smallest_difference(n, float(pw.independent(p)))
    assert power_proportions_2indep(delta, p - delta / 2, n).power == pytest.approx(0.8, abs=0.01)


def test_more_of_everything_helps():
    f = pw.smallest_difference
    n = np.array([200, 400, 800, 1600])
    assert (np.diff(f(n)) < 0).all()
    assert f(400) / f(1600) == pytest.approx(2, rel=0.03)
    assert f(400, 0.05) < f(400, 0.1) < f(400, 0.3)
    assert f(400) < f(400, clusters=5) < f(400, clusters=5, correlation=0.9)
    assert f(400) < f(400, power=0.95)
    assert f(400, level=0.01) > f(400)
    assert f(400, clusters=5, correlation=1.0) == pytest.approx(f(80))
    assert f(400, clusters=[1, 9]) > f(400, clusters=5)
    assert np.isnan(f(60, 0.05))
    assert np.isnan(f(np.array([20, 400]), 0.05)).tolist() == [True, False]


def test_beside_a_number():
    from selfalign.study.statistics import bootstrap

    answers = (np.random.default_rng(0).random(500) < 0.7).astype(float)
    alone, fives = bootstrap(answers), bootstrap(np.repeat(answers, 5), np.repeat(np.arange(500), 5))
    both = pw.beside_a_number(*map(np.array, zip(alone[:4], fives[:4])))
    assert both == pytest.approx(pw.smallest_difference(500), rel=0.06)
    assert pw.beside_a_number(0.5, 0.49, 0.51, 100) == pw.smallest_difference(100), (
        "never surer than the number of items"
    )
    assert pw.beside_a_number(0.95, 0.94, 0.96, 10**6) == pytest.approx(
        pw.smallest_difference(0.0475 * (3.92 / 0.02) ** 2, 2 * 0.95 * 0.05)
    ), "so accurate, they cannot disagree on a tenth"
    assert np.isnan(
        pw.beside_a_number(
            np.array([0, 1, 0.5, 0.5]),
            np.array([0, 1, np.nan, 0.0]),
            np.array([0, 1, np.nan, 1.0]),
            np.array([9, 9, 9, 1]),
        )
    ).all()


def test_what_two_tables_say_of_themselves():
    "The share and the correlation that the answers were drawn with."
    rng = np.random.default_rng(0)
    clusters, size, d, correlation = 6000, 3, 0.2, 0.3
    draw = lambda *shape: rng.choice([1, -1, 0], shape, p=[0.12, 0.08, 0.8])
    x = np.where(rng.random((clusters, size)) < correlation**0.5, draw(clusters, 1), draw(clusters, size)).ravel()
    where = np.repeat(np.arange(clusters), size)
    share, found = pw.measured(x == 1, x == -1, where)
    assert share == pytest.approx(d, abs=0.01)
    assert found == pytest.approx(correlation, abs=0.03)
    assert pw.measured(x == 1, x == -1)[1] == 0
    assert pw.measured([1, 1], [1, 1], [0, 0]) == (0, 0)
    with pytest.raises(BenchmarkError, match="come in pairs"):
        pw.measured([1, 0], [1], [0, 0])
    with pytest.raises(BenchmarkError, match="2 labels"):
        pw.measured([1, 0, 0], [1, 1, 1], [0, 0])
    with pytest.raises(BenchmarkError, match="true or false"):
        pw.measured([1, 2], [1, 0])


def test_the_table_of_known_benchmarks():
    t = pw.power_table().set_index("row")
    assert t.n[[r for r in t.index if "SugarCrepe" in r]].sum() == 7511
    assert (t.paired <= t.unpaired + 1e-12).all()
    assert t[["paired", "unpaired"]].notna().all(axis=None)
    assert t.paired["ImageNet: top-1 accuracy"] < t.paired["SugarCrepe: add_obj"] < t.paired["Winoground: group score"]
    assert (t.effective <= t.n).all()


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: pw.smallest_difference(0), "at least one item"),
        (lambda: pw.smallest_difference(100, 1.2), "discordant is 1.2"),
        (lambda: pw.smallest_difference(100, 0.0), "discordant"),
        (lambda: pw.smallest_difference(100, power=1.0), "power is 1"),
        (lambda: pw.smallest_difference(100, level=0.0), "level is 0"),
        (lambda: pw.smallest_difference(100, clusters=0), "at least one item"),
        (lambda: pw.smallest_difference(100, clusters=[]), "sizes of the clusters"),
        (lambda: pw.smallest_difference(100, clusters=2, correlation=1.5), "correlation is 1.5"),
        (lambda: pw.smallest_difference(100, float("nan")), "discordant is nan"),
        (lambda: pw.independent(1.1), "accuracy is 1.1"),
        (lambda: pw.smallest_over_seeds(1), "at least two"),
        (lambda: pw.smallest_over_seeds(3, -1.0), "not negative"),
        (lambda: pw.simulated_power(10, 0.1, 0.2), "cannot differ by 0.2"),
    ],
)
def test_what_power_refuses(call, match):
    with pytest.raises(BenchmarkError, match=match):
        call()
