"""Figures of a run: what is written where."""

import numpy as np
import pytest

from convmlp.classification import charts
from convmlp.classification.charts import Prediction, per_class_table, write_curves, write_per_class, write_predictions


@pytest.fixture
def figures(monkeypatch):
    """The figures instead of files."""
    shown = []
    monkeypatch.setattr(charts, "save_figure", lambda figure, path: shown.append(figure))
    return shown


@pytest.mark.parametrize("top1", [[90.0], [90.0, 50.0, 40.0], [10.0, 50.0, 90.0], [10.0, 90.0, 50.0]])
def test_the_best_epoch_is_named_within_the_figure_wherever_it_is(figures, tmp_path, top1):
    rows = [
        {"epoch": i, "train_loss": 1.0, "eval_loss": 1.0, "eval_top1": x, "eval_top5": 100.0, "lr": 0.1}
        for i, x in enumerate(top1)
    ]
    write_curves(tmp_path / "curves.png", rows)
    [figure] = figures
    figure.draw_without_rendering()
    assert figure.axes[1].get_title() == f"accuracy, % (best top-1: 90.00, epoch {top1.index(90.0)})"
    for axis in figure.axes:
        assert not axis.texts  # nor anything else that could leave it
        box, whole = axis.title.get_window_extent(), figure.bbox
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1


def test_predictions_have_a_title_and_mistakes_are_red(figures, tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    shown = [Prediction(image, 0, 0, 1, 0.9), Prediction(image, 1, 1, 1, 0.8)]
    write_predictions(tmp_path / "predictions.png", shown, np.array([[0, 1], [0, 9]]), ["cat", "dog"])
    [figure] = figures
    assert figure.get_suptitle().startswith("9 of 10 right; the surest mistakes come first")
    titles = [(axis.get_title(), axis.title.get_color()) for axis in figure.axes[:3]]
    assert titles == [("dog (90 %)\nnot cat", "crimson"), ("dog (80 %)", "black"), ("", titles[2][1])]


def test_classes_are_counted_and_the_worst_come_first(tmp_path):
    confusion = np.array([[4, 0, 0], [1, 3, 0], [0, 0, 0]])
    write_per_class(tmp_path / "per_class.csv", confusion, ["a", "b", "c"])
    assert (tmp_path / "per_class.csv").read_text().split() == [
        "class,images,right,accuracy,precision,f1",
        "a,4,4,100.00,80.00,88.89",
        "b,4,3,75.00,100.00,85.71",
        "c,0,0,,,",
    ]
    assert per_class_table(confusion, ["a", "b", "c"]).splitlines() == ["b   75.00 %  of 4", "a  100.00 %  of 4"]
    many = per_class_table(np.eye(30, dtype=int), [f"class {i}" for i in range(30)])
    assert many.splitlines()[-1] == "... and 10 classes above; all are in per_class.csv"
