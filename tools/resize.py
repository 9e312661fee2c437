"""How far resizing by PyTorch, by ONNX Runtime and by `convmlp export --preprocess` is from Pillow's.

Of eight photographs, made 224 px on the short side and cropped to the middle, in levels of 0 to 255.
"""

from dataclasses import replace

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import center_crop, pil_to_tensor

from convmlp.use.classifier import open_classifier
from convmlp.use.preprocessing import Preprocessed

SIDE = 224


class Seen(torch.nn.Module):
    """Keeps the images that it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.x = x
        return x.mean((2, 3))


def by_onnxruntime(x: torch.Tensor, size: list[int], mode: str, antialias: bool) -> torch.Tensor:
    settings = {"mode": {"bicubic": "cubic", "bilinear": "linear"}[mode], "antialias": int(antialias)}
    settings |= {"cubic_coeff_a": -0.5, "exclude_outside": int(antialias)}  # as near to Pillow as it can be
    node = helper.make_node("Resize", ["x", "", "", "size"], ["y"], **settings)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)]
    given += [helper.make_tensor_value_info("size", TensorProto.INT64, [4])]
    graph = helper.make_graph([node], "resize", given, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy(), "size": np.array([1, 3, *size])})[0])


def main() -> None:
    arrays = (*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea(), data.rocket())
    photos = [Image.fromarray(array) for array in arrays]
    photos += [photos[0].resize((1920, 1080)), photos[1].resize((3000, 2000))]
    classifier = open_classifier("convmlp_s", pretrained=False, device="cpu")
    for mode in ("bicubic", "bilinear"):
        plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "interpolation": mode}
        classifier = replace(classifier, data_config={**classifier.data_config, **plain})
        graph = Preprocessed(classifier, Seen())
        differences: dict[str, list[torch.Tensor]] = {}
        for photo in photos:
            x = pil_to_tensor(photo)[None].float()
            size = [side * SIDE // min(x.shape[2:]) for side in x.shape[2:]]
            graph(x.byte().permute(0, 2, 3, 1))
            made = {"--preprocess": graph.network.x * 255}
            for antialias in (True, False):
                word = "with" if antialias else "without"
                by_pytorch = F.interpolate(x, size, mode=mode, antialias=antialias, align_corners=False)
                made[f"PyTorch, {word} antialiasing"] = center_crop(by_pytorch, SIDE)
                made[f"ONNX Runtime, {word} antialiasing"] = center_crop(by_onnxruntime(x, size, mode, antialias), SIDE)
            for name, image in made.items():
                difference = (image - classifier.preprocess([photo]) * 255).abs()
                differences.setdefault(name, []).append(difference)
        for name, each in differences.items():
            flat = torch.cat([difference.flatten() for difference in each])
            print(f"{mode}: {name}: largest {flat.max():.0f}, mean {flat.mean():.4f}")


if __name__ == "__main__":
    main()
