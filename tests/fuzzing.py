"""What the fuzz tests share: how many cases they try, how a case may end, how files get damaged.

By default every test tries a few cases, always the same. With CONVMLP_FUZZ=long it tries many, other ones each time.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from convmlp.common.errors import RunError

LONG = os.environ.get("CONVMLP_FUZZ") == "long"
SECONDS = 60  # for one case

settings.register_profile(
    "fuzz",
    derandomize=not LONG,
    deadline=None,
    database=None,
    print_blob=LONG,
    suppress_health_check=list(HealthCheck),
)

cases: Counter[str] = Counter()


def tries(short: int, long: int) -> settings:
    """How many cases a test tries, by default and in the long run."""
    return settings(settings.get_profile("fuzz"), max_examples=long if LONG else short)


class Stuck(BaseException):
    """A case that takes too long; no `except Exception` swallows it."""


def attempt(name: str, call: Callable[[], Any], errors: tuple[type[Exception], ...] = (RunError,)) -> Any:
    """What a call gives, or the error it ends in, if that is one of `errors`; counts the case under `name`."""

    def stop(*_: Any) -> None:
        raise Stuck(f"{name}: still running after {SECONDS} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        result = call()
    except errors as error:
        assert str(error).strip(), f"{type(error).__name__} without a word"
        cases[f"{name}: refused"] += 1
        return error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    cases[f"{name}: done"] += 1
    return result


def print_cases(request: Any) -> None:
    """Say how many cases were tried, past pytest's capture."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for name, count in sorted(cases.items()):
            print(f"\n{name:40} {count:6}", end="")
    cases.clear()


places = st.floats(0, 1)
cuts = st.tuples(st.just("cut"), places, st.just(b""))
flips = st.tuples(st.just("flip"), places, st.binary(min_size=1, max_size=4))
inserts = st.tuples(st.just("insert"), places, st.binary(min_size=1, max_size=40))
damages = st.lists(st.one_of(flips, flips, inserts, cuts), min_size=1, max_size=4)


def damage(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Cut off the end, change bytes, put some in; places are parts of the length."""
    for kind, place, new in changes:
        at = int(place * len(content))
        if kind == "cut":
            content = content[:at]
        else:
            content = content[:at] + new + content[at + (len(new) if kind == "flip" else 0) :]
    return content


odd_numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([10**9, -(10**9), 2**63, 10**30, float("nan"), float("inf"), -float("inf"), 1e-300, 1e300, 0.5]),
)
odd_values = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_numbers, st.floats(), st.text(max_size=8), st.sampled_from(["", "auto"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
