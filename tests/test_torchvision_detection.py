"""torchvision's detectors with a ConvMLP: maps, weights, what is trained, training, prediction and export."""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from test_imports import BLOCKED, python
from test_model import WIDTHS
from torchvision.models.detection import RetinaNet

import convmlp
from convmlp.common.errors import CheckpointError
from convmlp.torchvision_detection import ConvMLPWithFPN, faster_rcnn, mask_rcnn, retinanet

DETECTORS = (retinanet, faster_rcnn, mask_rcnn)
PUBLISHED_PARAMETERS = {  # RetinaNet and Mask R-CNN for 80 classes, by mmdet
    "convmlp_s": (18_742_484, 28_659_920),
    "convmlp_m": (27_130_068, 37_047_504),
    "convmlp_l": (52_896_004, 62_231_808),
}
PARTS = ("tokenizer", "conv_stages", "stages_0", "stages_1", "stages_2")


each_detector = pytest.mark.parametrize("detector", DETECTORS)
masks_slow = pytest.mark.parametrize("detector", [*DETECTORS[:2], pytest.param(mask_rcnn, marks=pytest.mark.slow)])


@pytest.fixture
def small_parts(monkeypatch):
    """A body and a pyramid of few channels in the place of ConvMLP-S and 256."""
    settings = dict(blocks=(1, 2, 1), dims=(8, 16, 24), mlp_ratios=(2, 3, 2), channels=4, n_conv_blocks=1)
    monkeypatch.setitem(convmlp.zoo.VARIANTS, "convmlp_s", settings)
    monkeypatch.setattr("convmlp.torchvision_detection.FPN_DIM", 16)


def count(model):
    return sum(p.numel() for p in model.parameters())


def small(detector, **settings):
    """A detector of two kinds of objects, at sizes that a test can wait for."""
    if detector is retinanet:
        few = dict(detections_per_img=5, topk_candidates=50)
    else:
        few = dict(box_detections_per_img=5, box_batch_size_per_image=32)
        few |= dict(rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=50)
    return detector(num_classes=3, min_size=64, **few, **settings)


def scene(color):
    """A bright square on noise, in torchvision's form."""
    image = torch.rand(3, 64, 96) * 0.3
    image[color, 16:48, 32:64] = 1
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 16:48, 32:64] = 1
    return image, {"boxes": torch.tensor([[32.0, 16, 64, 48]]), "labels": torch.tensor([color + 1]), "masks": mask}


def scenes():
    torch.manual_seed(0)
    return zip(scene(0), scene(1), strict=True)


def step(model, optimizer=None):
    """The losses of one step, taken if there is an optimizer."""
    losses = model(*scenes())
    if optimizer:
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def spread_scores(model):
    """Scores that differ: those of a fresh head are all but equal, and their order is chance."""
    head = model.head.classification_head if isinstance(model, RetinaNet) else model.roi_heads.box_predictor
    for parameter in head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
        else:
            torch.nn.init.zeros_(parameter)
    return model.eval()


@pytest.fixture
def weights(tmp_path):
    """A file of ConvMLP-S, or of its stand-in, with random values, BatchNorm's included."""
    model = convmlp.convmlp_s()
    state_dict = {
        key: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value + 1
        for key, value in model.state_dict().items()
    }
    path = tmp_path / "hub" / "checkpoints" / "convmlp_s_imagenet.pth"
    path.parent.mkdir(parents=True)
    torch.save(state_dict, path)
    return path, state_dict


@pytest.mark.parametrize("arch", list(WIDTHS))
@pytest.mark.parametrize("size", [(64, 96), (33, 75)])
def test_a_pyramid_at_strides_4_to_64(arch, size):
    with torch.device("meta"):
        backbone = ConvMLPWithFPN(arch)
        maps, pyramid = backbone.body(torch.zeros(2, 3, *size)), backbone(torch.zeros(2, 3, *size))
    assert {name: m.shape[1] for name, m in maps.items()} == dict(zip("0123", WIDTHS[arch], strict=True))
    sizes = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32, 64)]
    assert list(pyramid) == ["0", "1", "2", "3", "pool"]
    assert [tuple(m.shape) for m in pyramid.values()] == [(2, 256, *size) for size in sizes]


