"""classification.py from end to end, on small folders of real digits."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from convmlp import convmlp_m, convmlp_s
from convmlp.classification import main
from convmlp.classification.checkpoints import write_checkpoint
from convmlp.classification.trainer import Trainer, _Clock
from convmlp.common.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")

ROOT = Path(__file__).parents[1]
SMALL = ["--img-size", "32", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--workers", "1"]
EVERYTHING_RANDOM = ["--aa", "rand-m9-mstd0.5-inc1", "--mixup", "0.8", "--cutmix", "1", "--reprob", "0.5"]
EVERYTHING_RANDOM += ["--drop", "0.1", "--model-ema", "--model-ema-decay", "0.9"]


@pytest.fixture
def run(pictures, tmp_path, capsys):
    """Runs classification.py in this process: run(options..., experiment=) -> (exit code, stderr, folder)."""

    def call(*arguments, experiment="run", data=pictures):
        code = main([*SMALL, "--output", str(tmp_path / "out"), "--experiment", experiment, *arguments, str(data)])
        return code, capsys.readouterr().err, tmp_path / "out" / experiment

    call.data = pictures
    return call


def read(path):
    return torch.load(path, weights_only=True)


def rows_of(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_state(ours, theirs):
    """Equal bit for bit, whatever is nested in what."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_state(mine, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_a_run_leaves_checkpoints_figures_and_pictures(run, caplog):
    code, _, folder = run()
    assert code == 0
    last, best = read(folder / "last.pth"), read(folder / "best.pth")
    assert (last["epoch"], last["evaluated"], last["updates"]) == (1, True, 6)
    assert last["class_names"] == ["digit0", "digit1", "digit2"]
    convmlp_s(num_classes=3).load_state_dict(best["state_dict"])
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["lr"]) < float(rows[0]["lr"])
    assert yaml.safe_load((folder / "args.yaml").read_text())["img_size"] == 32
    for name in ("curves.png", "confusion_matrix.png", "predictions.png"):
        with Image.open(folder / name) as picture:
            assert len(picture.convert("L").resize((200, 200)).getcolors()) > 5, f"{name} is blank"
    per_class = list(csv.DictReader(open(folder / "per_class.csv", newline="")))
    right = sum(int(row["right"]) for row in per_class)
    assert sum(int(row["images"]) for row in per_class) == 15
    best_top1 = max(float(row["eval_top1"]) for row in rows)
    assert right / 15 * 100 == pytest.approx(best_top1)
    assert f"({right} of 15 images)" in caplog.text
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == [".lock"]


def test_evaluation_takes_its_settings_from_the_checkpoint(run, pictures, tmp_path, caplog):
    _, _, folder = run()
    best = max(float(row["eval_top1"]) for row in rows_of(folder))
    caplog.clear()
    code = main(["--eval", str(folder / "best.pth"), "--output", str(tmp_path), "--experiment", "eval", str(pictures)])
    assert code == 0
    assert f"top-1 {best:.2f} %" in caplog.text
    assert {p.name for p in (tmp_path / "eval").iterdir()} >= {"confusion_matrix.png", "predictions.png"}


def test_evaluations_go_beside_the_checkpoint_and_understand_its_classes(run, make_pictures, caplog):
    _, _, folder = run("--mixup", "0.5")
    two = make_pictures("two", classes=(1, 2))
    caplog.clear()
    assert main(["--eval", str(folder / "best.pth"), "--batch-size", "7", str(two)]) == 0
    assert (folder / "eval" / "predictions.png").exists() and (folder / "per_class.csv").exists()
    per_class = list(csv.DictReader(open(folder / "eval" / "per_class.csv", newline="")))
    assert [(row["class"], row["images"]) for row in per_class] == [("digit0", "0"), ("digit1", "5"), ("digit2", "5")]
    ours = {row["class"]: row["right"] for row in per_class}
    for row in csv.DictReader(open(folder / "per_class.csv", newline="")):
        assert row["class"] == "digit0" or ours[row["class"]] == row["right"]


