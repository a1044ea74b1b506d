"Stages and the runner: keys, skipping, whole-or-nothing output, resuming, refusals; over tiny notebooks made here."

import errno, json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest
from selfalign.study import execution, files, project, runner, settings as s, stage as st
from selfalign.study.keys import keys_of
from selfalign.study.runner import RunError, run
from selfalign.study.settings import resolve
from selfalign.study.files import StageError, atomic_write, read_json, tree_hash, write_json
from selfalign.study.stage import Stage
from study import until

ROOT = Path(__file__).resolve().parents[1]
ENV = lambda root: os.environ | {"SELFALIGN_ROOT": str(root), "PYTHONPATH": str(ROOT)}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))
    return s.example_study(tmp_path)


def notebook(study, name, *cells):
    project.write_stage(study / f"nbs/{name}.ipynb", list(cells))


def starts(folder):
    return {n: (read_json(folder / n / "stage.json") or {}).get("start_ns") for n in ("numbers", "total")}


def python(root, code, **kw):
    return subprocess.Popen(
        [sys.executable, "-c", code], env=ENV(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw
    )


@pytest.fixture
def fake(study, monkeypatch):
    "Stages that are executed in this process, for tests that need no kernel; returns the names that ran."
    ran = []

    def execute(notebook, output, values):
        ran.append(notebook.stem)
        write_json(output, {"cells": []})
        cells = json.loads(notebook.read_text())["cells"]
        exec(cells[0]["source"], scope := {})
        scope.update(values)
        try:
            for cell in cells[1:]:
                exec(cell["source"], scope)
        finally:
            scope["stage"]._lock.release()

    monkeypatch.setattr(execution, "execute", execute)
    return ran


# --- files -------------------------------------------------------------------------------------------------------


def test_atomic_write_keeps_the_old_file(tmp_path):
    with atomic_write(tmp_path / "deep/a") as path:
        path.write_text("1")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "deep/a") as path:
        path.write_text("2")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in (tmp_path / "deep").iterdir()] == [("a", "1")]


def test_full_disk_says_so(tmp_path):
    "A limit on file size stands for a full disk: the error comes from the system, in the middle of a table."
    big = pd.DataFrame({"x": os.urandom(1)[0] + pd.Series(range(200_000))})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with (
            pytest.raises(StageError, match="no space left.*run the same command again"),
            atomic_write(tmp_path / "t.parquet") as path,
        ):
            big.to_parquet(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_all_ways_a_disk_is_full(tmp_path, number):
    with pytest.raises(StageError, match="no space left"), atomic_write(tmp_path / "x"):
        raise OSError(number, "full")


def test_tree_hash(tmp_path):
    for name in ("a", "b/c"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    cache, first = tmp_path / "cache", tree_hash(tmp_path / "d", tmp_path / "cache")
    assert tree_hash(tmp_path / "d", cache) == first and len(read_json(cache)) == 2
    (tmp_path / "d/.hidden").write_text("x")
    assert tree_hash(tmp_path / "d", cache) == first
    (tmp_path / "d/a").rename(tmp_path / "d/z")
    assert tree_hash(tmp_path / "d", cache) != first
    cache.write_text("{damaged")
    assert tree_hash(tmp_path / "d", cache)


def test_large_data_are_known_by_their_listing(tmp_path, monkeypatch):
    "Small data by content; beyond either limit no file is read, and the fingerprint says so."
    for i in range(5):
        (tmp_path / f"d/{i}").mkdir(parents=True)
        (tmp_path / f"d/{i}/x.jpg").write_bytes(b"0" * 100)
    assert files.data_hash(tmp_path / "d", tmp_path / "cache") == tree_hash(tmp_path / "d", tmp_path / "cache")
    monkeypatch.setattr(files, "file_hash", lambda p: pytest.fail("a file was read"))
    large = lambda: files.data_hash(tmp_path / "d", tmp_path / "no cache", most_files=4)
    first = large()
    assert (
        first.startswith("listing:")
        and first == large() == files.data_hash(tmp_path / "d", tmp_path / "no cache", most_bytes=499)
        and not (tmp_path / "no cache").exists()
    )
    (tmp_path / "d/.hidden").write_text("x")
    (tmp_path / "d/dangling").symlink_to(tmp_path / "gone")
    assert large() == first
    os.utime(tmp_path / "d/3/x.jpg", ns=(1, 1))
    moved = large()
    assert moved != first
    (tmp_path / "d/3/x.jpg").rename(tmp_path / "d/3/y.jpg")
    assert large() not in (first, moved)
    assert files.data_hash(tmp_path / "d/0/x.jpg", most_bytes=99).startswith("listing:")


def test_the_manifest_says_listing(tmp_path, monkeypatch):
    from selfalign.study import keys, named_files

    monkeypatch.setattr(named_files, "data_hash", lambda p: files.data_hash(p, most_files=0))
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))
    s.example_study(tmp_path)
    (tmp_path / "data/photos").mkdir(parents=True)
    (tmp_path / "data/photos/a.jpg").write_bytes(b"0")
    assert keys.files_of({"source": "folder:data/photos"})["data/photos"].startswith("listing:")


