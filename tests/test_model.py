"""The model: sizes, names, numbers, and what can be done with it (features, heads, pruning, tracing, export)."""

import io
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convmlp
from convmlp import ConvMLP
from convmlp.layers import ConvMLPBlock, DropPath

GOLDEN = json.loads((Path(__file__).parent / "data" / "convmlp_s_golden.json").read_text())["convmlp_s"]

PARAMETERS = {  # by number of classes; None is classifier_head=False
    "convmlp_s": {1000: 9_022_920, 10: 8_515_050, 100: 8_561_220, 102: 8_562_246, 0: 8_508_896, None: 8_508_896},
    "convmlp_m": {1000: 17_410_504, 10: 16_902_634, 100: 16_948_804, 102: 16_949_830, 0: 16_896_480, None: 16_896_480},
    "convmlp_l": {1000: 42_728_440, 10: 41_967_130, 100: 42_036_340, 102: 42_037_878, 0: 41_957_904, None: 41_957_904},
}
WIDTHS = {"convmlp_s": (64, 128, 256, 512), "convmlp_m": (64, 128, 256, 512), "convmlp_l": (96, 192, 384, 768)}
BLOCKS = {"convmlp_s": (2, 4, 2), "convmlp_m": (3, 6, 3), "convmlp_l": (4, 8, 3)}
STRIDES = (4, 8, 16, 32)
TINY = dict(blocks=(1, 2, 1), dims=(8, 16, 24), mlp_ratios=(2, 3, 2), channels=4, n_conv_blocks=1, num_classes=5)
TINY_WIDTHS = (4, 8, 16, 24)

each_variant = pytest.mark.parametrize("variant", list(WIDTHS))


def build(variant: str, **kwargs) -> ConvMLP:
    return getattr(convmlp, variant)(**kwargs)


def golden_weights(model: nn.Module) -> nn.Module:
    """Give every entry the values that the golden outputs were made with; none stays at 0 or 1."""

    def values(name: str, shape: torch.Size) -> np.ndarray:
        a = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(tuple(shape))
        if name.endswith("running_var"):
            return 0.5 + np.abs(a)
        if len(shape) == 1:
            return 1 + 0.1 * a if name.endswith("weight") else 0.1 * a
        return a * 1.6 / math.sqrt(math.prod(shape[1:]))

    model.load_state_dict(
        {
            name: torch.zeros_like(value)
            if name.endswith("num_batches_tracked")
            else torch.from_numpy(values(name, value.shape)).to(value.dtype)
            for name, value in model.state_dict().items()
        }
    )
    return model


def tiny(**kwargs) -> ConvMLP:
    return golden_weights(ConvMLP(**{**TINY, **kwargs})).eval()


def image(*size: int, seed: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size)).float()


