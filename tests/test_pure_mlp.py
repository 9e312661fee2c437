"""The model taken apart: each kind of convolution switched off alone, and all of them, which is Pure-MLP."""

from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convmlp.timm_models  # noqa: F401
from convmlp import ConvMLP, convmlp_s
from convmlp.common.errors import CheckpointError
from convmlp.layers import ChannelMLPBlock, ConvMLPBlock
from convmlp.variations import PURE_MLP, PURE_MLPS
from convmlp.weights import fitting_variant, load_pretrained

TINY = dict(blocks=(1, 2, 1), dims=(8, 16, 24), mlp_ratios=(2, 3, 2), channels=4, n_conv_blocks=2, num_classes=5)
SWITCHES = list(PURE_MLP)
combinations = pytest.mark.parametrize(
    "switches", [dict(zip(SWITCHES, values, strict=True)) for values in product((True, False), repeat=3)], ids=str
)


def tiny(**kwargs) -> ConvMLP:
    torch.manual_seed(0)
    return ConvMLP(**{**TINY, **kwargs}).eval()


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
    names = set(ConvMLPBlock(8, 2, 0.0).state_dict()) - set(ChannelMLPBlock(8, 2, 0.0).state_dict())
    assert names == {"connect.weight", "connect_norm.weight", "connect_norm.bias"}


@pytest.mark.parametrize(
    ("name", "parameters", "gmacs"),
    [("pure_mlp_s", 7_849_640, 1.115), ("pure_mlp_m", 16_143_016, 2.399), ("pure_mlp_l", 39_892_744, 6.431)],
)
def test_parameters_and_multiply_adds_of_the_baselines(name, parameters, gmacs):
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
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
    assert fitting_variant(ConvMLP(**PURE_MLPS["pure_mlp_s"], num_classes=7).state_dict()) == "pure_mlp_s"
    assert fitting_variant(convmlp_s(num_classes=7, in_chans=1).state_dict()) == "convmlp_s"


def test_features_of_the_baseline_by_timm():
    model = timm.create_model("pure_mlp_s", features_only=True, out_indices=(1, 3))
    assert [tuple(m.shape) for m in model(torch.zeros(1, 3, 64, 64))] == [(1, 128, 8, 8), (1, 512, 2, 2)]
