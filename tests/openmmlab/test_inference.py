"""Prediction with detectors and segmentors: against mmdet's and mmseg's own, classes, mistakes, pictures, JSON."""

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
from PIL import Image, ImageChops
from pycocotools import mask as run_lengths

from convmlp.common.errors import CheckpointError, RunError
from convmlp.openmmlab import inference
from convmlp.openmmlab.drawing import draw
from convmlp.openmmlab.inference import Detections, Segmentation, TrainedModel, open_model, predict, to_json
from convmlp.timm_models import create_timm_model

# isort: split
# behind convmlp.openmmlab, which lets mmcv.ops be imported
import mmdet.apis
import mmseg.apis
from mmdet.datasets import CocoDataset
from mmseg.datasets import ADE20KDataset

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RETINANET = CONFIGS / "detection/quickstart_retinanet.py"
MASKRCNN = CONFIGS / "detection/quickstart_maskrcnn.py"
FPN = CONFIGS / "segmentation/quickstart_fpn.py"
FRUIT = ["apple", "pear", "plum"]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

# Heads that were not trained are sure of nothing
UNSURE = {
    RETINANET: "model = dict(bbox_head=dict(num_classes=3), test_cfg=dict(score_thr=0.0, max_per_img=20))",
    MASKRCNN: "model = dict(roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)), "
    "test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=6)))",
    FPN: "model = dict(decode_head=dict(num_classes=3, loss_decode=dict(class_weight=[1.0, 2.0, 3.0])))",
}


def build(config: str | Path) -> torch.nn.Module:
    """A model with weights that react to what they see."""
    cfg = inference._read_config(str(config))
    torch.manual_seed(0)
    with inference._library(cfg.default_scope):
        inference.replace_sync_bn(cfg.model)
        del cfg.model.backbone["init_cfg"]
        network = inference.MODELS.build(cfg.model)
    for name, value in network.named_parameters():
        if "cls" in name and name.endswith("bias"):
            value.data.zero_()
    return network


def save(network: torch.nn.Module, path: Path, **meta: object) -> str:
    torch.save({"meta": meta, "state_dict": network.state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[Path, tuple[str, str]]:
    """By quickstart a config of its own for three classes, and a checkpoint of it as a run writes it."""
    found = {}
    for base, change in UNSURE.items():
        folder = tmp_path_factory.mktemp(base.stem)
        config = folder / base.name
        config.write_text(f"_base_ = {str(base)!r}\n{change}\n")
        found[base] = str(config), save(build(config), folder / "best.pth", dataset_meta=dict(classes=tuple(FRUIT)))
    return found


@pytest.fixture(scope="module")
def models(runs) -> dict[Path, TrainedModel]:
    return {base: open_model(*run, device="cpu") for base, run in runs.items()}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The quickstarts' backbones name a file in output/, which is not there."""
    monkeypatch.chdir(tmp_path)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rough = np.random.RandomState(seed).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def equal(a: Detections, b: Detections) -> bool:
    same = [np.array_equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)]
    return all(same) and a.masks == b.masks


# Against the libraries' own inference, from a file


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (50, 120)])
@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
@pytest.mark.filterwarnings("ignore")
def test_boxes_and_masks_are_those_of_mmdet(config, size, runs, models, tmp_path):
    image = picture(*size)
    image.save(tmp_path / "picture.png")
    with DefaultScope.overwrite_default_scope("mmdet"):
        reference = mmdet.apis.init_detector(*runs[config], device="cpu")
        expected = mmdet.apis.inference_detector(reference, str(tmp_path / "picture.png")).pred_instances
    [found] = predict(models[config], [image])
    assert 5 <= len(found.boxes) == len(expected.bboxes)
    np.testing.assert_allclose(found.boxes, expected.bboxes, atol=1e-2)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.boxes >= 0).all() and (found.boxes <= [*size, *size]).all()
    assert (found.masks is None) == (config == RETINANET)
    for code, mask in zip(found.masks or [], expected.get("masks", []), strict=True):
        assert code["size"] == [size[1], size[0]]
        assert (run_lengths.decode(code) != mask.numpy()).mean() < 1e-3
    if config == MASKRCNN:
        assert expected.masks.any()


