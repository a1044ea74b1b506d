"Generate: the same images whatever the batch, the memory, or an interruption."

import os, signal
import numpy as np, pandas as pd, pytest, torch
from selfalign.data.generated import image_orders, image_seed, is_blank
from selfalign.data.pairs import pairs_table
from selfalign.models.load import load_generator
from selfalign.models.text_to_image import (
    ImageGenerator,
    add_ip_adapter,
    agreement,
    image_prompts,
    image_to_image,
    out_of_memory,
    set_scheduler,
    split_adapter,
    too_long,
)
from selfalign.study.settings import StudyError

PROMPTS = [f"a {c} {o}" for c in ("red", "blue") for o in ("cat", "boat", "star")]
SEEDS = [image_seed(p) for p in PROMPTS]
OPTIONS = dict(num_inference_steps=6, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe(tiny_generator):
    return load_generator(f"diffusers:{tiny_generator}")


@pytest.fixture(scope="module")
def made(pipe):
    return list(ImageGenerator(pipe, 6, **OPTIONS)(PROMPTS, SEEDS))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_same_image_whatever_the_batch(pipe, made, batch):
    again = list(ImageGenerator(pipe, batch, **OPTIONS)(PROMPTS, SEEDS))
    assert agreement(made, again) >= 0.999


def test_same_image_whatever_the_order(pipe, made):
    again = list(ImageGenerator(pipe, 4, **OPTIONS)(PROMPTS[::-1], SEEDS[::-1]))
    assert agreement(made, again[::-1]) >= 0.999


def test_same_batch_same_bits(pipe, made):
    again = list(ImageGenerator(pipe, 6, **OPTIONS)(PROMPTS, SEEDS))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(made, again))


def test_images_differ(made):
    assert len({p.tobytes() for p in made}) == len(made)
    assert not any(map(is_blank, made))


@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpm"])
def test_schedulers_keep_the_promise(tiny_generator, scheduler):
    pipe = set_scheduler(load_generator(f"diffusers:{tiny_generator}"), scheduler)
    one, many = (list(ImageGenerator(pipe, b, **OPTIONS)(PROMPTS[:4], SEEDS[:4])) for b in (1, 4))
    assert agreement(one, many) >= 0.999
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_negative_prompt(pipe, made):
    away = ImageGenerator(pipe, 4, negative_prompt="a blue boat", **OPTIONS)
    assert agreement(made, list(away(PROMPTS, SEEDS))) < 0.999


class Narrow:
    "A pipeline that holds so many images and no more."

    def __init__(self, pipe, most, error):
        self.pipe, self.most, self.error, self.tried = pipe, most, error, []

    def __call__(self, prompts, **options):
        self.tried.append(len(prompts))
        if len(prompts) > self.most:
            raise self.error
        return self.pipe(prompts, **options)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes"),
    RuntimeError("HIP out of memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_full_memory_halves_the_batch(pipe, made, error):
    narrow = Narrow(pipe, 2, error)
    generator = ImageGenerator(narrow, 6, **OPTIONS)
    assert agreement(made, list(generator(PROMPTS, SEEDS))) >= 0.999
    assert narrow.tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert generator.batch == 1


@pytest.mark.slow
def test_each_image_begins_with_its_own_original():
    from selfalign.data.scenes import make_scene, render

    pipe = image_to_image(load_generator("diffusers:data/micro/generator"))
    originals = [render(make_scene("study", i)) for i in range(6)]

    def begin(batch, order, strength=0.2):
        generator = ImageGenerator(pipe, batch, num_inference_steps=10, guidance_scale=2.0, strength=strength)
        return list(generator(*([x[i] for i in order] for x in (PROMPTS, SEEDS, originals))))

    def away(images):
        return np.abs(np.stack(images).astype(float) - np.stack(originals)).mean((1, 2, 3))

    near = begin(6, range(6))
    assert agreement(near, begin(2, range(6))) >= 0.999
    assert agreement(near[::-1], begin(4, range(6)[::-1])) >= 0.999
    assert (away(near) < away(near[1:] + near[:1])).all(), "each image is nearest to its own original"
    assert (away(near) < away(begin(6, range(6), 0.9))).all(), "strength leads away"


def write_ip_adapter(folder, unet, seed=0):
    "An IP-Adapter of random weights in the format of `h94/IP-Adapter`, with its image encoder, for a UNet."
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    deep = unet.config.cross_attention_dim
    width, words = 24, 4
    see = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        projection_dim=width,
    )
    CLIPVisionModelWithProjection(see).save_pretrained(folder / "image_encoder")
    said = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    weights = {
        "image_proj.proj.weight": torch.randn(words * deep, width),
        "image_proj.proj.bias": torch.randn(words * deep),
        "image_proj.norm.weight": torch.ones(deep),
        "image_proj.norm.bias": torch.zeros(deep),
    }
    for i, m in enumerate(said):
        weights |= {
            f"ip_adapter.{2 * i + 1}.to_{x}_ip.weight": torch.randn_like(getattr(m, f"to_{x}").weight) / deep**0.5
            for x in "kv"
        }
    save_file(weights, folder / "ip-adapter_micro.safetensors")
    return f"diffusers:{folder / 'ip-adapter_micro.safetensors'}"


