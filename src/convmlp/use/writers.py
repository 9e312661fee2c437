"""Writers of exported files, one for each format. Each returns what reads its file again."""

import importlib.util
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch import nn

from ..common.errors import RunError
from ..common.images import UnreadableImage, to_mode
from ..exported import Run
from .card import make_card
from .classifier import Classifier, numbered_names

MIN_SIDE = 32

Labelled = Sequence[tuple[Image.Image, int]]


@dataclass(frozen=True)
class Wishes:
    """What a file shall be, see `export.export`."""

    format: str = "onnx"
    dynamic: bool = False
    preprocess: bool = False
    fold: bool = False
    half: bool = False
    opset: int | None = None
    calibration: Labelled | None = None

    @property
    def floating(self) -> torch.dtype:
        """What weights, normalised images and logits are, but for int8 weights."""
        return torch.float16 if self.half else torch.float32

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.calibration else self.floating


Writer = Callable[[Classifier, nn.Module, torch.Tensor, Path, Wishes], Run]  # given an example of the images


def describe(classifier: Classifier, preprocess: bool) -> dict[str, Any]:
    """What a file says of itself."""
    arch = classifier.model.pretrained_cfg["architecture"]
    about = {"arch": arch, "class_names": classifier.class_names, **classifier.data_config}
    fitted: dict[str, Any] = {"thresholds": classifier.thresholds, "temperature": classifier.temperature}
    about |= {key: value for key, value in fitted.items() if value not in ([], 1.0)}
    return about | ({"preprocess": True} if preprocess else {})


def _describe_in_json(classifier: Classifier, wishes: Wishes) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in describe(classifier, wishes.preprocess).items()}


def write_onnx(classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, wishes: Wishes) -> Run:
    import onnxruntime

    exported = _capture(network, example, wishes)
    free = {0: "batch", 1: "height", 2: "width"} if wishes.preprocess else {0: "batch", 2: "height", 3: "width"}
    given, output = ("images", "probabilities") if wishes.preprocess else ("input", "logits")
    program = torch.onnx.export(
        exported,
        input_names=[given],
        output_names=[output],
        dynamic_shapes=(free,) if exported.range_constraints else None,
        opset_version=wishes.opset,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # with dynamo=True
    written = program.model.opset_imports[""]
    if wishes.opset not in (None, written):
        raise RunError(f"PyTorch cannot write this model in ONNX opset {wishes.opset}, only in {written} or so")
    program.model.metadata_props.update(_describe_in_json(classifier, wishes))
    program.save(path, external_data=False)
    if wishes.calibration:
        _quantise_onnx(path, ({given: x.numpy()} for x in calibration_batches(classifier, wishes)))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {given: images.numpy()})[0])


def _quantise_onnx(path: Path, batches: Iterator[dict[str, Any]]) -> None:
    """Static int8 in place, of convolutions and of products with weights; what preprocesses has none."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


def write_openvino(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, wishes: Wishes
) -> Run:
    """NAME.xml with the weights beside it in NAME.bin; `path` is of the first."""
    import openvino

    model = openvino.convert_model(_capture(network, example, wishes))
    if wishes.calibration:
        import nncf

        batches = [x.numpy() for x in calibration_batches(classifier, wishes)]
        products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
        kept = [op.get_friendly_name() for op in products if not _has_weights(op)]
        model = nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=kept, validate=False),
        )
    model.inputs[0].set_names({"input"})
    model.outputs[0].set_names({"logits"})
    for key, value in _describe_in_json(classifier, wishes).items():
        model.set_rt_info(value, ["convmlp", key])
    openvino.save_model(model, path, compress_to_fp16=wishes.half)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def _has_weights(product: Any) -> bool:
    """Whether a product of OpenVINO's is one with weights; those that preprocess and those of attention are not."""
    return any(value.get_node().get_type_name() == "Constant" for value in product.input_values())


def write_torch_export(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, wishes: Wishes
) -> Run:
    exported = _capture(network, example, wishes)
    for module in exported.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:  # where each operator came from: paths of this machine, and source
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
                    node.meta.pop(key, None)
    about = json.dumps(describe(classifier, wishes.preprocess))
    with path.open("wb") as file:  # given a path, PyTorch insists on its own suffix
        torch.export.save(exported, file, extra_files={"classifier.json": about})
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_torchscript(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, wishes: Wishes
) -> Run:
    scripted = torch.jit.script(network) if wishes.dynamic else torch.jit.trace(network, example, check_trace=False)
    about = json.dumps(describe(classifier, wishes.preprocess))
    torch.jit.save(scripted, path, _extra_files={"classifier.json": about})
    return torch.jit.load(path)


