"""Runs of detection.py and segmentation.py from start to end: resuming, testing, folders that hold a run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from small_runs import (
    CONFIGS,
    FPN,
    LOADERS,
    MASKRCNN,
    QUICK,
    RETINANET,
    TINY_MASKS,
    logged,
    own_config,
    quick_detection,
    quick_segmentation,
    run,
    same_test,
)

import convmlp
from convmlp.cli import run_openmmlab
from convmlp.openmmlab.checkpoints import read_run_checkpoint


@pytest.fixture
def boxes(scenes) -> Path:
    return scenes / "detection"


SHAPES = [
    "train_dataloader.dataset.pipeline.2.scale=(128,64)",
    "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
    "model.data_preprocessor.size=(64,64)",
    "val_dataloader.dataset.pipeline.1.scale=(128,64)",
    *("train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"),
]
RECIPE_OPTIONS = {
    "retinanet": ["model.test_cfg.score_thr=0.0"],
    "maskrcnn": [option for option in TINY_MASKS if "per_img" in option or "sampler" in option],
    "fpn": SHAPES,
}
DETECTION_SIZES = ["train_dataloader.dataset.pipeline.2", "val_dataloader.dataset.pipeline.1"]
RECIPES = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.glob("*/*_convmlp_[sml]_*.py"))]


@pytest.mark.slow
@pytest.mark.parametrize("config", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_trains_and_evaluates(config, scenes, tmp_path, monkeypatch):
    head, arch = config.stem.partition("_")[0], "_".join(config.stem.split("_")[1:3])
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    start = getattr(convmlp, arch)().state_dict()
    torch.save(start, cache / f"{arch}_imagenet.pth")
    options = [*LOADERS, "default_hooks.logger.interval=1", *RECIPE_OPTIONS[head]]
    if head != "fpn":
        options += [f"{part}.scale=(64,64)" for part in DETECTION_SIZES] + ["train_cfg.max_epochs=1"]
    data = scenes / config.parent
    assert run(config, data, "--work-dir", "run", "--cfg-options", *same_test(options)) == 0

    log = logged("run")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == (2 if head == "fpn" else 6) and all(0 < loss < 1e4 for loss in losses)
    assert 0 <= log[-1]["mIoU" if head == "fpn" else "coco/bbox_mAP"] <= 100
    if head == "maskrcnn":
        assert {"loss_mask", "loss_rpn_cls"} <= log[0].keys()
    trained = read_run_checkpoint(next(Path("run").glob("*_[0-9].pth")))["state_dict"]
    for key in ("tokenizer.block.0.weight", "stages.2.blocks.0.channel_mlp1.fc1.weight"):
        assert trained[f"backbone.{key}"].shape == start[key].shape
        assert not torch.equal(trained[f"backbone.{key}"], start[key])
        torch.testing.assert_close(trained[f"backbone.{key}"], start[key], rtol=0, atol=1e-2)  # it started there


def test_own_classes_size_the_heads_and_are_kept(finished):
    checkpoint = read_run_checkpoint(finished(RETINANET) / "epoch_1.pth")
    assert checkpoint["meta"]["dataset_meta"]["classes"][8] == "eight"
    assert checkpoint["state_dict"]["bbox_head.retina_cls.weight"].shape[0] == 9 * 10
    log = next(finished(RETINANET).glob("*/*.log")).read_text()
    assert "10 classes: zero, one" in log and "test it: python -m convmlp.openmmlab" in log


@HOOKS.register_module()
class Interruption(Hook):
    """Ctrl-C at the beginning of an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs")
@pytest.mark.parametrize(
    ("config", "options", "iteration", "last", "at"),
    [
        (RETINANET, quick_detection(epochs=2), 4, "epoch_2.pth", (1, 3)),
        (FPN, quick_segmentation(), 3, "iter_4.pth", (0, 2)),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(config, options, iteration, last, at, scenes, finished, said):
    folder = scenes / Path(config).parent.name
    own = own_config(config, f"custom_hooks = [dict(type='Interruption', iteration={iteration})]")
    whole = finished(config)
    assert run(own, folder, "--work-dir", "broken", *options) == 130
    assert "--resume continues" in said()
    assert not Path("broken", last).exists()
    assert run(config, folder, "--work-dir", "broken", "--resume", *options) == 0
    assert f"resumed epoch: {at[0]}, iter: {at[1]}" in said()

    first, second = (read_run_checkpoint(path / last) for path in (whole, Path("broken")))
    for key in ("epoch", "iter"):
        assert first["meta"][key] == second["meta"][key]
    for key, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][key]), key
    assert first["param_schedulers"] == second["param_schedulers"]
    states = [checkpoint["optimizer"]["state"] for checkpoint in (first, second)]
    assert len(states[0]) == len(states[1]) > 40
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    rates = [{entry["step"]: entry["lr"] for entry in logged(path) if "lr" in entry} for path in (whole, "broken")]
    assert rates[0] == rates[1] and len(set(rates[0].values())) > 2


def test_resuming_takes_the_newest_checkpoint_that_can_be_read(boxes, copy_run, said):
    file = copy_run(RETINANET) / "epoch_2.pth"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert run(RETINANET, boxes, "--work-dir", "run", "--resume", *quick_detection(epochs=2)) == 0
    text = said()
    assert "epoch_2.pth is truncated" in text and "resumed epoch: 1, iter: 3" in text
    assert read_run_checkpoint(file)["meta"]["iter"] == 6