def test_retinanet_has_a_pyramid_at_strides_8_to_128():
    with torch.device("meta"):
        pyramid = retinanet().backbone(torch.zeros(1, 3, 256, 384))
    assert [tuple(m.shape[2:]) for m in pyramid.values()] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_the_maps_are_those_of_the_model_with_the_same_file(weights):
    x = torch.randn(1, 3, 64, 64)
    expected = convmlp.convmlp_s(pretrained=weights[0]).eval().forward_intermediates(x, intermediates_only=True)
    maps = ConvMLPWithFPN(pretrained=weights[0]).eval().body(x)
    for actual, wanted in zip(maps.values(), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("arch", list(PUBLISHED_PARAMETERS))
def test_parameters_are_those_of_mmdet_but_for_the_background(arch):
    with torch.device("meta"):
        # torchvision's RetinaNet has an output for each class it is told of
        assert count(retinanet(arch, num_classes=80)) == PUBLISHED_PARAMETERS[arch][0]
        # and its Mask R-CNN boxes and a mask for the background: four and one outputs more
        background = 4 * (1024 + 1) + (256 + 1)
        assert count(mask_rcnn(arch, num_classes=81)) == PUBLISHED_PARAMETERS[arch][1] + background


@pytest.mark.slow
@each_detector
def test_it_trains_and_predicts(detector):
    torch.manual_seed(0)
    model = small(detector)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    totals = [sum(step(model, optimizer).values()) for _ in range(10)]
    assert max(totals[-2:]) < 0.75 * totals[0], totals
    assert all(p.grad is not None for p in model.parameters())

    images = [torch.rand(3, 64, 96), torch.rand(3, 75, 51)]  # of different sizes
    with torch.no_grad():
        predictions = spread_scores(model)(images)
    for image, found in zip(images, predictions, strict=True):
        h, w = image.shape[1:]
        assert 0 < len(found["boxes"]) <= 5
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([w, h, w, h])).all()
        if detector is mask_rcnn:
            assert found["masks"].shape == (len(found["boxes"]), 1, h, w)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("frozen_stages", range(-1, 5))
