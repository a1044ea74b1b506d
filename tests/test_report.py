"""The report site: complete, small, silent and safe, also on damaged and hostile runs."""

import base64, io, json, random, re, shutil, subprocess
from html.parser import HTMLParser
from pathlib import Path
import nbformat, pandas as pd, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, ImageDraw
from selfalign.report.render import LIMIT, ReportError, render
from selfalign.study.settings import find_root

HOSTILE = [
    '</script><script>document.title="stolen"</script>',
    "<img src=x onerror=\"document.title='stolen'\">",
    "\x1b[31mred\x1b[0m \x07bell",
    '" onmouseover="alert(1)" x="',
    "{{ 7*7 }} {% raw %}",
    "a cat " * 10_000,
    "\u202egnihton",
    "'; drop table pairs; --",
    "javascript:alert(1)",
    "</title></style><h1>",
]
COLOURS = dict(red="#c8342c", orange="#ef8d1f", yellow="#efcd3c", green="#2f9147", blue="#2b5cc4", purple="#7f38a8")
RESULTS = "run preset scale chapter table row metric unit value low high n seeds chance better".split()


def photo(colour, rng, blur=0):
    "A disc or square on a coloured ground"
    img = Image.new("RGB", (64, 64), rng.choice(["#dfe8ec", "#e9e2d2", "#d4e0cc", "#3f4663"]))
    x, y, r = rng.randint(18, 46), rng.randint(18, 46), rng.randint(8, 17)
    draw = ImageDraw.Draw(img)
    (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    return img


def png_bytes(img):
    img.save(out := io.BytesIO(), "png")
    return out.getvalue()


def histogram(folder, name, scores, images=False):
    "A figure as a stage leaves it: SVG, PNG and CSV"
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6))
    if images:
        ax.imshow(Image.new("RGB", (64, 64), "teal"))
    else:
        for label, part in scores.groupby("source"):
            ax.hist(part["score"], bins=24, alpha=0.6, label=label)
        ax.set(xlabel="CLIP score", ylabel="pairs")
        ax.legend()
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in ("svg", "png"):
        fig.savefig(folder / f"{name}.{suffix}")
    plt.close(fig)
    scores.to_csv(folder / f"{name}.csv", index=False)
    return dict(
        name=name,
        title="Scores by the clip scorer" if not images else "Some pairs",
        files=[f"figures/{name}.{o}" for o in ("svg", "png", "csv")],
        caption="Generated images against the originals of the same captions; each pair is counted once. <b>Bold</b>",
    )


def stage(run, name, parameters, seconds, figures=(), cells=()):
    "Manifest, figures and executed notebook of a stage"
    folder = run / name
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    manifest = dict(
        name=name,
        run=run.name,
        preset="micro",
        scale="micro",
        parameters=parameters,
        key="0" * 64,
        inputs={},
        error=f"in {find_root()}/nbs",
        status="finished",
        start="2026-01-31T12:00:00+00:00",
        seconds=seconds,
        peak_memory_gb=1.234,
        versions=dict(python="3.11.7", torch="2.9.0", diffusers="0.36.0", transformers="5.0.0"),
        git=dict(commit="0123456789abcdef", dirty=name == "score"),
        hardware=dict(cpu="A processor", cores=2, memory_gb=16.0, gpu=""),
    )
    (folder / "stage.json").write_text(json.dumps(manifest))
    (folder / "figures.json").write_text(json.dumps(list(figures)))
    head = new_markdown_cell(
        f"# Stage {name}\n> What it does, with a formula $s = 100\\max(\\cos, 0)$.\n\n"
        "See [scores](42_score.ipynb) and [a paper](https://example.org/paper)."
    )
    nbformat.write(new_notebook(cells=[head, *cells]), folder / "notebook.ipynb")


def result(**o):
    return dict(run="toy", preset="micro", scale="micro", seeds=1, n=500, better="up") | o


