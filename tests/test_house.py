"The house: what is declared, pinned, ignored and committed."

import ast, json, os, re, shutil, subprocess, sys, tomllib, zipfile
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAIN = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
EXTRAS = PROJECT["optional-dependencies"]
EXTRA = {canonicalize_name(r.name): r for rs in EXTRAS.values() for r in map(Requirement, rs)}
OPTIONAL = {canonicalize_name(Requirement(r).name) for name, rs in EXTRAS.items() for r in rs if name != "test"}
LINES = [l for l in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if l and not l.startswith("#")]
PINS = {canonicalize_name(l.split("==")[0]): l.split("==")[1] for l in LINES}


def committed():
    "Files that git keeps, or would keep."
    if not (shutil.which("git") and (ROOT / ".git").exists()):
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    return [p for n in listed.decode().split("\0") if n and (p := ROOT / n).is_file()]


# --- dependencies ------------------------------------------------------------------------------------------------


def test_every_line_is_an_exact_version():
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", l) for l in LINES)
    assert not [v for v in PINS.values() if "+" in v], "a local build cannot be installed elsewhere"


@pytest.mark.parametrize("name", sorted(MAIN | EXTRA))
def test_range_and_version(name):
    "Every dependency has a range, an exact version, and the version is within the range."
    wanted = (MAIN | EXTRA)[name]
    assert ">=" in str(wanted.specifier), f"{name} has no lower bound"
    assert name in PINS, f"{name} is not in constraints.txt"
    assert wanted.specifier.contains(PINS[name]), f"{name} {PINS[name]} is outside {wanted.specifier}"


def outside(text):
    "Names of the packages that a piece of Python imports from outside."
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.M))):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        yield from (
            n.split(".")[0] for n in names if n.split(".")[0] not in {*sys.stdlib_module_names, "selfalign", "__main__"}
        )


def sources():
    for p in sorted((ROOT / "selfalign").rglob("*.py")):
        yield p, p.read_text(encoding="utf-8"), MAIN.keys() | OPTIONAL
    for p in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = json.loads(p.read_text(encoding="utf-8"))["cells"]
        yield p, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), MAIN.keys() | OPTIONAL
    for p in sorted((ROOT / "tests").rglob("*.py")):
        yield p, p.read_text(encoding="utf-8"), MAIN.keys() | EXTRA


def test_imports_are_declared():
    "What is imported is installed by name, not by luck."
    owners, missing = packages_distributions(), set()
    local = {p.stem for p in (ROOT / "tests").rglob("*.py")}
    for path, text, declared in sources():
        for name in set(outside(text)) - local:
            if not any(canonicalize_name(o) in declared for o in owners.get(name, [name])):
                missing.add(f"{path.relative_to(ROOT)} imports {name}")
    assert not missing, sorted(missing)


def test_what_is_optional_is_imported_late():
    "A module imports without the packages of an extra; only a function that needs them asks for them."
    owners = packages_distributions()
    for path in sorted((ROOT / "selfalign").rglob("*.py")):
        top = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        found = {
            canonicalize_name(o) for name in outside("\n".join(map(ast.unparse, top))) for o in owners.get(name, [name])
        }
        assert not found & (OPTIONAL - MAIN.keys()), f"{path.relative_to(ROOT)} imports {found & OPTIONAL} at once"


def test_the_wheel_holds_the_package(tmp_path):
    "Subpackages without __init__.py and files beside the modules like to vanish from a wheel."
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "selfalign", tmp_path / "selfalign", ignore=shutil.ignore_patterns("__pycache__"))
    wanted = {p.relative_to(tmp_path).as_posix() for p in (tmp_path / "selfalign").rglob("*") if p.is_file()}
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


# --- one style ---------------------------------------------------------------------------------------------------


RULES = [
    "check --no-fix --select E501,E701,E702,E703,F811,F821",  # lines of 120, one statement each, no unknown names
    "format --check",
]


@pytest.mark.parametrize("rule", RULES)
def test_ruff(rule):
    "Notebooks and tests; the package is made from the notebooks."
    command = [sys.executable, "-m", "ruff", *rule.split(), "--output-format", "concise", "nbs", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def make(*args):
    "Call make as a person would, even when the tests themselves were started by make."
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *args], cwd=ROOT, env=env, capture_output=True, text=True)


# --- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
@pytest.mark.parametrize(
    "target,calls",
    [("study", "selfalign run micro"), ("test", "-m pytest"), ("test-fast", "not slow"), ("lab", "selfalign lab")],
)
def test_make(target, calls):
    "The targets set up first, with the exact versions, then call one command."
    said = make("-n", target, "VENV=nowhere").stdout
    assert "pip install" in said and "-c constraints.txt" in said and ".[test,captions]" in said
    assert calls in said.splitlines()[-1]


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "oldpython"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("setup", f"PYTHON={old}", f"VENV={tmp_path}/venv")
    assert done.returncode and "Python 3.11" in done.stdout and not (tmp_path / "venv").exists()


def test_ci_calls_make_test():
    text = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert text.rstrip().endswith("make test") and "set -euo pipefail" in text


# --- what is committed -------------------------------------------------------------------------------------------


def test_data_stays_out():
    "Of data/ only the micro models, safetensors only, small enough to carry around; nothing of a run."
    inside = [p.relative_to(ROOT) for p in committed() if p.is_relative_to(ROOT / "data")]
    assert not [p for p in inside if p.parts[1] != "micro"], "only data/micro is kept"
    assert not [p for p in inside if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")], (
        "weights are safetensors"
    )
    assert sum((ROOT / p).stat().st_size for p in inside) <= 32 * 2**20


def test_only_published_reports_are_kept():
    "A run and its report change no tracked file: they go where git does not look."
    kept = {p.relative_to(ROOT).parts[1] for p in committed() if p.is_relative_to(ROOT / "reports")}
    assert kept == {"published"}
    for path in ("reports/micro/index.html", "reports/mine/index.html", "data/runs/micro/run.json"):
        ignored = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT)
        assert ignored.returncode == 0, path


def test_reports_are_small():
    "A committed report, however rich, is no burden."
    sizes, place = Counter(), ROOT / "reports/published"
    for path in committed():
        if path.is_relative_to(place) and len(path.relative_to(place).parts) > 1:
            sizes[path.relative_to(place).parts[0]] += path.stat().st_size
    assert sizes, "nothing is published"
    assert not {name: size for name, size in sizes.items() if size > 6 * 2**20}


def test_no_machine_paths():
    "Nothing that is kept names this checkout or this person's folder."
    places = [str(p).encode() for p in (ROOT, Path.home()) if len(p.parts) > 2]
    named = [
        p.relative_to(ROOT)
        for p in committed()
        if p.suffix != ".safetensors" and any(place in p.read_bytes() for place in places)
    ]
    assert not named


def test_reports_do_not_say_where_they_were_made():
    made = re.compile(rb"ipykernel_\d|(?<![\w.])/[\w./-]*/data/runs/")
    assert not [
        p.relative_to(ROOT)
        for p in committed()
        if p.is_relative_to(ROOT / "reports")
        and p.suffix in (".html", ".json", ".csv", ".svg", ".parquet")
        and made.search(p.read_bytes())
    ]


def test_plain_text_is_utf8():
    for p in committed():
        if p.suffix in (".py", ".md", ".ini", ".toml", ".txt", ".ipynb", ".csv", ".html", ".svg", ".j2"):
            p.read_text(encoding="utf-8")


def test_licence():
    assert PROJECT["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
