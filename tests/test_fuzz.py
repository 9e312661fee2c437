"""Whatever comes in, what comes out is right or one documented error: options, models, checkpoints, images, calls."""

import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from fuzzing import attempt, damage, damages, odd_numbers, odd_values, print_cases, tries
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from convmlp import ConvMLP, cli
from convmlp.classification.checkpoints import NEEDED_TO_RESUME, find_newest, read_training_checkpoint
from convmlp.classification.groups import keywords, number_or_auto, numbers
from convmlp.classification.options import build_parser, load_config, parse_options
from convmlp.common.errors import CheckpointError, RunError
from convmlp.common.images import UnreadableImage, read_image
from convmlp.use.classifier import open_classifier
from convmlp.use.predict import classify
from convmlp.variations import build
from convmlp.weights import load_pretrained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def report(request) -> Iterator[None]:
    yield
    print_cases(request)


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# Options of classification.py

ACTIONS = {a.dest: a for a in build_parser()._actions if a.dest not in ("help", "config", "data")}
FLAGS = [flag for action in build_parser()._actions for flag in action.option_strings if flag not in ("-h", "--help")]


# Each list holds the one before it nine times
BOMB = "&a [x], " + "".join(f"&{b} [{f'*{a}, ' * 9}], " for a, b in zip("abcdefgh", "bcdefghi", strict=True))
NASTY_CONFIGS = [
    "scale: [0.1, 0.2, 0.5]",
    "scale: [0.1, 0.2, --epochs=99]",
    "lr: .nan",
    "weight_decay: .inf",
    "mean: [0.5, .nan, 0.5]",
    "std: 0",
    "model_kwargs: {1: 2}",
    "model_kwargs: {conv stage: 2}",
    "model_kwargs: 'a=" + "[" * 500 + "'",
    f"epochs: {'9' * 5000}",
    "experiment: 2001-99-99",
    "[" * 5000,
    "base: 'a\\0b'",
    '"base": "a\\0b"',
    "base: " + "b" * 300,
    "base: [a]",
    f"lr: [{BOMB}]",
    "lr: &a [*a]",
    "- a",
    "lr:\n  ? [1]\n  : 2",
]


tokens = st.one_of(
    st.sampled_from(FLAGS),
    st.text(max_size=6),
    st.sampled_from(["1", "0.5", "-1", "nan", "inf", "1e5", "--", "-", "=", "a=1", "a=[", "auto", "3,", "DATA"]),
    st.builds(
        lambda flag, value: f"{flag}={value}", st.sampled_from(FLAGS), st.one_of(st.text(max_size=6), odd_numbers)
    ),
    st.builds(lambda flag, cut: flag[:cut], st.sampled_from(FLAGS), st.integers(2, 9)),
)


def fitting(action: Any) -> st.SearchStrategy:
    """Values of the right kind, many of them in range."""
    if action.nargs == 0:
        return st.booleans()
    if action.choices:
        return st.sampled_from(list(action.choices))
    if action.type in (int, number_or_auto):
        return st.integers(-1, 400)
    if action.type is float:
        return st.one_of(st.floats(0, 1), st.floats(-1, 10))
    if action.type is numbers:
        return st.lists(st.floats(0, 1), min_size=1, max_size=3)
    if action.type is keywords:
        return st.dictionaries(st.sampled_from(["conv_stage", "channels"]), odd_values, max_size=2)
    return st.one_of(st.text(max_size=8), st.sampled_from(["convmlp_s", "0.5", "a=b", "-x", "--lr=3"]))


def misfit(action: Any) -> st.SearchStrategy:
    """Values of about the right kind, out of range, or too many of them."""
    numbers_ = st.one_of(odd_numbers, odd_numbers.map(str), st.sampled_from(["--epochs=3", "-1", "1_0", " 7", "DATA"]))
    if action.nargs == 0 or action.choices:
        return odd_values
    if action.type is keywords:
        return st.one_of(st.dictionaries(st.one_of(st.text(max_size=4), odd_numbers), odd_values), tokens)
    return st.one_of(numbers_, st.lists(numbers_, max_size=4))