def results():
    rows = [
        result(
            chapter="models",
            table="faithfulness",
            row=row,
            metric=metric,
            unit="fraction",
            value=v - d,
            low=v - d - 0.03,
            high=v - d + 0.026,
            chance=chance,
        )
        for row, v, chance in (
            ("object", 0.93, 1 / 16),
            ("colour", 0.95, 1 / 8),
            ("size", 0.88, 1 / 3),
            ("position", 0.85, 1 / 9),
        )
        for metric, d in (("accuracy", 0.05), ("reconstruction", 0.02), ("renders", 0))
    ]
    rows += [
        result(
            chapter="models",
            table="clip",
            row="micro-clip",
            metric="zero-shot object",
            unit="fraction",
            value=0.741,
            low=0.70,
            high=0.779,
            chance=1 / 16,
        ),
        result(
            chapter="models",
            table="clip",
            row="micro-clip",
            metric="retrieval R@1",
            unit="fraction",
            value=0.22,
            low=0.186,
            high=0.258,
            chance=0.002,
        ),
    ]
    rows += [
        result(
            chapter="self_align",
            table="paired difference",
            row=f"subset {i}, {s}",
            metric="generated minus original",
            unit="score",
            value=v,
            low=v - 0.4,
            high=v + 0.4,
            seeds=3,
            n=800,
        )
        for i in range(3)
        for s, v in (("clip", 1.9 - i * 0.2), ("judge", -0.35 + i * 0.3))
    ]
    rows += [
        result(
            chapter="self_align",
            table="filter",
            row=f"{s}, best {k} %",
            metric=m,
            unit="fraction",
            value=v,
            low=v - 0.02,
            high=v + 0.02,
            chance=0.7,
        )
        for s in ("clip", "judge")
        for k, v in ((30, 0.93), (70, 0.82))
        for m in ("precision",)
    ]
    return pd.DataFrame(rows).reindex(columns=RESULTS)


def toy_run(folder, n=40, source="microworld:study?noise=0.3", captions=(), name="toy"):
    "A run folder as the stages leave it"
    rng, run = random.Random(7), folder / name
    pairs, made, scores = [], [], []
    for i in range(n):
        colour = rng.choice(list(COLOURS))
        key, caption = (
            f"study-{i:06d}",
            captions[i]
            if i < len(captions)
            else f"a {rng.choice(['small', 'large'])} {colour} thing on a {rng.choice(['meadow', 'beach'])}",
        )
        for where, k in (("sample", key), ("generate", f"{key}-0")):
            file = run / where / "images" / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(colour, rng).save(file)
        pairs.append(
            dict(
                key=key,
                image=f"images/{key}.png",
                caption=caption,
                image_source="original",
                subset=i % 3,
                noise="mismatched" if i % 5 == 0 else "",
            )
        )
        made.append(
            dict(
                key=f"{key}-0",
                parent=key,
                image=f"images/{key}-0.png",
                caption=caption,
                image_source="generated",
                subset=i % 3,
                k=0,
                seed=i,
            )
        )
        for scorer, gain in (("open_clip:data/micro/clip", 2), ("transformers:data/micro/judge", -0.3)):
            old = rng.gauss(24, 2)
            scores += [
                dict(key=k, scorer=scorer, cosine=v / 100, score=v)
                for k, v in ((key, old), (f"{key}-0", old + rng.gauss(gain, 1.5)))
            ]
    hist = pd.DataFrame(scores).assign(
        source=lambda d: ["generated" if k.endswith("-0") else "original" for k in d["key"]]
    )[["source", "score"]]
    image_output = new_output(
        "display_data",
        data={
            "image/png": base64.b64encode(png_bytes(Image.new("RGB", (1400, 700), "teal"))).decode(),
            "text/plain": "<Figure>",
        },
    )
    nasty = new_output(
        "display_data",
        data={
            "text/html": '<table><tr><td>7</td></tr></table><script>document.title="stolen"</script><img src="https://example.org/x.png">'
        },
    )
    bar = new_output("stream", text="\r".join(f"{i} %" for i in range(100)) + "\n\x1b[31mdone\x1b[0m\n")
    stage(
        run,
        "sample",
        dict(source=source, size=n),
        3.2,
        [histogram(run / "sample/figures", "pairs", hist, images=True)],
        [new_code_cell('stage.figure(fig, "pairs")', outputs=[image_output])],
    )
    stage(
        run,
        "generate",
        dict(generator="diffusers:data/micro/generator", steps=20, guidance=5.0),
        154.0,
        [],
        [new_code_cell("pipe(caption)", outputs=[bar, nasty, new_output("stream", text=f"{find_root()}/data")])],
    )
    stage(
        run,
        "score",
        dict(scorers=["open_clip:data/micro/clip", "transformers:data/micro/judge"]),
        21.5,
        [
            histogram(run / "score/figures", "histogram", hist),
            histogram(run / "score/figures", "histogram-judge", hist),
        ],
        [
            new_code_cell("1+1"),
            new_code_cell('stage.figure(fig, "histogram", title="Scores")', outputs=[image_output]),
        ],
    )
    for where, table, rows in (("sample", "pairs", pairs), ("generate", "pairs", made), ("score", "scores", scores)):
        pd.DataFrame(rows).to_parquet(run / where / "tables" / f"{table}.parquet")
    bad = [
        dict(file="<i>00001.tar</i>", row=str(i), what="<script>alert(1)</script> truncated image", remedy="left out")
        for i in range(30)
    ]
    bad[0]["what"] += f" below {find_root()}/data/runs, said in /tmp/ipykernel_12/34.py:9"
    pd.DataFrame(bad).to_parquet(run / "sample/tables/problems.parquet")
    results().to_csv(run / "results.csv", index=False)
    (run / "run.json").write_text(
        json.dumps(
            dict(
                run=name,
                preset="micro",
                scale="micro",
                title="Captions to images to scores, in a world of known truth",
            )
        )
    )
    return run


