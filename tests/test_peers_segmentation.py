"""segmentation_models_pytorch with ConvMLP encoders, dilated where DeepLab and PAN ask for that."""

import pytest
import segmentation_models_pytorch as smp
import torch
from test_model import WIDTHS

import convmlp
import convmlp.timm_models  # noqa: F401  registers with timm

pytestmark = pytest.mark.slow

DILATED = ("DeepLabV3", "DeepLabV3Plus", "PAN")  # decoders that want a stride of 8 or 16
DECODERS = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer", *DILATED)


def build(decoder, encoder="tu-convmlp_s", **settings):
    return getattr(smp, decoder)(encoder, **{"encoder_weights": None, "classes": 2, **settings})


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Random values in the place of the published file."""
    path = tmp_path / "hub" / "checkpoints" / "convmlp_s_imagenet.pth"
    path.parent.mkdir(parents=True)
    model = convmlp.convmlp_s()
    state_dict = {
        key: value + 0.01 * torch.rand_like(value) if value.is_floating_point() else value + 1
        for key, value in model.state_dict().items()
    }
    torch.save(state_dict, path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return state_dict


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_trains_all_that_it_has(decoder):
    model = build(decoder).train()
    out = model(torch.randn(2, 3, 128, 128))
    assert out.shape == (2, 2, 128, 128)
    out.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("encoder", list(WIDTHS))
@pytest.mark.parametrize("depth", [3, 4, 5])
def test_depth_chooses_the_maps(encoder, depth):
    with torch.device("meta"):
        model = smp.encoders.get_encoder(f"tu-{encoder}", depth=depth)
        maps = model(torch.zeros(1, 3, 64, 96))
    widths = [3, 0, *WIDTHS[encoder]][: depth + 1]  # smp puts the image and an empty map of stride 2 before ours
    assert model.out_channels == widths
    assert [tuple(m.shape[1:]) for m in maps] == [(w, 64 // 2**i, 96 // 2**i) for i, w in enumerate(widths)]


@pytest.mark.parametrize("decoder", ["Unet", "Linknet", "UPerNet", "Segformer", "DeepLabV3Plus"])
@pytest.mark.parametrize("depth", [3, 4])
def test_shallower_encoders(decoder, depth):
    channels = {"decoder_channels": (32, 16, 16, 8)[:depth]} if decoder == "Unet" else {}
    model = build(decoder, encoder_depth=depth, **channels).eval()
    assert model.encoder.out_channels == [3, 0, 64, 128, 256][: depth + 1]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 2, 64, 96)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplab_gets_the_stride_it_asks_for(output_stride):
    model = build("DeepLabV3Plus", encoder_output_stride=output_stride).eval()
    with torch.no_grad():
        maps = model.encoder(torch.randn(1, 3, 64, 96))
        assert maps[-1].shape[2:] == (64 // output_stride, 96 // output_stride)
        assert model(torch.randn(1, 3, 64, 96)).shape == (1, 2, 64, 96)


@torch.no_grad()
@pytest.mark.parametrize("size", [(33, 75), (197, 131)])
def test_unet_takes_odd_sizes(size):
    assert build("Unet").eval()(torch.randn(1, 3, *size)).shape == (1, 2, *size)


@pytest.mark.parametrize("decoder", ["Unet", "DeepLabV3Plus"])
def test_pretrained_fills_the_encoder(decoder, weights):
    own = build(decoder, encoder_weights=True).encoder.model.model.state_dict()
    assert {*own} == {key for key in weights if not key.startswith(("norm.", "head."))}
    assert all(torch.equal(value, weights[key]) for key, value in own.items())


@pytest.mark.parametrize("in_channels", [1, 2, 4, 6])
def test_pretrained_adapts_to_other_channels(in_channels, weights):
    model = build("Unet", encoder_weights=True, in_channels=in_channels)
    own = model.encoder.model.model.state_dict()
    expected = convmlp.convmlp_s(pretrained=True, in_chans=in_channels, classifier_head=False).state_dict()
    assert {*own} == {*expected}
    for key, value in own.items():
        torch.testing.assert_close(value, expected[key])
    with torch.no_grad():
        assert model.eval()(torch.randn(1, in_channels, 32, 32)).shape == (1, 2, 32, 32)


def test_a_file_that_does_not_fit_is_refused(weights, tmp_path):
    del weights["stages.1.blocks.0.connect.weight"]
    torch.save(weights, tmp_path / "hub" / "checkpoints" / "convmlp_s_imagenet.pth")
    with pytest.raises(RuntimeError, match="stages.1.blocks.0.connect.weight is missing"):
        build("Unet", encoder_weights=True)


def test_the_statistics_of_preprocessing_are_known():
    settings = smp.encoders.get_preprocessing_params("tu-convmlp_s")
    assert (settings["mean"], settings["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def test_a_model_built_on_meta_can_be_filled():
    torch.manual_seed(0)
    source = build("Unet").eval()
    with torch.device("meta"):
        model = build("Unet").eval()
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), source(x))


@torch.no_grad()
def test_saving_tracing_and_exporting_keep_the_outputs(tmp_path):
    model = build("Unet").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(smp.from_pretrained(tmp_path).eval()(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("decoder", ["Unet", "DeepLabV3Plus", "Segformer"])
def test_training_lowers_the_loss(decoder):
    torch.manual_seed(0)
    model = build(decoder, classes=1).train()
    images = torch.rand(4, 3, 64, 64)
    masks = (images.mean(1, keepdim=True) + torch.linspace(-0.5, 0.5, 64)) > 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = smp.losses.DiceLoss("binary")(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
