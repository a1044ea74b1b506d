"Alignment of frozen features: losses by blocks, heads, batches from arrays, trainings that resume."

import math
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from selfalign.models.heads import HEADS, head_parameters, make_head, matched_hidden
from selfalign.models.losses import info_nce, sigmoid_loss
from selfalign.models.references import ModelError


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
