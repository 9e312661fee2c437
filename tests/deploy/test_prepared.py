"""Models made ready for inference."""

import importlib.util
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import convmlp
from convmlp.deploy import Prepared, fingerprint, fold_batchnorm, prepare

eager_and_inductor = pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])


def randomize_batchnorm(model: nn.Module) -> nn.Module:
    """As after training: statistics and scales that folding could get wrong."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in [
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ]:
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def small(**kwargs) -> convmlp.ConvMLP:
    torch.manual_seed(0)
    settings = dict(blocks=[1, 1, 1], dims=[16, 32, 48], mlp_ratios=[2, 2, 2], channels=8, num_classes=5)
    return randomize_batchnorm(convmlp.ConvMLP(**{**settings, **kwargs}))


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def without_eager(prepared: Prepared) -> Iterator[None]:
    network, prepared.network = prepared.network, None
    yield
    prepared.network = network


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("convmlp_s", "eager"),
        ("convmlp_m", "eager"),
        ("convmlp_l", "eager"),
        pytest.param("convmlp_s", "inductor", marks=pytest.mark.slow),
        pytest.param("convmlp_l", "inductor", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_float32_differs_by_rounding_alone(name, backend):
    torch.manual_seed(0)
    model = randomize_batchnorm(getattr(convmlp, name)())
    x = images(2, 3, 64, 64)
    prepared = prepare(model, example_input=x, backend=backend)
    assert prepared.backend == backend
    assert distance(prepared(x), model(x)) < 1e-5


@eager_and_inductor
@torch.no_grad()
def test_bfloat16_differs_by_its_rounding_and_names_the_same_classes(backend):
    torch.manual_seed(0)
    model = randomize_batchnorm(convmlp.convmlp_s())
    x = images(32, 3, 64, 64)
    logits, expected = prepare(model, dtype=torch.bfloat16, example_input=x, backend=backend)(x), model(x)
    assert 1e-4 < distance(logits, expected) < 3e-2
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() > 0.8


@torch.no_grad()
def test_openvino_computes_in_bfloat16_where_the_processor_has_it():
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bfloat16")
    model, x = small(), images(2, 3, 64, 64)
    prepared = prepare(model, dtype=torch.bfloat16, example_input=x, backend="openvino")
    assert 1e-4 < distance(prepared(x), model(x)) < 3e-2


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", pytest.param("auto", marks=pytest.mark.slow)])
def compiled(request) -> Prepared:
    """For two images of 64x64."""
    if request.param != "auto":
        pytest.importorskip(request.param)
    prepared = prepare(small(), example_input=images(2, 3, 64, 64), backend=request.param)
    assert prepared.backend == {"auto": "inductor"}.get(request.param, request.param)
    return prepared


@pytest.mark.parametrize("batch", [1, 2, 5])
@torch.no_grad()
def test_any_number_of_images_of_the_shape_of_the_example_runs_compiled(compiled, batch):
    x = images(batch, 3, 64, 64)
    with without_eager(compiled):
        assert distance(compiled(x), small()(x)) < 1e-5


def test_the_copy_is_folded_channels_last_and_of_the_wanted_type():
    network = prepare(small(), dtype=torch.bfloat16).network
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    kernels = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_images_of_another_shape_run_uncompiled_and_it_is_said_once(compiled, caplog):
    model, prepared = small(), compiled
    prepared(images(2, 3, 64, 64))
    assert not caplog.records
    for shape in [(1, 3, 40, 40), (3, 3, 33, 50), (1, 3, 40, 40)]:
        assert distance(prepared(images(*shape)), model(images(*shape))) < 1e-5
    [record] = caplog.records
    assert "(1, 3, 40, 40) are not those this was compiled for, (2, 3, 64, 64)" in record.getMessage()


@torch.no_grad()
def test_the_layout_and_the_type_of_the_images_do_not_matter(compiled):
    prepared, x = compiled, images(2, 3, 64, 64)
    expected = prepared(x)
    assert torch.equal(prepared(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(prepared(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    assert distance(prepared(x.bfloat16()), expected) < 3e-2
    with torch.inference_mode():
        assert torch.equal(prepared(x.clone()), expected)


@torch.no_grad()
def test_the_model_stays_as_it_is():
    model = small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepare(model, dtype=torch.bfloat16)
    prepared(images(2, 3, 64, 64))
    after = model.state_dict()
    assert model.training and not prepared.training
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_what_is_prepared_stays_in_evaluation():
    prepared = prepare(small())
    assert not prepared(images(1, 3, 32, 32)).requires_grad
    with pytest.raises(RuntimeError, match="train the model it was made of"):
        prepared.train()
    assert prepared.eval() is prepared


@eager_and_inductor
@torch.no_grad()
def test_several_outputs_come_in_the_order_of_the_model(backend):
    timm = pytest.importorskip("timm")
    import convmlp.timm_models  # noqa: F401

    model = randomize_batchnorm(timm.create_model("convmlp_s", features_only=True, out_indices=(0, 1)))
    x = images(1, 3, 64, 64)
    example = {} if backend == "eager" else dict(example_input=x)
    maps, expected = prepare(model, backend=backend, **example)(x), model(x)
    assert isinstance(maps, list) and len(maps) == len(expected) == 2
    assert all(distance(left, right) < 1e-5 for left, right in zip(maps, expected, strict=True))


@eager_and_inductor
@torch.no_grad()
def test_models_of_others_are_prepared_too(backend):
    timm = pytest.importorskip("timm")
    model = randomize_batchnorm(timm.create_model("resnet18", num_classes=4))
    x = images(2, 3, 64, 64)
    assert distance(prepare(model, example_input=x, backend=backend)(x), model(x)) < 1e-5


def test_without_an_example_nothing_is_compiled():
    assert prepare(small()).backend == "eager"


@torch.no_grad()
def test_without_a_compiler_it_runs_uncompiled_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model, x = small(), images(1, 3, 32, 32)
    prepared = prepare(model, example_input=x)
    assert prepared.backend == "eager"
    assert "there is no C++ compiler" in caplog.text
    assert distance(prepared(x), model(x)) < 1e-5


class Pair(nn.Module):
    """Two outputs of the images of a batch, which must be two."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        left, right = x
        return left + right, {"product": left * right}


