"""Untrusted files: their code never runs, their images end as docs/hostile.md says, their names stay names."""

import io
import json
import logging
import os
import pickle
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from digit_scenes import write_detection, write_segmentation
from image_files import png_of_claimed_size
from mmengine.logging import MMLogger
from PIL import EpsImagePlugin, Image
from rich.console import Console
from sklearn.datasets import load_digits

import convmlp
import convmlp.timm_models  # noqa: F401  # before the tests take its mirrors away
from convmlp import classification, cli
from convmlp.common.errors import CheckpointError
from convmlp.common.images import UnreadableImage, enlargement, open_image, read_image
from convmlp.use.tables import make_table
from convmlp.weights import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DETECTION = ROOT / "configs/detection/quickstart_retinanet.py"
SEGMENTATION = ROOT / "configs/segmentation/quickstart_fpn.py"
SMALL = "--img-size 32 --epochs 1 --warmup-epochs 0 --workers 0 --batch-size 8 "
SMALL = (SMALL + "--model-kwargs channels=8 n_conv_blocks=1 blocks=[1,1,1] dims=[8,16,32]").split()

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``"),
]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """No mirror, an empty cache, and an empty folder to be in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("convmlp.zoo.MIRRORS", ())


@pytest.fixture
def marker(tmp_path) -> Path:
    """A folder that is made by the code in a file, if that ever runs."""
    return tmp_path / "code ran"


# Checkpoints


class Evil:
    """Whoever reads this by pickle makes the marker."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_pickle(path: Path, evil: Evil) -> None:
    path.write_bytes(pickle.dumps(evil))


def write_mmengine(path: Path, evil: Evil) -> None:
    weights = {"backbone.norm.weight": torch.zeros(2)}
    torch.save({"meta": {"epoch": 1}, "message_hub": {"runtime_info": evil}, "state_dict": weights}, path)


def write_getattr(path: Path, evil: Evil) -> None:
    """The one function that reading of mmengine's checkpoints lets pass, on another class than its log."""

    class Asks:
        def __reduce__(self):
            return getattr, (torch.Tensor, "storage")

    torch.save({"message_hub": Asks(), "state_dict": {}, "optimizer": evil}, path)


CODE: dict[str, Callable[[Path, Evil], None]] = {
    "zip": lambda path, evil: torch.save({"state_dict": {"head.weight": evil}, "epoch": 1}, path),
    "legacy": lambda path, evil: torch.save({"state_dict": evil}, path, _use_new_zipfile_serialization=False),
    "plain pickle": write_pickle,
    "mmengine": write_mmengine,
    "getattr": write_getattr,
}


def to_classification(*arguments: object) -> Callable[[Path, Path], int]:
    """FILE among the arguments stands for the checkpoint."""

    def run(file: Path, data: Path) -> int:
        words = [str(file) if word == "FILE" else str(word) for word in arguments]
        return classification.main([*SMALL, *words, str(data)])

    return run


def to_command(*arguments: object) -> Callable[[Path, Path], int]:
    def run(file: Path, data: Path) -> int:
        picture = next(data.rglob("*.png"))
        words = {"FILE": file, "PICTURE": picture}
        return cli.main([str(words.get(word, word)) for word in arguments])

    return run


def resume_auto(file: Path, data: Path) -> int:
    """A run whose checkpoints somebody has exchanged."""
    folder = Path("output/run")
    folder.mkdir(parents=True)
    for name in ("last.pth", "previous.pth", "best.pth"):
        (folder / name).write_bytes(file.read_bytes())
    return classification.main([*SMALL, "--resume", "auto", "--experiment", "run", str(data)])