def assert_close(actual, expected, tolerance: float = 1e-5):
    """Largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# Size and names


@pytest.mark.parametrize("classes", [1000, 10, 100, 102, 0, None])
@each_variant
def test_parameter_counts_are_the_published_ones(variant, classes):
    with torch.device("meta"):
        model = build(variant, classifier_head=False) if classes is None else build(variant, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant][classes]


@pytest.mark.parametrize(("variant", "entries"), [("convmlp_s", 184), ("convmlp_m", 262), ("convmlp_l", 307)])
def test_state_dict_has_as_many_entries_as_the_published_checkpoint(variant, entries):
    with torch.device("meta"):
        assert len(build(variant).state_dict()) == entries


def test_names_order_and_shapes_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        state_dict = convmlp.convmlp_s().state_dict()
    assert [(name, list(value.shape)) for name, value in state_dict.items()] == list(GOLDEN["shapes"].items())


@pytest.mark.parametrize(("variant", "gmacs"), [("convmlp_s", 2.385), ("convmlp_m", 3.929), ("convmlp_l", 9.870)])
def test_multiply_adds_at_224_are_the_published_ones(variant, gmacs):
    with torch.device("meta"):
        model, x = build(variant).eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert round(counter.get_total_flops() / 2e9, 3) == gmacs


@torch.no_grad()
@pytest.mark.parametrize("weight_init", ["per_group", "reference"])
def test_initialisation_is_the_references_but_for_depthwise_convolutions(weight_init):
    for name, module in convmlp.convmlp_s(weight_init=weight_init).named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert weight.eq(1).all() and module.bias.eq(0).all(), name
        elif weight is not None:
            if isinstance(module, nn.Linear):
                std = 0.02
                assert module.bias.eq(0).all(), name
            else:  # Kaiming's, fan out, which PyTorch does not divide by the groups
                groups = 1 if weight_init == "reference" else module.groups
                std = math.sqrt(2 * groups / (module.out_channels * module.kernel_size[0] ** 2))
                assert module.bias is None or 0 < module.bias.abs().max() <= weight[0].numel() ** -0.5, name
            tolerance = 6 / math.sqrt(weight.numel())
            assert float(weight.std(correction=0)) == pytest.approx(std, rel=tolerance), name
            assert abs(weight.mean()) < tolerance * std, name


@torch.no_grad()
def test_all_but_the_depthwise_convolutions_start_alike():
    models = []
    for weight_init in ("per_group", "reference"):
        torch.manual_seed(0)
        models.append(ConvMLP(**TINY, weight_init=weight_init).state_dict())
    assert all(models[0][name].equal(models[1][name]) != name.endswith("connect.weight") for name in models[0])


def block_scales(model: ConvMLP) -> torch.Tensor:
    """Std of each block's output, and norm of the gradient of its depthwise convolution over the norm of that."""
    blocks = [module for module in model.modules() if isinstance(module, ConvMLPBlock)]
    stds: list[float] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: stds.append(float(output.detach().std())))
    nn.functional.cross_entropy(model.train()(image(8, 3, 32, 32)), torch.arange(8)).backward()
    weights = [block.connect.weight for block in blocks]
    return torch.tensor([stds, [float(w.grad.norm() / w.detach().norm()) for w in weights]])


@each_variant
def test_signal_and_gradient_keep_their_scale_through_all_blocks(variant):
    for weight_init, held in (("per_group", True), ("reference", False)):
        torch.manual_seed(0)
        stds, gradients = block_scales(build(variant, num_classes=10, weight_init=weight_init))
        assert len(stds) == sum(BLOCKS[variant])
        assert ((0.4 < stds) & (stds < 2.5)).eq(held).all(), stds
        assert (gradients < 0.1).eq(held).all(), gradients


# Numbers


@pytest.fixture(scope="module")
def golden_model() -> ConvMLP:
    return golden_weights(convmlp.convmlp_s()).eval()


def assert_matches_golden(actual: torch.Tensor, golden: dict):
    flat = actual.double().flatten()
    assert flat.numel() == golden["numel"]
    want = torch.tensor(golden["samples"], dtype=torch.float64)
    where = torch.linspace(0, flat.numel() - 1, len(want), dtype=torch.float64).long()
    scale = golden["std"]
    assert (flat[where] - want).abs().max() < 2e-5 * scale
    assert abs(flat.mean() - golden["mean"]) < 2e-5 * scale
    assert abs(flat.std() - golden["std"]) < 2e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize("case", ["square", "odd"])
def test_outputs_equal_those_of_the_reference(golden_model, case):
    golden = GOLDEN[case]
    x = image(*golden["size"])
    logits = golden_model(x)
    assert_matches_golden(logits, golden["logits"])
    assert logits.argmax(1).tolist() == golden["argmax"]
    maps = golden_model.forward_intermediates(x, intermediates_only=True)
    assert [list(m.shape) for m in maps] == [feature["shape"] for feature in golden["features"]]
    for actual, feature in zip(maps, golden["features"], strict=True):
        assert_matches_golden(actual, feature)


