"Score: equal to torchmetrics, each text once, intervals and chance for every number."

import numpy as np, pandas as pd, pytest, torch, tiny
from PIL import Image
from selfalign.benchmarks.filters import filter_quality
from selfalign.data.images import save_png
from selfalign.models.embed import StoreError
from selfalign.models.load import load_dual_encoder
from selfalign.models.reader import read_back
from selfalign.models.scores import clip_score, distinct_texts, other_captions, score_pairs, text_key, to_score
from selfalign.study.settings import StudyError


def photos(n, size=(64, 64)):
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)) for i in range(n)
    ]


class Tensors:
    "A model of transformers 5 that returns what torchmetrics expects."

    def __init__(self, model):
        self.model, self.config = model, model.config

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


class OpenClip:
    "A model of open_clip that looks like one of transformers, model and processor in one."

    config = None

    def __init__(self, folder):
        import open_clip

        self.model, self.preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    def __call__(self, images=None, text=None, **kw):
        from torchvision.transforms.functional import to_pil_image

        if images:
            return dict(pixel_values=torch.stack([self.preprocess(to_pil_image(i)) for i in images]))
        return dict(input_ids=self.tokenizer(text), attention_mask=torch.ones(1))

    def to(self, device):
        return self

    def get_image_features(self, pixels):
        return self.model.encode_image(pixels)

    def get_text_features(self, ids, mask):
        return self.model.encode_text(ids)


def of_transformers(folder):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPProcessor

    return Tensors(AutoModel.from_pretrained(folder).eval()), CLIPProcessor(
        AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    )


@pytest.mark.parametrize("library, fixture", [("transformers", "tiny_hf_clip"), ("open_clip", "tiny_clip")])
def test_equal_to_torchmetrics(library, fixture, request):
    from torchmetrics.functional.multimodal import clip_score as reference

    folder = request.getfixturevalue(fixture)
    loaded = of_transformers(folder) if library == "transformers" else (OpenClip(folder),) * 2
    images = photos(5)
    tensors = [torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]
    ours = clip_score(load_dual_encoder(f"{library}:{folder}"), images, tiny.CAPTIONS)
    with torch.inference_mode():
        theirs = [float(reference(i, t, model_name_or_path=lambda: loaded)) for i, t in zip(tensors, tiny.CAPTIONS)]
        mean = float(reference(tensors, tiny.CAPTIONS, model_name_or_path=lambda: loaded))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    if (ours > 0).all():  # torchmetrics cuts off at zero after averaging
        assert mean == pytest.approx(ours.mean(), abs=2e-3)


def test_never_below_zero():
    assert to_score(np.array([-0.5, 0, 0.25])).tolist() == [0, 0, 25]
    with pytest.raises(StudyError, match="do not make pairs"):
        clip_score(None, photos(2), ["a"])


@pytest.fixture
def table(tmp_path):
    for i, p in enumerate(photos(11)):
        save_png(p, tmp_path / f"{i}.png")
    captions = [tiny.CAPTIONS[i % 3] for i in range(11)]
    return pd.DataFrame(
        [
            dict(key=str(i), image=f"{i}.png", caption=c, claims=f"{i}", folder=str(tmp_path), image_source="original")
            for i, c in enumerate(captions)
        ]
    )


def counting(encoder):
    "Write down what the encoder is asked for."
    asked = dict(image=[], text=[])
    see, read = encoder.encode_image, encoder.encode_text
    encoder.dimension, encoder.hash
    encoder.encode_image = lambda images, *a, **kw: (asked["image"].append(len(images)), see(images, *a, **kw))[1]
    encoder.encode_text = lambda texts, *a, **kw: (asked["text"].extend(texts), read(texts, *a, **kw))[1]
    return asked


def test_stored_scores_equal_direct_ones_and_texts_are_read_once(tiny_clip, table, tmp_path):
    encoder = load_dual_encoder(f"open_clip:{tiny_clip}")
    asked = counting(encoder)
    scores = score_pairs(encoder, table, tmp_path / "store", batch=4, block=5)
    assert list(scores.columns) == ["key", "scorer", "cosine", "score"]
    assert scores.key.tolist() == table.key.tolist()
    direct = clip_score(load_dual_encoder(f"open_clip:{tiny_clip}"), photos(11), list(table.caption))
    np.testing.assert_allclose(scores.score, direct, atol=0.05)
    assert asked["text"] == sorted(set(table.caption), key=len)
    assert asked["image"] == [4, 4, 3]
    again = score_pairs(encoder, table, tmp_path / "store")
    pd.testing.assert_frame_equal(scores, again)
    assert len(asked["text"]) == 3
    assert len(asked["image"]) == 3