@pytest.fixture(scope="module")
def ip_adapter(tmp_path_factory):
    return write_ip_adapter(
        tmp_path_factory.mktemp("adapters") / "micro", load_generator("diffusers:data/micro/generator").unet
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.slow
def test_each_prompt_is_shown_its_own_image(ip_adapter, guidance):
    from selfalign.data.scenes import make_scene, render

    options = dict(num_inference_steps=4, guidance_scale=guidance)
    originals = [render(make_scene("study", i)) for i in range(6)]
    pipe = load_generator("diffusers:data/micro/generator")
    adapted = add_ip_adapter(load_generator("diffusers:data/micro/generator"), ip_adapter, 0.0)

    def generate(batch, shown):
        generator = ImageGenerator(adapted, batch, lambda images: image_prompts(adapted, images, guidance), **options)
        return list(generator(PROMPTS, SEEDS, shown))

    without = list(ImageGenerator(pipe, 6, **options)(PROMPTS, SEEDS))
    assert agreement(generate(6, originals), without) >= 0.999
    adapted.set_ip_adapter_scale(1.0)
    seen = generate(6, originals)
    assert agreement(seen, without) < 0.9
    assert agreement(seen, generate(2, originals)) >= 0.999
    other = generate(6, [originals[0], *originals[:5]])  # the first is shown the same as before
    assert agreement(seen[:1], other[:1]) >= 0.999
    assert all(agreement([a], [b]) < 0.99 for a, b in zip(seen[1:], other[1:]))


def test_an_ip_adapter_of_another_family(tmp_path):
    from selfalign.models.generator import new_unet

    other = write_ip_adapter(tmp_path / "wide", new_unet((32, 64), context=96))
    with pytest.raises(StudyError, match="cannot be put into StableDiffusionPipeline: .* fits one family"):
        add_ip_adapter(load_generator("diffusers:data/micro/generator"), other)


@pytest.mark.parametrize(
    "text",
    [
        "h94/IP-Adapter/sdxl_models/x.safetensors",
        "diffusers:h94/IP-Adapter",
        "diffusers:h94/IP-Adapter/sdxl_models/x.bin",
        "diffusers:data/nowhere/at/all/x.safetensors",
    ],
)
def test_what_is_no_ip_adapter(text):
    with pytest.raises(StudyError, match="IP-Adapter|there is no file"):
        split_adapter(text)


def test_not_even_one_image_fits(pipe):
    with pytest.raises(StudyError, match="not even one image"):
        list(ImageGenerator(Narrow(pipe, 0, MemoryError()), 4)(PROMPTS, SEEDS))


def test_other_errors_are_not_swallowed(pipe):
    with pytest.raises(RuntimeError, match="shapes"):
        list(ImageGenerator(Narrow(pipe, 0, RuntimeError("shapes do not fit")), 4)(PROMPTS, SEEDS))
    assert not out_of_memory(KeyError("memory"))


def test_orders_and_seeds():
    pairs = pairs_table([dict(key=f"p{i}", caption="a cat", subset=i) for i in range(3)])
    orders = image_orders(pairs, k=4, seed=1)
    assert len({o["key"] for o in orders}) == 12
    assert len({o["seed"] for o in orders}) == 12
    assert all(0 <= o["seed"] < 2**32 for o in orders)
    assert image_orders(pairs[1:], k=4, seed=1) == orders[4:]
    assert image_seed("p0", 0, 1) != image_seed("p0", 0, 2)


def test_captions_cut_short_are_known(pipe):
    room = pipe.tokenizer.model_max_length - 2
    letters = ["z " * n for n in (1, room // 2, 200)]
    ids = [len(pipe.tokenizer(t).input_ids) > pipe.tokenizer.model_max_length for t in letters]
    assert too_long(pipe, letters) == ids == [False, ids[1], True]


def test_diversity_is_the_mean_distance_of_two_images_of_a_caption():
    from itertools import combinations
    from selfalign.models.dials import diversity

    x = np.random.default_rng(0).normal(size=(9, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    of = list("ababcabda")
    found = diversity(x, of)
    assert list(found.index) == ["a", "b"]  # c and d have one image each
    for name in found.index:
        rows = [i for i, o in enumerate(of) if o == name]
        assert found[name] == pytest.approx(np.mean([1 - x[i] @ x[j] for i, j in combinations(rows, 2)]))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_best_of_the_first_k(k):
    from selfalign.models.dials import best_of

    table = pd.DataFrame(
        dict(parent=np.repeat(list("abcd"), 3), k=[0, 1, 2] * 4, score=np.random.default_rng(1).permutation(12))
    )
    kept = best_of(table, k, "score")
    assert list(kept.parent) == list("abcd")
    assert (kept.k < k).all()
    assert list(kept.score) == [table[(table.parent == p) & (table.k < k)].score.max() for p in "abcd"]


def test_each_dial_is_turned_alone():
    from selfalign.models.dials import dial_settings

    base = dict(guidance=3.0, steps=10, strength=0.0)
    found = dial_settings(base, guidance=[1.0, 2.0], strength=[0.5])
    assert list(found[["dial", "notch", "guidance", "steps", "strength"]].itertuples(index=False, name=None)) == [
        ("guidance", 1.0, 1.0, 10, 0.0),
        ("guidance", 2.0, 2.0, 10, 0.0),
        ("strength", 0.5, 3.0, 10, 0.5),
    ]
    with pytest.raises(StudyError, match="unknown dial"):
        dial_settings(dict(guidance=3.0), heat=[1])


def test_unknown_scheduler(pipe):
    with pytest.raises(StudyError, match="did you mean 'euler'"):
        set_scheduler(pipe, "eular")


@pytest.fixture(scope="module")
def study_root(tmp_path_factory):
    import study

    return study.make_study(tmp_path_factory.mktemp("study"))


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(study_root):
    "A run killed within the 14th image (three shards of four are whole), and one in one piece, leave the same bytes."
    import study

    runs = study_root / "data/runs"
    partial = runs / "killed/generate.partial"
    study.start(study_root, "killed", ["sample"])
    env, event = study.stopped(study_root, 14)
    process = study.start(study_root, "killed", ["generate"], wait=False, env=env)
    study.until(event.exists, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in (partial / "shards").glob("*.parquet")}
    assert len(before) == 3
    assert len(list(partial.rglob(".*png*"))) == 1, "the image at work"
    study.start(study_root, "killed", ["generate"])
    study.start(study_root, "whole", ["generate"], force=["generate"])
    whole, resumed = (pd.read_parquet(runs / r / "generate/tables/pairs.parquet") for r in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole, resumed)
    for image in whole.image:
        assert (runs / "whole/generate" / image).read_bytes() == (runs / "killed/generate" / image).read_bytes()
    for path, when in before.items():
        assert (runs / "killed/generate/shards" / path.name).stat().st_mtime_ns == when
    assert not list((runs / "killed").rglob(".*png*")), "what the killed run left is swept"
    leads_back(pd.read_parquet(runs / "whole/sample/tables/pairs.parquet"), whole)


def leads_back(pairs, made):
    "Every generated pair inherits from its original what it should, and no truth."
    assert set(made.parent) == set(pairs.key)
    assert (made.image_source == "generated").all()
    assert made.steps.eq(12).all()
    joined = made.merge(pairs, left_on="parent", right_on="key", suffixes=("", "_of"))
    for column in ("caption", "scene", "subset", "split", "claims"):
        assert (joined[column] == joined[f"{column}_of"]).all()
    assert made.truth.isna().all()
    assert made.aligned.isna().all()
    assert (joined.prompt == joined.caption_of).all()
