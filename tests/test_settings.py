"Settings: presets, overrides, parameters cells; what is wrong is refused with the nearest right name."

import os, subprocess, sys
import pytest
from selfalign.study import settings as s
from selfalign.study.settings import SettingsError, resolve


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFALIGN_ROOT", str(tmp_path))
    return s.example_study(tmp_path)


def ini(study, text):
    (study / "settings.ini").write_text(s.EXAMPLE_SETTINGS + text, encoding="utf-8")


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
    found = s.convert(text, kind)
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
        s.convert(text, kind)


def test_comments_in_the_file_and_signs_in_values(study):
    s.write_stage(
        study / "nbs/numbers.ipynb",
        ['run: str = ""\nn: int = 3\nnames: list[str] = []\nsource: str = "#a"  # has a # inside'],
    )
    ini(study, "[more]\nextends = smoke\nnumbers.source = webdataset:data/{0..9}.tar#x?noise=0.3  ; why\n")
    assert resolve("more").values["numbers"]["source"] == "webdataset:data/{0..9}.tar#x?noise=0.3"
    assert s.parameters("numbers")["source"] == s.Parameter("source", "str", "#a", "has a # inside")


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
        ("micro", ["numbers.n=x"], "numbers.n = 'x' is not of type int .how many numbers"),
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
    s.write_stage(study / "nbs/numbers.ipynb", [cell])
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
    code = 'import sys; from selfalign.study.settings import resolve; resolve("micro"); print([m for m in ("torch", "pandas", "numpy", "papermill", "nbformat") if m in sys.modules])'
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
        ).stdout.strip()
        == "[]"
    )


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
