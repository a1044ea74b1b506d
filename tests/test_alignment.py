"Alignment of frozen features: losses by blocks, heads, batches from arrays, trainings that resume."

import tempfile
from dataclasses import replace
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from selfalign.models.alignment import AlignmentConfig, align, encode, retrieval_of
from selfalign.models.features import PairedFeatures, fingerprint, gather, shuffled_pairs, some_pairs
from selfalign.models.heads import HEADS, head_parameters, make_head, matched_hidden
from selfalign.models.losses import info_nce, sigmoid_loss
from selfalign.models.references import ModelError
from selfalign.models.train import step_generator
from selfalign.study.ranking import ranks_both_ways
from selfalign.study.settings import StudyError


def vectors(n, d, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64), dim=-1).to(dtype) for _ in range(2)]


def with_gradients(loss, *values):
    "A loss and its gradients."
    values = [v.detach().clone().requires_grad_() for v in values]
    found = loss(*values)
    return [found.detach(), *torch.autograd.grad(found, values)]


# --- losses by blocks --------------------------------------------------------------------------------------------

batches = dict(
    n=st.integers(1, 70),
    d=st.integers(1, 33),
    block=st.integers(1, 90),
    seed=st.integers(0, 999),
    scale=st.floats(1, 100),
    bias=st.floats(-20, 5),
)


@given(**batches, per=st.sampled_from(["image", "pair"]))
def test_sigmoid_by_blocks_is_open_clips(n, d, block, seed, scale, bias, per):
    "Value and gradients of images, texts, scale and bias, in float32."
    x, y = vectors(n, d, seed)
    values = (x, y, torch.tensor(scale), torch.tensor(bias))
    theirs = with_gradients(lambda *a: SigLipLoss()(*a) / (n if per == "pair" else 1), *values)
    ours = with_gradients(lambda *a: sigmoid_loss(*a, per=per, block=block), *values)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, float(b.abs().max())), rtol=1e-5)


@given(**batches)
def test_info_nce_by_blocks_is_open_clips(n, d, block, seed, scale, bias):
    values = (*vectors(n, d, seed), torch.tensor(scale))
    theirs = with_gradients(ClipLoss(), *values)
    ours = with_gradients(lambda *a: info_nce(*a, block=block), *values)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, float(b.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("loss", [lambda *a: sigmoid_loss(*a, block=5), lambda x, y, t, b: info_nce(x, y, t, block=5)])
def test_gradients_are_those_of_small_differences(loss):
    "In double precision, by autograd's own check."
    values = [*vectors(12, 4, 0, torch.float64), torch.tensor(9.0).double(), torch.tensor(-3.0).double()]
    values = [v.requires_grad_() for v in values]
    assert torch.autograd.gradcheck(lambda *a: loss(*a) * 2, values, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_computed_with_in_float32(dtype):
    x, y = vectors(64, 32, 1, dtype)
    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    exact = with_gradients(SigLipLoss(), x.float(), y.float(), scale, bias)
    found = with_gradients(lambda *a: sigmoid_loss(*a, block=10), x, y, scale, bias)
    assert [f.dtype for f in found] == [torch.float32, dtype, dtype, torch.float32, torch.float32]
    for a, b in zip(found, exact):
        torch.testing.assert_close(a.float(), b, atol=1e-3, rtol=2 ** (-7 if dtype == torch.bfloat16 else -10))


def test_a_loss_by_blocks_leaves_other_calls_alone():
    "Two losses of the same features, one backward each, and none where none is wanted."
    x, y = (v.requires_grad_() for v in vectors(20, 8, 2))
    loss = sigmoid_loss(x, y, 20.0, -10.0, block=6)
    (loss + sigmoid_loss(x, y, 20.0, -10.0, block=7)).backward()
    theirs = torch.autograd.grad(SigLipLoss()(x, y, 20.0, -10.0), x)[0]
    torch.testing.assert_close(x.grad, 2 * theirs, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert not sigmoid_loss(x, y, 20.0, -10.0, block=6).requires_grad


# --- heads -------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from([k for k in HEADS if k != "identity"]),
    width_in=st.integers(1, 40),
    width_out=st.integers(1, 40),
    hidden=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_heads_of_any_size(kind, width_in, width_out, hidden, seed):
    "The count on `meta` is that of real weights, the result is finite, and the seed decides it."
    hidden = 0 if kind == "linear" else hidden
    head = make_head(kind, width_in, width_out, hidden, seed=seed).eval()
    assert sum(p.numel() for p in head.parameters()) == head_parameters(kind, width_in, width_out, hidden)
    x = 1e4 * vectors(3, width_in, seed)[0]
    assert head(x).shape == (3, width_out) and head(x).isfinite().all()
    assert torch.equal(head(x), make_head(kind, width_in, width_out, hidden, seed=seed).eval()(x))


@given(kind=st.sampled_from(["mlp", "glu", "swiglu", "sharelock"]), hidden=st.integers(1, 500))
def test_matched_hidden_finds_the_width_again(kind, hidden):
    assert matched_hidden(kind, head_parameters(kind, 30, 20, hidden), 30, 20) == hidden


def test_clamp_keeps_half_precision_finite():
    "Without it, features of a badly scaled encoder overflow."
    loud, calm = (make_head("glu", 8, 4, clamp=c) for c in (0.0, 1e3))
    for head in (loud, calm):
        head.map.f2.weight.data.mul_(1e5)
    x = vectors(5, 8, 0)[0]
    assert (loud.map.gate(loud.map.f1(loud.norm(x))) * loud.map.f2(loud.norm(x))).abs().max() > 6e4
    assert calm(x).abs().max() < loud(x).abs().max() and calm(x).abs().max() < 1e5
    with pytest.raises(ModelError, match="clamp"):
        make_head("glu", 8, 4, clap=1.0)


# --- features in pairs -------------------------------------------------------------------------------------------


def kept_as(how, x):
    "An array, in whatever holds it."
    if how == "memmap":
        file = np.memmap(tempfile.TemporaryFile(), x.dtype, "w+", shape=x.shape)
        file[:] = x
        return file
    return torch.tensor(x) if how == "tensor" else x


@given(
    how=st.sampled_from(["array", "memmap", "tensor"]),
    dtype=st.sampled_from([np.float16, np.float32]),
    n=st.integers(1, 40),
    data=st.data(),
)
def test_a_row_is_a_row_whatever_holds_it(how, dtype, n, data):
    x = np.random.default_rng(n).normal(size=(n, 5)).astype(dtype)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=60)))
    found = gather(kept_as(how, x), rows)
    assert found.dtype == torch.tensor(x).dtype and np.array_equal(found.numpy(), x[rows.numpy()])


