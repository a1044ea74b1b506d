"The book: a course that can be read, and words that mean one thing."

import json, re
from collections import Counter
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cells(nb, kind):
    found = json.loads(nb.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]


def test_numbers_order_the_reading():
    "A digit, that of the floor, and another or a letter or two; no two notebooks share them."
    numbers = Counter()
    for nb in NOTEBOOKS:
        if nb.parent != NBS:
            number = nb.name.split("_")[0]
            assert re.fullmatch(r"[0-9][0-9a-z][a-z]?", number) and number[0] == nb.parent.name[0], nb.name
            numbers[number] += 1
    assert not [number for number, n in numbers.items() if n > 1]


def course():
    "Links and minutes of the course on the landing page."
    text = next(c for c in cells(NBS / "index.ipynb", "markdown") if c.startswith("## The course"))
    rows = re.findall(r"^\| \d+ \| \[.+?\]\((.+?)\) \| .+? \| (\d+) \|$", text, re.M)
    return [(NBS / link, int(minutes)) for link, minutes in rows]


def minutes(nb):
    "Reading time: 200 words and 20 lines of code a minute."
    words = sum(len(c.split()) for c in cells(nb, "markdown"))
    lines = sum(bool(line.strip()) for c in cells(nb, "code") for line in c.splitlines())
    return words / 200 + lines / 20


def test_the_course_is_short():
    assert 10 <= len(course()) <= 15
    assert len({nb for nb, _ in course()}) == len(course())


@pytest.mark.parametrize("nb, said", course(), ids=lambda v: getattr(v, "stem", v))
def test_minutes(nb, said):
    assert abs(said - minutes(nb)) <= 5


@pytest.mark.parametrize("nb", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_one_word_for_one_thing(nb):
    "Words that the glossary replaces are not in the prose; what is quoted or code does not count."
    from selfalign.study.glossary import INSTEAD

    quoted = re.compile(r"```.*?```|`[^`]*`|\"[^\"]*\"|\*[^*\n]+\*|\$[^$]*\$", re.S)
    prose = quoted.sub(" ", "\n\n".join(cells(nb, "markdown")))
    for word, better in INSTEAD.items():
        assert not re.search(rf"\b{word}s?\b", prose, re.I), f"{word!r} is written as {better!r}"
