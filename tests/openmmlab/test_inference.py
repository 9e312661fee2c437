"""Prediction with detectors and segmentors: against mmdet's and mmseg's own, classes, mistakes, drawing, JSON."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools import mask as run_lengths
from small_runs import TINY
from untrained import BODY, CONFIGS, FPN, FRUIT, MASKRCNN, RETINANET, UNSURE, build, image_of, save

from convmlp.common.errors import CheckpointError, RunError
from convmlp.openmmlab import inference
from convmlp.openmmlab.inference import (
    Detections,
    draw,
    open_model,
    predict,
    predict_files,
    to_json,
)
from convmlp.timm_models import create_timm_model

# isort: split
# behind convmlp.openmmlab, which lets mmcv.ops be imported
import mmdet.apis
import mmseg.apis
from mmdet.datasets import CocoDataset
from mmseg.datasets import ADE20KDataset

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def equal(a: Detections, b: Detections) -> bool:
    same = [np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)]
    return all(same) and a.masks == b.masks


# Against the libraries' own inference, from a file


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (50, 120)])
@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
@pytest.mark.filterwarnings("ignore")
def test_boxes_and_masks_are_those_of_mmdet(config, size, runs, models, tmp_path):
    image = image_of(*size)
    image.save(tmp_path / "image.png")
    with DefaultScope.overwrite_default_scope("mmdet"):
        reference = mmdet.apis.init_detector(*runs[config], device="cpu")
        expected = mmdet.apis.inference_detector(reference, str(tmp_path / "image.png")).pred_instances
    [found] = predict(models[config], [image])
    assert 5 <= len(found.boxes) == len(expected.bboxes)
    np.testing.assert_allclose(found.boxes, expected.bboxes, atol=1e-2)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.boxes >= 0).all() and (found.boxes <= np.array([*size, *size]) + 1e-4).all()
    assert (found.masks is None) == (config == RETINANET)
    for code, mask in zip(found.masks or [], expected.get("masks", []), strict=True):
        assert code["size"] == [size[1], size[0]]
        assert (run_lengths.decode(code) != mask.numpy()).mean() < 1e-3
    if config == MASKRCNN:
        assert expected.masks.any()


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (50, 120)])
@pytest.mark.filterwarnings("ignore")
def test_label_maps_are_those_of_mmseg(size, runs, models, tmp_path):
    image = image_of(*size)
    image.save(tmp_path / "image.png")
    with DefaultScope.overwrite_default_scope("mmseg"):
        reference = mmseg.apis.init_model(*runs[FPN], device="cpu")
        expected = mmseg.apis.inference_model(reference, str(tmp_path / "image.png")).pred_sem_seg.data[0].numpy()
    [found] = predict(models[FPN], [image])
    assert found.label_map.shape == (size[1], size[0]) and found.label_map.dtype == np.uint8
    assert len(np.unique(expected)) > 1
    assert (found.label_map == expected).mean() > 0.999
    assert found.shares == pytest.approx([(found.label_map == i).mean() for i in range(3)])


def test_the_order_of_colours_matters(models):
    image = image_of(96, 96)
    swapped = Image.merge("RGB", image.split()[::-1])
    ours, others = predict(models[RETINANET], [image, swapped])
    assert not np.allclose(ours.scores, others.scores, atol=1e-4)


@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
def test_images_do_not_depend_on_the_others(config, models):
    images = [image_of(100, 60), image_of(40, 90, seed=1)]
    together = predict(models[config], images)
    alone = [predict(models[config], [image])[0] for image in images]
    assert all(equal(a, b) for a, b in zip(together, alone, strict=True))
    assert predict(models[config], []) == []


def test_grey_images_are_images(models):
    grey = image_of(60, 80).convert("L")
    assert equal(*predict(models[RETINANET], [grey, grey.convert("RGB")]))


# Classes and colours


def test_the_classes_of_the_checkpoint_win(runs, tmp_path):
    config, checkpoint = runs[RETINANET]
    named = tmp_path / "named.py"
    named.write_text(
        f"_base_ = {config!r}\ntest_dataloader = dict(dataset=dict(metainfo=dict(classes=('cat', 'dog', 'cow'))))\n"
    )
    assert open_model(str(named), checkpoint, "cpu").class_names == FRUIT
    nameless = save(build(config), tmp_path / "nameless.pth")
    assert open_model(str(named), nameless, "cpu").class_names == ["cat", "dog", "cow"]
    assert open_model(config, nameless, "cpu").class_names == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
def test_the_config_that_a_run_was_started_with_takes_the_number_of_classes_from_the_checkpoint(config, runs, models):
    """It is for COCO, the run was for three classes of the user's own."""
    Path("started.py").write_text(f"_base_ = {str(config)!r}\nmodel = dict({BODY})\n")
    model = open_model("started.py", runs[config][1], "cpu")
    assert model.class_names == FRUIT
    heads = [module.num_classes for name, module in model.network.named_modules() if name.endswith("bbox_head")]
    assert heads == [3]
    for key, value in models[config].network.state_dict().items():
        assert torch.equal(model.network.state_dict()[key], value), key
    predict(model, [image_of(64, 64)])


