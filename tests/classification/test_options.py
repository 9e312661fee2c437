"""From the words of a command line and of YAML to options; the published recipes."""

import json
from pathlib import Path

import pytest
import yaml
from timm import is_model

import convmlp.timm_models  # noqa: F401
from convmlp.classification.options import build_parser, load_config, parse_options
from convmlp.classification.settings import GROUPS
from convmlp.common.configs import list_configs
from convmlp.common.errors import RunError

CONFIGS = Path(__file__).parents[2] / "configs" / "classification"
RECIPES = json.loads((Path(__file__).parent / "recipes.json").read_text())  # all values but the defaults
DEFAULTS = RECIPES.pop("defaults")


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipes_and_their_defaults_stay_as_they_are(recipe):
    options = parse_options(["-c", str(CONFIGS / f"{recipe}.yml")])
    assert options.stored() == DEFAULTS | RECIPES[recipe]


def test_every_config_is_valid_and_names_a_model():
    configs = [CONFIGS.parent / config for config in list_configs("classification")]
    assert len(configs) == 15
    for config in configs:
        assert is_model(parse_options(["-c", str(config)]).model), config


def test_the_help_names_every_option_with_its_group():
    text = build_parser().format_help()
    for group in GROUPS:
        assert f"\n{group.__doc__}:\n" in text
    for name in DEFAULTS:
        assert f"--{name.replace('_', '-')}" in text
    assert "-c FILE|NAME" in text and "--dataset-download" in text and "{skip,stop}" in text


def test_command_line_overrides_config_overrides_base(tmp_path):
    (tmp_path / "base.yml").write_text("lr: 0.1\nepochs: 7\nmean: [0.1, 0.2, 0.3]\namp: true\nhflip: 0\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yml").write_text("base: ../base.yml\nlr: 5e-4\nchannels_last: false\nclip_grad: null\n")
    options = parse_options(["-c", str(tmp_path / "sub" / "own.yml"), "--epochs", "9", "--no-amp", "data"])
    assert options.lr == 5e-4  # which PyYAML reads as a string
    assert (options.epochs, options.amp, options.channels_last, options.hflip) == (9, False, False, 0.0)
    assert options.mean == [0.1, 0.2, 0.3] and options.clip_grad is None and options.data_dir == "data"


def test_the_template_works_wherever_it_is_copied_to(tmp_path):
    (tmp_path / "my.yml").write_bytes((CONFIGS / "template.yml").read_bytes())
    options = parse_options(["-c", str(tmp_path / "my.yml")])
    assert options.stored() == DEFAULTS | RECIPES["template"] and options.mixup == 0.8


@pytest.mark.parametrize("base", ["convmlp_s_imagenet", "classification/convmlp_s_imagenet.yml"])
def test_a_config_of_the_package_can_be_a_base(tmp_path, base):
    (tmp_path / "my.yml").write_text(f"base: {base}\nepochs: 7\n")
    options = parse_options(["-c", str(tmp_path / "my.yml")])
    assert options.stored() == DEFAULTS | RECIPES["convmlp_s_imagenet"] | {"epochs": 7}


def test_a_base_beside_the_config_comes_before_the_package(tmp_path):
    (tmp_path / "quickstart.yml").write_text("lr: 0.7\n")
    (tmp_path / "my.yml").write_text("base: quickstart.yml\n")
    assert parse_options(["-c", str(tmp_path / "my.yml")]).lr == 0.7


def test_lists_of_numbers_leave_the_data_folder_alone():
    for mean in (["--mean", "0.1", "0.2", "0.3"], ["--mean", "0.1,0.2,0.3"], ["--mean=0.1,0.2,0.3"]):
        options = parse_options(["--lr", "1", *mean, "data"])
        assert (options.mean, options.data_dir) == ([0.1, 0.2, 0.3], "data")


