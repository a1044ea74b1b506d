"The committed micro models: formats, loaders, cards, precision."

import json
import numpy as np
import pandas as pd
import pytest
import torch
from pathlib import Path
from PIL import Image

MICRO = Path(__file__).resolve().parent.parent / "data" / "micro"
NAMES = ["generator", "clip", "judge", "reader", "vision-small", "vision", "vision-large", "text", "lm"]


def weights(name):
    return sorted((MICRO / name).rglob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_half_precision_safetensors_with_card_and_curve(name):
    from safetensors import safe_open

    assert weights(name), f"no weights in data/micro/{name}; run `selfalign pretrain {name}`"
    for path in weights(name):
        with safe_open(path, "pt") as f:
            kinds = {f.get_slice(k).get_dtype() for k in f.keys()}
        assert kinds <= {"F16", "I64"}, f"{path}: {kinds}"
    card = (MICRO / name / "README.md").read_text(encoding="utf-8")
    assert "Saw:" in card and "sha256" in card and f"selfalign pretrain {name}" in card
    curve = pd.read_csv(MICRO / name / "training.csv")
    assert len(curve) >= 5 and curve.loss.iloc[-1] < curve.loss.iloc[0]


@pytest.mark.slow
def test_generator_is_a_stable_diffusion_pipeline_and_runs_image_to_image():
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(MICRO / "generator", torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    seed = lambda: torch.Generator().manual_seed(0)
    photo = pipe("a large red cup on the left", num_inference_steps=4, generator=seed()).images[0]
    assert photo.size == (64, 64) and np.asarray(photo).std() > 5
    again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    near, far = (
        np.asarray(
            again(
                "a large red cup on the left", image=photo, strength=s, num_inference_steps=10, generator=seed()
            ).images[0],
            float,
        )
        for s in (0.2, 0.9)
    )
    original = np.asarray(photo, float)
    assert np.abs(near - original).mean() < np.abs(far - original).mean()


@pytest.mark.parametrize(
    "other",
    [
        "a large red cat on the right",
        "a large red cat at the top",
        "a large red apple on the left",
        "a large blue cat on the left",
        "a small red cat on the left",
    ],
)
def test_generator_reads_every_word(other):
    from transformers import CLIPTextModel
    from selfalign.models.generator import loudness

    text = CLIPTextModel.from_pretrained(MICRO / "generator" / "text_encoder", dtype=torch.float32).eval()
    assert loudness(text, "a large red cat on the left", other) > 0.3


def test_words_so_far_and_the_last_words_are_asked_at_each_token():
    from selfalign.models.generator import WordKeeper
    from selfalign.models.vocabulary import tokenize, vocabulary

    words = vocabulary()
    torch.manual_seed(0)
    keeper = WordKeeper(len(words), last=2)
    ids = tokenize(["a red cat", "two cups"], words)
    h, end = keeper.text(input_ids=ids).last_hidden_state, len(words) - 2
    bag, order = [], [[], []]
    for row, hidden in zip(ids, h):
        for i in range(len(row)):
            said = torch.zeros(len(words))
            said[[t for t in row[: i + 1].tolist() if t < end]] = 1
            bag.append(
                torch.nn.functional.binary_cross_entropy_with_logits(keeper.bag(hidden[i]), said, reduction="sum")
            )
            for k in range(2):
                if i >= k and row[i] < end:
                    order[k].append(-keeper.last[k](hidden[i]).log_softmax(-1)[row[i - k]])
    found = keeper(ids)
    assert torch.allclose(found["bag"], torch.stack(bag).mean(), rtol=1e-4)
    assert torch.allclose(found["order"], torch.stack([torch.stack(o).mean() for o in order]).mean(), rtol=1e-4)


def test_clip_loads_through_open_clip_and_tells_captions_apart():
    import open_clip
    from selfalign.models.contrastive import validate
    from selfalign.models.vocabulary import vocabulary

    model = open_clip.create_model_from_pretrained(f"local-dir:{MICRO / 'clip'}", return_transform=False).float().eval()
    found = validate(model, vocabulary(), n=200)
    assert found["object"] > 0.55 and found["r1"] > 0.03  # far from chance: 0.5 and 0.005


def test_judge_loads_through_transformers_and_belongs_to_another_family():
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, SiglipModel

    model = AutoModel.from_pretrained(MICRO / "judge", dtype=torch.float32)
    assert isinstance(model, SiglipModel)
    assert AutoImageProcessor.from_pretrained(MICRO / "judge")(Image.new("RGB", (80, 60)), return_tensors="pt")[
        "pixel_values"
    ].shape == (1, 3, 64, 64)
    assert len(AutoTokenizer.from_pretrained(MICRO / "judge")) == model.config.text_config.vocab_size <= 1024


def test_vision_text_and_lm_load_through_transformers():
    from selfalign.models.image_encoders import load_image_encoder
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    sizes = []
    for name in ("vision-small", "vision", "vision-large"):
        encoder = load_image_encoder(f"transformers:{MICRO / name}")
        whole, cells = encoder.features([Image.new("RGB", (80, 64))])
        assert cells.shape[2:] == (8, 8)
        assert whole.shape[1] == 2 * cells.shape[1] == encoder.dimension
        sizes.append(sum(p.numel() for p in encoder.model.parameters()))
    assert sizes == sorted(sizes)
    tokenizer = AutoTokenizer.from_pretrained(MICRO / "text")
    assert len(tokenizer) <= 1024
    AutoModelForMaskedLM.from_pretrained(MICRO / "text", dtype=torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(MICRO / "lm", dtype=torch.float32)
    losses = [
        lm(input_ids=ids, labels=ids).loss.item()
        for ids in (
            tokenizer(t, return_tensors="pt").input_ids
            for t in ("a small red car on the left", "left the on car red small a")
        )
    ]
    assert losses[0] < losses[1]


def test_reader_reads_renders_of_scenes_that_it_never_saw():
    from selfalign.data.captions import probe_caption
    from selfalign.models.probes import first_scenes
    from selfalign.data.scenes import render
    from selfalign.models.reader import verdict

    scenes = [s for _, s in first_scenes(150)]
    found = verdict([render(s) for s in scenes], [probe_caption(s).claims for s in scenes])
    assert (found[["object", "colour", "size", "position"]].mean() > 0.85).all()


def test_one_vocabulary_everywhere():
    files = [MICRO / n / "tokenizer.json" for n in ("text", "lm", "clip", "judge")] + [
        MICRO / "generator" / "tokenizer" / "tokenizer.json"
    ]
    vocabularies = [json.loads(f.read_text(encoding="utf-8"))["model"]["vocab"] for f in files]
    assert all(v == vocabularies[0] for v in vocabularies)