@torch.no_grad()
def test_channels_last_memory_gives_the_same_numbers(golden_model):
    x = image(2, 3, 64, 96)
    expected = golden_model(x)
    try:
        golden_model.to(memory_format=torch.channels_last)
        assert golden_model.conv_stages.downsample.weight.is_contiguous(memory_format=torch.channels_last)
        assert_close(golden_model(x.contiguous(memory_format=torch.channels_last)), expected)
    finally:
        golden_model.to(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("size", [(193, 257), (32, 32)])
@each_variant
def test_maps_follow_the_strides_at_any_size(variant, size):
    with torch.device("meta"):
        model, x = build(variant, num_classes=3).eval(), torch.empty(1, 3, *size)
    features, maps = model.forward_intermediates(x)
    expected = [
        (1, width, -(-size[0] // stride), -(-size[1] // stride))
        for width, stride in zip(WIDTHS[variant], STRIDES, strict=True)
    ]
    assert [tuple(m.shape) for m in maps] == expected
    assert tuple(features.shape) == expected[-1]
    assert model(x).shape == (1, 3)


@torch.no_grad()
def test_headless_forward_returns_the_last_map_channels_last():
    model, x = tiny(classifier_head=False), image(2, 3, 64, 96)
    out = model(x)
    assert out.shape == (2, 2, 3, TINY_WIDTHS[-1])
    assert_close(out.permute(0, 3, 1, 2), model.forward_intermediates(x, indices=1, intermediates_only=True)[0])
    assert not [name for name in model.state_dict() if name.startswith(("norm.", "head."))]


# Features


@each_variant
def test_feature_info_names_the_last_map_of_each_stride(variant):
    with torch.device("meta"):
        model = build(variant)
    modules = ("tokenizer", "conv_stages", "stages.0", "stages.2")
    assert model.feature_info == [
        dict(num_chs=width, reduction=stride, module=module)
        for width, stride, module in zip(WIDTHS[variant], STRIDES, modules, strict=True)
    ]
    assert all(isinstance(model.get_submodule(info["module"]), nn.Module) for info in model.feature_info)


def four_maps(model: ConvMLP, x: torch.Tensor) -> list[torch.Tensor]:
    """The levels, put together by hand."""
    stem = model.tokenizer(x)
    conv = model.conv_stages(stem)
    first = model.stages[0](conv)
    return [stem, conv, first, model.stages[2](model.stages[1](first))]


@torch.no_grad()
@pytest.mark.parametrize(
    ("indices", "levels"),
    [
        (None, [0, 1, 2, 3]),
        (1, [3]),
        (2, [2, 3]),
        (4, [0, 1, 2, 3]),
        ([0], [0]),
        ((1, 2), [1, 2]),
        ([-1], [3]),
        ([-4, 2], [0, 2]),
        ([3, 1], [1, 3]),
    ],
)
def test_intermediates_are_the_levels_asked_for_in_order_of_depth(indices, levels):
    model, x = tiny(), image(2, 3, 48, 65)
    expected = four_maps(model, x)
    features, maps = model.forward_intermediates(x, indices=indices)
    assert len(maps) == len(levels)
    for actual, level in zip(maps, levels, strict=True):
        assert_close(actual, expected[level])
    assert_close(features, model.forward_features(x))


@torch.no_grad()
def test_norm_applies_to_the_last_level_alone():
    model, x = tiny(), image(1, 3, 64, 64)
    plain = model.forward_intermediates(x, intermediates_only=True)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    for actual, expected in zip(normed[:-1], plain[:-1], strict=True):
        assert actual.equal(expected)
    assert_close(normed[-1], model.forward_features(x))
    assert not torch.allclose(normed[-1], plain[-1])


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2])
def test_stop_early_computes_nothing_deeper_and_returns_the_deepest_map(level):
    model, x = tiny(), image(1, 3, 64, 64)
    expected = four_maps(model, x)[level]
    ran = []
    for i, stage in enumerate([model.conv_stages, *model.stages]):
        stage.register_forward_hook(lambda *_, i=i: ran.append(i))
    features, (actual,) = model.forward_intermediates(x, indices=[level], stop_early=True)
    assert ran == list(range(level))
    assert_close(actual, expected)
    assert features.equal(actual)


@torch.no_grad()
def test_stop_early_at_the_last_level_still_returns_the_normed_features():
    model, x = tiny(), image(1, 3, 64, 64)
    features, _ = model.forward_intermediates(x, indices=[0, 3], stop_early=True)
    assert_close(features, model.forward_features(x))


@torch.no_grad()
def test_intermediates_can_be_channels_last():
    model, x = tiny(), image(1, 3, 64, 96)
    features, nhwc = model.forward_intermediates(x, output_fmt="NHWC", norm=True)
    assert features.shape == (1, 24, 2, 3)
    for actual, expected in zip(nhwc, model.forward_intermediates(x, norm=True, intermediates_only=True), strict=True):
        assert actual.equal(expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("indices", [0, 5, -1, [4], [-5], [], [0, 9]])
def test_levels_that_do_not_exist_are_refused(indices):
    model = tiny()
    for method in (
        lambda i: model.forward_intermediates(image(1, 3, 32, 32), indices=i),
        model.prune_intermediate_layers,
    ):
        with pytest.raises(ValueError, match="levels") as error:
            method(indices)
        assert f"indices={indices}" in str(error.value)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny().parameters())


def test_unknown_output_format_is_refused():
    with pytest.raises(ValueError, match="'NLC'"):
        tiny().forward_intermediates(image(1, 3, 32, 32), output_fmt="NLC")


# Heads


@torch.no_grad()
def test_pre_logits_are_what_the_head_classifies():
    model, x = tiny(), image(2, 3, 64, 64)
    features = model.forward_features(x)
    pre_logits = model.forward_head(features, pre_logits=True)
    assert_close(pre_logits, features.mean((2, 3)))
    assert_close(model.forward_head(features), model(x))
    assert_close(model.head(pre_logits), model(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("avg", lambda m: m.mean((2, 3))),
        ("max", lambda m: m.flatten(2).max(2).values),
        ("avgmax", lambda m: (m.mean((2, 3)) + m.flatten(2).max(2).values) / 2),
        ("", lambda m: m),
    ],
)
def test_global_pool_modes(mode, pool):
    x = image(2, 3, 64, 96)
    model = tiny(num_classes=0, global_pool=mode, final_norm=True)
    assert_close(model(x), pool(model.forward_features(x)))
    if mode:
        model = tiny(global_pool=mode)
        assert_close(model(x), model.head(pool(model.forward_features(x))))


@torch.no_grad()
def test_no_classes_means_pooled_features_and_final_norm_keeps_the_norm():
    x = image(2, 3, 64, 64)
    bare, normed = tiny(num_classes=0), tiny(num_classes=0, final_norm=True)
    last = bare.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    assert_close(bare(x), last.mean((2, 3)))
    assert_close(normed(x), normed.norm(last.permute(0, 2, 3, 1)).mean((1, 2)))
    assert not torch.allclose(bare(x), normed(x))


@torch.no_grad()
def test_dropout_sits_before_the_head_and_acts_in_training_only():
    model, features = tiny(drop_rate=0.5), torch.ones(64, 24, 1, 1)
    assert model.forward_head(features, pre_logits=True).unique().tolist() == [1.0]
    assert model.train().forward_head(features, pre_logits=True).unique().tolist() == [0.0, 2.0]


@torch.no_grad()
def test_reset_classifier_replaces_or_removes_the_head():
    model, x = tiny(), image(1, 3, 32, 32)
    features = model.forward_features(x)
    model.reset_classifier(70)
    assert model.get_classifier() is model.head
    assert (model.head.in_features, model.head.out_features, model.num_classes) == (TINY_WIDTHS[-1], 70, 70)
    assert model(x).shape == (1, 70)
    assert model.head.bias.count_nonzero() == 0
    assert 0.015 < model.head.weight.std() < 0.025
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, "")
    assert_close(model(x), features)
    model.reset_classifier(3, "max")
    assert_close(model(x), model.head(features.amax((2, 3))))


