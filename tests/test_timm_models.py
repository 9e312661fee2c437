"""The models under timm: registration, pretrained weights, features, and timm's tools for fine-tuning."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from stand_ins import FIRST_CONV, TINY, Server, StateDict, assert_holds, flip, page, saved
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor

import convmlp.timm_models
from convmlp import ConvMLP
from convmlp.common.errors import CheckpointError, RunError
from convmlp.timm_models import create_timm_model, load_weights
from convmlp.zoo import VARIANTS

NAMES = [name + suffix for name in VARIANTS for suffix in ("", "_classification")]
FINE_TUNED = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "flowers102": (102, (0.4353, 0.3773, 0.2872), (0.2966, 0.2455, 0.2698)),
}
SMALL = {key: value for key, value in TINY.items() if key != "num_classes"}  # in the place of a variant's settings
WIDTHS = [4, 8, 16, 24]

each_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def on_meta(name: str, **kwargs) -> ConvMLP:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def create(name: str = "convmlp_s", **kwargs) -> torch.nn.Module:
    """A small model under the name of a large one."""
    return timm.create_model(name, **{**SMALL, **kwargs})


def random_weights(seed: int = 1, **kwargs) -> StateDict:
    """A state_dict of plausible size, without a value that an initialisation gives."""
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return torch.tensor(10 + seed)
        if name.endswith("running_var"):
            return torch.empty(value.shape).uniform_(0.5, 1.5, generator=generator)
        scale = 1.6 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1
        offset = 1 if value.ndim == 1 and name.endswith("weight") else 0
        return torch.empty(value.shape).normal_(offset, scale, generator=generator)

    return {name: values(name, value) for name, value in create(**kwargs).state_dict().items()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache, and no mirror that can be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("convmlp.zoo.MIRRORS", ("http://127.0.0.1:9/",))
    folder = tmp_path / "torch_home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def published() -> StateDict:
    """What stands in for the weights of a published file."""
    return random_weights()


@pytest.fixture
def cached(published, cache) -> Callable[[str], StateDict]:
    """Puts the stand-in of a variant into the cache and returns its weights."""

    def put(variant: str) -> StateDict:
        saved(published, cache / f"{variant}_imagenet.pth")
        return published

    return put


@pytest.fixture(scope="module")
def own_classes(tmp_path_factory) -> tuple[str, StateDict]:
    """A training checkpoint of one's own with seven classes."""
    weights = random_weights(seed=2, num_classes=7)
    file = tmp_path_factory.mktemp("own") / "best.pth"
    saved({"epoch": 4, "state_dict": weights, "class_names": list("abcdefg")}, file)
    return str(file), weights


# Registration


def test_timm_lists_the_six_models_and_their_weights():
    assert timm.list_models("convmlp*") == sorted(NAMES)
    tags = ["in1k", *(f"in1k_ft_{dataset}" for dataset in FINE_TUNED)]
    weights = [f"{v}.{tag}" for v in VARIANTS for tag in tags] + [f"{v}_classification.in1k" for v in VARIANTS]
    assert sorted(timm.list_pretrained("convmlp*")) == sorted(weights)
    assert set(NAMES) <= set(timm.list_models(module="timm_models"))


@pytest.mark.parametrize("name", NAMES)
def test_create_model_gives_the_model_with_its_settings(name):
    model = on_meta(name)
    variant = name.removesuffix("_classification")
    assert type(model) is ConvMLP
    with torch.device("meta"):
        reference = getattr(convmlp, variant)()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    assert shapes == {k: v.shape for k, v in reference.state_dict().items()}
    expected = dict(
        architecture=name,
        tag="in1k",
        url=f"https://shi-labs.com/projects/convmlp/checkpoints/{variant}_imagenet.pth",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        fixed_input_size=False,
        crop_pct=0.9,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="tokenizer.block.0",
        classifier="head",
        license="apache-2.0",
    )
    assert {key: model.default_cfg[key] for key in expected} == expected
    assert model.pretrained_cfg == model.default_cfg
    assert model.get_submodule(expected["first_conv"]).in_channels == 3
    assert model.get_submodule(expected["classifier"]).out_features == 1000
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[2:] == (7, 7)


