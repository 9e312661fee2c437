"""Other heads of mmdet and mmseg around ConvMLPBackbone, by changes of their own configs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_scenes import write_detection, write_segmentation
from mmengine import __version__ as mmengine_version
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from packaging.version import Version

from convmlp.cli import run_openmmlab
from convmlp.openmmlab import ops

# isort: split
# Only now can these be imported
import mmdet
import mmseg
from mmdet.testing import demo_mm_inputs
from mmseg.structures import SegDataSample

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = [64, 128, 256, 512]
FEW_PROPOSALS = {
    "model.train_cfg.rpn_proposal.max_per_img": 20,
    "model.test_cfg.rpn.max_per_img": 20,
    "model.test_cfg.rcnn.max_per_img": 5,
}

# By their config in mmdet: what else is changed, and the parameters with 80 classes
DETECTORS: dict[str, tuple[dict[str, Any], int]] = {
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco": (FEW_PROPOSALS, 26_016_640),
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco": (FEW_PROPOSALS, 53_658_350),
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco": (FEW_PROPOSALS, 61_588_190),
    "atss/atss_r50_fpn_1x_coco": ({}, 16_608_058),
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco": ({}, 16_608_058),
    "gfl/gfl_r50_fpn_1x_coco": ({}, 16_753_273),
}
# By their file in mmseg; with 19 classes
D8 = {"model.backbone.output_stride": 8}
SEGMENTORS: dict[str, tuple[dict[str, Any], int]] = {
    "upernet_r50": ({"model.decode_head.in_channels": WIDTHS, "model.auxiliary_head.in_channels": 256}, 38_715_654),
    "segformer_mit-b0": ({"model.decode_head.in_channels": WIDTHS}, 9_024_243),
    "deeplabv3plus_r50-d8": (
        {
            **D8,
            "model.decode_head.in_channels": 512,
            "model.decode_head.c1_in_channels": 64,
            "model.auxiliary_head.in_channels": 256,
        },
        22_809_974,
    ),
    "ocrnet_r50-d8": (
        {**D8, "model.decode_head.0.in_channels": 256, "model.decode_head.1.in_channels": 512},
        12_658_438,
    ),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``"),
    pytest.mark.filterwarnings("ignore:DeprecationWarning. `num_anchors`"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
]


def build(file: Path, scope: str, changes: dict[str, Any]) -> BaseModel:
    """A model of another project's config, on ConvMLP-S without random depth."""
    cfg = Config.fromfile(file)
    cfg.model.backbone = dict(type="ConvMLPBackbone", arch="convmlp_s", drop_path_rate=0.0)
    cfg.merge_from_dict(changes)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def check_a_step(model: BaseModel, batch: dict[str, list]) -> None:
    """A step of training with a finite loss, which moves every tensor of the backbone."""
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    losses = model.train().train_step(batch, OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01)))
    assert torch.isfinite(losses["loss"]) and losses["loss"] > 0
    unmoved = [name for name, p in model.backbone.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(DETECTORS)]
)
def test_a_detector_of_mmdet_trains_and_finds(name):
    changes, parameters = DETECTORS[name]
    file = Path(mmdet.__file__).parent / f".mim/configs/{name}.py"
    model = build(file, "mmdet", {"model.neck.in_channels": WIDTHS, **changes})
    assert sum(p.numel() for p in model.parameters()) == parameters

    masks = "mask" in name
    batch = demo_mm_inputs(2, (3, 64, 96), num_items=[2, 1], num_classes=80, with_mask=masks)
    check_a_step(model, batch)
    model.test_cfg.get("rcnn", model.test_cfg).score_thr = 0.0  # so that there is something to find
    with torch.no_grad():
        found = model.eval().test_step(batch)[0].pred_instances
    assert len(found) > 0 and found.bboxes.isfinite().all()
    assert found.labels.max() < 80
    assert ("masks" in found) == masks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(SEGMENTORS)]
)
def test_a_segmentor_of_mmseg_trains_and_labels(name):
    changes, parameters = SEGMENTORS[name]
    file = Path(mmseg.__file__).parent / f".mim/configs/_base_/models/{name}.py"
    size = {"model.data_preprocessor.size": (64, 96), "model.pretrained": None}
    model = build(file, "mmseg", {**size, **changes})
    assert sum(p.numel() for p in model.parameters()) == parameters

    meta = dict(img_shape=(64, 96), ori_shape=(64, 96))
    labels = torch.arange(19).repeat_interleave(324)[: 64 * 96].view(1, 64, 96)
    batch = dict(
        inputs=[torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8) for _ in range(2)],
        data_samples=[SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta) for _ in range(2)],
    )
    check_a_step(model, batch)
    with torch.no_grad():
        labelled = model.eval().test_step(batch)[0].pred_sem_seg.data
    assert labelled.shape == (1, 64, 96) and labelled.max() < 19