class Links(HTMLParser):
    "Everything a page refers to, and the tags it has"

    def __init__(self, page):
        super().__init__()
        self.refs, self.tags, self.handlers = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refs += [v for k, v in attrs if k in ("href", "src", "xlink:href", "srcset", "action", "data", "poster")]
        self.handlers += [k for k, v in attrs if k.startswith("on")]


def check_silent(folder):
    "No page of the report points outside, runs a handler, or has a script but ours; all its links lead somewhere"
    pages = sorted(folder.rglob("*.html"))
    for page in pages:
        found = Links(text := page.read_text(encoding="utf-8"))
        assert not found.handlers and not {"iframe", "object", "embed", "base", "form", "link"} & set(found.tags)
        assert found.tags.count("script") == (page.name == "index.html")
        assert not re.search(r'url\(["\']?(https?:|//)', text) and not re.search("[\x00-\x08\x0b-\x1f\x7f]", text)
        for ref in found.refs:
            if ref.startswith("data:image/"):
                continue
            assert not re.match(r"\w+:|//", ref), ref
            target, _, anchor = ref.partition("#")
            there = (page.parent / target).resolve() if target else page
            assert there.is_relative_to(folder.resolve()) and there.is_file(), ref
            if anchor and there.suffix == ".html":
                assert f'id="{anchor}"' in there.read_text(encoding="utf-8"), ref
    for svg in folder.rglob("*.svg"):
        assert "http" not in svg.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    return pages


