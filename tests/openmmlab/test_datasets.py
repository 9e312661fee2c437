"""What boxes and label maps have in common: the place in the config, the number of classes, colours."""

from pathlib import Path

import numpy as np
import pytest
from digit_scenes import CLASSES as DIGITS
from mmengine.config import Config
from small_runs import CONFIGS, own_config

from convmlp.cli import run_openmmlab
from convmlp.openmmlab.configs import replace_root
from convmlp.openmmlab.datasets import Request, adapt_to_data, choose_palette

RETINANET = "detection/retinanet_convmlp_s_fpn_1x_coco.py"
FPN = "segmentation/fpn_convmlp_s_512x512_40k_ade20k.py"


@pytest.mark.parametrize(("config", "kind"), [(RETINANET, "single CocoDataset"), (FPN, "single folder of label maps")])
def test_data_that_cannot_be_followed_is_refused(config, kind, scenes, check):
    """Its classes could not be set, and it would be trained on with labels of a meaning of their own."""
    dataset = "_base_.train_dataloader.dataset"
    wrapper = f"dict(_delete_=True, type='ConcatDataset', datasets=[{dataset}, {dataset}])"
    own = own_config(config, f"train_dataloader = dict(dataset={wrapper})")
    code, text = check(own, scenes / own.parent.name)
    assert code == 2 and f"is not a {kind}" in text and "--classes config --skip-data-check" in text


def test_either_script_takes_both_kinds_of_config(scenes, said):
    for script in ("detection.py", "segmentation.py", "convmlp.openmmlab"):
        for config in (RETINANET, FPN):
            data = scenes / Path(config).parent.name
            assert run_openmmlab(script, [str(CONFIGS / config), str(data), "--check-data"]) == 0
            assert ("train boxes" if config == RETINANET else "train pixels") in said()


def test_weights_of_a_loss_must_fit_the_classes(scenes, check):
    Path("names.txt").write_text("\n".join(["background", *DIGITS, "ten"]))
    code, text = check("segmentation/quickstart_fpn.py", scenes / "segmentation", "--classes", "names.txt")
    assert code == 2 and "class_weight of a loss in the config has 11 values for 12 classes" in text


@pytest.mark.parametrize("config", [RETINANET, FPN])
def test_the_data_folder_replaces_the_configs_everywhere(config, scenes):
    cfg = Config.fromfile(CONFIGS / config)
    cfg.val_dataloader.batch_size = 3  # the test loader is no longer a copy, but in the same place
    old = cfg.data_root.rstrip("/")
    segmentation = config == FPN
    root = scenes / ("segmentation" if segmentation else "detection")
    replace_root(cfg, str(root))
    assert old not in cfg.pretty_text
    adapt_to_data(cfg, Request())
    datasets = [cfg[f"{part}_dataloader"].dataset for part in ("train", "val", "test")]
    paths = [[*dataset.data_prefix.values(), *filter(None, [dataset.get("ann_file")])] for dataset in datasets]
    assert paths[1] == paths[2] != paths[0]
    assert all(Path(path).exists() and Path(path).is_relative_to(root) for path in sum(paths, []))
    assert len({tuple(dataset.metainfo.classes) for dataset in datasets}) == 1
    if not segmentation:
        assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == datasets[1].ann_file


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "one class name a line"), ("a\n\nb\n", "without empty lines"), ("a\nb\na\n", "names 'a' more than once")],
)
def test_bad_lists_of_names_are_refused(scenes, check, text, message):
    Path("names.txt").write_text(text)
    code, said = check(RETINANET, scenes / "detection", "--classes", "names.txt")
    assert code == 2 and message in said


# Colours


def distances(palette: list) -> np.ndarray:
    colours = np.array(palette, dtype=float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    return apart[~np.eye(len(colours), dtype=bool)]


LEFT_RIGHT = ["background", "left", "right"]


@pytest.mark.parametrize(
    "palette", [[(1, 2, 3)] * 80, np.random.RandomState(42).randint(0, 255, (3, 3)).tolist(), None]
)
def test_colours_that_nobody_chose_give_way_to_others_that_can_be_told_apart(palette):
    """mmdet gives COCO's to any classes, mmseg draws random ones."""
    chosen = choose_palette([dict(classes=LEFT_RIGHT, palette=palette)], LEFT_RIGHT)
    assert chosen[0] == (0, 0, 0) and distances(chosen).min() > 150


def test_colours_that_belong_to_the_names_stay():
    metas = [dict(classes=["a", "b", "c"], palette=[(9, 9, 9)] * 3), dict(classes=LEFT_RIGHT, palette=[[1, 2, 3]] * 3)]
    assert choose_palette(metas, LEFT_RIGHT) == [(1, 2, 3)] * 3


@pytest.mark.parametrize(("number", "apart"), [(10, 50), (20, 20), (40, 1)])
def test_every_class_has_a_colour_of_its_own(number, apart):
    palette = choose_palette([], [str(i) for i in range(number)])
    assert len(palette) == number and distances(palette).min() > apart


def test_images_of_a_test_have_the_same_colours_as_predicted_ones(scenes):
    for config in (RETINANET, FPN):
        cfg = Config.fromfile(CONFIGS / config)
        replace_root(cfg, str(scenes / Path(config).parent.name))
        adapt_to_data(cfg, Request(check="none"))
        meta = cfg.test_dataloader.dataset.metainfo
        assert [tuple(colour) for colour in meta.palette] == choose_palette([], meta.classes)
