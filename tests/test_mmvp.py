"MMVP-VLM: read as published or refused by line; a pair counts by the official rule."

import numpy as np, pandas as pd, pytest
from PIL import Image
from selfalign.benchmarks import catalogue as ct, mmvp
from selfalign.benchmarks.audits import WITH_IMAGE
from selfalign.benchmarks.items import BenchmarkError

PATTERNS = ("Orientation and Direction", "Texts")


def folder(root, pairs=2, home="MLLM_VLM Images", lines=None, names=PATTERNS):
    "So many pairs of each pattern; the red of an image is its number."
    text, number = ["Question ID,Type,Statement"], 1
    for pattern, place in zip(PATTERNS, names):
        for _ in range(2 * pairs):
            path = root / home / place / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number * 7, 0, 0)).save(path, "PNG")
            text.append(f'{number},{pattern},"statement {number}, with a comma"')
            number += 1
    (root / "Questions.csv").write_text("\n".join(lines or text) + "\n", encoding="utf-8-sig")
    return root


class Numbers:
    "Scores by number of statement and image: own and other as given for each pair."

    reference = "numbers"

    def __init__(self, scores):
        self.scores = scores  # pair → ((c0 i0, c0 i1), (c1 i0, c1 i1))

    def encode_image(self, images):
        return np.eye(40, dtype=np.float32)[[i.getpixel((0, 0))[0] // 7 for i in images]]

    def encode_text(self, texts):
        found = np.zeros((len(texts), 40), np.float32)
        for row, text in zip(found, texts):
            assert text.startswith("a photo of statement ")
            number = int(text.split()[4].rstrip(","))
            pair = (number - 1) // 2
            row[2 * pair + 1 : 2 * pair + 3] = self.scores[pair][(number - 1) % 2]
        return found


SCORES = [
    ((0.9, 0.1), (0.2, 0.8)),  # right in both directions
    ((0.9, 0.8), (0.2, 0.3)),  # statements find their images, but both images take the first statement
    ((0.5, 0.4), (0.6, 0.7)),  # the same, both images take the second
    ((0.5, 0.5), (0.1, 0.9)),  # a tie
]


def test_the_official_rule_by_hand(tmp_path):
    options = dict(out=tmp_path / "out", first=4)
    table = ct.run_task("mmvp", Numbers(SCORES), folder(tmp_path / "data"), **options)
    seen = table[(table["mode"] == WITH_IMAGE)].set_index(["row", "metric"])
    assert seen.value[mmvp.ALL, "pair accuracy"] == 3 / 4
    assert seen.value[PATTERNS[0], "pair accuracy"] == 1
    assert seen.value[PATTERNS[1], "pair accuracy"] == 1 / 2
    assert seen.value[mmvp.TURNED, "pair accuracy"] == 2 / 4
    assert seen.value[mmvp.ALL, "standard error"] == pytest.approx((3 / 4 / 4 / 4) ** 0.5)
    assert seen.n[PATTERNS[1], "pair accuracy"] == 2 and seen.chance[mmvp.ALL, "pair accuracy"] == 1 / 4
    blind = table[(table["mode"] == "blind") & (table.metric == "pair accuracy")]
    assert (blind.value == 0).all() and len(blind) == 4
    written = pd.read_csv(tmp_path / "out/results.csv")
    assert {"pair accuracy", "pair accuracy, shuffled", "standard error", "gain over shuffled"} <= set(written.metric)


def test_against_the_official_script(tmp_path):
    "Softmax of a statement's scores over both images; the image with more than one half; both must be their own."
    rng = np.random.default_rng(0)
    scores = [tuple(map(tuple, rng.random((2, 2)))) for _ in range(16)]
    answers, _ = mmvp.ask_mmvp(mmvp.read_mmvp(folder(tmp_path, 8)), Numbers(scores))
    part = dict(mmvp.mmvp_groups(answers[answers["mode"] == WITH_IMAGE]))[mmvp.ALL].set_index("example").correct
    for pair, s in enumerate(np.array(scores)):
        chosen = (np.exp(100 * s) / np.exp(100 * s).sum(1, keepdims=True))[:, 0] > 0.5
        assert part[str(pair + 1)] == (chosen[0] and not chosen[1])


@pytest.mark.parametrize("home, names", [("MLLM_VLM Images", PATTERNS), ("MMVP_VLM_Images", ("Orientation", "Text"))])
def test_both_ways_to_write_the_folders(tmp_path, home, names):
    b = mmvp.read_mmvp(folder(tmp_path, home=home, names=names))
    assert len(b) == 8 and not b.problems and b.expected == {"Questions.csv": 270}
    assert all(p.is_file() for p in b.images.values())
    assert b.items.positive[0] == "a photo of statement 1, with a comma"
    assert b.items.negative[0] == "a photo of statement 2, with a comma"


@pytest.mark.parametrize(
    "lines, what, left",
    [
        (["1,Texts,a", "2,Texts,b", "3,Texts,c"], "a line without its partner", 2),
        (["1,Texts,a", "3,Texts,b"], "1 and 3 are no pair", 0),
        (["2,Texts,a", "3,Texts,b", "5,Texts,a", "6,Texts,b"], "2 and 3 are no pair", 2),
        (["1,Texts", "2,Texts,b"], "not a line of Question ID, Type, Statement", 0),
        (["one,Texts,a", "2,Texts,b"], "not a line of Question ID, Type, Statement", 0),
        (["1,../../etc,a", "2,Texts,b"], "no pattern that is the name of a folder", 0),
        (["1,Texts, ", "2,Texts,b"], "no statement", 0),
    ],
)
def test_broken_lines_are_listed_with_their_number(tmp_path, lines, what, left):
    b = mmvp.read_mmvp(folder(tmp_path, lines=["Question ID,Type,Statement", *lines]))
    (found,) = b.problems
    assert what in found["what"] and found["row"] in ("2", "4") and len(b.items) == left


def test_a_missing_image_takes_its_pair_with_it(tmp_path):
    folder(tmp_path / "data")
    (tmp_path / "data/MLLM_VLM Images/Texts/5.jpg").unlink()
    with pytest.raises(BenchmarkError, match="answered to less than 99%"):
        ct.run_task("mmvp", Numbers(SCORES), tmp_path / "data", out=tmp_path / "out", first=4)
    assert "5.jpg" in (tmp_path / "out.refused/problems.csv").read_text(encoding="utf-8")
    answers, problems = mmvp.ask_mmvp(mmvp.read_mmvp(tmp_path / "data"), Numbers(SCORES))
    assert set(answers.example) == {"1", "2", "4"} and len(problems) == 1


def test_refusals(tmp_path):
    with pytest.raises(BenchmarkError, match="which holds Questions.csv"):
        mmvp.read_mmvp(tmp_path)
    (tmp_path / "Questions.csv").write_bytes(b"Question ID,Type,Statement\n1,\xff\xfe,a\n")
    with pytest.raises(BenchmarkError, match="which holds Questions.csv"):
        mmvp.read_mmvp(tmp_path)
    folder(tmp_path / "a").joinpath("MLLM_VLM Images").rename(tmp_path / "a/else")
    with pytest.raises(BenchmarkError, match="no such folder of images"):
        mmvp.read_mmvp(tmp_path / "a")
    assert len(mmvp.read_mmvp(tmp_path / "a", tmp_path / "a/else")) == 8
    with pytest.raises(BenchmarkError, match="has no {} for the statement"):
        mmvp.read_mmvp(tmp_path / "a", prompt="a photo")