@pytest.mark.parametrize("size", [(128, 128), (200, 90), (50, 120)])
@pytest.mark.filterwarnings("ignore")
def test_label_maps_are_those_of_mmseg(size, runs, models, tmp_path):
    image = picture(*size)
    image.save(tmp_path / "picture.png")
    with DefaultScope.overwrite_default_scope("mmseg"):
        reference = mmseg.apis.init_model(*runs[FPN], device="cpu")
        expected = mmseg.apis.inference_model(reference, str(tmp_path / "picture.png")).pred_sem_seg.data[0].numpy()
    [found] = predict(models[FPN], [image])
    assert found.label_map.shape == (size[1], size[0]) and found.label_map.dtype == np.uint8
    assert len(np.unique(expected)) > 1
    assert (found.label_map == expected).mean() > 0.999
    assert found.shares == pytest.approx([(found.label_map == i).mean() for i in range(3)])


def test_the_order_of_colours_matters(models):
    image = picture(96, 96)
    swapped = Image.merge("RGB", image.split()[::-1])
    ours, others = predict(models[RETINANET], [image, swapped])
    assert not np.allclose(ours.scores, others.scores, atol=1e-4)


@pytest.mark.parametrize("config", [RETINANET, MASKRCNN])
def test_pictures_do_not_depend_on_the_others(config, models):
    images = [picture(100, 60), picture(40, 90, seed=1)]
    together = predict(models[config], images)
    alone = [predict(models[config], [image])[0] for image in images]
    assert all(equal(a, b) for a, b in zip(together, alone, strict=True))
    assert predict(models[config], []) == []


def test_grey_pictures_are_pictures(models):
    grey = picture(60, 80).convert("L")
    assert equal(*predict(models[RETINANET], [grey, grey.convert("RGB")]))


# Classes and colours


def distances(palette: list) -> np.ndarray:
    colours = np.array(palette, dtype=float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    return apart[~np.eye(len(colours), dtype=bool)]


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
    model = open_model(str(config), runs[config][1], "cpu")
    assert model.class_names == FRUIT
    heads = [module.num_classes for name, module in model.network.named_modules() if name.endswith("bbox_head")]
    assert heads == [3]
    for key, value in models[config].network.state_dict().items():
        assert torch.equal(model.network.state_dict()[key], value), key
    predict(model, [picture(64, 64)])


def test_a_recipe_of_segmentation_takes_other_classes(tmp_path):
    recipe = CONFIGS / "segmentation/fpn_convmlp_s_512x512_40k_ade20k.py"
    own = tmp_path / "own.py"
    own.write_text(f"_base_ = {str(recipe)!r}\nmodel = dict(decode_head=dict(num_classes=3))\n")
    checkpoint = save(build(own), tmp_path / "own.pth", dataset_meta=dict(classes=FRUIT))
    model = open_model(str(recipe), checkpoint, "cpu")
    assert model.class_names == FRUIT
    assert not any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.network.modules())
    assert len(predict(model, [picture(40, 30)])[0].shares) == 3


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
    predict(model, [picture(64, 48)])


def test_checkpoints_of_the_old_libraries_tell_their_classes(runs, models, tmp_path):
    config, _ = runs[RETINANET]
    palette = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    old = save(models[RETINANET].network, tmp_path / "old.pth", CLASSES=tuple(FRUIT), PALETTE=palette)
    model = open_model(config, old, "cpu")
    assert (model.class_names, model.palette) == (FRUIT, palette)


@pytest.mark.parametrize(
    "leftover",
    [
        CocoDataset.METAINFO["palette"],  # mmdet gives it to any classes
        np.random.RandomState(42).randint(0, 255, (3, 3)).tolist(),  # mmseg draws it for want of another
    ],
)
def test_colours_that_nobody_chose_give_way_to_others_that_can_be_told_apart(leftover, runs, models, tmp_path):
    config, _ = runs[FPN]
    classes = ("background", "left", "right")
    path = save(models[FPN].network, tmp_path / "a.pth", dataset_meta=dict(classes=classes, palette=leftover))
    palette = open_model(config, path, "cpu").palette
    assert palette[0] == (0, 0, 0) and distances(palette).min() > 150


@pytest.mark.parametrize(("number", "apart"), [(10, 90), (12, 70), (40, 60)])
def test_many_classes_have_colours_of_their_own(number, apart):
    _, palette = inference._classes([], number)
    assert len(palette) == number and distances(palette).min() > apart


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
def test_tiny_pictures_are_predicted_and_drawn(config, size, models):
    image = picture(*size)
    [found] = predict(models[config], [image])
    drawn = draw(models[config], image, found, 0.0)
    assert min(drawn.size) >= 384
    json.dumps(to_json(found, FRUIT, 0.0))