def test_tree_hash_reads_only_what_changed(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a").write_text("a")
    tree_hash(tmp_path / "d", tmp_path / "cache")
    monkeypatch.setattr(files, "file_hash", lambda p: pytest.fail("read again"))
    tree_hash(tmp_path / "d", tmp_path / "cache")


# --- keys --------------------------------------------------------------------------------------------------------


def changed(study, before, *overrides):
    now = keys_of(resolve("smoke", overrides))
    return [n for n in now if now[n] != before[n]]


def test_a_parameter_changes_its_stage_and_what_follows(study):
    before = keys_of(resolve("smoke"))
    assert changed(study, before) == []
    assert changed(study, before, "total.scale=2") == ["total"]
    assert changed(study, before, "numbers.n=9") == ["numbers", "total"]


def test_code_counts_comments_do_not(study):
    before, cells = keys_of(resolve("smoke")), project.EXAMPLE_STAGES["total"]
    notebook(
        study,
        "total",
        cells[0].replace("# what", "# by what"),
        "# why\n" + cells[1],
        cells[2].replace('row="all"', "row = 'all'"),
        cells[3],
    )
    assert changed(study, before) == []
    notebook(study, "total", *cells[:2], cells[2].replace("scale*", "2*scale*"), cells[3])
    assert changed(study, before) == ["total"]


def test_markdown_and_default_of_a_set_parameter_do_not_count(study):
    before, path = keys_of(resolve("smoke")), study / "nbs/numbers.ipynb"
    nb = json.loads(path.read_text())
    nb["cells"].insert(1, dict(cell_type="markdown", id="m", metadata={}, source="# A title"))
    nb["cells"][0]["source"] = nb["cells"][0]["source"].replace("n: int = 3", "n: int = 77")
    path.write_text(json.dumps(nb))
    assert changed(study, before) == []


def test_modules_count_through_imports(study, tmp_path, monkeypatch):
    package = tmp_path / "selfalign"
    (package / "a").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "a/__init__": "",
        "a/one": "def f():\n    from .two import g\n    return g()",
        "a/two": "def g(): return 1",
        "a/other": "x = 1",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr("selfalign.__file__", str(package / "__init__.py"))
    notebook(study, "total", project.EXAMPLE_STAGES["total"][0], "from selfalign.a import one")
    before = keys_of(resolve("smoke"))
    (package / "a/other.py").write_text("x = 2")
    assert changed(study, before) == []
    (package / "a/two.py").write_text('def g():\n    "One."\n    return 1  # one')
    assert changed(study, before) == []
    (package / "a/two.py").write_text("def g(): return 2")
    assert changed(study, before) == ["total"]


def test_files_named_by_parameters_count(study):
    (study / "data/m").mkdir(parents=True)
    (study / "data/m/w").write_text("1")
    notebook(study, "total", 'run: str = ""\nmodels: list[str] = ["open_clip:data/m?x", "hub/name"]\nscale: float = 1')
    before = keys_of(resolve("smoke"))
    (study / "data/m/w").write_text("2!")
    assert changed(study, before) == ["total"]


@pytest.fixture
def named(study):
    "The key of a stage whose parameter names something; the study has one stage, `total`."
    (study / "settings.ini").write_text("[stages]\ntotal = nbs/total.ipynb\n[smoke]\n")
    notebook(study, "total", 'run: str = ""\nsource: str = ""')
    return lambda source: keys_of(resolve("smoke", [f"total.source={source}"]))["total"]


@pytest.fixture
def elsewhere(tmp_path_factory):
    "A table and its images outside of the study."
    folder = tmp_path_factory.mktemp("disk")
    (folder / "images").mkdir()
    (folder / "pairs.csv").write_text("image,caption\nimages/0.jpg,a cat\nimages/1.jpg,a dog\n")
    for i in range(2):
        (folder / f"images/{i}.jpg").write_bytes(b"0")
    return folder


def ways_to_name(study, file):
    return [f"table:{file}", f"{file}?caption_source=human", os.path.relpath(file, study), f"table:~/{file.name}"]


@pytest.mark.parametrize("way", range(4))
def test_a_caption_changed_outside_the_study_counts(study, named, elsewhere, monkeypatch, way):
    monkeypatch.setenv("HOME", str(elsewhere))
    source = ways_to_name(study, elsewhere / "pairs.csv")[way]
    before = named(source)
    assert named(source) == before
    (elsewhere / "pairs.csv").write_text("image,caption\nimages/0.jpg,a cat\nimages/1.jpg,a cow\n")
    assert named(source) != before


@pytest.mark.parametrize("source", ["table:{}/pairs.csv", "{}/pairs.csv?caption_source=human", "{}"])
def test_an_image_that_a_table_names_counts(named, elsewhere, source):
    source = source.format(elsewhere)
    before = named(source)
    (elsewhere / "images/other.jpg").write_bytes(b"unnamed")
    assert (named(source) == before) == ("pairs" in source), "a table stands for the images that it names"
    before = named(source)
    (elsewhere / "images/1.jpg").write_bytes(b"another")
    assert named(source) != before


def test_an_image_in_the_folder_that_the_source_gives_counts(named, elsewhere, tmp_path_factory):
    disk = tmp_path_factory.mktemp("large")
    (elsewhere / "images").rename(disk / "images")
    source = f"table:{elsewhere}/pairs.csv?images={disk}"
    before = named(source)
    (disk / "images/0.jpg").write_bytes(b"another")
    assert named(source) != before


def test_an_image_behind_a_link_counts(study, named, elsewhere, tmp_path_factory):
    disk = tmp_path_factory.mktemp("large")
    (elsewhere / "images").rename(disk / "images")
    (elsewhere / "images").symlink_to(disk / "images")
    (study / "data").mkdir()
    (study / "data/set").symlink_to(elsewhere)
    for source in ("table:data/set/pairs.csv", "data/set", f"{elsewhere}"):
        before = named(source)
        with open(disk / "images/0.jpg", "ab") as f:
            f.write(b"more")
        assert named(source) != before, source


def test_an_image_that_appears_counts(named, elsewhere):
    (elsewhere / "images/1.jpg").unlink()
    before = named(f"{elsewhere}/pairs.csv")
    (elsewhere / "images/1.jpg").write_bytes(b"0")
    assert named(f"{elsewhere}/pairs.csv") != before


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", '[{"image": "images\\/0.jpg", "caption": "a cat, a .jpg file"}]'),
        ("a.jsonl", '{"file_name": "images/0.jpg", "text": "a cat"}\n'),
        ("a.tsv", "images/0.jpg\ta cat\n"),
        ("results.csv", "image_name| comment_number| comment\nimages/0.jpg| 0| a cat\n"),
        ("a.token", "images/0.jpg#0\ta cat\n"),
        ("a.txt", "image,caption\nimages/0.jpg,a cat\n"),
    ],
)
def test_images_are_found_in_every_kind_of_table(named, elsewhere, name, text):
    (elsewhere / name).write_text(text)
    before = named(f"{elsewhere}/{name}")
    (elsewhere / "images/0.jpg").write_bytes(b"another")
    assert named(f"{elsewhere}/{name}") != before


