"Readers and writers beside other libraries: the same rows, the same records after writing, memory that stays."

import csv, io, json, os, tracemalloc
import pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from selfalign.data import streams, tables
from selfalign.data.readers import SourceError, make_record, read_image
from selfalign.data.sources import look, open_pairs, parse_source
from selfalign.data.streams import JsonText, csv_rows, list_entries
from selfalign.data.tables import TablePairs, as_row
from selfalign.data.writers import layouts, write_pairs

# --- the same as json and csv -----------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=4), x, max_size=4),
    max_leaves=12,
)


class Pieces(io.StringIO):
    "A file that gives a few letters at a time."

    size = 1

    def read(self, n=-1):
        return super().read(self.size)


@given(st.lists(values, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]))
def test_json_in_pieces_is_json(x, size, indent):
    file = Pieces(json.dumps(x, indent=indent))
    file.size = size
    assert [(n, v) for _, n, v in list_entries(JsonText(file), "")] == list(enumerate(x))


@given(
    st.lists(
        st.lists(
            st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=8)
            | st.sampled_from(["a, b", 'say "hi"', "two\nlines", '"', "\t"]),
            min_size=2,
            max_size=4,
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(",\t;"),
)
@settings(deadline=None)
def test_tables_are_what_csv_wrote(tmp_path_factory, rows, separator):
    path = tmp_path_factory.getbasetemp() / "x.csv"
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, delimiter=separator).writerows(rows)
    assert [cells for _, cells in csv_rows(path, separator)] == [r for r in rows]


def test_tables_of_pandas(tmp_path):
    "train_with_cap.csv as the published code of Self-Align writes it."
    df = pd.DataFrame(
        dict(file=[f"{i}.jpg" for i in range(40)], caption=[f'a "good", long; caption\twith\n{i}' for i in range(40)])
    )
    df.to_csv(tmp_path / "train_with_cap.csv", sep="\t", index=False)
    pairs = open_pairs(str(tmp_path))
    assert [pairs[i]["caption"] for i in range(len(pairs))] == list(df.caption)
    assert list(pairs.keys) == list(df.file)


# --- written and opened by looking ------------------------------------------------------------------------------------


class Records(list):
    problems = []


def records(n, key="k{}", captions=None):
    return Records(
        make_record(
            key.format(i),
            Image.new("RGB", (8 + i, 6), (40 * i, 5, 9)),
            "",
            "",
            caption=f'caption {i} "ü" 小猫',
            caption_source="human",
            scene=f"s{i // 2}",
            captions=json.dumps(captions or [f'caption {i} "ü" 小猫', "another"]),
        )
        for i in range(n)
    )


def said(r):
    return {k: r[k] for k in ("key", "caption", "scene", "caption_source", "width", "height")} | dict(
        captions=json.loads(r["captions"]), pixels=r["image"].tobytes()
    )


@pytest.mark.parametrize("format", layouts)
@pytest.mark.parametrize("key", ["k{}", "{}", "00{}", "a-{}_b"])
def test_round_trip(tmp_path, format, key):
    written = records(5, key)
    assert write_pairs(written, tmp_path / "x", format) == []
    pairs = open_pairs(str(tmp_path / "x"))
    assert [said(r) for r in pairs] == [said(r) for r in written]
    assert pairs.problems == []
    assert all(read_image(r["reference"], ".").tobytes() == w["image"].tobytes() for r, w in zip(pairs, written))


@pytest.mark.parametrize("format", ["webdataset", "metadata"])
def test_kinds_of_captions_are_kept(tmp_path, format):
    write_pairs(records(2, captions=dict(short="a", long="b")), tmp_path / "x", format)
    assert json.loads(open_pairs(str(tmp_path / "x"))[1]["captions"]) == dict(short="a", long="b")


@pytest.mark.parametrize("format", layouts)
@pytest.mark.parametrize("key", ["../up{}", "a/b{}.jpg", ".hidden{}", "a.b{}", "ü {}"])
def test_odd_keys_stay_in_the_folder(tmp_path, format, key):
    write_pairs(records(3, key), tmp_path / "in/x", format)
    assert len(open_pairs(str(tmp_path / "in/x"))) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["x"]


@pytest.mark.parametrize("format", layouts)
def test_interrupted_writing_leaves_nothing(tmp_path, format):
    class Broken(Records):
        def __getitem__(self, i):
            if i == 3:
                raise KeyboardInterrupt
            return super().__getitem__(i)

    with pytest.raises(KeyboardInterrupt):
        write_pairs(Broken(records(5)), tmp_path / "x", format)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path):
    write_pairs(records(1), tmp_path / "x")
    with pytest.raises(SourceError, match="already there"):
        write_pairs(records(1), tmp_path / "x")
    with pytest.raises(SourceError, match="did you mean 'coco'"):
        write_pairs(records(1), tmp_path / "y", "cocoa")


def test_damaged_pairs_are_not_written(tmp_path):
    good = records(3)
    good[1] = make_record("bad", b"", "bad.jpg", "x.tar", caption="a cat")
    problems = write_pairs(good, tmp_path / "x")
    assert [(p["row"], p["what"]) for p in problems] == [("bad", "the file is empty")]
    assert list(open_pairs(str(tmp_path / "x")).keys) == ["k0", "k2"]