def size(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "The report of a run with hostile captions, made once"
    tmp = tmp_path_factory.mktemp("report")
    return render(toy_run(tmp, captions=HOSTILE), tmp / "out" / "toy")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return toy_run(tmp_path_factory.mktemp("made"), n=4)


@pytest.fixture
def run(made, tmp_path):
    "A small run of one's own, to be damaged"
    return Path(shutil.copytree(made, tmp_path / "toy"))


@pytest.mark.slow
def test_complete_and_silent(report):
    folder, page = report.parent, report.read_text(encoding="utf-8")
    assert len(check_silent(folder)) == 4 and size(folder) < LIMIT
    for text in (
        "Captions to images to scores",
        "0123456789 with uncommitted changes",
        "2 min 34 s",
        "scale micro",
        "A processor, 2 cores",
        "88.0 %",
        "[85.0, 90.6]",
        "chance",
    ):
        assert text in page, text
    for file in (
        "results.csv",
        "run.json",
        "gallery.webp",
        "score/tables/scores.parquet",
        "score/figures/histogram.svg",
        "score/figures/histogram.png",
        "score/figures/histogram.csv",
        "score/stage.json",
        "generate/notebook.html",
    ):
        assert (folder / file).is_file(), file
    assert 'href="score/notebook.html#cell-2"' in page and page.count('class="card"') == 40
    assert "What is missing" not in page


def test_hostile_text_is_text(report):
    page = report.read_text(encoding="utf-8")
    assert "<script>document.title" not in page and "<img src=x" not in page and "<h1>" not in page.partition("<h1>")[2]
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page and "{{ 7*7 }}" in page and "\u202e" not in page
    assert "characters)" in page and len(page) < 600_000


def test_notebook_pages(report):
    page = (report.parent / "generate/notebook.html").read_text(encoding="utf-8")
    assert "<math" in page and "a paper (https://example.org/paper)" in page and 'href="../score/notebook.html"' in page
    assert "<td>7</td>" in page and "98 %" not in page and "99 %" in page and "ansi-red" in page


def test_no_machine_paths(report):
    assert len(find_root().parts) > 2 and not [
        f
        for f in report.parent.rglob("*")
        if f.is_file() and (str(find_root()).encode() in f.read_bytes() or b"ipykernel_" in f.read_bytes())
    ]
    assert "below data/runs, said in this cell:9" in report.read_text(encoding="utf-8")


@pytest.mark.slow
def test_same_run_same_bytes(report, tmp_path):
    again = render(report.parents[2] / "toy", tmp_path / "again" / "toy")
    files = {f.relative_to(report.parent) for f in report.parent.rglob("*") if f.is_file()}
    assert files == {f.relative_to(again.parent) for f in again.parent.rglob("*") if f.is_file()}
    for f in files:
        assert (report.parent / f).read_bytes() == (again.parent / f).read_bytes(), f


@pytest.mark.slow
def test_unchanged_notebooks_are_taken_over(run, tmp_path, monkeypatch):
    page = render(run, tmp_path / "out").parent / "score/notebook.html"
    before = page.read_bytes()

    def never(*args):
        raise AssertionError("made again")

    monkeypatch.setattr("selfalign.report.pages.notebook_html", never)
    index = render(run, tmp_path / "out")
    assert page.read_bytes() == before and "cannot be shown" not in index.read_text(encoding="utf-8")
    (run / "score/notebook.ipynb").write_text(
        (run / "score/notebook.ipynb").read_text(encoding="utf-8").replace("Stage score", "Stage changed"),
        encoding="utf-8",
    )
    assert "notebook of score cannot be shown (AssertionError)" in render(run, tmp_path / "out").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_photographs_stay_at_home(tmp_path):
    report = render(toy_run(tmp_path, n=8, source="webdataset:data/flickr8k"), tmp_path / "out")
    folder, page = report.parent, report.read_text(encoding="utf-8")
    check_silent(folder)
    assert page.count("it may not be passed on") >= 8 and "A generator that knows only the microworld" in page
    assert (
        "sample/figures/pairs.png" not in page
        and not (folder / "sample/figures/pairs.png").exists()
        and not (folder / "sample/figures/pairs.svg").exists()
    )
    assert (folder / "score/figures/histogram.svg").exists() and not (folder / "sample/tables/pairs.parquet").exists()
    assert "data:image" not in "".join(f.read_text(encoding="utf-8") for f in folder.rglob("notebook.html"))
    assert 'role="img" aria-label="Generated' in page and 'role="img" aria-label="Original' not in page


def break_files(run, *names):
    for name in names:
        (run / name).write_bytes(b"\x00damaged")


@pytest.mark.parametrize(
    "hurt, says",
    [
        (lambda run: shutil.rmtree(run / "score"), "score/tables/scores.parquet is not there"),
        (lambda run: [shutil.rmtree(o) for o in run.iterdir() if o.is_dir()], "run has no pairs"),
        (lambda run: (run / "results.csv").unlink(), "results.csv is not there"),
        (lambda run: (run / "results.csv").write_text("a,b\n1,2\n"), "results.csv cannot be read"),
        (lambda run: (run / "run.json").write_text("[1]"), "run.json does not hold"),
        (
            lambda run: break_files(
                run,
                "score/figures.json",
                "score/notebook.ipynb",
                "sample/tables/problems.parquet",
                "generate/tables/pairs.parquet",
            ),
            "score/notebook.ipynb cannot be read",
        ),
        (
            lambda run: break_files(
                run,
                "score/figures/histogram.svg",
                "score/figures/histogram.png",
                *[f"generate/images/{o.name}" for o in (run / "generate/images").iterdir()],
            ),
            "no readable image",
        ),
        (lambda run: (run / "score").rename(run / "score.partial"), "The stage score is not finished"),
        (lambda run: (run / "run.json").write_text('{"status": "failed", "title": "a"}'), "did not finish"),
        (
            lambda run: (run / "score/stage.json").write_text('{"inputs": {"sample": "another"}}'),
            "made from an earlier version of sample",
        ),
        (
            lambda run: (run / "score/stage.json").write_text('{"seconds": "long", "git": null, "parameters": null}'),
            "wall clock",
        ),
        (
            lambda run: (run / "score/figures.json").write_text(
                json.dumps(
                    [
                        "x",
                        dict(files=["../../../etc/passwd"], caption=None),
                        dict(name="gone", files=["figures/gone.svg"]),
                    ]
                )
            ),
            "the figure is not there",
        ),
        (
            lambda run: pd.DataFrame(dict(key=["a"])).to_parquet(run / "sample/tables/pairs.parquet"),
            "no readable image",
        ),
        (
            lambda run: (
                pd.read_parquet(run / "sample/tables/pairs.parquet")
                .head(0)
                .to_parquet(run / "sample/tables/pairs.parquet")
            ),
            "run has no pairs",
        ),
    ],
)
@pytest.mark.slow
def test_damage_is_named_not_fatal(run, tmp_path, hurt, says):
    hurt(run)
    report = render(run, tmp_path / "out")
    check_silent(report.parent)
    assert says in report.read_text(encoding="utf-8")


def test_budget(run, tmp_path):
    rng = random.Random(1)
    pd.DataFrame(dict(score=[rng.random() for _ in range(1_200_000)])).to_parquet(run / "score/tables/huge.parquet")
    pd.DataFrame(dict(image=[b"bytes"])).to_parquet(run / "score/tables/images.parquet")
    report = render(run, tmp_path / "out")
    assert size(report.parent) < LIMIT and "would grow over 6 MB: score/tables/huge.parquet." in report.read_text(
        encoding="utf-8"
    )
    assert (report.parent / "score/tables/scores.parquet").exists() and not (
        report.parent / "score/tables/images.parquet"
    ).exists()


def test_only_reports_are_replaced(run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for out in (home, run, home / "thesis.txt"):
        with pytest.raises(ReportError, match="is not a report"):
            render(run, out)
    with pytest.raises(ReportError, match="no run folder"):
        render(tmp_path / "nowhere", tmp_path / "out")
    assert (home / "thesis.txt").read_text() == "years of work"
    render(run, tmp_path / "out")
    (tmp_path / "out" / "old.txt").write_text("")
    render(run, tmp_path / "out")
    assert not (tmp_path / "out" / "old.txt").exists() and {p.name for p in tmp_path.iterdir()} == {
        "toy",
        "home",
        "out",
    }


def test_failure_leaves_the_old_report(run, tmp_path, monkeypatch):
    before = render(run, tmp_path / "out").read_bytes()

    def full(*a, **k):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfalign.report.render.copy_tables", full)
    with pytest.raises(ReportError, match="No space left"):
        render(run, tmp_path / "out")
    assert (tmp_path / "out/index.html").read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {
        "toy",
        "out",
    }


def chromium():
    return next((p for o in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(o))), None)


def browse(page, tmp, *flags):
    "Run headless Chromium on a page; returns what it printed"
    quiet = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars"""
    done = subprocess.run(
        [chromium(), *quiet.split(), f"--user-data-dir={tmp / 'profile'}", "--virtual-time-budget=4000", *flags, page],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    return done.stdout


needs_browser = pytest.mark.skipif(
    not chromium(), reason="there is no Chromium here: the page is not opened (install Debian package `chromium`)"
)


@needs_browser
def test_page_in_a_browser(report, tmp_path):
    "Captions did nothing, the gallery sorts by difference, and the page can be seen"
    script = """sort.value = "s0d"; sort.dispatchEvent(new Event("change"))
    subset.value = "1"; subset.dispatchEvent(new Event("change"))"""
    page = report.read_text(encoding="utf-8")
    driven = report.parent / "driven.html"
    driven.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"<script>{script}</script></body>"),
        encoding="utf-8",
    )
    try:
        dom = browse(driven.as_uri(), tmp_path, "--dump-dom")
    finally:
        driven.unlink()
    assert "stolen" not in re.search("<title>(.*?)</title>", dom)[1] and "of 13 pairs" in dom or "of 14 pairs" in dom
    cards = re.findall(r'<li class="card"[^>]*>', dom)
    seen = [o for o in cards if 'hidden=""' not in o]
    gains = [float(re.search('data-s0d="(.*?)"', o)[1]) for o in seen]
    assert (
        len(cards) == 40
        and 13 <= len(seen) <= 14
        and all('data-subset="1"' in o for o in seen)
        and gains == sorted(gains, reverse=True)
    )


@needs_browser
@pytest.mark.slow
def test_own_script_runs_and_page_is_not_blank(report, tmp_path):
    "The content policy lets our script run from file://, and the images load"
    dom = browse(report.as_uri(), tmp_path, "--dump-dom")
    assert (
        "24 of 40 pairs" in dom
        and dom.count('<li class="card"') == 40
        and "stolen" not in re.search("<title>(.*?)</title>", dom)[1]
    )
    unfolded = report.parent / "unfolded.html"
    unfolded.write_text(report.read_text(encoding="utf-8").replace("<details", "<details open"), encoding="utf-8")
    browse(unfolded.as_uri(), tmp_path, "--window-size=1200,9000", f"--screenshot={tmp_path / 'page.png'}")
    unfolded.unlink()
    img = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {c for _, c in img.getcolors(1 << 24)}
    reddish = sum(n for n, (r, g, b) in img.getcolors(1 << 24) if r > 180 and g < 90 and b < 90)
    assert img.size == (1200, 9000) and len(colours) > 500 and reddish > 200
