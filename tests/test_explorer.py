"The explorer of thresholds: what is above and below, the widget, and its twin on the page."

import json, re, shutil, subprocess
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from selfalign.benchmarks.filters import around, filtered, kept_share, threshold_at
from selfalign.benchmarks.thresholds import axis_of, hills, pair_html, scored_pairs, view
from selfalign.report.gallery import gallery
from selfalign.report.render import render
from selfalign.report.threshold import STEPS, twin
from selfalign.self_align.explorer import explore
from selfalign.study.settings import StudyError

BOTH, NASTY = (
    ["open_clip:data/micro/clip", "transformers:data/micro/judge"],
    'a <script>document.title="stolen"</script> & "cat" <b>',
)


def make_run(folder, n=24, truth=True, source="microworld:study"):
    "A run as sample, generate and score leave it; the first scorer knows a little, the second nothing."
    rng, run = np.random.default_rng(3), folder / "toy"
    for s in ("sample", "generate", "score"):
        (run / s / "tables").mkdir(parents=True)
    keys = [f"p{i:02d}" for i in range(n)]
    true = rng.random(n) < 0.6
    old = pd.DataFrame(
        dict(
            key=keys,
            image=[f"{k}.png" for k in keys],
            caption=[NASTY, *["a red disc"] * (n - 1)],
            scene=keys,
            subset=0,
            noise="",
            image_source="original",
            aligned=true if truth else None,
        )
    )
    new = old.assign(
        parent=keys,
        key=[k + "-g0" for k in keys],
        image=[f"{k}-g0.png" for k in keys],
        k=0,
        image_source="generated",
        aligned=None,
    )
    for s, t in (("sample", old), ("generate", new)):
        for i, name in enumerate(t.image):
            Image.new("RGB", (16, 16), (9 * i, 80 if s == "sample" else 200, 120)).save(run / s / name)
        t.assign(aligned=t.aligned.astype("boolean")).to_parquet(run / s / "tables/pairs.parquet")
        (run / s / "stage.json").write_text(json.dumps(dict(name=s, status="finished", parameters=dict(source=source))))
    both = pd.concat([old, new])
    read = rng.random(n) < 0.5
    scores = [
        pd.DataFrame(
            dict(
                key=both.key, scorer=s, score=(rng.normal(25, 3, 2 * n) + gain * np.concatenate([true, read])).round(3)
            )
        )
        for s, gain in zip(BOTH, (4, 0))
    ]
    pd.concat(scores).to_parquet(run / "score/tables/scores.parquet")
    if truth:
        pd.DataFrame(dict(key=new.key, image_source="generated", as_claimed=read)).to_parquet(
            run / "score/tables/readings.parquet"
        )
    (run / "score/stage.json").write_text(json.dumps(dict(name="score", status="finished", parameters={})))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("explorer"))


def of(run, scorer=BOTH[0], kinds=("original", "generated")):
    t = scored_pairs(run)
    return t[(t.scorer == scorer) & t.kind.isin(kinds)].reset_index(drop=True)


# --- pure functions, against counting by hand --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.floats(0, 1))
def test_threshold_of_a_rate(scores, keep):
    t, wanted = threshold_at(scores, keep), max(1, round(keep * len(scores)))
    kept = [s for s in scores if s >= t]
    assert t in scores
    assert len(kept) >= wanted
    assert len([s for s in scores if s > t]) < wanted
    assert kept_share(scores, t) == len(kept) / len(scores)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.sampled_from([0.0, 1.0, None]), st.sampled_from(["original", "generated"])),
        min_size=1,
        max_size=30,
    ),
    st.integers(-1, 21),
    st.integers(1, 5),
)
def test_above_and_below(rows, line, n):
    "Numbers, shares, recall and neighbours as a loop finds them."
    table = pd.DataFrame(
        [
            dict(score=s, true=np.nan if t is None else t, kind=k, scene=str(i), key=str(i))
            for i, (s, t, k) in enumerate(rows)
        ]
    )
    for r in filtered(table, line).to_dict("records"):
        mine = [(s, t) for s, t, k in rows if k == r["kind"]]
        known = [(s, t) for s, t in mine if t is not None]
        up, down, true = [t for s, t in known if s >= line], [t for s, t in known if s < line], sum(t for _, t in known)

        def mean(x):
            return sum(x) / len(x) if x else np.nan

        found = [r[c] for c in ("pairs", "kept", "precision", "below", "recall", "random")]
        np.testing.assert_allclose(
            found,
            [
                len(mine),
                sum(s >= line for s, _ in mine),
                mean(up),
                mean(down),
                sum(up) / true if true else np.nan,
                mean([t for _, t in known]),
            ],
        )
        if up:
            assert r["low"] <= r["precision"] <= r["high"] and r["random_low"] <= r["random"] <= r["random_high"]
    above, below = around(table, line, n)
    scores = [s for s, *_ in rows]
    assert above.score.tolist() == sorted(s for s in scores if s >= line)[:n]
    assert below.score.tolist() == sorted((s for s in scores if s < line), reverse=True)[:n]


