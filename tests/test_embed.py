"The embedding store: whole shards, one kind of vectors, damage noticed."

import os, signal, subprocess, sys
import numpy as np, pytest
from selfalign.models.embed import EmbeddingStore, StoreError, embed

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
