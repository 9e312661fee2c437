"""Detectors and segmentors with random weights, for three classes, and images for them."""

from pathlib import Path

import numpy as np
import torch
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from convmlp.openmmlab.configs import read_config, replace_sync_bn

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RETINANET = CONFIGS / "detection/quickstart_retinanet.py"
MASKRCNN = CONFIGS / "detection/quickstart_maskrcnn.py"
FPN = CONFIGS / "segmentation/quickstart_fpn.py"
FRUIT = ["apple", "pear", "plum"]

# Heads that were not trained are sure of nothing
BODY = "backbone=dict(arch='tiny'), neck=dict(in_channels=[8, 8, 16, 32])"
UNSURE = {
    RETINANET: f"model = dict({BODY}, bbox_head=dict(num_classes=3), test_cfg=dict(score_thr=0.0, max_per_img=20))",
    MASKRCNN: f"model = dict({BODY}, roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)), "
    "test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=6)))",
    FPN: f"model = dict({BODY}, decode_head=dict(num_classes=3, loss_decode=dict(class_weight=[1.0, 2.0, 3.0])))",
}


def build(config: str | Path) -> torch.nn.Module:
    """A model with weights that react to what they see."""
    cfg = read_config(str(config))
    torch.manual_seed(0)
    replace_sync_bn(cfg.model)
    del cfg.model.backbone["init_cfg"]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        network = MODELS.build(cfg.model)
    for name, value in network.named_parameters():
        if "cls" in name and name.endswith("bias"):
            value.data.zero_()
    return network


def save(network: torch.nn.Module, path: Path, **meta: object) -> str:
    torch.save({"meta": meta, "state_dict": network.state_dict()}, path)
    return str(path)


def image_of(width: int, height: int, seed: int = 0) -> Image.Image:
    rough = np.random.RandomState(seed).randint(0, 256, (7, 9, 3)).astype(np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
