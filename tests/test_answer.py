"The first screen of a report: what it says where it may, and what it does not say where it may not."

import json, re
import pandas as pd, pytest
from selfalign.report.answer import SILENT, UNKNOWN
from selfalign.report.render import render

COLUMNS = "run preset scale chapter table row metric unit value low high n seeds chance better".split()
SAME = dict(run="toy", preset="micro", scale="micro", chapter="toy", unit="fraction", n=500, seeds=3, better="up")
CLAIMS = [
    dict(row="more", claim="More pictures help.", paper_says="“pictures help a lot”", harmless=False),
    dict(row="less", claim="Fewer pictures harm.", paper_says="", harmless=False),
]
VERDICTS = [
    dict(table="verdicts", row="more", metric="difference", value=0.031, low=0.012, high=0.05, chance=0.0),
    dict(table="verdicts", row="more", metric="the paper's difference", value=0.12),
    dict(table="verdicts", row="more", metric="verdict", unit="score", value=1),
    dict(table="verdicts", row="more", metric="difference without the image", value=0.001, low=-0.01, high=0.012),
]
ASKED = dict(
    chapter="toy",
    table="verdicts",
    control="positive-control",
    question="Do pictures help?",
    smallest=0.02,
    reacts=None,
)


def gain(row, value, low, metric="object-gain"):
    return dict(table="positive-control", row=row, metric=metric, value=value, low=low, high=2 * value - low)


HELPS = [gain("all-weights", 0.06, 0.04), gain("all-weights-wrong-60", -0.01, -0.03)]
SILENCE = [gain("all-weights", 0.004, -0.01), gain("all-weights-wrong-60", 0.002, -0.02)]


def page(tmp_path, rows, asked=ASKED | dict(claims=CLAIMS), stage="evaluate"):
    "The report of a run with these numbers and these claims"
    run = tmp_path / "toy"
    (run / stage).mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(dict(run="toy", preset="micro", scale="micro", title="A toy")))
    (run / stage / "stage.json").write_text(json.dumps(dict(name=stage, status="finished")))
    (run / stage / "figures.json").write_text("[]")
    pd.DataFrame([SAME | r for r in rows]).reindex(columns=COLUMNS).to_csv(run / "results.csv", index=False)
    if asked is not None:
        (run / stage / "claims.json").write_text(json.dumps(asked))
    return render(run, tmp_path / "out").read_text(encoding="utf-8")


def verdicts(text):
    "The last cell of each row of the first table"
    first = text.partition('<table class="claims">')[2].partition("</table>")[0]
    return re.findall(r'data-label="Verdict">(?:<strong>)?(.*?)(?:</strong>)?</td>', first)


def test_opens_with_the_answer(tmp_path):
    text = page(tmp_path, VERDICTS + HELPS)
    opening = text.partition("<details")[0]
    assert "<h1>Do pictures help?</h1>" in opening and "Supported here: “More pictures help.”" in opening
    assert "+3.1 points [+1.2, +5.0], in the paper +12.0 points" in opening and "“pictures help a lot”" in opening
    assert "Of 2 claims: 1 supported, 1 not tested." in opening and "could have said yes" in opening
    assert verdicts(text) == ["reacts", "–", "supported", "not tested", "–"]
    assert "Without the image: more pictures help." in opening and SILENT[0] not in text and UNKNOWN[0] not in text


def test_figure_carries_the_claims(tmp_path):
    text = page(tmp_path, VERDICTS + HELPS)
    svg = re.search(r"<svg .*?</svg>", text, re.S)[0]
    assert 'role="img"' in svg and "More pictures help. +3.1 points" in re.search('aria-label="(.*?)"', svg)[1]
    assert (tmp_path / "out/answer.svg").read_text(encoding="utf-8").startswith("<svg xmlns")
    data = pd.read_csv(tmp_path / "out/answer.csv")
    assert list(data.kind) == ["control", "control", "claim", "blind"] and data.paper[2] == 0.12


@pytest.mark.parametrize(
    "rows, reacts, says",
    [
        (SILENCE, None, False),  # no gain
        ([gain("all-weights", 0.05, -0.01)], None, False),  # an interval that holds zero
        ([HELPS[0], gain("all-weights-wrong-60", 0.07, 0.05)], None, False),  # wrong captions help as much
        ([gain("lora", 0.03, 0.01, "retrieval-r1-gain")], None, True),
        ([gain("all-weights", 0.06, 0.04, "named-gain")], None, None),  # not one of the measures
        (HELPS, False, False),  # the stage's own rule decides
        (SILENCE, True, True),
        ([], None, None),
    ],
)
def test_could_it_have_said_yes(tmp_path, rows, reacts, says):
    text = page(tmp_path, VERDICTS + rows, ASKED | dict(claims=CLAIMS, reacts=reacts))
    opening = text.partition("<details")[0]
    assert (SILENT[0] in opening) == (says is False) and (UNKNOWN[0] in opening) == (says is None)


@pytest.mark.parametrize("asked", [ASKED | dict(claims=CLAIMS), None])
def test_an_instrument_that_shows_nothing_gives_no_verdict(tmp_path, asked):
    text = page(tmp_path, VERDICTS + SILENCE, asked)
    assert "There is no answer" in text.partition("<details")[0] and ">supported<" not in text
    assert not {"supported", "not supported", "undecided"} & set(verdicts(text)) and "Supported here" not in text
    assert "+3.1 points" in text, "what was measured is shown all the same"


