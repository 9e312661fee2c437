"""ConvMLPBackbone: its maps, its weights, what is trained, and the nine models built around it."""

import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from test_model import GOLDEN, WIDTHS, assert_matches_golden, golden_weights, image
from torch import nn

import convmlp
from convmlp.common.errors import CheckpointError
from convmlp.openmmlab import ConvMLPBackbone

# isort: split
# Only now can these be imported; they register the models
import mmdet.models  # noqa: F401
import mmseg.models  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
STRIDES = (4, 8, 16, 32)


@pytest.mark.parametrize("arch", list(WIDTHS))
@pytest.mark.parametrize("size", [(64, 96), (33, 75)])
def test_four_maps_at_the_strides_of_the_reference(arch, size):
    with torch.device("meta"):
        maps = ConvMLPBackbone(arch)(torch.zeros(2, 3, *size))
    expected = [
        (2, width, *(-(-side // stride) for side in size)) for width, stride in zip(WIDTHS[arch], STRIDES, strict=True)
    ]
    assert isinstance(maps, tuple)
    assert [tuple(m.shape) for m in maps] == expected


@torch.no_grad()
@pytest.mark.parametrize("case", ["square", "odd"])
def test_maps_equal_those_of_the_reference(case):
    backbone = golden_weights(ConvMLPBackbone("convmlp_s")).eval()
    golden = GOLDEN[case]
    for actual, feature in zip(backbone(image(*golden["size"])), golden["features"], strict=True):
        assert list(actual.shape) == feature["shape"]
        assert_matches_golden(actual, feature)


def test_it_is_one_class_for_both_libraries():
    for scope in ("mmdet", "mmseg"):
        with DefaultScope.overwrite_default_scope(scope):
            assert type(MODELS.build(dict(type="ConvMLPBackbone", arch="convmlp_s"))) is ConvMLPBackbone


@torch.no_grad()
def test_out_indices_choose_maps():
    backbone = ConvMLPBackbone().eval()
    chosen = ConvMLPBackbone(out_indices=[1, 3]).eval()
    chosen.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 3, 32, 64)
    maps = backbone(x)
    for actual, expected in zip(chosen(x), (maps[1], maps[3]), strict=True):
        assert torch.equal(actual, expected)


def test_output_stride_keeps_the_later_maps_large():
    with torch.device("meta"):
        backbone = ConvMLPBackbone(output_stride=8)
        maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (8, 12), (8, 12)]
    with pytest.raises(ValueError, match="output_stride must be one of 8, 16, 32, got 4"):
        ConvMLPBackbone(output_stride=4)


def test_what_lies_deeper_than_the_last_map_is_not_trained():
    backbone = ConvMLPBackbone(out_indices=(0, 2))
    sum(m.sum() for m in backbone(torch.randn(2, 3, 32, 32))).backward()
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in backbone.named_parameters() if not name.startswith(("stages.1", "stages.2"))}


@pytest.mark.parametrize("frozen_stages", range(-1, 5))
def test_frozen_stages_keep_parameters_and_statistics(frozen_stages):
    backbone = ConvMLPBackbone(frozen_stages=frozen_stages, drop_path_rate=0.0).train()
    prefixes = ("tokenizer.", "conv_stages.", "stages.0.", "stages.1.", "stages.2.")[: frozen_stages + 1]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad] or [torch.zeros(1)], lr=1.0)
    maps = backbone(torch.randn(2, 3, 32, 32))
    if frozen_stages < 4:
        sum(m.square().mean() for m in maps).backward()
        optimizer.step()
    same = {key for key, value in backbone.state_dict().items() if torch.equal(value, before[key])}
    assert {key for key in before if key.startswith(prefixes)} <= same if prefixes else True
    rest = {key for key in before if not (prefixes and key.startswith(prefixes))}
    assert not rest & same