def test_images_are_found_in_parquet(named, elsewhere):
    pd.DataFrame({"image": ["images/0.jpg"], "n": [1]}).to_parquet(elsewhere / "a.parquet")
    before = named(f"{elsewhere}/a.parquet")
    (elsewhere / "images/0.jpg").write_bytes(b"another")
    assert named(f"{elsewhere}/a.parquet") != before


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet", "a.arrow"])
def test_a_damaged_table_is_no_obstacle(named, elsewhere, name):
    (elsewhere / name).write_bytes(b"\xff\x00,.jpg\n{")
    assert named(f"{elsewhere}/{name}")


def test_a_circle_of_links_ends(named, elsewhere):
    (elsewhere / "images/up").symlink_to(elsewhere)
    assert named(f"{elsewhere}")


def test_magics_are_no_obstacle(study):
    notebook(
        study, "total", project.EXAMPLE_STAGES["total"][0], "%matplotlib inline\n!ls\nif True:\n    %time\n    pass"
    )
    assert keys_of(resolve("smoke"))


# --- running -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_kernels(study, monkeypatch):
    "The one test that runs everything for real: outputs, manifest, skipping, rerunning, failing, continuing."
    folder = run("smoke", quiet=True)
    assert sorted(p.name for p in (folder / "numbers").iterdir()) == [
        "figures.json",
        "notebook.ipynb",
        "results.csv",
        "shards",
        "stage.json",
        "tables",
    ]
    assert not list(folder.glob("*.partial")) and read_json(folder / "run.json")["status"] == "finished"
    results = pd.read_csv(folder / "results.csv")
    assert (
        list(results.columns) == st.RESULT_COLUMNS
        and results["value"].tolist() == [6]
        and results["chapter"].tolist() == ["nbs"]
    )
    assert (results["run"][0], results["preset"][0], results["scale"][0]) == ("smoke", "smoke", "micro")
    manifest = read_json(folder / "total/stage.json")
    wanted = """name preset scale parameters key inputs code files versions git hardware start seconds
    peak_memory_gb status""".split()
    assert [w for w in wanted if w not in manifest] == []
    assert manifest["status"] == "finished"
    assert manifest["inputs"] == {"numbers": read_json(folder / "numbers/stage.json")["key"]} and manifest[
        "parameters"
    ] == {"scale": 1.0}
    assert manifest["hardware"]["cores"] >= 1 and manifest["peak_memory_gb"] > 0 and "python" in manifest["versions"]
    assert str(study) not in (folder / "total/notebook.ipynb").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(execution, "execute", lambda *_: pytest.fail("executed again"))
        begin = time.process_time()
        run("smoke", quiet=True)
        assert time.process_time() - begin < 2
    notebook(study, "total", *project.EXAMPLE_STAGES["total"][:2], 'print("so far")\nboom')
    with pytest.raises(RunError) as e:
        run("smoke", ["total.scale=2"], quiet=True)
    for part in (
        "stage 'total'",
        "nbs/total.ipynb",
        "In [4]",
        "boom",
        "NameError: name 'boom' is not defined",
        "data/runs/smoke/total.partial/notebook.ipynb",
        "selfalign run smoke -p total.scale=2",
    ):
        assert part in str(e.value), part
    assert "\x1b" not in str(e.value) and pd.read_csv(folder / "results.csv")["value"].tolist() == [6]
    assert (
        "so far" in (folder / "total.partial/notebook.ipynb").read_text()
        and read_json(folder / "run.json")["status"] == "failed"
    )