def fitting_pairs(action: Any) -> st.SearchStrategy:
    if action.nargs == 2:
        return st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted)
    return fitting(action)


def entries(values: Any) -> st.SearchStrategy:
    return st.sampled_from(sorted(ACTIONS)).flatmap(lambda name: st.tuples(st.just(name), values(ACTIONS[name])))


good_entries = st.lists(entries(fitting_pairs), max_size=4).map(dict)
odd_entries = st.one_of(
    st.lists(entries(lambda _: odd_values), max_size=2).map(dict),
    st.lists(entries(misfit), max_size=2).map(dict),
    st.dictionaries(st.one_of(st.text(max_size=8), odd_numbers), odd_values, max_size=2),
)


def said(action: Any, value: Any) -> Any:
    """What an option must hold that a config gives this value."""
    if value is None:
        return action.default
    if action.nargs == 0 or isinstance(value, dict):
        return value
    if action.type is numbers:
        return [float(part) for part in (value if isinstance(value, list) else str(value).split(","))]
    if action.type is keywords:
        return keywords(value)
    convert = action.type or str
    return [convert(str(part)) for part in value] if action.nargs == 2 else convert(str(value))


def infinite(values: Any) -> list[float]:
    """What is no number among numbers and lists of them."""
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [value for value in flat if isinstance(value, float) and not isfinite(value)]


@tries(150, 4000)
@given(good_entries, st.one_of(st.just({}), odd_entries))
def test_a_config_means_what_it_says_or_is_refused(tmp_path_factory, good, odd):
    text = yaml.safe_dump({**good, **odd}, allow_unicode=True)
    values = yaml.safe_load(text)
    file = tmp_path_factory.getbasetemp() / "fuzz.yml"
    file.write_text(text, encoding="utf-8")
    options = attempt("config", lambda: parse_options(["-c", str(file)]))
    if not isinstance(options, RunError):
        assert values.keys() <= {*ACTIONS, "base"}
        assert not infinite(vars(options).values())
        for name, value in values.items():
            if name != "base":
                assert getattr(options, name) == said(ACTIONS[name], value), name


@tries(150, 3000)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=40).map(str.encode),
        st.lists(st.sampled_from("[]{}:,&*!|>?-#%@`'\" \n\tab01.~eE"), max_size=40).map(lambda x: "".join(x).encode()),
        st.builds(lambda name, text: f"{name}: {text}".encode(), st.sampled_from(sorted(ACTIONS)), st.text(max_size=9)),
    )
)
def test_any_bytes_as_a_config_are_options_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.yml"
    file.write_bytes(content)
    attempt("bytes as config", lambda: parse_options(["-c", str(file)]))


@pytest.mark.parametrize("text", NASTY_CONFIGS)
def test_nasty_configs_are_refused(folder, text):
    (folder / "nasty.yml").write_text(text)
    assert isinstance(attempt("nasty configs", lambda: parse_options(["-c", str(folder / "nasty.yml")])), RunError)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "a\0b"],
        ["-c", "c" * 300],
        ["--model-kwargs", "a=" + "[" * 5000],
        ["--model-kwargs", "a=2001-99-99"],
        ["--model-kwargs", "a={[]: 1}"],
        ["--lr", "nan"],
        ["--opt-betas", "0.9", "inf"],
        ["--decay-milestones", "1e999"],
        ["--epochs", "9" * 5000],
    ],
)
def test_nasty_command_lines_are_refused(arguments):
    assert isinstance(attempt("nasty command lines", lambda: parse_options(arguments)), RunError)