def from_the_cache(file: Path, data: Path) -> int:
    """The published weights, exchanged in torch.hub's cache."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "convmlp_s_imagenet.pth").write_bytes(file.read_bytes())
    urls = ("http://127.0.0.1:9/convmlp_s_imagenet.pth",)
    return raises(lambda: convmlp.zoo.load_pretrained(convmlp.convmlp_s(), urls))


def hub_folder(file: Path, data: Path) -> int:
    """A folder in Hugging Face's form whose weights are no safetensors."""
    folder = Path("hub")
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(file.read_bytes())
    config = {"architecture": "convmlp_s", "num_classes": 1000, "pretrained_cfg": {"file": str(file)}}
    (folder / "config.json").write_text(json.dumps(config))
    return cli.main(["predict", str(next(data.rglob("*.png"))), "--checkpoint", "hub"])


def renamed(file: Path, data: Path) -> int:
    file = file.rename(file.with_name("evil.safetensors"))
    return cli.main(["info", str(file)])


def raises(call: Callable[[], object]) -> int:
    """As a script would end: 2 for the one documented error."""
    try:
        call()
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


WAYS_IN: dict[str, Callable[[Path, Path], int]] = {
    "--resume": to_classification("--resume", "FILE"),
    "--resume auto": resume_auto,
    "--eval": to_classification("--eval", "FILE"),
    "--initial-checkpoint": to_classification("--initial-checkpoint", "FILE"),
    "--kd-checkpoint": to_classification("--kd-model", "convmlp_s", "--kd-checkpoint", "FILE"),
    "predict": to_command("predict", "PICTURE", "--checkpoint", "FILE"),
    "predict --config": to_command("predict", "PICTURE", "--checkpoint", "FILE", "--config", DETECTION),
    "visualize": to_command("visualize", "PICTURE", "--models", "FILE"),
    "export": to_command("export", "FILE"),
    "info": to_command("info", "FILE"),
    "hub folder": hub_folder,
    "as safetensors": renamed,
    "pretrained=FILE": lambda file, data: raises(lambda: convmlp.convmlp_s(pretrained=file)),
    "pretrained=URL": lambda file, data: raises(lambda: convmlp.convmlp_s(pretrained=file.as_uri())),
    "the cache": from_the_cache,
}


@pytest.fixture
def evil_file(tmp_path, marker) -> Callable[[str], Path]:
    def write(kind: str) -> Path:
        path = tmp_path / "evil.pth"
        CODE[kind](path, Evil(marker))
        return path

    return write


def last_line(err: str) -> str:
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    return lines[0]


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain pickle"])
def test_the_code_in_these_checkpoints_would_run(kind, evil_file, marker):
    with open(evil_file(kind), "rb") as file:
        pickle.load(file) if kind == "plain pickle" else torch.load(file, weights_only=False)
    assert marker.is_dir()


@pytest.mark.parametrize("kind", CODE)
@pytest.mark.parametrize("way", WAYS_IN)
def test_no_code_in_a_checkpoint_runs(way, kind, evil_file, marker, pictures, capsys):
    code = WAYS_IN[way](evil_file(kind), pictures)
    assert not marker.exists()
    assert code == 2
    line = last_line(capsys.readouterr().err)
    wanted = "holds more than tensors and plain values"
    assert re.search(f"no checkpoint in .* can be read|weights_only=True blocked|asks for|{wanted}", line), line