def test_skips_and_reruns(study, fake):
    run("smoke", quiet=True)
    run("smoke", quiet=True)
    assert fake == ["numbers", "total"]
    run("smoke", ["total.scale=3"], quiet=True)
    assert fake[2:] == ["total"]
    run("smoke", ["total.scale=3"], force=["numbers"], quiet=True)
    assert fake[3:] == ["numbers", "total"]
    run("smoke", ["total.scale=3"], force="total", quiet=True)
    assert fake[5:] == ["total"]
    with pytest.raises(RunError, match="did you mean 'total'"):
        run("smoke", force=["totl"], quiet=True)
    run("smoke", only=["numbers"], quiet=True)
    assert fake[6:] == []


def test_variants_of_stages_in_one_run(study, fake):
    from test_settings import VARIANTS

    (study / "settings.ini").write_text(VARIANTS)
    folder = run("smoke", quiet=True)
    rows = pd.read_csv(folder / "results.csv").set_index("table")["value"].to_dict()
    assert rows == {"sums": 12, "sums-many": 72}  # 2*(0+1+2+3) and 2*(0+...+8)
    assert fake.count("total") == fake.count("numbers") == 2
    run("smoke", ["numbers-many.n=3"], quiet=True)
    assert fake[4:] == ["numbers", "total"] and read_json(folder / "total-many/stage.json")["inputs"].keys() == {
        "numbers-many"
    }


def test_an_optional_input_counts_where_the_run_has_it(study, fake):
    ini, plain = (
        study / "settings.ini",
        project.EXAMPLE_SETTINGS.replace(": numbers\n", ": numbers more?\nmore    = nbs/more.ipynb\n"),
    )
    notebook(
        study,
        "more",
        'run: str = ""  # run folder\nx: int = 1  # a number',
        project.EXAMPLE_STAGES["numbers"][1].replace('"numbers"', '"more"'),
        "stage.finish()",
    )
    ini.write_text(
        plain.replace("[smoke]\n", "[smoke]\nstages = total\n").replace("[micro]\n", "[micro]\nstages = total more\n")
    )
    assert s.resolve("smoke").stages == ["numbers", "total"] and set(s.resolve("micro").stages[:2]) == {
        "numbers",
        "more",
    }
    assert (
        s.resolve("micro", only=["total"]).stages[-1] == "total" and len(s.resolve("micro", only=["total"]).stages) == 3
    )
    without, with_, other = (
        keys_of(s.resolve("smoke"))["total"],
        keys_of(s.resolve("micro", ["numbers.n=4"]))["total"],
        keys_of(s.resolve("micro", ["numbers.n=4", "more.x=2"]))["total"],
    )
    assert len({without, with_, other}) == 3
    run("micro", quiet=True)
    fake.clear()
    run("micro", force=["more"], quiet=True)
    assert fake == ["more", "total"]
    fake.clear()
    run("smoke", quiet=True)
    assert read_json(study / "data/runs/smoke/total/stage.json")["inputs"].keys() == {"numbers"} and "more" not in fake
    stage = Stage.__new__(Stage)
    stage.by_hand, stage._inputs, stage.manifest = False, {"more": "more"}, dict(inputs={"numbers": ""})
    assert not stage.has("more")
    stage.manifest["inputs"]["more"] = ""
    assert stage.has("more")
    ini.write_text(plain.replace("more?", "mor?"))
    with pytest.raises(s.SettingsError, match="unknown input 'mor'; did you mean 'more'"):
        s.stages()


