"""What pytorch-grad-cam and Captum find where they hook into the model."""

import pytest
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from convmlp import ConvMLP

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> ConvMLP:
    torch.manual_seed(0)
    model = ConvMLP((1, 2, 2), (16, 24, 32), (2, 2, 2), 8, 1, num_classes=5)
    with torch.no_grad():
        model(torch.randn(8, 3, 96, 128))  # statistics for BatchNorm
        for stage in model.stages:
            for parameter in stage.parameters():
                parameter.mul_(2)  # fresh weights are too small for the classes to differ
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))


def grad_cam(model, layer, images, reshape_transform=None):
    with GradCAM(model, [layer], reshape_transform) as cam:
        return torch.from_numpy(cam(images, [ClassifierOutputTarget(1), ClassifierOutputTarget(2)]))


def test_every_part_gives_captum_maps_with_channels_first(model, images):
    maps = {name: LayerActivation(model, part).attribute(images) for name, part in model.parts().items()}
    assert [tuple(map_.shape) for map_ in maps.values()] == [
        (2, 8, 24, 32),
        (2, 16, 12, 16),
        (2, 24, 6, 8),
        (2, 32, 3, 4),
        (2, 32, 3, 4),
    ]
    for info, expected in zip(model.feature_info, model.forward_intermediates(images)[1], strict=True):
        assert torch.equal(maps[info["module"]], expected)


@pytest.mark.parametrize("name", ["tokenizer", "conv_stages", "stages.1", "stages.1.blocks.0.connect"])
def test_grad_cam_of_both_libraries_agrees(model, images, name):
    layer = model.get_submodule(name)
    theirs = LayerGradCam(model, layer).attribute(images, torch.tensor([1, 2]), relu_attributions=True)
    heat = grad_cam(model, layer, images)
    assert heat.shape == (2, 96, 128)
    assert heat.flatten(1).amax(1) == pytest.approx([1, 1], abs=1e-5)
    theirs = torch.nn.functional.interpolate(theirs, (96, 128), mode="bilinear")[:, 0].detach()
    agreement = torch.corrcoef(torch.stack([heat.flatten(), (theirs / theirs.amax((1, 2), keepdim=True)).flatten()]))
    assert agreement[0, 1] > 0.97


def test_grad_cam_on_a_block_takes_a_permutation(model, images):
    stage = model.stages[-1]  # without downsampling: the last block's map is the stage's, channels last
    expected = grad_cam(model, stage, images)
    permuted = grad_cam(model, stage.blocks[-1], images, lambda x: x.permute(0, 3, 1, 2))
    assert torch.allclose(permuted, expected, atol=1e-5)
    assert not torch.allclose(grad_cam(model, stage.blocks[-1], images), expected, atol=0.1)


def test_the_convolution_of_a_block_has_channels_first_as_it_is(model, images):
    block = model.stages[1].blocks[0]
    assert LayerActivation(model, block.connect).attribute(images).shape == (2, 24, 6, 8)
    assert LayerActivation(model, block).attribute(images).shape == (2, 6, 8, 24)


def test_integrated_gradients_sum_to_the_rise_of_the_logit(model, images):
    model, images = model.double(), images.double()
    target = torch.tensor([1, 2])
    black = torch.zeros_like(images)
    attributions = IntegratedGradients(model).attribute(images, black, target, n_steps=200, internal_batch_size=16)
    with torch.no_grad():
        rise = (model(images) - model(black)).gather(1, target[:, None])[:, 0]
    model.float()
    assert rise.abs().min() > 1e-3
    assert torch.allclose(attributions.sum((1, 2, 3)), rise, rtol=0.05)


def test_the_hooks_are_gone_afterwards(model, images):
    grad_cam(model, model.stages[0], images)
    LayerGradCam(model, model.stages[0]).attribute(images, torch.tensor([1, 2]))
    assert [name for name, module in model.named_modules() if module._forward_hooks or module._backward_hooks] == []
