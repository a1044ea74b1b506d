"Less work, the same numbers: texts in chunks, images in threads, each distinct thing once. No test asserts a time."

import warnings
import numpy as np, pandas as pd, pytest, torch, tiny
from collections import Counter
from PIL import Image
from selfalign.benchmarks.items import Benchmark, evaluate, open_images
from selfalign.data.captions import web_caption
from selfalign.data.images import fit_square, in_threads, open_image
from selfalign.models.adapters import add_lora
from selfalign.models.dual_encoder import causal_text, shortest_first, normalise, squares
from selfalign.models.load import load_dual_encoder
from selfalign.models.full_size import clip_tokenizer
from selfalign.models.operations import operations
from selfalign.report.measuring import (
    Stopwatch,
    StandIns,
    agree,
    architecture,
    counted,
    in_transformers,
    original_cosines,
    original_scores,
    plain_loss,
    random_clip,
    reloaded,
    shape_operations,
    tower_shapes,
)
from selfalign.models.finetune import TextTable, TrainingPairs, batch_vectors
from selfalign.models.objective import Objective
from selfalign.models.scores import score_pairs
from selfalign.study.settings import StudyError

TEXTS = [web_caption("study", i, 0.3)[0].text for i in range(70)] + [
    "",
    "a",
    "very " * 200 + "long",
    "a red cat in a meadow",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    own = random_clip(tmp_path_factory.mktemp("performance") / "open_clip", architecture(""))
    return own, in_transformers(own, own.parent / "transformers")


@pytest.fixture
def encoder(folders):
    return load_dual_encoder(f"open_clip:{folders[0]}")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    place, draw = tmp_path_factory.mktemp("photographs"), StandIns(scenes=3, side=64)
    for i in range(12):
        draw.save(place / f"{i}.jpg", i, 90 + 3 * (i % 4), 80 + 5 * (i % 3))
    return place


# --- texts -------------------------------------------------------------------------------------------------------


def test_chunks_equal_the_whole_context(encoder):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    texts = [TEXTS[i] for i in order]
    with torch.inference_mode():
        whole = encoder.model.encode_text(encoder.tokenizer(texts))
        with tower_shapes(encoder.model) as seen:
            ours = encoder.text_features(encoder.tokenize(texts))
    torch.testing.assert_close(ours, whole, atol=2e-6, rtol=1e-5)
    assert sum(seen.values()) == len(texts) and len(seen) == 3, "chunks of 32"
    assert min(seen)[1] < 77 and sum(n * k for (_, n), k in seen.items()) < len(texts) * 77 / 2


def test_any_pooling(tiny_clip):
    "Texts that end where a token says so, not where the highest number is, and a tower that is not cut."
    encoder = load_dual_encoder(f"open_clip:{tiny_clip}")
    tokens = encoder.tokenizer(tiny.CAPTIONS)
    with torch.inference_mode():
        expected = encoder.model.encode_text(tokens)
        encoder.model.text_pool_type, encoder.model.text_eos_id = "eos", int(tokens.max())
        torch.testing.assert_close(
            encoder.text_features(encoder.tokenize(tiny.CAPTIONS)), expected, atol=2e-6, rtol=1e-5
        )
        encoder.model.text_pool_type = "last"
        torch.testing.assert_close(
            encoder.text_features(encoder.tokenize(tiny.CAPTIONS)), encoder.model.encode_text(tokens), atol=0, rtol=0
        )


def test_order_is_kept():
    tokens, end = torch.arange(50)[:, None], torch.randint(1, 9, (50,), generator=torch.Generator().manual_seed(0))
    widths = []

    def encode(t, e):
        widths.append(int(e.max()))
        return t * 10

    assert torch.equal(shortest_first(encode, tokens, end, chunk=7), tokens * 10)
    assert widths == sorted(widths) and len(widths) == 8


def test_one_text_at_a_time(encoder):
    torch.testing.assert_close(
        encoder.encode_text(TEXTS), torch.cat([encoder.encode_text([t]) for t in TEXTS]), atol=2e-6, rtol=1e-5
    )


# --- a step ------------------------------------------------------------------------------------------------------


def test_gradients_equal_a_plain_step(encoder, photographs):
    adapted = add_lora(encoder, rank=3)
    encoder.model.train()
    n = 40
    weights = {k: p for k, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for i, p in enumerate(weights.values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    batch = TrainingPairs(squares(encoder, [open_image(photographs / f"{i % 12}.jpg") for i in range(n)]), TEXTS[:n])

    def gradients(loss):
        adapted.zero_grad()
        loss.backward()
        return float(loss.detach()), {k: p.grad.clone() for k, p in weights.items()}

    a, ours = gradients(Objective()(batch_vectors(encoder, batch, TextTable(encoder, batch.texts))))
    b, plain = gradients(
        plain_loss(encoder.model, encoder.tokenizer, normalise(encoder, batch.square), batch.texts, encoder.logit_scale)
    )
    assert a == pytest.approx(b, rel=1e-5)
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 1e-3
    for k in weights:
        torch.testing.assert_close(ours[k], plain[k], atol=1e-4 * largest, rtol=0)
    assert sum(float(g.abs().max()) > 1e-6 * largest for g in plain.values()) > len(plain) / 2, (
        "the gradients say something"
    )


# --- images ----------------------------------------------------------------------------------------------------


def test_threads_change_nothing(encoder, photographs):
    images = [open_image(photographs / f"{i}.jpg") for i in range(12)]
    assert torch.equal(
        squares(encoder, images), torch.stack([torch.from_numpy(np.array(fit_square(i, 64, "crop"))) for i in images])
    )
    x = normalise(encoder, squares(encoder, images))
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoder.mean, encoder.std))
    assert torch.equal(x, (squares(encoder, images).permute(0, 3, 1, 2).float() / 255 - mean) / std)


def test_problems_as_before(photographs, tmp_path):
    (tmp_path / "half.jpg").write_bytes((photographs / "0.jpg").read_bytes()[:2000])
    places = dict(a=photographs / "1.jpg", b=tmp_path / "none.jpg", c=tmp_path / "half.jpg", d=photographs / "2.jpg")
    items = pd.DataFrame(
        [dict(key=str(i), category="c", file="f", image=k, positive="x", negative="y") for i, k in enumerate("dcbaeea")]
    )
    there, problems = open_images(Benchmark(items, places))
    assert list(there) == ["a", "d"] and [p["file"] for p in problems] == ["b", "c", "e"]
    assert (
        all(word in p["what"] for p, word in zip(problems, ("not there", "damaged", "no such image")))
        and "2" in problems[2]["what"]
    )


def test_warnings_stay_as_they_were(photographs):
    before = list(warnings.filters)
    in_threads(lambda i: open_image(photographs / f"{i % 12}.jpg"), range(200))
    assert warnings.filters == before


def test_errors_come_out_of_threads():
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 / n, [2, 1, 0])