def test_norm_eval_keeps_the_statistics_alone():
    backbone = ConvMLPBackbone(norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 9 and not any(m.training for m in norms)
    assert all(m.weight.requires_grad for m in norms)
    assert backbone.stages[0].blocks[1].drop_path.training
    assert all(m.training for m in ConvMLPBackbone().train().modules())


def test_with_cp_gives_the_same_gradients():
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for with_cp in (False, True):
        backbone = golden_weights(ConvMLPBackbone(with_cp=with_cp, drop_path_rate=0.0)).train()
        sum(m.square().mean() for m in backbone(x)).backward()
        gradients.append([p.grad for p in backbone.parameters()])
        assert backbone.stages[0].grad_checkpointing is with_cp
    torch.testing.assert_close(*gradients)


def test_drop_path_rate_in_chans_and_weight_init_reach_the_model():
    backbone = ConvMLPBackbone("convmlp_m", drop_path_rate=0.3, in_chans=1, weight_init="reference")
    assert backbone.weight_init == "reference"
    assert backbone.stages[1].blocks[-1].drop_path.drop_prob == 0.3
    assert backbone(torch.zeros(2, 1, 32, 32))[0].shape == (2, 64, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(arch="convmlp_x"), "got 'convmlp_x'; did you mean convmlp_"),
        (dict(out_indices=()), r"out_indices=\(\)"),
        (dict(out_indices=(0, 4)), r"from 0 to 3, got out_indices=\(0, 4\)"),
        (dict(out_indices=(2, 1)), r"increasing.*\(2, 1\)"),
        (dict(out_indices=(1, 1)), r"increasing.*\(1, 1\)"),
        (dict(frozen_stages=5), "frozen_stages must be between -1 and 4, got frozen_stages=5"),
        (dict(frozen_stages=-2), "frozen_stages=-2"),
        (dict(init_cfg=dict(type="Kaiming")), "type='Pretrained'.*Kaiming"),
        (dict(init_cfg="file.pth"), "got init_cfg='file.pth'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvMLPBackbone(**arguments)


def test_an_unknown_argument_is_an_error():
    with pytest.raises(TypeError, match="norm_evall"):
        ConvMLPBackbone(norm_evall=True)


# Weights


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return golden_weights(convmlp.convmlp_s()).state_dict()


@pytest.fixture
def classifier(tmp_path, weights) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.save(weights, tmp_path / "convmlp_s_imagenet.pth")
    return tmp_path / "convmlp_s_imagenet.pth", weights


def assert_loaded(backbone: ConvMLPBackbone, weights: dict[str, torch.Tensor]):
    own = backbone.state_dict()
    assert len(own) == 180  # 184 without norm and head
    assert all(torch.equal(value, weights[key]) for key, value in own.items())


def pretrained(checkpoint: object, **kwargs) -> ConvMLPBackbone:
    return ConvMLPBackbone(init_cfg=dict(type="Pretrained", checkpoint=str(checkpoint), **kwargs))


def test_weights_from_a_classifier_lose_their_head(classifier):
    file, weights = classifier
    for checkpoint in (file, file.as_uri()):
        backbone = pretrained(checkpoint)
        backbone.init_weights()
        assert_loaded(backbone, weights)


@pytest.mark.parametrize("wrap", ["model", "state_dict"])
def test_weights_inside_a_training_checkpoint(classifier, tmp_path, wrap):
    _, weights = classifier
    torch.save({wrap: {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "run.pth")
    backbone = pretrained(tmp_path / "run.pth")
    backbone.init_weights()
    assert_loaded(backbone, weights)


def test_published_weights_come_from_the_cache(classifier, tmp_path, monkeypatch):
    file, weights = classifier
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    file.rename(cache / file.name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = pretrained("imagenet")
    backbone.init_weights()
    assert_loaded(backbone, weights)


def test_published_weights_come_from_the_mirrors(classifier, tmp_path, monkeypatch):
    file, weights = classifier
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("convmlp.zoo.MIRRORS", (f"{tmp_path.as_uri()}/nowhere/", f"{file.parent.as_uri()}/"))
    backbone = pretrained("imagenet")
    backbone.init_weights()
    assert_loaded(backbone, weights)


def test_the_backbone_of_a_detector(classifier, tmp_path):
    _, weights = classifier
    detector = {f"backbone.{k}": v for k, v in weights.items() if not k.startswith(("norm.", "head."))}
    torch.save({"meta": {}, "state_dict": {**detector, "neck.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    with pytest.raises(CheckpointError, match="whole detector or segmentor: add prefix='backbone.'"):
        pretrained(tmp_path / "detector.pth").init_weights()
    for prefix in ("backbone.", "backbone"):
        backbone = pretrained(tmp_path / "detector.pth", prefix=prefix)
        backbone.init_weights()
        assert_loaded(backbone, weights)
    with pytest.raises(CheckpointError, match="no tensor whose name starts with bakbone"):
        pretrained(tmp_path / "detector.pth", prefix="bakbone").init_weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("stages.1.blocks.2.connect.weight"), "stages.1.blocks.2.connect.weight is missing"),
        (lambda w: w.update({"stages.3.x": torch.zeros(1)}), "stages.3.x is not in the model"),
        (lambda w: w.update({"conv_stages.downsample.bias": torch.zeros(3)}), r"conv_stages.downsample.bias is \(3,\)"),
    ],
)
def test_a_tensor_that_does_not_load_stops_the_run_with_its_name(classifier, change, message):
    file, weights = classifier
    weights = dict(weights)
    change(weights)
    torch.save(weights, file)
    with pytest.raises(CheckpointError, match=message):
        pretrained(file).init_weights()


def test_weights_of_another_variant_are_refused_by_name(tmp_path):
    torch.save(ConvMLPBackbone("convmlp_m").state_dict(), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="It fits convmlp_m"):
        pretrained(tmp_path / "m.pth").init_weights()


def test_code_in_a_file_of_weights_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    with open(tmp_path / "trap.pth", "wb") as file:
        pickle.dump(Trap(), file)
    with pytest.raises(CheckpointError):
        pretrained(tmp_path / "trap.pth").init_weights()
    assert not (tmp_path / "ran").exists()


# The nine models

DETECTION = [f"detection/{kind}_convmlp_{size}_fpn_1x_coco" for kind in ("retinanet", "maskrcnn") for size in "sml"]
SEGMENTATION = [f"segmentation/fpn_convmlp_{size}_512x512_40k_ade20k" for size in "sml"]
PARAMETERS = dict(
    zip(
        [*DETECTION, *SEGMENTATION],
        [18_742_484, 27_130_068, 52_896_004, 28_659_920, 37_047_504, 62_231_808, 12_759_158, 21_146_742, 46_331_046],
        strict=True,
    )
)


def conv(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def neck(widths: tuple[int, ...], extra: int) -> dict[str, tuple[int, ...]]:
    names = {}
    for i, width in enumerate(widths):
        names |= conv(f"neck.lateral_convs.{i}.conv", 256, width, 1, 1)
        names |= conv(f"neck.fpn_convs.{i}.conv", 256, 256, 3, 3)
    for i in range(extra):  # on the last map of the backbone, then on each other
        names |= conv(f"neck.fpn_convs.{len(widths) + i}.conv", 256, 256 if i else widths[-1], 3, 3)
    return names


def retinanet_names(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What mmdet 2 saved for a RetinaNet besides its backbone: 80 classes, 9 anchors."""
    names = neck(widths[1:], extra=2)
    for branch in ("cls", "reg"):
        for i in range(4):
            names |= conv(f"bbox_head.{branch}_convs.{i}.conv", 256, 256, 3, 3)
    return names | conv("bbox_head.retina_cls", 720, 256, 3, 3) | conv("bbox_head.retina_reg", 36, 256, 3, 3)


def maskrcnn_names(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What mmdet 2 saved for a Mask R-CNN besides its backbone: 80 classes and the background, 3 anchors."""
    names = neck(widths, extra=0)
    names |= conv("rpn_head.rpn_conv", 256, 256, 3, 3)
    names |= conv("rpn_head.rpn_cls", 3, 256, 1, 1) | conv("rpn_head.rpn_reg", 12, 256, 1, 1)
    names |= conv("roi_head.bbox_head.shared_fcs.0", 1024, 256 * 7 * 7)
    names |= conv("roi_head.bbox_head.shared_fcs.1", 1024, 1024)
    names |= conv("roi_head.bbox_head.fc_cls", 81, 1024) | conv("roi_head.bbox_head.fc_reg", 320, 1024)
    for i in range(4):
        names |= conv(f"roi_head.mask_head.convs.{i}.conv", 256, 256, 3, 3)
    names |= conv("roi_head.mask_head.conv_logits", 80, 256, 1, 1)
    return names | {"roi_head.mask_head.upsample.weight": (256, 256, 2, 2), "roi_head.mask_head.upsample.bias": (256,)}


def semantic_fpn_names(widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What mmseg 0 saved for a Semantic FPN besides its backbone: 150 classes; odd places hold upsampling."""
    names = neck(widths, extra=0) | conv("decode_head.conv_seg", 150, 128, 1, 1)
    for level, places in enumerate([(0,), (0,), (0, 2), (0, 2, 4)]):
        for place in places:
            name = f"decode_head.scale_heads.{level}.{place}"
            names |= conv(f"{name}.conv", 128, 128 if place else 256, 3, 3, bias=False)
            names |= {f"{name}.bn.{key}": (128,) for key in ("weight", "bias", "running_mean", "running_var")}
            names |= {f"{name}.bn.num_batches_tracked": ()}
    return names


@pytest.fixture(params=[*DETECTION, *SEGMENTATION])
def model(request) -> tuple[str, nn.Module]:
    cfg = Config.fromfile(ROOT / "configs" / f"{request.param}.py")
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        return request.param, MODELS.build(cfg.model)


@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")
def test_parameters_and_names_are_those_of_the_published_checkpoints(model):
    name, model = model
    arch = next(part for part in (f"convmlp_{size}" for size in "sml") if part in name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]

    rest = {"retinanet": retinanet_names, "maskrcnn": maskrcnn_names, "fpn": semantic_fpn_names}
    names = rest[Path(name).name.partition("_")[0]](WIDTHS[arch])
    with torch.device("meta"):
        backbone = getattr(convmlp, arch)(classifier_head=False).state_dict()
    if arch == "convmlp_s":
        published = {key: shape for key, shape in GOLDEN["shapes"].items() if not key.startswith(("norm.", "head."))}
        assert {key: list(value.shape) for key, value in backbone.items()} == published
    names |= {f"backbone.{key}": tuple(value.shape) for key, value in backbone.items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == names