def test_settings_are_checked_before_anything_runs(study, fake):
    for overrides in (["numbers.n=x"], ["total.y=1"], ["nothing.n=1"]):
        with pytest.raises(s.SettingsError):
            run("smoke", overrides, quiet=True)
    assert not fake and not (study / "data").exists()


def test_run_has_its_own_folder_and_a_safe_name(study, fake):
    assert run("smoke", run="mine", quiet=True) == study / "data/runs/mine"
    assert set(pd.read_csv(study / "data/runs/mine/results.csv")["run"]) == {"mine"}
    for name in ("../x", "/tmp/x", "a/b", ".x", "_hand", "a.partial"):
        with pytest.raises(RunError, match="cannot name a run"):
            run("smoke", run=name, quiet=True)


def test_forgotten_finish(study, fake):
    notebook(study, "total", *project.EXAMPLE_STAGES["total"][:3])
    with pytest.raises(RunError, match=r"without stage.finish\(\)"):
        run("smoke", quiet=True)


def test_partial_work_of_another_key_is_dropped(study, fake):
    broken = project.EXAMPLE_STAGES["numbers"][:3] + ["1/0"]
    notebook(study, "numbers", *broken)
    with pytest.raises(RunError, match="ZeroDivisionError"):
        run("smoke", quiet=True)
    partial = study / "data/runs/smoke/numbers.partial"
    assert len(list((partial / "shards").glob("*.parquet"))) == 2
    (partial / "shards/000000.parquet").rename(partial / "shards/000007.parquet")
    notebook(study, "numbers", *project.EXAMPLE_STAGES["numbers"])
    run("smoke", quiet=True)
    assert pd.read_csv(study / "data/runs/smoke/results.csv")["value"].tolist() == [6]


def test_full_disk_in_a_run(study, fake):
    notebook(study, "numbers", *project.EXAMPLE_STAGES["numbers"][:2], 'raise OSError(28, "No space left on device")')
    with pytest.raises(RunError, match="The disk is full: free some space"):
        run("smoke", quiet=True)


@pytest.mark.slow
def test_a_dead_kernel_is_explained(study):
    notebook(
        study,
        "numbers",
        project.EXAMPLE_STAGES["numbers"][0],
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    )
    with pytest.raises(RunError, match="The kernel died, most often because memory ran out"):
        run("smoke", only=["numbers"], quiet=True)


def test_two_runs_in_one_folder(study, fake):
    with runner.lock_run(runner.run_folder("smoke")):
        done = python(study, 'from selfalign.study.runner import run; run("smoke")')
        assert "another run is working in" in done.communicate(timeout=240)[1] and done.returncode
    run("smoke", quiet=True)


# --- results of other runs ---------------------------------------------------------------------------------------


def same_file(a, b):
    return a.stat().st_ino == b.stat().st_ino


def reused_from(folder, name):
    return read_json(folder / name / "stage.json").get("reused_from")


TABLE = "numbers/tables/numbers.parquet"


def test_a_stage_is_computed_once_for_all_runs(study, fake, capsys):
    first = run("smoke", quiet=True)
    other = run("smoke", ["total.scale=3"], run="k3")
    assert fake == ["numbers", "total", "total"]
    assert "numbers      reused from smoke" in capsys.readouterr().out
    assert same_file(first / TABLE, other / TABLE)
    assert same_file(first / "numbers/shards/000000.parquet", other / "numbers/shards/000000.parquet")
    assert not same_file(first / "numbers/notebook.ipynb", other / "numbers/notebook.ipynb")
    assert reused_from(other, "numbers") == "smoke"
    assert reused_from(other, "total") is None


def test_a_reused_stage_bears_the_name_of_its_run(study, fake):
    first = run("smoke", quiet=True)
    other = run("micro", ["numbers.n=4"], run="mine", quiet=True)
    assert fake == ["numbers", "total"]
    about = read_json(other / "total/stage.json")
    assert (about["run"], about["preset"], about["status"]) == ("mine", "micro", "finished")
    assert about["start"] == read_json(first / "total/stage.json")["start"]
    for place in (other, other / "total"):
        row = pd.read_csv(place / "results.csv").iloc[0]
        assert (row["run"], row["preset"], row["value"]) == ("mine", "micro", 6)
    stages = {s["name"]: s["reused_from"] for s in read_json(other / "run.json")["stages"]}
    assert stages == {"numbers": "smoke", "total": "smoke"}
    assert pd.read_csv(first / "total/results.csv")["run"].tolist() == ["smoke"]