def test_stored_options_are_a_config_again(tmp_path):
    options = parse_options(["-c", str(CONFIGS / "convmlp_m_imagenet.yml"), "--lr", "0.25", "/data"])
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(options.stored()))
    assert parse_options(["-c", str(tmp_path / "args.yaml")]).stored() == options.stored()


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 3", "unknown key 'learning_rat'"),
        ("batchsize: 3", "did you mean batch_size?"),
        ("lr: fast", "invalid float value: 'fast'"),
        ("lr: [1, 2]", "lr cannot be [1, 2]"),
        ("amp: 3", "amp must be true or false, got 3"),
        ("lr: true", "lr cannot be True"),
        ("remode: foo", "invalid choice: 'foo'"),
        ("scale: [0.1]", "scale takes 2 numbers, got [0.1]"),
        ("- lr", "not a mapping"),
        ("lr: [1", "not valid YAML"),
        ("base: nowhere.yml", "base: no such config: nowhere.yml"),
        ("base: own.yml", "leads back to itself"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_configs_are_named_with_the_reason(tmp_path, text, message):
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(RunError) as error:
        parse_options(["-c", str(tmp_path / "own.yml")])
    assert message in str(error.value) and "own.yml" in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", "3"], "unknown option --learning-rate"),
        (["--model_ema"], "did you mean --model-ema?"),
        (["--num-classes", "many"], "must be a number or auto, got many"),
        (["a", "b"], "there is one DATA folder, got another: b"),
    ],
)
def test_bad_words_are_named_with_the_way_out(arguments, message):
    with pytest.raises(RunError) as error:
        parse_options(arguments)
    assert message in str(error.value)


def test_config_values_come_without_their_base_key():
    values = load_config(CONFIGS / "convmlp_s_imagenet.yml")
    assert "base" not in values and values["model"] == "convmlp_s_classification" and values["mixup"] == 0.8


@pytest.mark.parametrize("separator", [",", " "])
def test_arguments_of_the_model_stand_before_the_data(separator):
    options = parse_options(["--model-kwargs", *f"a=1{separator}b=False{separator}c=[1,2]".split(" "), "DATA"])
    assert options.model_kwargs == {"a": 1, "b": False, "c": [1, 2]} and options.data_dir == "DATA"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("None", None), ("null", None), ("(1,2)", (1, 2)), ("true", True), ("gelu", "gelu"), ("'1'", "1")],
)
def test_values_of_arguments_are_as_python_or_yaml_has_them(text, value):
    assert parse_options(["--model-kwargs", f"x={text}"]).model_kwargs == {"x": value}


@pytest.mark.parametrize(
    "kwargs", [{"ls_init_value": 1e-6, "act": None}, {"conv_stage": False, "dims": [8, 16, 24]}], ids=["null", "list"]
)
def test_arguments_of_the_model_survive_a_config(tmp_path, kwargs):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({"model_kwargs": kwargs}))
    options = parse_options(["-c", str(path)])
    assert options.model_kwargs == kwargs
    path.write_text(yaml.safe_dump(options.stored()))
    assert parse_options(["-c", str(path)]).model_kwargs == kwargs


@pytest.mark.parametrize(
    ("arguments", "kwargs"),
    [
        (["--model", "convmlp_m"], {"weight_init": "reference"}),
        (["--model-kwargs", "n_conv_blocks=1"], {"weight_init": "reference", "n_conv_blocks": 1}),
        (["--model-kwargs", "weight_init=per_group"], {"weight_init": "per_group"}),
        (["--model", "resnet50"], {}),
        (["--model", "resnet50", "--model-kwargs", "zero_init_last=False"], {"zero_init_last": False}),
    ],
)
def test_arguments_of_the_model_add_up_but_those_of_convmlp_are_not_for_other_models(tmp_path, arguments, kwargs):
    recipe, own = str(CONFIGS / "convmlp_s_imagenet.yml"), tmp_path / "own.yml"
    assert parse_options(["-c", recipe, *arguments]).model_kwargs == kwargs
    given, stored = parse_options(arguments), parse_options(["-c", recipe]).stored()
    assert parse_options(arguments, stored).model_kwargs == kwargs
    values = {"model": given.model, "model_kwargs": given.model_kwargs}
    own.write_text(yaml.safe_dump(values))
    assert parse_options(["-c", str(own)], stored).model_kwargs == kwargs
    own.write_text(yaml.safe_dump({**values, "base": recipe}))
    assert parse_options(["-c", str(own)]).model_kwargs == kwargs


@pytest.mark.parametrize("text", ["conv_stage", "=1", "a=", "a=[1"])
def test_an_argument_of_the_model_without_name_or_value_is_named(text):
    with pytest.raises(RunError, match=r"--model-kwargs: (it takes KEY=VALUE, got|\[1 is not a value)"):
        parse_options(["--model-kwargs", text])


@pytest.mark.parametrize(
    ("arguments", "amp"),
    [([], True), (["--no-amp"], False), (["--eval", "x.pth"], False), (["--eval", "x.pth", "--amp"], True)],
)
def test_mixed_precision_is_the_default_of_training_alone(arguments, amp):
    assert parse_options([*arguments, "images"]).amp is amp