@tries(60, 1500)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=5))
def test_bases_add_up_or_their_circle_is_named(tmp_path_factory, files):
    """File i names base 0..4, or none (5), or one that is not there (6)."""
    place = tmp_path_factory.mktemp("bases")
    for i, (base, epochs) in enumerate(files):
        values = {f"key{i}": epochs, "epochs": epochs}
        (place / f"{i}.yml").write_text(yaml.safe_dump(values if base == 5 else {**values, "base": f"{base}.yml"}))
    config = attempt("bases", lambda: load_config(place / "0.yml"))
    chain = [0]
    while len(chain) <= len(files) and chain[-1] < len(files) and files[chain[-1]][0] != 5:
        chain.append(files[chain[-1]][0])
    if chain[-1] >= len(files) or len(chain) > len(files):
        assert isinstance(config, RunError)
    else:
        assert config == {**{f"key{i}": files[i][1] for i in chain}, "epochs": files[0][1]}


@tries(200, 5000)
@example(["--model-kwargs", "a=" + "-" * 100_000 + "1"])
@given(st.lists(tokens, max_size=6))
def test_a_command_line_is_options_or_refused(arguments):
    assume("-h" not in arguments and "--help" not in arguments)
    options = attempt("command line", lambda: parse_options(arguments))
    assert isinstance(options, RunError) or not infinite(vars(options).values())


@tries(120, 3000)
@given(good_entries)
def test_the_command_line_says_what_a_config_says(given):
    arguments = []
    for name, value in given.items():
        action = ACTIONS[name]
        flag = action.option_strings[0]
        if action.nargs == 0:
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
            assume(arguments[-1] in action.option_strings)
        elif action.type is keywords:
            assume(False)
        elif isinstance(value, list) and action.nargs == 2:
            arguments += [flag, *map(str, value)]
        elif isinstance(value, list):
            arguments.append(f"{flag}={','.join(map(str, value))}")
        else:
            arguments.append(f"{flag}={value}" if flag.startswith("--") else f"{flag}{value}")
    options = attempt("options of both", lambda: parse_options([*arguments, "DATA"]))
    if not isinstance(options, RunError):
        for name, value in given.items():
            expected = "DATA" if name == "data_dir" else said(ACTIONS[name], value)
            assert getattr(options, name) == expected, name


# Models


def or_none(values: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.none(), st.none(), values)


def sometimes(good: st.SearchStrategy, odd: st.SearchStrategy = odd_values) -> st.SearchStrategy:
    """Mostly good."""
    return st.sampled_from([*[good] * 15, odd, *[good] * 15]).flatmap(lambda values: values)


@st.composite
def settings_of_models(draw: Any) -> dict[str, Any]:
    """Arguments of ConvMLP, mostly good ones."""
    n = draw(st.integers(1, 3))

    def one_a_stage(values: st.SearchStrategy) -> st.SearchStrategy:
        return sometimes(
            st.lists(sometimes(values, odd_numbers.filter(small)), min_size=n, max_size=n),
            st.one_of(odd_values, st.lists(values, max_size=4)),
        )

    def small(number: Any) -> bool:
        return not 10 < abs(number) < float("inf")

    count = sometimes(st.integers(0, 3), odd_values.filter(lambda x: not isinstance(x, (int, float)) or small(x)))
    return {
        "blocks": draw(one_a_stage(st.integers(0, 2))),
        "dims": draw(one_a_stage(st.integers(1, 8))),
        "mlp_ratios": draw(one_a_stage(st.floats(0.5, 3))),
        "channels": draw(sometimes(st.sampled_from([2, 4, 6]), st.sampled_from([0, 1, 3, -2, 2.0, "4", None, True]))),
        "n_conv_blocks": draw(count),
        **draw(
            st.fixed_dictionaries(
                {},
                optional={
                    "num_classes": count,
                    "in_chans": sometimes(st.integers(1, 4), st.sampled_from([0, -1, 1.5, "3", None])),
                    "drop_rate": sometimes(st.floats(0, 0.99)),
                    "drop_path_rate": sometimes(st.floats(0, 0.99)),
                    "global_pool": sometimes(st.sampled_from(["avg", "max", "avgmax", ""])),
                    "final_norm": st.sampled_from([None, True, False]),
                    "classifier_head": st.booleans(),
                    "conv_stage": st.booleans(),
                    "conv_downsample": st.booleans(),
                    "spatial_connect": st.booleans(),
                },
            )
            if draw(st.booleans())
            else st.sampled_from([{}, {}, {}, {"unknown": 1}])
        ),
    }