def test_deleting_a_run_leaves_the_others_whole(study, fake):
    import shutil

    first, other = run("smoke", quiet=True), run("smoke", run="other", quiet=True)
    shutil.rmtree(first)
    assert len(pd.read_parquet(other / TABLE)) == 4
    third = run("smoke", run="third", quiet=True)
    assert fake == ["numbers", "total"]
    assert reused_from(third, "numbers") == "other"


def test_a_forced_stage_is_computed(study, fake):
    run("smoke", quiet=True)
    run("smoke", run="other", force=["total"], quiet=True)
    assert fake == ["numbers", "total", "total"]


def test_a_stage_that_is_computed_again_changes_no_other_run(study, fake):
    first, other = run("smoke", quiet=True), run("smoke", run="other", quiet=True)
    before = (first / TABLE).read_bytes(), (first / TABLE).stat().st_mtime_ns
    run("smoke", run="other", force="all", quiet=True)
    assert not same_file(first / TABLE, other / TABLE)
    assert ((first / TABLE).read_bytes(), (first / TABLE).stat().st_mtime_ns) == before


def test_where_links_are_not_to_be_had_files_are_copied(study, fake, monkeypatch):
    def no_link(source, target):
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", no_link)
    first, other = run("smoke", quiet=True), run("smoke", run="other", quiet=True)
    assert fake == ["numbers", "total"]
    assert not same_file(first / TABLE, other / TABLE)
    assert (first / TABLE).read_bytes() == (other / TABLE).read_bytes()


def remove_a_table(folder):
    (folder / TABLE).unlink()


def shorten_a_table(folder):
    (folder / TABLE).write_bytes((folder / TABLE).read_bytes()[:-1])


def forget_how_much(folder):
    about = read_json(folder / "numbers/stage.json")
    write_json(folder / "numbers/stage.json", {k: v for k, v in about.items() if k != "left"})


def rename_to_unfinished(folder):
    (folder / "numbers").rename(folder / "numbers.partial")


@pytest.mark.parametrize("harm", [remove_a_table, shorten_a_table, forget_how_much, rename_to_unfinished])
def test_what_is_not_whole_is_not_reused(study, fake, harm):
    harm(run("smoke", only=["numbers"], quiet=True))
    other = run("smoke", run="other", only=["numbers"], quiet=True)
    assert fake == ["numbers", "numbers"]
    assert len(pd.read_parquet(other / TABLE)) == 4


@pytest.mark.parametrize("moment", range(4))
def test_a_run_that_is_deleted_while_it_is_linked(study, fake, monkeypatch, moment):
    "Whichever file the deletion meets, the stage is computed and nothing is left lying about."
    import shutil

    first, real, calls = run("smoke", only=["numbers"], quiet=True), os.link, []

    def link(source, target):
        if len(calls) == moment:
            shutil.rmtree(first)
        calls.append(source)
        return real(source, target)

    monkeypatch.setattr(os, "link", link)
    other = run("smoke", run="other", only=["numbers"], quiet=True)
    assert fake == ["numbers", "numbers"]
    assert not list(other.glob(".taken-*"))
    assert len(pd.read_parquet(other / TABLE)) == 4


def test_a_kill_while_linking_leaves_nothing_behind(study, fake, monkeypatch):
    run("smoke", only=["numbers"], quiet=True)
    begun = study / "data/runs/other/.taken-numbers"
    (begun / "tables").mkdir(parents=True)
    (begun / "tables/half.parquet").write_text("half")
    other = run("smoke", run="other", only=["numbers"], quiet=True)
    assert fake == ["numbers"]
    assert not begun.exists()
    assert not (other / "numbers/tables/half.parquet").exists()


