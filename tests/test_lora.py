"Adapters and fine-tuning: nothing moves that is frozen, every arm is trained alike, a kill leaves no trace."

import json, math, os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, tiny
from PIL import Image
from selfalign.models.adapters import (
    TrainedWeights,
    add_all_weights,
    add_lora,
    load_adapter,
    merge,
    save_adapter,
    trainable,
    wise_ft,
)
from selfalign.models.finetune import (
    FinetuneConfig,
    RandomCrops,
    TextTable,
    TrainingPairs,
    Validation,
    ask_before,
    batch_rows,
    batch_vectors,
    finetune,
    keep_recipe,
    random_crops,
    steps_for,
    validate,
)
from selfalign.models.dual_encoder import OpenClipEncoder, normalise, squares
from selfalign.models.load import load_dual_encoder
from selfalign.models.references import ModelError
from selfalign.models.objective import Objective
from selfalign.models.paper_lora import add_paper_lora, counted, paper_layers, papers_size
from selfalign.models.towers import find_layers, layer_pattern
from selfalign.study.ranking import recall_of_pairs
from selfalign.study.settings import StudyError

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = pytest.mark.parametrize("family", ["open_clip", "siglip", "hf_clip"])
TEXTS = tiny.CAPTIONS


def pixels(n=5, seed=0, size=64):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def photos(n=5, seed=0):
    return [Image.fromarray(p) for p in pixels(n, seed)]


@pytest.fixture
def fresh(tiny_clip, tiny_judge, tiny_hf_clip):
    where = dict(
        open_clip=f"open_clip:{tiny_clip}", siglip=f"transformers:{tiny_judge}", hf_clip=f"transformers:{tiny_hf_clip}"
    )
    return lambda family="open_clip": load_dual_encoder(where[family])


def vectors(encoder):
    return torch.cat([encoder.encode_image(photos()), encoder.encode_text(TEXTS)])


def pretend(adapted, size=0.05):
    "As if it had been trained."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.copy_(size * torch.randn(p.shape, generator=g))


# --- adapters ----------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.slow
def test_at_step_0_the_original(fresh, family):
    e = fresh(family)
    before = vectors(e)
    frozen = {k: v.clone() for k, v in e.model.state_dict().items()}
    adapted = add_lora(e, rank=3)
    torch.testing.assert_close(vectors(e), before, atol=2e-6, rtol=0)
    pretend(adapted)
    assert (vectors(e) - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(vectors(e), before, atol=2e-6, rtol=0)
    plain = {n.replace("base_layer.", ""): v for n, v in e.model.state_dict().items() if "lora_" not in n}
    assert plain.keys() == frozen.keys() and all(torch.equal(v, frozen[k]) for k, v in plain.items()), (
        "frozen weights moved"
    )


@FAMILIES
def test_only_what_was_asked_for(fresh, family):
    for towers, targets in (("text", "mlp"), ("image", ("attention",)), (("image", "text"), "attention")):
        table = trainable(add_lora(fresh(family), towers=towers, targets=targets))
        assert set(table.tower) == set([towers] if isinstance(towers, str) else towers)
        assert set(table.target) == set([targets] if isinstance(targets, str) else targets)


def test_counted_by_hand(fresh):
    table = trainable(add_lora(fresh(), rank=2)).set_index(["tower", "target"]).parameters
    for tower, width in (("image", 64), ("text", 32)):
        assert (
            table[tower, "attention"] == 2 * 2 * (4 * width + 2 * width)
            and table[tower, "mlp"] == 2 * 2 * 2 * 5 * width
        )
    assert trainable(add_lora(fresh(), rank=4)).parameters.sum() == 2 * table.sum()


def test_heads_embeddings_and_temperature_are_left_alone(fresh):
    for family in ("open_clip", "siglip", "hf_clip"):
        e = fresh(family)
        adapted = add_lora(e)
        moved = [n for n, p in adapted.named_parameters() if p.requires_grad]
        assert (
            moved
            and all("lora_" in n for n in moved)
            and not any(w in n for n in moved for w in ("head", "embed", "proj.weight", "logit", "ln_", "norm"))
        )
        assert len({p.shape for p in adapted.parameters()}) and not e.model.logit_scale.requires_grad


def test_pattern_means_these_layers_and_no_others(fresh):
    import re

    model = fresh().model
    image = find_layers(model, towers="image").name
    pattern = layer_pattern(image)
    assert [n for n, _ in model.named_modules() if re.fullmatch(pattern, n)] == list(image)
    assert not any(n.endswith("out_proj") for n in image)


def test_scale(fresh):
    scale = lambda **kw: next(m.scaling["default"] for m in add_lora(fresh(), **kw).modules() if hasattr(m, "scaling"))
    assert scale(rank=8) == 1 and scale(rank=4, alpha=1) == 0.25 and scale(rank=16, alpha=8, rslora=True) == 2


def test_seeds(fresh):
    encoders = [fresh() for _ in range(3)]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, three = (
        torch.cat([p.flatten() for n, p in add_lora(e, seed=s).named_parameters() if "lora_A" in n])
        for e, s in zip(encoders, (0, 0, 1))
    )
    assert torch.equal(one, two) and not torch.equal(one, three) and torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(targets="attentoin"), "did you mean 'attention'"),
        (dict(targets=("mlp", "mpl")), "did you mean 'mlp'"),
        (dict(towers=("txt",)), "did you mean 'text'"),
        (dict(towers=()), "no tower at all"),
        (dict(rank=0), "rank 0"),
        (dict(dropout=0.1), "would silently not"),
    ],
)
def test_refused(fresh, wrong, message):
    with pytest.raises(ModelError, match=message):
        add_lora(fresh(), **wrong)


