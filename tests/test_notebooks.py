"Notebooks are the source: clean, exported, documented, in order of the floors, and every one of them runs."

import copy, filecmp, importlib.util, inspect, json, os, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import unquote
import pytest
from warm import CAN_FORK, Warm

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(
    p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts)
)
CHAPTERS = [nb for nb in NOTEBOOKS if nb.name != "index.ipynb"]
MODULES = sorted(p for p in (ROOT / "selfalign").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def label(path):
    return str(path.relative_to(ROOT))


def load(nb):
    return json.loads(nb.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(nb):
    return [c for c in load(nb)["cells"] if c["cell_type"] == "code"]


def prose(nb):
    return [source(c) for c in load(nb)["cells"] if c["cell_type"] == "markdown"]


def tagged(nb):
    return [c for c in load(nb)["cells"] if "parameters" in c["metadata"].get("tags", [])]


def stage_notebooks():
    from selfalign.study.settings import stages

    return {ROOT / spec.notebook.resolve().relative_to(checkout_copy()) for spec in stages().values()}


def checkout_copy():
    "Where this session runs notebooks, see conftest.py."
    return Path(os.environ["SELFALIGN_ROOT"])


every_notebook = pytest.mark.parametrize("nb", NOTEBOOKS, ids=label)
every_chapter = pytest.mark.parametrize("nb", CHAPTERS, ids=label)

# --- clean -------------------------------------------------------------------------------------------------------


@every_notebook
def test_clean(nb):
    "No outputs, no counts; nbdev-clean has nothing left to do and keeps the tags."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    for cell in code_cells(nb):
        assert not cell["outputs"] and cell["execution_count"] is None, (
            f"{label(nb)} has stored outputs: run nbdev-clean"
        )
    notebook, config = load(nb), get_config(path=ROOT)
    before = copy.deepcopy(notebook)
    clean_nb(notebook, allowed_cell_metadata_keys=config.allowed_cell_metadata_keys, clean_ids=config.clean_ids)
    assert notebook == before, f"{label(nb)}: run nbdev-clean"


@every_notebook
def test_cell_ids(nb):
    "Ids are there and unique, so that differences stay readable."
    ids = [c["id"] for c in load(nb)["cells"]]
    assert len(ids) == len(set(ids))


def test_parameters_cells():
    "Exactly one in every stage notebook, first parameter `run`, never exported; none elsewhere."
    found = stage_notebooks()
    assert found, "settings.ini registers no stage"
    for nb in NOTEBOOKS:
        cells = tagged(nb)
        assert len(cells) == (nb.resolve() in found), f"{label(nb)} has {len(cells)} parameters cells"
        for cell in cells:
            assert source(cell).lstrip().startswith('run: str = ""'), (
                f'{label(nb)}: the first parameter is `run: str = ""`'
            )
            assert "#| export" not in source(cell)


def test_stage_notebooks_run_whole():
    "Papermill runs every cell, whatever nbdev would skip."
    for nb in stage_notebooks():
        assert not [c for c in code_cells(nb) if re.search(r"#\|\s*eval:\s*false", source(c))], label(nb)


# --- written for readers -----------------------------------------------------------------------------------------


@every_chapter
def test_anatomy(nb):
    "Module, title, subtitle; at the end a summary and exercises."
    first, *_ = load(nb)["cells"]
    assert re.match(r"#\|\s*default_exp \w+\.\w+", source(first)), f"{label(nb)} begins with its default_exp"
    assert re.match(r"# .+\n+> \S", prose(nb)[0]), f"{label(nb)}: an H1 title with a > subtitle comes next"
    assert re.search(r"^## Summary", "\n".join(prose(nb)), re.M), f"{label(nb)} has no summary"
    assert re.search(r"^## Exercises", "\n".join(prose(nb)), re.M), f"{label(nb)} has no exercises"


@every_chapter
def test_short_cells(nb):
    "A reader keeps the thread."
    lines = sorted(len(source(c).splitlines()) for c in code_cells(nb))
    assert lines[len(lines) * 9 // 10] <= 24 and lines[-1] <= 60, (
        f"{label(nb)}: nine in ten cells have {lines[len(lines) * 9 // 10]} lines, the longest {lines[-1]}"
    )


@every_notebook
def test_links(nb):
    "Links to other files of the repository lead somewhere."
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(nb))):
        if not re.match(r"[a-z]+:|#", target):
            assert (nb.parent / unquote(target.split("#")[0])).exists(), f"{label(nb)}: nothing at {target}"


