"Frozen encoders: the same numbers as their libraries, poolings, random doubles, what is refused."

import json, shutil
import numpy as np, pytest, torch, tiny
from PIL import Image
from selfalign.models.image_encoders import load_image_encoder
from selfalign.models.references import ModelError
from selfalign.models.text_encoders import load_text_encoder


def photos(n=3, size=(90, 70), seed=0):
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)) for _ in range(n)]
    return [i.resize(size, Image.Resampling.BICUBIC) for i in small]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-4)


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A vision transformer, one with registers, a sigmoid pair, and an encoder of timm with the channels last."
    import timm, transformers
    from timm.models import save_for_hf

    place = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    see = transformers.BitImageProcessor(size=dict(shortest_edge=64), crop_size=dict(height=56, width=56))
    registers = transformers.Dinov2WithRegistersConfig(**SMALL, image_size=56, patch_size=14, num_register_tokens=3)
    transformers.Dinov2WithRegistersModel(registers).save_pretrained(place / "registers")
    see.save_pretrained(place / "registers")
    plain = transformers.ViTConfig(**SMALL, image_size=48, patch_size=16)
    transformers.ViTForImageClassification(plain).save_pretrained(place / "vit")
    transformers.ViTImageProcessor(size=dict(height=48, width=48)).save_pretrained(place / "vit")
    tiny.siglip_folder(place / "siglip")
    for name in ("test_vit", "test_resnet", "test_vit2"):
        save_for_hf(timm.create_model(name), place / name, safe_serialization=True)
    return place


def test_registers_are_left_out(folders):
    "As SAIL joins class token and mean patch (`cls+mean`), in the order class token, registers, patches."
    from transformers import AutoImageProcessor, AutoModel

    where, images = folders / "registers", photos()
    pixels = AutoImageProcessor.from_pretrained(where, backend="pil")(images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(where)(pixel_values=pixels).last_hidden_state
    encoder = load_image_encoder(f"transformers:{where}")
    assert (encoder.pooling, encoder.dimension, encoder.size) == ("cls+mean", 64, 56)
    close(encoder.encode(images, batch=2), torch.cat([hidden[:, 0], hidden[:, 4:].mean(1)], 1), 1e-4)
    close(encoder.maps(images), hidden[:, 4:].transpose(1, 2).reshape(3, 32, 4, 4), 1e-4)
    close(load_image_encoder(f"transformers:{where}", "cls").encode(images), hidden[:, 0], 1e-4)


def test_a_wide_image_gives_a_wide_map(folders):
    for name in ("registers", "vit"):
        encoder = load_image_encoder(f"transformers:{folders / name}")
        side = encoder.model.config.patch_size
        assert encoder.see(torch.zeros(1, 3, 4 * side, 6 * side)).map.shape == (1, 32, 4, 6)


def test_a_classifier_is_an_encoder_without_its_pooler(folders):
    encoder = load_image_encoder(f"transformers:{folders / 'vit'}", "mean")
    assert encoder.preparation.mode == "squash"
    with pytest.raises(ModelError, match="gives no 'pooler'.*cls, mean, max"):
        load_image_encoder(f"transformers:{folders / 'vit'}", "pooler")


def test_the_image_tower_of_a_pair(folders):
    from selfalign.models.load import load_dual_encoder

    where = f"transformers:{folders / 'siglip'}"
    encoder, square = load_image_encoder(where, "pooler"), photos(size=(64, 64))
    close(torch.nn.functional.normalize(encoder.encode(square)), load_dual_encoder(where).encode_image(square))
    assert load_image_encoder(where).pooling == "mean+max"


@pytest.mark.parametrize(
    "name, pooling", [("test_vit", "cls+mean"), ("test_vit2", "mean+max"), ("test_resnet", "mean+max")]
)
def test_timm(folders, name, pooling):
    import timm

    model = timm.create_model(f"local-dir:{folders / name}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    images = photos()
    with torch.inference_mode():
        hidden = model.forward_features(torch.stack([transform(i) for i in images]))
    if hidden.ndim == 4:
        expected = torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], 1)
    elif name == "test_vit":
        expected = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)
    else:
        expected = torch.cat([hidden[:, 1:].mean(1), hidden[:, 1:].amax(1)], 1)
    encoder = load_image_encoder(f"timm:{folders / name}")
    assert encoder.pooling == pooling and encoder.dimension == expected.shape[1]
    close(encoder.encode(images), expected, 1e-4)


