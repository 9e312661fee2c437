"""Runs of detection.py and segmentation.py in this process, on scenes of 64 px and with few weights."""

import json
from pathlib import Path
from typing import Any

from convmlp.cli import run_openmmlab

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
RETINANET = "detection/quickstart_retinanet.py"
MASKRCNN = "detection/quickstart_maskrcnn.py"
FPN = "segmentation/quickstart_fpn.py"

# A variant that the fixture `workplace` adds; its weights are in `tiny.pth` beside the scenes
TINY: dict[str, Any] = dict(blocks=(1, 1, 1), dims=(8, 16, 32), mlp_ratios=(1, 1, 1), channels=8, n_conv_blocks=1)
TINY_DETECTOR = [
    "model.neck.in_channels=[8,8,16,32]",
    "model.neck.out_channels=8",
    "model.bbox_head.in_channels=8",
    "model.bbox_head.feat_channels=8",
    "model.bbox_head.stacked_convs=1",
    "model.test_cfg.score_thr=0.0",  # every anchor is a finding, so that there is something to evaluate
]
TINY_MASKS = [
    "model.neck.in_channels=[8,8,16,32]",
    "model.neck.out_channels=8",
    "model.rpn_head.in_channels=8",
    "model.rpn_head.feat_channels=8",
    "model.roi_head.bbox_roi_extractor.out_channels=8",
    "model.roi_head.bbox_head.in_channels=8",
    "model.roi_head.bbox_head.fc_out_channels=8",
    "model.roi_head.mask_roi_extractor.out_channels=8",
    "model.roi_head.mask_head.in_channels=8",
    "model.roi_head.mask_head.conv_out_channels=8",
    "model.roi_head.mask_head.num_convs=1",
    "model.train_cfg.rpn_proposal.max_per_img=40",
    "model.train_cfg.rcnn.sampler.num=16",
    "model.test_cfg.rpn.max_per_img=20",
    "model.test_cfg.rcnn.max_per_img=5",
    "model.test_cfg.rcnn.score_thr=0.0",
]
TINY_SEGMENTOR = [
    "model.neck.in_channels=[8,8,16,32]",
    "model.neck.out_channels=8",
    "model.decode_head.in_channels=[8,8,8,8]",
    "model.decode_head.channels=8",
]
LOADERS = [f"{part}_dataloader.{key}" for part in ("train", "val") for key in ("num_workers=0", "persistent_workers=0")]


def same_test(options: list[str]) -> list[str]:
    """The test loader is a copy of the validation loader in the configs, and so are its options."""
    return options + [option.replace("val_dataloader", "test_dataloader") for option in options if "val_data" in option]


def quick_detection(*more: str, epochs: int = 1, model: list[str] = TINY_DETECTOR) -> list[str]:
    """Three steps an epoch, with nothing random in a step."""
    options = [
        *LOADERS,
        f"train_cfg.max_epochs={epochs}",
        "train_cfg.val_interval=1",
        f"param_scheduler.1.end={epochs}",
        f"param_scheduler.1.T_max={epochs}",
        "param_scheduler.0.end=2",
        "train_dataloader.dataset.pipeline.2.scale=(64,64)",
        "val_dataloader.dataset.pipeline.1.scale=(64,64)",
        "train_dataloader.batch_size=4",
    ]
    return _quick([*options, *model], more)


def quick_masks(*more: str, epochs: int = 1) -> list[str]:
    """As `quick_detection`, for Mask R-CNN."""
    return quick_detection(*more, epochs=epochs, model=TINY_MASKS)


def quick_segmentation(*more: str, model: list[str] = TINY_SEGMENTOR) -> list[str]:
    """Four steps, with nothing random in a step."""
    options = [
        *LOADERS,
        "model.data_preprocessor.size=(64,64)",
        "train_cfg.max_iters=4",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
        "param_scheduler.0.end=2",
        "param_scheduler.1.begin=2",
        "param_scheduler.1.end=4",
        "train_dataloader.batch_size=3",
    ]
    return _quick([*options, *model], more)


def _quick(options: list[str], more: tuple[str, ...]) -> list[str]:
    backbone = ["arch=tiny", "init_cfg.checkpoint=tiny.pth", "drop_path_rate=0.0"]
    options = [*(f"model.backbone.{option}" for option in backbone), "default_hooks.logger.interval=1", *options]
    return ["--cfg-options", *same_test(options), *more]


QUICK = {RETINANET: quick_detection, MASKRCNN: quick_masks, FPN: quick_segmentation}


def run(config: str | Path, *argv: object) -> int:
    """The exit code of a run of a config of ours, or of a path, by the script of its folder."""
    config = CONFIGS / config
    return run_openmmlab(f"{config.parent.name}.py", [str(config), *map(str, argv)])


def logged(work_dir: str | Path) -> list[dict[str, Any]]:
    """All that a run has measured, in order."""
    files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def own_config(base: str, text: str = "", name: str = "own.py") -> Path:
    """A config of the user's own, on top of one of ours, in a folder that says which script runs it."""
    file = Path("own", Path(base).parent, name).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"_base_ = {str(CONFIGS / base)!r}\n{text}\n")
    return file