def test_not_twice_and_not_on_another_shape(fresh):
    e = fresh()
    add_lora(e)
    with pytest.raises(ModelError, match="has adapters already"):
        add_lora(e)
    with pytest.raises(ModelError, match="image tower"):
        find_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@FAMILIES
def test_saved_loaded_merged(fresh, family, tmp_path):
    e = fresh(family)
    reference, hash = str(e.reference), e.hash
    adapted = add_lora(e, rank=2, rslora=True, alpha=4)
    pretend(adapted)
    after = vectors(e)
    save_adapter(adapted, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == reference
    other = fresh(family)
    loaded = load_adapter(other, tmp_path)
    torch.testing.assert_close(vectors(other), after, atol=2e-6, rtol=0)
    plain = merge(loaded)
    assert (
        type(plain) is type(fresh(family).model)
        and plain.state_dict().keys() == fresh(family).model.state_dict().keys()
    )
    assert plain is other.model and not any(p.requires_grad for p in plain.parameters())
    torch.testing.assert_close(vectors(other), after, atol=1e-5, rtol=0)
    assert other.hash != hash and str(other.reference) != reference
    with pytest.raises(ModelError, match="was trained on"):
        load_adapter(fresh("siglip" if family != "siglip" else "open_clip"), tmp_path)
    with pytest.raises(ModelError, match="no adapter_model.safetensors"):
        load_adapter(fresh(family), tmp_path / "nothing")


def test_forward_after_forward_without_drift(fresh):
    from peft.tuners.lora.layer import MultiheadAttention

    e = fresh()
    before = e.model.visual.transformer.resblocks[0].attn.in_proj_weight.clone()
    adapted = add_lora(e)
    pretend(adapted, 0.5)
    layer = next(m for m in adapted.modules() if isinstance(m, MultiheadAttention))
    for _ in range(10):
        vectors(e)
    assert torch.equal(layer.base_layer.in_proj_weight, before) and not layer.base_layer.in_proj_weight.requires_grad
    layer._forward_hooks.clear()
    for _ in range(10):
        vectors(e)
    assert not torch.equal(layer.base_layer.in_proj_weight, before), "peft became exact: the hook can go"


def test_wise_ft(fresh):
    original, e = fresh().model, fresh()
    adapted = add_lora(e)
    pretend(adapted)
    new = merge(adapted)
    a, b = original.state_dict(), new.state_dict()
    for mix in (0.0, 0.25, 1.0):
        mixed = wise_ft(original, new, mix).state_dict()
        for k in a:
            torch.testing.assert_close(mixed[k], (1 - mix) * a[k] + mix * b[k], atol=1e-6, rtol=0)
    assert all(torch.equal(v, b[k]) for k, v in wise_ft(original, new, 1).state_dict().items()) and all(
        torch.equal(v, a[k]) for k, v in wise_ft(original, new, 0).state_dict().items()
    )
    half = fresh()
    pretend(add_lora(half, alpha=2.0))
    walker = fresh()
    walker.model = wise_ft(original, new, 0.5)
    torch.testing.assert_close(vectors(half), vectors(walker), atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="between 0"):
        wise_ft(original, new, 1.1)
    with pytest.raises(ModelError, match="different shape"):
        wise_ft(original, fresh("siglip").model, 0.5)
    with pytest.raises(ModelError, match="merge the adapters first"):
        wise_ft(original, add_lora(fresh()), 0.5)


# --- the parts of a training -------------------------------------------------------------------------------------


@FAMILIES
def test_prepared_equals_direct(fresh, family):
    e = fresh(family)
    wide = [Image.fromarray(pixels(1, 3, 128)[0][:64]) for _ in range(2)]
    for aspect in ("crop", "pad", "squash"):
        assert torch.equal(normalise(e, squares(e, wide, aspect)), e.pixels(wide, aspect))
    assert torch.equal(squares(e, pixels()), squares(e, photos())) and torch.equal(
        squares(e, pixels(2, 0, 80)), squares(e, [Image.fromarray(p) for p in pixels(2, 0, 80)])
    )
    with torch.no_grad():
        x, y = e.pair_vectors(squares(e, photos()), e.tokenize(TEXTS))
    torch.testing.assert_close(x, e.encode_image(photos()), atol=1e-6, rtol=0)
    torch.testing.assert_close(y, e.encode_text(TEXTS), atol=1e-6, rtol=0)


@FAMILIES
def test_pairs_in_batches_are_the_same_pairs(fresh, family):
    e = fresh(family)
    square, tokens = squares(e, photos()), e.tokenize(TEXTS)
    with torch.no_grad():
        for whole, parts in zip(e.pair_vectors(square, tokens), e.pair_vectors(square, tokens, batch=2)):
            torch.testing.assert_close(whole, parts, atol=1e-6, rtol=0)


@FAMILIES
def test_a_batch_at_a_time_is_the_plain_loop_to_the_bit(fresh, family):
    e = fresh(family)
    square, tokens, parts = squares(e, photos()), e.tokenize(TEXTS), (slice(0, 2), slice(2, 4), slice(4, 5))
    with torch.no_grad():
        x = torch.cat([e.image_vectors(square[part]) for part in parts])
        y = torch.cat([e.text_vectors(tokens[part]) for part in parts])
        assert equal(dict(x=x, y=y), dict(x=e.image_vectors(square, batch=2), y=e.text_vectors(tokens, batch=2)))
        assert equal(dict(x=x, y=y), dict(zip("xy", e.pair_vectors(square, tokens, batch=2))))


@FAMILIES
def test_asked_before_with_the_tokens_that_are_there(fresh, family):
    "What the objective wants to know is the same to the bit, and nothing is tokenized again."
    e, objective = fresh(family), Objective(distill=1.0)
    pairs, table = TrainingPairs(squares(e, photos()), TEXTS), TextTable(e, [*TEXTS[::-1], "another"], frozen=True)
    with torch.no_grad():
        x, y = e.pair_vectors(pairs.square, e.tokenize(TEXTS), batch=2)
    e.tokenizer = None
    before, _ = ask_before(e, pairs, objective, table, batch=2)
    assert equal(dict(x=x, y=y), dict(zip("xy", before)))


@FAMILIES
@pytest.mark.parametrize("frozen", [False, True])
def test_each_text_is_tokenized_once(fresh, family, frozen):
    e = fresh(family)
    direct = e.encode_text(TEXTS)
    table = TextTable(e, TEXTS * 3, frozen)
    assert len(table.tokens) == len(TEXTS)
    e.tokenizer = None  # nothing is tokenized any more
    with torch.no_grad():
        torch.testing.assert_close(table(TEXTS[::-1]), direct.flip(0), atol=1e-6, rtol=0)


def test_loss_is_open_clips(fresh):
    from open_clip.loss import ClipLoss

    e = fresh()
    add_lora(e)
    pairs = TrainingPairs(squares(e, photos()), TEXTS)
    ours = Objective()(batch_vectors(e, pairs, TextTable(e, TEXTS)))
    theirs = ClipLoss()(*e.pair_vectors(pairs.square, e.tokenize(TEXTS)), torch.tensor(e.logit_scale))
    torch.testing.assert_close(ours, theirs)
    weights = list(TrainedWeights(e.model).parameters())
    for g, h in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights)):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("n, batch", [(11, 4), (8, 4), (5, 5)])