def test_evaluating_on_unknown_classes_is_refused(run, make_pictures, capsys):
    _, _, folder = run("--epochs", "1")
    assert main(["--eval", str(folder / "best.pth"), str(make_pictures("others", classes=(1, 7)))]) == 2
    assert "does not know the class digit7" in capsys.readouterr().err


class Killed(BaseException):
    """Stands for a kill: nothing in the run handles it."""


@pytest.mark.parametrize("at_batch", [1, 2])
def test_a_run_killed_within_an_epoch_continues_bit_for_bit(run, monkeypatch, at_batch):
    arguments = [*EVERYTHING_RANDOM, "--checkpoint-interval", "1"]
    _, _, undisturbed = run(*arguments)

    save = Trainer.save

    def save_then_die(trainer, evaluated):
        save(trainer, evaluated)
        if (trainer.epoch, trainer.batch) == (1, at_batch):
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "save", save_then_die)
        run(*arguments, experiment="killed")
    code, _, killed = run(*arguments, "--resume", "auto", experiment="killed")
    assert code == 0
    ours, theirs = read(killed / "last.pth"), read(undisturbed / "last.pth")
    assert ours["args"].pop("experiment") != theirs["args"].pop("experiment")
    assert_same_state(ours, theirs)
    assert (killed / "summary.csv").read_bytes() == (undisturbed / "summary.csv").read_bytes()


def test_a_resumed_plateau_schedule_stands_where_it_stood(run):
    arguments = ["--sched", "plateau", "--patience-epochs", "0", "--decay-rate", "0.5", "--min-lr", "0"]
    arguments += ["--opt", "sgd", "--lr", "1e-6", "--epochs", "4"]  # nothing improves, so each epoch halves the rate
    _, _, undisturbed = run(*arguments)
    _, _, folder = run(*arguments, experiment="two")
    os.replace(folder / "previous.pth", folder / "last.pth")
    code, err, folder = run(*arguments, "--resume", "auto", experiment="two")
    assert code == 0, err
    assert rows_of(folder) == rows_of(undisturbed)
    assert float(rows_of(folder)[-1]["lr"]) < float(rows_of(folder)[0]["lr"])


def test_options_given_on_resuming_hold(run):
    run("--epochs", "1")
    code, _, folder = run("--resume", "auto", "--epochs", "2", "--weight-decay", "0.3")
    assert code == 0
    decays = {group["weight_decay"] for group in read(folder / "last.pth")["optimizer"]["param_groups"]}
    assert decays == {0.0, 0.3}


def test_a_complete_run_can_be_resumed_and_extended_with_a_warning(run, caplog):
    run()
    code, _, folder = run("--resume", "auto")
    assert code == 0 and "already complete" in caplog.text
    code, _, folder = run("--resume", str(folder / "last.pth"), "--epochs", "3")
    assert code == 0 and "epochs 2 -> 3" in caplog.text
    assert [row["epoch"] for row in rows_of(folder)] == ["0", "1", "2"]