def test_a_picture_of_which_nothing_is_left_is_named(models):
    with pytest.raises(RunError, match="cannot take a picture of 1000 x 1 pixels") as caught:
        predict(models[RETINANET], [picture(1000, 1)])
    assert "\n" not in str(caught.value)
    [found] = predict(models[FPN], [picture(1000, 1)])  # its pipeline resizes nothing
    assert max(draw(models[FPN], picture(1000, 1), found).size) < 5000


def test_large_label_maps_take_less_memory_and_hardly_differ(models, monkeypatch):
    image = picture(160, 120)
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
    image = picture(80, 60)
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
    code = "import convmlp.openmmlab\nprint('---')\nfrom convmlp.openmmlab.inference import open_model\n"
    code += "".join(f"open_model(*{runs[base]!r}, 'cpu')\n" for base in (RETINANET, FPN))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.partition("---\n")[2] + run.stderr == ""


# Pictures and JSON


def model_of(library: str) -> TrainedModel:
    """One that only draws."""
    return TrainedModel("config.py", library, None, None, FRUIT, [(250, 0, 0), (0, 250, 0), (0, 0, 250)])


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


GREY = Image.new("RGB", (400, 400), (90, 90, 90))


def changed(drawn: Image.Image, original: Image.Image = GREY) -> np.ndarray:
    assert drawn.size == original.size
    return np.asarray(ImageChops.difference(drawn, original)).any(-1)


def test_below_the_threshold_nothing_is_drawn(found):
    assert draw(model_of("mmdet"), GREY, found, 0.95) == GREY
    assert GREY.getpixel((100, 150)) == (90, 90, 90)


def test_boxes_are_drawn_where_they_are(found):
    drawn = draw(model_of("mmdet"), GREY, found._replace(masks=None), 0.3)
    where = changed(drawn)
    assert drawn.getpixel((50, 150)) == drawn.getpixel((150, 150)) == drawn.getpixel((100, 200)) == (0, 250, 0)
    assert drawn.getpixel((300, 360)) == (250, 0, 0)
    assert not where[105:195, 55:145].any() and not where[245:355, 245:355].any()
    assert where[80:100, 50:60].any()  # the name
    where[80:201, 50:151] = where[220:361, 240:361] = False
    assert not where.any()


def test_masks_are_tinted_and_outlined(found):
    drawn = draw(model_of("mmdet"), GREY, found, 0.3)
    where = changed(drawn)
    mask = disc(400, 100, 150, 40)
    inside = np.zeros_like(mask)
    inside[105:195, 55:145] = True
    assert where[mask].all() and not where[inside & ~disc(400, 100, 150, 42)].any()
    red, green, _ = drawn.getpixel((100, 150))
    assert red < 90 < green < 250
    assert drawn.getpixel((61, 150)) == (0, 250, 0)


def test_names_of_boxes_in_the_same_place_can_both_be_read(found):
    same = found._replace(boxes=np.tile(found.boxes[:1], (3, 1)), masks=None)
    pixels = np.asarray(draw(model_of("mmdet"), GREY, same, 0.0)).reshape(-1, 3)
    area = [(pixels == colour).all(-1).sum() for colour in model_of("mmdet").palette]
    assert min(area) > 500 and area[2] < area[0] + 200


@pytest.mark.parametrize("box", [[0, 0, 30, 30], [380, 380, 400, 400], [0, 0, 400, 400]])
def test_names_stay_on_the_picture(box, found):
    whole = Detections(np.array([box], dtype=np.float32), np.ones(1), np.zeros(1, dtype=int), None)
    drawn = np.asarray(draw(model_of("mmdet"), GREY, whole))
    filled = (drawn == (250, 0, 0)).all(-1)
    ink = (drawn == (255, 255, 255)).all(-1)
    assert filled.sum() > 700 and ink.sum() > 20


def test_small_pictures_are_enlarged_with_what_is_found_on_them():
    small = Image.new("RGB", (100, 130), (90, 90, 90))
    found = Detections(np.array([[20, 30, 60, 70]], dtype=np.float32), np.ones(1), np.zeros(1, dtype=int), None)
    drawn = draw(model_of("mmdet"), small, found)
    assert drawn.size == (400, 520)
    assert drawn.getpixel((80, 200)) == drawn.getpixel((240, 200)) == drawn.getpixel((160, 280)) == (250, 0, 0)