def test_a_full_disk_while_copying(study, fake, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run("smoke", only=["numbers"], quiet=True)
    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(StageError, match="could not be taken over .No space left"):
        run("smoke", run="other", only=["numbers"], quiet=True)
    assert not (study / "data/runs/other/numbers").exists()


# --- killed and continued ----------------------------------------------------------------------------------------

# Writes down what it begins, and stays in the shard `halt` until there is a file `go`.
SLOW = [
    'run: str = ""\nn: int = 3\nnames: list[str] = []\nhalt: int = -1',
    project.EXAMPLE_STAGES["numbers"][1],
    """import os, time, random
for i, part in stage.shards(n, 2):
    with stage.shard(i) as path:
        with open("log.txt", "a") as log:
            log.write(f"{i} ")
        while i == halt and not os.path.exists("go"):
            time.sleep(0.02)
        for k in range(n)[part]:
            stage.problem("f", k, "odd" if k % 2 else "even")
        pd.DataFrame({"number": [random.Random(k).random() for k in range(n)[part]]}).to_parquet(path)""",
    'stage.result(table="t", row="r", metric="m", value=stage.collect()["number"].sum(), unit="score")',
    *project.EXAMPLE_STAGES["numbers"][3:],
]


def begun(study):
    "Shards that were begun, in order; all but the last are whole."
    log = study / "nbs/log.txt"
    return list(map(int, log.read_text().split())) if log.exists() else []


@pytest.mark.slow
def test_killed_and_continued(study):
    "SIGKILL in the middle of a stage; the next run computes only what is missing, and the outcome is the same."
    notebook(study, "numbers", *SLOW)
    overrides = ["numbers.n=13", "numbers.halt=3"]
    first = python(study, f'from selfalign.study.runner import run; run("smoke", {overrides})')
    until(lambda: begun(study) == [0, 1, 2, 3], first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (study / "data/runs/smoke/numbers").exists()
    (study / "nbs/go").touch()
    folder = run("smoke", overrides, quiet=True)
    assert begun(study) == [0, 1, 2, 3, 3, 4, 5, 6], "only the shard at work is done again"
    assert read_json(folder / "numbers/stage.json")["resumed"] == 1
    other = run("smoke", overrides[:1], run="whole", only=["numbers"], quiet=True)
    assert begun(study)[8:] == list(range(7))
    for table in ("numbers", "problems"):
        one, two = (f / f"numbers/tables/{table}.parquet" for f in (folder, other))
        assert one.read_bytes() == two.read_bytes()
    assert len(pd.read_parquet(folder / "numbers/tables/problems.parquet")) == 13
    one, two = ((f / "numbers/results.csv").read_text() for f in (folder, other))
    assert one.replace("smoke,smoke", "whole,smoke") == two


INTERRUPTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
from selfalign.study.runner import RunError, run
try:
    run("smoke", ["numbers.n=50", "numbers.halt=1"])
except RunError as e:
    print(e)
"""


@pytest.mark.slow
def test_interrupted_by_hand(study):
    "Ctrl-C: a message, not a stack trace, and no kernel left behind."
    from filelock import FileLock

    notebook(study, "numbers", *SLOW)
    first = python(study, INTERRUPTED)
    until(lambda: begun(study) == [0, 1], first)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=300)
    assert "stopped interrupted" in out, err
    assert "To continue: selfalign run smoke -p numbers.n=50" in out
    with FileLock(study / "data/runs/smoke/.numbers.lock", timeout=300):
        pass


@pytest.mark.parametrize(
    "name", [".tmp-7-000.png", "checkpoint.tmp", ".old-shards/000.parquet", "images/0/.tmp-9-a.png"]
)
def test_what_a_kill_left_is_swept(study, fake, name):
    notebook(study, "numbers", *project.EXAMPLE_STAGES["numbers"][:3], "if 'fixed' not in globals(): 1/0")
    with pytest.raises(RunError, match="ZeroDivisionError"):
        run("smoke", quiet=True)
    partial = study / "data/runs/smoke/numbers.partial"
    (partial / name).parent.mkdir(parents=True, exist_ok=True)
    (partial / name).write_text("half")
    with pytest.raises(RunError, match="ZeroDivisionError"):
        run("smoke", quiet=True)
    left = [p.name for p in partial.rglob("*") if p.is_file()]
    assert len(list((partial / "shards").glob("*.parquet"))) == 2, "finished shards stay"
    assert Path(name).name not in left


def test_killed_between_the_two_renames(study, fake, monkeypatch):
    "The moment when the old folder is away and the new one not yet there."
    folder = run("smoke", quiet=True)
    real = Path.rename

    def rename(self, target):
        if str(self).endswith(".partial"):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        run("smoke", ["total.scale=5"], quiet=True)
    monkeypatch.setattr(Path, "rename", real)
    assert not (folder / "total").exists()
    run("smoke", only=["numbers"], quiet=True)
    assert read_json(folder / "total/stage.json")["parameters"] == {"scale": 1.0}, "the older one is put back"
    run("smoke", ["total.scale=5"], quiet=True)
    assert pd.read_csv(folder / "results.csv")["value"].tolist() == [30] and not list(folder.glob(".old-*"))


# --- by hand -----------------------------------------------------------------------------------------------------


TWICE = """
import os, time
from selfalign.study.stage import Stage
stage = Stage("total")
print(len(stage.read("numbers", "numbers")), stage.folder.name)
open(f"ready-{os.getpid()}", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
stage.finish()
print(stage.folder)
"""


@pytest.mark.slow
def test_by_hand_makes_its_inputs_once_even_twice_at_once(study, tmp_path):
    "Neither ends before both have begun."
    both = [python(study, TWICE, cwd=tmp_path) for _ in range(2)]
    until(lambda: len(list(tmp_path.glob("ready-*"))) == 2 or any(p.poll() for p in both))
    (tmp_path / "go").touch()
    said = [p.communicate(timeout=400) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert all(out.startswith("4 total") for out, _ in said)
    assert len({out.split()[-1] for out, _ in said}) == 2, "each in a scratch folder of its own"
    assert read_json(study / "data/runs/smoke/run.json")["status"] == "finished"
    assert not (study / "data/runs/smoke/total").exists()


@pytest.mark.slow
def test_by_hand_says_what_its_inputs_lack(study):
    notebook(study, "numbers", project.EXAMPLE_STAGES["numbers"][0], "boom")
    with pytest.raises(
        StageError, match="(?s)the inputs numbers could not be made:\nstage 'numbers'.*name 'boom'.*To continue"
    ):
        Stage("total")


# --- what a stage records ----------------------------------------------------------------------------------------


@pytest.fixture
def numbers(study):
    return Stage("numbers")


def test_results_are_replaced_not_doubled(numbers):
    for value in (1, 2):
        numbers.result(
            table="t", row="r", metric="m", value=value, low=0, high=3, n=5, seeds=2, chance=0.5, better="up"
        )
    found = pd.read_csv(numbers.folder / "results.csv")
    assert found["value"].tolist() == [2] and list(found.columns) == st.RESULT_COLUMNS


def test_results_survive_odd_names(numbers):
    numbers.result(table="t", row='a, "b"\nc', metric="é", value=1)
    assert pd.read_csv(numbers.folder / "results.csv")["row"].tolist() == ['a, "b"\nc']


@pytest.mark.parametrize("wrong", [dict(unit="percent"), dict(better="higher"), dict(value="x"), dict(value=None)])
def test_results_are_checked(numbers, wrong):
    with pytest.raises(StageError):
        numbers.result(**(dict(table="t", row="r", metric="m", value=1) | wrong))


def test_problems_are_always_written(numbers):
    numbers.finish()
    found = pd.read_parquet(numbers.folder / "tables/problems.parquet")
    assert list(found.columns) == ["file", "row", "what", "remedy"] and len(found) == 0


def test_problems_of_a_failed_shard_are_not_counted_twice(numbers):
    for broken in (True, False):
        try:
            with numbers.shard(0) as path:
                numbers.problem("f", 1, "bad")
                if broken:
                    raise ValueError
                pd.DataFrame({"x": [1]}).to_parquet(path)
        except ValueError:
            pass
    assert len(numbers.problems()) == 1


def test_shards_in_series(numbers):
    for name in ("a", "b"):
        for i, part in numbers.shards(3, 2, name):
            with numbers.shard(i, name) as path:
                pd.DataFrame({"x": [name] * len(range(3)[part])}).to_parquet(path)
    assert numbers.collect("a")["x"].tolist() == ["a"] * 3 and numbers.collect("b")["x"].tolist() == ["b"] * 3
    assert len(numbers.collect()) == 0 and list(numbers.shards(0, 2)) == []


def test_figures_are_listed(numbers):
    from selfalign.study.figures import new_figure

    fig, ax = new_figure()
    assert numbers.figure(fig, "f", "A title", "What to see", data=pd.DataFrame({"x": [1]})) is fig
    assert read_json(numbers.folder / "figures.json") == [
        dict(
            name="f", title="A title", caption="What to see", files=["figures/f.svg", "figures/f.png", "figures/f.csv"]
        )
    ]


def test_reading_is_limited_to_inputs(study, fake):
    run("smoke", quiet=True)
    stage = Stage("total")
    with pytest.raises(StageError, match="left no table 'nmbers'; did you mean 'numbers'"):
        stage.read("numbers", "nmbers")
    with pytest.raises(StageError, match="did you mean 'numbers'"):
        stage.input("number")


def test_a_stage_outside_a_run_is_refused(study):
    with pytest.raises(StageError, match="was not prepared"):
        Stage("numbers", "data/runs/none")


LIGHT = """
import sys, selfalign.study.runner
heavy = "torch pandas numpy papermill matplotlib rich".split()
print([m for m in heavy if m in sys.modules])
"""


def test_runner_is_light():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
