"Imports: down the floors only, never across the chapters, no one's private names, no circles."

import ast, importlib.util, re
from functools import cache
import pytest
from test_notebooks import CHAPTERS, MODULES, ROOT, code_cells, label, source

FLOORS = "study data models benchmarks self_align sail gmail vlm report tools".split()
STORIES = FLOORS[4:8]  # the chapters
TESTS = sorted((ROOT / "tests").glob("*.py"))


def text_of(path):
    "The Python of a module, a notebook or a test."
    text = (
        "\n".join(source(c) for c in code_cells(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    )
    return re.sub(r"^\s*[%!].*$", "", text, flags=re.M)


def module_of(path):
    "`selfalign.floor.name` of a module, or of what a notebook exports to."
    if path.suffix == ".ipynb":
        found = re.search(r"#\|\s*default_exp ([\w.]+)", text_of(path))
        return f"selfalign.{found[1]}" if found else f"selfalign.{path.parent.name.split('_', 1)[1]}."
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MADE = {module_of(p) for p in MODULES}


@cache
def imported(path):
    "Imports of `selfalign` in a piece of Python, wherever they stand: pairs of a module and a name out of it, or none."
    package, found = module_of(path).rpartition(".")[0], []
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names]
        if isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(name, package) if node.level else name
            inside = [f"{module}.{a.name}" in MADE for a in node.names]
            found += [(f"{module}.{a.name}", "") if i else (module, a.name) for a, i in zip(node.names, inside)]
    return [(module, name) for module, name in found if module.startswith("selfalign.")]


def floor_of(module):
    return module.split(".")[1]


def up_or_across(path):
    "Modules that a piece of Python should not import."
    here = floor_of(module_of(path))
    for module, _ in imported(path):
        there = floor_of(module)
        if there == here or there.startswith("__"):
            continue
        across = there in STORIES and (here in STORIES or here == "report")
        if there not in FLOORS or FLOORS.index(there) > FLOORS.index(here) or across:
            yield module


@pytest.mark.parametrize("path", MODULES + CHAPTERS, ids=label)
def test_imports_go_down(path):
    "Never up; never across between the chapters, which meet through files only; and the report knows no chapter."
    assert not set(up_or_across(path)), f"{label(path)} imports what it should not"


def private(name):
    return name.startswith("_") and not name.startswith("__")


def private_names(path):
    "Names with an underscore that a piece of Python takes from modules other than its own."
    own, tree, modules = module_of(path), ast.parse(text_of(path)), {}
    found = {f"{module}.{name}" for module, name in imported(path) if private(name) and module != own}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules |= {a.asname or a.name: a.name for a in node.names}
    taken = {name: m for m in MADE for name, real in modules.items() if m.endswith(f".{real}") or m == real}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and private(node.attr):
            if taken.get(node.value.id, own) != own:
                found.add(f"{taken[node.value.id]}.{node.attr}")
    return sorted(found)


@pytest.mark.parametrize("path", MODULES + CHAPTERS + TESTS, ids=label)
def test_private_names_stay_at_home(path):
    "What another module or a test needs is public and documented."
    assert not private_names(path), f"{label(path)} takes names that are not public"


def circle(edges):
    "A way from a module back to itself, or nothing."
    done = set()

    def walk(module, way):
        if module in way:
            return way[way.index(module) :] + [module]
        if module in done:
            return []
        found = next((c for other in sorted(edges.get(module, ())) if (c := walk(other, way + [module]))), [])
        done.add(module)
        return found

    return next((c for module in sorted(edges) if (c := walk(module, []))), [])


def test_circle():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_circles():
    "Also not through imports within functions."
    edges = {module_of(p): {m for m, _ in imported(p) if m in MADE and m != module_of(p)} for p in MODULES}
    assert not circle(edges), " → ".join(circle(edges))
