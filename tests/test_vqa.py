"Questions answered in words: ScienceQA and MMMU from their files, by their rules, through the catalogue."

import io, json
import pandas as pd
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner
from selfalign.benchmarks.answers import read_answers
from selfalign.benchmarks.catalogue import TASKS, run_task
from selfalign.benchmarks.items import BenchmarkError
from selfalign.benchmarks.mmmu import IMAGES, read_mmmu, texts_of
from selfalign.benchmarks.mmmu_rules import drawn, open_is_right, read_choice, read_open
from selfalign.benchmarks.scienceqa import read_scienceqa
from selfalign.benchmarks.scienceqa_rules import read_letter, scienceqa_prompt
from selfalign.benchmarks.vqa import MODES, ask_vqa
from selfalign.study.settings import StudyError


def png(colour):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "PNG")
    return data.getvalue()


COLOURS = ["red", "green", "blue"]


def entry(i):
    "Every other question shows its colour."
    same = dict(hint="", task="closed choice", grade=f"grade{1 + i % 12}", subject="natural science", split="test")
    image = "image.png" if i % 2 else None
    return same | dict(question="Which colour?", choices=COLOURS, answer=i % 3, image=image)


@pytest.fixture
def scienceqa(tmp_path):
    entries = {str(i): entry(i) for i in range(24)}
    (tmp_path / "problems.json").write_text(json.dumps(entries))
    (tmp_path / "pid_splits.json").write_text(json.dumps(dict(test=list(entries))))
    for i in range(1, 24, 2):
        place = tmp_path / f"images/test/{i}"
        place.mkdir(parents=True)
        (place / "image.png").write_bytes(png(COLOURS[i % 3]))
    return tmp_path


def sees(images, prompt):
    "Knows a colour when it sees one, and says so as LLaVA-1 did; says A without an image."
    if not images:
        return "A"
    return f"I see it. The answer is {'ABC'[max(range(3), key=images[0].getpixel((0, 0)).__getitem__)]}."


def test_a_model_that_sees(scienceqa):
    table = run_task("scienceqa", sees, scienceqa, out=scienceqa / "out", least=0)
    got = table[(table.metric == "accuracy")].set_index(["row", "mode"]).value
    assert got["IMG", "with the image"] == 1 and got["NO", "with the image"] == pytest.approx(1 / 3)
    assert got["NO", "blind"] == got["NO", "with the image"] and got["IMG", "blind"] == pytest.approx(1 / 3)
    assert got["IMG", "shuffled"] < 1
    assert {m for m in table["mode"]} >= {"with the image", *MODES}
    assert table[table.metric == "no answer found"].value.dropna().eq(0).all()


def test_images_of_the_same_bytes_are_one_cluster(scienceqa):
    items = read_scienceqa(scienceqa).items
    assert items[items.has_image].cluster.nunique() == 3
    assert items[~items.has_image].cluster.nunique() == 1, "the same words without an image"


def test_missing_images_are_refused_unless_answers_are_there(scienceqa):
    (scienceqa / "images/test/1/image.png").unlink()
    with pytest.raises(BenchmarkError, match="answered to less than"):
        run_task("scienceqa", sees, scienceqa, out=scienceqa / "out")
    (scienceqa / "said.json").write_text(json.dumps({str(i): "A" for i in range(24)}))
    found = read_scienceqa(scienceqa, answers=scienceqa / "said.json")
    assert len(ask_vqa(found)[0]) == 48


@pytest.mark.parametrize("pid", ["../1", "a/../../b", "..\\x", "..", "x/../../../y"])
def test_no_id_leads_out(scienceqa, pid):
    (scienceqa / "problems.json").write_text(json.dumps({pid: entry(1), "0": entry(0)}))
    (scienceqa / "pid_splits.json").write_text(json.dumps(dict(test=[pid, "0"])))
    found = read_scienceqa(scienceqa)
    assert len(found) == 1 and [p["row"] for p in found.problems] == [pid]
    assert "leads out" in found.problems[0]["what"]


def test_the_command_scores_a_file(scienceqa):
    from selfalign.tools.benchmark_command import benchmark
    from selfalign.tools.terminal import Command

    results = {str(i): i % 3 if i < 12 else -1 for i in range(24)}
    (scienceqa / "said.json").write_text(json.dumps(dict(results=results, outputs={k: "?" for k in results})))
    app = Typer()
    app.command(cls=Command)(benchmark)
    args = ["scienceqa", "--answers", scienceqa / "said.json", "--data", scienceqa, "--least", 0]
    done = CliRunner().invoke(app, [*map(str, args), "--out", str(scienceqa / "out")])
    assert done.exit_code == 0, done.output
    found = pd.read_csv(scienceqa / "out/results.csv").query("row == 'average'").set_index("metric").value
    assert found["accuracy"] == found["no answer found"] == 0.5
    assert len(pd.read_csv(scienceqa / "out/problems.csv")) == 12, "results that outputs does not say"
    wrong = CliRunner().invoke(app, ["mmvp", "--answers", "x.json", "--data", str(scienceqa)])
    assert wrong.exit_code and isinstance(wrong.exception, StudyError | SystemExit)


