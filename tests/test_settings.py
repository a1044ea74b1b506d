"Settings: presets, overrides, parameters cells; what is wrong is refused with the nearest right name."

import os, subprocess, sys
from pathlib import Path
import pytest
from selfalign.study import parameters as p, project, settings as s
from selfalign.study.settings import SettingsError, resolve


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))
    return s.example_study(tmp_path)


def ini(study, text):
    (study / "settings.ini").write_text(project.EXAMPLE_SETTINGS + text, encoding="utf-8")


# --- the right way -----------------------------------------------------------------------------------------------


def test_defaults_preset_and_override_in_this_order(study):
    assert resolve("smoke").values["numbers"]["n"] == 4
    assert resolve("micro").values["numbers"]["n"] == 20
    assert resolve("micro", ["numbers.n=7", "numbers.n=8"]).values["numbers"] == {"n": 8, "names": []}
    assert resolve("micro").values["total"] == {"scale": 1.0}


def test_extends_takes_over_everything(study):
    micro = resolve("micro")
    assert (micro.title, micro.scale, micro.stages) == ("A study of two stages", "micro", ["numbers", "total"])


def test_inputs_come_along_and_first(study):
    ini(study, "[one]\nstages = total\n[other]\nstages = numbers\n")
    assert resolve("one").stages == ["numbers", "total"]
    assert resolve("other").stages == ["numbers"]
    assert resolve("smoke", only=["numbers"]).stages == ["numbers"]


def test_order_does_not_follow_the_file(study):
    (study / "settings.ini").write_text(
        "[stages]\nb = nbs/total.ipynb : a\na = nbs/numbers.ipynb\n[x]\n", encoding="utf-8"
    )
    assert list(s.stages()) == ["a", "b"] == resolve("x").stages


@pytest.mark.parametrize(
    "text, kind, value",
    [
        ("3", "int", 3),
        ("-3", "int", -3),
        ("20_000", "int", 20000),
        ("1e-4", "float", 1e-4),
        ("2", "float", 2.0),
        ("yes", "bool", True),
        ("False", "bool", False),
        ("0", "bool", False),
        ("a = b; c", "str", "a = b; c"),
        ("", "str", ""),
        ("'x'", "str", "'x'"),
        ("[1, 2]", "list[int]", [1, 2]),
        ("1,2", "list[float]", [1.0, 2.0]),
        ("a, b", "list[str]", ["a", "b"]),
        ("['a']", "list[str]", ["a"]),
        ("", "list", []),
    ],
)
def test_convert(text, kind, value):
    found = p.convert(text, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text, kind",
    [
        ("3.0", "int"),
        ("three", "int"),
        ("True", "int"),
        ("1e999", "float"),
        ("nan", "float"),
        ("maybe", "bool"),
        ("2", "bool"),
        ('[1, "a"]', "list[int]"),
        ('__import__("os")', "int"),
        ("(", "float"),
        ("{1}", "list"),
        ("[" * 500, "list"),
    ],
)
def test_convert_refuses(text, kind):
    with pytest.raises((ValueError, TypeError)):
        p.convert(text, kind)


def test_comments_in_the_file_and_signs_in_values(study):
    project.write_stage(
        study / "nbs/numbers.ipynb",
        ['run: str = ""\nn: int = 3\nnames: list[str] = []\nsource: str = "#a"  # has a # inside'],
    )
    ini(study, "[more]\nextends = smoke\nnumbers.source = webdataset:data/{0..9}.tar#x?noise=0.3  ; why\n")
    assert resolve("more").values["numbers"]["source"] == "webdataset:data/{0..9}.tar#x?noise=0.3"
    assert s.parameters("numbers")["source"] == p.Parameter("source", "str", "#a", "has a # inside")


def test_windows_bom_free_crlf_file(study):
    path = study / "settings.ini"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert resolve("micro").values["numbers"]["n"] == 20


