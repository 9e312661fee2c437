"""History of a run: when it goes on without progress, and when nothing is learned."""

import math

import pytest

from convmlp.classification.history import History
from convmlp.classification.options import parse_options


def history_of(metric, figures):
    history = History(metric, averaged=False)
    for epoch, figure in enumerate(figures):
        history.add({"epoch": epoch, "eval_loss": 1.0} | {f"eval_{metric}": figure})
    return history


@pytest.mark.parametrize(
    ("metric", "figures", "epochs"),
    [
        ("top1", [], 0),
        ("top1", [50], 0),
        ("top1", [50, 60, 60, 55], 2),
        ("top1", [50, math.nan, 40], 2),
        ("top1", [math.nan, math.nan, 10], 0),
        ("loss", [3, 2, 2.5], 1),
        ("loss", [3, 2, math.nan, 1], 0),
        ("macro_f1", [70, 60, 80, 80, 80], 2),
    ],
)
def test_epochs_without_a_better_figure_are_counted(metric, figures, epochs):
    assert history_of(metric, figures).epochs_since_better() == epochs


def collapses(predicted, top1, *arguments):
    """What is said after each epoch."""
    history, said = History("top1", averaged=False), []
    for count, share in zip(predicted, top1, strict=True):
        history.add({"eval_loss": 1.0, "eval_top1": share, "eval_predicted_classes": count})
        said.append(history.collapse(parse_options(["--lr", "0.5", "--warmup-epochs", "3", *arguments])))
    return said


def test_predictions_of_one_class_are_said_once_in_a_row():
    said = collapses([1, 1, 2, 1], [50, 50, 60, 50])
    assert [bool(line) for line in said] == [True, False, False, True]
    assert "a lower --lr (now 0.5), a longer --warmup-epochs (now 3), --pretrained weights" in said[0]
    assert "--pretrained" not in collapses([1], [50], "--pretrained")[0]


def test_one_class_in_the_data_is_no_collapse():
    assert collapses([1], [100]) == [""]
