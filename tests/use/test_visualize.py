"""Figures of what models see: feature maps, Grad-CAM and first filters, and their titles."""

import numpy as np
import pytest
import torch
from PIL import Image

from convmlp.common.activation import activation_maps
from convmlp.common.errors import RunError
from convmlp.common.figures import save_figure
from convmlp.use.visualize import (
    activation_map,
    cam_figure,
    feature_figure,
    feature_maps,
    filter_figure,
    first_filters,
)


@pytest.fixture
def image(photo) -> Image.Image:
    with Image.open(photo) as image:
        image.load()
    return image


def test_feature_maps_are_those_of_the_model(make_classifier, image):
    classifier = make_classifier()
    maps = feature_maps(image, classifier)
    with torch.inference_mode():
        expected = classifier.model.forward_intermediates(classifier.preprocess([image]), intermediates_only=True)
    assert [m.shape for m in maps] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert all(np.array_equal(a, b[0].numpy()) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("mixer_s32_224", [(512, 7, 7)] * 4),
        ("pure_mlp_s", [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
        ("swin_tiny_patch4_window7_224", [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]),
    ],
)
def test_any_model_of_timm_shows_four_stages(make_classifier, image, name, shapes):
    fixed = "224" in name
    classifier = make_classifier(name, **({} if fixed else {"img_size": 64}))
    assert [m.shape for m in feature_maps(image, classifier)] == shapes
    heat = activation_map(image, classifier, 3)
    assert heat.shape == ((224, 224) if fixed else (64, 64)) and 0 <= heat.min() <= heat.max() <= 1


def test_the_activation_map_is_grad_cam(make_classifier, image):
    classifier = make_classifier(img_size=128)
    [heat, other] = activation_maps(classifier.model, classifier.preprocess([image, image.rotate(90)]), [281, 3], "")
    assert not np.allclose(heat, other)
    maps = []
    hook = classifier.model.stages[-1].register_forward_hook(lambda module, inputs, output: maps.append(output))
    logit = classifier.model(classifier.preprocess([image]))[0, 281]
    hook.remove()
    gradient = torch.autograd.grad(logit, maps[0])[0]
    cam = (gradient.mean((2, 3), keepdim=True) * maps[0]).sum(1)[0].relu().detach().numpy()
    assert cam.max() > 0
    coarse = np.asarray(Image.fromarray(heat).resize((4, 4), Image.Resampling.BOX))
    assert np.corrcoef(coarse.ravel(), cam.ravel())[0, 1] > 0.95
    assert cam.ravel()[coarse.argmax()] > 0.9 * cam.max()  # of random weights, two places may be nearly equal


def test_a_map_of_one_place_is_refused_and_leaves_no_hooks(make_classifier, image):
    classifier = make_classifier(img_size=32)
    with pytest.raises(RunError, match="is 1x1 at 32x32 px, so no place can be told; --img-size PX"):
        activation_map(image, classifier, 281)
    assert not any(module._forward_hooks for module in classifier.model.modules())
    [heat] = activation_maps(classifier.model, classifier.preprocess([image]), [281], "", least=4)
    assert heat.shape == (32, 32)


def test_frozen_stages_have_activation_maps_too(make_classifier, image):
    classifier = make_classifier(img_size=64)
    batch = classifier.preprocess([image])
    [expected] = activation_maps(classifier.model, batch, [281], "")
    classifier.model.requires_grad_(False)
    assert np.array_equal(activation_maps(classifier.model, batch, [281], "")[0], expected)


def test_filters_are_the_kernels_of_the_first_convolution(make_classifier):
    for name, shape in (("convmlp_s", (32, 3, 3, 3)), ("pure_mlp_s", (64, 4, 4, 3)), ("resnet18", (64, 7, 7, 3))):
        classifier = make_classifier(name)
        filters = first_filters(classifier)
        weight = next(p for p in classifier.model.parameters() if p.ndim == 4)
        assert filters.shape == shape and np.array_equal(filters.transpose(0, 3, 1, 2), weight.detach().numpy()[:64])


@pytest.fixture(scope="module")
def pair(make_classifier):
    return [make_classifier(name, img_size=64) for name in ("convmlp_s", "resnet10t")]


def test_the_figure_has_a_row_for_each_model(pair, image):
    figure = feature_figure(image, pair)
    titles = [row.get_suptitle() for row in figure.subfigs]
    assert titles == ["convmlp_s (random weights)", "resnet10t (random weights)"]
    for row in figure.subfigs:
        assert [bool(axis.images) for axis in row.axes] == [True] * 5
        sheet = row.axes[1].images[0].get_array()
        assert sheet.shape[1] > sheet.shape[0]  # four columns, three rows
        assert len(np.unique(sheet.reshape(-1, 4), axis=0)) > 100
    assert len(filter_figure(pair).axes) == 2


@pytest.mark.parametrize("kind", ["features", "cam", "filters"])
def test_long_titles_are_wrapped_not_cut(make_classifier, image, tmp_path, kind):
    classifiers = [make_classifier("resnet10t", img_size=64) for _ in range(2)]
    for classifier in classifiers:
        classifier.title = f"resnet10t of /home/somebody/{'output/of a run with $ of a long name/' * 4}best.pth"
        classifier.class_names = ["a class whose name goes on and on, as some of ImageNet's do, and on"] * 1000
    if kind == "features":
        figure = feature_figure(image, classifiers)
    else:
        figure = filter_figure(classifiers) if kind == "filters" else cam_figure(image, classifiers)
    save_figure(figure, tmp_path / "x.png")
    titles = [axis.title for axis in figure.axes] + [row._suptitle for row in figure.subfigs]
    boxes = [title.get_window_extent() for title in titles if title.get_text()]
    assert len(boxes) == {"features": 12, "cam": 6, "filters": 2}[kind]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
