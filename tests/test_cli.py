"The command line as a person types it: quick to answer, and a mistake is met with a hint instead of a traceback."

import io, os, shutil, subprocess, sys, tarfile, types
from pathlib import Path
import pytest
from PIL import Image
from typer.testing import CliRunner
from selfalign.tools.cli import app
from selfalign.study.settings import example_study

BIN = Path(sys.executable).parent
COMMANDS = [
    "run",
    "report",
    "publish",
    "stages",
    "params",
    "compare",
    "doctor",
    "benchmark",
    "caption",
    "pretrain",
    "make-shapes",
    "offline-models",
    "lab",
    "data",
    "data inspect",
    "data link",
    "data emoji",
    "data overlap",
]


@pytest.fixture
def study(tmp_path, monkeypatch):
    "The study of two stages, in a folder of its own."
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return example_study(tmp_path)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "The same study, run once as `micro` by the real command."
    root = example_study(tmp_path_factory.mktemp("ran"))
    env = {**os.environ, "SELFALIGN_ROOT": str(root)}

    def command(*args, **kw):
        return subprocess.run(
            [BIN / "selfalign", *args],
            env=env,
            cwd=root,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            **kw,
        )

    first = command("run", "micro")
    assert first.returncode == 0, first.stderr
    return root, command, first


def sh(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(*args):
    "Run a command that must be refused: exit code 2, no traceback, one error."
    result = sh(*args)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.stderr


# --- quick -------------------------------------------------------------------------------------------------------


def work_of_children():
    "Seconds that a core has worked for the processes that have ended."
    return os.times().children_user + os.times().children_system


def test_help_under_a_second():
    "Of work, not of waiting for other work on the machine; the best of a few tries."

    def once():
        begun = work_of_children()
        subprocess.run([BIN / "selfalign", "--help"], check=True, capture_output=True)
        return work_of_children() - begun

    assert min(once() for _ in range(4)) < 1


def test_nothing_heavy_is_imported():
    heavy = "torch transformers diffusers open_clip pandas numpy matplotlib papermill sklearn PIL rich.progress".split()
    code = f"import sys, selfalign.tools.cli; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


# --- explained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    result = sh(*name.split(), "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_comments_are_the_help():
    said = {c: " ".join(sh(c, "--help").output.replace("│", " ").split()) for c in ("run", "params", "doctor")}
    assert "another value for one parameter" in said["run"]
    # two commands share an option, each explains it in its own words
    assert "the preset whose values are shown" in said["params"]
    assert "the preset whose values are shown" not in said["doctor"]


def test_no_arguments_is_help():
    assert "compare" in sh().output


# --- refused with a hint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args,hint",
    [
        ("run micor", "'micro'"),
        ("run micro -p number.n=3", "'numbers'"),
        ("run micro -p numbers.nams=a", "'names'"),
        ("run micro -p numbers.n=three", "type int"),
        ("run micro -p numbers.n", "stage.parameter=value"),
        ("run micro --force totl", "'total'"),
        ("run micro --run ../elsewhere", "cannot name a run"),
        ("params totl", "'total'"),
        ("params --preset smok", "'smoke'"),
        ("doctor --preset smok", "'smoke'"),
        ("report", "selfalign run micro"),
        ("report micor", "no run"),
        ("compare a b", "no run"),
        ("caption a.png --model data/runs/micro", "data/runs/RUN/captioning/trainings/ARM-SEED/model"),
        ("caption a.png", "--model"),
        ("caption --model data/runs/micro", "IMAGE"),
        ("caption a.png --model data/runs/micro --top-p 2", "--top-p"),
        ("data inspect microwrld:study", "'microworld'"),
        ("data inspect microworld:study?nois=1", "'noise'"),
        ("data inspect no/such/folder", "no/such/folder"),
        ("data link no/such/folder", "not a folder"),
        ("data overlap microwrld:study microworld:evaluation?count=3", "'microworld'"),
        ("data overlap no/such/folder microworld:evaluation?count=3", "no/such/folder"),
        ("data overlap microworld:study microworld:evaluation --first 3 --most 65", "64 bits"),
    ],
)
def test_refused(study, args, hint):
    assert hint in refused(*args.split())