@torch.no_grad()
def test_reset_classifier_gives_a_headless_model_norm_and_head():
    model, x = tiny(classifier_head=False), image(2, 3, 32, 32)
    last = model(x)
    model.reset_classifier(5)
    assert_close(model(x), model.head(model.norm(last).mean((1, 2))))
    assert list(model.state_dict()) == list(tiny().state_dict())


@pytest.mark.parametrize("classifier_head", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_reset_classifier_keeps_dtype_and_mode(classifier_head, training):
    model = tiny(classifier_head=classifier_head).double().train(training)
    model.reset_classifier(4)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {module.training for module in model.modules()} == {training}


def test_reset_classifier_keeps_the_device():
    with torch.device("meta"):
        model = ConvMLP(**TINY, classifier_head=False)
    model.reset_classifier(4)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("arguments", "message"), [((-1,), "num_classes=-1"), ((4, ""), "num_classes=4"), ((4, "mean"), "'mean'")]
)
def test_reset_classifier_refuses_bad_values_and_leaves_the_model_as_it_was(arguments, message):
    model = tiny()
    head = model.head
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(*arguments)
    assert (model.num_classes, model.global_pool) == (5, "avg")
    assert model.head is head


# Pruning


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2])
def test_pruning_drops_what_is_deeper_and_keeps_the_maps(level):
    x = image(1, 3, 64, 65)
    whole, model = tiny(), tiny()
    expected = four_maps(whole, x)[: level + 1]
    assert model.prune_intermediate_layers([0, level - 4]) == [0, level]
    kept = ("tokenizer.", "conv_stages.", "stages.0.")[: level + 1]
    assert list(model.state_dict()) == [name for name in whole.state_dict() if name.startswith(kept)]
    features, maps = model.forward_intermediates(x)
    for actual, wanted in zip(maps, expected, strict=True):
        assert_close(actual, wanted)
    assert_close(features, expected[-1])
    assert_close(model(x), expected[-1])
    assert model.num_features == TINY_WIDTHS[level]
    model.reset_classifier(6, "avg")
    assert model(x).shape == (1, 6)

    model = tiny()
    model.prune_intermediate_layers([level], prune_head=False)  # a head of another width cannot stay
    assert_close(model(x), expected[-1])