# --- typos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, overrides, message",
    [
        ("mirco", [], "unknown preset 'mirco'; did you mean 'micro'"),
        ("stages", [], "unknown preset"),
        ("", [], "unknown preset"),
        ("micro", ["nmbers.n=3"], "unknown stage 'nmbers'.*did you mean 'numbers'"),
        ("micro", ["numbers.m=3"], "no parameter 'm'.*there is: n, names|did you mean 'n'"),
        ("micro", ["total.scael=3"], "did you mean 'scale'"),
        ("micro", ["numbers.n=x"], "numbers.n = 'x' is not of type int, 0 ≤ n ≤ 1000 .how many numbers"),
        ("micro", ["numbers.n"], "write it as stage.parameter=value"),
        ("micro", ["n=3"], "unknown key"),
        ("micro", ["numbers.run=x"], "no parameter 'run'"),
    ],
)
def test_refused(study, preset, overrides, message):
    with pytest.raises(SettingsError, match=message):
        resolve(preset, overrides)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[x]\nextends = mirco\n", "did you mean 'micro'"),
        ("[x]\nextends = x\n", "in a circle: x → x"),
        ("[x]\nstages = nubmers\n", "did you mean 'numbers'"),
        ("[x]\nscale = mirco\n", "did you mean 'micro'"),
        ("[x]\nstage = numbers\n", "unknown key 'stage'; did you mean 'stages'"),
        ("[x]\nnumbers.n = many\n", r"settings.ini \[x\]: numbers.n"),
        ("[x]\nstages = numbers\ntotal.scala = 2\n", "did you mean 'scale'"),
        ("[x]\na\n", "cannot be read"),
        ("[smoke]\n", "cannot be read"),
        ("[x]\nnumbers.n = 1\nnumbers.n = 2\n", "cannot be read"),
    ],
)
def test_refused_in_the_file(study, text, message):
    ini(study, text)
    with pytest.raises(SettingsError, match=message):
        resolve("x")


