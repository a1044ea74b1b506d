"Models: references, the same numbers as the libraries, safety."

import numpy as np, pytest, torch, tiny
from PIL import Image
from selfalign.models.load import load_dual_encoder, load_generator
from selfalign.models.references import ModelError, check_folder, parse_reference


def photos(n=4, size=(64, 64), seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)) for _ in range(n)]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def test_open_clip_equals_its_library(tiny_clip):
    import open_clip

    encoder = load_dual_encoder(f"open_clip:{tiny_clip}")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")(tiny.CAPTIONS)
    images = photos(2) + photos(2, (130, 77)) + photos(2, (50, 90))
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        texts = model.encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder.encode_image(images, "crop"), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.encode_text(tiny.CAPTIONS), texts, atol=2e-6, rtol=1e-5)
    assert (
        encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)
        and encoder.logit_bias == 0
        and encoder.context_length == 24
    )


@pytest.mark.parametrize("which", ["tiny_judge", "tiny_hf_clip"])
def test_transformers_equals_its_library(which, request):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = request.getfixturevalue(which)
    encoder, model, tok = (
        load_dual_encoder(f"transformers:{folder}"),
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    images = photos(3)
    tokens = tok(tiny.CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    if which == "tiny_judge":
        tokens = {"input_ids": tokens["input_ids"]}
    with torch.inference_mode():
        seen = model.get_image_features(
            **AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
        ).pooler_output
        read = model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(encoder.encode_image(images), unit(seen), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.encode_text(tiny.CAPTIONS), unit(read), atol=1e-5, rtol=1e-4)


def test_batches_do_not_matter(tiny_clip, tiny_judge):
    for ref in (f"open_clip:{tiny_clip}", f"transformers:{tiny_judge}"):
        encoder = load_dual_encoder(ref)
        torch.testing.assert_close(
            encoder.encode_text(tiny.CAPTIONS, batch=2), encoder.encode_text(tiny.CAPTIONS), atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            encoder.encode_image(photos(5), batch=2), encoder.encode_image(photos(5)), atol=1e-6, rtol=1e-5
        )
        assert encoder.encode_text([]).numel() == 0


def test_long_texts_are_cut_to_the_context(tiny_clip):
    encoder = load_dual_encoder(f"open_clip:{tiny_clip}")
    assert torch.isfinite(encoder.encode_text(["cat " * 1000, ""])).all()


def test_half_folders_load_as_float32(tiny_judge, tmp_path):
    from transformers import AutoModel
    import shutil

    shutil.copytree(tiny_judge, tmp_path / "half")
    AutoModel.from_pretrained(tiny_judge).half().save_pretrained(tmp_path / "half")
    assert next(load_dual_encoder(f"transformers:{tmp_path}/half").model.parameters()).dtype == torch.float32


def test_hash_follows_the_weights(tiny_clip, tmp_path):
    other = tiny.open_clip_folder(tmp_path / "other", seed=9)
    assert load_dual_encoder(f"open_clip:{tiny_clip}").hash != load_dual_encoder(f"open_clip:{other}").hash


@pytest.mark.parametrize(
    "text, said",
    [
        ("clip", "names no model"),
        ("open_clip:", "names no model"),
        ("timmy:x/y", "unknown library"),
        ("open_clip:data/none/of/this", "no folder"),
        ("transformers:./nowhere", "no folder"),
    ],
)
def test_references_refused(text, said):
    with pytest.raises(ModelError, match=said):
        parse_reference(text)


def test_hub_names_stay_names():
    for name in ("ViT-B-32/openai", "gpt2", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"):
        assert parse_reference(f"open_clip:{name}").path is None


def test_folders_without_safetensors_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match="no .safetensors"):
        load_dual_encoder(f"transformers:{tmp_path}")
    with pytest.raises(ModelError, match="no .safetensors"):
        load_generator(f"diffusers:{tmp_path}")


def test_damaged_folders_explained(tiny_clip, tmp_path):
    import shutil

    shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = tmp_path / "clip/open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="damaged"):
        load_dual_encoder(f"open_clip:{tmp_path}/clip")


def test_no_network_explained(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="could not be fetched.*network"):
        load_dual_encoder("transformers:nobody/nothing")
    with pytest.raises(ModelError, match="could not be fetched.*network"):
        load_generator("diffusers:nobody/nothing")


def test_wrong_kinds_refused(tiny_clip, tiny_generator):
    with pytest.raises(ModelError, match="generator"):
        load_dual_encoder(f"diffusers:{tiny_generator}")
    with pytest.raises(ModelError, match="diffusers"):
        load_generator(f"open_clip:{tiny_clip}")
    with pytest.raises(ModelError, match="precision"):
        load_generator(f"diffusers:{tiny_generator}", "float61")


def test_generator_is_float32(tiny_generator):
    pipe = load_generator(f"diffusers:{tiny_generator}")
    assert pipe.unet.dtype == torch.float32 and pipe.safety_checker is None