def test_label_maps_are_drawn_in_their_colours_with_a_legend_of_the_classes_present():
    label_map = np.zeros((400, 400), dtype=np.uint8)
    label_map[:, 300:] = 2
    result = Segmentation(label_map, np.array([0.75, 0, 0.25]))
    drawn = draw(model_of("mmseg"), GREY, result)
    assert drawn.getpixel((10, 10)) == (170, 45, 45) and drawn.getpixel((390, 390)) == (45, 45, 170)
    legend = np.asarray(drawn)[:, 400:]
    rows = [np.flatnonzero((legend == colour).all(-1).any(1)) for colour in model_of("mmseg").palette]
    assert len(rows[0]) > 5 and len(rows[1]) == 0 and len(rows[2]) > 5
    assert rows[0].max() < rows[2].min()  # the largest first


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
    [found] = predict(models[FPN], [picture(70, 50)])
    content = json.loads(json.dumps(to_json(found, FRUIT)))["classes"]
    rebuilt = sum(each["index"] * run_lengths.decode(each["mask"]).astype(int) for each in content)
    assert np.array_equal(rebuilt, found.label_map)
    shares = [each["share"] for each in content]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    assert all(each["name"] == FRUIT[each["index"]] for each in content)


# The command


def command(*arguments: object) -> subprocess.CompletedProcess:
    call = [str(Path(sys.executable).with_name("convmlp")), "predict", *map(str, arguments)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("base", [MASKRCNN, FPN])
def test_the_command_gives_json_draws_and_counts_what_is_no_picture(base, runs, models, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        picture(90, 60, seed=i).save(pictures / f"{i}.png")
    (pictures / "broken.jpg").write_bytes(b"")
    config, checkpoint = runs[base]
    call = [pictures, "--config", config, "--checkpoint", checkpoint]
    call += ["--score-threshold", 0.0] if base == MASKRCNN else []
    run = command(*call, "--json", "-", "--save-dir", tmp_path / "drawn")
    assert run.returncode == 1 and "skipped: " in run.stderr and "1 of 3 pictures were left out" in run.stderr
    rows = json.loads(run.stdout)["predictions"]
    assert [Path(row.pop("picture")).name for row in rows] == ["0.png", "1.png"]
    found = [to_json(predict(models[base], [picture(90, 60, seed=i)])[0], FRUIT, 0.0) for i in range(2)]
    key = next(iter(found[0]))
    assert [[each["name"] for each in row[key]] for row in rows] == [
        [each["name"] for each in row[key]] for row in found
    ]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0.png", "1.png"]


def test_the_command_shows_a_table_with_boxes(runs, tmp_path):
    picture(90, 60).save(tmp_path / "scene.png")
    config, checkpoint = runs[RETINANET]
    call = [tmp_path / "scene.png", "--config", config, "--checkpoint", checkpoint, "--score-threshold", 0.0]
    run = command(*call, "--csv", tmp_path / "found.csv")
    assert run.returncode == 0 and run.stderr == f"written: {tmp_path / 'found.csv'}\n"
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert lines[0] == "picture,rank,index,name,score,x1,y1,x2,y2" and len(lines) > 5
    table = [line for line in run.stdout.splitlines() if "%" in line]
    assert len(table) == len(lines) - 1 and "scene.png" in table[0] and table[0].count(",") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "{config}", "--checkpoint", "{classifier}"], "not of a detector or segmentor"),
        (["--checkpoint", "{detector}"], "name its config too, --config FILE"),
        (["--config", "{config}", "--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--config", "{fpn}", "--checkpoint", "{segmentor}", "--score-threshold", "0.5"], "this is a segmentor"),
        (["--config", "{config}", "--checkpoint", "nowhere.pth", "--trust-checkpoint"], "nowhere.pth"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(options, message, runs, tmp_path):
    picture(90, 60).save(tmp_path / "scene.png")
    torch.save(create_timm_model("convmlp_s", num_classes=3).state_dict(), tmp_path / "classifier.pth")
    config, detector = runs[RETINANET]
    names = {"config": config, "detector": detector, "classifier": tmp_path / "classifier.pth"}
    names |= dict(zip(("fpn", "segmentor"), runs[FPN], strict=True))
    run = command(tmp_path / "scene.png", *(option.format(**names) for option in options))
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("convmlp: error: ") and message in run.stderr
