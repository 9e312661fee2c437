"""Options of classification.py: one table, filled from a YAML config and the command line.

Names are those of timm's training script wherever it has the option, so that its recipes carry over. A config is a
mapping of option names (with underscores) to values; its key `base` names another config, relative to itself, whose
values it starts from.
"""

import argparse
import ast
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..common.command import Parser
from ..common.configs import find_config
from ..common.errors import RunError, suggest

POSITIONAL = "data"
NOT_STORED = {POSITIONAL, "config", "resume", "eval", "overwrite"}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ""):
            return action.help
        return super()._get_help_string(action) if action.help else "default: %(default)s"


def number_or_auto(text: str) -> int | None:
    return None if text == "auto" else int(text)


def numbers(text: str) -> list[float]:
    """One or more numbers, separated by commas (or blanks, see `_join_lists`)."""
    return [float(part) for part in text.split(",")]


def keywords(text: str) -> dict[str, Any]:
    """KEY=VALUE pairs, separated by commas (or blanks, see `_join_lists`); values as Python or YAML writes them."""
    pairs = [part.partition("=") for part in re.split(r",(?=\w+=)", text)]
    if not all(key.isidentifier() and value for key, _, value in pairs):
        raise argparse.ArgumentTypeError(f"it takes KEY=VALUE, got {text}")
    return {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text[:80]} is no value") from None


def _join_lists(argv: list[str]) -> list[str]:
    """`--mean 0.5 0.4 0.3 DATA` to `--mean 0.5,0.4,0.3 DATA`: argparse would take DATA for a number as well."""
    joined = ["", ""]
    for token in argv:
        is_number = re.fullmatch(r"-?[\d.]+(e-?\d+)?", token)
        is_pair = re.match(r"\w+=", token)
        if (is_number and joined[-2] in ("--mean", "--std", "--decay-milestones")) or (
            is_pair and joined[-2] == "--model-kwargs"
        ):
            joined[-1] += f",{token}"
        else:
            joined.append(token)
    return joined[2:]


