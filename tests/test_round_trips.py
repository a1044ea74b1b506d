"What the study saves is read by the libraries' own loaders, without the study, and gives the same."

import json, os, subprocess, sys
import numpy as np, pytest, tiny, torch
from pathlib import Path
from PIL import Image
from selfalign.models.adapters import add_lora, load_adapter, merge, save_adapter
from selfalign.models.full_size import SHAPES, count, random_weights, skeleton
from selfalign.models.load import load_dual_encoder, load_generator
from selfalign.models.paper_lora import add_paper_lora


def photos(n=3, size=64):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


def shake(adapted):
    "Give the corrections something to say: matrices that begin at zero become random."
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.05)
    return adapted


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


def unit(x):
    return torch.nn.functional.normalize(x.float(), dim=-1)


def open_clip_vectors(model, folder, images, texts):
    "Vectors as a user of open_clip gets them."
    import open_clip

    see = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    read = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        return model.encode_image(torch.stack([see(i) for i in images]), normalize=True), model.encode_text(
            read(texts), normalize=True
        )


def adapted(reference, folder, adapt=add_lora):
    "An encoder with corrections that were saved; its vectors with them, and merged."
    e = load_dual_encoder(reference)
    plain = e.encode_text(tiny.CAPTIONS)
    wrapped = shake(adapt(e))
    save_adapter(wrapped, folder)
    want = e.encode_image(photos(size=e.size)), e.encode_text(tiny.CAPTIONS)
    assert not torch.allclose(want[1], plain, atol=1e-3)  # otherwise the test shows nothing
    return e, wrapped, want


def peft_of_open_clip(clip, tmp_path, size=64):
    import open_clip
    from peft import PeftModel

    _, _, want = adapted(f"open_clip:{clip}", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        open_clip.create_model(f"local-dir:{clip}").eval(), tmp_path / "adapter"
    ).merge_and_unload()
    for a, b in zip(open_clip_vectors(theirs, clip, photos(size=size), tiny.CAPTIONS), want):
        close(a, b, 5e-5)


def merged_for_open_clip(clip, tmp_path, adapt, size=64):
    import open_clip
    from safetensors.torch import save_file

    e, wrapped, want = adapted(f"open_clip:{clip}", tmp_path / "adapter", adapt)
    save_file({k: v.contiguous() for k, v in merge(wrapped).state_dict().items()}, tmp_path / "merged.safetensors")
    one = open_clip.create_model(f"local-dir:{clip}").eval()
    open_clip.load_checkpoint(one, str(tmp_path / "merged.safetensors"))
    folder = tmp_path / "merged"
    folder.mkdir()
    for f in Path(clip).iterdir():
        (folder / f.name).write_bytes(
            (tmp_path / "merged.safetensors").read_bytes() if f.suffix == ".safetensors" else f.read_bytes()
        )
    for model in (one, open_clip.create_model(f"local-dir:{folder}").eval()):
        for a, b in zip(open_clip_vectors(model, clip, photos(size=size), tiny.CAPTIONS), want):
            close(a, b, 5e-5)
    assert set(one.state_dict()) == set(e.model.state_dict())