# --- exported ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "What nbdev-export makes of the notebooks, in a copy of the tree."
    there = tmp_path_factory.mktemp("export")
    shutil.copytree(NBS, there / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "selfalign", there / "selfalign", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, there / name)
    for module in (there / "selfalign").rglob("*.py"):
        if "# AUTOGENERATED" in module.read_text(encoding="utf-8")[:4000]:
            module.unlink()
    subprocess.run([BIN / "nbdev-export"], cwd=there, check=True, capture_output=True, timeout=300)
    return there / "selfalign"


@pytest.mark.parametrize("module", MODULES, ids=label)
def test_exported(module, exported):
    "A module is what its notebook exports, no more and no less."
    made = exported / module.relative_to(ROOT / "selfalign")
    assert made.exists(), f"{label(module)} belongs to no notebook"
    assert filecmp.cmp(module, made, shallow=False), (
        f"{label(module)} differs from its notebook: edit the notebook, run nbdev-export"
    )


def test_nothing_unexported(exported):
    made = {str(p.relative_to(exported)) for p in exported.rglob("*.py")}
    assert made == {str(p.relative_to(ROOT / "selfalign")) for p in (ROOT / "selfalign").rglob("*.py")}, (
        "run nbdev-export and add the new modules"
    )


@pytest.mark.skipif(not (shutil.which("make") and shutil.which("sed")), reason="no make on this machine")
def test_readme(tmp_path):
    "README.md is what the landing page makes."
    made = tmp_path / "README.md"
    subprocess.run(
        ["make", "--no-print-directory", "readme", f"BIN={BIN}", f"README={made}"],
        cwd=ROOT,
        check=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")},
    )
    assert made.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8"), "run make readme"


def test_readme_links():
    "README's links start at the root of the repository."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (ROOT / unquote(target.split("#")[0])).exists(), target
    assert "make study" in text and "make test" in text and "pip install" in text


@every_chapter
def test_on_the_landing_page(nb):
    "The landing page's table leads to every notebook."
    assert f"]({nb.relative_to(NBS).as_posix()})" in "\n".join(prose(NBS / "index.ipynb")), (
        f"index.ipynb does not link {label(nb)}"
    )


# --- documented --------------------------------------------------------------------------------------------------


def silent(function):
    "Parameters of a function without a comment beside them."
    from fastcore.docments import docments

    help, skip = docments(function), (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        n
        for n, p in inspect.signature(function).parameters.items()
        if n != "self" and p.kind not in skip and not help.get(n)
    ]


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_documented(path):
    "Every public function says what it does and what each parameter is; every public class and method what it does."
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert module.__doc__, f"{label(path)} has no subtitle"
    wrong = []
    for name in module.__all__:
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) != module.__name__:
            continue
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and not thing.__doc__:
            wrong.append(f"{name} has no docstring")
        if inspect.isfunction(thing) and silent(thing):
            wrong.append(f"{name} says nothing about {', '.join(silent(thing))}")
        if inspect.isclass(thing):
            methods = [
                n
                for n, m in vars(thing).items()
                if inspect.isfunction(m) and not n.startswith("_") and n != "forward" and not m.__doc__
            ]
            if methods:
                wrong.append(f"{name} has methods without docstrings: {', '.join(methods)}")
    assert not wrong, f"{label(path)}: " + "; ".join(wrong)


# --- and they run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def warm():
    return Warm() if CAN_FORK else None


def first_long(notebooks):
    "Stage notebooks take longest: they come first, so that no worker is left alone with one."
    stages = stage_notebooks()
    return sorted(notebooks, key=lambda nb: nb not in stages)


@pytest.mark.parametrize("nb", first_long(NOTEBOOKS), ids=label)
def test_runs(nb, warm, tmp_path, request):
    "nbdev-test, in the session's copy: every cell without an error, and no file left among the notebooks."
    there = checkout_copy()
    if nb in stage_notebooks():
        request.getfixturevalue("smoke_run")
    before = set((there / "nbs").rglob("*"))
    env = os.environ | {"MPLBACKEND": "Agg", "NO_COLOR": "1"}
    if warm:
        status, said = warm(there / nb.relative_to(ROOT), tmp_path, env)
    else:
        status, said = nbdev_test(there / nb.relative_to(ROOT), env)
    assert status == 0, f"{label(nb)} fails:\n{said[-6000:]}"
    left = {p for p in set((there / "nbs").rglob("*")) - before if ".ipynb_checkpoints" not in p.parts}
    assert not left, f"{label(nb)} leaves {[str(p.relative_to(there)) for p in left]}"


def nbdev_test(path, env):
    "In a process of its own, for machines that cannot fork."
    done = subprocess.run(
        [BIN / "nbdev-test", path],
        cwd=path.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=900,
        env=env,
    )
    return done.returncode, done.stdout + done.stderr
