"""Options, configs and the published recipes."""

from pathlib import Path

import pytest
import yaml
from timm import is_model

import convmlp.timm_models  # noqa: F401
from convmlp.classification.options import load_config, parse_options, stored_options
from convmlp.common.configs import list_configs
from convmlp.common.errors import RunError

CONFIGS = Path(__file__).parents[1] / "configs" / "classification"

AUGMENTATION = dict(
    hflip=0.5,
    aa="rand-m9-mstd0.5-inc1",
    reprob=0.25,
    remode="pixel",
    recount=1,
    mixup=0.8,
    cutmix=1.0,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    mixup_mode="batch",
    mixup_off_epoch=0,
    smoothing=0.1,
)
IMAGENET = AUGMENTATION | dict(
    num_classes=1000,
    img_size=224,
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
    amp=True,
    epochs=300,
    cooldown_epochs=10,
    warmup_epochs=5,
    patience_epochs=10,
    batch_size=128,
    lr=5e-4,
    min_lr=1e-5,
    sched="cosine",
    weight_decay=0.05,
    seed=42,
    opt="adamw",
    opt_eps=1e-8,
    model_ema=True,
    model_ema_decay=0.99996,
    crop_pct=0.9,
    vflip=0.0,
    ratio=[3 / 4, 4 / 3],
    train_interpolation="bicubic",
    pretrained=False,
)
FINE_TUNING = AUGMENTATION | dict(
    pretrained=True,
    img_size=224,
    amp=True,
    epochs=50,
    cooldown_epochs=10,
    warmup_epochs=10,
    patience_epochs=10,
    warmup_lr=1e-6,
    sched="cosine",
    weight_decay=0.05,
    opt="adamw",
    model_ema=False,
    scale=[0.8, 1.0],
    crop_pct=1.0,
    interpolation="bicubic",
    train_interpolation="random",
)
FINE_TUNED_ON = {
    "cifar10": dict(
        dataset="tv-CIFAR10",
        num_classes=10,
        min_lr=1e-5,
        mean=[0.4914, 0.4822, 0.4465],
        std=[0.2470, 0.2435, 0.2616],
    ),
    "cifar100": dict(
        dataset="tv-CIFAR100",
        num_classes=100,
        min_lr=1e-5,
        mean=[0.5071, 0.4867, 0.4408],
        std=[0.2675, 0.2565, 0.2761],
    ),
    "flowers102": dict(
        dataset="tv-Flowers102",
        num_classes=102,
        min_lr=1e-8,
        mean=[0.4353, 0.3773, 0.2872],
        std=[0.2966, 0.2455, 0.2698],
        train_split="train",
        val_split="valid",
    ),
}


def options_of(config: Path) -> dict:
    return vars(parse_options(["-c", str(config)]))


@pytest.mark.parametrize("variant", "sml")
def test_imagenet_configs_hold_the_published_recipe(variant):
    options = options_of(CONFIGS / f"convmlp_{variant}_imagenet.yml")
    expected = IMAGENET | {"model": f"convmlp_{variant}_classification"}
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize("variant", "sml")
@pytest.mark.parametrize("dataset", FINE_TUNED_ON)
def test_fine_tuning_configs_hold_the_published_recipes(variant, dataset):
    options = options_of(CONFIGS / "finetuned" / f"convmlp_{variant}_{dataset}.yml")
    batch_size = 64 if variant == "l" else 96 if dataset == "flowers102" else 128
    expected = FINE_TUNING | FINE_TUNED_ON[dataset]
    expected |= {"model": f"convmlp_{variant}_classification", "batch_size": batch_size}
    expected |= {"lr": 5e-4 if (variant, dataset) == ("s", "flowers102") else 3e-4}
    assert {key: options[key] for key in expected} == expected


def test_every_config_is_valid_and_names_a_model():
    configs = [CONFIGS.parent / config for config in list_configs("classification")]
    assert len(configs) == 15
    for config in configs:
        assert is_model(options_of(config)["model"]), config


def test_command_line_overrides_config_overrides_base(tmp_path):
    (tmp_path / "base.yml").write_text("lr: 0.1\nepochs: 7\nmean: [0.1, 0.2, 0.3]\namp: true\nhflip: 0\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yml").write_text("base: ../base.yml\nlr: 5e-4\nchannels_last: false\nclip_grad: null\n")
    options = parse_options(["-c", str(tmp_path / "sub" / "own.yml"), "--epochs", "9", "--no-amp", "data"])
    assert options.lr == 5e-4  # which PyYAML reads as a string
    assert (options.epochs, options.amp, options.channels_last, options.hflip) == (9, False, False, 0.0)
    assert options.mean == [0.1, 0.2, 0.3] and options.clip_grad is None and options.data_dir == "data"