def build_parser() -> Parser:
    """The options with their defaults and help texts; `--help` of it is the manual."""
    parser = Parser(
        prog="classification.py",
        usage="%(prog)s [-c CONFIG] [options] DATA",
        description="Train or evaluate an image classifier. A config gives defaults, the command line overrides.",
        formatter_class=_HelpFormatter,
        surplus="there is one DATA folder, got another: {}",
    )
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add(POSITIONAL, nargs="?", metavar="DATA", help="data folder, holding train/CLASS/* and val/CLASS/*")
    add("-c", "--config", metavar="FILE|NAME", help="YAML file of option values, or one of `convmlp configs`")

    add = parser.add_argument_group("what to do").add_argument
    add("--eval", metavar="CHECKPOINT", help="only evaluate this checkpoint; its own settings are the defaults")
    add("--resume", metavar="auto|FILE", help="continue a run: auto takes the newest checkpoint of the output folder")
    add("--overwrite", action=switch, default=False, help="replace an earlier run in the output folder")
    add("--output", metavar="DIR", help="where runs are kept, by default output; with --eval beside the checkpoint")
    add("--experiment", metavar="NAME", help="folder of this run in --output; by default the config's or model's name")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="the same as DATA")
    add("--dataset", default="", help="'' image folder or tar, tv-NAME torchvision, hfds/NAME, wds/, sklearn-digits")
    add("--train-split", default="train", metavar="NAME")
    add("--val-split", default="validation", metavar="NAME", help="val, valid and validation stand for each other")
    add("--download", "--dataset-download", action=switch, default=False, help="let a tv- dataset download itself")
    add("--class-map", metavar="FILE", help="text file of class names in the order of their numbers")
    add("--num-classes", type=number_or_auto, metavar="N|auto", help="auto takes the data's")
    add("--input-key", metavar="NAME", help="image field of an hfds or wds dataset")
    add("--target-key", metavar="NAME", help="label field of an hfds or wds dataset")
    add("--train-num-samples", type=int, metavar="N", help="images in a wds training set that does not say so itself")
    add("--val-num-samples", type=int, metavar="N", help="likewise for validation")
    add("--on-bad-image", choices=["skip", "stop"], default="skip", help="an unreadable image is named and skipped")
    add("-j", "--workers", type=int, metavar="N", help="loader processes; by default the cores a process has, up to 8")
    add("--pin-mem", action=switch, default=True, help="pinned memory for copies to a GPU")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="convmlp_s", metavar="NAME", help="any timm model, ours among them")
    add("--pretrained", action=switch, default=False, help="start from the published ImageNet weights")
    add(
        "--initial-checkpoint", metavar="FILE", help="start from these weights instead; the head may have other classes"
    )
    add("--drop", type=float, default=0.0, metavar="P", help="dropout before the head")
    add("--drop-path", type=float, metavar="P", help="stochastic depth; by default the model's (ConvMLP 0.1)")
    add("--gp", metavar="POOL", help="global pooling: avg, max, avgmax")
    add(
        "--model-kwargs",
        type=keywords,
        default={},
        metavar="KEY=VALUE",
        help="arguments of the model: conv_stage=False",
    )
    add("--grad-checkpointing", action=switch, default=False, help="recompute activations to save memory")

    add = parser.add_argument_group("image size and normalisation; by default the model's").add_argument
    add("--img-size", type=int, metavar="PX")
    add("--in-chans", type=int, choices=[1, 3], default=3, help="1 reads images as greyscale")
    add("--mean", type=numbers, metavar="M[,M,M]", help="one value, or one a channel; blanks may separate them")
    add("--std", type=numbers, metavar="S[,S,S]")
    add("--interpolation", metavar="NAME", help="for evaluation: bilinear, bicubic, ...")
    add("--crop-pct", type=float, metavar="F", help="evaluation crop over resized image")
    add("--crop-mode", choices=["center", "squash", "border"], help="evaluation crop")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a device")
    add("--amp", action=switch, help="mixed precision; by default in training, not with --eval")
    add(
        "--amp-dtype", choices=["auto", "bfloat16", "float16"], default="auto", help="auto: bfloat16 where it is native"
    )
    add("--channels-last", action=switch, default=True, help="memory layout; the faster one")
    add("--compile", action=switch, default=False, help="torch.compile; the first step then takes up to a minute")
    add("--sync-bn", action=switch, default=False, help="BatchNorm over all GPUs")
    add(
        "--find-unused-parameters",
        action=switch,
        default=False,
        help="for models that leave weights out of a step; also lets three or more processes resume bit for bit",
    )
    add("--dist-bn", choices=["reduce", "broadcast", ""], default="reduce", help="BatchNorm statistics after an epoch")
    add("--seed", type=int, default=42)

    add = parser.add_argument_group("schedule").add_argument
    add("--epochs", type=int, default=300, metavar="N", help="without the cool-down")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="images a process and step")
    add("--validation-batch-size", type=int, metavar="N", help="by default the training batch")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="steps whose gradients make one update")
    add("--sched", default="cosine", help="cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau, none")
    add("--lr", type=float, default=5e-4, help="learning rate; not scaled by batch size or processes")
    add("--min-lr", type=float, default=1e-5)
    add("--warmup-lr", type=float, default=1e-6)
    add("--warmup-epochs", type=int, default=5, metavar="N")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="epochs at --min-lr after the schedule")
    add("--patience-epochs", type=int, default=10, metavar="N", help="for plateau")
    add("--decay-epochs", type=float, default=90, metavar="N", help="for step, wsd, rsqrt")
    add("--decay-milestones", type=numbers, default=[90, 180, 270], metavar="N,N", help="for multistep")
    add("--decay-rate", type=float, default=0.1, help="for step, multistep, plateau; the power for poly")

    add = parser.add_argument_group("optimizer and loss").add_argument
    add("--opt", default="adamw", help="any optimizer of timm")
    add("--opt-eps", type=float)
    add("--opt-betas", type=float, nargs=2)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    add("--layer-decay", type=float, metavar="F", help="learning rate factor from a layer to the one before it")
    add("--clip-grad", type=float, metavar="X", help="clip gradients")
    add("--clip-mode", choices=["norm", "value", "agc"], default="norm")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--model-ema", action=switch, default=False, help="keep and evaluate a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.9998)
    add("--model-ema-warmup", action=switch, default=False, help="let the decay rise to its value")
    add("--kd-model", metavar="NAME", help="distil from this timm model's logits (pretrained, or --kd-checkpoint)")
    add("--kd-checkpoint", metavar="FILE", help="weights of the teacher")
    add("--kd-weight", type=float, default=1.0, help="weight of the distillation loss beside the task's")
    add("--kd-temperature", type=float, default=1.0)

    add = parser.add_argument_group("augmentation").add_argument
    add("--aug", action=switch, default=True, help="--no-aug: resize and crop only")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of the random crop")
    add("--train-interpolation", default="random", help="random, bilinear, bicubic, ...")
    add("--hflip", type=float, default=0.5, metavar="P")
    add("--vflip", type=float, default=0.0, metavar="P")
    add("--color-jitter", type=float, default=0.4, help="without --aa")
    add("--aa", metavar="POLICY", help="rand-m9-mstd0.5-inc1, augmix-..., original, ...")
    add("--reprob", type=float, default=0.0, metavar="P", help="random erasing")
    add("--remode", choices=["const", "rand", "pixel"], default="pixel")
    add("--recount", type=int, default=1)
    add("--mixup", type=float, default=0.0, metavar="ALPHA")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA")
    add("--cutmix-minmax", type=float, nargs=2)
    add("--mixup-prob", type=float, default=1.0, metavar="P")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="cutmix rather than mixup, if both are on")
    add("--mixup-mode", choices=["batch", "pair", "elem"], default="batch")
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixup from this epoch on; 0 never")

    add = parser.add_argument_group("records").add_argument
    add("--checkpoint-interval", type=int, default=0, metavar="STEPS", help="also save within epochs; 0 at their ends")
    add(
        "--checkpoint-minutes",
        type=float,
        default=10,
        metavar="MINUTES",
        help="also save within epochs when this time has passed; 0 never",
    )
    add(
        "--skip-nonfinite",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N updates whose loss or gradients are not finite; by default the first one ends the run",
    )
    add("--log-interval", type=int, default=50, metavar="STEPS", help="log lines where there is no terminal")
    add("--eval-metric", choices=["top1", "top5", "loss"], default="top1", help="what makes a checkpoint the best")
    add("--use-ema", action=switch, default=True, help="--eval and --initial-checkpoint prefer averaged weights")
    add("--log-tensorboard", action=switch, default=False)
    add("--log-wandb", action=switch, default=False)
    add("--wandb-project", metavar="NAME")
    return parser


