"""Detectors and segmentors as graphs of tensors, against `predict`."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from untrained import FPN, MASKRCNN, RETINANET, image_of

from convmlp.common.errors import RunError
from convmlp.openmmlab.export import make_graph
from convmlp.openmmlab.graphs import Graph, resize
from convmlp.openmmlab.inference import predict

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(scope="module")
def graphs(models) -> dict:
    return {base: make_graph(model) for base, model in models.items()}


@torch.no_grad()
def look(graph: Graph, image: Image.Image) -> list[np.ndarray]:
    return [output.numpy() for output in graph(torch.from_numpy(np.array(image)))]


@pytest.mark.parametrize("sizes", [(77, 100, 99, 128), (300, 301, 128, 90), (256, 256, 128, 128), (13, 9, 80, 70)])
def test_images_are_resized_as_by_opencv(sizes):
    h, w, new_h, new_w = sizes
    image = np.random.RandomState(0).randint(0, 256, (h, w, 3)).astype(np.uint8)
    room = (new_h + 7, new_w + 3)
    found = resize(torch.from_numpy(image), torch.tensor([new_h, new_w]), room)
    assert found.shape == (*room, 3)
    expected = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(found[:new_h, :new_w], expected)


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (50, 120), (301, 300)])
@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
def test_a_graph_detects_what_predict_does(config, size, models, graphs):
    image = image_of(*size)
    [expected] = predict(models[config], [image])
    boxes, scores, labels, *masks = look(graphs[config], image)
    assert 5 <= len(boxes) == len(expected.boxes)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-4)
    np.testing.assert_allclose(boxes, expected.boxes, atol=1e-2)
    np.testing.assert_array_equal(labels, expected.labels)
    assert len(masks) == (config == MASKRCNN)
    for found, code in zip(masks[0] if masks else [], expected.masks or [], strict=True):
        assert found.dtype == bool
        assert (found != run_lengths.decode(code)).mean() < 1e-3


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (50, 123), (301, 300)])
def test_a_graph_labels_pixels_as_predict_does(size, models, graphs):
    image = image_of(*size)
    [expected] = predict(models[FPN], [image])
    [label_map] = look(graphs[FPN], image)
    assert len(np.unique(label_map)) > 1
    assert (label_map == expected.label_map).mean() > 0.999


@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
def test_above_the_threshold_there_may_be_nothing(config, models):
    graph = make_graph(models[config])
    graph.score_threshold.fill_(1.0)
    shapes = [output.shape for output in look(graph, image_of(60, 40))]
    assert shapes == [(0, 4), (0,), (0,), (0, 40, 60)][: len(graph.outputs)]


@pytest.mark.parametrize("config", [RETINANET, FPN])
def test_a_fixed_size_is_that_of_the_network(config, models):
    """An image of that size is not touched, and others fit into it."""
    graph = make_graph(models[config], (96, 160))
    seen = []
    hook = graph.network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    for size in ((160, 96), (320, 100), (30, 30)):
        look(graph, image_of(*size))
    hook.remove()
    assert [x.shape for x in seen] == [(1, 3, 96, 160)] * 3
    image = torch.from_numpy(np.array(image_of(160, 96))).permute(2, 0, 1)
    preprocessor = graph.network.data_preprocessor
    torch.testing.assert_close(seen[0][0], (image - preprocessor.mean) / preprocessor.std)
    assert seen[1][0, :, :50].abs().min() > 0 and not seen[1][0, :, 50:].any()
    assert seen[2][0, :, :, :96].abs().min() > 0 and not seen[2][0, :, :, 96:].any()


def test_boxes_of_a_fixed_size_lie_where_the_objects_are(models):
    """The same scene, twice as large, has the same detections at twice the place."""
    graph = make_graph(models[RETINANET], (64, 64))
    small = image_of(32, 64)
    large = small.resize((64, 128), Image.Resampling.NEAREST)
    (near, far), labels = zip(*(look(graph, image)[::2] for image in (small, large)), strict=True)
    assert near.max() <= 64 < far.max() <= 128 and far[:, 2].max() <= 64
    assert len(labels[0]) == len(labels[1]) > 0


@pytest.mark.parametrize("size", [(100, 128), (128, 65)])
def test_detectors_need_sides_that_their_strides_divide(size, models):
    with pytest.raises(RunError, match=f"--img-size must be a multiple of 32, got {size[0]}x{size[1]}"):
        make_graph(models[RETINANET], size)