def test_batches(n, batch):
    per = n // batch
    epochs = [torch.cat([batch_rows(n, batch, e * per + i, seed=3) for i in range(per)]).tolist() for e in range(4)]
    assert all(len(set(e)) == per * batch and max(e) < n for e in epochs) and len({tuple(e) for e in epochs}) > 1
    assert steps_for(n, batch, 4) == 4 * per and not torch.equal(batch_rows(99, 50, 0, 0), batch_rows(99, 50, 0, 1))


def test_retrieval():
    x = torch.eye(4)
    r1 = lambda y, texts: recall_of_pairs(x, y, list(texts)).mean()
    assert r1(x, "abcd") == 1
    assert r1(x.flip(0), "abcd") == 0
    assert r1(x.flip(0), "abba") == 1


def test_validated_in_full_precision_whatever_is_around(fresh):
    e = fresh()
    pairs = TrainingPairs(squares(e, photos()), TEXTS)
    alone = validate(e, pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert validate(e, pairs) == alone
    assert validate(e, pairs, batch=2)["loss"] == pytest.approx(alone["loss"], abs=1e-4)
    assert not e.model.training


def test_recipe(tmp_path):
    keep_recipe(tmp_path, dict(lr=0.1, lora=dict(rank=2)))
    keep_recipe(tmp_path, dict(lr=0.1, lora=dict(rank=2)))
    with pytest.raises(StudyError, match="lora = .*take another folder"):
        keep_recipe(tmp_path, dict(lr=0.1, lora=dict(rank=3)))


# --- the paper's own adapter -------------------------------------------------------------------------------------


def test_the_papers_size():
    assert papers_size(add_paper_lora) == 4_141_056 and papers_size(add_lora) == 983_040
    assert papers_size(lambda e, rank: add_paper_lora(e, rank, conv=False)) == 983_040


def test_the_paper_starts_beside_the_model_and_only_there(fresh):
    e = fresh()
    before = vectors(e)
    frozen = {k: v.clone() for k, v in e.model.state_dict().items()}
    adapted = add_paper_lora(e)
    after = vectors(e)
    assert (after - before).abs().max() > 1e-4 and counted(adapted).keys() == {
        "patch embedding",
        "image tower",
        "text tower",
    }
    stored = {
        n.replace("parametrizations.", "").removesuffix(".original"): v
        for n, v in e.model.state_dict().items()
        if "lora_" not in n
    }
    assert equal(stored, frozen) and all(("lora_" in n) == p.requires_grad for n, p in adapted.named_parameters())
    other = fresh()
    add_paper_lora(other, xavier=False)
    torch.testing.assert_close(vectors(other), before, atol=2e-6, rtol=0)
    plain = merge(adapted)
    torch.testing.assert_close(vectors(e), after, atol=2e-5, rtol=0)
    assert plain.state_dict().keys() == frozen.keys()


def test_the_papers_adapter_refuses_what_it_is_not_made_for(fresh, tmp_path):
    for family in ("siglip", "hf_clip"):
        with pytest.raises(ModelError, match="no fused attention"):
            add_paper_lora(fresh(family))
    import open_clip

    with torch.device("meta"):
        mixed = open_clip.create_model("RN50", device="meta")
    with pytest.raises(ModelError, match="in its image tower"):
        paper_layers(mixed)
    e = fresh()
    adapted = add_paper_lora(e)
    save_adapter(adapted, tmp_path)
    for again in (add_lora, add_paper_lora):
        with pytest.raises(ModelError, match="has adapters already"):
            again(e)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "open_clip:x"}))
    with pytest.raises(ModelError, match="was trained on open_clip:x"):
        load_adapter(fresh(), tmp_path)


