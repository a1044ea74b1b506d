"The embedding store: whole shards, one kind of vectors, damage noticed."

import os, signal, subprocess, sys
import numpy as np, pytest, torch
from selfalign.models.embed import EmbeddingStore, StoreError, embed, manifest_of
from selfalign.models.imported import import_pt

KIND = dict(model="open_clip:x", weights="abc", kind="image", preprocessing="crop 64", pooling="projected", dimension=4)


def rows(keys):
    return np.array([[float(k), 1, 2, 3] for k in keys])


def keys(n, start=0):
    return [str(i) for i in range(start, start + n)]


def test_grows_and_reads_in_any_order(tmp_path):
    store = EmbeddingStore(tmp_path, KIND)
    assert embed(store, keys(10), rows, batch=3, shard=4) == 10
    assert embed(store, keys(12), rows) == 2
    again = EmbeddingStore(tmp_path)
    assert len(again) == 12
    assert again.manifest["dtype"] == "float16"
    assert again.shard(0).dtype == np.float16
    assert again.read(["11", "0", "7", "0"])[:, 0].tolist() == [11, 0, 7, 0]
    assert again.read([]).shape == (0, 4)
    again.verify()


def test_refuses_what_does_not_belong(tmp_path):
    EmbeddingStore(tmp_path, KIND).append(["a"], [[1, 2, 3, 4]])
    for field, value in dict(model="other", weights="other", preprocessing="pad 64", kind="text", dimension=5).items():
        with pytest.raises(StoreError, match=field):
            EmbeddingStore(tmp_path, KIND | {field: value})
    store = EmbeddingStore(tmp_path, KIND)
    with pytest.raises(StoreError, match="already"):
        store.append(["a"], [[1, 2, 3, 4]])
    with pytest.raises(StoreError, match="already"):
        store.append(["b", "b"], [[1, 2, 3, 4]] * 2)
    with pytest.raises(StoreError, match="'c' is not finite"):
        store.append(["b", "c"], [[1, 2, 3, 4], [1, 2, np.nan, 4]])
    with pytest.raises(StoreError, match="finite"):
        store.append(["big"], [[1e6, 0, 0, 0]])
    with pytest.raises(StoreError, match="shape"):
        store.append(["d"], [[1, 2, 3]])
    with pytest.raises(StoreError, match="lacks 1 keys, the first is 'z'"):
        store.read(["a", "z"])
    with pytest.raises(StoreError, match="no embedding store"):
        EmbeddingStore(tmp_path / "nothing")


def test_half_written_shards_do_not_count(tmp_path):
    embed(EmbeddingStore(tmp_path, KIND), keys(4), rows)
    np.save(tmp_path / "00001.npy", np.zeros((9, 4), np.float16))
    (tmp_path / "00001.keys.json").write_text('["x"')
    store = EmbeddingStore(tmp_path, KIND)
    assert len(store) == 4
    embed(store, keys(6), rows)
    EmbeddingStore(tmp_path).verify()


