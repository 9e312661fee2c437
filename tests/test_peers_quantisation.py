"""What torchao makes int8 of the model, how far that changes the logits, and whether it can be saved."""

import pytest
import torch
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from convmlp import ConvMLP
from convmlp.deploy import fold_batchnorm

pytestmark = pytest.mark.slow

CONFIGS = [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()]


def make_model() -> ConvMLP:
    return ConvMLP((1, 1, 1), (32, 64, 96), (2, 2, 2), 32, 2, num_classes=10)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(images) -> ConvMLP:
    torch.manual_seed(0)
    model = make_model()
    with torch.no_grad():
        for _ in range(20):
            model(images)  # statistics for BatchNorm
    return model.eval()


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_torchao_makes_all_linear_layers_int8_and_nothing_else(model, images, config):
    quantised = fold_batchnorm(model)
    quantize_(quantised, config)
    int8 = [name for name, parameter in quantised.named_parameters() if hasattr(parameter, "qdata")]
    linear = [f"{name}.weight" for name, module in quantised.named_modules() if isinstance(module, nn.Linear)]
    assert int8 == linear and len(linear) == 13
    assert all(quantised.get_parameter(name).qdata.dtype == torch.int8 for name in int8)
    assert 0 < difference(quantised(images), model(images)) < 0.05


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@torch.no_grad()
def test_what_torchao_made_is_saved_loaded_and_exported_without_pickle_code(model, images, config, tmp_path):
    quantised = fold_batchnorm(model)
    quantize_(quantised, config)
    expected = quantised(images)
    torch.save(quantised.state_dict(), tmp_path / "int8.pth")
    loaded = fold_batchnorm(make_model())
    loaded.load_state_dict(torch.load(tmp_path / "int8.pth", weights_only=True), assign=True)
    assert torch.equal(loaded(images), expected)
    torch.export.save(torch.export.export(quantised, (images,)), tmp_path / "int8.pt2")
    assert torch.equal(torch.export.load(tmp_path / "int8.pt2").module()(images), expected)


@torch.no_grad()
def test_pt2e_makes_all_convolutions_and_linear_layers_int8(model, images, tmp_path):
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    prepared(images)
    quantised = convert_pt2e(prepared)
    quantised = torch.fx.GraphModule(quantised, quantised.graph)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    int8 = [buffer for buffer in quantised.state_dict().values() if buffer.dtype == torch.int8]
    assert sorted(buffer.numel() for buffer in int8) == sorted(layer.weight.numel() for layer in layers)
    assert 0 < difference(quantised(images), model(images)) < 0.15
    torch.export.save(torch.export.export(quantised, (images,)), tmp_path / "int8.pt2")
    assert torch.equal(torch.export.load(tmp_path / "int8.pt2").module()(images), quantised(images))