def test_resuming_needs_no_weights_to_start_from(boxes, copy_run):
    copy_run(RETINANET)
    Path("tiny.pth").unlink()
    assert run(RETINANET, boxes, "--work-dir", "run", "--resume", *quick_detection(epochs=3)) == 0
    assert Path("run/epoch_3.pth").exists()
    assert run(RETINANET, boxes, "--work-dir", "other", *quick_detection()) == 2


def test_resume_without_a_run_starts_one(boxes, finished, said):
    start = finished(RETINANET) / "epoch_1.pth"
    options = quick_detection(f"load_from={start}")
    assert run(RETINANET, boxes, "--work-dir", "other", "--resume", *options) == 0
    text = said()
    assert "nothing to resume in other" in text and re.search(rf"loaded \d+ tensors from {start}", text)
    assert Path("other/epoch_1.pth").exists()


def test_an_earlier_run_is_not_overwritten_by_accident(boxes, copy_run, said):
    before = (copy_run(RETINANET) / "epoch_1.pth").read_bytes()
    assert run(RETINANET, boxes, "--work-dir", "run", *quick_detection()) == 2
    assert "run holds a run: --resume continues it, --overwrite replaces it" in said()
    assert Path("run/epoch_1.pth").read_bytes() == before
    assert run(RETINANET, boxes, "--work-dir", "run", "--overwrite", *quick_detection()) == 0
    assert not Path("run/epoch_2.pth").exists()
    assert run(RETINANET, boxes, "--work-dir", "run", "--overwrite", *quick_detection()) == 0  # the lock was given back


def test_the_run_of_another_folder_is_not_mixed_with_one_that_is_there(boxes, copy_run, finished, said):
    copy_run(RETINANET)
    other = finished(RETINANET) / "epoch_1.pth"
    assert run(RETINANET, boxes, "--work-dir", "run", "--resume", other, *quick_detection()) == 2
    assert "run holds another run than" in said()


@pytest.mark.parametrize("config", [RETINANET, MASKRCNN, FPN])
def test_testing_a_checkpoint_reports_every_class_and_draws(config, scenes, finished, said):
    folder = scenes / Path(config).parent.name
    best = next(finished(config).glob("best_*.pth"))
    options = QUICK[config]()
    said()
    assert run(config, folder, "--test", best, "--work-dir", "test", "--show-dir", "images", *options) == 0
    table = said()
    key = "mIoU" if config == FPN else "coco/bbox_mAP"
    assert sorted(file.name for file in Path("images").iterdir()) == ["000001.png", "000002.png", "000003.png"]
    assert all(re.search(rf"\| +{name} +\|", table) for name in ("zero", "seven", "nine"))
    trained = max((entry for entry in logged(finished(config)) if key in entry), key=lambda entry: entry[key])
    tested = json.loads(next(Path("test").glob("*/*.json")).read_text())
    metrics = [key for key in trained if key == "mIoU" or key.startswith(("coco/bbox_mAP", "coco/segm_mAP"))]
    assert metrics and all(tested[key] == pytest.approx(trained[key], nan_ok=True) for key in metrics)


def test_a_config_without_training_is_tested(scenes, finished):
    """As of somebody who passes on a model to evaluate."""
    none = "\n".join(f"{key} = None" for key in ("optim_wrapper", "train_cfg", "train_dataloader", "param_scheduler"))
    own = own_config(FPN, none)
    checkpoint = finished(FPN) / "iter_4.pth"
    options = [option for option in quick_segmentation() if not option.startswith(("train", "param_scheduler"))]
    assert run(own, scenes / "segmentation", "--test", checkpoint, "--work-dir", "test", *options) == 0
    assert "mIoU" in json.loads(next(Path("test").glob("*/*.json")).read_text())


def test_images_of_the_best_checkpoint_at_the_end_of_training(scenes):
    options = quick_segmentation("train_cfg.max_iters=2", "train_cfg.val_interval=2")
    assert run(FPN, scenes / "segmentation", "--show-dir", "images", *options) == 0
    assert len(list(Path("images").glob("*.png"))) == 3
    assert Path("output/quickstart_fpn/iter_2.pth").exists()


@pytest.mark.parametrize("checkout", [True, False])
def test_the_line_that_a_run_ends_with_tests_it(checkout, boxes, said):
    if checkout:
        Path("detection.py").touch()
    names = Path("three four.txt")
    names.write_text("three\nfour\n")
    assert run(RETINANET, boxes, "--work-dir", "run", "--classes", names, *quick_detection()) == 0
    line = next(line for line in said().splitlines() if "test it: " in line)
    command = shlex.split(line.partition("test it: ")[2])
    program = ["python", "detection.py"] if checkout else ["python", "-m", "convmlp.openmmlab"]
    assert command[: len(program)] == program
    if checkout:
        assert run_openmmlab("detection.py", [*command[len(program) :], "--work-dir", "test"]) == 0
        assert len(list(Path("images").glob("*.png"))) == 3


def test_training_without_validation(boxes, said):
    without = ["val_dataloader=None", "val_cfg=None", "val_evaluator=None"]
    options = [option for option in quick_detection() if not option.startswith("val_")]
    assert run(RETINANET, boxes, "--work-dir", "run", *options, *without) == 0
    assert "so there is no best checkpoint; the last:" in said()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs")
def test_the_seed_decides(boxes):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(RETINANET, boxes, "--seed", seed, "--work-dir", name, *quick_detection()) == 0
    a, b, c = (read_run_checkpoint(f"{name}/epoch_1.pth")["state_dict"] for name in "abc")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert not torch.equal(a["bbox_head.retina_cls.weight"], c["bbox_head.retina_cls.weight"])