@pytest.mark.parametrize("args,hint", [("rnu", "run"), ("data inspct", "inspect")])
def test_unknown_command(args, hint):
    assert hint in refused(*args.split())


def test_outside_a_study(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))
    assert "settings.ini" in refused("stages")


# --- lists -------------------------------------------------------------------------------------------------------


def test_stages_and_presets(study):
    text = sh("stages").output
    for word in ("numbers", "total", "nbs/total.ipynb", "smoke", "micro"):
        assert word in text


def test_params_show_the_preset(study):
    lines = {l.split()[0]: l for l in sh("params").output.splitlines() if "." in l}
    assert "20" in lines["numbers.n"] and "how many numbers" in lines["numbers.n"]
    assert " 4 " in sh("params", "numbers", "--preset", "smoke").output
    assert "total.scale" in lines


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_ends_with_the_report(ran):
    root, command, first = ran
    last = first.stdout.strip().splitlines()[-1]
    assert last == f"Report: {Path('reports/micro/index.html')}"
    assert (root / "reports/micro/index.html").is_file()


@pytest.mark.slow
def test_nothing_changed_is_quick(ran):
    root, command, _ = ran
    begun = work_of_children()
    again = command("run", "micro")
    assert again.returncode == 0
    assert again.stdout.count("skipped") == 2
    assert work_of_children() - begun < 15


@pytest.mark.slow
def test_report_again(ran):
    root, command, _ = ran
    shutil.rmtree(root / "reports/micro")
    assert command("report").returncode == 0
    assert (root / "reports/micro/index.html").is_file()


@pytest.mark.slow
def test_a_run_beside_the_published_report(ran):
    root, command, _ = ran
    shutil.copytree(root / "reports/micro", root / "reports/published/micro", dirs_exist_ok=True)
    shown = command("compare", "micro", "published/micro")
    assert shown.returncode == 0, shown.stderr
    assert "0 of 1 numbers" in shown.stdout
    refused = command("report", "published/micro")
    assert refused.returncode == 2
    assert "is a report whose run folder is gone" in refused.stderr


def test_what_has_no_commit_is_not_published(ran):
    root, command, _ = ran
    refused = command("publish", "micro")
    assert refused.returncode == 2
    assert "no commit is known of" in refused.stderr
    assert not (root / "reports/published/micro/stage.json").exists()


@pytest.mark.slow
def test_changed_parameter_and_comparison(ran, tmp_path):
    root, command, _ = ran
    assert command("run", "micro", "-p", "numbers.n=10", "--run", "ten").returncode == 0
    shown = command("compare", "micro", "ten", "--csv", tmp_path / "both.csv")
    assert shown.returncode == 0, shown.stderr
    assert "numbers.n" in shown.stdout and "190" in shown.stdout and "45" in shown.stdout
    assert "verdict" in (tmp_path / "both.csv").read_text().splitlines()[0]
    assert command("compare", "micro", "tne").returncode == 2


@pytest.mark.slow
def test_failure_says_where_and_how_to_go_on(ran):
    root, command, _ = ran
    failed = command("run", "micro", "-p", "numbers.n=0", "--run", "bad")
    assert failed.returncode == 1 and "selfalign: " in failed.stderr
    for word in ("stage 'total'", "cell", "notebook.ipynb", "selfalign run micro -p numbers.n=0 --run bad"):
        assert word in failed.stderr
    assert 'File "' not in failed.stderr.split("in cell")[0]


# --- data --------------------------------------------------------------------------------------------------------


