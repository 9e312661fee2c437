"""Every recipe under docs/recipes/ runs as it stands, in an empty folder without a network, and prints what it must."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "docs/recipes").glob("*.md"))
SUFFIXES = {"python": ".py", "shell": ".sh"}

# What a recipe must print, as regular expressions in order
PRINTS: dict[str, list[str]] = {
    "aotinductor": [
        r"compiled in \d+ s",
        r"4 images: logits differ by \d\.\de-0[5-9]",
        r"1 images: .* \d\.\de-0[5-9]",
        r"imported: False",
    ],
    "captum": [
        r"sum \d\.\d+, rise of the logit \d\.\d+",
        r"integrated gradients: [5-9]\d%",
        r"occlusion: [5-9]\d%",
        r"Grad-CAM: [6-9]\d%",
        r"conv_stages: \(32, 32, 4, 8\)",
        r"stages\.2: \(32, 128, 1, 2\)",
    ],
    "distillation": [
        r"output/teacher/summary.csv <==\n1,[\d.]+,[\d.]+,[\d.]+,([89]\d\.|100)",
        r"output/student/summary.csv <==\n1,[\d.]+,[\d.]+,[\d.]+,([89]\d\.|100)",
    ],
    "grad_cam": [
        r"stages\[1\]: [6-9]\d % [1-3]?\d %",
        r"a block in it: [5-9]\d % [1-4]\d %",
        r"the same unpermuted: \d\d % \d\d %",
    ],
    "hugging_face": [
        r"timm's logits differ by (0e\+00|\de-(0[6-9]|\d\d))\n",
        r"transformers' logits differ by (0e\+00|\de-(0[6-9]|\d\d))\n",
        r"the pipeline says \w",
        r"the same as convmlp: True",
        r"the card: timm image-classification \[.*'convmlp'\]",
        r"maps: \[\(1, 64, 56, 56\), \(1, 128, 28, 28\), \(1, 256, 14, 14\), \(1, 512, 7, 7\)\]",
    ],
    "lightning": [r"accuracy (0\.[89]|1\.)", r"from the checkpoint: \[\{'accuracy': (0\.[89]|1\.)"],
    "mmdet_heads": [
        r"faster-rcnn_r50_fpn +26,016,640 parameters, loss \d+\.\d+, \d+ boxes",
        r"cascade-rcnn_r50_fpn +53,658,350 parameters, loss \d+\.\d+, \d+ boxes",
        r"atss_r50_fpn +16,608,058 parameters, loss \d+\.\d+, \d+ boxes",
        r"fcos_r50-caffe_fpn_gn-head +16,608,058 parameters, loss \d+\.\d+, \d+ boxes",
        r"gfl_r50_fpn +16,753,273 parameters, loss \d+\.\d+, \d+ boxes",
    ],
    "mmseg_heads": [
        r"upernet_r50 +38,715,654 parameters, loss \d+\.\d+ to \d+\.\d+, \(1, 128, 96\)",
        r"segformer_mit-b0 +9,024,243 parameters, loss \d+\.\d+ to \d+\.\d+, \(1, 128, 96\)",
        r"deeplabv3plus_r50-d8 +22,809,974 parameters, loss \d+\.\d+ to \d+\.\d+, \(1, 128, 96\)",
        r"ocrnet_r50-d8 +12,658,438 parameters, loss \d+\.\d+ to \d+\.\d+, \(1, 128, 96\)",
    ],
    "onnxruntime": [r"class: \w", r"same classes as PyTorch: True", r"logit: \d\.\de-0[5-9] of"],
    "openvino": [
        r"onnx: classes \[ *\d+ +\d+\], difference \d\.\de-0[5-9]",
        r"alone: True",
        r"xml: classes .* difference \d\.\de-0[3-9]",
        r"alone: True",
        r"PyTorch: classes \[",
    ],
    "plain_pytorch": [r"epoch 0: loss \d", r"epoch 1: loss 0\.\d+, accuracy (0\.[89]|1\.)"],
    "quantisation_pt2e": [
        r"weights: 12\d\d kB, int8 3\d\d kB",
        r"float32: accuracy [89]\d\.\d%",
        r"int8: accuracy [89]\d\.\d%",
        r"int8 compiled: accuracy [89]\d\.\d%",
    ],
    "quantisation_torchao": [
        r"float32: accuracy 9\d\.\d%",
        r"Int8WeightOnlyConfig: accuracy 9\d\.\d%, 7\d\d kB",
        r"differ by 0\.\d%",
        r"Int8DynamicActivationInt8WeightConfig: accuracy 9\d\.\d%, 7\d\d kB",
        r"differ by [0-3]\.\d%",
        r"loaded again: True",
    ],
    "segmentation_models_pytorch": [
        r"IoU before: 0\.[0-3]\d",
        r"step 0: Dice loss 0\.[5-7]",
        r"step 30: Dice loss 0\.[0-2]",
        r"IoU after.*: 0\.[4-9]\d",
    ],
    "timm": [
        r"models: convmlp_l convmlp_m convmlp_s\n",
        r"weights: convmlp_s.in1k convmlp_s.in1k_ft_cifar10 ",
        r"input: \(2, 3, 224, 224\) crop 0.9 bicubic",
        r"channels: \[128, 256, 512\] strides: \[8, 16, 32\]",
        r"maps: \(2, 128, 28, 28\) \(2, 256, 14, 14\) \(2, 512, 7, 7\)",
        r"learning rates: 15 layers, times 0\.007 to 1\.000; weight decays \[0\.0, 0\.05\]",
        r"epoch 0: loss 0\.\d+, learning rates up to 1\.0e-06",
        r"epoch 5: loss 0\.0\d+",
        r"averaged weights: loss 0\.",
    ],
    "torchvision_detection": [
        r"step 0: loss [1-2]\.\d+",
        r"step 24: loss 0\.\d+",
        r"found [01], score 0\.\d+; IoU 0\.\d+ with a [01]",
        r"found [23], score 0\.\d+; IoU 0\.\d+ with a [23]",
    ],
}


def code_of(recipe: Path) -> tuple[str, str]:
    """Language and text of its one block of code; a block of language `text` is what it prints."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", recipe.read_text(), re.MULTILINE | re.DOTALL)
    blocks = [(language, code) for language, code in blocks if language != "text"]
    assert len(blocks) == 1 and blocks[0][0] in SUFFIXES, f"one block of code is expected in {recipe}"
    return blocks[0]


def test_every_recipe_says_what_it_prints():
    assert {recipe.stem for recipe in RECIPES} == set(PRINTS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_what_the_recipe_takes_from_convmlp_is_there(recipe):
    language, code = code_of(recipe)
    for node in ast.walk(ast.parse(code if language == "python" else "")):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "convmlp":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_recipe_runs_as_it_stands(recipe, tmp_path):
    language, code = code_of(recipe)
    file = tmp_path / f"recipe{SUFFIXES[language]}"
    file.write_text(code)
    offline = {"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path / "torch"), "MPLBACKEND": "Agg"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` and `convmlp` are those of the tests
    run = subprocess.run(
        [sys.executable, file] if language == "python" else ["bash", "-euo", "pipefail", file],
        cwd=tmp_path,
        env={**os.environ, **offline, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    place = 0
    for pattern in PRINTS[recipe.stem]:
        found = re.compile(pattern).search(run.stdout, place)
        assert found, f"{pattern!r} is missing in\n{run.stdout}"
        place = found.end()