@pytest.mark.parametrize("dataset", FINE_TUNED)
@each_variant
def test_fine_tuned_tags_bring_classes_and_normalisation(variant, dataset):
    classes, mean, std = FINE_TUNED[dataset]
    model = on_meta(f"{variant}.in1k_ft_{dataset}")
    assert model.num_classes == model.head.out_features == classes
    cfg = timm.data.resolve_data_config(model=model)
    assert (cfg["mean"], cfg["std"], cfg["crop_pct"], cfg["input_size"]) == (mean, std, 1.0, (3, 224, 224))
    assert model.default_cfg["url"].endswith(f"/checkpoints/{variant}_{dataset}.pth")


def test_arguments_reach_the_model():
    model = on_meta("convmlp_m", drop_path_rate=0.3, drop_rate=0.2, num_classes=9, in_chans=2, global_pool="max")
    assert [stage.blocks[-1].drop_path.drop_prob for stage in model.stages] == [0.3] * 3
    assert [stage.blocks[0].drop_path.drop_prob for stage in model.stages] == [0.0] * 3
    assert (model.head_drop.p, model.head.out_features, model.global_pool) == (0.2, 9, "max")
    assert model.tokenizer.block[0].in_channels == 2


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="drop_block"):
        on_meta("convmlp_s", drop_block=0.1)


# Weights