def test_resuming_auto_without_a_checkpoint_starts_a_run(run):
    code, _, folder = run("--resume", "auto", "--epochs", "1")
    assert code == 0 and len(rows_of(folder)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(run, caplog, damage):
    _, _, folder = run()
    content = bytearray((folder / "last.pth").read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0xFF
    (folder / "last.pth").write_bytes(content)
    code, _, _ = run("--resume", "auto")
    assert code == 0 and "trying the one before it" in caplog.text and "epoch 1, batch 0" in caplog.text
    assert len(rows_of(folder)) == 2


def test_a_run_continued_in_another_folder_takes_its_best_checkpoint_along(run):
    _, _, first = run()
    run("--seed", "3", experiment="old")
    code, err, second = run("--resume", str(first / "last.pth"), experiment="second")
    assert code == 0, err
    assert (second / "best.pth").read_bytes() == (first / "best.pth").read_bytes()
    code, err, old = run("--resume", str(first / "last.pth"), "--overwrite", experiment="old")
    assert code == 0, err
    assert (old / "best.pth").read_bytes() == (first / "best.pth").read_bytes()


def test_the_schedule_ends_at_its_end_after_resuming_with_other_batches(run):
    arguments = ["--epochs", "3", "--lr", "1e-3", "--min-lr", "1e-5"]
    _, _, folder = run(*arguments)
    os.replace(folder / "previous.pth", folder / "last.pth")
    code, err, folder = run(*arguments, "--batch-size", "4", "--resume", "auto")
    assert code == 0, err
    assert float(rows_of(folder)[-1]["lr"]) == pytest.approx(1e-5)


def test_an_earlier_run_is_not_overwritten_unasked(run):
    _, _, folder = run("--epochs", "1")
    before = (folder / "last.pth").read_bytes()
    code, err, _ = run()
    assert code == 2 and "--resume auto continues it, --overwrite" in err
    assert (folder / "last.pth").read_bytes() == before
    assert run("--overwrite")[0] == 0 and len(rows_of(folder)) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(run):
    _, _, folder = run("--epochs", "1")
    before = (folder / "last.pth").read_bytes()
    code, err, _ = run("--resume", "auto", "--lr", "1e12", "--min-lr", "1e12", "--epochs", "3")
    assert code == 1
    assert "of epoch 1" in err and ".png" in err and str(folder / "last.pth") in err
    assert (folder / "last.pth").read_bytes() == before


def test_weights_that_are_not_finite_are_never_saved(run, monkeypatch):
    save = Trainer.save

    def poison_then_save(trainer, evaluated):
        with torch.no_grad():
            trainer.model.head.weight[0, 0] = float("nan")
        save(trainer, evaluated)

    monkeypatch.setattr(Trainer, "save", poison_then_save)
    code, err, folder = run("--epochs", "1")
    assert code == 1 and "head.weight is not finite" in err and not (folder / "last.pth").exists()


def test_accumulated_steps_make_one_update(run):
    _, _, folder = run("--batch-size", "4", "--grad-accum-steps", "4", "--epochs", "1")
    assert read(folder / "last.pth")["updates"] == 2  # six batches: four and two


@pytest.mark.parametrize(
    "arguments",
    [
        ["--amp", "--amp-dtype", "bfloat16", "--clip-grad", "1", "--layer-decay", "0.8"],
        ["--grad-checkpointing", "--no-channels-last", "--opt", "lamb", "--sched", "step"],
        ["--in-chans", "1", "--opt", "sgd", "--clip-grad", "0.02", "--clip-mode", "agc", "--gp", "max"],
        ["--sched", "plateau", "--crop-mode", "squash", "--drop-path", "0", "--eval-metric", "loss"],
        ["--model", "resnet10t", "--model-ema", "--model-ema-warmup", "--smoothing", "0"],
    ],
)
def test_options_reach_a_run_that_learns_something(run, arguments):
    code, err, folder = run(*arguments)
    assert code == 0, err
    rows = rows_of(folder)
    assert len(rows) == 2 and float(rows[1]["train_loss"]) != float(rows[0]["train_loss"])


def test_a_model_is_compiled_for_training_and_for_evaluation_and_no_more(run, caplog):
    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    counters = dynamo.utils.counters
    counters.clear()
    small = ["--model-kwargs", "blocks=[1,1,1]", "dims=[8,16,24]", "channels=8"]
    code, err, folder = run("--compile", *small)  # 15 images to evaluate, in batches of 8
    assert code == 0, err
    assert counters["stats"]["unique_graphs"] == 2
    caplog.clear()
    assert main(["--eval", str(folder / "best.pth"), "--no-compile", str(run.data)]) == 0  # the same without
    best = max(float(row["eval_top1"]) for row in rows_of(folder))
    assert f"top-1 {best:.2f} %" in caplog.text


def test_training_computes_in_mixed_precision_unless_told_otherwise(run, caplog, monkeypatch):
    monkeypatch.setattr("convmlp.classification.trainer.resolve_amp_dtype", lambda choice, device: torch.bfloat16)
    run("--epochs", "1")
    assert "1 x cpu, bfloat16" in caplog.text
    caplog.clear()
    run("--epochs", "1", "--no-amp", experiment="full")
    assert "1 x cpu, float32" in caplog.text


def test_waiting_is_the_time_between_asking_for_a_batch_and_having_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("convmlp.classification.trainer.time.perf_counter", lambda: now[0])

    def batches():
        for _ in range(4):
            now[0] += 1
            yield object()

    clock = _Clock(batch_images=8)
    for _ in clock.watch(batches()):
        now[0] += 3
    assert clock.pace() == "2 img/s, 25% waiting for data"


def test_the_log_tells_how_much_of_the_time_a_run_waits_for_data(run, caplog):
    run("--epochs", "1")
    assert re.search(r"\d+ img/s, \d+% waiting for data", caplog.text)


def test_weights_from_a_file_keep_everything_but_a_head_of_other_classes(run, tmp_path, caplog):
    torch.manual_seed(1)
    source = convmlp_s(num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "seven.pth")
    code, err, folder = run("--initial-checkpoint", str(tmp_path / "seven.pth"), "--lr", "0", "--min-lr", "0")
    assert code == 0, err
    assert "has 7 classes, the data 3: the head starts afresh" in caplog.text
    weights = read(folder / "last.pth")["state_dict"]
    name = "stages.1.blocks.2.channel_mlp1.fc1.weight"
    torch.testing.assert_close(weights[name], source.state_dict()[name])
    assert weights["head.weight"].shape == (3, 512)


def test_a_head_of_other_classes_is_not_kept_for_their_number(run, make_pictures, caplog):
    _, _, folder = run("--epochs", "1")
    others = make_pictures("others", classes=(4, 5, 6))
    arguments = ["--initial-checkpoint", str(folder / "best.pth"), "--lr", "0", "--min-lr", "0", "--epochs", "1"]
    _, _, same = run(*arguments, experiment="same")
    assert "starts afresh" not in caplog.text
    code, err, new = run(*arguments, experiment="new", data=others)
    assert code == 0 and "knows other classes (digit0, digit1, digit2, ...) than the data has" in caplog.text, err
    heads = [read(f / "last.pth")["state_dict"]["head.weight"] for f in (folder, same, new)]
    torch.testing.assert_close(heads[1], heads[0])
    assert not torch.allclose(heads[2], heads[0])


def test_a_fine_tuning_config_starts_from_the_published_weights_in_the_cache(run, tmp_path, monkeypatch):
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    source = convmlp_s()
    torch.save(source.state_dict(), cache / "convmlp_s_imagenet.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config = ROOT / "configs" / "classification" / "finetuned" / "convmlp_s_flowers102.yml"
    arguments = ["-c", str(config), "--dataset", "", "--num-classes", "3", "--cooldown-epochs", "0"]
    code, err, folder = run(*arguments, "--lr", "1e-9", "--min-lr", "0", "--warmup-lr", "0")
    assert code == 0, err
    name = "stages.0.blocks.0.connect.weight"
    torch.testing.assert_close(read(folder / "best.pth")["state_dict"][name], source.state_dict()[name])


def test_a_teacher_is_distilled_from(run, tmp_path):
    torch.save(convmlp_m(num_classes=3).state_dict(), tmp_path / "teacher.pth")
    teacher = ["--kd-model", "convmlp_m", "--kd-checkpoint", str(tmp_path / "teacher.pth")]
    losses = {}
    for weight in ("0", "100"):
        code, err, folder = run(*teacher, "--kd-weight", weight, "--epochs", "1", experiment=f"kd{weight}")
        assert code == 0, err
        losses[weight] = float(rows_of(folder)[0]["train_loss"])
    assert losses["100"] > losses["0"] + 1


def test_unreadable_pictures_are_counted_at_the_end_or_stop_the_run(run, pictures, caplog):
    picture = next((pictures / "train" / "digit0").iterdir())
    picture.write_bytes(b"")
    code, _, _ = run("--epochs", "1")
    assert code == 0 and "1 images could not be read" in caplog.text and str(picture) in caplog.text
    code, err, _ = run("--epochs", "1", "--on-bad-image", "stop", experiment="strict")
    assert code == 2 and str(picture) in err


def test_a_validation_set_that_cannot_be_read_is_an_error(run, pictures):
    for picture in pictures.glob("val/*/*.png"):
        picture.write_bytes(b"")
    code, err, folder = run("--epochs", "1")
    assert code == 2 and "not one validation image could be read" in err


def test_class_names_may_hold_anything(run, pictures):
    for split in ("train", "val"):
        (pictures / split / "digit0").rename(pictures / split / "$5_$6 \u5b57 & so on, with a long name")
    code, err, folder = run("--epochs", "1")
    assert code == 0 and (folder / "confusion_matrix.png").exists(), err


def test_a_teacher_of_other_classes_needs_its_own_checkpoint(run):
    code, err, _ = run("--kd-model", "convmlp_m")
    assert code == 2 and "knows 1000 classes, the data 3: give a --kd-checkpoint" in err


def test_published_tags_ask_for_their_own_file(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("convmlp.use.classifier.MIRRORS", ("http://127.0.0.1:9/",))
    code, err, _ = run("--model", "convmlp_s.in1k_ft_cifar10", "--pretrained")
    assert code == 2 and "convmlp_s_cifar10.pth" in err and "imagenet" not in err
    code, err, _ = run("--model", "convmlp_s.nope")
    assert code == 2 and "there is convmlp_s.in1k" in err


def test_metrics_go_to_tensorboard_when_asked(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, _, folder = run("--log-tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("eval_loss")]
    assert logged == pytest.approx([float(row["eval_loss"]) for row in rows_of(folder)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "convmlp_x"], "unknown --model convmlp_x; did you mean convmlp_"),
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
        (["--initial-checkpoint", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--resume", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--eval", "nowhere.pth"], "no such checkpoint: nowhere.pth"),
        (["--lerning-rate", "1"], "unknown option --lerning-rate"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are no mistakes beside a GPU")
def test_mistakes_end_with_one_clear_line_and_nothing_written(run, arguments, message):
    code, err, folder = run(*arguments)
    assert code == 2
    assert message in err and err.startswith("classification.py: error: ") and err.count("\n") == 1
    assert not folder.exists() or not list(folder.iterdir())


def test_checkpoints_of_other_variants_classes_or_purpose_are_refused(run, tmp_path):
    torch.save(convmlp_m(num_classes=3).state_dict(), tmp_path / "m.pth")
    torch.save(convmlp_s(num_classes=9).state_dict(), tmp_path / "nine.pth")
    code, err, _ = run("--initial-checkpoint", str(tmp_path / "m.pth"))
    assert code == 2 and "It fits convmlp_m" in err
    code, err, _ = run("--eval", str(tmp_path / "nine.pth"))
    assert code == 2 and "has 9 classes, the data 3" in err
    code, err, _ = run("--resume", str(tmp_path / "nine.pth"))
    assert code == 2 and "no training state to resume" in err


def test_a_checkpoint_of_odd_content_is_refused_in_one_line(run):
    _, _, folder = run("--epochs", "1")
    for key, value in {"epoch": "x", "history": None, "args": [1], "optimizer": 3}.items():
        torch.save({**read(folder / "last.pth"), key: value}, folder / "odd.pth")
        code, err, _ = run("--resume", str(folder / "odd.pth"))
        assert code == 2 and f"its {key} is {value!r}" in err and err.count("\n") == 1


def test_resuming_another_run_is_refused(run, make_pictures):
    _, _, folder = run("--epochs", "1", "--checkpoint-interval", "1")
    last = str(folder / "last.pth")
    code, err, _ = run("--resume", last, "--model", "convmlp_m", experiment="other")
    assert code == 2 and "its arch is convmlp_s, here it is convmlp_m" in err
    code, err, _ = run("--resume", last, data=make_pictures("others", classes=(4, 5, 6)), experiment="other")
    assert code == 2 and "class_names" in err
    code, err, _ = run("--resume", last, "--model-ema", experiment="other")
    assert code == 2 and "--model-ema cannot be switched" in err


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_an_output_folder_that_cannot_be_written_is_named(run, tmp_path, place):
    (tmp_path / "file").write_text("")
    code, err, _ = run("--output", str(tmp_path / place))
    assert code == 2 and "cannot write into the output folder" in err


def test_a_failed_write_leaves_the_checkpoint_as_it_was(tmp_path):
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"x": torch.ones(2)})
    before = path.read_bytes()
    link = tmp_path / "full.pth"
    link.write_bytes(before)
    with pytest.raises((RunError, AttributeError, TypeError)):
        write_checkpoint(path, {"x": (i for i in range(2))})  # cannot be pickled
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["full.pth", "last.pth"]


@pytest.fixture
def script(tmp_path):
    """Runs dist_classification.sh: script(processes, options..., experiment=, data=) -> stderr."""

    def call(processes, *arguments, experiment, data):
        command = [str(ROOT / "dist_classification.sh"), str(processes), *SMALL, "--output", str(tmp_path)]
        command += ["--experiment", experiment, *arguments, str(data)]
        environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stderr

    return call


def test_two_processes_train_together_and_evaluate_like_one(script, pictures, tmp_path):
    script(2, "--batch-size", "4", "--checkpoint-interval", "2", experiment="both", data=pictures)
    state = read(tmp_path / "both" / "last.pth")
    assert state["world_size"] == 2 and state["updates"] == 6
    best = str(tmp_path / "both" / "best.pth")
    alone = script(1, "--eval", best, experiment="alone", data=pictures)
    together = script(2, "--eval", best, experiment="together", data=pictures)
    summary = [line for line in alone.splitlines() if "top-1" in line]
    assert summary and summary == [line for line in together.splitlines() if "top-1" in line]
    assert (tmp_path / "alone" / "per_class.csv").read_text() == (tmp_path / "together" / "per_class.csv").read_text()


def test_a_process_without_validation_images_waits_for_no_one(script, make_pictures, tmp_path):
    data = make_pictures("one", classes=(3,), splits={"train": 16, "val": 1})
    shown = script(2, "--batch-size", "4", "--epochs", "1", experiment="one", data=data)
    assert "(1 of 1 images)" in shown and (tmp_path / "one" / "predictions.png").exists()


def test_the_script_refuses_a_wrong_number_of_processes():
    result = subprocess.run([ROOT / "dist_classification.sh", "all"], capture_output=True, text=True)
    assert result.returncode == 2 and "got 'all' as the number" in result.stderr


def test_arguments_of_the_model_are_kept_with_it(run, caplog):
    switches = "conv_stage=False,conv_downsample=False,spatial_connect=False"
    code, _, folder = run("--model-kwargs", switches, "--epochs", "1")
    best = read(folder / "best.pth")
    assert code == 0 and best["args"]["model_kwargs"]["spatial_connect"] is False
    assert "tokenizer.projection.weight" in best["state_dict"]
    caplog.clear()
    top1 = float(rows_of(folder)[0]["eval_top1"])
    assert run("--eval", str(folder / "best.pth"))[0] == 0 and f"top-1 {top1:.2f} %" in caplog.text
    assert run("--resume", "auto", "--model-kwargs", switches)[0] == 0 and len(rows_of(folder)) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("conv_stge=False", "unexpected keyword argument 'conv_stge'"),
        ("num_classes=4", "num_classes: that has an option of its own"),
        ("n_conv_blocks=-1", "n_conv_blocks=-1"),
    ],
)
def test_a_wrong_argument_of_the_model_is_one_line(run, value, message):
    code, err, _ = run("--model-kwargs", value)
    assert code == 2 and message in err and err.count("\n") == 1


def test_transparent_pictures_lie_on_white_in_training_too():
    from convmlp.classification.loaders import BatchDataset

    class Source:
        def load(self, index):
            return Image.new("RGBA", (4, 4), (200, 0, 0, 0)), 0

    image, _ = BatchDataset(Source(), None, "RGB")._read(0)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_the_dist_scripts_let_a_step_keep_its_buffers(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || env\n')
    python.chmod(0o755)
    own = {"PYTHON": str(python), "MALLOC_TRIM_THRESHOLD_": "123"}
    script = str(ROOT / "dist_classification.sh")
    shown = subprocess.run([script, "1"], env={**os.environ, **own}, capture_output=True, text=True, check=True).stdout
    assert "MALLOC_MMAP_THRESHOLD_=2000000000\n" in shown and "MALLOC_TRIM_THRESHOLD_=123\n" in shown
