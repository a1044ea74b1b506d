"Segmentation: label maps read as published, maps as the papers have them, one confusion matrix; problems are named."

import json
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner
from selfalign.benchmarks import catalogue as ct, mean_iou as mi, segmentation as sg, segmentation_data as sd
from selfalign.benchmarks.audits import WITH_IMAGE
from selfalign.benchmarks.items import BenchmarkError
from selfalign.data.images import ImageProblem, open_labels
from selfalign.data.scenes import Scene, Thing, make_scene, render
from selfalign.data.segments import covered, mask_of, segment


def labels(path, values, mode="L"):
    "A label map; with a palette of misleading colours if it is of mode P."
    path.parent.mkdir(parents=True, exist_ok=True)
    img = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        img.putpalette([200, 10, 10] * 256)
    img.convert(mode).save(path) if mode not in ("L", "P") else img.save(path)
    return path


def photo(path, size=(12, 8), colour=(90, 90, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def two_halves(left, right, size=(12, 8)):
    "A label map whose halves have these numbers."
    found = np.full(size[::-1], left)
    found[:, size[0] // 2 :] = right
    return found


def voc(root, **maps):
    for name, values in maps.items():
        photo(root / f"JPEGImages/{name}.jpg")
        if values is not None:
            labels(root / f"SegmentationClass/{name}.png", values, "P")
    listing = root / "ImageSets/Segmentation/val.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{n}\n" for n in maps), encoding="utf-8")
    return root


def ade(root):
    photo(root / "images/validation/ADE_val_00000001.jpg")
    labels(root / "annotations/validation/ADE_val_00000001.png", two_halves(0, 150))
    return root


def coco_stuff(root, ending=".png", values=(0, 181)):
    photo(root / "val2017/000000000139.jpg")
    labels(root / f"stuffthingmaps/val2017/000000000139{ending}", two_halves(*values))
    return root


def camvid(root):
    photo(root / "test/0001TP_008550.png")
    labels(root / "testannot/0001TP_008550.png", two_halves(10, 11))
    return root


FOLDERS = {
    "voc21": (lambda r: voc(r / "VOCdevkit/VOC2012", a=two_halves(0, 20)), "background", "tvmonitor"),
    "voc20": (lambda r: voc(r, a=two_halves(4, 0)), "boat", None),
    "ade20k": (lambda r: ade(r / "ADEChallengeData2016"), None, "flag"),
    "coco-stuff": (coco_stuff, "person", "wood"),
    "coco-stuff-train-ids": (lambda r: coco_stuff(r, "_labelTrainIds.png", (170, 255)), "wood", None),
    "camvid": (lambda r: camvid(r / "CamVid"), "bicyclist", None),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_official_layouts(tmp_path, kind):
    "The class of each half, or that it is not asked about; found by looking where only one is possible."
    write, left, right = FOLDERS[kind]
    write(tmp_path)
    q = sd.read_segmentation(tmp_path, first=1, kind=kind if kind == "voc20" else "")
    assert set(q.items.category) == {kind} and q.expected == {kind: 1} and not q.problems
    truth, remarks = sd.truth_of(q, q.items.image[0], (12, 8))
    named = [None if n == sd.IGNORE else q.layout.classes[n] for n in (truth[0, 0], truth[0, -1])]
    assert named == [left, right] and not remarks
    assert q.threshold == (0.5 if kind == "voc21" else 0)
    assert len(q.prompts) == len(q.layout.classes)


def test_the_words_of_the_papers():
    words = dict(zip(sd.LAYOUTS["voc20"].classes, sd.prompts_of(sd.LAYOUTS["voc20"])))
    assert words["boat"] == ("ship",) and words["diningtable"] == ("table",)
    assert {"motorbike", "sofa", "tvmonitor"} <= {w for (w,) in words.values()}


def test_images_may_lie_elsewhere_and_the_published_size_is_expected(tmp_path):
    coco_stuff(tmp_path / "a")
    photo(tmp_path / "b/000000000139.jpg")
    q = sd.read_segmentation(tmp_path / "a", tmp_path / "b")
    assert q.images["000000000139.jpg"].parent == tmp_path / "b" and q.expected == {"coco-stuff": 5000}


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    good = two_halves(1, 2)
    root = voc(tmp_path, good=good, bare=None, wide=np.zeros((8, 13)), odd=two_halves(1, 77), lost=good, cut=good)
    (root / "JPEGImages/lost.jpg").unlink()
    cut = root / "SegmentationClass/cut.png"
    cut.write_bytes(cut.read_bytes()[:-25])
    with open(root / "ImageSets/Segmentation/val.txt", "a", encoding="utf-8") as f:
        f.write("../../etc/passwd\n")
    q = sd.read_segmentation(root)
    answers, problems = sg.ask_segmentation(q, Painted())
    assert set(answers.image) == {"good.jpg", "odd.jpg"}
    told = {(p["file"].rpartition("/")[2] or p["file"], p["what"]): p["remedy"] for p in problems}
    of = {name: (what, remedy) for (name, what), remedy in told.items()}
    assert "no label map" in of["bare.jpg"][0] and "SegmentationClass/bare.png" in of["bare.jpg"][1]
    assert "13x8 pixels for an image of 12x8" in of["wide.png"][0]
    assert "no class: 77" in of["odd.png"][0]
    assert "not there" in of["lost.jpg"][0]
    assert "damaged PNG" in of["cut.png"][0]
    assert "leads out of" in of["val.txt"][0]
    with pytest.raises(BenchmarkError, match="answered to less than 99%"):
        ct.run_task("segmentation", Painted(), root, out=tmp_path / "out")


@pytest.mark.parametrize("make", [lambda p: photo(p / "x.png"), lambda p: photo(p / "x.jpg")])
def test_coloured_label_maps_are_refused(tmp_path, make):
    with pytest.raises(ImageProblem, match="instead of a number"):
        open_labels(make(tmp_path))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(kind="voc22"), "did you mean 'voc21'"),
        (dict(kind="camvid"), "expected folders are camvid: test and testannot"),
        (dict(templates="openia"), "did you mean 'openai'"),
        (dict(classes="two.txt"), "2 lines for 21 classes, from background to tvmonitor"),
    ],
)
def test_refusals_while_reading(tmp_path, options, message):
    voc(tmp_path, a=two_halves(1, 2))
    (tmp_path / "two.txt").write_text("a\nb, c\n", encoding="utf-8")
    if "classes" in options:
        options = dict(classes=str(tmp_path / "two.txt"))
    with pytest.raises(BenchmarkError, match=message):
        sd.read_segmentation(tmp_path, **options)