def test_each_quirk_can_be_left_out(fresh):
    names = lambda **o: {
        n.split(".parametrizations")[0].rsplit(".", 1)[-1] for n in add_paper_lora(fresh(), **o).weights()
    }
    assert names() == {"conv1", "attn", "out_proj", "c_fc", "c_proj"} and names(conv=False) == names() - {"conv1"}


# --- an arm ------------------------------------------------------------------------------------------------------


PAIRS = dict(images=pixels(12), captions=[f"{TEXTS[i % 5]} {i}" for i in range(12)])
CONFIG = dict(steps=9, lr=1e-2, batch=4, options=dict(rank=2))


def arm(reference, folder, validation=True, crops=1.0, **change):
    "A training of twelve pairs; what is changed belongs to the pairs or to the config."
    e = load_dual_encoder(reference)
    given = PAIRS | {k: change.pop(k) for k in ("images", "captions", "positives", "negatives") if k in change}
    texts = given["captions"], given.get("positives", ()), given.get("negatives", ())
    pairs = TrainingPairs(squares(e, given["images"]), *texts)
    callbacks = [Validation(TrainingPairs(squares(e, pixels(5, 1)), TEXTS))] if validation else []
    if crops < 1:
        callbacks.append(RandomCrops(crops))
    return finetune(e, pairs, FinetuneConfig(**CONFIG | change), folder, callbacks, every=0.0)