def test_other_libraries_read_the_shards(tmp_path):
    import webdataset

    written = records(4)
    write_pairs(written, tmp_path / "x")
    found = list(webdataset.WebDataset(str(tmp_path / "x/00000.tar"), shardshuffle=False).decode("pil"))
    assert [(x["__key__"], x["txt"], x["png"].tobytes()) for x in found] == [
        (r["key"], r["caption"], r["image"].tobytes()) for r in written
    ]


def test_more_than_one_shard(tmp_path):
    from selfalign.data.writers import write_shards

    write_shards(iter(records(7)), tmp_path, per_shard=3)
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert list(open_pairs(str(tmp_path)).keys) == [f"k{i}" for i in range(7)]


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "images/"])
def test_both_layouts_of_llava(tmp_path, below):
    path = tmp_path / f"{below}00453/004539375.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(path)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a mattress"}]
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text(
        json.dumps([dict(id="004539375", image="00453/004539375.jpg", conversations=turns)])
    )
    (tmp_path / "blip_laion_cc_sbu_558k_meta.json").write_text(
        json.dumps(
            [dict(id="004539375", image="00453/004539375.jpg", blip_caption="a bed", url="x", caption="web text")]
        )
    )
    pairs = open_pairs(str(tmp_path))
    assert pairs.source.kind == "llava"
    assert pairs[0]["caption"] == "a mattress"
    assert pairs[0]["image"].size == (5, 4)
    assert pairs.problems == []
    meta = tmp_path / "blip_laion_cc_sbu_558k_meta.json"
    assert open_pairs(str(meta))[0]["caption"] == "a bed"
    assert open_pairs(f"llava:{meta}?caption_column=caption&caption_source=web")[0]["caption"] == "web text"


def test_sidecars_of_img2dataset_do_not_confuse(tmp_path):
    write_pairs(records(2), tmp_path / "x")
    pd.DataFrame(dict(url=["http://x.org"], caption=["c"])).to_parquet(tmp_path / "x/00000.parquet")
    (tmp_path / "x/00000_stats.json").write_text('{"count": 2}')
    assert [s.kind for s in look(tmp_path / "x")] == ["webdataset"]


@pytest.mark.parametrize(
    "source,said",
    [
        ("data/nowhere", "no such file"),
        ("coco:data/nowhere", "no such file"),
        ("webdataset:{0..", "no tar archives|no pattern"),
        ("auto:", "no such file"),
        ("", "no such file"),
        ("x:y", "unknown kind"),
    ],
)
def test_refused(source, said):
    with pytest.raises(SourceError, match=said):
        parse_source(source) if not source.startswith("web") else open_pairs(source)


def test_options_are_checked(tmp_path):
    (tmp_path / "a.csv").write_text("image,caption\na.jpg,b\n")
    with pytest.raises(SourceError, match="did you mean 'caption_column'"):
        open_pairs(f"{tmp_path}/a.csv?caption_colum=x")
    with pytest.raises(SourceError, match="did you mean 'caption'"):
        open_pairs(f"{tmp_path}/a.csv?caption_column=captoin")
    with pytest.raises(SourceError, match="no such folder"):
        open_pairs(f"{tmp_path}/a.csv?images=nowhere")


@pytest.mark.parametrize("format", layouts)
def test_captions_without_their_images(tmp_path, format, monkeypatch):
    "What is told is what the record says, and no image is opened for it; not even a damaged one."
    from selfalign.data import readers

    written = records(4)
    write_pairs(written, tmp_path / "x", format)
    pairs = open_pairs(str(tmp_path / "x"))
    full = [pairs[i] for i in range(4)]
    monkeypatch.setattr(readers, "open_image", lambda *a, **k: pytest.fail("an image was opened"))
    for i, r in enumerate(full):
        assert pairs.told(i) == r | dict(image=None, width=None, height=None)


def test_the_microworld_tells():
    assert open_pairs("microworld:study").told(3) == open_pairs("microworld:study")[3] | dict(image=None)


# --- memory and the file system ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pairs(tmp_path):
    "What Python and NumPy hold is a few numbers a pair, and opening holds a batch of rows at a time."
    pairs = lambda n: TablePairs(
        "x", "x", (as_row(f"[{i}]", i, f"{i:09d}.jpg", f"caption {i} " + "x" * 60) for i in range(n)), [tmp_path]
    )
    pairs(1000)
    tracemalloc.start()
    many = pairs(60_000)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(many) == 60_000
    assert held < 60_000 * 40
    assert peak < 20e6


def test_opening_looks_for_few_images(tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr(tables.os.path, "isfile", lambda p: looked.append(p) or False)
    pairs = TablePairs(
        "x", "x", (as_row(f"[{i}]", i, f"{i}.jpg", "a cat") for i in range(5000)), [tmp_path, tmp_path / "images"]
    )
    assert len(looked) == 128
    assert "none of the first images is there" in pairs.problems[0]["what"]
    assert pairs.coverage()["there"] == 0
    assert len(looked) == 128 + 5000


def test_temporary_files_go_with_the_pairs(tmp_path):
    pairs = TablePairs("x", "x", iter([as_row("1", 1, "a.jpg", "a cat")]), [tmp_path])
    there = pairs.on_disk.parent
    assert os.path.isdir(there)
    del pairs
    import gc

    gc.collect()
    assert not os.path.exists(there)
