"""Which checkpoints the runner takes: all of a model to test or resume it, all of a backbone to start from."""

import pickle
from pathlib import Path

import pytest
import torch
from small_runs import FPN, RETINANET, quick_detection, quick_segmentation, run

from convmlp.openmmlab.checkpoints import read_run_checkpoint


@pytest.fixture
def boxes(scenes) -> Path:
    return scenes / "detection"


@pytest.fixture
def trained(finished) -> Path:
    return finished(RETINANET) / "epoch_1.pth"


@pytest.mark.parametrize("how", ["--resume", "--test"])
def test_code_in_a_checkpoint_does_not_run(how, boxes, said):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (Path("trap.ran").resolve(),))

    torch.save({"meta": Trap(), "state_dict": {}}, "trap.pth", pickle_module=pickle)
    assert run(RETINANET, boxes, how, "trap.pth", *quick_detection()) == 2
    assert "trap.pth is truncated, not a checkpoint, or holds more than tensors" in said()
    assert not Path("trap.ran").exists()


def test_a_published_checkpoint_of_the_old_libraries_is_tested(boxes, trained, said):
    """mmdet 2 and mmseg 0 wrote meta['CLASSES'], and names that are still those of the models."""
    ours = read_run_checkpoint(trained)
    classes = ours["meta"]["dataset_meta"]["classes"]
    old = {"meta": {"mmdet_version": "2.11.0", "CLASSES": classes}, "state_dict": ours["state_dict"], "optimizer": {}}

    def test() -> int:
        torch.save(old, "old.pth")
        return run(RETINANET, boxes, "--test", "old.pth", "--work-dir", "test", *quick_detection())

    assert test() == 0
    old["meta"]["CLASSES"] = tuple(reversed(classes))
    assert test() == 2
    assert "was trained for other classes (10) than this run has (10): nine / zero" in said()

    old["meta"]["CLASSES"] = classes
    del old["state_dict"]["neck.fpn_convs.1.conv.bias"]
    assert test() == 2
    assert "neck.fpn_convs.1.conv.bias is missing" in said()


def test_the_backbone_of_a_trained_detector_starts_another(scenes, trained, said):
    source = f"model.backbone.init_cfg.checkpoint={trained}"
    assert run(FPN, scenes / "segmentation", "--work-dir", "no", *quick_segmentation(source)) == 2
    assert "whole detector or segmentor: add prefix='backbone.'" in said()
    options = quick_segmentation(source, "model.backbone.init_cfg.prefix=backbone.", "train_cfg.max_iters=2")
    assert run(FPN, scenes / "segmentation", "--work-dir", "yes", *options) == 0
    tensors = sum(key.startswith("backbone.") for key in read_run_checkpoint(trained)["state_dict"])
    assert f"all {tensors} tensors loaded from {trained}" in said()


def test_starting_from_a_detector_of_other_classes_keeps_all_but_the_head(boxes, trained, said):
    Path("names.txt").write_text("three\nfour\n")
    options = quick_detection(f"load_from={trained}")
    assert run(RETINANET, boxes, "--work-dir", "two", "--classes", "names.txt", *options) == 0
    assert "parts of the model start from their initialisation: bbox_head.retina_cls" in said()

    spoiled = read_run_checkpoint(trained)
    del spoiled["state_dict"]["backbone.stages.0.blocks.0.connect.weight"]
    torch.save(spoiled, "spoiled.pth")
    assert run(RETINANET, boxes, "--work-dir", "three", *quick_detection("load_from=spoiled.pth")) == 2
    assert "backbone.stages.0.blocks.0.connect.weight is missing" in said()


def test_a_run_stops_when_the_backbone_does_not_load(boxes, said):
    weights = torch.load("tiny.pth")
    del weights["stages.1.blocks.0.norm2.bias"]
    torch.save(weights, "short.pth")
    options = quick_detection("model.backbone.init_cfg.checkpoint=short.pth")
    assert run(RETINANET, boxes, *options) == 2
    assert "short.pth does not fit the model: stages.1.blocks.0.norm2.bias is missing" in said()
    assert not list(Path("output").rglob("*.pth"))