@pytest.mark.parametrize(("output_stride", "strides"), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16)), (32, (4, 8, 16, 32))])
def test_output_stride_of_the_backbone_keeps_maps_large(output_stride, strides):
    with torch.device("meta"):
        maps = MODELS.build(dict(type="ConvMLPBackbone", output_stride=output_stride))(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, w, 64 // s, 96 // s) for w, s in zip(WIDTHS, strides, strict=True)]


# By the scripts, as a user would


def logged(folder: Path) -> list[dict[str, Any]]:
    [file] = folder.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


DETECTION_CONFIG = """
_base_ = "mmdet::{base}_1x_coco.py"
custom_imports = dict(imports=["convmlp.openmmlab"])
model = dict(
    backbone=dict(_delete_=True, type="ConvMLPBackbone", arch="convmlp_s"),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    {heads}
)
default_hooks = dict(logger=dict(interval=1))
"""
FASTER_RCNN = """
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=32), bbox_head=dict(in_channels=32, fc_out_channels=32)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20)),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0)),
"""
DEFORMABLE_FCOS = "bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=1, dcn_on_last_conv=True),"


def detect(workplace: Path, base: str, heads: str) -> int:
    write_detection(workplace / "scenes", train=4, val=2, size=64, seed=0)
    (workplace / "own.py").write_text(DETECTION_CONFIG.format(base=base, heads=heads))
    single = ("num_workers=0", "persistent_workers=False")
    loaders = [f"{part}_dataloader.{key}" for part in ("train", "val") for key in single]
    sizes = ["train_dataloader.dataset.pipeline.2.scale=(64,64)", "val_dataloader.dataset.pipeline.1.scale=(64,64)"]
    options = ["--cfg-options", "train_cfg.max_epochs=1", *loaders, *sizes]
    return run_openmmlab("detection.py", ["own.py", "scenes", "--skip-data-check", *options])


needs_bases = pytest.mark.skipif(
    Version(mmengine_version) < Version("0.10.8"), reason="OpenMMLab's own mmengine does not find mmdet:: bases"
)


@needs_bases
@pytest.mark.slow
def test_a_config_based_on_mmdets_own_trains_by_the_script(workplace):
    assert detect(workplace, "faster_rcnn/faster-rcnn_r50_fpn", FASTER_RCNN) == 0
    log = logged(workplace / "output/own")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert "coco/bbox_mAP" in log[-1]


@needs_bases
@pytest.mark.skipif(not isinstance(sys.modules[ops.NAME], ops._StandIn), reason="mmcv has compiled operators here")
def test_an_operator_that_is_not_there_ends_the_script_in_one_line(workplace, capfd):
    assert detect(workplace, "fcos/fcos_r50-caffe_fpn_gn-head", DEFORMABLE_FCOS) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "detection.py: error: the operator modulated_deform_conv_forward needs an mmcv with compiled" in said


SEGMENTATION_CONFIG = """
_base_ = "{base}"
head = dict(
    channels=32,
    num_classes=150,
    norm_cfg=dict(type="SyncBN"),
    loss_decode=dict(type="CrossEntropyLoss"),
)
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(init_cfg=None),
    neck=None,
    decode_head=dict(_delete_=True, type="UPerHead", in_channels=[64, 128, 256, 512], in_index=[0, 1, 2, 3], **head),
    auxiliary_head=dict(type="FCNHead", in_channels=256, in_index=2, num_convs=1, **head),
)
train_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
"""


@pytest.mark.slow
def test_a_config_based_on_ours_with_another_decoder_trains_by_the_script(workplace):
    write_segmentation(workplace / "scenes", train=4, val=2, size=64, seed=0)
    base = ROOT / "configs/segmentation/fpn_convmlp_s_512x512_40k_ade20k.py"
    (workplace / "own.py").write_text(SEGMENTATION_CONFIG.format(base=base))
    assert run_openmmlab("segmentation.py", ["own.py", "scenes", "--skip-data-check"]) == 0

    log = logged(workplace / "output/own")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    assert all("aux.loss_ce" in entry for entry in log if "loss" in entry)
    assert 0 <= log[-1]["mIoU"] <= 100
    model = Config.fromfile(workplace / "output/own/own.py").model
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 11