def test_damage_is_noticed(tmp_path):
    embed(EmbeddingStore(tmp_path, KIND), keys(4), rows)
    data = bytearray((tmp_path / "00000.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path / "00000.npy").write_bytes(data)
    with pytest.raises(StoreError, match="damaged"):
        EmbeddingStore(tmp_path).verify()
    (tmp_path / "00000.keys.json").write_text('["0"]')
    with pytest.raises(StoreError, match="1 keys for 4 rows"):
        EmbeddingStore(tmp_path)


def test_rows_hash_depends_on_rows_only(tmp_path):
    a, b = EmbeddingStore(tmp_path / "a", KIND), EmbeddingStore(tmp_path / "b", KIND)
    embed(a, keys(8), rows, shard=4)
    embed(b, keys(8), rows, shard=4)
    assert a.manifest["rows_hash"] == b.manifest["rows_hash"] != ""


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_embed import *
calls = []

def killed(wanted):
    calls.append(1)
    if len(calls) == 36:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(wanted)

embed(EmbeddingStore({folder!r}, KIND), keys(200), killed, batch=1, shard=10)
"""


def test_killed_and_resumed(tmp_path):
    "In the 36th row, after three shards of ten."
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    store = EmbeddingStore(tmp_path, KIND)
    assert len(store) == 30
    assert embed(store, keys(200), rows) == 170
    assert store.read(keys(200))[:, 0].tolist() == list(range(200))
    store.verify()


# --- by number ---------------------------------------------------------------------------------------------------


def test_rows_by_number(tmp_path):
    "From several files, repeated, in any order, also while the store grows."
    store = EmbeddingStore(tmp_path, KIND)
    embed(store, keys(23), rows, shard=5)
    some = EmbeddingStore(tmp_path).rows(["22", "3", "4", "5"])
    assert some.shape == (4, 4) and len(some) == 4 and some.dtype == np.float16
    assert some.take(torch.tensor([3, 0, 0, 1]).numpy())[:, 0].tolist() == [5, 22, 22, 3]
    assert some[1:3][:, 0].tolist() == [3, 4] and some[-1][0] == 5 and some[[0, 2]][:, 0].tolist() == [22, 4]
    everything = store.rows()
    embed(store, keys(30), rows)
    assert len(everything) == 23 and len(store.rows()) == 30
    with pytest.raises(StoreError, match="lacks 1 keys, the first is 'z'"):
        store.rows(["1", "z"])


def test_rows_stay_on_disk(tmp_path):
    "Gathering a batch touches the batch, not the store."
    store = EmbeddingStore(tmp_path, KIND)
    embed(store, keys(40), rows, shard=8)
    assert all(isinstance(s, np.memmap) for s in store.rows().shards)


# --- encoders of one modality ------------------------------------------------------------------------------------


def test_manifests_tell_encoders_apart(tmp_path):
    "Pooling, preparation and random weights are another kind of vectors."
    from selfalign.models.image_encoders import load_image_encoder
    from selfalign.models.text_encoders import load_text_encoder

    name = "transformers:data/micro/vision-small"
    encoder = load_image_encoder(name)
    told = manifest_of(encoder)
    assert told["kind"] == "image" and told["pooling"] == "mean+max" and told["dimension"] == 256
    assert told["preprocessing"] == encoder.preprocessing
    EmbeddingStore(tmp_path / "image", told).append(["a"], np.zeros((1, 256)))
    for other, what in (
        (manifest_of(load_image_encoder(name, "max+mean")), "pooling"),
        (manifest_of(load_image_encoder(name, trained=False)), "model"),
        (manifest_of(encoder, aspect="pad"), "preprocessing"),
        (manifest_of(load_image_encoder("transformers:data/micro/vision")), "model"),
        (manifest_of(load_text_encoder("transformers:data/micro/text")), "model"),
    ):
        with pytest.raises(StoreError, match=f"its {what} is"):
            EmbeddingStore(tmp_path / "image", other)
    with pytest.raises(StoreError, match="no vectors of kind 'text'"):
        manifest_of(encoder, "text")


def test_tables_with_several_columns_of_captions(tmp_path):
    import pandas as pd
    from PIL import Image
    from selfalign.models.image_encoders import load_image_encoder
    from selfalign.models.scores import embed_images, embed_texts, text_key
    from selfalign.models.text_encoders import load_text_encoder

    for i in range(3):
        Image.new("RGB", (70, 60), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    table = pd.DataFrame(dict(key=["x", "y", "z"], image=[f"{i}.png" for i in range(3)], folder=str(tmp_path)))
    table["caption"], table["long"] = ["a red cat", "a boat", "a cat"], ["a cat", "a cat and a boat", "two red cats"]
    see, read = (
        load_image_encoder("transformers:data/micro/vision-small"),
        load_text_encoder("transformers:data/micro/text"),
    )
    images = embed_images(see, table, tmp_path / "image", shard=2)
    texts = embed_texts(read, [*table.caption, *table.long], tmp_path / "text")
    assert len(images) == 3 and len(texts) == 5
    long = texts.rows([text_key(t) for t in table.long])
    np.testing.assert_allclose(long.take([1]), read.encode(["a cat and a boat"]).numpy(), atol=2e-3)
    again = embed_texts(read, table.long, tmp_path / "text")
    assert len(again) == 5


# --- shards of others --------------------------------------------------------------------------------------------


SAIL = dict(model="transformers:facebook/dinov2-large", kind="image", pooling="cls+mean")


def pt(folder, numbers, n=3, d=4, dtype=torch.float16):
    folder.mkdir(exist_ok=True)
    for i, number in enumerate(numbers):
        torch.save(torch.arange(i * n * d, (i + 1) * n * d).view(n, d).to(dtype), folder / f"{number}.pt")


@pytest.mark.parametrize("numbers", [range(12), range(0, 36, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_shards_in_their_natural_order(tmp_path, numbers, dtype):
    "10 after 9; numbers of files or of rows."
    pt(tmp_path / "pt", numbers, dtype=dtype)
    store = import_pt(tmp_path / "pt", tmp_path / "store", keys=[f"k{i}" for i in range(36)], **SAIL)
    expected = torch.arange(144).view(36, 4).to(dtype).float().numpy()
    np.testing.assert_array_equal(store.read([f"k{i}" for i in range(36)]), expected)
    store.verify()


def test_an_import_goes_on(tmp_path):
    pt(tmp_path / "pt", range(4))
    half = import_pt(tmp_path / "pt", tmp_path / "store", **SAIL)
    manifest = half.manifest | dict(shards=half.manifest["shards"][:2])
    from selfalign.study.files import write_json

    write_json(tmp_path / "store/manifest.json", manifest)
    assert len(EmbeddingStore(tmp_path / "store")) == 6
    assert len(import_pt(tmp_path / "pt", tmp_path / "store", **SAIL)) == 12
    with pytest.raises(StoreError, match="its pooling is"):
        import_pt(tmp_path / "pt", tmp_path / "store", **SAIL | dict(pooling="cls"))


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize(
    "what, said",
    [
        (Harmful(), "holds more than tensors"),
        ([torch.zeros(2, 4)], "holds list"),
        (dict(rows=torch.zeros(2, 4)), "holds dict"),
        (torch.zeros(4), "shape"),
        (torch.zeros(2, 4, dtype=torch.int64), "int64"),
        (torch.zeros(2, 5), "rows of 4 and of 5"),
        (torch.full((2, 4), float("nan")), "not finite"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path, what, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pt(tmp_path / "pt", [0])
    torch.save(what, tmp_path / "pt/1.pt")
    with pytest.raises(StoreError, match=said):
        import_pt(tmp_path / "pt", tmp_path / "store", **SAIL)
    assert not (tmp_path / "harm").exists()


def test_a_damaged_series_is_refused(tmp_path):
    pt(tmp_path / "pt", [0, 1, 3])
    with pytest.raises(StoreError, match="2.pt is missing before 3.pt"):
        import_pt(tmp_path / "pt", tmp_path / "store", **SAIL)
    pt(tmp_path / "pt", [0, 1, 2])
    (tmp_path / "pt/3.pt").unlink()
    with pytest.raises(StoreError, match="9 rows for 8 keys"):
        import_pt(tmp_path / "pt", tmp_path / "store", keys=keys(8), **SAIL)
    (tmp_path / "pt/2.pt").write_bytes((tmp_path / "pt/2.pt").read_bytes()[:200])
    with pytest.raises(StoreError, match="2.pt was not opened"):
        import_pt(tmp_path / "pt", tmp_path / "store", **SAIL)
    (tmp_path / "pt/2.pt").rename(tmp_path / "pt/last.pt")
    with pytest.raises(StoreError, match="no number for a name"):
        import_pt(tmp_path / "pt", tmp_path / "store", **SAIL)
    with pytest.raises(StoreError, match="no .pt file"):
        import_pt(tmp_path / "nowhere", tmp_path / "store", **SAIL)
    assert not (tmp_path / "store").exists()
