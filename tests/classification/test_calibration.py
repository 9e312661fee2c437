"""Calibration: the temperature, and the error with it."""

import numpy as np
import pytest
import torch

from convmlp.classification.calibration import calibrate, fit_temperature, reliability


def drawn(temperature, n=4000):
    """Logits that are too sure by this factor, and targets drawn by what they should say."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, 4, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits * temperature, targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_there_is_found(temperature):
    assert fit_temperature(*drawn(temperature)) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_has_a_lower_loss():
    logits, targets = drawn(2.0)
    best = fit_temperature(logits, targets)
    losses = [torch.nn.functional.cross_entropy(logits / (best * f), targets).item() for f in (0.97, 1.0, 1.03)]
    assert losses[1] == min(losses)


def test_images_that_are_all_right_do_not_make_the_model_perfectly_sure():
    logits = torch.eye(3).repeat(10, 1)
    assert 0.1 < fit_temperature(logits, logits.argmax(1)) < 1


def test_the_error_falls_on_images_that_the_temperature_was_not_fitted_to():
    logits, targets = drawn(3.0)
    found = calibrate(logits, targets)
    assert found.error > 0.1 > 0.03 > found.error_after
    assert sum(each.images for each in found.bins) == len(targets)
    gaps = [each.images * abs(each.confidence - each.accuracy) for each in found.bins]
    assert found.error == pytest.approx(sum(gaps) / len(targets))


def test_a_bin_has_the_images_of_its_range():
    logits = torch.tensor([[0.9, 0.1], [0.91, 0.09], [0.55, 0.45]]).log()
    bins = reliability(logits, torch.tensor([0, 1, 0]))
    assert [each.images for each in bins] == [1, 2]
    assert np.allclose([each.confidence for each in bins], [0.55, 0.905])
    assert [each.accuracy for each in bins] == [1.0, 0.5]


def test_one_image_is_enough():
    assert calibrate(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).bins
