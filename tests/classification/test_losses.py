"""Losses of classifiers, and the weights of their classes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target

from convmlp.classification.losses import build_loss, class_weights
from convmlp.classification.options import parse_options
from convmlp.common.errors import RunError

NAMES = ["cat", "dog", "newt"]
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 0, 1, 2, 1, 0])


def write(path, text):
    path.write_text(text)
    return parse_options(["--class-weights", str(path)])


def test_weights_by_inverse_frequency_are_one_in_the_mean_over_the_images():
    counts = np.array([30, 10, 60])
    weights = class_weights(parse_options(["--class-weights", "auto"]), NAMES, counts)
    assert np.dot(weights, counts) == pytest.approx(100)
    assert np.multiply(weights, counts) == pytest.approx([100 / 3] * 3)
    assert class_weights(parse_options([]), NAMES, counts) is None


def test_a_class_without_images_does_not_change_the_weights_of_the_others():
    weights = class_weights(parse_options(["--class-weights", "auto"]), NAMES, np.array([30, 0, 10]))
    assert np.isfinite(weights).all() and weights[2] == pytest.approx(3 * weights[0])
    assert 30 * weights[0] + 10 * weights[2] == pytest.approx(40)


def test_weights_of_a_file_are_taken_by_name(tmp_path):
    options = write(tmp_path / "w.csv", 'class,weight\nnewt, 4\n\n"dog",0.5\ncat,1e0\n')
    assert class_weights(options, NAMES, None) == [1, 0.5, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat,1\ndog,2\n", "lacks the weight of newt"),
        ("cat,1\ndgo,2\nnewt,3\n", "line 2: the data has no class 'dgo'; did you mean dog?"),
        ("cat,1\ncat,2\n", "line 2: the class 'cat' has a weight already"),
        ("cat,0\n", "line 1: a weight must be a positive number, got '0'"),
        ("cat,inf\n", "a weight must be a positive number, got 'inf'"),
        ("cat,much\n", "a weight must be a positive number, got 'much'"),
        ("cat 1\n", "line 1: expected class,weight, got 'cat 1'"),
    ],
)
def test_mistakes_in_a_file_of_weights_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(RunError) as error:
        class_weights(write(tmp_path / "w.csv", text), NAMES, None)
    assert message in str(error.value) and "w.csv" in str(error.value)


def test_a_missing_file_of_weights_is_named():
    with pytest.raises(RunError, match=r"cannot read --class-weights nowhere.csv: No such file"):
        class_weights(parse_options(["--class-weights", "nowhere.csv"]), NAMES, None)


LOSSES = [[], ["--smoothing", "0"], ["--bce-loss"], ["--bce-loss", "--bce-sum", "--bce-target-thresh", "0.2"]]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("arguments", LOSSES, ids=" ".join)
def test_equal_weights_change_nothing(arguments, mixed):
    options = parse_options([*arguments, *(["--mixup", "1"] if mixed else [])])
    targets = mixup_target(TARGETS, 3, 0.3, options.smoothing) if mixed else TARGETS
    torch.testing.assert_close(
        build_loss(options, [1.0] * 3)(LOGITS, targets), build_loss(options, None)(LOGITS, targets)
    )


def test_binary_cross_entropy_has_a_threshold_and_a_sum():
    hot = F.one_hot(TARGETS, 3).float()
    sharp = build_loss(parse_options(["--bce-loss", "--bce-target-thresh", "0.2"]), None)(LOGITS, TARGETS)
    torch.testing.assert_close(sharp, F.binary_cross_entropy_with_logits(LOGITS, hot))
    total = build_loss(parse_options(["--bce-loss", "--bce-sum", "--smoothing", "0"]), None)(LOGITS, TARGETS)
    torch.testing.assert_close(total, 3 * F.binary_cross_entropy_with_logits(LOGITS, hot))


def test_an_image_weighs_what_its_class_does():
    loss = build_loss(parse_options([]), [1.0, 5.0, 0.5])(LOGITS, TARGETS)
    each = F.cross_entropy(LOGITS, TARGETS, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, (each * torch.tensor([1, 1, 5, 0.5, 5, 1])).mean())


def test_a_mixed_image_weighs_in_proportion_to_its_classes():
    options = parse_options(["--mixup", "1"])
    targets = mixup_target(TARGETS, 3, 0.3, options.smoothing)  # with the batch in the other order
    weights = torch.tensor([1, 5, 0.5])
    own, other = weights[TARGETS], weights[TARGETS.flip(0)]
    each = F.cross_entropy(LOGITS, targets, reduction="none")
    loss = build_loss(options, weights.tolist())(LOGITS, targets)
    torch.testing.assert_close(loss, (each * (0.3 * own + 0.7 * other)).mean())


def test_smoothing_does_not_make_a_heavy_class_the_answer_to_the_images_of_others():
    logits = torch.zeros(1, 3, requires_grad=True)
    build_loss(parse_options([]), [0.01, 1.0, 100.0])(logits, torch.tensor([0])).backward()
    assert logits.grad.argmin() == 0  # descent raises the logit of the right class