def shard(path, **files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png():
    out = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(out, "PNG")
    return out.getvalue()


def test_inspect_names_what_is_wrong(study):
    (study / "pairs").mkdir()
    shard(study / "pairs/00000.tar", a__png=png(), a__txt=b"fine", b__png=png()[:60], b__txt=b"cut short", c__png=png())
    result = sh("data", "inspect", "pairs")
    assert result.exit_code == 0, result.output
    assert "40×30" in result.output and "fine" in result.output
    problems = result.output.split("problems")[-1]
    assert " b " in problems and " c " in problems and " a " not in problems


def test_inspect_by_looking(study):
    "A folder with a table: what it was taken for, which rows are wrong, and how many images are there."
    (study / "pairs").mkdir()
    (study / "pairs/a.png").write_bytes(png())
    (study / "pairs/b.png").write_bytes(png()[:40])
    (study / "pairs/list.csv").write_text(
        "image,title,text\na.png,A,a cat\na.png,A,another cat\nb.png,B,a dog\nc.png,C,a cow\nd.png\n"
    )
    assert "?caption_column=title" in refused("data", "inspect", "pairs")
    result = sh("data", "inspect", "pairs?caption_column=text", "--coverage")
    said = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    for expected in (
        "table:pairs/list.csv",
        "recognised by a table with the columns image, title, text",
        "pairs 3",
        "usable of these 1",
        "2 of 3; not there: c.png",
        "1 (2), 2 (1)",
        "list.csv line 6 wrong number of cells",
        "line 4 (b.png)",
        "line 5 (c.png)",
        "a cat",
    ):
        assert expected in said, (expected, said)


def test_inspect_asks_where_two_things_are_possible(study):
    (study / "pairs").mkdir()
    for name in ("a.csv", "b.csv"):
        (study / "pairs" / name).write_text("image,caption\na.png,a cat\n")
    error = refused("data", "inspect", "pairs")
    assert "table:pairs/a.csv" in error and "table:pairs/b.csv" in error


def test_captions_cannot_play_tricks(study):
    (study / "pairs").mkdir()
    shard(
        study / "pairs/00000.tar",
        **{"\x1b[2Jkey__png": png(), "\x1b[2Jkey__txt": b"[bold]a\x1b[31m red\x07 <b>dog</b>[/bold]"},
    )
    result = sh("data", "inspect", "pairs")
    assert result.exit_code == 0 and "\x1b" not in result.output and "\x07" not in result.output
    assert "dog" in result.output


def coarse(seed, side=64):
    "An image with a pattern of its own."
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )


def encoded(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_overlap_finds_the_copy(study):
    import pandas as pd

    (study / "train").mkdir()
    (study / "test").mkdir()
    shard(
        study / "train/0.tar",
        **{
            f"{n}{i}{e}": d
            for n, i in (("train", i) for i in range(8))
            for e, d in (("__png", encoded(coarse(i))), ("__txt", f"image number {i}".encode()))
        },
    )
    shard(
        study / "test/0.tar",
        copy__jpg=encoded(coarse(3, 48), "JPEG"),
        copy__txt=b"Image number 3!",
        other__png=encoded(coarse(99)),
        other__txt=b"image number 5",
        new__png=encoded(coarse(98)),
        new__txt=b"\x1b[2Jnothing like it",
        bad__png=b"x",
        bad__txt=b"x",
    )
    result = sh("data", "overlap", "train", "test", "--csv", study / "pairs.csv")
    assert result.exit_code == 0, result.output
    found = pd.read_csv(study / "pairs.csv").set_index("test")
    assert (
        found.index.tolist() == ["copy", "other"]
        and found.train.tolist() == ["train3", "train5"]
        and found.agree.tolist() == [2, 1]
        and found.words.tolist() == [3, 3]
        and found.hash["copy"] <= 4
    )
    for word in (
        "mirrored hash",
        "caption",
        "any",
        "33.3 %",
        "50.0 %",
        "train3",
        "none is proven",
        "bad ",
        "All 2 pairs",
    ):
        assert word in result.output, (word, result.output)
    assert (
        "\x1b" not in result.output
        and sh("data", "overlap", "train", "test", "--first", "2").output.count("train") == 0
    )


def test_overlap_with_an_encoder(tiny_clip, tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        [coarse(i).save(tmp_path / name / f"{i}.png") for i in range(3)]
    result = sh(
        "data",
        "overlap",
        tmp_path / "train",
        tmp_path / "test",
        "--encoder",
        f"open_clip:{tiny_clip}",
        "--csv",
        tmp_path / "pairs.csv",
    )
    assert result.exit_code == 0, result.output
    assert (
        "embedding" in result.output
        and "1.000" in result.output
        and {"0.png,0.png", "1.png,1.png", "2.png,2.png"}
        <= {",".join(l.split(",")[:2]) for l in (tmp_path / "pairs.csv").read_text().splitlines()}
    )


def test_link(study, tmp_path_factory):
    photographs = tmp_path_factory.mktemp("photographs")
    (photographs / "x.txt").write_text("x")
    assert sh("data", "link", photographs, "--name", "mine").exit_code == 0
    assert (study / "data/mine/x.txt").read_text() == "x"
    assert "already there" in refused("data", "link", photographs, "--name", "mine")


@pytest.mark.parametrize("name", ["../out", "a/b", "micro", "runs", "", ".hidden"])
def test_link_keeps_inside(study, name):
    assert "cannot be the name" in refused("data", "link", study, "--name", name)
    assert not (study / "data").exists()


# --- the others --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor():
    result = sh("doctor", "--preset", "smoke")
    assert result.exit_code in (0, 1) and (result.exit_code == 1) == ("MISSING" in result.output)
    for word in ("Python", "memory", "free disk", "GPU", "packages", "data/micro", "microworld"):
        assert word in result.output


@pytest.mark.slow
def test_doctor_says_what_it_takes():
    result = sh(
        "doctor",
        "--preset",
        "smoke",
        "-p",
        "generate.steps=3",
        "-p",
        "finetune.model=open_clip:ViT-B-32-quickgelu/openai",
    )
    text = " ".join(result.output.split())
    for words in (
        "What it would take",
        "in 3 steps",
        "GFLOP",
        "Downloads and room",
        "0.6 GB to download",
        "Total: about",
    ):
        assert words in text
    assert "'steps'" in refused("doctor", "-p", "generate.stps=3")


@pytest.mark.slow
def test_doctor_without_a_preset_only_looks():
    "It counts nothing, and the package for it is not even imported."
    code = """
import sys
from typer.testing import CliRunner
from selfalign.tools.cli import app
said = CliRunner().invoke(app, ["doctor"]).output
print("What it would take" in said, "Preset micro" in said, "selfalign.tools.estimate" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_doctor_knows_the_loaders_libraries():
    from selfalign.models.references import libraries
    from selfalign.tools.checks import LIBRARIES

    assert LIBRARIES == libraries


@pytest.mark.slow
def test_doctor_where_torch_is_broken(monkeypatch):
    "A build of torch beside another build of torchvision fails on import; the doctor says so and goes on."
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = sh("doctor", "--preset", "smoke")
    assert result.exit_code == 1 and "install torch and torchvision together" in " ".join(result.output.split())


def test_doctor_counts_what_is_missing(study):
    (study / "settings.ini").write_text(
        (study / "settings.ini").read_text() + "\n[photos]\nextends = micro\nnumbers.names = webdataset:data/nowhere\n"
    )
    result = sh("doctor", "--preset", "photos")
    assert result.exit_code == 1
    assert (
        "selfalign data link FOLDER --name nowhere" in " ".join(result.output.split())
        and "MISSING for preset photos" in result.stderr
    )


def test_pretrain_passes_on(study, monkeypatch):
    said = {}
    module = types.ModuleType("selfalign.models.pretrain")
    module.pretrain = lambda names, out, resume=True, budget=1.0: said.update(
        names=names, out=out, resume=resume, budget=budget
    )
    monkeypatch.setitem(sys.modules, "selfalign.models.pretrain", module)
    assert sh("pretrain", "clip", "judge", "--fresh", "--budget", "0.1").exit_code == 0
    assert said == dict(names=["clip", "judge"], out=None, resume=False, budget=0.1)


def test_lab_starts_jupyter(study, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command: started.append([str(c) for c in command]) or 0)
    assert sh("lab", "--", "--no-browser").exit_code == 0
    assert (
        started[0][1:3] == ["-m", "jupyterlab"]
        and started[0][-1] == "--no-browser"
        and started[0][-2].endswith("index.ipynb")
    )