def test_open_clip_tower(tiny_clip):
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    images = photos()
    with torch.inference_mode():
        expected = model.eval().encode_image(torch.stack([preprocess(i) for i in images]))
    close(load_image_encoder(f"open_clip:{tiny_clip}", "pooler").encode(images), expected, 1e-4)
    encoder = load_image_encoder(f"open_clip:{tiny_clip}")
    assert encoder.dimension == 128 and encoder.maps(images).shape == (3, 64, 4, 4)


def test_autoencoders(tiny_generator, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32).eval()  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    encoder, square = load_image_encoder(f"diffusers:{tmp_path / 'vae'}"), photos(size=(32, 32))
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 127.5 - 1 for i in square])
    with torch.inference_mode():
        close(encoder.maps(square), vae.encode(pixels).latent_dist.mean, 1e-4)
    assert load_image_encoder(f"diffusers:{tiny_generator}").maps(square).shape == (3, 4, 8, 8)


def test_the_micro_encoder_as_the_probes_saw_it():
    "Mean and maximum of a ResNet's map of bytes in [-1, 1]; the untrained double by its seed."
    from selfalign.study.settings import at_root
    from transformers import AutoConfig, AutoModel

    where, square = at_root("data/micro/vision-small"), photos(4, (64, 64))
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in square])
    torch.manual_seed(0)
    double = AutoModel.from_config(AutoConfig.from_pretrained(where)).eval()
    for trained, model in ((True, AutoModel.from_pretrained(where, dtype=torch.float32).eval()), (False, double)):
        with torch.inference_mode():
            hidden = model(pixel_values=pixels).last_hidden_state
        vectors, maps = load_image_encoder(f"transformers:{where}", trained=trained).features(
            np.stack([np.asarray(i) for i in square]), batch=3
        )
        close(maps, hidden)
        close(vectors, torch.cat([hidden.mean((2, 3)), hidden.amax((2, 3))], 1))


def test_random_doubles(folders, tiny_generator, tmp_path):
    tiny_clip = tiny.open_clip_folder(tmp_path / "clip", seed=5)
    refs = [f"transformers:{folders / 'vit'}", f"timm:{folders / 'test_vit'}", f"open_clip:{tiny_clip}"]
    for ref in (*refs, f"diffusers:{tiny_generator}"):
        trained, one, two = (load_image_encoder(ref, trained=t) for t in (True, False, False))
        close(one.encode(photos()), two.encode(photos()), 0)
        assert one.dimension == trained.dimension and one.hash == two.hash != trained.hash
        assert (one.encode(photos()) - trained.encode(photos())).abs().max() > 1e-3


def test_weights_that_are_missing_are_not_made_up(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "registers", tmp_path / "less")
    path = tmp_path / "less/model.safetensors"
    weights = load_file(path)
    weights.pop(next(k for k in weights if "attention" in k))
    save_file(weights, path, metadata=dict(format="pt"))
    with pytest.raises(ModelError, match="1 weights are missing and would be random"):
        load_image_encoder(f"transformers:{tmp_path / 'less'}")


def test_what_an_image_encoder_is_not(folders, tmp_path):
    from transformers import ViTMAEConfig, ViTMAEModel

    with pytest.raises(ModelError, match="preprocessor_config"):
        shutil.copytree(folders / "vit", tmp_path / "bare")
        (tmp_path / "bare/preprocessor_config.json").unlink()
        load_image_encoder(f"transformers:{tmp_path / 'bare'}")
    ViTMAEModel(ViTMAEConfig(**SMALL, image_size=32, patch_size=16)).save_pretrained(tmp_path / "mae")
    with pytest.raises(ModelError, match="hides patches at random"):
        load_image_encoder(f"transformers:{tmp_path / 'mae'}")