def test_an_empty_folder_and_a_pool_that_is_none(tmp_path):
    with pytest.raises(BenchmarkError, match="no images with label maps"):
        sd.read_segmentation(tmp_path)
    with pytest.raises(BenchmarkError, match="did you mean 'evaluation'"):
        sd.read_segmentation("microworld:evalution")
    with pytest.raises(BenchmarkError, match="micro17"):
        sd.read_segmentation("microworld:evaluation", kind="voc20")
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    labels(tmp_path / "SegmentationClass/a.png", [[0]])
    with pytest.raises(BenchmarkError, match="val.txt"):
        sd.read_segmentation(tmp_path)


# --- segments of scenes ------------------------------------------------------------------------------------------


def test_segments_of_a_scene():
    "In front is in front; action, rope and colour do not count; any resolution."
    first, second = Thing("car", "white", x=0.3), Thing("tree", "green", x=0.5, extent=0.6)
    scene = Scene((first, second), relation="pulling", background="beach")
    for size in (32, 64, 100):
        found = segment(scene, size)
        assert found.shape == (size, size)
        assert (mask_of(scene, 0, size) == (covered(first, size) >= 0.5)).all()
        assert not (mask_of(scene, 0, size) & mask_of(scene, 1, size)).any()
    moving = Thing("car", "red", x=0.3, action="moving")
    assert (covered(moving) == covered(Thing("car", "red", x=0.3))).all()
    assert not segment(Scene(())).any()


