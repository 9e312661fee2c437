"""Variations: each kind of convolution switched off alone, all of them, which is Pure-MLP, and dilated maps."""

from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convmlp.timm_models  # noqa: F401
from convmlp import ConvMLP, convmlp_s
from convmlp.common.errors import CheckpointError
from convmlp.layers import ConvMLPBlock
from convmlp.model import init_weights
from convmlp.variations import PURE_MLP, PURE_MLPS, ChannelMLPBlock, PatchMerging, ablate, build, dilate
from convmlp.weights import fitting_variant, load_pretrained

TINY = dict(blocks=(1, 2, 1), dims=(8, 16, 24), mlp_ratios=(2, 3, 2), channels=4, n_conv_blocks=2, num_classes=5)
SWITCHES = list(PURE_MLP)
combinations = pytest.mark.parametrize(
    "switches", [dict(zip(SWITCHES, values, strict=True)) for values in product((True, False), repeat=3)], ids=str
)


def tiny(**kwargs) -> ConvMLP:
    torch.manual_seed(0)
    return build(**{**TINY, **kwargs}).eval()


def mixing_layers(model: nn.Module) -> set[str]:
    """The convolutions that see beyond their own patch."""
    return {
        name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > min(m.stride)
    }


@combinations
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 35)])
def test_every_combination_has_the_maps_of_convmlp(switches, size):
    x = torch.randn(2, 3, *size)
    expected = [m.shape for m in tiny().forward_intermediates(x, intermediates_only=True)]
    model = tiny(**switches)
    assert [m.shape for m in model.forward_intermediates(x, intermediates_only=True)] == expected
    assert model(x).shape == (2, 5)


def test_each_switch_takes_its_own_convolutions_away():
    whole = mixing_layers(tiny())
    stage = {name for name in whole if name.startswith("tokenizer") or name.startswith("conv_stages.conv_blocks")}
    downsampling = {name for name in whole if "downsample" in name}
    connect = {name for name in whole if name.endswith("connect")}
    assert stage and downsampling and connect and stage | downsampling | connect == whole
    assert mixing_layers(tiny(conv_downsample=False)) == whole - downsampling
    assert mixing_layers(tiny(spatial_connect=False)) == whole - connect
    assert mixing_layers(tiny(conv_stage=False)) == (whole - stage) - {"conv_stages.downsample"} | {
        "conv_stages.downsample_mlp.downsample",
        "conv_stages.blocks.0.connect",
        "conv_stages.blocks.1.connect",
    }


def test_pure_mlp_sees_each_patch_of_32_pixels_alone():
    model = tiny(**PURE_MLP)
    x = torch.randn(1, 3, 96, 96)
    other = x.clone()
    other[:, :, 32:64, 64:96] += 1
    changed = (model.forward_features(x) != model.forward_features(other)).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("switch", SWITCHES)
def test_one_kind_of_convolution_is_enough_to_see_the_neighbours(switch):
    model = tiny(**{**PURE_MLP, switch: True})
    x = torch.randn(1, 3, 96, 96)
    other = x.clone()
    other[:, :, 32:64, 32:64] += 1
    assert (model.forward_features(x) != model.forward_features(other)).any(1).sum() > 1


