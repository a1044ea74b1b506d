"The presets of SAIL: what their settings make of a training."

import pytest
from selfalign.models.alignment import AlignmentConfig
from selfalign.models.heads import head_parameters
from selfalign.sail.arms import ARMS, arms_by_name, common_fields, config_of
from selfalign.sail.embed import parse_encoder
from selfalign.study.settings import SettingsError, resolve

WIDTHS = {"sail-paper": (2048, 1024), "sail-nv2": (2048, 4096)}


def trained(preset, *overrides):
    "The arms of a preset, and how they are trained."
    values = resolve(preset, overrides).values["align"]
    arms = arms_by_name(values["arms"], values["captions"], values["own_rates"])
    fields = common_fields(values)
    return {arm.name: (arm, config_of(arm, fields, WIDTHS.get(preset, (416, 128)))) for arm in arms}


def size(preset, name):
    "Weights of both layers."
    specs = trained(preset)[name][1].head_specs(*WIDTHS[preset])
    return sum(head_parameters(**spec) for spec in specs)


@pytest.mark.parametrize("preset", list(WIDTHS))
def test_every_arm_is_trained_as_the_paper_does(preset):
    "Lion, the sigmoid loss per pair, 1e-5, 1e-7, from 20 and -10, 32 768 pairs, two positives; by settings alone."
    for arm, config in trained(preset).values():
        assert (config.optimiser, config.lr, config.weight_decay, config.betas) == ("lion", 1e-5, 1e-7, (0.9, 0.99))
        assert (config.loss, config.per, config.scale, config.bias) == ("sigmoid", "pair", 20, -10)
        assert (config.batch, config.width, config.warmup, config.learn_scale) == (32768, 1024, 0.1, True)
        assert 0 < config.block < config.batch and arm.captions == ("short", "dense")
        assert not config.options["standardise"] and config.options["input_dropout"] == 0


@pytest.mark.parametrize("preset", list(WIDTHS))
def test_epochs(preset):
    "About fifty times through the training pairs."
    values = resolve(preset).values
    pairs = values["embed"]["pairs"] * (1 - values["embed"]["validation"])
    assert 49 < values["align"]["steps"] * values["align"]["batch"] / pairs < 51


def test_layers_have_the_published_sizes():
    sizes = {name: round(size("sail-paper", name) / 1e6, 1) for name in ("linear", "mlp", "glu")}
    assert sizes == {"linear": 3.2, "mlp": 33.6, "glu": 54.6}
    assert abs(size("sail-paper", "mlp-as-glu") / size("sail-paper", "glu") - 1) < 0.01
    assert round(size("sail-nv2", "glu") / 1e6) == 386, "eight times as wide, over 4 096 numbers of a text"
    assert abs(size("sail-nv2", "mlp-as-glu") / size("sail-nv2", "glu") - 1) < 0.01


@pytest.mark.parametrize("preset", list(WIDTHS))
def test_every_arm_has_its_encoders_and_captions(preset):
    values = resolve(preset).values
    encoders = {kind: {parse_encoder(e).name for e in values["embed"][kind]} for kind in ("images", "texts")}
    columns = dict(c.split() for c in values["embed"]["captions"])
    for arm, _ in trained(preset).values():
        assert arm.images in encoders["images"] and arm.texts in encoders["texts"] and set(arm.captions) <= set(columns)
    assert set(values["align-segment"]["arms"]) <= set(values["align"]["arms"])


def test_what_was_trained_before_is_trained_as_before():
    "The settings that came later leave the other presets alone."
    for preset in ("micro", "micro-full", "sail", "sail-flickr8k"):
        for arm, config in trained(preset).values():
            assert arm == ARMS[arm.name] and (config.block, config.precision) == (0, "no")
            values = resolve(preset).values["align"]
            assert config.options == dict(input_dropout=values["dropout"], standardise=True)
            assert config.lr == arm.training.get("lr", values["lr"])


@pytest.mark.parametrize(
    "override,message",
    [
        ("align.block=-1", "outside block"),
        ("align.expansion=0", "outside expansion"),
        ("align.precision=fp16", "none of no, bf16"),
    ],
)
def test_refused(override, message):
    with pytest.raises(SettingsError, match=message):
        resolve("sail-paper", [override])


def test_a_block_is_set_by_a_parameter():
    assert {config.block for _, config in trained("sail-paper", "align.block=4096").values()} == {4096}
    assert AlignmentConfig().block == 0