def test_range_of_a_random_drop():
    "The range of a random drop holds what random drops have."
    rng = np.random.default_rng(0)
    true = (rng.random(200) < 0.4).astype(float)
    table = pd.DataFrame(dict(score=np.arange(200.0), true=true, kind="original", scene=np.arange(200).astype(str)))
    r = filtered(table, 150.0).iloc[0]
    drops = np.array([rng.permutation(true)[:50].mean() for _ in range(4000)])
    assert 0.94 <= ((drops >= r.random_low) & (drops <= r.random_high)).mean() <= 0.985


def test_scenes_are_drawn_whole():
    "Ten pairs of each scene that agree tell as much as one of each: the interval is that much wider."
    rng = np.random.default_rng(1)
    true = (rng.random(40) < 0.5).astype(float)
    table = pd.DataFrame(
        dict(score=1.0, true=np.repeat(true, 10), kind="original", scene=np.repeat(np.arange(40), 10).astype(str))
    )
    wide, narrow = (filtered(t, 0.0).iloc[0] for t in (table, table.assign(scene=np.arange(400).astype(str))))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_truth_of_both_kinds(run):
    t = of(run).set_index("key")
    read = pd.read_parquet(run / "score/tables/readings.parquet").set_index("key").as_claimed
    aligned = pd.read_parquet(run / "sample/tables/pairs.parquet").set_index("key").aligned
    for truth in (read, aligned):
        assert (t.true[truth.index] == truth.astype(float)).all()
    assert list(hills(t)) == ["original", "generated"] and set(hills(t[t.kind == "original"])) == {
        "what the caption says",
        "something else",
    }


# --- what is refused, and what is harmless -----------------------------------------------------------------------


def test_no_scores(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "score")
    with pytest.raises(StudyError, match="the run bare has no scores of the stage score.*selfalign run bare"):
        explore(bare)
    (bare / "score/tables").mkdir(parents=True)
    (bare / "score/tables/scores.parquet").write_bytes(b"damaged")
    with pytest.raises(StudyError, match="scores.parquet of the run bare is damaged.*delete the folder score"):
        explore(bare)
    with pytest.raises(StudyError, match="there is no run .*selfalign run micro"):
        explore(tmp_path / "nowhere")
    pd.DataFrame(dict(key=["x"], scorer=["s"], score=[1.0])).to_parquet(bare / "score/tables/scores.parquet")
    with pytest.raises(StudyError, match="no pair of the run .* has a score"):
        explore(bare)


def test_captions_and_images_are_not_trusted(run):
    row = of(run).iloc[0]
    for caption in (NASTY, "1 < 2 & <img src=x onerror=alert(1)>"):
        html = pair_html(row.where(row.index != "caption", caption))
        assert "<script" not in html
        assert html.count("<img") == 1
        assert "onerror=alert(1)>" not in html
    for image in ("../sample/p00.png", "/etc/passwd", "nothing.png"):
        html = pair_html(row.where(row.index != "image", image))
        assert "not shown: " in html
        assert "<img" not in html


def test_a_damaged_image_says_so(run, tmp_path):
    mine = tmp_path / "toy"
    shutil.copytree(run, mine)
    for f in (mine / "sample").glob("*.png"):
        f.write_bytes(f.read_bytes()[:40])
    t = of(mine, kinds=("original",))
    html = view(t, float(t.score.median()))
    assert html.count("not shown: not an image") == 8
    assert "<img" not in html


def test_no_truth_no_precision(tmp_path):
    t = of(make_run(tmp_path, truth=False))
    html = view(t, 25.0)
    assert "true above" not in html
    assert "as the caption says" not in html
    assert filtered(t, 25.0).random.isna().all()


# --- the widget --------------------------------------------------------------------------------------------------


def kept(html):
    return [int(k) for k in re.findall(r"<td[^>]*>(?:original|generated)</td><td[^>]*>(\d+)</td>", html)]


def images(html):
    return re.findall(r'src="data:image/png;base64,([^"]+)"', html)


