"""Groups of options: their ranges, and what cannot go together."""

from dataclasses import FrozenInstanceError, fields

import pytest

from convmlp.classification.options import parse_options
from convmlp.classification.settings import GROUPS, Augmentation, Data, Images, Options, Schedule
from convmlp.common.errors import RunError


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--reprob", "2"], "--reprob must be between 0 and 1, got 2.0"),
        (["--mean", "0.1", "0.2"], "--mean takes one value or one a channel (3), got [0.1, 0.2]"),
        (["--std", "0"], "--std must be positive, got [0.0]"),
        (["--mixup", "0.8", "--batch-size", "7"], "even --batch-size, got 7"),
        (["--seed", "-1"], "--seed must not be negative, got -1"),
        (["--smoothing", "1"], "--smoothing must be at least 0 and below 1, got 1.0"),
        (["--scale", "1", ".5"], "--scale must be a smaller and a larger part of 1, got [1.0, 0.5]"),
        (["--ratio", "2", "1"], "--ratio must be a smaller and a larger number, got [2.0, 1.0]"),
        (["--crop-pct", "0"], "--crop-pct must be positive, got 0.0"),
        (["--lr", "nan"], "--lr must be finite, got nan"),
        (["--kd-checkpoint", "x.pth"], "--kd-checkpoint needs --kd-model"),
        (["--no-amp", "--amp-dtype", "float16"], "--amp-dtype needs --amp"),
        (["--eval", "x.pth", "--resume", "auto"], "give one of them"),
        (["--input-key", "png"], "--input-key and --target-key are for hfds and wds"),
        (["--dataset", "wds/", "--checkpoint-interval", "5"], "--checkpoint-interval 5 does not work with streamed"),
        (["--dataset", "wds/", "--mixup-off-epoch", "5"], "--mixup-off-epoch 5 does not work with streamed data"),
        (["--dataset", "wds/", "--on-bad-image", "stop"], "--on-bad-image stop does not work with streamed data"),
        (["--dataset", "wds/", "--aug-repeats", "3"], "--aug-repeats 3 does not work with streamed data"),
        (["--bce-sum"], "--bce-target-thresh and --bce-sum need --bce-loss"),
        (["--bce-target-thresh", "0.2"], "--bce-target-thresh and --bce-sum need --bce-loss"),
        (["--dataset", "wds/", "--balanced-sampling"], "--balanced-sampling does not work with streamed data"),
    ],
)
def test_bad_values_are_named_with_the_rule(arguments, message):
    with pytest.raises(RunError) as error:
        parse_options(arguments)
    assert message in str(error.value)


def test_a_group_is_checked_when_it_is_made_alone():
    with pytest.raises(RunError, match="--epochs must be positive, got 0"):
        Schedule(epochs=0)
    with pytest.raises(RunError, match=r"--std must be positive, got \[0.5, 0.0, 0.5\]"):
        Images(std=[0.5, 0.0, 0.5])


@pytest.mark.parametrize(
    ("epochs", "warmup", "shortened"), [(1, 5, 0), (2, 2, 1), (5, 4, 4), (5, 5, 1), (50, 60, 10), (1, 0, 0)]
)
def test_a_warm_up_that_is_not_shorter_than_the_schedule_is_a_fifth_of_it(epochs, warmup, shortened):
    assert Schedule(epochs=epochs, warmup_epochs=warmup).shortened_warmup == shortened


def test_options_never_change():
    options = parse_options([])
    with pytest.raises(FrozenInstanceError):
        options.lr = 1  # type: ignore[misc]
    assert Augmentation().scale is not Augmentation().scale  # nor through what they share


def test_options_are_all_groups_in_one():
    assert all(isinstance(parse_options([]), group) for group in GROUPS)
    assert sum(len(fields(group)) for group in GROUPS) == len(fields(Options))


@pytest.mark.parametrize(("dataset", "streamed"), [("wds/", True), ("hfids/x", True), ("hfds/x", False), ("", False)])
def test_streams_are_told_from_indexed_data(dataset, streamed):
    assert Data(dataset=dataset).streamed is streamed