def test_another_preprocessing_is_refused(tiny_clip, table, tmp_path):
    encoder = load_dual_encoder(f"open_clip:{tiny_clip}")
    score_pairs(encoder, table, tmp_path / "store")
    with pytest.raises(StoreError, match="preprocessing"):
        score_pairs(encoder, table, tmp_path / "store", aspect="squash")


def test_squash_differs_on_wide_images_only(tiny_clip):
    encoder = load_dual_encoder(f"open_clip:{tiny_clip}")
    wide = photos(3, (128, 64))
    a, b = (clip_score(encoder, wide, tiny.CAPTIONS[:3], m) for m in ("crop", "squash"))
    assert not np.allclose(a, b, atol=0.01)
    np.testing.assert_array_equal(*(clip_score(encoder, photos(3), tiny.CAPTIONS[:3], m) for m in ("crop", "pad")))


def test_distinct_texts_short_first():
    assert list(distinct_texts(["bbb", "a", "bbb", "cc"]).values()) == ["a", "cc", "bbb"]
    assert text_key("a") != text_key("b")


def test_other_captions_are_others(table):
    both = pd.concat([table, table.assign(image_source="generated", key=table.key + "-g0")], ignore_index=True)
    moved = other_captions(both)
    assert (moved.claims != both.claims).all()
    assert sorted(moved.caption) == sorted(both.caption)
    assert (moved.key == both.key).all()
    assert (moved.claims[:11].to_numpy() == moved.claims[11:].to_numpy()).all()


def test_filter_quality_has_intervals_and_chance():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.7
    quality = filter_quality(rng.normal(size=300) + 1.5 * truth, truth, np.arange(300), (0.2, 0.5)).set_index("metric")
    assert (quality.low <= quality.value).all()
    assert (quality.value <= quality.high).all()
    assert (quality.n == 300).all()
    assert quality.low["auc"] > 0.7
    assert quality.chance["auc"] == 0.5
    assert quality.chance["precision at 0.2"] == pytest.approx(truth.mean())
    assert len(filter_quality([1.0, 2.0], [True, True], [0, 1])) == 0


def test_reading_back_needs_claims(table):
    assert len(read_back(table.assign(claims="", width=64, height=64))) == 0


def test_the_stage_leaves_complete_numbers(smoke_run):
    results = pd.read_csv(smoke_run / "results.csv")
    results = results[results.chapter == "self-align"]
    assert set(results.table) >= {"sample", "generate", "scores", "filter", "claims"}
    numbers = results[results.table.isin(["scores", "filter", "claims"])]
    assert numbers[["value", "low", "high", "n", "chance", "better"]].notna().all(axis=None)
    assert (numbers.low <= numbers.value + 1e-9).all()
    assert (numbers.value <= numbers.high + 1e-9).all()


def test_the_stage_scores_every_pair_by_both(smoke_run):
    scores = pd.read_parquet(smoke_run / "score/tables/scores.parquet")
    keys = [k for s in ("sample", "generate") for k in pd.read_parquet(smoke_run / s / "tables/pairs.parquet").key]
    assert scores.groupby("scorer").key.apply(sorted).tolist() == [sorted(keys)] * 2
    assert len({s.split(":")[0] for s in scores.scorer}) == 2, "two libraries"
    np.testing.assert_allclose(scores.score, 100 * scores.cosine.clip(0), atol=1e-4)


def test_results_follow_from_the_tables(smoke_run):
    "The paired difference recomputed from the scores table."
    results = pd.read_csv(smoke_run / "results.csv")
    scores = pd.read_parquet(smoke_run / "score/tables/scores.parquet")
    made = pd.read_parquet(smoke_run / "generate/tables/pairs.parquet")
    for scorer, part in scores.groupby("scorer"):
        score = part.set_index("key").score
        mean = (score[made.key].to_numpy() - score[made.parent].to_numpy()).mean()
        row = results[
            (results.table == "scores") & (results.row == scorer.rpartition("/")[2]) & (results.metric == "difference")
        ]
        assert row.value.item() == pytest.approx(mean, abs=1e-4)