def parse_options(argv: list[str], base: dict[str, Any] | None = None) -> argparse.Namespace:
    """Options from the command line, over the config it names, over `base`, over the defaults.

    Raises:
        RunError: an unknown name (the nearest is offered), a bad value, or an unreadable config.
    """
    parser = build_parser()
    argv = _join_lists(argv)
    given, _ = parser.parse_known_args(argv)
    options = parser.parse_args([])
    if base:
        _apply(parser, base, options, "the checkpoint's settings")
    if given.config:
        options.config = str(find_config(given.config, "classification"))
        _apply(parser, load_config(Path(options.config)), options, options.config)
    options = parser.parse(argv, options)
    options.data_dir = options.data or options.data_dir
    if options.amp is None:
        options.amp = not options.eval
    _check_ranges(options)
    return options


def stored_options(options: argparse.Namespace) -> dict[str, Any]:
    """What args.yaml and checkpoints keep: plain values that make a config again."""
    return {key: value for key, value in vars(options).items() if key not in NOT_STORED}


def load_config(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML config over those of the config that its `base` names."""
    try:
        place = path.resolve()
        content = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # no file, a name with a zero in it, links in a circle
        raise RunError(f"cannot read the config {path}: {getattr(error, 'strerror', error)}") from error
    if place in _seen:
        raise RunError(f"{path}: its base leads back to itself")
    try:
        values = yaml.safe_load(content) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} is not a mapping of option names to values")
    base = values.pop("base", None)
    if base is None:
        return values
    return {**load_config(path.parent / str(base), (*_seen, place)), **values}


def _apply(parser: argparse.ArgumentParser, values: dict[str, Any], options: argparse.Namespace, name: str) -> None:
    """Parse the values of a config as if they stood on the command line, so that both are checked alike."""
    actions = {action.dest: action for action in parser._actions if action.dest not in {"help", POSITIONAL, "config"}}
    tokens: list[str] = []
    for key, value in values.items():
        action = actions.get(key)
        if action is None:
            raise RunError(f"{name}: unknown key {key!r}{suggest(str(key), list(actions))}")
        flag = action.option_strings[-1] if action.nargs != 0 else next(iter(action.option_strings))
        if value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise RunError(f"{name}: {key} is true or false, got {reprlib.repr(value)}")
            if value:
                tokens.append(flag)
            elif isinstance(action, argparse.BooleanOptionalAction):
                tokens.append(f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, dict) and action.type is keywords:
            if not all(isinstance(each, str) and each.isidentifier() for each in value):
                raise RunError(f"{name}: {key} names arguments of the model, got {reprlib.repr(value)}")
            setattr(options, key, value)
        elif isinstance(value, list) and (action.type is numbers or action.nargs):
            count = action.nargs if isinstance(action.nargs, int) else None
            setattr(options, key, _floats(value, count, f"{name}: {key}"))
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            tokens.append(f"{flag}={value}")
        else:
            raise RunError(f"{name}: {key} cannot be {reprlib.repr(value)}")
    try:
        parser.parse_args(tokens, options)
    except RunError as error:
        raise RunError(f"{name}: {error}") from None


def _floats(values: list[Any], count: int | None, name: str) -> list[float]:
    try:
        if len(values) == (count or len(values)) > 0 and all(isinstance(value, (int, float, str)) for value in values):
            return [float(str(value)) for value in values]
    except ValueError:
        pass
    raise RunError(f"{name} takes {f'{count} numbers' if count else 'numbers'}, got {reprlib.repr(values)}")


def _check_ranges(options: argparse.Namespace) -> None:
    """What no type can say, before anything starts."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise RunError(message)

    def check(names: str, holds: Callable[[Any], bool], rule: str) -> None:
        for name in names.split():
            value = getattr(options, name)
            require(value is None or holds(value), f"--{name.replace('_', '-')} {rule}, got {value}")

    for name, value in vars(options).items():
        floats = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, float)]
        require(all(map(math.isfinite, floats)), f"--{name.replace('_', '-')} must be finite, got {value}")
    check("epochs batch_size validation_batch_size grad_accum_steps log_interval", lambda x: x > 0, "must be positive")
    check("img_size crop_pct clip_grad decay_epochs recount kd_temperature", lambda x: x > 0, "must be positive")
    check("warmup_epochs cooldown_epochs patience_epochs", lambda x: x >= 0, "cannot be negative")
    check("checkpoint_interval checkpoint_minutes skip_nonfinite", lambda x: x >= 0, "cannot be negative")
    check("mixup_off_epoch workers mixup cutmix seed lr min_lr warmup_lr", lambda x: x >= 0, "cannot be negative")
    check("hflip vflip reprob mixup_prob mixup_switch_prob", lambda x: 0 <= x <= 1, "lies between 0 and 1")
    check("drop drop_path smoothing model_ema_decay", lambda x: 0 <= x < 1, "lies between 0 and 1")
    check("std", lambda x: min(x) > 0, "must be positive")
    check("scale cutmix_minmax", lambda x: 0 < x[0] <= x[1] <= 1, "is a smaller and a larger part of 1")
    check("ratio", lambda x: 0 < x[0] <= x[1], "is a smaller and a larger number")
    check(
        "mean std", lambda x: len(x) in (1, options.in_chans), f"takes one value or one a channel ({options.in_chans})"
    )
    require(options.kd_model or not options.kd_checkpoint, "--kd-checkpoint needs --kd-model")
    require(options.amp or options.amp_dtype == "auto", "--amp-dtype needs --amp")
    require(not (options.eval and options.resume), "--eval evaluates and --resume trains: give one of them")
    streamed = options.dataset.partition("/")[0].lower() in ("wds", "tfds", "hfids")
    keyed = streamed or options.dataset.lower().startswith("hfds/")
    require(keyed or not (options.input_key or options.target_key), "--input-key and --target-key are for hfds and wds")
    for name, off in (("checkpoint_interval", 0), ("mixup_off_epoch", 0), ("on_bad_image", "skip")):
        value = getattr(options, name)
        require(not streamed or value == off, f"--{name.replace('_', '-')} {value} does not work with streamed data")
    mixes = options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax is not None
    require(
        not (mixes and options.batch_size % 2), f"mixup and cutmix need an even --batch-size, got {options.batch_size}"
    )
    require(
        options.warmup_epochs < options.epochs or options.sched == "none",
        f"--warmup-epochs {options.warmup_epochs} leaves nothing of --epochs {options.epochs}",
    )