def adapter_and_merged_for_transformers(folder, tmp_path, size=64):
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    e, wrapped, want = adapted(f"transformers:{folder}", tmp_path / "adapter")
    see, read = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), tmp_path / "adapter"
    )
    merge(wrapped).save_pretrained(tmp_path / "merged")
    plain = AutoModel.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ids = dict(
        padding="max_length",
        max_length=plain.config.text_config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    for model in (theirs.base_model.model, plain):
        with torch.inference_mode():
            x, y = (
                model.get_image_features(pixel_values=see(photos(size=size), return_tensors="pt").pixel_values),
                model.get_text_features(input_ids=read(tiny.CAPTIONS, **ids).input_ids),
            )
        for a, b in zip((x, y), want):
            close(unit(getattr(a, "pooler_output", a)), b, 5e-5)


# --- tiny and micro models ---------------------------------------------------------------------------------------


def test_an_adapter_is_peft_s_own(tiny_clip, tmp_path):
    peft_of_open_clip(tiny_clip, tmp_path)


@pytest.mark.parametrize("adapt", [add_lora, add_paper_lora])
def test_merged_weights_are_open_clip_s_own(tiny_clip, tmp_path, adapt):
    merged_for_open_clip(tiny_clip, tmp_path, adapt)


def test_adapters_and_merged_weights_are_transformers_own(tiny_judge, tmp_path):
    adapter_and_merged_for_transformers(tiny_judge, tmp_path)


def test_the_committed_clip_round_trips(tmp_path):
    from selfalign.study.settings import find_root

    peft_of_open_clip(find_root() / "data/micro/clip", tmp_path)


def test_an_adapter_comes_back_in_the_study(tiny_clip, tmp_path):
    _, _, want = adapted(f"open_clip:{tiny_clip}", tmp_path / "adapter")
    again = load_dual_encoder(f"open_clip:{tiny_clip}")
    merge(load_adapter(again, tmp_path / "adapter"))
    close(again.encode_text(tiny.CAPTIONS), want[1], 5e-5)


@pytest.mark.slow
def test_a_generator_saved_again_paints_the_same(tiny_generator, tmp_path):
    "The study's pipeline, saved by it and opened by diffusers alone in a process that knows nothing of the study."
    ours = load_generator(f"diffusers:{tiny_generator}")
    ours.save_pretrained(tmp_path / "saved", safe_serialization=True)
    want = ours(
        tiny.CAPTIONS[:2],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(s) for s in (1, 2)],
        output_type="np",
    ).images
    code = f"""import sys, numpy as np, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r}, use_safetensors=True)
noise = [torch.Generator().manual_seed(s) for s in (1, 2)]
options = dict(num_inference_steps=3, guidance_scale=3.0, generator=noise, output_type="np")
images = pipe({tiny.CAPTIONS[:2]!r}, **options).images
assert not [m for m in sys.modules if m.startswith('selfalign')]
np.save({str(tmp_path / "theirs.npy")!r}, images)"""
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert np.abs(np.load(tmp_path / "theirs.npy") - want).max() < 1e-4 and want.std() > 0.01


# --- full size: gigabytes and minutes, asked for with -m big -------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "Folders of random weights, made when they are asked for."
    home = tmp_path_factory.mktemp("random")

    def make(name):
        return home / name if (home / name).is_dir() else random_weights(SHAPES[name], home / name)

    return make


@pytest.mark.big
def test_full_size_open_clip_round_trips(full, tmp_path):
    clip = full("ViT-B-32")
    (tmp_path / "a").mkdir()
    peft_of_open_clip(clip, tmp_path / "a", 224)
    (tmp_path / "b").mkdir()
    merged_for_open_clip(clip, tmp_path / "b", add_paper_lora, 224)


@pytest.mark.big
def test_full_size_siglip_round_trips(full, tmp_path):
    adapter_and_merged_for_transformers(full("siglip-base"), tmp_path, 224)


@pytest.mark.big
def test_full_size_stable_diffusion_is_diffusers_own(full):
    from diffusers import StableDiffusionPipeline

    folder = full("stable-diffusion-2-base")
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, torch_dtype=torch.float32, safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    assert count({p: getattr(pipe, p) for p in ("unet", "vae", "text_encoder")}) == count(
        skeleton(SHAPES["stable-diffusion-2-base"])
    )
    paint = lambda p: (
        p(
            "a red cat",
            num_inference_steps=1,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).images
    )
    theirs = paint(pipe)
    del pipe
    torch.testing.assert_close(paint(load_generator(f"diffusers:{folder}")), theirs, atol=1e-4, rtol=1e-4)