# --- maps --------------------------------------------------------------------------------------------------------


def test_a_map_is_what_a_masked_attention_gives(tiny_clip):
    "ClearCLIP's way: the attention of the last block through a diagonal mask, then norm and projection."
    from selfalign.models.dual_encoder import normalise
    from selfalign.models.load import load_dual_encoder

    clip = load_dual_encoder(f"open_clip:{tiny_clip}")
    images = [render(make_scene("evaluation", i)) for i in range(3)]
    visual, taken = clip.model.visual, []
    hook = visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.inference_mode():
        visual(normalise(clip, torch.from_numpy(np.stack([np.asarray(i) for i in images]))))
        hook.remove()
        last, n = visual.transformer.resblocks[-1], taken[0].shape[1]
        alone = torch.full((n, n), float("-inf")).fill_diagonal_(0)
        x = last.attention(last.ln_1(taken[0]), attn_mask=alone)
        theirs = F.normalize((visual.ln_post(x) @ visual.proj)[:, 1:], dim=-1)
    mine = clip.encode_map(images)
    assert torch.allclose(mine.flatten(2).transpose(1, 2), theirs, atol=1e-5)
    plain = clip.encode_map(images, "plain")
    assert plain.shape == mine.shape == (3, 32, 4, 4) and not torch.allclose(plain, mine, atol=1e-2)


def test_models_without_a_map_are_refused(tiny_judge, tmp_path):
    with pytest.raises(BenchmarkError, match="no map of patches"):
        ct.run_task("segmentation", f"transformers:{tiny_judge}", "microworld:evaluation", out=tmp_path / "o", first=1)


# --- scores ------------------------------------------------------------------------------------------------------


class Painted:
    "A model that sees colours: its vectors are the pixels', its words are colours by number."

    map_paths, map_cell, size, reference = ("plain",), 2, 4, "painted"

    def __init__(self, colours={}):
        self.colours = colours

    def encode_map(self, images, path=""):
        x = torch.as_tensor(np.array(images)).permute(0, 3, 1, 2).float()
        return F.normalize(F.avg_pool2d(x, 2) + 1e-6, dim=1)

    def encode_text(self, texts):
        vectors = [self.colours.get(t, (1, 1, 1)) for t in texts]
        return F.normalize(torch.tensor(vectors, dtype=torch.float), dim=1)


def painted_voc(root):
    "Four images of two colours, the truth of one of them wrong."
    inks = dict(aeroplane=(255, 0, 0), bicycle=(0, 255, 0), bird=(0, 0, 255))
    numbers = {name: i for i, name in enumerate(sd.VOC, 1)}
    truth = [("aeroplane", "bicycle"), ("bird", "bicycle"), ("bird", "aeroplane"), ("aeroplane", "bird")]
    shown = truth[:3] + [("aeroplane", "bicycle")]
    for i, ((a, b), (c, d)) in enumerate(zip(truth, shown)):
        pixels = np.zeros((8, 12, 3), np.uint8)
        pixels[:, :6], pixels[:, 6:] = inks[c], inks[d]
        place = root / f"JPEGImages/{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place, "PNG")
        labels(root / f"SegmentationClass/{i}.png", two_halves(numbers[a], numbers[b]), "P")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("0\n1\n2\n3\n", encoding="utf-8")
    return root, Painted(inks)


def test_segmentation_by_hand(tmp_path):
    "48 pixels a half; one half of bird is called bicycle."
    root, model = painted_voc(tmp_path / "voc")
    options = dict(first=4, kind="voc20", templates="{}", short=8, window=8, stride=4)
    table = ct.run_task("segmentation", model, root, out=tmp_path / "out", **options)
    seen = table[table["mode"] == WITH_IMAGE].set_index(["row", "metric"])
    assert seen.value["all classes", "pixel accuracy"] == 7 / 8
    assert seen.value["aeroplane", "iou"] == 1
    assert seen.value["bicycle", "iou"] == pytest.approx(2 / 3)
    assert seen.value["bird", "iou"] == pytest.approx(2 / 3)
    assert seen.value["all classes", "mean iou"] == pytest.approx(7 / 9)
    assert seen.n["bicycle", "iou"] == 2 and seen.n["all classes", "mean iou"] == 4
    assert seen.chance["all classes", "pixel accuracy"] == 1 / 20
    assert (seen.low <= seen.value).all() and (seen.value <= seen.high).all()
    constant = table[(table["mode"] == "most frequent class") & (table.metric == "pixel accuracy")]
    assert constant.value.item() == 3 / 8
    assert not (table["mode"] == "smallest difference").any()


