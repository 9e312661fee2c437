"""The verbs predict, visualize, export and info: what they refuse, and what they write."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from convmlp.common import images
from convmlp.use import predict
from convmlp.use.classifier import open_any, open_classifier

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["one", "three", "two"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("predict", "the following arguments are required: IMAGE"),
        ("predict x.png --topkk 3", "unknown option --topkk; did you mean --topk?"),
        ("predict x.png --topk 0", "argument --topk: must be a positive integer, got 0"),
        ("predict x.png --topk many", "argument --topk: must be a positive integer, got many"),
        ("predict nowhere.png", "folder or pattern: nowhere.png"),
        ("predict {empty}", "in the folder {empty}"),
        ("predict {photo} --model convmlp_x", "unknown --model convmlp_x; did you mean convmlp_"),
        ("predict {photo} --model pure_mlp_s", "no published weights"),
        ("predict {photo} --checkpoint nowhere.pth", "no such checkpoint: nowhere.pth"),
        ("predict {photo} --checkpoint {photo}", "chelsea.png is truncated, not a checkpoint"),
        ("predict {photo} --device cuda:99", "--device cuda:99"),
        ("predict {photo} --device tpu", "unknown --device tpu"),
        ("predict {photo} --img-size 16", "--img-size must be between 32 and 16384 px, got 16"),
        ("predict {photo} --config x.py", "--config needs the trained weights"),
        ("predict {photo} --config x.py --checkpoint x.pth --topk 3", "--topk is for classifiers"),
        (
            "predict {photo} --config x.py --checkpoint x.pth --min-confidence 0.5",
            "--min-confidence is for classifiers",
        ),
        ("predict {photo} --config x.py --checkpoint x.pth", "no such config: x.py"),
        ("predict {photo} --score-threshold 0.5", "--score-threshold is for detection and segmentation"),
        ("predict {photo} --score-threshold 0", "--score-threshold is for detection and segmentation"),
        ("predict {photo} --json {photo}/x.json", "cannot write to the output folder {photo}"),
        ("predict {photo} --csv {empty}", "cannot write {empty}: it is a folder"),
        ("predict {photo} --save-dir {photo}", "cannot write to the output folder {photo}"),
        ("predict {photo} --json - --csv -", "--json and --csv cannot both be -"),
        ("predict {photo} --json x --csv x", "--json and --csv cannot both be x"),
        ("predict {photo} --parquet -", "--parquet is not for the screen: name a file"),
        ("predict {photo} --features --csv x", "--features go into JSON or Parquet"),
        ("predict {photo} --resume", "--resume goes on with results in a file"),
        ("predict {photo} --config x.py --checkpoint x.pth --exact", "--exact is for classifiers, not for --config"),
        ("predict {photo} --topk 1 b.jpg", "unexpected argument b.jpg"),
        ("predict {photo} --score-threshold high", "--score-threshold: must be between 0 and 1, got high"),
        ("info convmlp_s convmlp_m --depth 3", "--depth is for the layers of one model"),
        ("visualize {photo} --kind filters", "takes no image"),
        ("visualize", "--kind features needs an image"),
        ("visualize nowhere.png --no-pretrained", "nowhere.png: No such file"),
        ("visualize {photo} --models convmlp_s rsnet50 --no-pretrained", "unknown --model rsnet50; did you mean"),
        ("visualize {photo} --classes cat", "--classes is for --kind cam"),
        ("visualize {photo} --kind cam --classes tabbby --no-pretrained", "has no class tabbby; did you mean tabby?"),
        ("visualize {photo} --no-pretrained --out {empty}/x.xyz", "x.xyz: the suffix must be one of"),
        ("info convmlp_s.", "unknown --model convmlp_s.; there is convmlp_s.in1k"),
        ("info convmlp_xx", "unknown --model convmlp_xx"),
        ("info nowhere.pth", "no such checkpoint: nowhere.pth"),
        ("export convmlp_s --no-pretrained --format onx", "invalid choice: 'onx'"),
        ("export convmlp_s --no-pretrained --output {empty}", "{empty}"),
    ],
)
def test_an_error_is_one_line(call, message, fails, photo, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {"photo": photo, "empty": tmp_path / "empty"}
    assert message.format(**names) in fails(*call.format(**names).split())


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, fails, photo):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    error = fails("visualize", photo, "--kind", "cam", "--no-pretrained", "--img-size", 64)
    assert "pytorch_grad_cam is missing: pip install grad-cam" in error


# predict


def test_predict_finds_what_evaluation_finds(trained, digits, tmp_path, verb):
    run = verb("predict", digits / "val", "--checkpoint", trained / "best.pth", "--json", tmp_path / "x.json")
    assert run.code == 0, run.err
    rows = json.loads((tmp_path / "x.json").read_text())["predictions"]
    assert len(rows) == 30 and {c["name"] for c in rows[0]["classes"]} == set(CLASSES)
    right = sum(Path(row["image"]).parent.name == row["classes"][0]["name"] for row in rows)
    with open(trained / "per_class.csv", newline="") as file:
        evaluated = sum(int(row["right"]) for row in csv.DictReader(file))
    assert right == evaluated > 10
    assert all(abs(sum(c["probability"] for c in row["classes"]) - 1) < 1e-5 for row in rows)
    table = [line for line in run.out.splitlines() if "%" in line]
    assert len(table) == 90 and str(digits / "val" / "one") in table[0]


def test_an_interrupted_predict_goes_on_and_ends_as_if_it_had_not_been(trained, digits, tmp_path, monkeypatch, verb):
    call = ["predict", digits / "val", "--checkpoint", trained / "best.pth", "--batch-size", 8, "--jsonl"]
    assert verb(*call, tmp_path / "whole.jsonl").code == 0
    seen: list[Path] = []

    def interrupt(path, mode):
        if len(seen) == 20:
            raise KeyboardInterrupt
        seen.append(path)
        return images.read_image(path, mode)

    monkeypatch.setattr(predict, "read_image", interrupt)
    run = verb(*call, tmp_path / "x.jsonl")
    partial = tmp_path / "x.jsonl.partial"
    assert run.code == 130 and f"16 images of 30 in {partial}; --resume goes on from there" in run.err
    assert not (tmp_path / "x.jsonl").exists()
    seen.clear()
    error = verb("predict", *call[1:-1], "--topk", 1, "--jsonl", tmp_path / "x.jsonl", "--resume").err
    assert "was begun with" in error and '"topk": null' in error
    run = verb(*call, tmp_path / "x.jsonl", "--resume")
    assert run.code == 0 and len(seen) == 14 and not partial.exists()
    assert (tmp_path / "x.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_features_are_what_the_head_tells_the_classes_from(trained, digits, tmp_path, verb):
    call = ["predict", digits / "val" / "one", "--checkpoint", trained / "best.pth", "--features", "--parquet"]
    assert verb(*call, tmp_path / "x.parquet").code == 0
    rows = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    classifier = open_classifier(checkpoint=str(trained / "best.pth"), device="cpu")
    with torch.no_grad():
        logits = classifier.model.head(torch.tensor([row["features"] for row in rows])) / classifier.temperature
    for row, probabilities in zip(rows, logits.softmax(1), strict=True):
        assert all(each["probability"] == pytest.approx(probabilities[each["index"]].item()) for each in row["classes"])


def test_predict_writes_tables_and_drawings_and_leaves_out_what_is_not_an_image(trained, digits, tmp_path, verb):
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((digits / "val" / "two").iterdir())[:2]
    for i, path in enumerate(good):
        (folder / f"{i}.png").write_bytes(path.read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "drawn"
    call = ["predict", folder, "--checkpoint", trained / "best.pth", "--topk", 2]
    run = verb(*call, "--csv", "-", "--save-dir", out)
    assert run.code == 1
    assert f"skipped: {folder / 'broken.jpg'}: not a" in run.err and "\n1 of 3 images left out\n" in run.err
    rows = list(csv.DictReader(run.out.splitlines()))
    assert [(row["image"], row["rank"]) for row in rows] == [(str(folder / f"{i}.png"), r) for i in "01" for r in "12"]
    assert all(row["name"] == CLASSES[int(row["index"])] for row in rows)
    assert sorted(p.name for p in out.iterdir()) == ["0.png", "1.png"]
    with Image.open(out / "0.png") as drawn, Image.open(good[0]) as image:
        assert drawn.width >= 384 and drawn.height > drawn.width
        shown = np.asarray(drawn)[: drawn.width]
        assert len(np.unique(shown)) <= len(np.unique(np.asarray(image)))  # enlarged without smoothing


def test_the_images_themselves_are_never_replaced(trained, digits, tmp_path, fails):
    original = sorted((digits / "val" / "one").iterdir())[0].read_bytes()
    (tmp_path / "own.png").write_bytes(original)
    call = ("predict", tmp_path, "--checkpoint", trained / "best.pth", "--save-dir", tmp_path)
    assert "own.png would be replaced" in fails(*call)
    assert (tmp_path / "own.png").read_bytes() == original


def test_a_device_is_written_into_and_a_link_stays(trained, digits, tmp_path, verb):
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "target.csv")
    call = ["predict", digits / "val" / "one", "--checkpoint", trained / "best.pth", "--csv"]
    assert verb(*call, tmp_path / "link.csv").code == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "target.csv").read_text().startswith("image,rank")
    assert verb(*call, "/dev/null").code == 0 and Path("/dev/null").is_char_device()


def test_file_names_of_any_bytes_are_written(trained, digits, tmp_path, verb):
    strange = tmp_path / os.fsdecode(b"caf\xe9.png")
    strange.write_bytes(sorted((digits / "val" / "one").iterdir())[0].read_bytes())
    run = verb("predict", tmp_path, "--checkpoint", trained / "best.pth", "--json", "-")
    assert run.code == 0, run.err
    assert Path(json.loads(run.out)["predictions"][0]["image"]) == strange


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rest", "code", "message"),
    [(">&-", 0, ""), ("--csv - > /dev/full", 2, "No space left"), ("| true; exit ${PIPESTATUS[0]}", 0, "")],
)
def test_output_that_nobody_takes_is_not_a_bug(rest, code, message, trained, digits):
    command = f"'{sys.executable}' -m convmlp predict '{digits / 'val' / 'one'}' --checkpoint '{trained / 'best.pth'}'"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(["bash", "-c", f"{command} {rest}"], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == code and message in run.stderr and "bug" not in run.stderr, run


def test_weights_that_give_no_numbers_are_an_error(trained, digits, tmp_path, fails):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    checkpoint["state_dict"]["head.bias"].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.pth")
    assert "not finite" in fails("predict", digits / "val" / "one", "--checkpoint", tmp_path / "nan.pth")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", "abc"),
        ("class_names", [1, 2, 3]),
        ("class_names", {"one": 1}),
        ("args", ["--model"]),
        ("args", {"model_kwargs": "x=1"}),
        ("args", {"model_kwargs": {"checkpoint_path": "x"}}),
        ("data_config", [1, 2]),
        ("data_config", {"mean": [0.5]}),
        ("data_config", {"input_size": [1, 40, 40], "interpolation": "cubic"}),
        ("temperature", 0.0),
        ("temperature", "1"),
    ],
)
def test_a_checkpoint_that_says_odd_things_is_refused(key, value, trained, digits, tmp_path, fails):
    checkpoint = torch.load(trained / "best.pth", weights_only=True)
    torch.save({**checkpoint, key: value}, tmp_path / "odd.pth")
    error = fails("predict", digits / "val" / "one", "--checkpoint", tmp_path / "odd.pth")
    assert "odd.pth" in error and key in error


# visualize


@pytest.mark.parametrize("kind", ["features", "cam", "filters"])
def test_visualize_writes_a_figure(trained, photo, tmp_path, monkeypatch, verb, kind):
    monkeypatch.chdir(tmp_path)
    image = [] if kind == "filters" else [photo, "--img-size", 96]
    models = [trained / "best.pth", "resnet10t"]
    run = verb("visualize", *image, "--kind", kind, "--no-pretrained", "--models", *models)
    assert run == (0, "", f"drawn: {kind}.png\n")
    with Image.open(tmp_path / f"{kind}.png") as figure:
        assert figure.width > 500 and figure.height > 300
        assert len(np.unique(np.asarray(figure.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_a_last_map_of_one_place_is_refused_with_the_option_that_helps(photo, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    error = fails("visualize", photo, "--kind", "cam", "--no-pretrained", "--img-size", 32)
    assert "is 1x1 at 32x32 px, so no place can be told; --img-size PX" in error
    assert not (tmp_path / "cam.png").exists()


# export


def test_the_default_name_of_an_export_is_not_that_of_the_model(trained, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    run = verb("export", trained / "best.pth", "--format", "safetensors")
    assert run.code == 0 and run.err.startswith("written: convmlp_s-safetensors (")
    assert open_any("convmlp_s-safetensors").class_names == CLASSES
    assert len(open_any("convmlp_s", pretrained=False).class_names) == 1000


# info


def test_the_tables_of_the_readme_are_those_of_info(verb):
    run = verb("info", "--markdown")
    assert run.code == 0, run.err
    readme = [" ".join(line.split()) for line in (ROOT / "README.md").read_text().splitlines()]
    rows = [" ".join(line.split()) for line in run.out.splitlines() if line.startswith("|")]
    assert len(rows) == 13
    assert [row for row in rows if row not in readme and "---" not in row] == []


def test_info_measures_any_model(verb):
    run = verb("info", "resnet18", "--depth", 1)
    assert run.code == 0
    assert "11 689 512" in run.out and "1.814 G" in run.out and "2.48 M" in run.out  # as in timm's results table
    layer4 = next(line.split() for line in run.out.splitlines() if "layer4" in line)
    assert layer4[:8] == ["layer4", "Sequential", "512", "x", "7", "x", "7", "32"]


def test_layers_add_up_to_the_model(verb):
    run = verb("info", "convmlp_s", "--depth", 1, "--markdown")
    lines = [line.strip("|").split("|") for line in run.out.splitlines() if line.startswith("|")]
    layers = [line for line in lines if len(line) == 6][2:]
    names = ["tokenizer", "conv_stages", "stages.0", "stages.1", "stages.2", "norm", "head"]
    assert [line[0].strip() for line in layers] == names
    assert sum(int(line[4].replace(" ", "")) for line in layers) == 9_022_920
    assert abs(sum(float(line[5].split()[0]) for line in layers) - 2385.3) < 0.5
    assert [line[3].strip() for line in layers] == ["4", "8", "16", "32", "32", "32", ""]


def test_info_of_a_checkpoint_is_of_its_own_classes_and_size(trained, verb):
    run = verb("info", trained / "best.pth", "--depth", 1)
    assert run.code == 0
    assert "40 px" in run.out and "8 997 576" not in run.out and "head" in run.out


@pytest.mark.parametrize("name", ["convmlp_s", "convmlp_s_classification", "convmlp_s_classification.in1k"])
def test_published_scores_stand_beside_every_name_of_a_model(name, verb):
    out = verb("info", name, "--depth", 1).out
    assert "76.8" in out.splitlines()[-2] and "ImageNet" in out


def test_published_scores_do_not_stand_beside_a_checkpoint_of_ones_own(trained, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "convmlp_s.pth").write_bytes((trained / "best.pth").read_bytes())
    run = verb("info", "convmlp_s.pth", "--depth", 1)
    assert run.code == 0 and "76.8" not in run.out and "ImageNet" not in run.out
