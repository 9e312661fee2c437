"""What int8 does to ConvMLP's speed and size on a CPU, beside convmlp.deploy.prepare: python tools/int8.py [MODEL]

It needs torchao and a C++ compiler and takes three minutes. Every form takes its turn on one core; the times are those
of the processor, so that other work on the machine matters less. The weights are random, and so are the images for the
calibration.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import convmlp
from convmlp.deploy import fold_batchnorm, prepare

Form = tuple[Callable[[torch.Tensor], torch.Tensor], int | None]  # what runs, and bytes of its file

ROUNDS = 7


def static_int8(model: nn.Module, images: torch.Tensor, folder: Path) -> Form:
    """docs/recipes/quantisation_pt2e.md says why one convolution stays float."""
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    quantizer.set_module_name_qconfig("conv_stages.conv_blocks.0.6", None)
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    prepared(images)
    quantised = convert_pt2e(prepared)
    program = torch.export.export(torch.fx.GraphModule(quantised, quantised.graph), (images,))
    file = str(folder / "int8.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs={"freezing": True})
    return torch._inductor.aoti_load_package(file), os.path.getsize(file)


def linear_int8(model: nn.Module, config: object, folder: Path) -> Form:
    """docs/recipes/quantisation_torchao.md"""
    quantised = fold_batchnorm(model)
    quantize_(quantised, config)
    torch.save(quantised.state_dict(), folder / "int8.pth")
    return quantised, os.path.getsize(folder / "int8.pth")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=["convmlp_s", "convmlp_m", "convmlp_l"], default="convmlp_s")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = getattr(convmlp, options.model)().eval()
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(model.state_dict(), folder / "float.pth")
        forms: dict[str, Form] = {
            "eager float32": (model, os.path.getsize(folder / "float.pth")),
            "prepared float32": (prepare(model, example_input=images), None),
            "prepared bfloat16": (prepare(model, dtype=torch.bfloat16, example_input=images), None),
            "static int8, compiled": static_int8(model, images, folder),
        }
        for words, config in {
            "int8 weights": Int8WeightOnlyConfig(),
            "dynamic int8": Int8DynamicActivationInt8WeightConfig(),
        }.items():
            run, size = linear_int8(model, config, folder)
            forms[words] = run, size
            forms[f"{words}, compiled"] = torch.compile(run), None
        expected = model(images)
        times: dict[str, list[float]] = {name: [] for name in forms}
        differences = {
            name: (run(images) - expected).abs().max() / expected.abs().max() for name, (run, _) in forms.items()
        }
        for _ in range(ROUNDS):
            for name, (run, _) in forms.items():
                start = time.process_time()
                run(images)
                times[name].append(time.process_time() - start)
    print(f"{options.model}, {options.batch_size} images of {options.img_size} px, one core")
    base = median(times["eager float32"])
    for name, (_, size) in forms.items():
        middle = median(times[name])
        file = f"{size / 1e6:5.1f} MB" if size else ""
        print(f"{name:24}{1e3 * middle:7.0f} ms {base / middle:5.2f}x   difference {differences[name]:.1%}   {file}")


if __name__ == "__main__":
    main()
