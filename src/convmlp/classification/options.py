"""From the words of a command line and a YAML config to options.

A config is a mapping of option names (with underscores) to values; its key `base` names another config whose values it
starts from.
"""

import argparse
import os
import re
import reprlib
from dataclasses import Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from ..common.command import Parser
from ..common.configs import find_config
from ..common.errors import RunError, one_line, suggest
from .groups import flag_of, keywords, numbers, require
from .settings import GROUPS, Model, Options

SCRIPT = os.environ.get("CONVMLP_COMMAND", "classification.py")  # what messages call this program
POSITIONAL = "data"


def build_parser() -> Parser:
    """The options with their defaults and help texts; `--help` of it is the manual."""
    parser = Parser(
        prog=SCRIPT,
        usage="%(prog)s [-c CONFIG] [options] DATA",
        description="Train or evaluate an image classifier. A config gives defaults, the command line overrides.",
        surplus="there is one DATA folder, got another: {}",
    )
    parser.add_argument(
        POSITIONAL,
        nargs="?",
        metavar="DATA",
        help="folder of train/CLASS/* and val/CLASS/*, or of CLASS/*, or a table: path, label",
    )
    for group in GROUPS:
        section = parser.add_argument_group(str(group.__doc__))
        for each in fields(group):
            _add_option(section, each)
    parser.set_defaults(amp=None)  # which depends on --eval
    return parser


def _add_option(section: Any, each: Field[Any]) -> None:
    default = each.default_factory() if callable(each.default_factory) else each.default
    argument, help = dict(each.metadata["argument"]), each.metadata["help"]
    kinds = [kind for kind in get_args(each.type) if kind is not NoneType] or [each.type]
    kind = kinds[0]
    if get_origin(each.type) is Literal or get_origin(kind) is Literal:
        argument["choices"] = list(get_args(kind) or kinds)
        kind = type(argument["choices"][0])
    if kind is bool:
        argument["action"] = argparse.BooleanOptionalAction
    elif "nargs" in argument:
        argument["type"] = float
    elif kind in (int, float):
        argument.setdefault("type", kind)
    if default not in (None, False, "", {}):
        help = f"{help} (default: {default})" if help else f"default: {default}"
    short = [flag for flag in each.metadata["flags"] if flag[1] != "-"]
    long = [flag for flag in each.metadata["flags"] if flag not in short]
    section.add_argument(*short, flag_of(each.name), *long, default=default, help=help, **argument)


LISTS = {numbers: r"-?[\d.]+(e-?\d+)?", keywords: r"\w+="}  # how an item of theirs begins


def join_lists(argv: list[str]) -> list[str]:
    """`--mean 0.5 0.4 0.3 DATA` to `--mean 0.5,0.4,0.3 DATA`: argparse would take DATA for a number as well."""
    kinds = {flag_of(each.name): each.metadata["argument"].get("type") for each in fields(Options)}
    joined = ["", ""]
    for token in argv:
        kind = kinds.get(joined[-2])
        if kind is numbers and re.fullmatch(LISTS[kind], token) or kind is keywords and re.match(LISTS[kind], token):
            joined[-1] += f",{token}"
        else:
            joined.append(token)
    return joined[2:]


def parse_options(argv: list[str], base: dict[str, Any] | None = None) -> Options:
    """Options from the command line, over the config it names, over `base`, over the defaults.

    Raises:
        RunError: an unknown name (the nearest is offered), a bad value, or an unreadable config.
    """
    parser = build_parser()
    argv = join_lists(argv)
    config = parser.parse_known_args(argv)[0].config
    values = parser.parse_args([])
    if base:
        _apply(parser, base, values, "the checkpoint's settings")
    if config:
        path = find_config(config, "classification")
        _apply(parser, _overlay(base or {}, load_config(path)), values, str(path))
    lower = {**vars(values)}
    values.model_kwargs = {}
    settings = _overlay(lower, vars(parser.parse(argv, values)))
    settings["data_dir"] = settings.pop(POSITIONAL) or settings["data_dir"]
    if settings["amp"] is None:
        settings["amp"] = not settings["eval"]
    return Options(**settings)


def load_config(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML config over those of the config that its `base` names.

    A base is found beside the config, else among the configs of the package.
    """
    try:
        place = path.resolve()
        content = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # no file, a name with a zero in it, links in a circle
        raise RunError(f"cannot read the config {path}: {getattr(error, 'strerror', error)}") from error
    require(place not in _seen, f"{path}: its base leads back to itself")
    try:
        values = yaml.safe_load(content) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid YAML: {one_line(error)}") from error
    require(isinstance(values, dict), f"{path} is not a mapping of option names to values")
    base = values.pop("base", None)
    if base is None:
        return values
    beside = path.parent / str(base)
    try:
        found = beside if os.path.isfile(beside) else find_config(str(base), "classification")
    except RunError as error:
        raise RunError(f"{path}: base: {error}") from error
    return _overlay(load_config(found, (*_seen, place)), values)


def _overlay(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Values over other values. Arguments of the model add up, unless one model is a ConvMLP and the other is not."""
    values = lower | upper
    below, above = lower.get("model_kwargs"), upper.get("model_kwargs", {})
    if isinstance(below, dict) and isinstance(above, dict):
        from ..zoo import variant_of  # which takes PyTorch, and --help should not

        is_ours = [variant_of(str(each.get("model") or Model.model)) is not None for each in (lower, values)]
        values["model_kwargs"] = below | above if is_ours[0] == is_ours[1] else above
    return values


def _apply(parser: Parser, values: dict[str, Any], options: argparse.Namespace, name: str) -> None:
    """Parse the values of a config as if they stood on the command line, so that both are checked alike."""
    actions = {action.dest: action for action in parser._actions if action.dest not in {"help", POSITIONAL, "config"}}
    tokens: list[str] = []
    for key, value in values.items():
        action = actions.get(key)
        if action is None:
            raise RunError(f"{name}: unknown key {key!r}{suggest(str(key), list(actions))}")
        flag = flag_of(key)
        if value is None:
            continue
        if action.nargs == 0:
            require(isinstance(value, bool), f"{name}: {key} must be true or false, got {reprlib.repr(value)}")
            tokens.append(flag if value else flag_of(f"no_{key}"))
        elif isinstance(value, dict) and action.type is keywords:
            named = all(isinstance(each, str) and each.isidentifier() for each in value)
            require(named, f"{name}: {key} must name arguments, got {reprlib.repr(value)}")
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