def test_widget(run):
    box = explore(run, pairs=3)
    c, t = box.controls, of(run, kinds=("original",))
    assert c.scorer.value == BOTH[0]
    assert c.kinds.value == ("original",)
    assert kept(box.shown.value) == [12]
    assert len(images(box.shown.value)) == 6
    before = images(box.shown.value)
    c.threshold.value = line = float(t.score.nlargest(5).iloc[-1])
    assert kept(box.shown.value) == [5]
    assert c.keep.value == pytest.approx(5 / 24)
    assert images(box.shown.value) != before
    c.keep.value = 0.75
    assert kept(box.shown.value) == [18]
    assert c.threshold.value == threshold_at(t.score, 0.75) < line
    c.scorer.value = BOTH[1]
    assert c.keep.value == 0.75
    assert kept(box.shown.value) == [18]
    assert c.threshold.value == threshold_at(of(run, BOTH[1], ("original",)).score, 0.75)
    c.kinds.value = ("original", "generated")
    both = of(run, BOTH[1])
    assert kept(box.shown.value) == filtered(both, threshold_at(both.score, 0.75)).kept.tolist()
    assert sum(kept(box.shown.value)) == 36
    assert (c.threshold.min, c.threshold.max) == axis_of(both.score)
    assert "<script" not in box.shown.value


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return render(run, tmp_path_factory.mktemp("page") / "out")


def section(page):
    return page.read_text(encoding="utf-8").partition('<h2 id="threshold">')[2].partition('<h2 id="gallery">')[0]


def test_twin_says_what_the_explorer_says(run):
    made = twin(run, gallery(run, source="microworld:study"))
    data = json.loads(made["data"])
    assert len(data["pairs"]) == 48 and data["kinds"] == ["original", "generated"] and len(data["scorers"]) == 2
    for s, (scorer, panel) in enumerate(zip(BOTH, made["panels"])):
        t = of(run, scorer)
        for at in range(0, STEPS + 1, 16):
            line = panel["grid"][at]
            found = filtered(t, line)
            assert [o[0] for o in data["scorers"][s]["states"][at]] == found.kept.tolist()
            assert [o[1] for o in data["scorers"][s]["states"][at]] == [
                -1 if p != p else round(1000 * p) for p in found.precision
            ]
            for k, kind in enumerate(data["kinds"]):
                assert sum(p[5 + 2 * s] >= at for p in data["pairs"] if p[2] == k) == found.kept[k]


@pytest.mark.slow
def test_section_is_complete_without_javascript(page):
    text = section(page)
    still = text.partition('class="still"')[2].partition("</tbody>")[0]
    assert (
        still.count("<tr>") == 10
        and "Just above: kept" in text
        and text.count('class="tile sheet"') == 16
        and text.count("<svg") == 6
    )
    assert (
        re.search(r'<label class="slide" hidden>Threshold on the score by clip <input type="range"', text)
        and len(text) < 150_000
    )
    assert "<script" not in text and "document.title=&#34;stolen" in page.read_text(encoding="utf-8")


def test_runs_without_scores_have_no_section(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "score/tables/scores.parquet").unlink()
    text = render(bare, tmp_path / "out").read_text(encoding="utf-8")
    assert (
        'id="threshold"' not in text
        and 'href="#threshold"' not in text
        and "score/tables/scores.parquet is not there" in text
    )


def test_photographs_stay_at_home(tmp_path):
    text = section(render(make_run(tmp_path, truth=False, source="webdataset:data/flickr8k"), tmp_path / "out"))
    assert (
        'aria-label="original image' not in text and 'aria-label="generated image' in text and "true above" not in text
    )


def chromium():
    return next((p for o in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(o))), None)


@pytest.mark.skipif(
    not chromium(), reason="there is no Chromium here: the page is not opened (install Debian package `chromium`)"
)
def test_slider_in_a_browser(run, page, tmp_path):
    "Our script runs, the slider moves counts, line and pairs, and the gallery still sorts."
    move = """const input = document.querySelector('.panel:not([hidden]) input')
              const kind = document.getElementById('twin-kind')
              kind.value = '1'
              kind.dispatchEvent(new Event('change'))
              input.value = 60
              input.dispatchEvent(new Event('input'))"""
    driven = page.parent / "driven.html"
    driven.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8")).replace(
            "</body>", f"<script>{move}</script></body>"
        ),
        encoding="utf-8",
    )
    quiet = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --virtual-time-budget=4000 --dump-dom"""
    try:
        dom = subprocess.run(
            [chromium(), *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", driven.as_uri()],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=120,
        ).stdout
    finally:
        driven.unlink()
    t = of(run, kinds=("original",))
    axis = axis_of(of(run).score)
    line = axis[0] + 60 / STEPS * (axis[1] - axis[0])
    panel = dom.partition('<figure class="panel"')[2].partition("</figure>")[0]
    assert (
        f"Threshold {line:.2f}: {(t.score >= line).sum()} of 24 pairs kept" in panel
        and f"{(t.score >= line).sum()} of 24" in panel.partition('class="live"')[2]
    )
    above, below = around(t, line)
    sides = panel.partition('class="sides"')[2]
    assert [float(x) for x in re.findall(r"<b>([\d.]+) original</b>", sides)] == [
        round(s, 2) for s in [*above.score, *below.score]
    ]
    assert (
        "stolen" not in re.search("<title>(.*?)</title>", dom)[1]
        and "24 of 24 pairs" in dom
        and '<figure class="panel" hidden' in dom
    )