sides = st.one_of(st.integers(1, 40), st.integers(1, 150))


@tries(120, 3000)
@given(
    settings_of_models(),
    st.integers(0, 2),
    sides,
    sides,
    st.sampled_from([None] * 5 + [0, 1, 3, 5]),
    st.booleans(),
)
def test_a_model_of_any_arguments_gives_the_right_shape_or_is_refused(given, batch, height, width, channels, training):
    model = attempt("arguments of models", lambda: build(**given), (ValueError, TypeError))
    if isinstance(model, Exception):
        return
    x = torch.zeros(batch, model.in_chans if channels is None else channels, height, width)
    model.train(training)
    with torch.no_grad():
        # Of PyTorch's own: other channels than expected, and statistics of a single value
        y = attempt("input sizes", lambda: model(x), (RuntimeError, ValueError))
    fits = x.shape[1] == model.in_chans
    if isinstance(y, Exception):
        assert not fits or (training and batch * -(-height // 4) * -(-width // 4) <= 1), y
        return
    assert fits
    stride = 8 * 2 ** (len(given["dims"]) - 1)
    lines, columns, dim = -(-height // stride), -(-width // stride), given["dims"][-1]
    if not model.classifier_head:
        assert y.shape == (batch, lines, columns, dim)
    elif model.num_classes:
        assert y.shape == (batch, given.get("num_classes", 1000))
    elif model.global_pool:
        assert y.shape == (batch, dim)
    else:
        assert y.shape == (batch, dim, lines, columns)
    assert training or y.isfinite().all()


# Checkpoints

TINY = dict(blocks=(1, 1), dims=(4, 6), mlp_ratios=(1, 1), channels=4, n_conv_blocks=1, num_classes=3, final_norm=True)
NAMES = list(ConvMLP(**TINY).state_dict())


default_cfgs = generate_default_cfgs(
    {
        "fuzz_tiny": {
            "input_size": (3, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bilinear",
            "first_conv": "tokenizer.block.0",
            "classifier": "head",
        }
    }
)


@register_model
def fuzz_tiny(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    return build_model_with_cfg(ConvMLP, "fuzz_tiny", pretrained, **{**TINY, **kwargs})


def weights(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return ConvMLP(**TINY).state_dict()


dtypes = st.sampled_from("float16 bfloat16 float64 int8 int64 uint8 bool complex64 float8_e4m3fn".split())
changes = st.one_of(
    st.tuples(st.just("drop"), st.none()),
    st.tuples(st.just("rename"), st.sampled_from(["module.{}", "_orig_mod.{}", "backbone.{}", "{}x", "head.weight"])),
    st.tuples(st.just("copy"), st.sampled_from(["module.{}", "_orig_mod.{}", "more.{}", "head.{}"])),
    st.tuples(st.just("type"), dtypes),
    st.tuples(st.just("shape"), st.lists(st.integers(0, 6), max_size=4)),
    st.tuples(st.just("first"), st.integers(0, 5)),
    st.tuples(st.just("value"), st.sampled_from([None, "text", 3, 0.5, True, {}, {"a": 1}, [1.0], float("nan")])),
    st.tuples(st.just("fill"), st.sampled_from([float("nan"), float("inf"), -1.0])),
    st.tuples(st.just("form"), st.sampled_from(["sparse", "meta", "transposed", "expanded"])),
)
some_name = st.one_of(st.sampled_from(NAMES), st.sampled_from(NAMES[:2] + NAMES[-4:]))
edits = st.lists(st.tuples(some_name, changes), max_size=3, unique_by=lambda edit: edit[0])
prefixes = st.sampled_from(["", "", "", "module.", "_orig_mod.", "module._orig_mod.", "model."])
wraps = st.lists(
    st.tuples(
        st.sampled_from(["state_dict", "state_dict_ema", "model", "weights"]),
        st.sampled_from(["weights", "weights", "other weights", None, 3, {}, []]),
    ),
    max_size=2,
)


def edit(state: dict[str, Any], changes: list[tuple[str, tuple[str, Any]]]) -> dict[str, Any]:
    state = dict(state)
    for name, (kind, how) in changes:
        value = state.get(name)
        if not isinstance(value, torch.Tensor):
            continue
        if kind in ("drop", "rename"):
            del state[name]
        if kind in ("rename", "copy"):
            state[how.format(name)] = value if kind == "rename" else torch.full_like(value, 7)
        elif kind == "type":
            state[name] = value.to(getattr(torch, how))
        elif kind == "shape":
            state[name] = torch.ones(how)
        elif kind == "first" and value.ndim:
            state[name] = value.new_ones(how, *value.shape[1:])
        elif kind == "value":
            state[name] = how
        elif kind == "fill" and value.is_floating_point():
            state[name] = torch.full_like(value, how)
        elif kind == "form" and value.ndim:
            state[name] = {
                "sparse": value.to_sparse(),
                "meta": value.to("meta"),
                "transposed": value.transpose(0, -1).contiguous().transpose(0, -1),
                "expanded": value[:1].expand_as(value),
            }[how]
    return state


def wrapped(state: dict[str, Any], wraps: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {key: {"weights": state, "other weights": weights(1)}.get(str(what), what) for key, what in wraps}
    return content or state


def plain(name: str) -> str:
    """A name without what DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def assert_filled(model: ConvMLP, fresh: dict[str, Any], content: dict[str, Any], use_ema: bool = True) -> None:
    """The model holds the weights of the file and nothing else, but for what `load_pretrained` says it adapts."""
    wanted = [content.get(key) for key in ("state_dict_ema", "state_dict", "model") if use_ema or "ema" not in key]
    found = {}
    for name, value in next((each for each in wanted if isinstance(each, dict)), content).items():
        assert plain(name) not in found, f"{name} is there twice"
        found[plain(name)] = value
    own = model.state_dict()
    new_head = len(found["head.weight"]) != model.num_classes if model.num_classes else False
    first = next(iter(own))
    for name, value in own.items():
        file = found[name]
        if new_head and name.startswith("head."):
            torch.testing.assert_close(value, fresh[name], rtol=0, atol=0)
            continue
        assert file.is_floating_point() == value.is_floating_point() and not file.is_complex(), name
        assert file.dtype != torch.bool and not value.is_meta, name
        if name != first or file.shape == value.shape:
            torch.testing.assert_close(value, file.to(value.dtype), rtol=0, atol=0, equal_nan=True)
    assert {name for name in found if not name.startswith(("head.", "norm."))} <= own.keys()


def save(content: Any, path: Path, form: str) -> None:
    if form == "old torch":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "torch":
        torch.save(content, path)
    else:
        safetensors.torch.save_file({name: value.clone().contiguous() for name, value in content.items()}, path)


def read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def save_or_skip(content: Any, path: Path, form: str) -> None:
    """Write a checkpoint, unless no writer could."""
    try:
        save(content, path, form)
    except (TypeError, AttributeError, ValueError, RuntimeError, NotImplementedError, KeyError):
        assume(False)


forms = st.sampled_from(["torch", "torch", "old torch", "safetensors"])


@tries(60, 1200)
@given(
    edits,
    prefixes,
    wraps,
    forms,
    st.one_of(st.none(), st.none(), damages),
    st.sampled_from([3, 3, 5, 0]),
    st.booleans(),
)
def test_a_checkpoint_fills_the_model_or_is_refused(changes, prefix, wraps, form, damages, num_classes, use_ema):
    state = {prefix + name: value for name, value in edit(weights(), changes).items()}
    content = wrapped(state, wraps) if form != "safetensors" else state
    model = ConvMLP(**{**TINY, "num_classes": num_classes})
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "file.safetensors" if form == "safetensors" else "file.pth")
        save_or_skip(content, path, form)
        if damages:
            path.write_bytes(damage(path.read_bytes(), damages))
        error = attempt(f"checkpoints, {form}", lambda: load_pretrained(model, path, use_ema=use_ema))
        assert error is None or isinstance(error, CheckpointError)
        if not error:
            # Only the zip of torch.save has checksums
            assert_filled(model, fresh, content if form == "torch" else read(path), use_ema)


about = st.fixed_dictionaries(
    {},
    optional={
        "arch": st.one_of(st.sampled_from(["fuzz_tiny", "fuzz", "fuzz_tiny.x", "", "local-dir:x"]), odd_values),
        "class_names": st.one_of(st.just(["a", "b"]), st.just(["a", 1, None]), odd_values),
        "args": st.one_of(
            st.fixed_dictionaries(
                {},
                optional={
                    "gp": st.one_of(st.sampled_from(["avg", "max", ""]), odd_values),
                    "in_chans": st.one_of(st.integers(0, 4), st.sampled_from(["3", None, 1.5, [3], True])),
                    "model_kwargs": st.one_of(
                        st.dictionaries(
                            st.sampled_from(["conv_stage", "num_classes", "name", "drop_rate", "x", 1]),
                            st.sampled_from([True, False, 0.5, "a", None]),
                            max_size=2,
                        ),
                        odd_values,
                    ),
                },
            ),
            odd_values,
        ),
        "data_config": st.one_of(
            st.fixed_dictionaries(
                {"input_size": st.one_of(st.just([3, 32, 40]), st.lists(st.integers(-1, 40), max_size=4), odd_values)},
                optional={
                    "mean": st.one_of(st.lists(st.floats(0, 1), max_size=4), odd_values),
                    "std": st.one_of(st.lists(st.floats(0, 1), max_size=4), odd_values),
                    "crop_pct": st.sampled_from([0.5, 1, 0, -1, None, "a", float("nan")]),
                    "interpolation": st.sampled_from(["bicubic", "", "x", None, 3]),
                    "crop_mode": st.sampled_from(["center", "squash", "border", "", 3]),
                    "more": st.just(1),
                },
            ),
            odd_values,
        ),
    },
)
GOOD = {"arch": "fuzz_tiny", "class_names": list("abc"), "args": {}, "data_config": {"input_size": [3, 32, 40]}}


@tries(80, 1200)
@given(st.one_of(st.just([]), edits), about, or_none(damages), st.sampled_from([None, "fuzz_tiny", "convmlp_s", "x"]))
@example([], {"args": {"model_kwargs": {"num_classes": 3}}}, None, None)
@example([], {"arch": None, "data_config": 5}, None, "fuzz_tiny")
@example([("head.weight", ("shape", []))], {}, None, None)
@example([("head.weight", ("shape", [0, 6])), ("head.bias", ("shape", [0]))], {"class_names": []}, None, None)
@example([("tokenizer.block.0.weight", ("shape", [2, 0, 3, 3]))], {}, None, None)
def test_a_classifier_of_any_checkpoint_classifies_or_is_refused(changes, about, damages, model):
    content = {"state_dict": edit(weights(), changes), **GOOD, **about}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "file.pth")
        save_or_skip(content, path, "torch")
        if damages:
            path.write_bytes(damage(path.read_bytes(), damages))
        classifier = attempt("classifiers", lambda: open_classifier(model, str(path), device="cpu"))
    if not isinstance(classifier, RunError):
        assert_filled(classifier.model, {}, content)
        assert len(classifier.class_names) == classifier.model.num_classes
        attempt("pictures of classifiers", lambda: classify([Image.new("RGB", (20, 30))], classifier))


@tries(60, 1000)
@given(
    st.lists(st.one_of(or_none(damages), st.just("missing")), min_size=2, max_size=2),
    st.lists(st.sampled_from(sorted(NEEDED_TO_RESUME)), max_size=1),
)
def test_the_newest_readable_checkpoint_is_found_whole_or_none(how, lost):
    with tempfile.TemporaryDirectory() as place:
        kept = {}
        for i, (name, damages) in enumerate(zip(("last.pth", "previous.pth"), how, strict=True)):
            if damages != "missing":
                state = {key: kind() for key, kind in NEEDED_TO_RESUME.items()}
                state |= {"epoch": i, "state_dict": weights(i)}
                kept[name] = {key: value for key, value in state.items() if i or key not in lost}
                torch.save(kept[name], Path(place, name))
                content = Path(place, name).read_bytes()
                Path(place, name).write_bytes(damage(content, damages) if damages else content)
        found = attempt("newest checkpoints", lambda: find_newest(Path(place)))
        if isinstance(found, RunError):
            assert any(damages or lost for damages in how)
        elif found is None:
            assert not kept
        else:
            path, content = found
            again = attempt("training checkpoints", lambda: read_training_checkpoint(path))
            for state in (content, again):
                torch.testing.assert_close(state.pop("state_dict"), weights(state["epoch"]), rtol=0, atol=0)
                assert state | {"state_dict": {}} == kept[path.name] | {"state_dict": {}}


# Pictures

FORMATS = "PNG JPEG BMP DIB GIF TIFF WEBP PPM JPEG2000 AVIF TGA ICO DDS PCX SGI IM QOI ICNS MSP SPIDER XBM EPS".split()
MODES = "1 L LA P PA RGB RGBA CMYK YCbCr LAB HSV I I;16 I;16B F".split()


@tries(200, 5000)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from(MODES),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    or_none(damages),
    st.sampled_from(["RGB", "L"]),
    st.dictionaries(st.sampled_from([0x112, 0x10E, 0x8769]), st.integers(0, 9), max_size=2),
)
def test_a_picture_is_read_or_refused(tmp_path_factory, form, mode, size, damages, wanted, tags):
    image = Image.linear_gradient("L").resize(size)
    try:
        image = image.convert(mode)
    except ValueError:
        image = Image.new(mode, size)
    exif = Image.Exif()
    exif.update(tags)
    file = tmp_path_factory.getbasetemp() / "fuzz.picture"
    try:
        image.save(file, form, exif=exif)
    except Exception:  # of modes and tags that a format does not have
        assume(False)
    if damages:
        file.write_bytes(damage(file.read_bytes(), damages))
    picture = attempt("pictures", lambda: read_image(file, wanted))
    if isinstance(picture, Exception):
        assert isinstance(picture, UnreadableImage) and str(file) in str(picture)
    else:
        assert picture.mode == wanted and min(picture.size) > 0
        assert np.asarray(picture).dtype == np.uint8
        if not damages and form not in ("ICO", "ICNS"):  # which keep copies in sizes of their own
            assert sorted(picture.size) == sorted(size)


HEADS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"RIFF\0\0\0\0WEBP", b"P6 "]
HEADS += [b"qoif", b"DDS ", b"\0\0\1\0", b"icns", b"8BPS\0\1", b"\0\0\0\x0cjP  ", b"%!PS-Adobe", b"SIMPLE", b""]


@tries(100, 3000)
@given(st.sampled_from(HEADS), st.binary(max_size=200))
def test_any_bytes_are_a_picture_or_refused(tmp_path_factory, head, rest):
    file = tmp_path_factory.getbasetemp() / "fuzz.picture"
    file.write_bytes(head + rest)
    picture = attempt("bytes as pictures", lambda: read_image(file))
    assert isinstance(picture, UnreadableImage) or picture.mode == "RGB"


# The command

SUBPARSERS = next(action for action in cli.build_parser()._actions if action.dest == "verb").choices
OPTIONS = sorted({flag for sub in SUBPARSERS.values() for action in sub._actions for flag in action.option_strings})
OPTIONS = [flag for flag in OPTIONS if flag not in ("--pretrained", "--debug")]
WEIRD = ["", ".", "/dev", "nowhere.jpg", "*.jpg", "a\0b", "n" * 300, "x.pth", "junk.pth", "junk.jpg", "tiny.pth"]
WEIRD += ["picture.png", "\udcff.jpg", "convmlp", "convmlp_s.", "convmlp_s.in1k_x", "fuzz_tiny", "local-dir:x"]
WEIRD += ["local-dir:", "hf-hub:a/b", "hf-hub:", "file:///nowhere.pth", "file://x", "://", "a://b.pth", "http://"]
WEIRD += ["[", "**", "-", "--", "-1", "cpu", "bash", "~", "picture.png/x"]
words = st.one_of(
    st.sampled_from(WEIRD),
    st.sampled_from(WEIRD),
    st.sampled_from(OPTIONS),
    st.builds("{}={}".format, st.sampled_from(OPTIONS), st.sampled_from([*WEIRD, "1", "0.5", "99999999", "9" * 5000])),
    st.sampled_from(["1", "0", "32", "99999", "99999999", "nan", "²", "٣"]),
    st.text(max_size=6),
)
sensible_calls = st.builds(
    lambda verb, names, rest: [verb, *names, *rest],
    st.sampled_from(["info", "predict"]),
    st.lists(st.sampled_from(WEIRD), min_size=1, max_size=2),
    st.lists(st.sampled_from(["--checkpoint=tiny.pth", "--img-size=32", "--json=-", "--markdown", "--topk=2"])),
)


def run(arguments: list[str]) -> tuple[Any, str]:
    """Exit code and all that was printed."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with redirect_stdout(screen), redirect_stderr(screen):
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code or 0
    screen.flush()
    return code, screen.buffer.getvalue().decode()


@tries(100, 2000)
@given(
    st.one_of(
        sensible_calls,
        st.builds(lambda verb, rest: [verb, *rest], st.sampled_from(sorted(SUBPARSERS)), st.lists(words)),
        st.lists(words),
    )
)
@example(["info", "convmlp_s.", "--img-size=32"])
@example(["info", "nowhere", "--img-size=32"])
@example(["info", "fuzz_tiny", "--img-size=99999999"])
def test_a_call_ends_with_a_code_of_its_manual(tmp_path_factory, arguments):
    assume(not arguments or arguments[0] != "doctor")
    assume("/" not in arguments)  # all images of the machine
    assume("info" not in arguments or set(arguments) & set(WEIRD))  # it would measure all of our models
    place = tmp_path_factory.mktemp("calls")
    (place / "junk.jpg").write_bytes(b"junk")
    (place / "junk.pth").write_bytes(b"PK junk")
    torch.save({"state_dict": weights(), **GOOD}, place / "tiny.pth")
    Image.new("RGB", (40, 40)).save(place / "picture.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("TORCH_HOME", str(place))
        patch.setattr("convmlp.zoo.MIRRORS", ("nowhere:",))
        patch.setattr("convmlp.train.launch", lambda *words, **names: sys.exit(0))  # the program would replace this one
        code, printed = attempt("calls", lambda: run(arguments))
    assert code in (0, 1, 2), printed
    assert "Traceback" not in printed and "bug:" not in printed
    assert code != 2 or "convmlp: error: " in printed