def examined(folder):
    return pd.DataFrame(json.loads((Path(folder) / "validation.json").read_text()))


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter/adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def whole(tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms") / "whole"
    return folder, arm(f"open_clip:{tiny_clip}", folder)


def test_learns_and_leaves_a_plain_encoder(whole, tiny_clip):
    folder, done = whole
    v = examined(folder)
    original = load_dual_encoder(f"open_clip:{tiny_clip}")
    assert v.step.tolist() == [0, 3, 6, 9] and v.epoch.tolist() == [0, 1, 2, 3]
    before = validate(original, TrainingPairs(squares(original, pixels(5, 1)), TEXTS))
    assert v.loss[0] == pytest.approx(before["loss"], abs=1e-4), "at step 0 it is the original"
    assert done.curve.step.tolist() == [3, 6, 9] and done.curve.loss.iloc[-1] < done.curve.loss.iloc[0]
    assert type(done.encoder.model) is type(original.model) and done.encoder.logit_scale == original.logit_scale
    assert done.encoder.hash != original.hash and str(done.encoder.reference).endswith("+whole")
    fresh = load_dual_encoder(f"open_clip:{tiny_clip}")
    merge(load_adapter(fresh, folder / "adapter"))
    assert equal(fresh.model.state_dict(), done.encoder.model.state_dict()), "the adapter alone is the whole result"


def test_the_last_step_is_what_is_kept(whole):
    folder, _ = whole
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(v, state["averages"][f"module.{k}"]) for k, v in state["module"].items()) and all(
        "lora_" in k for k in state["module"]
    )


def test_again_is_nothing(whole, tiny_clip):
    folder, done = whole
    before, v = weights_of(folder), examined(folder)
    again = arm(f"open_clip:{tiny_clip}", folder)
    assert equal(before, weights_of(folder)) and equal(
        done.encoder.model.state_dict(), again.encoder.model.state_dict()
    )
    pd.testing.assert_frame_equal(v, examined(folder))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_lora as t
from selfalign.models.finetune import Callback
class Kill(Callback):
    def before_step(self, training, step):
        if step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