def test_a_recipe_of_segmentation_takes_other_classes(tmp_path):
    recipe = CONFIGS / "segmentation/fpn_convmlp_s_512x512_40k_ade20k.py"
    own = tmp_path / "own.py"
    own.write_text(f"_base_ = {str(recipe)!r}\nmodel = dict(decode_head=dict(num_classes=3))\n")
    checkpoint = save(build(own), tmp_path / "own.pth", dataset_meta=dict(classes=FRUIT))
    model = open_model(str(recipe), checkpoint, "cpu")
    assert model.class_names == FRUIT
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.network.modules())
    assert len(predict(model, [image_of(40, 30)])[0].shares) == 3


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("detection/retinanet_convmlp_s_fpn_1x_coco", CocoDataset.METAINFO),
        ("segmentation/fpn_convmlp_s_512x512_40k_ade20k", ADE20KDataset.METAINFO),
    ],
)
def test_standard_classes_have_their_names_and_colours(name, meta, tmp_path):
    config = tmp_path / "plain.py"  # a config that does not tell its data set
    config.write_text(
        f"_base_ = {str(CONFIGS / name)!r} + '.py'\n"
        "train_dataloader = None\nval_dataloader = None\ntest_dataloader = None\n"
        "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True), "
        f"dict(type='Pack{'Det' if 'detection' in name else 'Seg'}Inputs')]\n"
    )
    model = open_model(str(config), save(build(config), tmp_path / "bare.pth"), "cpu")
    assert model.class_names == list(meta["classes"])
    assert model.palette == [tuple(colour) for colour in meta["palette"]]
    predict(model, [image_of(64, 48)])


def test_checkpoints_of_the_old_libraries_tell_their_classes(runs, models, tmp_path):
    config, _ = runs[RETINANET]
    palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    old = save(models[RETINANET].network, tmp_path / "old.pth", CLASSES=tuple(FRUIT), PALETTE=palette)
    model = open_model(config, old, "cpu")
    assert (model.class_names, model.palette) == (FRUIT, palette)


# Mistakes


def spoiled(checkpoint: str, path: Path, edit: Callable[[dict], object]) -> str:
    content = torch.load(checkpoint)
    edit(content["state_dict"])
    torch.save(content, path)
    return str(path)


CLS = "bbox_head.retina_cls.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("neck.fpn_convs.1.conv.bias"), "neck.fpn_convs.1.conv.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is not in the model"),
        (lambda w: w.update({CLS: w[CLS][:9]}), f"{CLS} is (9, 64, 3, 3), the model has (27, 64, 3, 3)"),
        (lambda w: [w.pop(key) for key in [*w] if key.startswith("backbone.")], "is not of a detector or segmentor"),
    ],
)
def test_a_checkpoint_that_does_not_fill_the_model_is_named(edit, message, runs, tmp_path):
    config, checkpoint = runs[RETINANET]
    with pytest.raises(CheckpointError) as caught:
        open_model(config, spoiled(checkpoint, tmp_path / "bad.pth", edit), "cpu")
    assert "bad.pth" in str(caught.value) and message in str(caught.value)