@torch.no_grad()
def test_a_model_of_a_fixed_batch_is_compiled_for_it_and_nested_outputs_stay_nested():
    x = images(2, 3, 8, 8)
    prepared = prepare(Pair(), example_input=x, backend="onnxruntime")
    assert not prepared.any_batch
    with without_eager(prepared):
        total, nested = prepared(x)
        assert torch.equal(total, x[0] + x[1]) and torch.equal(nested["product"], x[0] * x[1])
        with pytest.raises(ValueError, match=r"for 2 images of shape \(3, 8, 8\), got \(3, 3, 8, 8\)"):
            prepared(images(3, 3, 8, 8))


class Branching(nn.Module):
    """What a compiler cannot follow."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if x.sum().item() > 0 else x - self.scale


@torch.no_grad()
def test_a_model_that_cannot_be_compiled_runs_uncompiled(caplog):
    model, x = Branching(), images(1, 3, 8, 8)
    with caplog.at_level(logging.WARNING, logger="convmlp"):
        prepared = prepare(model, example_input=x)
    assert prepared.backend == "eager"
    assert "not compiled" in caplog.text
    assert torch.equal(prepared(x), model(x))
    with pytest.raises(RuntimeError, match="the back end inductor fails on this model: "):
        prepare(model, example_input=x, backend="inductor")


@pytest.mark.parametrize(
    ("backend", "packages"),
    [("openvino", ["openvino"]), ("onnxruntime", ["onnxruntime", "onnx"]), ("onnxruntime", ["onnxscript"])],
)
def test_a_back_end_that_is_not_installed_is_a_runtime_error_with_the_pip_line(backend, packages, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else found(name))
    message = f"the back end {backend} needs a missing package: pip install {' '.join(packages)}$"
    with pytest.raises(RuntimeError, match=message):
        prepare(small(), example_input=images(1, 3, 32, 32), backend=backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(backend="tensorrt"), "got 'tensorrt'"),
        (dict(dtype=torch.int8), "the back end auto cannot compute in torch.int8"),
        (dict(dtype=torch.bfloat16, backend="onnxruntime", example_input=images(1, 3, 32, 32)), "torch.bfloat16"),
        (dict(backend="inductor"), "got no example_input"),
        (dict(example_input=images(3, 32, 32)), r"got an example_input of shape \(3, 32, 32\)"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(small(), **arguments)


def test_a_fingerprint_is_that_of_weights_and_layers():
    assert fingerprint(small()) == fingerprint(small().train()) != fingerprint(small(dims=[16, 32, 64]))
    changed = small()
    changed.head.bias.data[0] += 1
    assert fingerprint(changed) != fingerprint(small())


def test_folding_leaves_no_batchnorm_after_a_convolution():
    folded = fold_batchnorm(small())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
