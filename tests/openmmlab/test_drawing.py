"""Boxes, masks and label maps in images: where they are, what names they have, how large small images become."""

import numpy as np
import pytest
from PIL import Image, ImageChops
from pycocotools import mask as run_lengths

from convmlp.openmmlab.inference import Detections, Segmentation, TrainedModel, draw

FRUIT = ["apple", "pear", "plum"]
RED, GREEN, BLUE = PALETTE = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
MODEL = TrainedModel("config.py", "mmdet", None, None, FRUIT, PALETTE)  # one that only draws
GREY = Image.new("RGB", (400, 400), (90, 90, 90))


def disc(size: int, x: int, y: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def encode(mask: np.ndarray) -> dict:
    return run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))


@pytest.fixture
def found() -> Detections:
    """A pear at the left, an apple at the right, and what may be a plum, on 400 x 400 pixels."""
    boxes = np.array([[50, 100, 150, 200], [240, 240, 360, 360], [10, 300, 90, 380]], dtype=np.float32)
    masks = [disc(400, 100, 150, 40), disc(400, 300, 300, 50), disc(400, 50, 340, 20)]
    scores = np.array([0.6, 0.9, 0.2], dtype=np.float32)
    return Detections(boxes, scores, np.array([1, 0, 2]), [encode(mask) for mask in masks])


def changed(drawn: Image.Image, original: Image.Image = GREY) -> np.ndarray:
    assert drawn.size == original.size
    return np.asarray(ImageChops.difference(drawn, original)).max(-1) > 5


def is_like(pixel: tuple[int, int, int], colour: tuple[int, int, int]) -> bool:
    """Whether the strongest channel of a pixel is the colour's, far above the others."""
    pixel, strong = np.array(pixel, dtype=int), int(np.argmax(colour))
    return pixel[strong] > np.delete(pixel, strong).max() + 60


@pytest.mark.parametrize("masks", [True, False])
def test_below_the_threshold_nothing_is_drawn(masks, found):
    found = found if masks else found._replace(masks=None)
    assert not changed(draw(MODEL, GREY, found, 0.95)).any()
    assert GREY.getpixel((100, 150)) == (90, 90, 90)


def test_boxes_are_drawn_where_they_are(found):
    drawn = draw(MODEL, GREY, found._replace(masks=None), 0.3)
    where = changed(drawn)
    assert all(is_like(drawn.getpixel(at), GREEN) for at in ((50, 150), (150, 150), (100, 200)))
    assert is_like(drawn.getpixel((300, 360)), RED)
    assert where[100:125, 50:90].mean() > 0.5  # the name, in the corner of the box
    where[97:204, 47:154] = where[237:364, 237:364] = False
    assert not where.any()
    inside = changed(drawn)[130:190, 60:140]
    assert not inside.any()


def test_masks_are_tinted(found):
    drawn = draw(MODEL, GREY, found, 0.3)
    mask = disc(400, 100, 150, 40)
    where = changed(drawn)
    assert where[mask].all() and not where[130:190, 55:145][~disc(400, 100, 150, 44)[130:190, 55:145]].any()
    assert is_like(drawn.getpixel((100, 150)), GREEN) and is_like(drawn.getpixel((300, 300)), RED)


def test_the_best_of_boxes_in_the_same_place_is_on_top(found):
    same = found._replace(boxes=np.tile(found.boxes[:1], (3, 1)), masks=None)
    drawn = draw(MODEL, GREY, same, 0.0)
    assert is_like(drawn.getpixel((50, 150)), RED)  # the apple's, of score 0.9


@pytest.mark.parametrize("box", [[0, 0, 30, 30], [380, 380, 400, 400], [0, 0, 400, 400]])
def test_boxes_at_the_edge_are_drawn(box):
    whole = Detections(np.array([box], dtype=np.float32), np.ones(1), np.zeros(1, dtype=int), None)
    assert changed(draw(MODEL, GREY, whole)).sum() > 60


def test_small_images_are_enlarged_with_what_is_found_on_them():
    small = Image.new("RGB", (100, 130), (90, 90, 90))
    found = Detections(np.array([[20, 30, 60, 70]], dtype=np.float32), np.ones(1), np.zeros(1, dtype=int), None)
    drawn = draw(MODEL, small, found)
    assert drawn.size == (400, 520)
    assert all(is_like(drawn.getpixel(at), RED) for at in ((80, 200), (240, 200), (160, 280)))


def test_dollars_in_names_are_not_formulas(found):
    plain = draw(MODEL, GREY, found, 0.3)
    MODEL_WITH_DOLLARS = TrainedModel("config.py", "mmdet", None, None, ["$x^$y$", "a$", "$"], PALETTE)
    assert draw(MODEL_WITH_DOLLARS, GREY, found, 0.3).size == plain.size


def test_label_maps_are_drawn_in_their_colours_with_a_legend_of_the_classes_present():
    label_map = np.zeros((400, 400), dtype=np.uint8)
    label_map[:, 300:] = 2
    drawn = draw(MODEL, GREY, Segmentation(label_map, np.array([0.75, 0, 0.25])))
    assert drawn.getpixel((10, 10)) == (170, 45, 45) and drawn.getpixel((390, 390)) == (45, 45, 170)
    legend = np.asarray(drawn)[:, 400:]
    rows = [np.flatnonzero((legend == colour).all(-1).any(1)) for colour in PALETTE]
    assert len(rows[0]) > 5 and len(rows[1]) == 0 and len(rows[2]) > 5
    assert rows[0].max() < rows[2].min()  # the largest first
