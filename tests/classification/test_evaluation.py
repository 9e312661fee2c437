"""Evaluation: what is counted, and which images are kept to be shown."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from convmlp.classification.evaluation import Evaluator
from convmlp.classification.predictions import N_SHOWN, Predictions
from convmlp.classification.process import Process


def predictions_of(answers, num_classes, batch_size=16):
    """The predictions of images whose pixels are their numbers, from (target, predicted, how sure)."""
    predictions = Predictions(num_classes)
    for start in range(0, len(answers), batch_size):
        batch = answers[start : start + batch_size]
        logits = torch.zeros(len(batch), num_classes)
        for row, (_, predicted, sure) in zip(logits, batch, strict=True):
            row[predicted] = sure
        images = torch.arange(start, start + len(batch)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        predictions.update(images, logits, torch.tensor([target for target, _, _ in batch]))
    predictions.gather(Process(torch.device("cpu")), range(len(answers)))
    return predictions


def numbers(kept):
    return [int(each.image[0, 0, 0]) for each in kept]


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true:UserWarning")
@pytest.mark.parametrize("targets", [(0, 0, 1, 1, 2, 2, 2), (0, 0, 0, 0, 0, 0, 1), (3, 3, 3, 3, 3, 3, 3)])
def test_figures_of_classes_are_scikit_learns(targets):
    targets, predicted = torch.tensor(targets), torch.tensor((0, 1, 1, 1, 2, 0, 1))
    logits = torch.nn.functional.one_hot(predicted, 5).float()
    evaluator = Evaluator(5, torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 7)):
        evaluator.update(logits[part], targets[part])
    figures = evaluator.compute()
    assert figures["top1"] == pytest.approx(100 * (targets == predicted).float().mean().item())
    assert figures["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(targets, predicted))
    assert figures["macro_f1"] == pytest.approx(100 * f1_score(targets, predicted, average="macro"))
    assert figures["predicted_classes"] == 3


def test_every_prediction_is_counted_once():
    predictions = predictions_of([(0, 0, 1.0)] * 30 + [(1, 0, 1.0)] * 9 + [(1, 1, 1.0)], 2)
    assert np.array_equal(predictions.confusion, [[30, 0], [9, 1]])


def test_mistakes_of_every_class_are_shown_the_surest_first():
    """In the order of the files the first hundred mistakes are all of class 0."""
    answers = [(0, 1, 1 + i / 100) for i in range(100)] + [(c, 0, 2.0) for c in range(1, 8)] + [(8, 8, 1.0)] * 100
    shown = predictions_of(answers, 9).mistakes
    assert len(shown) == N_SHOWN and {each.target for each in shown} == set(range(8))
    probabilities = [each.probability for each in shown]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sorted(numbers(each for each in shown if each.target == 0)) == list(range(87, 100))  # the surest of them


def test_mistakes_of_one_class_alone_are_all_shown():
    shown = predictions_of([(0, 1, 1.0)] * 5 + [(1, 1, 1.0)] * 5, 2).mistakes
    assert numbers(shown) == [0, 1, 2, 3, 4]


def test_the_least_sure_right_answers_are_shown():
    answers = [(0, 0, 1 + (37 * i % 400) / 100) for i in range(400)]
    hits = predictions_of(answers, 2).hits
    expected = sorted(range(400), key=lambda i: answers[i][2])[:N_SHOWN]
    assert numbers(hits) == expected


def test_predictions_of_several_processes_are_brought_together(monkeypatch):
    """The shares of two processes, each with every second image."""
    answers = [(i % 3, (i + (i % 5 == 0)) % 3, 1 + i / 10) for i in range(60)]
    halves = [predictions_of(answers[start::2], 3) for start in (0, 1)]
    shares = [(h.logits, h.targets, [*range(start, 60, 2)], [*h.mistakes, *h.hits]) for start, h in enumerate(halves)]
    monkeypatch.setattr(Process, "gather", lambda self, value: shares)
    both = predictions_of([], 3)
    monkeypatch.undo()
    alone = predictions_of(answers, 3)
    order = np.argsort(both.indices)
    assert torch.equal(both.logits[order], alone.logits) and torch.equal(both.targets[order], alone.targets)
    assert np.array_equal(both.confusion, alone.confusion)
    for name in ("mistakes", "hits"):
        kept, expected = ([each[2:] for each in getattr(found, name)] for found in (both, alone))
        assert kept == expected


def test_kept_images_do_not_hold_their_batches():
    kept = predictions_of([(0, 1, 1.0)] * 4, 2, batch_size=4).mistakes
    assert all(each.image.untyped_storage().nbytes() == each.image.nbytes for each in kept)