def test_prompt_of_llava():
    said = scienceqa_prompt("Which  is  it?", ["a", "b"], " Look. ").split("\n")
    assert said[:3] == ["Context: Look.", "Question: Which is it?", "Options: (A) a (B) b"] and len(said) == 4


@pytest.mark.parametrize("text", ["", "A.", "(A)", "a", "A B", "The answer is A", "C", "F. x", "The answer is a."])
def test_failed(text):
    assert read_letter(text, 2) == ""


# --- MMMU --------------------------------------------------------------------------------------------------------


def rows(n=8):
    shown = dict.fromkeys(IMAGES) | dict(
        image_1=dict(bytes=png("red"), path="x"), image_2=dict(bytes=png("blue"), path="")
    )
    same = dict(
        question="<image 1> or <image 2>?", question_type="multiple-choice", options="['red', 'blue']", answer="A"
    )
    return [same | dict(id=f"validation_Art_Theory_{i}") | shown for i in range(n)]


def written(folder, rows):
    (folder / "Art_Theory").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "Art_Theory/validation-00000-of-00001.parquet")
    return folder


def test_images_come_in_order(tmp_path):
    seen = []
    found = read_mmmu(written(tmp_path, rows(2)), subjects="Art_Theory")
    ask_vqa(found, lambda images, prompt: seen.append([i.getpixel((0, 0)) for i in images]) or "(A)", audits=False)
    assert seen == [[(255, 0, 0), (0, 0, 255)]] * 2
    assert found.items.domain.unique() == ["Art and Design"]


def test_images_as_bare_bytes(tmp_path):
    bare = [r | dict(image_1=r["image_1"]["bytes"], image_2=None, question="<image 1>") for r in rows(2)]
    found = read_mmmu(written(tmp_path, bare), subjects="Art_Theory")
    assert len(found) == 2 and found.images["validation_Art_Theory_1/image_1"].size == (8, 8)


def test_guesses_are_counted_and_repeat(tmp_path):
    found = read_mmmu(written(tmp_path, rows(40)), subjects="Art_Theory", seed=1)
    one, two = (ask_vqa(found, lambda images, prompt: "no idea", audits=False)[0] for _ in range(2))
    assert one.equals(two) and one.unread[:40].all() and 0 < one.correct[:40].mean() < 1
    assert list(one.understood[:40]) == [drawn(k, 2, 1) for k in found.items.key]


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, "(" * 9000, "[1]", "{}", "[open('x','w')]", "['a'", "", "\0"]
)
def test_options_are_never_run(text):
    assert texts_of(text) is None


def test_rows_in_are_questions_and_problems(tmp_path):
    bad = rows(8)
    bad[1]["options"], bad[2]["answer"], bad[3]["id"] = "[open('x','w')]", "C", "validation_Art_Theory"
    bad[4]["question_type"], bad[5]["image_2"], bad[6]["question"] = "essay", None, ""
    found = read_mmmu(written(tmp_path, bad), subjects="Art_Theory")
    assert len(found) == 2 and [p["row"] for p in found.problems] == list("123456")
    assert all(p["file"] and p["remedy"] for p in found.problems)


def test_rules_of_mmmu():
    assert read_choice("Answer: (C)", ["a", "b", "c"]) == "C"
    assert read_choice("D", ["a", "b", "c"]) == ""
    assert open_is_right(read_open("x is 3\nso y = 4.006"), ["4.01"])
    assert not open_is_right(read_open("x is 3"), ["13"])


@pytest.mark.parametrize("name", ["scienceqa", "mmmu"])
def test_the_catalogue_names_the_audits(name):
    assert TASKS[name].audits == MODES


def test_answers_of_another_split(tmp_path, scienceqa):
    (tmp_path / "said.jsonl").write_text('{"id": "train-1", "text": "A"}')
    assert read_answers(tmp_path / "said.jsonl").texts
    with pytest.raises(BenchmarkError, match="answers none of the questions"):
        ask_vqa(read_scienceqa(scienceqa, answers=tmp_path / "said.jsonl"))
