"Images, pairs and readers: bad input is listed or refused; samples can be drawn again."

import io, json, os, struct, tarfile, zlib
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from selfalign.data.images import ImageProblem, file_name, fit_square, open_image, pixel_hash, save_png
from selfalign.data.pairs import (
    PAIR_COLUMNS,
    PairsError,
    check_pairs,
    clean_caption,
    disjoint_subsets,
    image_path,
    pairs_table,
    seeded_order,
    seeded_positions,
    split_by_scene,
    image_place,
)
from selfalign.data.readers import SourceError, read_image
from selfalign.data.sources import open_pairs
from selfalign.data.sampling import draw, pair_row, with_noise


def image(size=(40, 24), mode="RGB", seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def encoded(img, kind="PNG", **kw):
    out = io.BytesIO()
    img.save(out, kind, **kw)
    return out.getvalue()


# Images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_formats_open_as_rgb(kind):
    img = open_image(encoded(image(), kind))
    assert img.mode == "RGB"
    assert img.size == (40, 24)
    assert img.info == dict(remarks=[])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_is_a_problem(kind, share):
    data = encoded(image((200, 200)), kind)
    with pytest.raises(ImageProblem) as e:
        open_image(data[: int(len(data) * share)])
    assert e.value.what
    assert e.value.remedy


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not an image|damaged"),
        (os.urandom(400), "not an image"),
    ],
)
def test_what_is_no_image(data, said):
    with pytest.raises(ImageProblem, match=said):
        open_image(data, name="cat.jpg")


def bomb(w, h):
    "A small PNG that claims to be enormous."

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000, 2**31 - 1])
def test_bombs_refused_before_unpacking(side):
    with pytest.raises(ImageProblem, match="pixels"):
        open_image(bomb(side, side))


def test_cmyk_sixteen_bit_alpha_and_animation_are_remarked():
    cmyk = open_image(encoded(image(mode="CMYK"), "JPEG"))
    assert cmyk.mode == "RGB"
    assert "CMYK" in cmyk.info["remarks"][0]
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    deep = open_image(encoded(Image.fromarray(grey)))
    assert np.abs(np.asarray(deep)[..., 0].astype(int) - np.round(grey / 257).astype(int)).max() <= 1
    assert "scaled to 8 bits" in deep.info["remarks"][0]
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    moving = open_image(encoded(image(), "GIF", save_all=True, append_images=[image(seed=1), image(seed=2)]))
    assert "first of 3 frames" in moving.info["remarks"][0]


def test_mislabelled_is_remarked_and_upright_is_turned():
    assert open_image(encoded(image(), "PNG"), name="x.jpg").info["remarks"] == ["named .jpg but holds PNG"]
    exif = Image.Exif()
    exif[0x0112] = 8
    assert open_image(encoded(image(), "JPEG", exif=exif)).size == (24, 40)


def test_missing_file_is_a_problem(tmp_path):
    with pytest.raises(ImageProblem, match="No such file"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (63, 64), (640, 480), (31, 900)])
@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
def test_any_shape_fits(size, mode):
    assert fit_square(Image.new("RGB", size, "red"), 64, mode).size == (64, 64)


def test_crop_equals_the_transforms_of_clip():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    reference = Compose([Resize(64, interpolation=InterpolationMode.BICUBIC), CenterCrop(64)])
    for size in ((200, 130), (77, 131), (64, 90), (50, 51), (641, 480)):
        img = image(size)
        assert np.array_equal(np.asarray(fit_square(img, 64, "crop")), np.asarray(reference(img))), size


def test_crop_equals_the_transforms_of_timm():
    from timm.data import create_transform

    for mode, theirs in dict(crop="center", squash="squash").items():
        reference = create_transform(56, interpolation="bilinear", crop_pct=0.875, crop_mode=theirs)
        for size in ((200, 130), (56, 56), (77, 131), (641, 480)):
            img = image(size)
            ours = fit_square(img, 56, mode, between=64, filter="bilinear")
            assert np.array_equal(np.asarray(ours), np.asarray(reference.transforms[1](reference.transforms[0](img))))