def test_other_files_are_no_checkpoints(runs, tmp_path):
    config, _ = runs[RETINANET]
    classifier = create_timm_model("convmlp_s", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"meta": Trap(), "state_dict": {}}, tmp_path / "trap.pth", pickle_module=pickle)
    for name, message in (
        ("classifier.pth", "is not of a detector or segmentor"),
        ("trap.pth", "--trust-checkpoint reads by pickle"),
        ("none.pth", "no such checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_model(config, name, "cpu")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(CheckpointError, match="does not fit"):
        open_model(runs[MASKRCNN][0], runs[RETINANET][1], "cpu")


def test_checkpoints_with_objects_in_them_are_read_on_request(runs, models, tmp_path):
    config, _ = runs[RETINANET]
    path = save(models[RETINANET].network, tmp_path / "objects.pth", author=Path("me"), CLASSES=FRUIT)
    with pytest.raises(CheckpointError, match="--trust-checkpoint"):
        open_model(config, path, "cpu")
    assert open_model(config, path, "cpu", trust_checkpoint=True).class_names == FRUIT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such config: config.py"),
        ("model = dict(\n", "cannot read the config config.py: SyntaxError"),
        ("from nowhere import model\n", "cannot read the config config.py: ModuleNotFoundError"),
        ("default_scope = 'mmdet'\n", "config.py is not the config of a model of mmdet or mmseg"),
        ("default_scope = 'mmpretrain'\nmodel = dict(type='X')\n", "is not the config of a model of mmdet or mmseg"),
        (
            "default_scope = 'mmdet'\nmodel = dict(type='X')\n",
            "config.py cannot be built: 'X is not in the mmdet::model",
        ),
        ("_base_ = BASE\nmodel = dict(backbone=dict(arch='convmlp_x'))\n", "got 'convmlp_x'; did you mean convmlp_"),
        ("_base_ = BASE\nmodel = dict(neck=dict(chanels=3))\n", "unexpected keyword argument 'chanels'"),
        ("_base_ = BASE\ntest_dataloader = dict(dataset=dict(pipeline=[]))\ntest_pipeline = []\n", "no test pipeline"),
    ],
)
def test_mistakes_in_the_config_are_one_clear_line(text, message, runs):
    if text is not None:
        Path("config.py").write_text(text.replace("BASE", repr(runs[RETINANET][0])))
    with pytest.raises(RunError) as caught:
        open_model("config.py", runs[RETINANET][1], "cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 9), (30, 3)])
@pytest.mark.parametrize("config", UNSURE)
def test_tiny_images_are_predicted_and_drawn(config, size, models):
    image = image_of(*size)
    [found] = predict(models[config], [image])
    drawn = draw(models[config], image, found, 0.0)
    assert min(drawn.size) >= 384
    json.dumps(to_json(found, FRUIT, 0.0))


def test_an_image_of_which_nothing_is_left_is_named(models):
    with pytest.raises(RunError, match="cannot take an image of 1000 x 1 pixels") as caught:
        predict(models[RETINANET], [image_of(1000, 1)])
    assert "\n" not in str(caught.value)
    [found] = predict(models[FPN], [image_of(1000, 1)])  # its pipeline resizes nothing
    assert max(draw(models[FPN], image_of(1000, 1), found).size) < 5000


def test_large_label_maps_take_less_memory_and_hardly_differ(models, monkeypatch):
    image = image_of(160, 120)
    [whole] = predict(models[FPN], [image])
    monkeypatch.setattr(inference, "LARGEST_LOGITS", 3 * 80 * 60)
    seen = []
    forward = models[FPN].network.test_step
    monkeypatch.setattr(models[FPN].network, "test_step", lambda data: seen.extend(forward(data)) or seen)
    [coarse] = predict(models[FPN], [image])
    assert seen[0].pred_sem_seg.data.shape == (1, 60, 80)
    assert coarse.label_map.shape == (120, 160)
    assert 0.9 < (whole.label_map == coarse.label_map).mean() < 1


# Nothing leaks


def test_models_do_not_disturb_each_other(runs, models, capfd):
    image = image_of(80, 60)
    before = getattr(DefaultScope.get_current_instance(), "scope_name", None)
    [first] = predict(models[MASKRCNN], [image])
    numbers = np.random.get_state()[1].copy()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        segmentor = open_model(*runs[FPN], device="cpu")
        detector = open_model(*runs[MASKRCNN], device="cpu")
        [labels] = predict(segmentor, [image])
        [again] = predict(detector, [image])
    drawings = [
        draw(detector, image, again, 0.0),
        draw(segmentor, image, labels),
        draw(models[MASKRCNN], image, first, 0),
    ]
    assert equal(first, again)
    assert drawings[0] == drawings[2] != drawings[1]
    assert getattr(DefaultScope.get_current_instance(), "scope_name", None) == before
    assert np.array_equal(np.random.get_state()[1], numbers)
    assert [str(each.message) for each in said if each.category is UserWarning] == []
    assert capfd.readouterr() == ("", "")


def test_opening_prints_nothing_of_its_own(runs):
    """In a process of its own: mmdet and mmseg speak when they are imported."""
    code = f"import convmlp.zoo, convmlp.openmmlab\nconvmlp.zoo.VARIANTS['tiny'] = {TINY}\nprint('---')\n"
    code += "from convmlp.openmmlab.inference import open_model\n"
    code += "".join(f"open_model(*{runs[base]!r}, 'cpu')\n" for base in (RETINANET, FPN))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.partition("---\n")[2] + run.stderr == ""


# Drawing and JSON


def disc(size: int, x: int, y: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


@pytest.fixture
def found() -> Detections:
    """A pear at the left, an apple at the right, and what may be a plum, on 400 x 400 pixels."""
    boxes = np.array([[50, 100, 150, 200], [240, 240, 360, 360], [10, 300, 90, 380]], dtype=np.float32)
    masks = [disc(400, 100, 150, 40), disc(400, 300, 300, 50), disc(400, 50, 340, 20)]
    scores = np.array([0.6, 0.9, 0.2], dtype=np.float32)
    return Detections(boxes, scores, np.array([1, 0, 2]), [inference._encode(mask) for mask in masks])


def test_detections_are_plain_values(found):
    content = json.loads(json.dumps(to_json(found, FRUIT, 0.3)))
    assert [(each["name"], each["index"], each["score"]) for each in content["detections"]] == [
        ("apple", 0, 0.9),
        ("pear", 1, 0.6),
    ]
    assert content["detections"][1]["box"] == [50, 100, 150, 200]
    mask = run_lengths.decode(content["detections"][1]["mask"])
    assert np.array_equal(mask, disc(400, 100, 150, 40))
    assert "mask" not in to_json(found._replace(masks=None), FRUIT)["detections"][0]
    assert len(to_json(found, FRUIT, 0.0)["detections"]) == 3


def test_label_maps_are_plain_values(models):
    [found] = predict(models[FPN], [image_of(70, 50)])
    content = json.loads(json.dumps(to_json(found, FRUIT)))["classes"]
    rebuilt = sum(each["index"] * run_lengths.decode(each["mask"]).astype(int) for each in content)
    assert np.array_equal(rebuilt, found.label_map)
    shares = [each["share"] for each in content]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    assert all(each["name"] == FRUIT[each["index"]] for each in content)


# Files


@pytest.mark.parametrize("base", [MASKRCNN, FPN])
def test_files_are_predicted_drawn_and_those_that_are_not_images_named(base, runs, models, tmp_path, capfd):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        image_of(90, 60, seed=i).save(paths[-1])
    paths.insert(1, tmp_path / "broken.jpg")
    paths[1].write_bytes(b"")
    (tmp_path / "drawn").mkdir()
    threshold = 0.0 if base == MASKRCNN else None
    capfd.readouterr()
    drawn = {"drawn": lambda path: Path("drawn", path.name)}
    rows = list(predict_files(paths, *runs[base], device="cpu", score_threshold=threshold, **drawn))
    assert capfd.readouterr() == ("", "")
    assert rows.pop(1) == {"image": str(paths[1]), "error": f"{paths[1]}: an empty file"}
    expected = [to_json(predict(models[base], [image_of(90, 60, seed=i)])[0], FRUIT, 0.0) for i in range(2)]
    assert rows == [{"image": str(paths[2 * i]), **expected[i]} for i in range(2)]
    key = "detections" if base == MASKRCNN else "classes"
    assert all(row[key] and row[key][0]["name"] in FRUIT for row in rows)
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["0.png", "1.png"]
    with Image.open("drawn/0.png") as drawn:
        assert drawn.height == 420  # seven times


def test_a_threshold_is_for_detection(runs):
    with pytest.raises(RunError, match="--score-threshold is for detection, and this is a segmentor"):
        next(predict_files(["scene.jpg"], *runs[FPN], device="cpu", score_threshold=0.5))


def test_below_the_threshold_nothing_is_listed(runs, tmp_path):
    image_of(90, 60).save("scene.png")
    rows = list(predict_files(["scene.png"], *runs[RETINANET], device="cpu", score_threshold=1.0))
    assert rows == [{"image": "scene.png", "detections": []}]
