"""Bad files over all readers: refused with a remedy, or listed with file and row while the good pairs around it stay.

Every case writes one bad file into a collection that is good otherwise. Cases are generated from tables of what can be
wrong with captions, paths, images and the files themselves; hypothesis adds random and mutated files."""

import gzip, hashlib, io, json, os, re, struct, tarfile, tempfile, zlib
from collections import Counter
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from selfalign.data.readers import Problems
from selfalign.data.sources import open_pairs, survey
from selfalign.study.settings import StudyError


def encoded(kind="JPEG", mode="RGB", size=(24, 16), seed=0, **kw):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode).save(
        out, kind, **kw
    )
    return out.getvalue()


IMAGE = encoded()
GOOD = [("k1", "one.jpg", "a good cat"), ("k2", "two.jpg", "a good dog"), ("k3", "three.jpg", "a good cow")]
CAPTIONS = {c for _, _, c in GOOD}

# --- how a good collection looks in each reader -----------------------------------------------------------------------


def plain(x):
    return json.dumps(x, ensure_ascii=False).encode("utf-8", "surrogatepass")


def cell(x, sep=","):
    return '"' + x.replace('"', '""') + '"' if any(c in x for c in (sep, '"', "\n")) else x


def lines(*rows, sep=","):
    return "".join(sep.join(cell(c, sep) for c in r) + "\n" for r in rows).encode("utf-8", "surrogateescape")


