"""Static int8 for x86 CPUs, by PyTorch's export quantisation: weights and activations, calibrated on images."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from .backends import Network, capture

TOLERANCE = 0.1  # of the outputs: the norm of what int8 changes in them, over their own norm

aten = torch.ops.aten


def quantise(network: Network, batches: Sequence[torch.Tensor]) -> tuple[GraphModule, list[str]]:
    """A network with convolutions and linear layers in int8, and the names of those that stay float.

    At first none do. While the outputs for the calibration images differ by more than `TOLERANCE`, layers are left
    float, those whose own outputs suffer most: one, two, four, ...

    Args:
        network: What to quantise, in float32.
        batches: Images to calibrate on, each (b, c, h, w).

    Raises:
        ValueError: there is no such layer, or none can be int8 within the tolerance.
    """
    noise = _noise_of_layers(network, batches)
    worst_first = sorted(noise, key=lambda name: -noise[name])
    expected = [network(x) for x in batches]
    count = 0
    while count < len(noise):
        quantised = _convert(network, batches, worst_first[:count])
        if difference(quantised, batches, expected) <= TOLERANCE:
            return quantised, worst_first[:count]
        count = max(1, 2 * count)
    raise ValueError(f"none of its {len(noise)} convolutions and linear layers can be int8")


def difference(run: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor], expected: Sequence[Any]) -> float:
    """The norm of what differs from the expected outputs, over the norm of these."""
    wrong = wanted = 0.0
    for x, outputs in zip(batches, expected, strict=True):
        for left, right in zip(tree_leaves(run(x)), tree_leaves(outputs), strict=True):
            wrong += (left - right).square().sum().item()
            wanted += right.square().sum().item()
    return (wrong / wanted) ** 0.5 if wanted else float(wrong > 0)


def _convert(network: Network, batches: Sequence[torch.Tensor], float_layers: Sequence[str]) -> GraphModule:
    quantizer = _Quantizer().set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=not _has_vnni()))
    for name in float_layers:
        quantizer.set_module_name_qconfig(name, None)
    observed = prepare_pt2e(capture(network, batches[0]).module(), quantizer)
    for x in batches:
        observed(x)
    quantised = convert_pt2e(observed)
    return GraphModule(quantised, quantised.graph)  # without the float weights, which are left over


class _Quantizer(x86.X86InductorQuantizer):
    """Does not quantise what is added to a ReLU.

    torchao fuses a ReLU into the convolution before it, and then a sum with an int8 addend into the same convolution,
    where it finds that there is something fused already, and fails. Such an addend comes from a pooling, for example,
    which hands its int8 inputs on.
    """

    def annotate(self, model: GraphModule) -> GraphModule:
        model = super().annotate(model)
        for node in model.graph.nodes:
            inputs = node.all_input_nodes
            if node.target in _SUMS and any(addend.target in _RELUS for addend in inputs):
                for addend in inputs:
                    if annotation := addend.meta.get(x86.QUANT_ANNOTATION_KEY):
                        annotation.output_qspec = None
        return model


_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_RELUS = (aten.relu.default, aten.relu_.default)


def _has_vnni() -> bool:
    """Whether the processor sums products of int8 in 32 bits; in the 16 bits of older ones activations need 7 bits."""
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(has for name, has in can.items() if "vnni" in name)


def _noise_of_layers(network: nn.Module, batches: Sequence[torch.Tensor]) -> dict[str, float]:
    """How much int8 changes the outputs of each layer, relative to these, if all before it is float."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    rough: dict[nn.Module, nn.Conv2d | nn.Linear] = {layer: copy.deepcopy(layer) for layer in layers.values()}
    for layer in rough.values():
        layer.weight.data = torch.stack([_rounded(row) for row in layer.weight])  # each output channel has its scale
    wrong, wanted = dict.fromkeys(rough, 0.0), dict.fromkeys(rough, 0.0)

    def compare(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        changed = rough[layer].forward(_rounded(inputs[0]))
        wrong[layer] += (changed - output).square().sum().item()
        wanted[layer] += output.square().sum().item()

    hooks = [layer.register_forward_hook(compare) for layer in rough]
    for x in batches:
        network(x)
    for hook in hooks:
        hook.remove()
    return {name: wrong[layer] / wanted[layer] if wanted[layer] else 0.0 for name, layer in layers.items()}


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Values on 256 levels from their least to their largest, and 0 among them."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.fake_quantize_per_tensor_affine(x, scale, (-low / scale).round().int(), 0, 255)
