"""Labels that are probably wrong: which are found, and in what order."""

import torch

from convmlp.classification.suspicious import find_suspicious


def test_an_image_that_is_surely_of_another_class_is_found_the_worst_first():
    probabilities = torch.tensor(
        [[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.9, 0], [0.2, 0.8, 0], [0.3, 0.7, 0], [0.4, 0.6, 0], [0.05, 0.95, 0]]
    )
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 0])
    [found] = find_suspicious(probabilities, labels)
    assert (found.index, found.label, found.suggested) == (6, 0, 1)
    assert (round(found.label_probability, 2), round(found.suggested_probability, 2)) == (0.05, 0.95)
    worse = torch.cat([probabilities, torch.tensor([[0.01, 0.99, 0]])])
    assert [each.index for each in find_suspicious(worse, torch.cat([labels, torch.tensor([0])]))] == [7, 6]


def test_a_class_that_is_always_unsure_needs_less():
    """Half sure of class 1 is as sure as one gets; half sure of class 0 is not."""
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.5, 0.5], [0.45, 0.55], [0.49, 0.51]])
    labels = torch.tensor([0, 0, 1, 1, 0])
    assert [each.index for each in find_suspicious(probabilities, labels)] == []
    probabilities[4] = torch.tensor([0.4, 0.6])
    assert [each.index for each in find_suspicious(probabilities, labels)] == [4]


def test_a_class_without_images_is_never_suggested():
    assert find_suspicious(torch.tensor([[0.1, 0.9], [0.2, 0.8]]), torch.tensor([0, 0])) == []