def write_executorch(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, wishes: Wishes
) -> Run:
    """For XNNPACK, on any CPU; the method `classifier` gives what the file says of itself."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    about = {"classifier": json.dumps(describe(classifier, wishes.preprocess))}
    exported = _capture(network, example, wishes)
    lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], constant_methods=about)
    path.write_bytes(lowered.to_executorch().buffer)
    program = Runtime.get().load_program(path.read_bytes())  # which its methods must not outlive
    return lambda images: program.load_method("forward").execute([images])[0].clone()


def write_litert(classifier: Classifier, network: nn.Module, example: torch.Tensor, path: Path, wishes: Wishes) -> Run:
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    litert_torch.convert(network, (example,)).export(str(path))
    runner = Interpreter(str(path)).get_signature_runner()
    (given,), (output,) = runner.get_input_details(), runner.get_output_details()
    return lambda images: torch.from_numpy(runner(**{given: images.numpy()})[output].copy())


def write_safetensors(
    classifier: Classifier, network: nn.Module, example: torch.Tensor, folder: Path, wishes: Wishes
) -> Run:
    if classifier.thresholds:
        raise RunError("safetensors have no place for the thresholds of several labels an image: --format onnx has")
    names = classifier.class_names
    labels = {} if names == numbered_names(len(names)) else {"label_names": names}
    save_for_hf(network, str(folder), labels, safe_serialization=True, data_config=classifier.data_config)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"].pop("num_classes", None)  # stands above too; transformers would pass it twice
    untrue = ("tag", "license", "origin_url") if classifier.origin != "published" else ()
    for key in ("label_names", *untrue):  # the names of these weights stand above
        config["pretrained_cfg"].pop(key, None)
    path.write_text(json.dumps(config, indent=2))
    make_card(classifier).save(folder / "README.md")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return lambda images: loaded(images.float())


def image_batch(classifier: Classifier, image: Image.Image, wishes: Wishes) -> torch.Tensor:
    """An image as a file takes it: normalised, (1, c, h, w), or its pixels, (1, h, w, 3) uint8."""
    if wishes.preprocess:
        return torch.from_numpy(np.array(to_mode(image, "RGB")))[None]
    return classifier.preprocess([image])


def readable(images: Labelled) -> Iterator[tuple[Image.Image, int]]:
    """The images that can be read, one after another."""
    for i in range(len(images)):
        try:
            image, target = images[i]
            yield to_mode(image, "RGB"), target
        except UnreadableImage:
            pass


def calibration_batches(classifier: Classifier, wishes: Wishes) -> Iterator[torch.Tensor]:
    assert wishes.calibration
    return (image_batch(classifier, image, wishes) for image, _ in readable(wishes.calibration))


def _capture(network: nn.Module, example: torch.Tensor, wishes: Wishes) -> torch.export.ExportedProgram:
    """The network as a graph. Free sizes are such that nothing is assumed of them, for 32 px make a map of 1x1."""
    if not (wishes.dynamic or wishes.preprocess):
        return torch.export.export(network, (example,))
    if importlib.util.find_spec("torch.fx.experimental.dynamic_spec") is None:
        raise RunError(f"free sizes need a newer PyTorch than {torch.__version__}")
    from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec

    smallest = 1 if wishes.preprocess else MIN_SIDE
    batch, height, width = (ShapeVar(name, min=n) for name, n in (("b", 1), ("h", smallest), ("w", smallest)))
    channels = example.shape[3 if wishes.preprocess else 1]
    shape: list[Any] = [batch, height, width, channels] if wishes.preprocess else [batch, channels, height, width]
    name = next(iter(inspect.signature(network.forward).parameters))
    spec = ShapesSpec(params=ParamsSpec({name: TensorSpec(shape)}))
    return torch.export.export(network, (example,), dynamic_shapes=spec)


WRITERS: dict[str, Writer] = {
    "onnx": write_onnx,
    "torch-export": write_torch_export,
    "torchscript": write_torchscript,
    "safetensors": write_safetensors,
    "openvino": write_openvino,
    "executorch": write_executorch,
    "litert": write_litert,
}