@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=30), seed=st.integers(0, 99))
def test_every_caption_drawn_belongs_to_its_image(counts, seed):
    "Also in a part of the pairs, and the other image's where pairs are shuffled."
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    pairs = PairedFeatures(np.arange(len(counts))[:, None], owner[:, None], owners=[owner])
    part = some_pairs(pairs, rng.permutation(len(counts))[: 1 + seed % len(counts)])
    for some in (pairs, part):
        images, (texts,) = some.at(torch.arange(len(some)), step_generator(seed, 0))
        assert torch.equal(images, texts)
    mixed = shuffled_pairs(part, seed)
    images, (texts,) = mixed.at(torch.arange(len(mixed)), step_generator(seed, 0))
    assert sorted(images.tolist()) == sorted(texts.tolist())


@given(n=st.integers(1, 9), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_ranks_both_ways_by_hand(n, m, seed):
    "Count who scores as high as the best own answer."
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-2, 3, (n, 2)), rng.integers(-2, 3, (n * m, 2))
    owner, group = np.repeat(np.arange(n), m), rng.integers(0, 3, n)
    own = group[:, None] == group[owner]
    scores = x @ y.T
    to_text = [1 + (scores[i][~own[i]] >= scores[i][own[i]].max()).sum() for i in range(n)]
    to_image = [1 + (scores[:, j][~own[:, j]] >= scores[:, j][own[:, j]].max()).sum() for j in range(n * m)]
    found = ranks_both_ways(x, y, owner, group)
    assert found[0].tolist() == to_text and found[1].tolist() == to_image


# --- trainings ---------------------------------------------------------------------------------------------------


def world(n=150, captions=1, seed=0):
    "What an image and its captions have in common is six numbers."
    fixed, rng = np.random.default_rng(0), np.random.default_rng([1, seed])
    a, b, z = fixed.normal(size=(6, 12)), fixed.normal(size=(6, 10)), rng.normal(size=(n, 6))
    owner = np.repeat(np.arange(n), captions)
    return PairedFeatures((z @ a).astype(np.float16), (z[owner] @ b).astype(np.float16), owners=[owner])