def test_a_run_that_kept_no_sentences(tmp_path):
    "Reports from before claims were recorded: named by their rows, and what is missing is said"
    text = page(tmp_path, [r for r in VERDICTS if "without" not in r["metric"]], None)
    opening = text.partition("<details")[0]
    assert UNKNOWN[0] in opening and verdicts(text) == ["not known", "supported"] and "<h1>A toy</h1>" in opening
    assert "has not recorded the sentence of each claim and the paper&#39;s words and the difference" in opening


def test_a_run_without_claims(tmp_path):
    text = page(tmp_path, [dict(table="scores", row="clip", metric="auc", value=0.7)], None)
    assert "tests no claim" in text.partition("<details")[0] and 'class="claims"' not in text and UNKNOWN[0] not in text


def test_a_claim_that_was_not_tested(tmp_path):
    text = page(tmp_path, HELPS)
    assert verdicts(text) == ["reacts", "–", "not tested", "not tested"] and "Not tested here" in text


HOSTILE = '</text></svg><script>alert(1)</script><img src=x onerror="alert(1)">'


def test_text_from_outside_is_escaped(tmp_path):
    claims = [dict(row=HOSTILE, claim=HOSTILE, paper_says=HOSTILE)]
    rows = [r | dict(row=HOSTILE) for r in VERDICTS] + [gain(HOSTILE, 0.06, 0.04)]
    text = page(tmp_path, rows, ASKED | dict(claims=claims, question=HOSTILE, table="verdicts"))
    svg = (tmp_path / "out/answer.svg").read_text(encoding="utf-8")
    assert "alert(1)" in text and "alert(1)" in svg
    for made in (text, svg):
        assert "<script>alert" not in made and "<img src=x" not in made and made.count("</svg>") == made.count("<svg ")


@pytest.mark.parametrize(
    "asked",
    [
        [],
        dict(claims=7),
        dict(claims=["more", None, dict(claim="nameless")]),
        ASKED | dict(claims=CLAIMS, reacts="yes", smallest="two", question=None, chapter=None),
        ASKED | dict(claims=CLAIMS, table="../../elsewhere", control=["a"]),
    ],
)
def test_damaged_claims_are_no_accident(tmp_path, asked):
    text = page(tmp_path, VERDICTS, asked)
    assert "Claim by claim" in text and {p.name for p in tmp_path.iterdir()} == {"toy", "out"}


def test_numbers_that_are_not_there(tmp_path):
    rows = [r | dict(low=None, high=None) for r in VERDICTS[:1]] + [r | dict(value=None) for r in VERDICTS[2:]]
    assert not re.search(r"\bnan\b", re.sub(r"<(style|script).*?</\1>", "", page(tmp_path, rows + HELPS), flags=re.S))


def test_differences_are_in_points(tmp_path):
    text = page(tmp_path, VERDICTS + HELPS + [dict(table="table1", row="a", metric="object", value=0.7)])
    assert "+6.0 points" in text and "70.0 %" in text and "3.1 %" not in text


def test_few_numbers_before_the_first_fold(tmp_path):
    claims = [dict(row=f"c{i}", claim=f"Claim {'abcdef'[i]}.", paper_says="“so”") for i in range(6)]
    rows = [r | dict(row=c["row"]) for c in claims for r in VERDICTS]
    before = page(tmp_path, rows + HELPS, ASKED | dict(claims=claims)).partition("<details")[0]
    text = re.sub(r"<(style|script|title)\b.*?</\1>|<[^>]+>", " ", before, flags=re.S)
    assert len(re.findall(r"\d+(?:[.,]\d+)*", text)) <= 60


# --- sections ----------------------------------------------------------------------------------------------------


def section(tmp_path, told):
    "The section of a stage that has put this in front"
    rows = [dict(table="scores", row="clip", metric="auc", value=0.71, low=0.68, high=0.74, chance=0.5)]
    stage = tmp_path / "toy/score"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(json.dumps(dict(name="score", status="finished")))
    (stage / "figures.json").write_text(json.dumps([dict(name="gone", title="Gone", files=["figures/gone.svg"])]))
    (stage / "section.json").write_text(json.dumps(told))
    pd.DataFrame([SAME | r for r in rows]).reindex(columns=COLUMNS).to_csv(stage / "results.csv", index=False)
    text = page(tmp_path, rows, None)
    return text.partition('<h2 id="stage-score">')[2].partition("</section>")[0], text


NUMBER = dict(words="true captions found", table="scores", row="clip", metric="auc")


def test_a_section_shows_its_number_and_folds_the_rest(tmp_path):
    shown, text = section(tmp_path, dict(says="Higher is better.", number=NUMBER, control=NUMBER | dict(row="judge")))
    front, _, folded = shown.partition("<details")
    assert "Higher is better." in front and "true captions found" in front and "71.0 %" in front
    assert "[68.0, 74.0], n = 500, chance 50.0 %" in front and front.count("<dt>") == 1 and "<table" in folded
    assert "<figure" not in shown and "The figure “Gone” of score is not here: the figure is not there." in text


@pytest.mark.parametrize("told", [[], dict(number="all"), dict(number=dict(words=HOSTILE)), dict(says=7, figure=[1])])
def test_a_damaged_section_is_a_section(tmp_path, told):
    shown, text = section(tmp_path, told)
    assert "71.0 %" in shown and "<script>alert" not in text
