"""classification.py from end to end: what a run leaves, evaluation, folders, mistakes."""

import csv
import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from convmlp import ConvMLP, convmlp_m, convmlp_s
from convmlp.common.files import lock_folder

from .conftest import ROOT, call_main


def read(path):
    return torch.load(path, weights_only=True)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What a run leaves


def test_a_run_leaves_checkpoints_figures_and_images(trained):
    _, said, folder = trained
    last, best = read(folder / "last.pth"), read(folder / "best.pth")
    assert (last["epoch"], last["evaluated"], last["updates"]) == (1, True, 6)
    assert last["class_names"] == ["digit0", "digit1", "digit2"]
    tiny = ConvMLP((1, 1, 1), (8, 16, 32), (1, 1, 1), channels=8, n_conv_blocks=1, num_classes=3, final_norm=True)
    tiny.load_state_dict(best["state_dict"])
    rows = rows_of(folder / "summary.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["lr"]) < float(rows[0]["lr"])
    assert yaml.safe_load((folder / "args.yaml").read_text())["img_size"] == 32
    for name in ("curves.png", "confusion_matrix.png", "predictions.png"):
        with Image.open(folder / name) as figure:
            assert len(figure.convert("L").resize((200, 200)).getcolors()) > 5, f"{name} is blank"
    per_class = rows_of(folder / "per_class.csv")
    right = sum(int(row["right"]) for row in per_class)
    assert sum(int(row["images"]) for row in per_class) == 15
    assert right / 15 * 100 == pytest.approx(max(float(row["eval_top1"]) for row in rows))
    assert f"({right} of 15 images)" in said
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == [".holder", ".lock"]


def test_counts_of_one_are_singular(run, make_pictures):
    code, said, _ = run("--epochs", "1", data=make_pictures("one", classes=(3,), splits={"train": 8, "val": 1}))
    assert code == 0 and "1 class, 8 training and 1 validation image of 32 px" in said
    assert "1 epoch of 1 batch, output" in said and "(1 of 1 image)" in said


def test_class_names_may_hold_anything(run, pictures):
    for split in ("train", "val"):
        (pictures / split / "digit0").rename(pictures / split / "$5_$6 \u5b57 & so on, with a long name")
    code, said, folder = run("--epochs", "1", data=pictures)
    assert code == 0, said
    assert rows_of(folder / "per_class.csv")[0]["class"] == "$5_$6 \u5b57 & so on, with a long name"


def test_metrics_go_to_tensorboard_when_asked(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, folder = run("--log-tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("eval_loss")]
    assert logged == pytest.approx([float(row["eval_loss"]) for row in rows_of(folder / "summary.csv")])


def test_unreadable_images_are_counted_at_the_end_or_stop_the_run(run, pictures):
    file = next((pictures / "train" / "digit0").iterdir())
    file.write_bytes(b"")
    code, said, _ = run("--epochs", "1", data=pictures)
    assert code == 0 and "1 image could not be read" in said and str(file) in said
    code, said, _ = run("--epochs", "1", "--on-bad-image", "stop", experiment="strict", data=pictures)
    assert code == 2 and str(file) in said


# Evaluation


def test_evaluation_takes_its_settings_from_the_checkpoint(trained, images, tmp_path):
    best = max(float(row["eval_top1"]) for row in rows_of(trained.folder / "summary.csv"))
    checkpoint = trained.folder / "best.pth"
    code, said = call_main("--eval", checkpoint, "--output", tmp_path, "--experiment", "eval", "-j", 0, images)
    assert code == 0 and f"top-1 {best:.2f} %" in said
    assert {p.name for p in (tmp_path / "eval").iterdir()} >= {"confusion_matrix.png", "predictions.png"}


def test_evaluations_go_beside_the_checkpoint_and_understand_its_classes(earlier, make_pictures, no_figures):
    two = make_pictures("two", classes=(1, 2))
    code, said = call_main("--eval", earlier / "best.pth", "--batch-size", 7, "-j", 0, two)
    assert code == 0 and (earlier / "eval" / "predictions.png").exists(), said
    per_class = rows_of(earlier / "eval" / "per_class.csv")
    assert [(row["class"], row["images"]) for row in per_class] == [("digit0", "0"), ("digit1", "5"), ("digit2", "5")]
    ours = {row["class"]: row["right"] for row in per_class}
    for row in rows_of(earlier / "per_class.csv"):
        assert row["class"] == "digit0" or ours[row["class"]] == row["right"]


def test_evaluating_on_unknown_classes_is_refused(trained, make_pictures):
    code, said = call_main("--eval", trained.folder / "best.pth", make_pictures("others", classes=(1, 7)))
    assert code == 2 and "does not know the class digit7" in said


def test_a_validation_set_that_cannot_be_read_is_an_error(trained, pictures):
    for file in pictures.glob("val/*/*.png"):
        file.write_bytes(b"")
    code, said = call_main("--eval", trained.folder / "best.pth", "-j", 0, pictures)
    assert code == 2 and "not one validation image could be read" in said


# Folders


def test_an_earlier_run_is_not_overwritten_unasked(run, earlier):
    before = (earlier / "last.pth").read_bytes()
    code, said, _ = run()
    assert code == 2 and "--resume auto continues it, --overwrite" in said
    assert (earlier / "last.pth").read_bytes() == before


def test_overwriting_leaves_nothing_of_the_earlier_run(run, earlier, monkeypatch):
    old = ["nonfinite.txt", "previous.pth", "predictions.png", "per_class.csv", "confusion_matrix.png", "curves.png"]
    old += ["duplicates.csv", "split.csv"]
    for name in [*old, "notes.txt"]:
        (earlier / name).write_text("of the earlier run")
    (earlier / "tensorboard").mkdir()
    (earlier / "tensorboard" / "events.out.tfevents.1").write_text("of the earlier run")
    monkeypatch.setattr("convmlp.classification.trainer.Trainer.train_epoch", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--overwrite")
    left = [".holder", ".lock", "args.yaml", "duplicates.csv", "notes.txt"]
    assert sorted(p.name for p in earlier.iterdir()) == left and "of the earlier" not in (earlier / left[3]).read_text()


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written_is_named(run, tmp_path, place):
    (tmp_path / "file").write_text("")
    code, said, _ = run("--output", str(tmp_path / place))
    assert code == 2 and "cannot write to the output folder" in said


def test_what_a_killed_write_leaves_is_removed(run, earlier):
    (earlier / ".last.123.part.pth").write_bytes(b"half a checkpoint")
    code, said, _ = run("--resume", "auto")
    assert code == 0 and not list(earlier.glob(".*.part*")), said


HOLD = "import sys, time; from pathlib import Path; from convmlp.common.files import lock_folder\n"
HOLD += "file = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_two_runs_do_not_write_into_one_folder(run, tmp_path):
    folder = tmp_path / "out" / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for arguments in ([], ["--overwrite"], ["--resume", "auto"]):
            code, said, _ = run(*arguments)
            assert code == 2 and f"{folder} is in use by process {holder.pid} on " in said
    finally:
        holder.kill()
        holder.wait()
    with lock_folder(folder):  # what a killed process held is free
        pass


# Mistakes


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "convmlp_x"], "unknown --model convmlp_x; did you mean convmlp_"),
        (["--model", "convmlp_s.nope"], "there is convmlp_s.in1k"),
        (["--num-classes", "9"], "--num-classes is 9, but the data has 3 classes"),
        (["--batch-size", "26"], "--batch-size 26 is larger than the data: 24 images"),
        (["--device", "cuda:7"], "--device cuda"),
        (["--device", "cpu:abc"], "unknown --device cpu:abc"),
        (["--device", "gpu"], "unknown --device gpu"),
        (["--opt", "adamwww"], "--opt adamwww"),
        (["--sched", "cosinus"], "--sched cosinus"),
        (["--train-interpolation", "cubic"], "--train-interpolation"),
        (["--sync-bn"], "--sync-bn needs GPUs"),
        (["--model", "vgg11", "--grad-checkpointing"], "gradient checkpointing not supported"),
        (["--kd-model", "convmlp_z"], "unknown --kd-model convmlp_z; did you mean convmlp_"),
        (["--kd-model", "convmlp_m"], "knows 1000 classes, the data 3: give a --kd-checkpoint"),
        (["--model-kwargs", "conv_stge=False"], "unexpected keyword argument 'conv_stge'"),
        (["--model-kwargs", "num_classes=4"], "num_classes: that has an option of its own"),
        (["--model-kwargs", "n_conv_blocks=-1"], "n_conv_blocks=-1"),
        (["--initial-checkpoint", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--resume", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--eval", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--lerning-rate", "1"], "unknown option --lerning-rate"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are no mistakes beside a GPU")
def test_mistakes_end_with_one_clear_line_and_nothing_written(run, capsys, arguments, message):
    code, _, folder = run(*arguments, model=[])
    error = capsys.readouterr().err
    assert code == 2 and message in error
    assert error.startswith("classification.py: error: ") and error.count("\n") == 1
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_training(run, monkeypatch, package):
    monkeypatch.setattr("convmlp.common.packages.importlib.util.find_spec", lambda name: None)
    code, said, folder = run(f"--log-{package}")
    assert code == 2 and f"--log-{package} needs a missing package: pip install {package}" in said
    assert not folder.exists()


def test_checkpoints_of_other_variants_classes_or_purpose_are_refused(run, tmp_path):
    torch.save(convmlp_m(num_classes=3).state_dict(), tmp_path / "m.pth")
    torch.save(convmlp_s(num_classes=9).state_dict(), tmp_path / "nine.pth")
    code, said, _ = run("--initial-checkpoint", str(tmp_path / "m.pth"), model=[])
    assert code == 2 and "It fits convmlp_m" in said
    code, said, _ = run("--eval", str(tmp_path / "nine.pth"), model=[])
    assert code == 2 and "has 9 classes, the data 3" in said
    code, said, _ = run("--resume", str(tmp_path / "nine.pth"), model=[])
    assert code == 2 and "no training state to resume" in said


def test_published_tags_ask_for_their_own_file(run, tmp_path, monkeypatch):
    def no_network(*arguments, **named):
        raise OSError("no network in tests")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    code, said, _ = run("--model", "convmlp_s.in1k_ft_cifar10", "--pretrained", model=[])
    assert code == 2 and "convmlp_s_cifar10.pth" in said and "imagenet" not in said


def test_the_help_of_the_script_needs_no_pytorch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('the help took PyTorch')")
    (tmp_path / "timm.py").write_text("raise ImportError('the help took timm')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    shown = subprocess.run(
        [sys.executable, str(ROOT / "classification.py"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert shown.returncode == 0 and "--grad-accum-steps" in shown.stdout, shown.stderr
