"""The shell around every command: one parser class, and one ladder from exceptions to exit codes."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import Diverged, RunError, Stopped, one_line, suggest
from .packages import package_of, pip_line

DONE, FAILED, MISTAKE, BUG, STOPPED, INTERRUPTED = 0, 1, 2, 3, 75, 130  # 75: EX_TEMPFAIL of sysexits.h, try again


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises `RunError`, accepts no abbreviations, and suggests the nearest option.

    `surplus` is the message for an unexpected argument, with {} for the argument.
    """

    def __init__(self, *, surplus: str = "unexpected argument {}", **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.surplus = surplus

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}; {self.prog} --help")

    def parse(self, argv: Sequence[str], options: argparse.Namespace | None = None) -> argparse.Namespace:
        """The options of a call, written into `options` if given; raises `RunError` if any is unknown or bad."""
        parsed, unknown = self.parse_known_args(argv, options)
        if not unknown:
            return parsed
        parser: Parser = getattr(parsed, "parser", self)  # of the verb, where there are verbs
        if not unknown[0].startswith("-"):
            raise RunError(parser.surplus.format(unknown[0]))
        name = unknown[0].partition("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        raise RunError(f"unknown option {name}{suggest(name, known) or f'; {parser.prog} --help'}")


@dataclass(frozen=True)
class Verb:
    """What `convmlp NAME` does. `run` returns an exit code, None for 0; its heavy imports wait until it is called."""

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    surplus: str = "unexpected argument {}"


def positive_int(text: str) -> int:
    """An argparse type: 1, 2, 3, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: height and width, of 224 or 800x1344."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be a side or HEIGHTxWIDTH in pixels, got {text}")
    return int(sides[0]), int(sides[-1])


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return number


def points(text: str) -> float:
    """An argparse type: a number from 0 to 100."""
    number = _number(text)
    if not 0 <= number <= 100:
        raise argparse.ArgumentTypeError(f"must be between 0 and 100, got {text}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def run(name: str, work: Callable[[], int | None], *, way_on: str = "", debug: bool = False) -> int:
    """Do the work of a command; an error is printed as one line on standard error.

    Args:
        name: The command's name, which starts each message.
        work: Returns an exit code, None for 0.
        way_on: How to continue an interrupted run; if given, unknown exceptions keep their traceback.
        debug: Raise errors instead, so that their traceback is shown.

    Returns:
        0 done; 1 a run that diverged or lost a process; 2 an error the user can fix; 3 a bug; 75 (EX_TEMPFAIL) a run
        that was asked to stop by a signal and can be resumed; 130 interrupted.
    """
    try:
        return work() or DONE
    except Stopped as error:
        if _rank() == 0:
            _say(name, str(error))
        return STOPPED
    except KeyboardInterrupt:
        _say(name, f"interrupted{way_on}")
        return INTERRUPTED
    except BrokenPipeError:  # such as `convmlp predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        code, message = _explain(error, way_on)
        if debug or (code == BUG and way_on):
            raise
        _say(name, message)
        return code
    finally:
        _leave_processes()


def _explain(error: Exception, way_on: str) -> tuple[int, str]:
    """The exit code and the message for an exception."""
    if isinstance(error, Diverged):
        return FAILED, str(error)
    if isinstance(error, RunError):
        return MISTAKE, f"error: {error}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("convmlp"):
        module = error.name.partition(".")[0]
        hint = f"{pip_line(package_of(module))} (convmlp doctor lists everything missing)"
        return MISTAKE, f"error: {module} is missing: {hint}"
    if isinstance(error, OSError):  # such as a full disk
        return MISTAKE, f"error: {error}"
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from .signals import lost_process

        if lost := lost_process(error):
            return FAILED, f"{lost}{way_on}"
    return BUG, f"bug: {type(error).__name__}: {one_line(error)} (--debug shows where)"


def _say(name: str, message: str) -> None:
    """Print a message. Other ranks wait first: the exit of rank 0 usually ends them before they repeat it."""
    if rank := _rank():
        time.sleep(5)
        message = f"process {rank}: {message}"
    print(f"{name}: {message}", file=sys.stderr)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _leave_processes() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