@torch.no_grad()
def test_pruning_nothing_but_head_or_norm():
    x = image(1, 3, 64, 64)
    features = tiny().forward_features(x)
    last = four_maps(tiny(), x)[-1]

    model = tiny()
    assert model.prune_intermediate_layers(1) == [3]
    assert isinstance(model.head, nn.Identity)
    assert_close(model(x), features)

    model = tiny()
    model.prune_intermediate_layers([3], prune_norm=True)
    assert_close(model(x), last)

    model = tiny()
    assert model.prune_intermediate_layers(4, prune_head=False) == [0, 1, 2, 3]
    assert_close(model(x), tiny()(x))


# Training


def test_every_parameter_gets_a_gradient():
    model = ConvMLP(**TINY, drop_path_rate=0).train()
    (model(image(2, 3, 64, 64)) * image(2, 5)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_no_number():
    x = image(2, 3, 64, 64)
    models = [tiny(drop_path_rate=0).train() for _ in range(2)]
    calls = []
    models[1].set_grad_checkpointing()
    models[1].stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = [model(x) for model in models]
    for out in outputs:
        out.square().sum().backward()
    assert len(calls) == 2  # once more in the backward pass, or nothing was checkpointed
    assert_close(outputs[1], outputs[0])
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(q.grad, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max())), name
    for (name, a), b in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert a.equal(b), name
    assert models[1].tokenizer.block[1].num_batches_tracked == 1

    models[1].set_grad_checkpointing(False)
    models[1](x).square().sum().backward()
    assert len(calls) == 3


def test_gradient_checkpointing_trains_stages_behind_a_frozen_stem():
    model = tiny().train()
    model.set_grad_checkpointing()
    model.tokenizer.requires_grad_(False)
    model.conv_stages.requires_grad_(False)
    model(image(2, 3, 64, 64)).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if not n.startswith(("tokenizer.", "conv_stages."))
    }


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.0])
@each_variant
def test_stochastic_depth_ramps_up_anew_in_every_stage(variant, rate):
    with torch.device("meta"):
        model = build(variant, drop_path_rate=rate)
    for stage, n_blocks in zip(model.stages, BLOCKS[variant], strict=True):
        ramp = [block.drop_path.drop_prob for block in stage.blocks]
        assert ramp == pytest.approx([rate * i / (n_blocks - 1) for i in range(n_blocks)])


@each_variant
def test_stochastic_depth_is_a_tenth_by_default(variant):
    with torch.device("meta"):
        assert build(variant).stages[-1].blocks[-1].drop_path.drop_prob == 0.1


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(8000, 2, 2, 3))
    assert torch.equal(out, out[:, :1, :1, :1].expand_as(out))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert float((out == 0).float().mean()) == pytest.approx(0.25, abs=0.025)  # five standard deviations
    assert float(out.mean()) == pytest.approx(1, abs=0.035)
    x = torch.randn(3, 2, 2, 3)
    assert drop.eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@torch.no_grad()