@pytest.mark.parametrize("suffix", ["", "_classification"])
@each_variant
def test_pretrained_takes_the_file_in_the_cache(variant, suffix, cached):
    weights = cached(variant)
    model = create(variant + suffix, pretrained=True)
    assert_holds(model, weights)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("convmlp_s", "convmlp_s_imagenet.pth"),
        ("convmlp_m_classification", "convmlp_m_imagenet.pth"),
        ("convmlp_l.in1k", "convmlp_l_imagenet.pth"),
        ("convmlp_s.in1k_ft_cifar10", "convmlp_s_cifar10.pth"),
        ("convmlp_m.in1k_ft_flowers102", "convmlp_m_flowers102.pth"),
    ],
)
@pytest.mark.parametrize("features_only", [False, True])
def test_pretrained_tries_the_mirrors_in_turn(name, file, features_only, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    classes = timm.get_pretrained_cfg(name).num_classes
    weights = random_weights(num_classes=classes)
    with Server() as server:
        monkeypatch.setattr("convmlp.zoo.MIRRORS", (f"{server.url}/old/", f"{server.url}/new/"))
        server.pages[f"/new/{file}"] = page(saved(weights, tmp_path / "file.pth").read_bytes())
        model = create(name, pretrained=True, features_only=features_only)
    assert server.asked == [f"/old/{file}", f"/new/{file}"]
    assert [path.name for path in cache.iterdir()] == [file]
    own = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    assert [key for key in own if not own[key].equal(weights[key])] == []
    assert len(own) >= len(weights) - 4  # without norm and head where there are only features


def test_where_no_mirror_answers_the_place_for_the_file_is_named(cache):
    for call in (lambda: create(pretrained=True), lambda: create_timm_model("convmlp_s", pretrained=True)):
        with pytest.raises(CheckpointError, match="http://127.0.0.1:9/convmlp_s_imagenet.pth: ") as error:
            call()
        assert str(cache / "convmlp_s_imagenet.pth") in str(error.value)


def test_a_damaged_file_in_the_cache_is_refused_by_name(cached, cache):
    weights = cached("convmlp_s")
    file = cache / "convmlp_s_imagenet.pth"
    data = file.read_bytes()
    file.write_bytes(flip(data, data.index(weights["head.weight"].numpy().tobytes()) + 5))
    with pytest.raises(CheckpointError, match="wrong checksum") as error:
        create(pretrained=True)
    assert str(file) in str(error.value)


def test_other_sources_of_weights_are_left_to_timm(own_classes, tmp_path):
    file, weights = own_classes
    for overlay in (dict(file=file), dict(state_dict=dict(weights)), dict(url=Path(file).as_uri())):
        model = create(pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
        assert_holds(model, weights)


def test_progress_is_shown_on_request(tmp_path, monkeypatch, published, capsys):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        monkeypatch.setattr("convmlp.zoo.MIRRORS", (f"{server.url}/",))
        body = page(saved(published, tmp_path / "file.pth").read_bytes())
        server.pages = {"/convmlp_s_imagenet.pth": body, "/convmlp_m_imagenet.pth": body}
        create("convmlp_s", pretrained=True)
        assert "%" not in capsys.readouterr().err
        create_timm_model("convmlp_m", pretrained=True, progress=True, **SMALL)
        assert "100%" in capsys.readouterr().err


def test_a_baseline_has_no_published_weights():
    with pytest.raises(RunError, match="--model pure_mlp_s: there are no published weights"):
        create_timm_model("pure_mlp_s", pretrained=True)


@each_variant
def test_pretrained_adapts_input_channels_and_classes(variant, cached):
    weights = cached(variant)
    model = create(variant, pretrained=True, in_chans=1, num_classes=5)
    assert_holds(model, weights, but=("head.", FIRST_CONV))
    assert torch.allclose(model.state_dict()[FIRST_CONV], weights[FIRST_CONV].sum(1, keepdim=True), atol=1e-6)
    assert model.head.weight.shape == (5, WIDTHS[-1])
    assert 0.015 < model.head.weight.std() < 0.025
    assert model.head.bias.count_nonzero() == 0


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_input_channels_are_adapted_as_without_timm(in_chans, cached, caplog):
    cached("convmlp_s")
    with caplog.at_level(logging.WARNING):
        model = create(pretrained=True, in_chans=in_chans)
    assert caplog.records == []
    reference = convmlp.convmlp_s(pretrained=True, in_chans=in_chans, **SMALL).state_dict()
    torch.testing.assert_close(model.state_dict(), reference)


def test_pretrained_without_classes_keeps_the_norm(cached):
    weights = cached("convmlp_s")
    model = create(pretrained=True, num_classes=0)
    assert_holds(model, weights)
    assert [name for name in weights if name not in model.state_dict()] == ["head.weight", "head.bias"]


@torch.no_grad()
def test_no_classes_gives_the_pre_logits_of_the_whole_model(cached):
    cached("convmlp_s")
    whole = create(pretrained=True).eval()
    x = torch.randn(2, 3, 64, 96)
    features = whole.forward_features(x)
    pooled = create(pretrained=True, num_classes=0).eval()
    assert_close(pooled(x), whole.forward_head(features, pre_logits=True))
    assert_close(whole.head(pooled(x)), whole(x))
    unpooled = create(pretrained=True, num_classes=0, global_pool="").eval()
    assert_close(unpooled(x), features)
    whole.reset_classifier(0)
    assert_close(whole(x), pooled(x))


def test_a_head_without_pooling_is_refused():
    with pytest.raises(ValueError, match="num_classes=1000"):
        on_meta("convmlp_s", global_pool="")


@pytest.mark.parametrize("pretrained_cfg_overlay", [{}, dict(num_classes=7)], ids=["", "table told"])
def test_a_checkpoint_of_ones_own_classes_loads_whole(pretrained_cfg_overlay, own_classes, caplog):
    file, weights = own_classes
    overlay = dict(file=file, **pretrained_cfg_overlay)
    with caplog.at_level(logging.WARNING):
        model = create(pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert_holds(model, weights)
    assert caplog.records == []
    assert model.default_cfg["num_classes"] == 7
    assert timm.get_pretrained_cfg("convmlp_s").num_classes == 1000
    assert_holds(create(num_classes=7, checkpoint_path=file), weights)


def test_a_checkpoint_of_other_classes_leaves_a_fresh_head_and_says_so(own_classes, caplog):
    file, weights = own_classes
    with caplog.at_level(logging.WARNING):
        model = create(pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=file, num_classes=3))
    assert_holds(model, weights, but=("head.",))
    assert 0.015 < model.head.weight.std() < 0.025
    assert "7 classes, the model 3" in caplog.text


def test_a_checkpoint_of_ones_own_input_channels_loads_whole(tmp_path):
    weights = random_weights(in_chans=4, num_classes=7)
    torch.save(weights, tmp_path / "own.pth")
    overlay = dict(file=str(tmp_path / "own.pth"))
    assert_holds(
        create(pretrained=True, in_chans=4, num_classes=7, pretrained_cfg_overlay=overlay),
        weights,
    )


def test_cache_dir_is_where_the_file_is_looked_for(tmp_path, published, cache):
    (tmp_path / "mine").mkdir()
    saved(published, tmp_path / "mine" / "convmlp_s_imagenet.pth")
    assert_holds(create(pretrained=True, cache_dir=tmp_path / "mine"), published)
    assert list(cache.iterdir()) == []


def test_the_file_of_another_variant_is_refused(cache):
    file = saved(convmlp.convmlp_s().state_dict(), cache / "convmlp_s_imagenet.pth")
    with pytest.raises(CheckpointError, match="It fits convmlp_s$"):
        on_meta("convmlp_m", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    os.link(file, cache / "convmlp_m_imagenet.pth")
    for kwargs in ({}, dict(num_classes=5), dict(num_classes=0), dict(features_only=True)):
        with pytest.raises(CheckpointError, match="convmlp_m_imagenet.pth does not fit .*It fits convmlp_s$"):
            on_meta("convmlp_m", pretrained=True, **kwargs)


@pytest.mark.parametrize("kwargs", [{}, dict(num_classes=5), dict(features_only=True)], ids=str)
@pytest.mark.parametrize(
    "name", ["stages.1.blocks.0.connect.weight", FIRST_CONV, "conv_stages.conv_blocks.0.1.running_mean"]
)
def test_a_file_that_lacks_an_entry_is_refused(name, kwargs, published, cache):
    torch.save({k: v for k, v in published.items() if k != name}, cache / "convmlp_s_imagenet.pth")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        create(pretrained=True, **kwargs)


# Features


@torch.no_grad()
@pytest.mark.parametrize("feature_cls", [None, "getter", "hook"])
@pytest.mark.parametrize("out_indices", [None, (0, 2), (1, 3), (3,), (-2, -1)])
def test_features_are_the_maps_of_the_levels(feature_cls, out_indices, cached):
    cached("convmlp_s")
    levels = [i % 4 for i in out_indices or range(4)]
    options = dict(feature_cls=feature_cls, out_indices=out_indices)
    model = create(pretrained=True, features_only=True, **options).eval()
    x = torch.randn(2, 3, 64, 97)
    whole = create(pretrained=True).eval()
    expected = whole.forward_intermediates(x, intermediates_only=True)
    actual = model(x)
    assert len(actual) == len(levels)
    for level, out in zip(levels, actual, strict=True):
        assert_close(out, expected[level])
    assert model.feature_info.channels() == [WIDTHS[level] for level in levels]
    assert model.feature_info.reduction() == [(4, 8, 16, 32)[level] for level in levels]


@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
@each_variant
def test_feature_shapes_are_nchw(variant, feature_cls):
    with torch.device("meta"):
        model = timm.create_model(variant, features_only=True, feature_cls=feature_cls)
        maps = model(torch.empty(2, 3, 96, 65))
    widths = [VARIANTS[variant]["channels"], *VARIANTS[variant]["dims"]]
    shapes = [(2, c, h, w) for c, h, w in zip(widths, (24, 12, 6, 3), (17, 9, 5, 3), strict=True)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert model.feature_info.channels() == widths


def test_features_keep_only_the_layers_they_need(cached):
    weights = cached("convmlp_s")
    model = create(pretrained=True, features_only=True, out_indices=(0, 1), in_chans=4)
    own = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    assert list(own) == [name for name in weights if name.startswith(("tokenizer.", "conv_stages."))]
    assert [name for name in own if name != FIRST_CONV and not own[name].equal(weights[name])] == []
    assert [tuple(m.shape) for m in model(torch.randn(1, 4, 32, 32))] == [(1, 4, 8, 8), (1, 8, 4, 4)]


def test_levels_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"indices=\(0, 4\)"):
        on_meta("convmlp_s", features_only=True, out_indices=(0, 4))


# Fine-tuning


def depth_order(model: ConvMLP) -> list[str]:
    """Names of the modules that form a layer group each, from input to output."""
    order = ["tokenizer"]
    order += [f"conv_stages.conv_blocks.{i}" for i in range(len(model.conv_stages.conv_blocks))]
    order += ["conv_stages.downsample"]
    for i, stage in enumerate(model.stages):
        order += [f"stages.{i}.blocks.{j}" for j in range(len(stage.blocks))]
        order += [f"stages.{i}.downsample_mlp"] * (i < len(model.stages) - 1)
    return [*order, "head"]


@each_variant
def test_every_parameter_has_a_layer_group_in_order_of_depth(variant):
    model = on_meta(variant)
    order = depth_order(model)
    groups = group_parameters(model, model.group_matcher())
    assert list(groups) == list(range(len(order)))
    for name, members in zip(order, groups.values(), strict=True):
        beginnings = ("norm.", "head.") if name == "head" else (f"{name}.",)
        assert members == [n for n, _ in model.named_parameters() if n.startswith(beginnings)]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@each_variant
def test_coarse_layer_groups_are_the_stages(variant):
    model = on_meta(variant)
    groups = group_parameters(model, model.group_matcher(coarse=True))
    beginnings = ["tokenizer.", "conv_stages.", "stages.0.", "stages.1.", "stages.2.", ("norm.", "head.")]
    for beginning, members in zip(beginnings, groups.values(), strict=True):
        assert members == [n for n, _ in model.named_parameters() if n.startswith(beginning)]


@each_variant
def test_layer_decay_lowers_the_rate_towards_the_input(variant):
    model = on_meta(variant)
    order = depth_order(model)
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            scale[p], decay[p] = group["lr_scale"], group["weight_decay"]
    assert len(scale) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        layer = "head" if name.startswith("norm.") else next(m for m in order if name.startswith(f"{m}."))
        assert scale[p] == 0.5 ** (len(order) - 1 - order.index(layer)), name
        assert decay[p] == (0.05 if p.ndim > 1 else 0), name


@pytest.fixture
def returned() -> dict[str, str]:
    return {name: name for name in ("tokenizer", "conv_stages", "stages.0", "stages.2", "head")}


@torch.no_grad()
def test_fx_features_equal_the_models(cached, returned):
    cached("convmlp_s")
    model = create(pretrained=True).eval()
    extractor = create_feature_extractor(model, returned, suppress_diff_warning=True).eval()
    x = torch.randn(2, 3, 64, 97)
    outputs = extractor(x)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert list(outputs) == list(returned)
    for actual, expected in zip(outputs.values(), [*maps, model(x)], strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_fx_training_reaches_every_parameter(drop_path_rate, returned):
    model = create(num_classes=4, drop_path_rate=drop_path_rate).train()
    extractor = create_feature_extractor(model, returned, suppress_diff_warning=True).train()
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(x)
    torch.manual_seed(0)
    logits = extractor(x)["head"]
    assert_close(logits, expected)
    logits.square().sum().backward()
    parameters = dict(extractor.named_parameters())
    assert sorted(parameters) == sorted(name for name, _ in model.named_parameters())
    assert [name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()] == []
    if not drop_path_rate:
        assert [name for name, p in parameters.items() if p.grad.count_nonzero() == 0] == []


# Checkpoints of one's own, for any model of timm


@pytest.mark.parametrize("make", [lambda: create(num_classes=3), lambda: timm.create_model("resnet10t", num_classes=3)])
def test_weights_of_ones_own_bring_their_normalisation(make):
    source, model = make(), make()
    config = {"mean": [0.1, 0.2, 0.3], "std": "none"}
    load_weights(model, {"state_dict": source.state_dict(), "data_config": config}, "own.pth")
    assert_holds(model, source.state_dict())
    assert model.pretrained_cfg["mean"] == [0.1, 0.2, 0.3] and model.pretrained_cfg["std"] == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("make", [lambda: create(num_classes=3), lambda: timm.create_model("resnet10t", num_classes=3)])
@pytest.mark.parametrize(
    ("own", "wanted", "message"),
    [
        (list("abc"), list("abcd"), "own.pth has 3 classes, the data 4"),
        (list("abc"), ["b", "a", "c"], r"own.pth knows other classes \(a, b, c, ...\) than the data has"),
    ],
)
def test_other_classes_are_an_error_or_a_fresh_head(make, own, wanted, message, caplog):
    source, model = make(), make()
    model.reset_classifier(len(wanted))
    checkpoint = {"state_dict": source.state_dict(), "class_names": own}
    with pytest.raises(RunError, match=f"^{message}$"):
        load_weights(model, checkpoint, "own.pth", class_names=wanted)
    head = model.get_classifier().weight.clone()
    with caplog.at_level(logging.WARNING):
        load_weights(model, checkpoint, "own.pth", class_names=wanted, new_head=True)
    assert "the head starts afresh" in caplog.text
    assert model.get_classifier().weight.equal(head)
    name = model.pretrained_cfg["classifier"]
    assert_holds(model, source.state_dict(), but=(f"{name}.",))


def test_weights_that_do_not_fit_a_model_of_timm_are_named():
    model = timm.create_model("resnet10t", num_classes=3)
    weights = model.state_dict()
    with pytest.raises(CheckpointError, match="own.pth does not fit the model: .*fc.bias"):
        load_weights(model, {key: value for key, value in weights.items() if key != "fc.bias"}, "own.pth")
    with pytest.raises(CheckpointError, match="fc.bias is complex64, the model has float32"):
        load_weights(model, {**weights, "fc.bias": weights["fc.bias"].to(torch.complex64)}, "own.pth")
