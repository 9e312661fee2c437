"""Make the pictures of README and docs: python tools/pictures.py [--out docs/pictures] [--work output/pictures]

    architecture.png   what ConvMLP-S is made of, its numbers from the model itself
    accuracy.png       published accuracy against parameters and multiply-adds, beside peers
    features.jpg       feature maps of ConvMLP-S and Pure-MLP-S of one photograph
    cam.jpg            where ConvMLP-S looks for four of its classes, in four photographs put together
    curves.png         learning curves of `make quickstart`, if it has run
    ablation.png       what `make ablation` found, if it has run
    fashion_mnist.png  what `make benchmark-accuracy` found, if it has run

For features.jpg and cam.jpg, two models learn from crops of ten photographs which photograph a crop is from (ten
minutes on two cores). The photographs come with scikit-image and scikit-learn, whose READMEs name their authors. Those
shown: cat (Stefan van der Walt, CC0), coffee (Rachel Michetti, CC0), temple (danielbuechele, CC BY 2.0), flower
(vultilion, CC BY 2.0).
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import timm
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from peers import OURS, PEERS, Point, label_points
from PIL import Image

from convmlp import convmlp_s
from convmlp.common.figures import new_figure, save_figure
from convmlp.use.classifier import open_any
from convmlp.use.info import PUBLISHED, measure
from convmlp.use.visualize import cam_figure, feature_figure
from convmlp.zoo import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
INPUT_SIZE = (3, 224, 224)
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
PHOTOGRAPHS = {
    "astronaut": SKIMAGE / "astronaut.png",
    "cat": SKIMAGE / "chelsea.png",
    "coffee": SKIMAGE / "coffee.png",
    "flower": SKLEARN / "flower.jpg",
    "galaxies": SKIMAGE / "hubble_deep_field.jpg",
    "motorcycle": SKIMAGE / "motorcycle_left.png",
    "retina": SKIMAGE / "retina.jpg",
    "rocket": SKIMAGE / "rocket.jpg",
    "temple": SKLEARN / "china.jpg",
    "tissue": SKIMAGE / "ihc.png",
}
SHOWN_TOGETHER = ("cat", "temple", "coffee", "flower")
CROP, TRAIN_CROPS, VAL_CROPS = 96, 160, 20
TRAINING = "--img-size 96 --crop-pct 1 --epochs 14 --warmup-epochs 2 --batch-size 32 --lr 4e-4 --amp --scale 0.4 1 "
TRAINING += "--no-warmup-prefix --smoothing 0 --clip-grad 1 --seed 0 --resume auto"


# The weights in accuracy.png
COMPARED = (
    "resnet18.tv_in1k",
    "resnet50.tv_in1k",
    "resnet50.a1_in1k",
    "resnet101.tv_in1k",
    "mixer_b16_224.goog_in21k_ft_in1k",
    "resmlp_12_224.fb_in1k",
    "resmlp_24_224.fb_in1k",
    "gmlp_s16_224.ra3_in1k",
    "deit_tiny_patch16_224.fb_in1k",
    "deit_small_patch16_224.fb_in1k",
    "poolformer_s12.sail_in1k",
)


def draw_architecture(path: Path) -> None:
    """The stages from left to right with the maps between them, and below them the Conv-MLP block."""
    figure = new_figure(11, 3.9)
    above, below = figure.subplots(2, 1, height_ratios=[1.1, 1])
    _draw_stages(above)
    _draw_block(below)
    for axis in (above, below):
        axis.axis("off")
    save_figure(figure, path)


def _draw_stages(axis: Axes) -> None:
    model = convmlp_s()
    settings = VARIANTS["convmlp_s"]
    shapes = {layer.name: layer.shape for layer in measure(model, INPUT_SIZE).layers}
    tokenizer = "3 x [conv 3x3, BN, ReLU],\nthe first of stride 2\nmax pool 3x3, stride 2"
    bottlenecks = f"{settings['n_conv_blocks']} x [conv 1x1, 3x3, 1x1\nwith BN, ReLU, residual]\nconv 3x3, stride 2"
    stages = [
        ("tokenizer", "Tokenizer", tokenizer, "#f6d6ad"),
        ("conv_stages", "Convolution stage", bottlenecks, "#f6d6ad"),
    ]
    for i, n_blocks in enumerate(settings["blocks"]):
        last = i == len(settings["blocks"]) - 1
        text = f"{n_blocks} x Conv-MLP block" + ("" if last else "\nconv 3x3, stride 2")
        stages.append((f"stages.{i}", f"Conv-MLP stage {i + 1}", text, "#bcd9f0"))
    left = 0.0
    _label(axis, left + 0.45, "image\n3 x 224 x 224")
    left += 0.95
    for name, title, text, colour in stages:
        _arrow(axis, left, left + 0.22)
        _box(axis, left + 0.25, 1.45, title, text, colour)
        left += 1.75
        _label(axis, left - 0.78, " x ".join(map(str, shapes[name])), height=-0.13)
    _arrow(axis, left, left + 0.22)
    _box(axis, left + 0.25, 1.2, "Head", f"LayerNorm, mean\nLinear to {model.num_classes}", "#d5e8d4")
    axis.set(xlim=(-0.05, left + 1.5), ylim=(-0.35, 1.1))


def _draw_block(axis: Axes) -> None:
    mlp = ["LayerNorm", "Linear", "GELU", "Linear"]
    x = 1.0
    _label(axis, 0.45, "Conv-MLP block\n(h, w, dim)")
    spatial = ["LayerNorm", "depthwise\nconv 3x3"]
    groups = ((mlp, "#bcd9f0", True), (spatial, "#f6d6ad", False), (mlp, "#bcd9f0", True))
    for group, colour, residual in groups:
        start = x
        for text in group:
            _arrow(axis, x, x + 0.14)
            _box(axis, x + 0.17, 0.78, "", text, colour, bottom=0.2, height=0.42)
            x += 0.97
        if residual:
            arc = dict(arrowstyle="-|>", connectionstyle="angle,angleA=90,angleB=180,rad=8", color="#555555")
            axis.annotate("", (x + 0.1, 0.9), (start + 0.03, 0.42), arrowprops={**arc, "arrowstyle": "-"})
            axis.annotate("", (x + 0.1, 0.47), (x + 0.1, 0.91), arrowprops=dict(arrowstyle="-|>", color="#555555"))
            axis.text(x + 0.1, 0.41, "+", ha="center", va="center", fontsize=12)
            x += 0.2
    _arrow(axis, x, x + 0.2)
    axis.set(xlim=(-0.05, x + 0.25), ylim=(0, 1.05))


def _box(axis: Axes, x: float, width: float, title: str, text: str, colour: str, bottom=0.1, height=0.85) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axis.add_patch(FancyBboxPatch((x, bottom), width, height, boxstyle=style, facecolor=colour, edgecolor="#555555"))
    middle = x + width / 2
    axis.text(middle, bottom + (0.4 if title else 0.5) * height, text, ha="center", va="center", fontsize=7.5)
    axis.text(middle, bottom + 0.86 * height, title, ha="center", va="center", fontsize=8.5, weight="bold")


def _arrow(axis: Axes, start: float, end: float, height: float = 0.41) -> None:
    axis.annotate("", (end, height), (start, height), arrowprops=dict(arrowstyle="-|>", color="#555555"))


def _label(axis: Axes, x: float, text: str, height: float = 0.41) -> None:
    axis.text(x, height, text, ha="center", va="center", fontsize=8)


def draw_accuracy(path: Path) -> None:
    """Two panels: top-1 against parameters, and against multiply-adds; both measured on timm's models at 224 px."""
    figure = new_figure(12, 5.6)
    panels = figure.subplots(1, 2, sharey=True)
    scores = {**{name: of["ImageNet"] for name, of in PUBLISHED.items()}, **{name: PEERS[name] for name in COMPARED}}
    costs = {name: measure(timm.create_model(name), INPUT_SIZE) for name in scores}
    parameters = {name: cost.parameters / 1e6 for name, cost in costs.items()}
    multiply_adds = {name: cost.macs / 1e9 for name, cost in costs.items()}
    quantities = (
        ("parameters, millions", parameters, [5, 10, 20, 40, 80]),
        ("multiply-adds at 224 px, G", multiply_adds, [1, 2, 4, 8, 16]),
    )
    for panel, (title, sizes, ticks) in zip(panels, quantities, strict=True):
        panel.plot(
            [sizes[name] for name in PUBLISHED], [scores[name] for name in PUBLISHED], "o-", color=OURS, zorder=3
        )
        panel.plot([sizes[name] for name in COMPARED], [scores[name] for name in COMPARED], "o", color="#999999", ms=5)
        panel.set(xlabel=title, xscale="log")
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.margins(0.12)
        panel.grid(alpha=0.3)
        label_points(panel, [Point(sizes[name], scores[name], name, name in PUBLISHED) for name in scores])
    panels[0].set_ylabel("ImageNet-1k top-1, %, as published")
    save_figure(figure, path)