def write_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def write_compressed(path: Path) -> None:
    torch.save({"w": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path: Path) -> None:
    """torch.save before 2017: a tar file, which torch.load would unpack."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle", "../../escaped"):
            archive.addfile(tarfile.TarInfo(name))


def write_npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, w=np.array([{}], dtype=object))


ODD = {
    "TorchScript": (write_torchscript, "is a TorchScript archive, a program; give the checkpoint"),
    "compressed": (write_compressed, "is compressed, which no checkpoint is"),
    "tar": (write_tar, "holds more than tensors and plain values"),
    "npz": (write_npz, "holds more than tensors and plain values|is compressed"),
    "a claim of 8 TB": (
        lambda path: path.write_bytes(b"\x80" * 8 + (2**43).to_bytes(8, "little") * 2),
        "holds more than tensors and plain values",
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("way", ["--eval", "--initial-checkpoint", "predict", "predict --config", "pretrained=FILE"])
def test_archives_that_are_not_checkpoints_are_named(way, kind, tmp_path, pictures, capsys, recwarn):
    write, reason = ODD[kind]
    write(tmp_path / "odd.pth")
    before = len(recwarn)
    assert WAYS_IN[way](tmp_path / "odd.pth", pictures) == 2
    assert re.search(f"odd.pth ({reason})|odd.pth is truncated.*({reason})", last_line(capsys.readouterr().err))
    assert not [w for w in recwarn.list[before:] if "Torch" in str(w.message)]
    assert not (tmp_path / "escaped").exists()


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("bomb/data/0", "w", force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(2**20))
    with zipfile.ZipFile(tmp_path / "bomb.pth") as archive:
        assert archive.infolist()[0].file_size > 500 * archive.infolist()[0].compress_size
    with pytest.raises(CheckpointError, match="is compressed"):
        read_checkpoint(tmp_path / "bomb.pth")


# Checkpoints of detection and segmentation


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_detection(folder / "detection", train=2, val=2, size=64, seed=0)
    write_segmentation(folder / "segmentation", train=2, val=2, size=64, seed=0)
    return folder


@pytest.fixture
def detect(scenes):
    """detection.py, or segmentation.py, in this process."""

    def run(*arguments: object, config: Path = DETECTION, data: Path | None = None) -> int:
        MMLogger._instance_dict.clear()
        script = "detection.py" if config == DETECTION else "segmentation.py"
        folder = data or scenes / script.removesuffix(".py")
        loaders = [f"{part}_dataloader.{key}" for part in ("train", "val", "test") for key in ("num_workers=0",)]
        loaders += [f"{part}_dataloader.persistent_workers=False" for part in ("train", "val", "test")]
        words = [config, folder, "--skip-data-check", "--work-dir", "run", *arguments, "--cfg-options", *loaders]
        words.insert(len(words), "model.backbone.init_cfg=None") if "INIT" not in arguments else None
        return cli.run_openmmlab(script, [str(word) for word in words if word != "INIT"])

    return run


@pytest.mark.parametrize("config", [DETECTION, SEGMENTATION], ids=["detection", "segmentation"])
@pytest.mark.parametrize("option", ["--test", "--resume"])
@pytest.mark.parametrize(
    "kind", ["zip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("legacy", "mmengine"))]
)
def test_no_code_runs_in_checkpoints_of_detection_and_segmentation(
    kind, option, config, detect, evil_file, marker, capsys
):
    assert detect(option, evil_file(kind), config=config) == 2
    assert not marker.exists()
    assert "holds more than tensors and plain values" in last_line(capsys.readouterr().err)


def test_trust_is_what_lets_code_run(detect, evil_file, marker, capsys):
    assert detect("--test", evil_file("zip"), "--trust-checkpoint") == 2  # there are no weights in it
    assert marker.is_dir()


# Configs and class maps


@pytest.mark.parametrize("key", ["model", "base", "model_kwargs"])
def test_no_code_in_a_yaml_config_runs(key, tmp_path, marker, pictures, capsys):
    (tmp_path / "evil.yml").write_text(f"{key}: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert classification.main(["-c", str(tmp_path / "evil.yml"), str(pictures)]) == 2
    assert not marker.exists()
    assert "evil.yml is not valid YAML" in last_line(capsys.readouterr().err)


def test_no_code_in_an_option_runs(marker, pictures, capsys):
    value = f"drop_rate=!!python/object/apply:os.mkdir ['{marker}']"
    assert classification.main(["--model-kwargs", value, str(pictures)]) == 2
    assert not marker.exists()
    assert "is not a value" in last_line(capsys.readouterr().err)


@pytest.mark.parametrize("verb", ["train", "predict"])
def test_no_code_in_a_class_map_runs(verb, tmp_path, marker, pictures, capsys):
    file = tmp_path / "map.pkl"
    write_pickle(file, Evil(marker))
    if verb == "train":
        assert classification.main([*SMALL, "--class-map", str(file), str(pictures)]) == 2
    else:
        torch.save(convmlp.convmlp_s(num_classes=3).state_dict(), tmp_path / "s.pth")
        picture = str(next(pictures.rglob("*.png")))
        assert cli.main(["predict", picture, "--checkpoint", str(tmp_path / "s.pth"), "--class-map", str(file)]) == 2
    assert not marker.exists()
    assert f"cannot read the class names in {file}" in last_line(capsys.readouterr().err)


def test_no_code_in_the_files_of_a_torchvision_dataset_runs(tmp_path, marker, capsys):
    folder = tmp_path / "data" / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(Evil(marker), folder / name)
    assert classification.main([*SMALL, "--dataset", "tv-MNIST", "--in-chans", "1", str(tmp_path / "data")]) == 2
    assert not marker.exists()
    assert "cannot open MNIST" in last_line(capsys.readouterr().err)


# Pictures


def encoded(image: Image.Image, format: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


def digit(number: int, size: tuple[int, int] = (36, 36)) -> Image.Image:
    return Image.fromarray((load_digits().images[number] * 15).astype("uint8")).convert("RGB").resize(size)


def turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # by 90 degrees
    return encoded(image, "JPEG", exif=exif)


def kinds_of_pictures() -> dict[str, tuple[str, bytes]]:
    """By the row of the table in docs/hostile.md: the ending of the file's name, and the file."""
    image = digit(0)
    png, jpeg = encoded(image), encoded(digit(0, (200, 200)), "JPEG")
    return {
        "PNG named .jpg": (".jpg", png),
        "text named .png": (".png", b"This is no picture at all.\n"),
        "zero bytes": (".png", b""),
        "half of a PNG": (".png", png[: len(png) // 2]),
        "half of a JPEG": (".jpg", jpeg[: len(jpeg) // 2]),
        "16-bit PNG": (".png", encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257))),
        "CMYK JPEG": (".jpg", encoded(image.convert("CMYK"), "JPEG")),
        "animated GIF": (".gif", encoded(image, "GIF", save_all=True, append_images=[digit(1)])),
        "RGBA": (".png", encoded(image.convert("RGBA"))),
        "palette with transparency": (".png", encoded(image.quantize(16), transparency=0)),
        "turned by EXIF": (".jpg", turned(digit(0, (48, 24)))),
        "1x1 px": (".png", encoded(image.resize((1, 1)))),
        "200x2 px": (".png", encoded(image.resize((200, 2)))),
        "30000x2 px": (".png", encoded(image.resize((30000, 2)))),
        "PNG that claims 30000x30000 px": (".png", png_of_claimed_size(30000, 30000)),
        "EPS": (".png", encoded(image, "EPS")),
    }


KINDS = kinds_of_pictures()
COLUMNS = ("training", "evaluation", "predict")


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    """The table of docs/hostile.md: by kind and column what is said."""
    _, _, text = (ROOT / "docs/hostile.md").read_text().partition("\n## Images\n")
    lines = [line.strip("| \n") for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert head[:4] == ["an image that is", *COLUMNS]
    return {row[0]: dict(zip(COLUMNS, row[1:4], strict=True)) for row in rows}


def file_name(kind: str) -> str:
    return re.sub(r"\W", "_", kind) + KINDS[kind][0]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, str]]:
    """What becomes of every kind in a training run, an evaluation and `convmlp predict`: '' or why it is left out."""
    roots = {split: tmp_path_factory.mktemp(split) for split in ("train", "val")}  # that has all kinds; the other none
    for kinds, root in roots.items():
        for split in roots:
            for name in ("zero", "one"):
                (root / split / name).mkdir(parents=True)
                for i in range(8) if split == kinds else range(8, 16):
                    digit(i).save(root / split / name / f"good{i}.png")
        for kind, (_, content) in KINDS.items():
            (root / kinds / "zero" / file_name(kind)).write_bytes(content)

    said = Notes()
    logger = logging.getLogger("convmlp")
    logger.addHandler(said)
    found = {}
    for root in roots.values():
        run = ["--output", str(root), "--experiment", "run"]
        assert classification.main([*SMALL, *run, "--no-model-ema", str(root)]) == 0
    found["training"] = said.left_out("train")
    found["evaluation of a run"] = said.left_out("val")
    said.clear()
    assert classification.main(["--eval", str(root / "run" / "best.pth"), "--workers", "0", str(root)]) == 0
    found["evaluation"] = said.left_out("val")
    n_read = 16 + len(KINDS) - len(found["evaluation"])
    assert f" of {n_read} images)" in said.text
    logger.removeHandler(said)

    command = ["predict", str(root / "val" / "zero"), "--checkpoint", str(root / "run" / "best.pth")]
    assert cli.main([*command, "--json", str(root / "found.json"), "--save-dir", str(root / "drawn")]) == 1
    content = json.loads((root / "found.json").read_text())
    found["predict"] = {}
    for line in content["unreadable"]:
        path, _, reason = line.partition(": ")
        found["predict"][Path(path).name] = reason
    assert {Path(row["image"]).name for row in content["predictions"]} | {*found["predict"]} >= {*map(file_name, KINDS)}
    assert len(list((root / "drawn").iterdir())) == len(content["predictions"])
    return found


class Notes(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def left_out(self, split: str) -> dict[str, str]:
        found = re.findall(rf"skipping an unreadable image: \S+/{split}/zero/(\S+) \((.*)\)", self.text)
        assert len(found) == len(dict(found))  # each is named once
        return dict(found)


def test_the_table_has_a_row_for_every_kind(table):
    assert [*table] == [*KINDS]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_end_as_the_table_says(kind, column, outcomes, table):
    reason = outcomes[column].get(file_name(kind), "")
    cell = table[kind][column]
    if reason:
        assert cell.startswith("left out: ") and re.search(cell.removeprefix("left out: "), reason), reason
    else:
        assert cell.startswith("read")
    assert column != "evaluation" or outcomes["evaluation of a run"].get(file_name(kind), "") == reason


def test_exif_turns_pictures_for_prediction_alone(tmp_path):
    (tmp_path / "turned.jpg").write_bytes(KINDS["turned by EXIF"][1])
    assert open_image(tmp_path / "turned.jpg").size == (48, 24)
    assert read_image(tmp_path / "turned.jpg").size == (24, 48)


@pytest.mark.parametrize("size", [(200, 2), (2, 200), (100, 1)])
def test_a_long_picture_is_read_up_to_the_limit(size, tmp_path):
    path = tmp_path / "long.png"
    Image.new("L", size).save(path)
    assert read_image(path).size == size
    longer = tuple(side + (side > 2) for side in size)
    Image.new("L", longer).save(path)
    with pytest.raises(UnreadableImage, match=f"{longer[0]}x{longer[1]} px, one side is more than 100 times the other"):
        read_image(path)


def test_ghostscript_is_not_started(tmp_path, marker, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir '{marker}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(tmp_path / "gs"))
    path = tmp_path / "photo.png"
    path.write_bytes(KINDS["EPS"][1])
    for read in (read_image, open_image):
        with pytest.raises(UnreadableImage, match="EPS is not read"):
            read(path)
    assert not marker.exists()
    with pytest.raises(OSError), Image.open(path) as image:
        image.load()
    assert marker.exists()  # so it would have been


# Names


def test_members_of_a_tar_file_are_read_and_never_unpacked(tmp_path, pictures):
    data = tmp_path / "data" / "tars"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        with tarfile.open(data / f"{split}.tar", "w") as archive:
            for i, path in enumerate(sorted((pictures / split).rglob("*.png"))):
                archive.add(path, f"../../{path.parent.name}/{i}.png" if i % 2 else f"/{path.parent.name}/{i}.png")
            link = tarfile.TarInfo("digit0/link.png")
            link.type, link.linkname = tarfile.SYMTYPE, "../../../evil"
            archive.addfile(link)
    before = {*tmp_path.rglob("*")}
    assert classification.main([*SMALL, "--output", str(tmp_path / "out"), "--experiment", "run", str(data)]) == 0
    made = {*tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "out") for path in made)


@pytest.fixture
def escaping(scenes, tmp_path) -> Path:
    """A data set whose annotations name a picture outside of it by ../../, and one by its whole path."""
    root = tmp_path / "a" / "set"
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    content = json.loads((scenes / "detection/annotations/instances_val2017.json").read_text())
    first, second = content["images"]
    for image, name in ((first, "../../evil.jpg"), (second, str(tmp_path / "absolute.jpg"))):
        picture = (scenes / "detection/val2017" / image["file_name"]).read_bytes()
        image["file_name"] = name
        (root / "val2017" / name).write_bytes(picture)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return root


def test_drawn_pictures_stay_in_their_folder_whatever_annotations_call_them(escaping, tmp_path, detect):
    config = ["--test", "weights.pth", "--show-dir", "deep/er/drawn", "INIT"]
    save_detector(Path("weights.pth"))
    before = {*tmp_path.rglob("*")}
    assert detect(*config, data=escaping) == 0
    made = {path for path in {*tmp_path.rglob("*")} - before if path.is_file()}
    drawn = {path for path in made if path.parent == Path("deep/er/drawn").resolve()}
    assert len(drawn) == 2
    assert all(path.is_relative_to(Path("run").resolve()) for path in made - drawn)


def save_detector(path: Path) -> None:
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromfile(DETECTION)
    del cfg.model.backbone["init_cfg"]
    cfg.model.bbox_head.num_classes = 10
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.save({"meta": {}, "state_dict": MODELS.build(cfg.model).state_dict()}, path)


def test_a_long_picture_is_not_enlarged_without_a_limit():
    assert enlargement(64, 64) == 6
    assert enlargement(30000, 2) == 1
    assert enlargement(1000, 2) == 4
    assert enlargement(5000, 5000) == 1


def test_drawn_copies_of_predict_stay_in_their_folder(tmp_path, capsys):
    digit(0).save(tmp_path / "digit.png")
    torch.save(convmlp.convmlp_s(num_classes=3).state_dict(), tmp_path / "s.pth")
    places = ["../digit.png", "../here/../digit.png"]
    command = ["predict", *places, "--checkpoint", str(tmp_path / "s.pth"), "--save-dir", "deep/drawn"]
    before = {*tmp_path.rglob("*")}
    assert cli.main(command) == 0
    made = {path for path in {*tmp_path.rglob("*")} - before if path.is_file()}
    assert len(made) == 2 and {path.parent for path in made} == {Path("deep/drawn").resolve()}


def test_names_cannot_command_the_terminal():
    name = "\x1b]0;owned\x07 [red]cat[/red]\x9b2J"
    table = make_table([{"image": "a\x1b[2J.png", "classes": [dict(index=0, name=name, probability=1.0)]}])
    console = Console(width=200, file=io.StringIO(), force_terminal=False)
    console.print(table)
    shown = console.file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)
    assert r"\x1b]0;owned\x07 [red]cat[/red]\x9b2J" in shown and r"a\x1b[2J.png" in shown


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:/tmp/model"])
def test_a_checkpoint_alone_does_not_fetch_a_model(tmp_path, pictures, capsys, name):
    about = {
        "arch": name,
        "class_names": ["a", "b"],
        "args": {"model": name},
        "data_config": {"input_size": (3, 32, 32)},
    }
    torch.save({**about, "state_dict": convmlp.convmlp_s(num_classes=2).state_dict()}, tmp_path / "elsewhere.pth")
    picture = next(pictures.glob("val/*/*.png"))
    calls = [cli.main(["predict", str(picture), "--checkpoint", str(tmp_path / "elsewhere.pth")])]
    calls.append(classification.main(["--eval", str(tmp_path / "elsewhere.pth"), str(pictures)]))
    messages = capsys.readouterr().err.splitlines()
    assert calls == [2, 2] and len(messages) == 2
    assert all(f"says that its model is {name}, which lies elsewhere: --model {name}" in line for line in messages)
