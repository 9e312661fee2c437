"""Preprocessing within a graph: the images that Pillow and timm make, in every way of cropping."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from torch import nn

from convmlp.common.errors import RunError
from convmlp.use.preprocessing import Preprocessed

PHOTOS = [Image.fromarray(photo) for photo in (*load_sample_images().images, data.astronaut(), data.coffee())]
SIZES = [(640, 427), (301, 199), (28, 28), (37, 333), (64, 64), (1023, 700)]  # width, height


class Seen(nn.Module):
    """Keeps what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return x.mean((2, 3))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")))[None]


@pytest.fixture
def configured(make_classifier):
    def make(**config):
        classifier = make_classifier()
        statistics = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
        return replace(classifier, data_config={**classifier.data_config, **statistics, **config})

    return make


@pytest.mark.parametrize(
    "config",
    [
        dict(interpolation="bicubic", crop_mode="center", crop_pct=0.9, input_size=(3, 224, 224)),
        dict(interpolation="bilinear", crop_mode="center", crop_pct=1.0, input_size=(3, 32, 32)),
        dict(interpolation="bilinear", crop_mode="center", crop_pct=1.1, input_size=(3, 64, 64)),
        dict(interpolation="bicubic", crop_mode="center", crop_pct=0.9, input_size=(3, 64, 96)),
        dict(interpolation="bicubic", crop_mode="squash", crop_pct=0.9, input_size=(3, 96, 96)),
        dict(interpolation="bilinear", crop_mode="border", crop_pct=0.8, input_size=(3, 64, 64)),
    ],
)
def test_images_are_those_of_pillow(config, configured):
    classifier = configured(**config)
    graph = Preprocessed(classifier, Seen())
    for photo, size in zip(PHOTOS * 2, SIZES, strict=False):
        image = photo.resize(size)
        graph(pixels(image))
        expected = classifier.preprocess([image])
        steps = (graph.network.x - expected) * graph.std * 255  # of the 256 that a pixel has
        assert graph.network.x.shape == expected.shape
        assert steps.abs().max() < 1.01
        assert steps.abs().mean() < 0.1  # where a half goes up or down by the rounding of Pillow's weights


def test_colours_become_grey_as_pillow_makes_them(configured):
    classifier = configured(input_size=(1, 64, 64), mean=(0.4,), std=(0.3,), interpolation="bicubic", crop_pct=1.0)
    graph = Preprocessed(classifier, Seen())
    graph(pixels(PHOTOS[0]))
    steps = (graph.network.x - classifier.preprocess([PHOTOS[0]])) * 0.3 * 255
    assert steps.abs().max() < 1.01 and (steps.abs() > 0.5).float().mean() < 0.03


def test_probabilities_have_the_temperature_or_are_those_of_labels(configured):
    classifier = configured(input_size=(3, 32, 32))
    logits = Preprocessed(classifier, seen := Seen())(pixels(PHOTOS[0])) * 0 + seen.x.mean((2, 3))
    calm = Preprocessed(replace(classifier, temperature=2.0), Seen())(pixels(PHOTOS[0]))
    torch.testing.assert_close(calm, (logits / 2).softmax(1))
    several = Preprocessed(replace(classifier, thresholds=[0.5] * 3), Seen())(pixels(PHOTOS[0]))
    torch.testing.assert_close(several, logits.sigmoid())


def test_other_interpolations_are_refused(configured):
    with pytest.raises(RunError, match="resizes bilinear or bicubic, not lanczos"):
        Preprocessed(configured(interpolation="lanczos"), Seen())
