"""The zoo: where the published weights are, and what the factories make of a file."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stand_ins import FIRST_CONV, TINY, Server, StateDict, assert_holds, flip, page, random_weights, saved

import convmlp
from convmlp.common.errors import CheckpointError
from convmlp.zoo import VARIANTS, checkpoint_urls, variant_of

SMALL = {**TINY, "num_classes": 1000}  # in the place of a variant's own settings

each_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def build(variant: str, **kwargs) -> convmlp.ConvMLP:
    return getattr(convmlp, variant)(**{**SMALL, **kwargs})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty torch.hub cache, and no mirror that can be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("convmlp.zoo.MIRRORS", ("http://127.0.0.1:9/",))
    return tmp_path / "torch_home" / "hub" / "checkpoints"


@pytest.fixture
def published(tmp_path) -> Callable[[str], tuple[Path, StateDict]]:
    """Makes a small stand-in of a published file."""

    def make(variant: str) -> tuple[Path, StateDict]:
        weights = random_weights(build(variant), seed=list(VARIANTS).index(variant))
        return saved(weights, tmp_path / f"{variant}_imagenet.pth"), weights

    return make


# Names and addresses


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("convmlp_s", "convmlp_s"),
        ("convmlp_s_classification", "convmlp_s"),
        ("convmlp_s_classification.in1k", "convmlp_s"),
        ("convmlp_l.in1k_ft_cifar10", "convmlp_l"),
        ("pure_mlp_m", "pure_mlp_m"),
        ("pure_mlp", "pure_mlp_s"),
        ("resnet50.a1_in1k", None),
        ("convmlp_x", None),
        ("hf-hub:someone/convmlp_s", None),
        ("", None),
    ],
)
def test_names_of_timm_stand_for_a_variant(name, variant):
    assert variant_of(name) == variant


@each_variant
def test_pretrained_takes_the_file_in_the_cache(variant, cache, published):
    file, weights = published(variant)
    cache.mkdir(parents=True)
    os.link(file, cache / file.name)
    assert_holds(build(variant, pretrained=True), weights)


def test_the_published_file_has_the_shapes_of_the_variant(cache):
    weights = random_weights(convmlp.convmlp_s(), seed=2)
    cache.mkdir(parents=True)
    saved(weights, cache / "convmlp_s_imagenet.pth")
    assert_holds(convmlp.convmlp_s(pretrained=True), weights)
    with pytest.raises(CheckpointError, match="It fits convmlp_s$") as error:
        convmlp.convmlp_m(pretrained=cache / "convmlp_s_imagenet.pth")
    assert "convmlp_s_imagenet.pth does not fit" in str(error.value)


def test_published_addresses_are_those_of_the_paper_and_its_older_home(monkeypatch):
    monkeypatch.undo()
    assert checkpoint_urls("convmlp_m") == [
        "https://shi-labs.com/projects/convmlp/checkpoints/convmlp_m_imagenet.pth",
        "http://ix.cs.uoregon.edu/~alih/conv-mlp/checkpoints/convmlp_m_imagenet.pth",
    ]
    assert checkpoint_urls("convmlp_l", "cifar10")[0].endswith("/convmlp_l_cifar10.pth")


@pytest.mark.parametrize("source", [str, Path, Path.as_uri], ids=["path", "Path", "file URL"])
def test_pretrained_takes_a_file(source, cache, published):
    file, weights = published("convmlp_s")
    assert_holds(build("convmlp_s", pretrained=source(file)), weights)
    assert not cache.exists()


@pytest.mark.parametrize("pretrained", [1, None, ["a.pth"], {}])
def test_pretrained_of_another_type_is_refused(pretrained):
    with pytest.raises(TypeError, match="pretrained") as error:
        convmlp.convmlp_s(pretrained=pretrained)
    assert repr(pretrained) in str(error.value)


@pytest.mark.parametrize("source", ["", "nowhere.pth", "."])
def test_a_path_without_file_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        convmlp.convmlp_s(pretrained=source)


@each_variant
def test_pretrained_downloads_the_variant_from_the_mirrors(variant, cache, published, monkeypatch):
    file, weights = published(variant)
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        monkeypatch.setattr("convmlp.zoo.MIRRORS", (f"{server.url}/old/", f"{server.url}/new/"))
        server.pages[f"/new/{variant}_imagenet.pth"] = page(file.read_bytes())
        assert_holds(build(variant, pretrained=True), weights)
    assert server.asked == [f"/old/{variant}_imagenet.pth", f"/new/{variant}_imagenet.pth"]
    assert [f.name for f in cache.iterdir()] == [f"{variant}_imagenet.pth"]


def test_where_no_mirror_answers_the_place_for_the_file_is_named(cache):
    with pytest.raises(CheckpointError, match="could not download the weights") as error:
        convmlp.convmlp_m(pretrained=True)
    assert "http://127.0.0.1:9/convmlp_m_imagenet.pth: " in str(error.value)
    assert str(cache / "convmlp_m_imagenet.pth") in str(error.value)


@each_variant
def test_the_factories_adapt_channels_classes_and_head_at_once(variant, published):
    file, weights = published(variant)
    model = build(variant, pretrained=str(file), in_chans=1, classifier_head=False)
    assert_holds(model, weights, but=(FIRST_CONV,))
    assert torch.allclose(model.state_dict()[FIRST_CONV], weights[FIRST_CONV].sum(1, keepdim=True))
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 1, 1, SMALL["dims"][-1])


def test_the_factories_keep_their_type_whatever_the_file_has(published, tmp_path):
    _, weights = published("convmlp_s")
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    model = build("convmlp_s", pretrained=saved(half, tmp_path / "half.pth"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert_holds(model, {name: value.to(weights[name].dtype) for name, value in half.items()})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_of_a_file_are_real_whatever_the_default_device(published, device):
    file, weights = published("convmlp_s")
    with torch.device(device):
        model = build("convmlp_s", pretrained=file)
    assert_holds(model, weights)


def test_what_a_file_fills_is_not_initialised_before(published, monkeypatch):
    file, _ = published("convmlp_s")
    initialised = []

    def watch(init):
        def call(tensor, *args, **kwargs):
            if not tensor.is_meta:
                initialised.append(tuple(tensor.shape))
            return init(tensor, *args, **kwargs)

        return call

    for name in ("trunc_normal_", "kaiming_normal_"):
        monkeypatch.setattr(torch.nn.init, name, watch(getattr(torch.nn.init, name)))
    build("convmlp_s", pretrained=file)
    assert initialised == [(1000, 24)]  # the head, which the file may not have
    build("convmlp_s")
    assert len(initialised) > 20


def test_a_damaged_file_in_the_cache_is_refused_by_name(cache, published):
    file, weights = published("convmlp_s")
    cache.mkdir(parents=True)
    data = file.read_bytes()
    position = data.index(weights["head.weight"].numpy().tobytes())
    (cache / file.name).write_bytes(flip(data, position + 5))
    with pytest.raises(CheckpointError, match="wrong checksum") as error:
        build("convmlp_s", pretrained=True)
    assert str(cache / file.name) in str(error.value)