def test_proportions_kept_when_padded():
    disc = fit_square(Image.new("RGB", (128, 64), "red"), 64, "pad")
    assert np.all(np.asarray(disc)[16:48] == (255, 0, 0))
    assert np.all(np.asarray(disc)[:15] == 128)


def test_png_is_whole_or_not_there(tmp_path):
    class Broken(Image.Image):
        def save(self, path, *a, **kw):
            open(path, "wb").write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        save_png(Broken(), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


@given(st.text(min_size=1))
def test_file_names_stay_in_their_folder(key):
    name = file_name(key)
    assert "/" not in name
    assert "\\" not in name
    assert not name.startswith(".")
    assert len(name) < 120
    assert name.isascii()
    assert name.isprintable()


def test_different_keys_have_different_file_names():
    keys = ["a/b", "a_b", "a\\b", "a b", "../a", "a"]
    assert len({file_name(k) for k in keys}) == len(keys)


# Captions and tables


@given(st.text(max_size=300))
@settings(max_examples=300)
def test_clean_captions_are_harmless(text):
    clean, remarks = clean_caption(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in clean)
    assert clean == clean.strip() and "<script" not in clean.lower() or "<" in text or "&" in text
    assert (clean == "") == ("no caption" in remarks)


@pytest.mark.parametrize(
    "text, clean, remark",
    [
        ("a \x1b[31mred\x1b[0m cat", "a red cat", "terminal escapes"),
        ("\x1b]0;owned\x07a cat", "a cat", "terminal escapes"),
        ("\x1b]8;;file:///etc/passwd\x1b\\a cat\x1b]8;;\x1b\\", "a cat", "terminal escapes"),
        ("<b>a</b> cat", "a cat", "HTML"),
        ("a <img src=x onerror=alert(1)> cat", "a cat", "HTML"),
        ("a<script>alert(1)</script> cat", "a cat", "script"),
        ("a\x00cat", "a cat", "control"),
        ("a \u202etac", "a tac", "control"),
        (None, "", "no caption"),
        ("  \n ", "", "no caption"),
        (float("nan"), "", "no caption"),
        ("word " * 10_000, None, "10000 words"),
        ("x" * 100_000, None, "100000 letters"),
    ],
)
def test_hostile_captions(text, clean, remark):
    got, remarks = clean_caption(text)
    assert clean is None or got == clean
    assert any(remark in r for r in remarks)
    assert len(got) <= 4096


def test_ordinary_captions_are_left_alone():
    for text in ("a cat", "zwei Kätzchen – 小猫 🐱", "size < 3 and > 1", "tom & jerry", 'l\'été "bleu"'):
        assert clean_caption(text) == (text, [])


def test_clean_is_quick_on_hostile_input():
    import time

    started = time.process_time()
    clean_caption("<script " * 200_000)
    clean_caption("\x1b[" * 500_000)
    clean_caption("<!--" * 300_000)
    assert time.process_time() - started < 5


def test_check_pairs_lists_everything(tmp_path):
    save_png(image(), tmp_path / "a.png")
    rows = [
        ("a", "a.png", "a cat"),
        ("a", "a.png", "again"),
        ("b", "b.png", "gone"),
        ("c", "../a.png", "out"),
        ("d", "/etc/passwd", "out"),
        ("e", "a.png", "  "),
        ("f", "a.png", "<b>bold</b>"),
        (None, "a.png", "no key"),
    ]
    kept, problems = check_pairs(pd.DataFrame(rows, columns=["key", "image", "caption"]), tmp_path)
    assert list(kept.key) == ["a", "f"]
    assert kept.caption[1] == "bold"
    assert list(kept.columns) == list(PAIR_COLUMNS)
    what = " | ".join(p["what"] for p in problems)
    for said in ("duplicate key", "is not there", "leaves the folder", "no caption", "HTML removed", "no key"):
        assert said in what
    assert len(problems) == 7
    assert all(p["remedy"] for p in problems)


def test_missing_columns_name_the_nearest():
    with pytest.raises(PairsError, match="did you mean 'captions'"):
        check_pairs(pd.DataFrame(dict(key=["a"], image=["b"], captions=["c"])), ".")


def test_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_png(image(), tmp_path / "secret.png")
    (tmp_path / "in/x.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(PairsError, match="leaves"):
        image_path("x.png", tmp_path / "in")


@given(st.sets(st.text(max_size=8), min_size=6, max_size=60), st.integers(0, 5))
def test_subsets_are_disjoint_and_stable(keys, seed):
    size = len(keys) // 3
    subsets = disjoint_subsets(keys, 3, size, seed)
    assert [len(s) for s in subsets] == [size] * 3
    assert len({k for s in subsets for k in s}) == 3 * size
    assert subsets == disjoint_subsets(list(keys)[::-1], 3, size, seed)


def test_another_seed_is_another_sample():
    keys = [str(i) for i in range(1000)]
    assert len(set(seeded_order(keys, 0)[:100]) & set(seeded_order(keys, 1)[:100])) < 30
    assert seeded_order(keys, 0)[:3] == seeded_order(keys, 0)[:3] != seeded_order(keys, 1)[:3]


@given(st.sets(st.text(max_size=8), max_size=60), st.integers(0, 5))
def test_order_is_that_of_the_hashes(keys, seed):
    "Positions from packed digests are the order of the digests themselves."
    import hashlib

    keys = list(keys)
    by_hash = sorted(keys, key=lambda k: hashlib.sha256(f"{seed}/{k}".encode("utf-8", "surrogatepass")).digest())
    assert seeded_order(keys, seed) == by_hash
    assert [keys[i] for i in seeded_positions(iter(keys), seed)] == by_hash


def test_splits_follow_scenes():
    df = pairs_table(
        [dict(key=f"{s}-{i}", image="x", caption="c", scene=f"s{s}") for s in range(50) for i in range(s % 4 + 1)]
    )
    split = split_by_scene(df, dict(train=0.8, validation=0.1, test=0.1), 3)
    assert split.groupby(df.scene).nunique().max() == 1
    assert df.scene.groupby(split).nunique().to_dict() == dict(train=40, validation=5, test=5)
    with pytest.raises(PairsError, match="add up"):
        split_by_scene(df, dict(train=0.8), 0)


# Readers


def shard(path, members):
    with tarfile.open(path, "w") as t:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                t.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


def sample(i, **more):
    return [(f"{i:04d}.png", encoded(image(seed=i))), (f"{i:04d}.txt", f"caption {i}".encode())]


@pytest.fixture
def hostile(tmp_path):
    link = tarfile.TarInfo("0009.png")
    link.type = tarfile.SYMTYPE
    link.linkname = "/etc/passwd"
    hard = tarfile.TarInfo("0010.png")
    hard.type = tarfile.LNKTYPE
    hard.linkname = "../../x"
    device = tarfile.TarInfo("0011.png")
    device.type = tarfile.CHRTYPE
    good = encoded(image(seed=50))
    shard(
        tmp_path / "a.tar",
        sample(0)
        + sample(1)
        + [
            ("../../evil.png", b"x"),
            ("/etc/evil.txt", b"x"),
            ("0009.png", link),
            ("0010.png", hard),
            ("0011.png", device),
            ("0002.png", b""),
            ("0002.txt", b"empty image"),
            ("0003.png", good),
            ("0003.txt", b"\xff\xfe caption"),
            ("0004.png", encoded(image(seed=4))),
            ("0005.txt", b"no image"),
            ("0006.jpg", encoded(image(seed=6))),
            ("0006.json", json.dumps(dict(caption="from json", captions=["p", "q"], scene="s")).encode()),
            ("0007.png", encoded(image(seed=7))),
            ("0007.txt", b"broken json"),
            ("0007.json", b"{" * 5000),
            ("0008.png", encoded(image(seed=0))),
            ("0008.txt", b"same pixels as 0"),
        ],
    )
    shard(tmp_path / "b.tar", sample(1) + sample(20))
    return open_pairs(f"webdataset:{tmp_path}")


def test_hostile_archive_is_listed(hostile):
    what = {p["row"]: p["what"] for p in hostile.problems}
    assert "leaves the archive" in what["../../evil.png"]
    assert "leaves the archive" in what["/etc/evil.txt"]
    assert "link" in what["0009.png"]
    assert "link" in what["0010.png"]
    assert "no plain file" in what["0011.png"]
    assert what["0005"] == "no image"
    assert what["0004"] == "no caption"
    assert what["0001"] == "duplicate key"
    assert sorted(hostile.keys) == ["0000", "0001", "0002", "0003", "0006", "0007", "0008", "0020"]


def test_records_of_an_archive(hostile):
    records = {r["key"]: r for r in hostile}
    assert records["0002"]["image"] is None
    assert "empty" in records["0002"]["problem"]["what"]
    assert any("UTF-8" in r for r in records["0003"]["remarks"])
    assert any("JSON" in r for r in records["0007"]["remarks"])
    six = records["0006"]
    assert (six["caption"], six["scene"], json.loads(six["captions"]), six["aligned"]) == (
        "from json",
        "s",
        ["p", "q"],
        None,
    )
    assert six["remarks"] == ["named .jpg but holds PNG"]
    assert read_image(six["reference"], ".").tobytes() == six["image"].tobytes()
    assert image_place(six["reference"])[1] == "0006.jpg"


def test_draw_lists_what_it_leaves_out(hostile, tmp_path):
    listed = []
    with pytest.raises(PairsError, match="6 usable pairs of 8"):
        list(draw(hostile, 8, report=lambda **p: listed.append(p)))
    what = " | ".join(p["what"] for p in listed)
    for said in ("the file is empty", "same image was taken", "not UTF-8", "it is a link", "duplicate key"):
        assert said in what
    taken = list(draw(hostile, 6))
    assert len({r["sha256"] for r in taken}) == 6
    assert pair_row(taken[0], 0, tmp_path)["image"].endswith((".png", ".jpg"))
    assert not (tmp_path / "images").exists()


def test_truncated_archive_keeps_what_came_before(tmp_path):
    path = shard(tmp_path / "x.tar", [m for i in range(5) for m in sample(i)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    source = open_pairs(f"webdataset:{path}")
    assert 0 < len(source) < 5
    assert any("damaged" in p["what"] for p in source.problems)
    assert all(r["image"] or r["problem"] for r in source)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_archive(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(SourceError, match="x.tar: no"):
        open_pairs(f"webdataset:{tmp_path}/x.tar")


def test_patterns_name_shards(tmp_path):
    for i in range(3):
        shard(tmp_path / f"{i:05d}.tar", sample(i))
    assert len(open_pairs(f"webdataset:{tmp_path}/{{00000..00001}}.tar")) == 2
    assert len(open_pairs(f"webdataset:{tmp_path}/*.tar")) == 3
    with pytest.raises(SourceError, match="holds 00000.tar"):
        open_pairs(f"webdataset:{tmp_path}/none-*.tar")


@pytest.mark.parametrize(
    "source, said",
    [
        ("microwrold:study", "microworld"),
        ("microworld:stduy", "unknown pool"),
        ("microworld:study?nose=1", "did you mean 'noise'"),
        ("microworld:study?noise=lots", "no float"),
        ("microworld:study?noise=3", "probability"),
        ("webdataset:data/nowhere-at-all", "no tar archives"),
    ],
)
def test_sources_refused(source, said):
    with pytest.raises(SourceError, match=said):
        open_pairs(source)


def test_microworld_is_the_same_every_time():
    a, b = open_pairs("microworld:study?noise=0.5&count=40"), open_pairs("microworld:study?noise=0.5&count=40")
    assert len(a) == 40
    assert a.keys == [r["key"] for r in a]
    assert [(r["caption"], r["aligned"], pixel_hash(r["image"])) for r in a if r["image"]] == [
        (r["caption"], r["aligned"], pixel_hash(r["image"])) for r in b if r["image"]
    ]


def test_noise_reaches_the_source():
    assert with_noise("microworld:study", 0.0) == "microworld:study?noise=0.0"
    clean = open_pairs(with_noise("microworld:study?count=60", 0.0))
    assert all(r["aligned"] and not r["problem"] for r in clean)