real = t.finetune
t.finetune = lambda *a, every: real(*a[:-1], [*a[-1], Kill()], every)
t.arm({reference!r}, {folder!r})
"""


@pytest.mark.slow
def test_killed_and_resumed(whole, tiny_clip, tmp_path):
    "Before the fifth step, after the checkpoint of the fourth."
    reference, folder = f"open_clip:{tiny_clip}", tmp_path / "killed"
    code = KILLED.format(tests=str(ROOT / "tests"), step=4, reference=reference, folder=str(folder))
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 4 and not (folder / "adapter").exists()
    resumed = arm(reference, folder)
    assert equal(weights_of(folder), weights_of(whole[0])), "another model than without the kill"
    pd.testing.assert_frame_equal(examined(folder), examined(whole[0]))
    assert set(resumed.curve.sitting) == {0, 1}


def test_seeds_and_pairs_matter_and_validation_does_not(whole, tiny_clip, tmp_path):
    reference, first = f"open_clip:{tiny_clip}", weights_of(whole[0])
    arm(reference, tmp_path / "a", validation=False)
    assert equal(weights_of(tmp_path / "a"), first)
    arm(reference, tmp_path / "b", seed=1)
    assert not equal(weights_of(tmp_path / "b"), first)
    arm(reference, tmp_path / "c", images=pixels(12, 9))
    assert not equal(weights_of(tmp_path / "c"), first)


def test_the_papers_recipe(tiny_clip, tmp_path):
    reference = f"open_clip:{tiny_clip}"
    paper = dict(adapter="paper", warmup=1 / 0.7)
    done = arm(reference, tmp_path / "a", **paper)
    fresh = load_dual_encoder(reference)
    merge(load_adapter(fresh, tmp_path / "a/adapter"))
    assert equal(fresh.model.state_dict(), done.encoder.model.state_dict())
    original = load_dual_encoder(reference).model.state_dict()
    moved = {k for k, v in done.encoder.model.state_dict().items() if not torch.equal(v, original[k])}
    assert "visual.conv1.weight" in moved and all(
        any(t in k for t in ("conv1", "in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight"))
        for k in moved
    )
    with pytest.raises(StudyError, match="warmup = "):
        arm(reference, tmp_path / "a", adapter="paper")
    with pytest.raises(StudyError, match="adapter = "):
        arm(reference, tmp_path / "a", warmup=1 / 0.7)


def test_other_recipe_refused(whole, tiny_clip):
    for change, what in (
        (dict(lr=0.1), "lr"),
        (dict(images=pixels(12, 9)), "pairs"),
        (dict(options=dict(rank=3)), "options"),
        (dict(steps=10), "steps"),
    ):
        with pytest.raises(StudyError, match=f"holds a training with {what} = "):
            arm(f"open_clip:{tiny_clip}", whole[0], **change)


WORDS = [f"{TEXTS[i % 5]} {i} again" for i in range(12)]
OBJECTIVES = dict(
    sigmoid=dict(objective=Objective("sigmoid")),
    multi=dict(objective=Objective("multi-positive"), captions=[TEXTS[i // 2 % 5] for i in range(12)], group=2),
    self_positives=dict(objective=Objective(positives=1.0)),
    positives=dict(objective=Objective(positives=1.0), positives=WORDS),
    negatives=dict(objective=Objective(negatives=1.0), negatives=[w * (i % 3 > 0) for i, w in enumerate(WORDS)]),
    distilled=dict(objective=Objective(distill=1.0)),
    crops=dict(crops=0.9),
    unclipped=dict(clip=float("inf"), eps=1e-6),
)


@pytest.mark.slow
def test_objectives(whole, tiny_clip, tmp_path):
    "Each makes another model than the others, the same one again, and its folder knows which it was."
    found = {
        name: (arm(f"open_clip:{tiny_clip}", tmp_path / name, **change), weights_of(tmp_path / name))[1]
        for name, change in OBJECTIVES.items()
    } | dict(plain=weights_of(whole[0]))
    names = list(found)
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if equal(found[a], found[b])]
    arm(f"open_clip:{tiny_clip}", tmp_path / "again", **OBJECTIVES["crops"])
    assert equal(weights_of(tmp_path / "again"), found["crops"])
    for what, change in (("objective", dict(objective=Objective(positives=2.0))), ("pairs", OBJECTIVES["positives"])):
        with pytest.raises(StudyError, match=f"with {what} = "):
            arm(f"open_clip:{tiny_clip}", tmp_path / "self_positives", **change)


def test_a_model_kept_where_it_was_moves_less(whole, tiny_clip, tmp_path):
    reference = f"open_clip:{tiny_clip}"
    arm(reference, tmp_path / "x", objective=Objective(distill=30.0))
    e = load_dual_encoder(reference)
    before = vectors(e)
    moved = {}
    for name, folder in dict(plain=whole[0], kept=tmp_path / "x").items():
        tuned = load_dual_encoder(reference)
        merge(load_adapter(tuned, folder / "adapter"))
        moved[name] = float((vectors(tuned) @ vectors(tuned).T - before @ before.T).abs().mean())
    assert moved["kept"] < moved["plain"]


def test_crops():
    square = torch.as_tensor(pixels(6))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = random_crops(square, 0.9, 1), random_crops(square, 0.9, 1), random_crops(square, 0.9, 2)
    assert torch.equal(torch.rand(1), expected) and one.shape == square.shape and one.dtype == torch.uint8
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(objective=Objective(negatives=1.0)), "12 captions need as many texts, there are 0"),
        (dict(group=5), "whole groups"),
        (dict(batch=13), "a batch of 13 from 12"),
        (dict(batch=1), "a batch of 1"),
        (dict(steps=0), "0 steps"),
        (dict(captions=["a"]), "do not make pairs"),
    ],
)
def test_cannot_be_trained(tiny_clip, tmp_path, change, message):
    with pytest.raises(StudyError, match=message):
        arm(f"open_clip:{tiny_clip}", tmp_path / "x", **change)
    assert not (tmp_path / "x").exists()


def test_the_other_family_with_dropout(tiny_judge, tmp_path):
    reference = f"transformers:{tiny_judge}"
    change = dict(steps=4, options=dict(rank=2, towers="text", dropout=0.2))
    torch.manual_seed(0)
    one = arm(reference, tmp_path / "a", **change)
    torch.manual_seed(9)
    arm(reference, tmp_path / "b", **change)
    assert equal(weights_of(tmp_path / "a"), weights_of(tmp_path / "b")), "dropout follows from seed and step"
    original = load_dual_encoder(reference)
    torch.testing.assert_close(one.encoder.encode_image(photos()), original.encode_image(photos()), atol=1e-6, rtol=0)
    assert (one.encoder.encode_text(TEXTS) - original.encode_text(TEXTS)).abs().max() > 1e-3


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_frozen_tower_is_asked_once(tiny_clip, tmp_path, tower, monkeypatch):
    reference, seen = f"open_clip:{tiny_clip}", []

    def counted(kind):
        real = getattr(OpenClipEncoder, kind)
        monkeypatch.setattr(
            OpenClipEncoder, kind, lambda self, x: (seen.append((kind, torch.is_grad_enabled())), real(self, x))[1]
        )

    for kind in ("image_features", "text_features"):
        counted(kind)
    options = dict(rank=2, towers=(tower,))
    arm(reference, tmp_path / "once", steps=4, options=options)
    frozen = "text_features" if tower == "image" else "image_features"
    assert not any(grad for kind, grad in seen if kind == frozen)
    assert any(grad for kind, grad in seen if kind != frozen)
    asked = [kind for kind, _ in seen].count(frozen)
    seen.clear()
    arm(reference, tmp_path / "longer", steps=12, options=options)
    if tower == "image":
        assert [kind for kind, _ in seen].count(frozen) == asked, "whatever the number of steps"
    arm(reference, tmp_path / "cropped", steps=4, options=options, crops=1 - 1e-9)
    assert seen


def test_all_weights(tiny_clip, tmp_path):
    "Both towers move, the temperature does not, and the saved weights are the whole result."
    reference = f"open_clip:{tiny_clip}"
    done = arm(reference, tmp_path / "all", adapter="all-weights", options={}, lr=1e-3)
    original, loaded = load_dual_encoder(reference), load_dual_encoder(reference)
    moved = {
        k for k, v in done.encoder.model.state_dict().items() if not torch.equal(v, original.model.state_dict()[k])
    }
    for start in ("visual.", "transformer.", "token_embedding.", "text_projection"):
        assert any(k.startswith(start) for k in moved), start
    assert "logit_scale" not in moved
    merge(load_adapter(loaded, done.adapter))
    assert equal(loaded.model.state_dict(), done.encoder.model.state_dict())


def test_all_weights_of_one_tower(tiny_clip):
    e = load_dual_encoder(f"open_clip:{tiny_clip}")
    add_all_weights(e, towers=("text",))
    assert not [n for n, p in e.model.named_parameters() if p.requires_grad and n.startswith("visual.")]
    with pytest.raises(ModelError, match="unknown tower"):
        add_all_weights(e, towers=("ear",))


def test_warmup_is_over():
    from selfalign.models.train import warmup_cosine

    rates = [warmup_cosine(s, 200) for s in range(200)]
    assert (
        max(rates) == 1
        and rates.index(1.0) <= 10
        and rates[-1] < 0.01
        and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    )
