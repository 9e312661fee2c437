"""How errors are worded."""

import pytest

from convmlp.common.errors import one_line, plural, some, suggest


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("convnlp_s", ["convmlp_s", "convmlp_l"], "; did you mean convmlp_s?"),
        ("CIFAR11", ["CIFAR10", "MNIST"], "; did you mean CIFAR10?"),
        ("cifar10", ["CIFAR10"], "; did you mean CIFAR10?"),
        ("--ephocs", ["--epochs", "--resume"], "; did you mean --epochs?"),
        ("--freeze", ["--resume", "--epochs"], ""),
        ("x", [], ""),
    ],
)
def test_a_name_that_looks_alike_is_offered_and_no_other(name, known, hint):
    assert suggest(name, known) == hint


def test_an_error_becomes_one_short_line():
    assert one_line(ValueError(" a\n  b ")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line("x" * 400) == "x" * 300


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "epoch", "1 epoch"), (2, "epoch", "2 epochs"), (1, "class", "1 class"), (0, "class", "0 classes")],
)
def test_counts_agree_with_their_nouns(count, noun, text):
    assert plural(count, noun) == text


def test_of_many_names_the_first_are_shown():
    assert some("ab") == "a, b"
    assert some(range(10)) == "0, 1, 2 and 7 more"