def test_every_number_can_be_taken_apart(tmp_path):
    "From the file of predictions alone, for any part of the images."
    root, model = painted_voc(tmp_path / "voc")
    options = dict(first=4, kind="voc20", templates="{}", short=8)
    table = ct.run_task("segmentation", model, root, out=tmp_path / "out", **options)
    kept = pd.read_parquet(tmp_path / "out/predictions.parquet")
    assert len(kept) == 4 * 4 and kept.groupby("mode").image.nunique().eq(4).all()
    again = mi.segmentation_table(kept[kept["mode"] == WITH_IMAGE])
    first = table[table["mode"] == WITH_IMAGE].reset_index(drop=True)
    assert again.value.tolist() == first.value.tolist() and again.low.tolist() == first.low.tolist()
    part = mi.segmentation_table(kept[(kept["mode"] == WITH_IMAGE) & (kept.image != "3.jpg")])
    assert part.value.tolist() == [1] * len(part)
    written = pd.read_csv(tmp_path / "out/results.csv")
    assert {"mean iou", "mean iou, blind", "iou, shuffled", "pixel accuracy, most frequent class"} <= set(
        written.metric
    )
    assert json.loads((tmp_path / "out/benchmark.json").read_text())["options"]["kind"] == "voc20"


def test_the_shuffled_row_is_the_next_ones_answer(tmp_path):
    "Nobody is answered by its own image; two images of opposite colours get nothing."
    root, model = painted_voc(tmp_path)
    q = sd.read_segmentation(root, kind="voc20", templates="{}", short=8)
    q.items, q.images = q.items[:2], {"0.jpg": q.images["0.jpg"], "1.jpg": q.images["1.jpg"]}
    q.labels["1.jpg"] = two_halves(2, 1)
    q.images["1.jpg"] = Image.fromarray(np.asarray(Image.open(q.images["0.jpg"]))[:, ::-1].copy())
    answers, _ = sg.ask_segmentation(q, model)
    right = answers.groupby("mode").apply(lambda t: mi.segmentation_table(t, repeats=10).value[1])
    assert right[WITH_IMAGE] == 1 and right["shuffled"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_iou_against_sklearn_and_torchmetrics(seed):
    from sklearn.metrics import accuracy_score, jaccard_score
    from torchmetrics.classification import MulticlassJaccardIndex

    rng, k = np.random.default_rng(seed), 7
    truths = [rng.choice([*range(5), sd.IGNORE], (6, 9)).astype(np.uint8) for _ in range(5)]
    answers = [rng.integers(0, 6, (6, 9)) for _ in truths]
    rows = [mi.confusion(t, a, tuple("abcdefg")) for t, a in zip(truths, answers)]
    table = mi.segmentation_table(pd.DataFrame(rows).assign(image=range(5), classes=k), repeats=50)
    t, a = np.stack(truths), np.stack(answers)
    asked = t != sd.IGNORE
    measure = MulticlassJaccardIndex(k, average="none", ignore_index=sd.IGNORE)
    for truth, answer in zip(truths, answers):
        measure.update(torch.tensor(answer)[None], torch.tensor(truth)[None].long())
    each = table[table.metric == "iou"].set_index("row").value
    assert each.tolist() == pytest.approx(measure.compute()[:5].tolist())
    assert table.value[0] == pytest.approx(jaccard_score(t[asked], a[asked], average="macro"))
    assert table.value[1] == pytest.approx(accuracy_score(t[asked], a[asked]))


def test_a_class_nobody_shows_but_somebody_says_counts_as_zero():
    rows = pd.DataFrame([mi.confusion(np.array([0, 0]), np.array([0, 1]), ("a", "b"))]).assign(image=0, classes=3)
    table = mi.segmentation_table(rows, repeats=10)
    assert table.value[0] == 0.25 and list(table.row) == ["all classes", "all classes", "a"]


def test_guessing_is_what_a_random_answer_gets():
    rng = np.random.default_rng(0)
    truth = rng.choice(4, 400_000, p=[0.7, 0.2, 0.1, 0.0])
    names, counts = mi.class_counts(pd.DataFrame([mi.confusion(truth, rng.integers(0, 4, truth.size), tuple("abcd"))]))
    assert np.nanmean(mi.ious(counts.sum(0))) == pytest.approx(mi.guess(np.array([0.7, 0.2, 0.1]), 4)[0], abs=0.002)


def test_nothing_to_ask_is_refused():
    rows = pd.DataFrame([mi.confusion(np.array([sd.IGNORE]), np.array([0]), ("a",))]).assign(image=0, classes=1)
    with pytest.raises(BenchmarkError, match="not one pixel is asked about"):
        mi.segmentation_table(rows)


def test_the_threshold_makes_background(tmp_path):
    "Below it every pixel is class 0, and only the scale says what is below."
    cosines, class_of = torch.tensor([0.2, 0.3])[:, None, None], torch.tensor([0, 1])
    assert sg.nearest_class(cosines, class_of, (2, 2)).tolist() == [[1, 1], [1, 1]]
    assert sg.nearest_class(cosines, class_of, (1, 1), threshold=0.999).item() == 0
    assert sg.nearest_class(cosines, class_of, (1, 1), threshold=0.999, scale=500.0).item() == 1


def test_two_names_of_a_class_are_two_questions(tmp_path):
    root, model = painted_voc(tmp_path)
    words = list(sd.VOC)
    words[0] = "nothing, aeroplane"
    (tmp_path / "words.txt").write_text("\n".join(words), encoding="utf-8")
    q = sd.read_segmentation(root, kind="voc20", classes=str(tmp_path / "words.txt"), templates="{}", short=8)
    answers, _ = sg.ask_segmentation(q, model)
    assert mi.segmentation_table(answers[answers["mode"] == WITH_IMAGE], repeats=10).value[1] == 7 / 8


@pytest.mark.parametrize("given", [dict(window=3), dict(window=16, short=8), dict(stride=99), dict(window=-2)])
def test_views_that_make_no_sense(given):
    q = sd.read_segmentation("microworld:evaluation", first=1, **given)
    with pytest.raises(BenchmarkError, match="stride ≤ window ≤ short side, and the window a multiple of 2"):
        sg.view_of(q, Painted())
    with pytest.raises(BenchmarkError, match="painted: no map by 'value'; there is plain"):
        sg.view_of(sd.read_segmentation("microworld:evaluation", first=1, path="value"), Painted())


def test_the_papers_view_is_twice_the_models_size():
    class Clip224(Painted):
        size, map_cell = 224, 16

    q = sd.read_segmentation("microworld:evaluation", first=1)
    assert sg.view_of(q, Clip224()) == sg.View(448, 448, 224, "plain")


def test_the_command(tiny_clip, tmp_path):
    from selfalign.tools.cli import app

    listed = CliRunner().invoke(app, ["benchmark", "--list"])
    assert "segmentation" in listed.output
    data = ["--model", f"open_clip:{tiny_clip}", "--data", "microworld:evaluation", "--first", "3"]
    done = CliRunner().invoke(
        app, ["benchmark", "segmentation", *data, "--out", str(tmp_path / "o"), "-o", "templates={}"]
    )
    assert done.exit_code == 0, done.output
    results = pd.read_csv(tmp_path / "o/results.csv")
    assert {"mean iou", "pixel accuracy", "iou"} <= set(results.metric) and len(results.metric.unique()) >= 12