def test_lists_of_numbers_leave_the_data_folder_alone():
    for mean in (["--mean", "0.1", "0.2", "0.3"], ["--mean", "0.1,0.2,0.3"], ["--mean=0.1,0.2,0.3"]):
        options = parse_options(["--lr", "1", *mean, "data"])
        assert (options.mean, options.data_dir) == ([0.1, 0.2, 0.3], "data")


def test_stored_options_are_a_config_again(tmp_path):
    options = parse_options(["-c", str(CONFIGS / "convmlp_m_imagenet.yml"), "--lr", "0.25", "/data"])
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(stored_options(options)))
    again = parse_options(["-c", str(tmp_path / "args.yaml")])
    assert stored_options(again) == stored_options(options)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 3", "unknown key 'learning_rat'"),
        ("batchsize: 3", "did you mean batch_size?"),
        ("lr: fast", "invalid float value: 'fast'"),
        ("lr: [1, 2]", "lr cannot be [1, 2]"),
        ("amp: 3", "amp is true or false, got 3"),
        ("lr: true", "lr cannot be True"),
        ("remode: foo", "invalid choice: 'foo'"),
        ("- lr", "not a mapping"),
        ("lr: [1", "not valid YAML"),
        ("base: nowhere.yml", "cannot read the config"),
        ("base: own.yml", "leads back to itself"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_configs_are_named_with_the_reason(tmp_path, text, message):
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(RunError) as error:
        parse_options(["-c", str(tmp_path / "own.yml")])
    assert message in str(error.value) and ".yml" in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning-rate", "3"], "unknown option --learning-rate"),
        (["--model_ema"], "did you mean --model-ema?"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--reprob", "2"], "--reprob lies between 0 and 1, got 2.0"),
        (["--mean", "0.1", "0.2"], "one value or one a channel (3), got [0.1, 0.2]"),
        (["--mixup", "0.8", "--batch-size", "7"], "even --batch-size, got 7"),
        (["--seed", "-1"], "--seed cannot be negative, got -1"),
        (["--smoothing", "1"], "--smoothing lies between 0 and 1, got 1.0"),
        (["--scale", "1", ".5"], "--scale is a smaller and a larger part of 1, got [1.0, 0.5]"),
        (["--crop-pct", "0"], "--crop-pct must be positive, got 0.0"),
        (["--num-classes", "many"], "invalid number_or_auto value: 'many'"),
        (["--kd-checkpoint", "x.pth"], "--kd-checkpoint needs --kd-model"),
        (["--no-amp", "--amp-dtype", "float16"], "--amp-dtype needs --amp"),
        (["--eval", "x.pth", "--resume", "auto"], "give one of them"),
        (["--input-key", "png"], "--input-key and --target-key are for hfds and wds"),
        (
            ["--dataset", "wds/", "--checkpoint-interval", "5"],
            "--checkpoint-interval 5 does not work with streamed data",
        ),
        (["a", "b"], "there is one DATA folder, got a and b"),
        (["--epochs", "5", "--warmup-epochs", "5"], "leaves nothing of --epochs 5"),
    ],
)
def test_bad_options_are_named_with_the_way_out(arguments, message):
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


def test_small_numbers_and_nothing_survive_a_config(tmp_path):
    (tmp_path / "config.yml").write_text("model_kwargs:\n  ls_init_value: 1.0e-6\n  act: null\n")
    assert parse_options(["-c", str(tmp_path / "config.yml")]).model_kwargs == {"ls_init_value": 1e-6, "act": None}


def test_arguments_of_the_model_in_a_config(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text("model_kwargs:\n  conv_stage: false\n  dims: [8, 16, 24]\n")
    options = parse_options(["-c", str(path)])
    assert options.model_kwargs == {"conv_stage": False, "dims": [8, 16, 24]}
    path.write_text(yaml.safe_dump(stored_options(options)))
    assert parse_options(["-c", str(path)]).model_kwargs == options.model_kwargs


@pytest.mark.parametrize("text", ["conv_stage", "=1", "a=", "a=[1"])
def test_an_argument_of_the_model_without_name_or_value_is_named(text):
    with pytest.raises(RunError, match=r"--model-kwargs: (it takes KEY=VALUE, got|\[1 is no value)"):
        parse_options(["--model-kwargs", text])


@pytest.mark.parametrize(
    ("arguments", "amp"),
    [([], True), (["--no-amp"], False), (["--eval", "x.pth"], False), (["--eval", "x.pth", "--amp"], True)],
)
def test_mixed_precision_is_the_default_of_training_alone(arguments, amp):
    assert parse_options([*arguments, "pictures"]).amp is amp