def test_a_block_drops_each_mlp_by_itself_and_never_the_convolution():
    torch.manual_seed(0)
    block = golden_weights(ConvMLPBlock(6, 2, drop_path=0.5)).train()
    x = torch.randn(1, 3, 3, 6).expand(200, 3, 3, 6)
    keep = []
    for first in (0, 2):
        y = x[:1] + first * block.channel_mlp1(block.norm1(x[:1]))
        y = block.connect(block.connect_norm(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        keep += [y + second * block.channel_mlp2(block.norm2(y)) for second in (0, 2)]
    out = block(x)
    outcome = torch.stack([(out - y).abs().amax((1, 2, 3)) < 1e-4 for y in keep])
    assert outcome.sum(0).eq(1).all()
    assert outcome.sum(1).min() > 20


# Other devices and compilers


@each_variant
def test_meta_device_allocates_nothing_and_gives_shapes(variant):
    with torch.device("meta"):
        model, x = build(variant), torch.empty(2, 3, 96, 64)
    tensors = [*model.parameters(), *model.buffers(), model(x), *model.forward_intermediates(x)[1]]
    assert {t.device.type for t in tensors} == {"meta"}
    assert tensors[-1].shape == (2, WIDTHS[variant][-1], 3, 2)


@pytest.fixture(params=[True, False], ids=["head", "headless"])
def small(request) -> ConvMLP:
    return tiny(classifier_head=request.param)


@torch.no_grad()
def test_symbolic_trace_gives_the_same_numbers(small):
    traced = torch.fx.symbolic_trace(small)
    for size in [(2, 3, 64, 64), (1, 3, 49, 97)]:
        assert_close(traced(image(*size)), small(image(*size)))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:FutureWarning")
def test_torchscript_gives_the_same_numbers_also_after_saving(small):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(small), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for size in [(2, 3, 64, 64), (1, 3, 49, 97)]:
        assert_close(scripted(image(*size)), small(image(*size)))


@torch.no_grad()
def test_export_with_dynamic_batch_and_size_gives_the_same_numbers(small):
    dim = torch.export.Dim  # from 33 px: a last map of one pixel is a case of its own to torch.export
    dynamic = ({0: dim("b", min=1, max=16), 2: dim("h", min=33, max=512), 3: dim("w", min=33, max=512)},)
    program = torch.export.export(small, (image(2, 3, 64, 96),), dynamic_shapes=dynamic)
    for size in [(2, 3, 64, 96), (1, 3, 33, 64), (3, 3, 49, 97)]:
        assert_close(program.module()(image(*size)), small(image(*size)))


@pytest.mark.parametrize("training", [False, True])
def test_compile_needs_no_graph_break(training):
    model = tiny(drop_path_rate=0.5 * training).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = image(2, 3, 64, 64)
    torch.manual_seed(0)
    actual = compiled(x)
    torch.manual_seed(0)
    assert_close(actual, model(x))


# Bad input


@each_variant
def test_unknown_keywords_are_refused(variant):
    with pytest.raises(TypeError, match="drop_path"):
        build(variant, drop_path=0.1)


@pytest.mark.parametrize(
    "bad",
    [
        dict(blocks=(1, 2)),
        dict(blocks=(), dims=(), mlp_ratios=()),
        dict(blocks=(1, -2, 1)),
        dict(dims=(8, 0, 24)),
        dict(mlp_ratios=(2, 0, 2)),
        dict(mlp_ratios=(2, -1, 2)),
        dict(n_conv_blocks=-1),
        dict(channels=5),
        dict(channels=0),
        dict(in_chans=0),
        dict(num_classes=-1),
        dict(drop_rate=1.0),
        dict(drop_rate=-0.1),
        dict(drop_path_rate=1.0),
        dict(drop_path_rate=-0.1),
        dict(global_pool="mean"),
        dict(global_pool=""),
        dict(weight_init="kaiming"),
    ],
    ids=str,
)
def test_bad_values_are_refused_with_the_value(bad):
    with pytest.raises(ValueError, match="got") as error:
        ConvMLP(**{**TINY, **bad})
    name, value = list(bad.items())[0]
    assert name in str(error.value)
    assert repr(value) in str(error.value)


def test_the_single_stage_and_the_stage_without_blocks_are_models_too():
    model = ConvMLP(blocks=(2,), dims=(8,), mlp_ratios=(2,), channels=4, n_conv_blocks=0, num_classes=3).eval()
    assert [(info["module"], info["reduction"]) for info in model.feature_info] == [("tokenizer", 4), ("stages.0", 8)]
    assert [tuple(m.shape) for m in model.forward_intermediates(image(1, 3, 32, 32))[1]] == [(1, 4, 8, 8), (1, 8, 4, 4)]
    assert tiny(blocks=(0, 1, 0))(image(1, 3, 32, 32)).shape == (1, 5)