def test_blocks_without_the_depthwise_convolution_have_neither_it_nor_its_norm():
    block = ConvMLPBlock(8, 2, 0.0)
    names = set(block.state_dict()) - set(ChannelMLPBlock(block).state_dict())
    assert names == {"connect.weight", "connect_norm.weight", "connect_norm.bias"}


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("pure_mlp_s", 7_849_640, 1.115), ("pure_mlp_m", 16_143_016, 2.399), ("pure_mlp_l", 39_892_744, 6.431)],
)
def test_parameters_and_multiply_adds_of_the_baselines(name, parameters, gmacs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name).eval()
        model(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert round(counter.get_total_flops() / 2e9, 3) == gmacs


def test_patch_merging_multiplies_each_patch_by_one_matrix():
    layer = tiny(**PURE_MLP).tokenizer
    x = torch.randn(2, 3, 8, 12)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (b, 2, 3, 48)
    expected = patches @ layer.projection.weight.flatten(1).T + layer.projection.bias
    assert torch.allclose(layer(x).permute(0, 2, 3, 1), expected, atol=1e-5)


@combinations
def test_every_combination_trains_with_gradient_checkpointing_to_the_same_gradients(switches):
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model = tiny(**switches, drop_path_rate=0.0).train()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_layer_groups_cover_every_parameter_in_order_of_depth():
    from timm.models import group_parameters

    with torch.device("meta"):
        model = timm.create_model("pure_mlp_s")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    depths = {name: groups[name] for name, _ in model.named_parameters()}
    assert depths["tokenizer.projection.weight"] == 0
    assert depths["conv_stages.blocks.0.norm1.weight"] < depths["conv_stages.downsample_mlp.projection.weight"] + 1
    assert depths["stages.0.blocks.0.norm1.weight"] < depths["stages.2.blocks.1.norm1.weight"] <= depths["head.weight"]


def test_weights_of_the_baseline_load_adapt_and_are_recognised(tmp_path):
    weights = tiny(**PURE_MLP).state_dict()
    torch.save(weights, tmp_path / "tiny.pth")
    model = tiny(**PURE_MLP, num_classes=3, in_chans=1)
    load_pretrained(model, tmp_path / "tiny.pth")
    first = "tokenizer.projection.weight"
    assert torch.allclose(model.state_dict()[first], weights[first].sum(1, keepdim=True))
    with pytest.raises(CheckpointError, match="tokenizer.block.0.weight is missing"):
        load_pretrained(tiny(), tmp_path / "tiny.pth")
    assert fitting_variant(build(**PURE_MLPS["pure_mlp_s"], num_classes=7).state_dict()) == "pure_mlp_s"
    assert fitting_variant(convmlp_s(num_classes=7, in_chans=1).state_dict()) == "convmlp_s"


def test_features_of_the_baseline_by_timm():
    with torch.device("meta"):
        model = timm.create_model("pure_mlp_s", features_only=True, out_indices=(1, 3))
        maps = model(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(1, 128, 8, 8), (1, 512, 2, 2)]


@pytest.mark.parametrize(
    "create", [lambda **kw: convmlp_s(**kw), lambda **kw: timm.create_model("convmlp_s", **kw)], ids=["zoo", "timm"]
)
def test_zoo_and_timm_take_the_switches(create):
    with torch.device("meta"):
        assert set(create(**PURE_MLP).state_dict()) == set(timm.create_model("pure_mlp_s").state_dict())
        assert create(conv_stage=False).tokenizer.projection.weight.shape == (64, 3, 4, 4)
        assert create(output_stride=8)(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
        assert create(output_stride=8).forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 8, 8)
        with pytest.raises(TypeError, match="conv_stages"):
            create(conv_stages=False)


@pytest.mark.parametrize("create", [convmlp_s, lambda **kw: timm.create_model("convmlp_s", **kw)], ids=["zoo", "timm"])
def test_the_blocks_that_replace_bottlenecks_start_as_the_others(create):
    for weight_init, std in (("per_group", (2 / 9) ** 0.5), ("reference", (2 / 9 / 64) ** 0.5)):
        weight = create(conv_stage=False, weight_init=weight_init).conv_stages.blocks[0].connect.weight
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize("name", ["conv_stage", "conv_downsample", "spatial_connect", "output_stride"])
def test_the_class_has_the_arguments_of_the_paper_alone(name):
    with pytest.raises(TypeError, match=name):
        ConvMLP(**TINY, **{name: 8})


# A finished model


def test_ablation_keeps_the_weights_the_order_the_mode_the_type_and_the_device():
    torch.manual_seed(0)
    model = ConvMLP(**TINY).double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert ablate(model, **PURE_MLP) is model
    after = model.state_dict()
    assert list(after) == list(tiny(**PURE_MLP).state_dict())
    kept = after.keys() & before.keys()
    assert {name.partition(".")[0] for name in kept} == {"stages", "norm", "head"}
    assert all(after[name].equal(before[name]) for name in kept)
    assert {value.dtype for value in after.values()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    with torch.device("meta"):
        model = ConvMLP(**TINY)
    assert {p.device.type for p in ablate(model, **PURE_MLP).parameters()} == {"meta"}


def test_ablation_twice_is_ablation_once():
    once, twice = tiny(**PURE_MLP), ablate(tiny(**PURE_MLP), **PURE_MLP)
    assert list(once.state_dict()) == list(twice.state_dict())


def test_new_layers_are_initialised_as_those_of_the_model():
    torch.manual_seed(0)
    layer = PatchMerging(64, 128, 4).projection
    torch.manual_seed(0)
    other = torch.nn.Conv2d(64, 128, 4, stride=4)
    init_weights(other)
    assert layer.weight.equal(other.weight)
    assert layer.weight.std().item() == pytest.approx((2 / (128 * 16)) ** 0.5, rel=0.02)
    blocks = tiny(conv_stage=False, channels=64).conv_stages.blocks
    assert blocks[0].channel_mlp1.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert blocks[1].channel_mlp2.fc2.bias.eq(0).all()


def test_stochastic_depth_ramps_up_in_the_stage_that_replaces_the_convolutions():
    blocks = tiny(conv_stage=False, n_conv_blocks=3, drop_path_rate=0.2, spatial_connect=False).conv_stages.blocks
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx([0, 0.1, 0.2])


def test_channel_mlps_of_the_new_stage_cannot_be_empty():
    with pytest.raises(ValueError, match="got channels=4, mlp_ratio=0.2"):
        tiny(mlp_ratios=(0.2, 1, 1), conv_stage=False)


# Dilation


@torch.no_grad()
@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (75, 131)])
def test_a_dilated_model_gives_the_same_values_more_densely(output_stride, size):
    plain, dilated = tiny(), tiny(output_stride=output_stride)
    dilated.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, *size)
    expected = plain.forward_intermediates(x, intermediates_only=True)
    actual = dilated.forward_intermediates(x, intermediates_only=True)
    for stride, one, other in zip((4, 8, 16, 32), actual, expected, strict=True):
        kept = min(stride, output_stride)
        assert one.shape[2:] == tuple(-(-side // kept) for side in size)
        every = stride // kept
        torch.testing.assert_close(one[..., ::every, ::every], other, rtol=1e-4, atol=1e-5)
    assert [info["reduction"] for info in dilated.feature_info] == [min(s, output_stride) for s in (4, 8, 16, 32)]


@pytest.mark.parametrize("output_stride", [0, 4, 12, 64, "16", 16.0, True])
def test_an_output_stride_that_no_stage_has_is_refused(output_stride):
    with pytest.raises(ValueError, match="output_stride must be one of 8, 16, 32, got") as error:
        dilate(tiny(), output_stride)
    assert repr(output_stride) in str(error.value)


def test_layers_over_patches_do_not_dilate():
    with pytest.raises(ValueError, match="cannot dilate, got output_stride=16"):
        tiny(output_stride=16, conv_downsample=False)
    assert tiny(output_stride=32, conv_downsample=False).feature_info[-1]["reduction"] == 32