# --- each thing once ---------------------------------------------------------------------------------------------


def test_once_is_as_good_as_every_time(encoder, folders, photographs):
    import open_clip

    model, see = open_clip.create_model_from_pretrained(f"local-dir:{folders[0]}")
    rng = np.random.default_rng(1)
    items = pd.DataFrame(
        [
            dict(
                key=str(i),
                category="c",
                file="f",
                image=f"{rng.integers(12)}.jpg",
                positive=TEXTS[a],
                negative=TEXTS[b],
            )
            for i, (a, b) in enumerate(rng.choice(20, (30, 2)))
        ]
    )
    images = {f"{i}.jpg": photographs / f"{i}.jpg" for i in range(12)}
    with tower_shapes(encoder.model) as seen:
        found, _ = evaluate(Benchmark(items, images), encoder)
    loop = original_cosines(model.eval(), see, open_clip.get_tokenizer("ViT-B-32"), items, images)
    assert np.abs(found[["score_positive", "score_negative"]].to_numpy() - loop).max() < 1e-5 and np.ptp(loop) > 0.01
    clear = np.abs(loop[:, 0] - loop[:, 1]) > 1e-5
    assert (found.correct.to_numpy() == (loop[:, 0] > loop[:, 1]))[clear].all() and clear.sum() > 20
    assert seen["image", 0] == items.image.nunique() and sum(n for (k, _), n in seen.items() if k == "text") == len(
        {*items.positive, *items.negative}
    )


@pytest.mark.slow
def test_scores_equal_torchmetrics(encoder, folders, photographs, tmp_path):
    pairs = pd.DataFrame(
        [dict(key=str(i), image=f"{i}.jpg", folder=photographs, caption=TEXTS[i // 2]) for i in range(12)]
    )
    tensors = [
        torch.from_numpy(np.array(open_image(photographs / f"{i}.jpg").resize((80, 80)))).permute(2, 0, 1)
        for i in range(12)
    ]
    for i, t in enumerate(tensors):
        Image.fromarray(t.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    ours = score_pairs(
        encoder, pairs.assign(image=[f"{i}.png" for i in range(12)], folder=tmp_path), tmp_path / "store"
    )
    theirs = original_scores(tensors, list(pairs.caption), reloaded(folders[1]), batch=4)
    assert np.abs(ours.cosine.to_numpy().reshape(3, 4).mean(1).clip(0) - theirs / 100).max() < 1e-3 and theirs.max() > 1


# --- what is counted ---------------------------------------------------------------------------------------------


def test_the_same_tokens():
    from open_clip import get_tokenizer

    texts = [t for t in TEXTS if len(t) < 200] + ["A Cat's TOY, 2 of 3!"]
    ours = get_tokenizer("ViT-B-32")(texts)
    assert [t.tolist()[: len(i)] for t, i in zip(ours, clip_tokenizer()(texts).input_ids)] == clip_tokenizer()(
        texts
    ).input_ids


@pytest.mark.parametrize("n", [5, 77])
def test_operations_by_hand(encoder, n):
    d, e, layers = 32, 32, 2
    assert shape_operations(encoder, "text", n) == layers * (2 * n * 12 * d * d + 2 * 2 * n * n * d) + 2 * d * e
    assert counted(encoder, Counter({("text", n): 3})) == 3 * shape_operations(encoder, "text", n)


def test_a_image_by_hand(encoder):
    d, n, layers = 64, 17, 2
    assert (
        shape_operations(encoder, "image", 0)
        == 2 * 16 * (3 * 16 * 16) * d + layers * (2 * n * 12 * d * d + 2 * 2 * n * n * d) + 2 * d * 32
    )


def test_counting_leaves_no_trace():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        operations(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_stopwatch_gives_back_what_it_took(encoder):
    with Stopwatch({(encoder, "tokenizer"): "tokenise", (encoder, "text_features"): "text tower"}) as watch:
        found = encoder.encode_text(TEXTS[:3])
    assert "text_features" not in vars(encoder) and torch.equal(found, encoder.encode_text(TEXTS[:3]))
    assert set(watch.seconds) == {"tokenise", "text tower", "rest"} and sum(watch.seconds.values()) == pytest.approx(
        watch.total
    )


def test_other_numbers_are_refused():
    with pytest.raises(StudyError, match="differ by"):
        agree("scores", [1.0], [float("nan")], 1)
    with pytest.raises(StudyError, match="no architecture"):
        architecture("ViT-B-23")