def make_crops(folder: Path) -> None:
    """folder/train/CLASS/*.jpg and folder/val/CLASS/*.jpg: square crops, a quarter to all of a photograph's side."""
    for number, (name, photograph) in enumerate(PHOTOGRAPHS.items()):
        with Image.open(photograph) as file:
            image = file.convert("RGB")
        rng = np.random.default_rng(number)
        for split, count in (("train", TRAIN_CROPS), ("val", VAL_CROPS)):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                side = min(image.size) * rng.uniform(0.25, 1)
                x, y = (rng.uniform(0, length - side) for length in image.size)
                crop = image.resize((CROP, CROP), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
                crop.save(folder / split / name / f"{i:03}.jpg", quality=92)


def train(model: str, work: Path) -> Path:
    """The best checkpoint of a model on the crops; an interrupted training continues."""
    crops = work / "crops"
    if not (crops / ".complete").exists():
        make_crops(crops)
        (crops / ".complete").touch()
    command = [sys.executable, str(ROOT / "classification.py"), "--model", model, "--output", str(work)]
    subprocess.run([*command, "--experiment", model, *TRAINING.split(), str(crops)], check=True)
    return work / model / "best.pth"


def put_together(names: tuple[str, ...], side: int) -> Image.Image:
    """The middle squares of four photographs in a square of four."""
    sheet = Image.new("RGB", (2 * side, 2 * side))
    for i, name in enumerate(names):
        with Image.open(PHOTOGRAPHS[name]) as file:
            image = file.convert("RGB")
        short = min(image.size)
        x, y = ((length - short) / 2 for length in image.size)
        square = image.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + short, y + short))
        sheet.paste(square, (i % 2 * side, i // 2 * side))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--work", type=Path, default=Path("output/pictures"))
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    draw_architecture(out / "architecture.png")
    draw_accuracy(out / "accuracy.png")
    checkpoints = [train(model, options.work) for model in ("convmlp_s", "pure_mlp_s")]
    classifiers = [open_any(str(path), img_size=224) for path in checkpoints]
    for classifier in classifiers:
        classifier.title = classifier.name
    with Image.open(PHOTOGRAPHS["cat"]) as image:
        save_figure(feature_figure(image, classifiers), out / "features.jpg")
    together = put_together(SHOWN_TOGETHER, 112)
    save_figure(cam_figure(together, classifiers[:1], SHOWN_TOGETHER), out / "cam.jpg")
    measured = {
        "curves.png": "output/quickstart/curves.png",
        "ablation.png": "output/ablation/ablation.png",
        "fashion_mnist.png": "output/accuracy/accuracy.png",
    }
    for name, source in measured.items():
        if Path(source).exists():
            shutil.copyfile(source, out / name)
    for path in sorted(out.glob("*.png")):  # drawings: a palette of 256 colours is a third of the size
        with Image.open(path) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    for path in sorted(out.iterdir()):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