def chat(k, i, c):
    return dict(
        id=k, image=i, conversations=[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": c}]
    )


FORMS = {
    "llava": ("chat.json", lambda rows: plain([chat(*r) for r in rows])),
    "coco": (
        "captions_x.json",
        lambda rows: plain(
            dict(
                images=[dict(id=k, file_name=i) for k, i, _ in rows],
                annotations=[dict(id=n, image_id=k, caption=c) for n, (k, _, c) in enumerate(rows)],
            )
        ),
    ),
    "karpathy": (
        "dataset_x.json",
        lambda rows: plain(dict(images=[dict(filename=i, split="test", sentences=[dict(raw=c)]) for _, i, c in rows])),
    ),
    "json": ("pairs.json", lambda rows: plain([dict(key=k, image=i, caption=c) for k, i, c in rows])),
    "jsonl": (
        "metadata.jsonl",
        lambda rows: b"".join(plain(dict(key=k, file_name=i, text=c)) + b"\n" for k, i, c in rows),
    ),
    "csv": ("pairs.csv", lambda rows: lines(("key", "image", "caption"), *rows)),
    "tsv": ("pairs.tsv", lambda rows: lines(("key", "file", "caption"), *rows, sep="\t")),
    "sail": (
        "sail.csv",
        lambda rows: lines(
            ("raw_caption", "longSV_captions", "Image Path"), *((c, f"long: {c}", i) for _, i, c in rows)
        ),
    ),
    "flickr": ("x.token", lambda rows: "".join(f"{i}#0\t{c}\n" for _, i, c in rows).encode("utf-8", "surrogateescape")),
    "flickr30k": (
        "results.csv",
        lambda rows: ("image_name| comment_number| comment\n" + "".join(f"{i}| 0| {c}\n" for _, i, c in rows)).encode(
            "utf-8", "surrogateescape"
        ),
    ),
}
SCHEMES = dict(json="table", jsonl="table", csv="table", tsv="table", flickr30k="flickr")
JSON, TABLES = ("llava", "coco", "karpathy", "json"), ("csv", "tsv", "sail")


def tar_bytes(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(k, image=IMAGE, caption=b""):
    return [(f"{k}.jpg", image), (f"{k}.txt", caption)]


def shard(*extra):
    return tar_bytes([m for k, _, c in GOOD for m in sample(k, encoded(seed=ord(k[1])), c.encode())] + list(extra))


def cells(rows, **kw):
    image = pa.array([x for x, _ in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(dict(image=image, text=pa.array([c for _, c in rows], pa.string())))


def good_cells(*extra):
    return cells([(dict(bytes=IMAGE, path="x.jpg"), c) for *_, c in GOOD] + list(extra))


def parquet(table, **kw):
    out = io.BytesIO()
    pq.write_table(table, out, **kw)
    return out.getvalue()


def arrow(table):
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as w:
        w.write_table(table)
    return out.getvalue()


# --- the cases --------------------------------------------------------------------------------------------------------

# reader, what, name of the bad file, its content or a function that makes it, what must be said, if good pairs stay
CASES = []


def case(reader, what, name, content, said, stay=True):
    CASES.append((reader, what, name, content, said, stay))


WORDS = {
    "empty": ("", "no caption"),
    "blank": (" \t ", "no caption"),
    "10 000 words": ("word " * 10_000, "10000 words"),
    "one long word": ("x" * 100_000, "letters cut"),
    "HTML": ("<b>bold</b> cat", "HTML removed"),
    "a script": ("cat<script>alert(1)</script>", "script removed"),
    "only markup": ("<img src=x onerror=alert(1)>", "no caption"),
    "terminal escapes": ("\x1b[2J\x1b]0;owned\x07cat", "terminal escapes"),
    "a bell": ("cat\x07\x08", "control characters"),
    "NUL": ("cat\x00dog", "control characters"),
    "turned around": ("cat \u202egod", "control characters"),
    "Latin-1": ("caf\udce9", "UTF-8"),
}
for reader, (name, form) in FORMS.items():
    for what, (caption, said) in WORDS.items():
        rows = [GOOD[0], ("bad", "bad.jpg", caption), *GOOD[1:]]
        content = (
            form(rows)
            if "\udce9" not in caption
            else form([(k, i, c.replace("\udce9", "BYTE")) for k, i, c in rows]).replace(b"BYTE", b"\xe9")
        )
        case(reader, f"caption: {what}", name, content, said)

PATHS = {
    "up": ("../secret.jpg", "leaves the folder"),
    "up inside": ("a/../../secret.jpg", "leaves the folder"),
    "absolute": ("/etc/passwd", "leaves the folder"),
    "backslash": ("a\\b.jpg", "leaves the folder"),
    "drive": ("C:/x.jpg", "leaves the folder"),
    "an address": ("https://example.org/x.jpg", "address|leaves|plain file"),
    "NUL": ("a\0.jpg", "leaves the folder"),
    "endless": ("x" * 2000, "too long"),
    "empty": ("", "no image|no name"),
    "not there": ("gone.jpg", "not there"),
    "a folder": ("inside", "no plain file"),
    "a link that leads out": ("link.jpg", "leaves"),
}
for reader, (name, form) in FORMS.items():
    for what, (path, said) in PATHS.items():
        case(reader, f"path: {what}", name, form([GOOD[0], ("bad", path, "a bad one"), *GOOD[1:]]), said)


def bomb(side):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


IMAGES = {
    "empty": (b"", "the file is empty"),
    "cut off": (encoded(size=(200, 200))[:3000], "damaged"),
    "a web page": (b"<html>404 not found</html>", "not an image"),
    "random": (bytes(range(256)) * 4, "not an image"),
    "a bomb": (bomb(60_000), "pixels"),
    "enormous": (bomb(2**31 - 1), "pixels"),
    "only a header": (IMAGE[:4], "not an image|damaged"),
    "Postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00", "not an image"),
}
USED = {
    "CMYK": (encoded(mode="CMYK"), "CMYK"),
    "mislabelled": (encoded("PNG"), "named .jpg but holds PNG"),
    "animated": (encoded("GIF", save_all=True, append_images=[Image.new("RGB", (24, 16), "red")]), "first of 2 frames"),
}
deep = io.BytesIO()
Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)).save(deep, "PNG")
USED["16 bits"] = (deep.getvalue(), "scaled to 8 bits")
for what, (data, said) in {**IMAGES, **USED}.items():
    for reader, (name, form) in FORMS.items():
        case(reader, f"image: {what}", "bad.jpg", data, said)
    case("folder", f"image: {what}", "bad.jpg", data, said)
    case("webdataset", f"image: {what}", "0.tar", shard(*sample("bad", data, b"a bad one")), said)
    case(
        "parquet",
        f"image: {what}",
        "0.parquet",
        parquet(good_cells((dict(bytes=data, path="bad.jpg"), "a bad one"))),
        said if what != "mislabelled" else "",
    )
    case(
        "arrow",
        f"image: {what}",
        "0.arrow",
        arrow(good_cells((dict(bytes=data, path="bad.jpg"), "a bad one"))),
        said if what != "mislabelled" else "",
    )


def entries(reader, bad):
    "A file of good entries with a raw piece of JSON among them."
    whole = FORMS[reader][1](GOOD)
    at = whole.index(b"}, {") + 3 if reader != "llava" else whole.index(b'}]}, {"id"') + 5
    return whole[:at] + bad + b", " + whole[at:]


for reader in JSON:
    name, form = FORMS[reader]
    good = form(GOOD)
    for what, bad in {
        "a number": b"7",
        "null": b"null",
        "a list": b"[1, 2]",
        "a text": b'"text"',
        "true": b"true",
    }.items():
        case(reader, f"entry: {what}", name, entries(reader, bad), "no object")
    for what, bad in {
        "nothing in it": b"{}",
        "NaN": b'{"id": NaN, "image": NaN, "caption": NaN}',
        "wrong types": b'{"id": [1], "image": {"a": 1}, "conversations": 3, "sentences": "x"}',
        "numbers": b'{"id": 1e999, "image": 5, "filename": 5, "file_name": 6}',
        "lone surrogate": b'{"id": "\\ud800", "image": "\\udfff.jpg", "filename": "\\udfff.jpg", '
        b'"file_name": "\\udfff.jpg"}',
    }.items():
        case(
            reader,
            f"entry: {what}",
            name,
            entries(reader, bad),
            "no (key|image|caption)|is empty|not there|a caption without",
        )
    for what, bad in {
        "deeply nested": b"[" * 100_000,
        "single quotes": b"{'id': 1}",
        "a comment": b"// no",
        "two commas": b",",
        "an open text": b'"abc',
        "a bad escape": b'"\\x"',
        "a raw line break": b'"a\nb"',
        "leading zero": b"007",
    }.items():
        case(reader, f"syntax: {what}", name, entries(reader, bad), "damaged JSON", stay=reader != "coco" and "first")
    for what, bad in {"half": good[: len(good) // 2], "without its end": good[:-1]}.items():
        case(
            reader,
            f"cut: {what}",
            name,
            bad,
            "damaged JSON",
            stay=False if reader == "coco" and what == "half" else "first",
        )
    for what, bad in {"twice": good + good, "with words after it": good + b" end"}.items():
        case(reader, f"file: {what}", name, bad, "after the end")
    for what, bad in {
        "empty": b"",
        "blank": b" \n",
        "NULs": b"\0" * 40,
        "null": b"null",
        "a text": b'"hello"',
        "a number": b"42",
        "empty list": b"[]",
        "empty object": b"{}",
        "numbers": b"[1, 2, 3]",
        "UTF-16": good.decode().encode("utf-16"),
        "gzip": gzip.compress(good, mtime=0),
        "zip": b"PK\3\4" + good,
        "a web page": b"<!DOCTYPE html><html>404</html>",
        "binary": bytes(range(256)) * 8,
        "one bracket": b"[",
        "nested": b"[" * 200_000,
        "nested objects": b'{"a":' * 100_000,
    }.items():
        case(
            reader,
            f"file: {what}",
            name,
            bad,
            "empty|damaged|no pair|no usable|compressed|UTF-16|no object",
            stay=False,
        )
    case(
        reader,
        "key twice",
        name,
        form([*GOOD, (GOOD[0][0], "bad.jpg" if reader != "karpathy" else "one.jpg", "a bad one")])
        if reader != "karpathy"
        else good.replace(b'"raw": "a good cat"', b'"raw": ""'),
        "duplicate key|listed twice|no caption",
        stay=reader != "karpathy" and True or "some",
    )
    case(reader, "a folder in its place", name, "folder", "nothing known in it", stay=False)

for reader in TABLES:
    name, form = FORMS[reader]
    good = form(GOOD)
    sep = b"\t" if reader == "tsv" else b","
    head, *rest = good.split(b"\n")
    middle = b"\n".join([head, rest[0], b"BAD", *rest[1:]])
    for what, (bad, said) in {
        "too few cells": (b"x", "wrong number of cells"),
        "too many cells": (sep.join([b"x"] * 9), "wrong number of cells"),
        "other separators": (b"a;b;c", "wrong number of cells"),
        "only separators": (sep * 2, "no (image|key|caption)"),
        "quotation mark never closed": (b'"never' + sep + b"x", "quotation mark"),
        "marks that do not match": (sep.join([b'"a"b', b"x", b"y"]), "quotation marks|no row|cells"),
        "binary": (bytes(range(1, 9)) + b"\xff\xfe", "wrong number of cells"),
        "a very long line": (b"x" * 5_000_000, "too long"),
        "NULs": (b"\0\0\0", "wrong number of cells"),
        "a web page": (b"<html><body>404</body></html>", "wrong number of cells"),
    }.items():
        case(reader, f"row: {what}", name, middle.replace(b"BAD", bad), said)
    for what, (bad, said) in {
        "empty": (b"", "empty"),
        "blank": (b"\n\n\n", "empty"),
        "only names": (head + b"\n", "no pair"),
        "without names": (b"\n".join(rest), "no column|no pair|addresses"),
        "UTF-16": (good.decode().encode("utf-16"), "UTF-16"),
        "gzip": (gzip.compress(good, mtime=0), "compressed"),
        "no image column": (
            good.replace(b"image", b"x").replace(b"file", b"x").replace(b"Image Path", b"x"),
            "for the image|to hold the image|Image Path",
        ),
        "no caption column": (good.replace(b"caption", b"x"), "caption"),
        "a name twice": (
            head.replace(head.split(sep)[0], head.split(sep)[1], 1) + b"\n" + b"\n".join(rest),
            "comes twice",
        ),
        "a web page": (b"<html>\n<body>404</body>\n</html>", "column"),
        "binary": (bytes(range(256)) * 8, "column|no pair|cells|twice|quotation"),
    }.items():
        case(reader, f"file: {what}", name, bad, said, stay=False)
    case(reader, "a folder in its place", name, "folder", "nothing known in it", stay=False)
    case(
        reader,
        "same image, same caption",
        name,
        good + rest[0] + b"\n",
        "duplicate|same image with the same caption",
    )
for reader, head in (
    ("csv", "image,title,text\n"),
    ("csv", "image,file_name,caption\n"),
    ("tsv", "image\tcaption\ttext\n"),
):
    case(
        reader,
        f"two columns: {head.strip()}",
        FORMS[reader][0],
        (
            head + "one.jpg" + ("\t" if reader == "tsv" else ",") + "x" + ("\t" if reader == "tsv" else ",") + "y\n"
        ).encode(),
        "several columns",
        stay=False,
    )
case(
    "tsv",
    "addresses without names",
    "Train_GCC-training.tsv",
    b"a bus station\thttp://lh6.example.org/1.jpg\na dog\thttp://lh6.example.org/2.jpg\n",
    "img2dataset",
    stay=False,
)
case(
    "csv",
    "addresses with names",
    "pairs.csv",
    b"url,caption\nhttp://example.org/1.jpg,a dog\n",
    "img2dataset",
    stay=False,
)

good = FORMS["jsonl"][1](GOOD)
first, second, *_ = good.split(b"\n")
for what, (bad, said) in {
    "a number": (b"5", "no object"),
    "a list": (b"[1]", "no object"),
    "a text": (b'"x"', "no object"),
    "null": (b"null", "no object"),
    "no JSON": (b"hello", "damaged JSON"),
    "cut off": (second[:20], "damaged JSON"),
    "deeply nested": (b"[" * 100_000, "damaged JSON"),
    "two in a line": (second + second, "damaged JSON"),
    "nothing in it": (b"{}", "is empty"),
    "NaN": (b'{"key": NaN, "file_name": NaN, "text": NaN}', "no image"),
    "a very long line": (b'"' + b"x" * 5_000_000 + b'"', "too long"),
    "binary": (b"\xff\x00\x01", "damaged JSON"),
    "key twice": (plain(dict(key="k1", file_name="bad.jpg", text="x")), "duplicate key"),
    "caption is an object": (b'{"key": "b", "file_name": "bad.jpg", "text": {"a": 1}}', "no caption"),
    "caption is a list of numbers": (b'{"key": "b", "file_name": "bad.jpg", "text": [1, 2]}', "no caption"),
}.items():
    case(
        "jsonl",
        f"row: {what}",
        "metadata.jsonl",
        first + b"\n" + second + b"\n" + bad + b"\n" + good[len(first) + len(second) + 2 :]
        if what != "key twice"
        else good + bad,
        said,
    )
for what, bad in {
    "empty": b"",
    "numbers": b"1\n2\n",
    "UTF-16": good.decode().encode("utf-16"),
    "a list over lines": b"[\n{},\n{}\n]",
    "a web page": b"<html>\n</html>",
}.items():
    case("jsonl", f"file: {what}", "metadata.jsonl", bad, "empty|no usable|UTF-16|no pair|no column", stay=False)

for reader in ("flickr", "flickr30k"):
    name, form = FORMS[reader]
    good = form(GOOD)
    for what, bad in {
        "no number": b"bad.jpg\tcaption",
        "no tab": b"bad.jpg#0 caption",
        "no separator": b"bad.jpg| 4   A dog runs .",
        "words": b"nonsense",
        "binary": b"\xff\xfe\x00",
        "NULs": b"\0" * 9,
        "a long line": b"x" * 5_000_000,
        "number is a word": b"bad.jpg#one\tcaption| two| x",
    }.items():
        case(reader, f"row: {what}", name, good + bad + b"\n", "no name, number and caption")
    for what, bad in {
        "empty": b"",
        "blank": b"\n\n",
        "UTF-16": good.decode().encode("utf-16"),
        "gzip": gzip.compress(good, mtime=0),
        "a web page": b"<html>404</html>",
        "only a name": b"image_name| comment_number| comment\n",
    }.items():
        case(reader, f"file: {what}", name, bad, "empty|UTF-16|compressed|no usable|no pair", stay=False)


def link(name, to, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = to
    return name, info


for what, (extra, said) in {
    "up": ([("../../evil.jpg", IMAGE)], "leaves the archive"),
    "absolute": ([("/etc/evil.jpg", IMAGE)], "leaves the archive"),
    "backslash": ([("a\\b.jpg", IMAGE)], "leaves the archive"),
    "link": ([link("bad.jpg", "/etc/passwd")], "it is a link"),
    "hard link": ([link("bad.jpg", "../x", tarfile.LNKTYPE)], "it is a link"),
    "device": ([link("bad.jpg", "", tarfile.CHRTYPE)], "no plain file"),
    "pipe": ([link("bad.jpg", "", tarfile.FIFOTYPE)], "no plain file"),
    "no caption": ([("bad.jpg", IMAGE)], "no caption"),
    "no image": ([("bad.txt", b"x")], "no image"),
    "name twice": ([("k1.jpg", IMAGE)], "comes twice"),
    "JSON is a list": (sample("bad", IMAGE, b"x") + [("bad.json", b"[1]")], "unreadable JSON"),
    "JSON nested": (sample("bad", IMAGE, b"x") + [("bad.json", b"[" * 100_000)], "unreadable JSON"),
    "JSON cut": (sample("bad", IMAGE, b"x") + [("bad.json", b'{"a":')], "unreadable JSON"),
    "caption of 2 MB": (sample("bad", IMAGE, b"x" * 2_000_000), "more than"),
    "caption not UTF-8": (sample("bad", IMAGE, b"caf\xe9"), "UTF-8"),
    "caption empty": (sample("bad", IMAGE, b""), "no caption"),
    "caption of escapes": (sample("bad", IMAGE, b"\x1b[2Jcat"), "terminal escapes"),
    "caption in JSON is a number": ([("bad.jpg", IMAGE), ("bad.json", b'{"caption": 5}')], "no caption"),
    "captions are numbers": (
        sample("bad", IMAGE, b"<b>x</b>") + [("bad.json", b'{"captions": [1, 2], "scene": [3]}')],
        "HTML",
    ),
}.items():
    case("webdataset", f"member: {what}", "0.tar", shard(*extra), said)
for what, (bad, said, stay) in {
    "cut in the middle": (shard()[: len(shard()) // 2], "damaged|no usable|no caption", "some"),
    "empty": (b"", "no usable|damaged|no pair", False),
    "zeros": (b"\0" * 10_240, "no pair", False),
    "words": (b"no tar at all" * 100, "damaged", False),
    "gzip": (gzip.compress(shard(), mtime=0), "damaged", False),
    "no members": (tar_bytes([]), "no pair", False),
    "only text": (tar_bytes([("a.txt", b"x")]), "no image", False),
    "header broken": (shard()[:512].replace(b"ustar", b"xxxxx").replace(b"0", b"9") + shard()[512:], "damaged", False),
}.items():
    case("webdataset", f"file: {what}", "0.tar", bad, said, stay)

whole = parquet(good_cells())
stream = arrow(good_cells())
for what, bad in {
    "empty": b"",
    "cut": whole[: len(whole) // 2],
    "without its end": whole[:-4],
    "without its beginning": whole[10:],
    "only its sign": b"PAR1PAR1",
    "words": b"no parquet" * 30,
    "end broken": whole[:-60] + b"\xff" * 52 + whole[-8:],
    "no image column": parquet(pa.table(dict(text=["a"]))),
    "no caption column": parquet(good_cells().drop_columns("text")),
    "no rows": parquet(good_cells().slice(0, 0)),
    "numbers": parquet(pa.table(dict(image=[1, 2], text=["a", "b"]))),
    "captions are numbers": parquet(pa.table(dict(image=good_cells()["image"], text=[1, 2, 3]))),
    "addresses": parquet(pa.table(dict(url=["http://example.org/1.jpg"], text=["a"]))),
}.items():
    case("parquet", f"file: {what}", "0.parquet", bad, "", stay=False)
for what, (bad, said) in {
    "null image": ((None, "a bad one"), "no image"),
    "no bytes": ((dict(bytes=None, path="/etc/passwd"), "a bad one"), "no image"),
    "null caption": ((dict(bytes=IMAGE, path="x"), None), "no caption"),
    "escapes": ((dict(bytes=IMAGE, path="x"), "\x1b[31mcat"), "terminal escapes"),
}.items():
    case("parquet", f"row: {what}", "0.parquet", parquet(good_cells(bad)), said)
    case("arrow", f"row: {what}", "0.arrow", arrow(good_cells(bad)), said)
for what, bad in {
    "empty": b"",
    "cut": stream[: len(stream) // 2],
    "a name that is no text": stream.replace(b"text", b"te\x80t"),
    "head": stream[:100],
    "words": b"no arrow" * 30,
    "sign of a file": b"ARROW1\0\0" + stream[:200],
    "no captions": arrow(good_cells().drop_columns("text")),
    "no rows": arrow(good_cells().slice(0, 0)),
    "length broken": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + stream[8:],
}.items():
    case("arrow", f"file: {what}", "0.arrow", bad, "", stay=False)

for what, (name, bad, said) in {
    "image alone": ("alone.jpg", IMAGE, "no caption"),
    "caption alone": ("alone.txt", b"a text", "without an image"),
    "caption empty": ("bad.txt", b"", "no caption"),
    "caption not UTF-8": ("bad.txt", b"caf\xe9", "UTF-8"),
    "caption of NULs": ("bad.txt", b"\0" * 50, "no caption"),
    "two images": ("one.png", IMAGE, "key"),
    "caption of 10 000 words": ("bad.txt", b"word " * 10_000, "10000 words"),
    "caption is binary": ("bad.txt", bytes(range(256)), "UTF-8|control"),
    "caption leads out": ("bad.txt", "link", "no caption"),
    "image leads out": ("bad.jpg", "link", "leaves"),
    "image is a folder": ("one.txt.d", "folder", ""),
}.items():
    if said:
        case("folder", f"file: {what}", name, bad, said)
case("folder", "nothing", "x", "folder", "no pair|nothing known", stay=False)

# --- one check for all ------------------------------------------------------------------------------------------------


def put(path, content):
    if content == "folder":
        path.mkdir()
    elif content == "link":
        path.unlink(missing_ok=True)
        path.symlink_to("/etc/hostname")
    else:
        path.write_bytes(content)


def collection(folder, reader, name, content):
    "A good collection with one bad file; gives its source."
    if reader in FORMS:
        own, form = FORMS[reader]
        for _, image, _ in [*GOOD, ("", "bad.jpg", "")]:
            (folder / image).write_bytes(IMAGE)
        (folder / "inside").mkdir()
        (folder / "link.jpg").symlink_to("/etc/hostname")
        if name == "bad.jpg":
            put(folder / own, form([GOOD[0], ("bad", "bad.jpg", "a bad one"), *GOOD[1:]]))
        put(folder / name, content)
        return f"{SCHEMES.get(reader, reader)}:{folder / (own if name == 'bad.jpg' else name)}"
    if reader == "folder":
        if content == "folder":
            put(folder / name, content)
            return f"folder:{folder}"
        for _, image, caption in [*GOOD, ("", "bad.jpg", "a bad one")]:
            (folder / image).write_bytes(IMAGE)
            (folder / image).with_suffix(".txt").write_text(caption)
        put(folder / name, content)
        return f"folder:{folder}"
    put(folder / name, content)
    return f"{'webdataset' if reader == 'webdataset' else 'datasets'}:{folder / name}"


def outcome(source):
    "What is said, and the captions of the pairs that can be used."
    try:
        pairs = open_pairs(source)
        seen = survey(pairs, 50)
    except StudyError as e:
        assert ";" in str(e), f"no remedy: {e}"
        return str(e), None
    for p in seen["problems"]:
        assert p["file"]
        assert p["what"]
        assert p["remedy"]
        assert set(p) == {"file", "row", "what", "remedy"}
    return " | ".join(f"{p['file']} {p['row']}: {p['what']}; {p['remedy']}" for p in seen["problems"]), {
        r["caption"] for r in (pairs[i] for i in range(len(pairs))) if r["image"]
    }


@pytest.mark.parametrize("reader,what,name,content,said,stay", CASES, ids=[f"{r}-{w}" for r, w, *_ in CASES])
def test_bad_file(tmp_path, reader, what, name, content, said, stay):
    source = collection(tmp_path, reader, name, content)
    message, usable = outcome(source)
    if not stay:
        assert usable is None or not usable & CAPTIONS or message, "neither refused nor listed"
    elif stay is True:
        assert usable is not None, f"good pairs are lost: {message}"
        assert CAPTIONS <= usable, f"good pairs are lost: {message}"
    elif stay == "first":
        assert usable, f"the pairs before the damage are lost: {message}"
        assert "a good cat" in usable, f"the pairs before the damage are lost: {message}"
    if usable is None:
        assert Path(source.split(":", 1)[1]).name in message or name in message, f"the file is not named: {message}"
    if said:
        assert re.search(said, message), f"{what}: {message[:500]}"
    if said and usable is not None and not what.startswith("file: "):
        assert any(re.search(said, p) and re.match(r"\S+ .+?: ", p) for p in message.split(" | ")), (
            f"no row: {message[:500]}"
        )
    elif stay is False:
        assert message
        assert usable is None or not usable
    assert "Traceback" not in message


def test_how_many():
    "At least 200 different bad files, whatever reader they are for."
    different = {
        (
            name if isinstance(content, str) else "",
            content if isinstance(content, str) else hashlib.sha256(content).hexdigest(),
        ): reader
        for reader, _, name, content, *_ in CASES
    }
    print(f"{len(CASES)} cases, {len(different)} different bad files:", dict(Counter(reader for reader, *_ in CASES)))
    assert len(different) >= 200
    assert {r for r, *_ in CASES} == {*FORMS, "folder", "webdataset", "parquet", "arrow"}


# --- random and mutated files -----------------------------------------------------------------------------------------

VALID = {r: (n, form(GOOD)) for r, (n, form) in FORMS.items()} | dict(
    webdataset=("0.tar", shard()), parquet=("0.parquet", whole), arrow=("0.arrow", stream)
)
some = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def survives(reader, content):
    with tempfile.TemporaryDirectory() as folder:
        outcome(collection(Path(folder), reader, VALID[reader][0], content))


@pytest.mark.parametrize("reader", VALID)
@some
@given(data=st.data())
def test_mutated(reader, data):
    "Bytes changed, taken out or put in: ends in pairs, listed problems, or a StudyError; never in another exception."
    content = bytearray(VALID[reader][1])
    for _ in range(data.draw(st.integers(1, 4))):
        at, n = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 12))
        content[at : at + n] = data.draw(st.binary(max_size=12))
    survives(reader, bytes(content))


@pytest.mark.parametrize("reader", VALID)
@some
@given(
    content=st.one_of(
        st.binary(max_size=400),
        st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda x: (
                st.lists(x, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "id",
                            "image",
                            "images",
                            "annotations",
                            "caption",
                            "conversations",
                            "sentences",
                            "file_name",
                            "filename",
                            "image_id",
                        ]
                    ),
                    x,
                    max_size=4,
                )
            ),
        ).map(lambda x: json.dumps(x).encode()),
    )
)
def test_random(reader, content):
    "So does a file of anything."
    survives(reader, content)


# --- and by looking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", [*VALID, "folder"])
def test_found_by_looking(tmp_path, reader):
    "The good collections are recognised by their folder, and every pair opens."
    for _, image, caption in GOOD:
        (tmp_path / image).write_bytes(IMAGE)
    if reader == "folder":
        [(tmp_path / i).with_suffix(".txt").write_text(c) for _, i, c in GOOD]
    else:
        (tmp_path / VALID[reader][0]).write_bytes(VALID[reader][1])
    message, usable = outcome(str(tmp_path))
    assert usable == CAPTIONS, message
    assert not message, message


def test_two_things_are_not_guessed(tmp_path):
    for reader in ("csv", "llava"):
        (tmp_path / VALID[reader][0]).write_bytes(VALID[reader][1])
    with pytest.raises(StudyError, match="several ways: llava:.*chat.json .*; table:.*pairs.csv"):
        open_pairs(str(tmp_path))


def test_a_million_problems_are_a_short_list():
    problems = Problems()
    for i in range(3000):
        problems.add("a.json", i, f"the image is not there: {i}", "fetch it")
    problems.add("a.json", 1, "no caption", "write one")
    assert len(problems) == Problems.limit + 2
    assert problems.total == 3001
    assert "2,000 more" in problems[Problems.limit]["what"]