@pytest.mark.parametrize(
    "registry, message",
    [
        ("a = nbs/numbers.ipynb : b\nb = nbs/total.ipynb : a", "in a circle"),
        ("a = nbs/numbers.ipynb : bb\nb = nbs/total.ipynb", "unknown input 'bb'; did you mean 'b'"),
        ("a = nbs/nothing.ipynb", "is not there"),
    ],
)
def test_registry_mistakes(study, registry, message):
    (study / "settings.ini").write_text(f"[stages]\n{registry}\n[x]\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        resolve("x")


@pytest.mark.parametrize(
    "cell, message",
    [
        ("n: int = 3", "must begin with `run"),
        ("", "must begin"),
        ('run: str = ""\nn = 3', "should read"),
        ('run: str = ""\nn: int = 2*3', "should read"),
        ('run: str = ""\nn: int = "3"', "should read"),
        ('run: str = ""\nn: int', "should read"),
        ('run: str = ""\nn: dict = {}', "should read"),
        ('run: str = ""\nn: int = 3 +', "cannot be read"),
    ],
)
def test_parameters_cell_mistakes(study, cell, message):
    project.write_stage(study / "nbs/numbers.ipynb", [cell])
    with pytest.raises(SettingsError, match=message):
        s.parameters("numbers")


def test_one_parameters_cell(study):
    text = (study / "nbs/numbers.ipynb").read_text()
    (study / "nbs/numbers.ipynb").write_text(text.replace('"parameters"', '"params"'))
    with pytest.raises(SettingsError, match="0 cells tagged"):
        s.parameters("numbers")
    (study / "nbs/numbers.ipynb").write_text("{broken")
    with pytest.raises(SettingsError, match="not a notebook"):
        s.parameters("numbers")


# --- what a value may be -----------------------------------------------------------------------------------------

RULES = """run: str = ""
keep: float = 0.3  # share of pairs kept [0 < keep ≤ 1]
steps: int = 20  # denoising steps [steps ≥ 1]
rates: list[float] = [0.1]  # learning rates [0 < rates < 1]
scheduler: str = "default"  # how noise becomes an image {default, euler, ddim, dpm}
towers: list[str] = ["image"]  # which towers {image, text}
pool: str = "study"  # of the scenes {data.scenes:pools}
kinds: list[str] = [
    "a",
    "b",
]  # of texts {a, b, c}
prompt: str = "{start}"  # what it is given; {caption} is the caption, {start} its first half"""


@pytest.fixture
def ruled(study):
    project.write_stage(study / "nbs/numbers.ipynb", [RULES])
    (study / "settings.ini").write_text("[stages]\na = nbs/numbers.ipynb\n[x]\n", encoding="utf-8")
    return study


@pytest.mark.parametrize(
    "override, value",
    [
        ("keep=1", 1.0),
        ("keep=1e-6", 1e-6),
        ("steps=1", 1),
        ("rates=0.5, 0.001", [0.5, 0.001]),
        ("rates=", []),
        ("scheduler=ddim", "ddim"),
        ("towers=text, image", ["text", "image"]),
        ("pool=evaluation", "evaluation"),
        ("prompt=[anything", "[anything"),
    ],
)
def test_allowed(ruled, override, value):
    assert resolve("x", [f"a.{override}"]).values["a"][override.partition("=")[0]] == value


@pytest.mark.parametrize(
    "override, message",
    [
        ("keep=7", "-p a.keep=7: a.keep: 7.0 is outside 0 < keep ≤ 1; the nearest is 1 (share of pairs kept)"),
        ("keep=0", "0.0 is outside 0 < keep ≤ 1 (share"),
        ("keep=-1", "-1.0 is outside 0 < keep ≤ 1 (share"),
        ("keep=much", "'much' is not of type float, 0 < keep ≤ 1 (share of pairs kept)"),
        ("steps=0", "0 is outside steps ≥ 1; the nearest is 1 (denoising steps)"),
        ("rates=0.5, 2", "2.0 is outside 0 < rates < 1 (learning rates)"),
        ("scheduler=eulr", "'eulr' is none of default, euler, ddim, dpm; did you mean 'euler'?"),
        ("scheduler=", "'' is none of default, euler, ddim, dpm"),
        ("towers=image, txt", "'txt' is none of image, text; did you mean 'text'?"),
        ("pool=evalution", "did you mean 'evaluation'?"),
    ],
)
def test_not_allowed(ruled, override, message):
    with pytest.raises(SettingsError) as e:
        resolve("x", [f"a.{override}"])
    assert message in str(e.value)


def test_a_preset_is_checked_as_an_override_is(ruled):
    with open(ruled / "settings.ini", "a", encoding="utf-8") as f:
        f.write("a.keep = 7\n")
    with pytest.raises(SettingsError, match=r"settings.ini \[x\]: a.keep: 7.0 is outside"):
        resolve("x")


@pytest.mark.parametrize(
    "line, message",
    [
        ("keep: float = 0.3  # share [0 < keep ≤ 1", "not closed"),
        ("keep: float = 0.3  # share [0 < kept ≤ 1]", "should read"),
        ("keep: float = 0.3  # share [0 < keep ≥ 1]", "should read"),
        ("keep: float = 0.3  # share [0, 1]", "should read"),
        ("keep: float = 0.3  # share [keep]", "should read"),
        ("keep: float = 0.3  # share [1 ≤ keep ≤ 0]", "nothing is in"),
        ("keep: float = 0.3  # [0 < keep ≤ 1] share", "does not stand at the end"),
        ("keep: float = 3.0  # share [0 < keep ≤ 1]", "its default 3.0 is outside"),
        ("keep: float = 3.0  # share {1, 3}", "does not fit"),
        ("keep: float = 0.3  # share [0 < keep <= 1]", "write ≤"),
        ('kind: str = "a"  # kind [kind ≥ 1]', "does not fit"),
        ('kind: str = "a"  # kind {b, c}', "its default 'a' is none of b, c"),
        ('kind: str = "a"  # kind {a, c', "not closed"),
        ('kind: str = "a"  # kind {a c}', "should read"),
        ('kind: str = (\n    "a"  # kind\n)', "at its end"),
    ],
)
def test_rules_that_cannot_be_read(study, line, message):
    project.write_stage(study / "nbs/numbers.ipynb", ['run: str = ""\n' + line])
    with pytest.raises(SettingsError, match="parameters cell") as e:
        s.parameters("numbers")
    assert message in str(e.value)


def test_choices_of_a_module_are_looked_up_once(ruled, monkeypatch):
    resolve("x", ["a.pool=evaluation"])
    monkeypatch.setattr(p, "_imported", lambda *_: pytest.fail("imported again"))
    resolve("x", ["a.pool=validation"])


@pytest.mark.slow
def test_papermill_reads_what_we_read(ruled):
    import papermill

    found = papermill.inspect_notebook(str(ruled / "nbs/numbers.ipynb"))
    assert list(found)[1:] == list(s.parameters("a"))
    assert found["keep"]["default"] == "0.3"


# --- the study's own ---------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    "The study's own settings and notebooks, with a folder for data that is not the checkout's."
    root = Path(__file__).resolve().parents[1]
    (tmp_path / "settings.ini").write_bytes((root / "settings.ini").read_bytes())
    (tmp_path / "nbs").symlink_to(root / "nbs", target_is_directory=True)
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))


