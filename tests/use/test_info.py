"""What models cost: counts that do not depend on the way of computing, and leave the model as it was."""

import timm

import convmlp.timm_models  # noqa: F401
from convmlp.use.info import measure


def test_activations_of_attention_are_the_same_fused_or_not(monkeypatch):
    fused = measure(timm.create_model("vit_tiny_patch16_224", depth=2), (3, 224, 224))
    monkeypatch.setattr("timm.layers.attention.use_fused_attn", lambda *args, **kwargs: False)
    plain = measure(timm.create_model("vit_tiny_patch16_224", depth=2), (3, 224, 224))
    assert fused.activations == plain.activations and fused.macs == plain.macs


def test_measuring_leaves_a_model_in_training_as_it_was():
    model = timm.create_model("convmlp_s").train()
    layers = {layer.name: layer for layer in measure(model, (3, 100, 100)).layers}
    assert model.training and model.norm.training
    assert [layers[name].stride for name in ("tokenizer", "conv_stages", "stages.0", "stages.2")] == [4, 8, 16, 32]
    assert [layers[name].depth for name in ("tokenizer", "stages.0", "stages.0.blocks.0.connect")] == [1, 1, 3]
    assert not any(module._forward_hooks for module in model.modules())