def test_frozen_stages_keep_parameters_and_statistics(frozen_stages):
    torch.manual_seed(0)
    model = small(retinanet, frozen_stages=frozen_stages)  # in training mode from the start
    before = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    after = model.backbone.body.state_dict()
    changed = {key.partition(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert changed == set(PARTS[frozen_stages + 1 :])


@pytest.mark.usefixtures("small_parts")
def test_frozen_stages_drop_no_paths():
    frozen = ConvMLPWithFPN(frozen_stages=4, drop_path_rate=0.5)
    x = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(frozen(x)["pool"], frozen(x)["pool"])
    free = ConvMLPWithFPN(drop_path_rate=0.5)
    with torch.no_grad():
        assert not torch.equal(free(x)["pool"], free(x)["pool"])


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval_keeps_statistics_and_trains_the_rest(norm_eval):
    model = small(faster_rcnn, norm_eval=norm_eval).eval().train()
    before = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    after = model.backbone.body.state_dict()
    same = {key for key in after if torch.equal(after[key], before[key])}
    statistics = {key for key in after if "running_" in key or "num_batches" in key}
    assert same == (statistics if norm_eval else set())


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
@each_detector
def test_a_state_dict_brings_the_same_predictions(detector):
    trained = spread_scores(small(detector))
    fresh = small(detector, norm_eval=True, frozen_stages=4).eval()
    fresh.load_state_dict(trained.state_dict())
    images, _ = scenes()
    for actual, expected in zip(fresh(images), trained(images), strict=True):
        assert len(expected["boxes"]) and {*actual} == {*expected}
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.usefixtures("small_parts")
@each_detector
def test_pretrained_fills_the_body(detector, weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where True finds the published file without a network
    path, state_dict = weights
    for pretrained in (True, path, str(path)):
        body = detector(num_classes=2, pretrained=pretrained).backbone.body.state_dict()
        names = {key: key.replace("stages_", "stages.") if key.startswith("stages_") else key for key in body}
        assert {*names.values()} == {key for key in state_dict if not key.startswith(("norm.", "head."))}
        assert all(torch.equal(value, state_dict[names[key]]) for key, value in body.items())


def test_a_file_that_does_not_fill_the_body_is_refused(weights):
    path, state_dict = weights
    with pytest.raises(CheckpointError, match="It fits convmlp_s"):
        retinanet("convmlp_m", pretrained=path)
    del state_dict["stages.2.blocks.0.connect.weight"]
    torch.save(state_dict, path)
    with pytest.raises(CheckpointError, match="stages.2.blocks.0.connect.weight is missing"):
        retinanet("convmlp_s", pretrained=path)


@each_detector
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(arch="convmlp_xl"), "arch must be one of convmlp_s, convmlp_m, convmlp_l, got 'convmlp_xl'"),
        (dict(arch="ConvMLP_S"), "did you mean convmlp_s"),
        (dict(arch=None), "got None"),
        (dict(num_classes=1), "num_classes counts the background too, so it must be at least 2, got num_classes=1"),
        (dict(num_classes=None), "got num_classes=None"),
        (dict(frozen_stages=5), "frozen_stages must be between -1 and 4, got frozen_stages=5"),
        (dict(frozen_stages=-2), "got frozen_stages=-2"),
    ],
)
def test_wrong_arguments_end_in_one_error(detector, arguments, message):
    with pytest.raises(ValueError) as error:
        detector(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("out_indices", [(), (1, 0), (0, 0), (0, 4), (-1,)])
def test_maps_are_chosen_in_increasing_order(out_indices):
    with pytest.raises(ValueError, match="out_indices must be increasing numbers from 0 to 3"):
        ConvMLPWithFPN(out_indices=out_indices)


def test_what_lies_deeper_than_the_last_map_is_left_out():
    with torch.device("meta"):
        assert list(ConvMLPWithFPN(out_indices=(0, 2)).body) == ["tokenizer", "conv_stages", "stages_0"]


@each_detector
def test_unknown_keywords_are_refused(detector):
    with pytest.raises(TypeError, match="has no argument 'min_sizes'; did you mean min_size"):
        detector(min_sizes=64)
    with torch.device("meta"):
        assert detector(size_divisible=64).transform.size_divisible == 64


@pytest.mark.usefixtures("small_parts")
def test_grey_images_by_a_backbone_of_ones_own():
    model = RetinaNet(ConvMLPWithFPN(in_chans=1), 2, min_size=64, image_mean=[0.5], image_std=[0.25])
    with torch.no_grad():
        assert len(model.eval()([torch.rand(1, 64, 64)])) == 1


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
@masks_slow
def test_torchscript_predicts_the_same(detector):
    torch.manual_seed(0)
    model = spread_scores(small(detector))
    images, _ = scenes()
    _, predictions = torch.jit.script(model)(list(images))  # torchvision's scripts return (losses, predictions)
    for actual, expected in zip(predictions, model(images), strict=True):
        assert len(expected["boxes"])
        for key in expected:
            torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # the exporter's, of constants in torchvision's code
@each_detector
def test_onnx_predicts_the_same(detector):
    torch.manual_seed(0)
    model = spread_scores(small(detector))
    image = scene(0)[0]
    file = io.BytesIO()
    torch.onnx.export(model, ([image],), file, opset_version=17, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    expected = model([image])[0]
    found = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    assert len(expected["boxes"])
    for actual, value in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(actual, value.numpy(), rtol=1e-3, atol=1e-3)


def test_it_needs_torchvision_alone_and_nothing_else_brings_it_in():
    others = tuple(name for name in BLOCKED if name not in ("torchvision", "PIL"))
    code = "import convmlp, convmlp.zoo\nprint('convmlp.torchvision_detection' in sys.modules)\n"
    assert python(code + "from convmlp.torchvision_detection import retinanet", others) == "False\n"