def test_every_number_and_choice_of_the_study_is_ruled(own):
    "A number without a range is a value that nobody checks."
    for stage, spec in s.stages().items():
        for one in s.parameters(stage).values():
            number = any(kind in one.type for kind in ("int", "float"))
            assert one.rule or not number, f"{spec.notebook}: {one.name}"
            assert p.refusal(one, one.default) == ""


def test_every_preset_of_the_study_is_allowed(own):
    for preset in s.presets():
        assert resolve(preset).stages


@pytest.mark.parametrize(
    "override",
    ["select.keep=7", "sample.noise=5", "generate.steps=0", "generate.scheduler=eulr", "finetune.arms=lora-orignals"],
)
def test_the_study_refuses(own, override):
    with pytest.raises(SettingsError, match="outside|did you mean"):
        resolve("micro", [override])


# --- root --------------------------------------------------------------------------------------------------------


def test_root_is_found_from_below(study, monkeypatch):
    monkeypatch.delenv("SELFALIGN_ROOT")
    (study / "nbs/deep").mkdir()
    (study / "nbs/settings.ini").write_text("[DEFAULT]\nlib_name = another_tool\n")
    monkeypatch.chdir(study / "nbs/deep")
    assert s.find_root() == study


def test_wrong_root_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match="nowhere .named by SELFALIGN_ROOT"):
        resolve("micro")


def test_reading_settings_is_light(study):
    heavy = ("torch", "pandas", "numpy", "papermill", "nbformat")
    code = "import sys; from selfalign.study.settings import resolve; resolve('micro'); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


VARIANTS = """[stages]
numbers = nbs/numbers.ipynb
total   = nbs/total.ipynb : numbers
numbers-many = nbs/numbers.ipynb
total-many   = nbs/total.ipynb : numbers-many

[smoke]
numbers.n = 4
numbers-many.n = 9
total.scale = 2
"""


def test_variants_take_over_what_is_not_said_of_them(study):
    (study / "settings.ini").write_text(VARIANTS)
    assert s.stages()["total-many"].base == "total" and s.stages()["total"].base == "total"
    values = s.resolve("smoke").values
    assert (
        values["numbers"]["n"] == 4
        and values["numbers-many"]["n"] == 9
        and values["total-many"]["scale"] == values["total"]["scale"] == 2
    )
    values = s.resolve("smoke", ["total.scale=3", "numbers.n=5"]).values
    assert values["total-many"]["scale"] == 3 and values["numbers-many"]["n"] == 9 and values["numbers"]["n"] == 5
    assert s.resolve("smoke", ["total-many.scale=5"]).values["total"]["scale"] == 2


def test_a_variant_is_named_after_its_base(study):
    (study / "settings.ini").write_text(VARIANTS.replace("total-many ", "other "))
    with pytest.raises(s.SettingsError, match="call this variant total-something"):
        s.stages()