# --- texts -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    "Small language models of four families with one tokenizer."
    import transformers as t

    place, tok = tmp_path_factory.mktemp("readers"), tiny.tokenizer(64)
    small = SMALL | dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id)
    special = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    torch.manual_seed(0)
    made = dict(
        bert=t.BertForMaskedLM(t.BertConfig(**small, max_position_embeddings=40)),
        roberta=t.RobertaModel(t.RobertaConfig(**small, max_position_embeddings=40)),
        llama=t.LlamaForCausalLM(t.LlamaConfig(**small, **special, max_position_embeddings=128)),
        t5=t.T5Model(t.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=len(tok))),
    )
    for name, model in made.items():
        model.save_pretrained(place / name)
        tok.save_pretrained(place / name)
    return place


def plain(folder, text, limit):
    "Hidden states of one text alone, by transformers."
    from transformers import AutoModel, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=limit, return_tensors="pt").input_ids
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        model = model.get_encoder() if model.config.is_encoder_decoder else model
        return model(input_ids=ids).last_hidden_state[0]


@pytest.mark.parametrize("name, limit", [("bert", 40), ("roberta", 40 - 1), ("llama", 64), ("t5", 64)])
def test_poolings_equal_a_text_alone(readers, name, limit):
    texts = [*tiny.CAPTIONS, "cat " * 300, ""]
    alone = [plain(readers / name, t, limit) for t in texts]
    expected = dict(
        first=lambda h: h[0], mean=lambda h: h.mean(0), last=lambda h: h[-1], end=lambda h: h[-1]
    )  # this tokenizer adds an end token
    for pooling in ("mean", "last", "end") if name == "llama" else expected:
        encoder = load_text_encoder(f"transformers:{readers / name}", pooling)
        assert encoder.limit == limit and encoder.count_cut(texts) == 1
        rows = [2] if pooling == "end" else range(len(texts))
        found = encoder.encode(texts, batch=3)
        for i in rows:
            close(found[i], expected[pooling](alone[i]), 2e-5)
    assert load_text_encoder(f"transformers:{readers / name}").pooling == ("last" if name == "llama" else "mean")


def test_an_end_token_is_added_where_there_is_none(readers, tmp_path):
    shutil.copytree(readers / "llama", tmp_path / "bare")
    path = tmp_path / "bare/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(post_processor=None)))
    encoder, last = (load_text_encoder(f"transformers:{tmp_path / 'bare'}", p) for p in ("end", "last"))
    assert encoder.preprocessing == "64 tokens with an end token" and last.preprocessing == "64 tokens"
    ids = last.tokenize([tiny.CAPTIONS[0]]).ids[0].tolist()
    assert encoder.tokenize([tiny.CAPTIONS[0]]).ids[0].tolist() == [*ids, encoder.tokenizer.eos_token_id]
    assert encoder.tokenize(["cat " * 300]).ids.shape == (1, 64)
    close(last.encode([tiny.CAPTIONS[0] + "<end>"]), encoder.encode([tiny.CAPTIONS[0]]))
    assert torch.isfinite(last.encode(["", "a"])).all()


def test_text_doubles_and_refusals(readers, folders):
    one, two = (load_text_encoder(f"transformers:{readers / 'bert'}", trained=t) for t in (True, False))
    assert one.hash != two.hash and one.dimension == two.dimension
    assert one.encode([]).shape == (0, 32)
    with pytest.raises(ModelError, match="first token has read nothing"):
        load_text_encoder(f"transformers:{readers / 'llama'}", "first")
    with pytest.raises(ModelError, match="it can give first, mean, last, end"):
        load_text_encoder(f"transformers:{readers / 'bert'}", "cls")
    with pytest.raises(ModelError, match="pair of encoders"):
        load_text_encoder(f"transformers:{folders / 'siglip'}")
    with pytest.raises(ModelError, match="by transformers"):
        load_text_encoder("open_clip:ViT-B-32/openai")