CONFIG = AlignmentConfig("glu", 8, steps=9, batch=32, lr=1e-3, validations=3, options=dict(input_dropout=0.3))


def weights(done):
    return torch.cat([v.flatten().float() for h in (done.images, done.texts) for v in h.state_dict().values()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A training that nobody stopped."
    pairs = world(captions=3)
    return pairs, align(pairs, CONFIG, tmp_path_factory.mktemp("whole"), world(60, 2, 5))


@pytest.mark.parametrize("stop", [0, 1, 4, 8])
def test_a_killed_training_ends_as_if_it_had_not_been(whole, stop, tmp_path, monkeypatch):
    "Whatever was drawn and dropped before, also on another thread of random numbers."
    pairs, once = whole
    at, left = PairedFeatures.at, iter(range(stop + 2))  # two looks for the recipe

    def dying(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return at(*args)

    monkeypatch.setattr(PairedFeatures, "at", dying)
    with pytest.raises(KeyboardInterrupt):
        align(pairs, CONFIG, tmp_path, world(60, 2, 5), every=0)
    monkeypatch.undo()
    torch.manual_seed(stop)
    twice = align(pairs, CONFIG, tmp_path, world(60, 2, 5))
    assert torch.equal(weights(once), weights(twice)) and once.validation.equals(twice.validation)
    assert (once.step, once.scale, once.bias) == (twice.step, twice.scale, twice.bias)


@pytest.mark.parametrize("how", ["memmap", "tensor"])
def test_what_holds_the_features_changes_nothing(whole, how, tmp_path):
    pairs, once = whole
    texts = pairs.sets[0]
    held = PairedFeatures(kept_as(how, pairs.images), kept_as(how, texts.features), owners=[texts.owner])
    assert fingerprint(held) == fingerprint(pairs)
    assert torch.equal(weights(once), weights(align(held, CONFIG, tmp_path, world(60, 2, 5))))


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_blocks_change_no_training(loss, tmp_path):
    "But for rounding; AdamW, since Lion takes the sign of numbers that may round to either side of zero."
    config, pairs = replace(CONFIG, loss=loss, optimiser="adamw"), world(captions=2)
    whole, blocks = (align(pairs, replace(config, block=b), tmp_path / str(b), world(60, 2, 5)) for b in (0, 5))
    torch.testing.assert_close(weights(whole), weights(blocks), atol=1e-3, rtol=0)
    np.testing.assert_allclose(whole.curve.loss, blocks.curve.loss, rtol=1e-4)


@pytest.mark.parametrize("optimiser", ["lion", "adamw", "muon"])
@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_every_loss_and_optimiser_learns(optimiser, loss, tmp_path):
    config = replace(CONFIG, loss=loss, optimiser=optimiser, steps=60, options={}, lr=3e-3, block=20)
    done = align(world(), config, tmp_path, world(60, 2, 5))
    assert done.validation["mean"].iloc[-1] > 3 * done.validation["mean"].iloc[0]
    assert 1 <= done.scale <= 100 and np.isfinite(done.curve.loss).all()


@given(batch=st.integers(2, 40), n=st.integers(40, 90))
def test_an_epoch_leaves_out_less_than_a_batch(batch, n):
    from selfalign.models.finetune import batch_rows

    per = n // batch
    seen = torch.cat([batch_rows(n, batch, per + i, seed=3) for i in range(per)])
    assert len(set(seen.tolist())) == len(seen) == per * batch > n - batch


def test_the_best_validated_state_is_returned(whole):
    pairs, once = whole
    best = once.validation.loc[once.validation["mean"].idxmax()]
    assert once.step == best.step
    assert retrieval_of(once.images, once.texts, world(60, 2, 5))["mean"] == best["mean"]


def test_vectors_do_not_depend_on_the_block(whole):
    pairs, once = whole
    x = encode(once.images, pairs.images)
    np.testing.assert_allclose(x, encode(once.images, pairs.images, block=7), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x[[4, 2]], encode(once.images, pairs.images, [4, 2]), atol=1e-6)


def test_another_training_is_refused(whole, tmp_path):
    pairs, _ = whole
    align(pairs, replace(CONFIG, steps=1), tmp_path)
    for other in (shuffled_pairs(pairs), some_pairs(pairs, range(100))):
        with pytest.raises(StudyError, match="holds a training with pairs"):
            align(other, replace(CONFIG, steps=1), tmp_path)
