"""Training: how it is resumed, stopped, and what it takes for the best epoch."""

import csv
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from convmlp.classification.trainer import Trainer
from convmlp.common.command import STOPPED

from .conftest import RANDOM_EVERYTHING, ROOT

pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")

PURE_MLP = "--model-kwargs blocks=[1,1,1] dims=[8,16,32] mlp_ratios=[1,1,1] channels=8".split()


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


def assert_same_run(ours, theirs):
    """Two runs left the same checkpoint and summary."""
    states = [read(folder / "last.pth") for folder in (ours, theirs)]
    for state in states:
        for option in ("output", "experiment"):
            state["args"].pop(option)
    assert_same_state(*states)
    assert (ours / "summary.csv").read_bytes() == (theirs / "summary.csv").read_bytes()


class Killed(BaseException):
    """Stands for a kill: nothing in the run handles it."""


# Resumption


@pytest.mark.parametrize("at_batch", [1, 2])
def test_a_run_killed_within_an_epoch_continues_bit_for_bit(run, undisturbed, monkeypatch, at_batch):
    save = Trainer.save

    def save_then_die(trainer, evaluated):
        save(trainer, evaluated)
        if (trainer.epoch, trainer.batch) == (1, at_batch):
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Trainer, "save", save_then_die)
        run(*RANDOM_EVERYTHING)
    code, said, folder = run(*RANDOM_EVERYTHING, "--resume", "auto")
    assert code == 0 and f"epoch 1, batch {at_batch}" in said
    assert_same_run(folder, undisturbed)


def test_a_resumed_plateau_schedule_stands_where_it_stood(run):
    arguments = ["--sched", "plateau", "--patience-epochs", "0", "--decay-rate", "0.5", "--min-lr", "0"]
    # Nothing improves, not even by the statistics of BatchNorm, so each epoch halves the rate
    arguments += ["--opt", "sgd", "--lr", "1e-6", "--epochs", "4", "--model", "pure_mlp_s"]
    _, _, folder = run(*arguments, model=PURE_MLP)
    before = rows_of(folder)
    os.replace(folder / "previous.pth", folder / "last.pth")
    code, said, folder = run(*arguments, "--resume", "auto", model=PURE_MLP)
    assert code == 0, said
    assert rows_of(folder) == before
    assert float(before[-1]["lr"]) < float(before[0]["lr"])


def test_a_complete_run_is_extended_with_a_warning_and_the_options_of_now(run, earlier):
    code, said, _ = run("--resume", "auto")
    assert code == 0 and "already complete" in said
    code, said, _ = run("--resume", str(earlier / "last.pth"), "--epochs", "3", "--weight-decay", "0.3")
    assert code == 0 and "epochs 2 -> 3" in said
    assert [row["epoch"] for row in rows_of(earlier)] == ["0", "1", "2"]
    assert {group["weight_decay"] for group in read(earlier / "last.pth")["optimizer"]["param_groups"]} == {0.0, 0.3}


def test_resuming_auto_without_a_checkpoint_starts_a_run(run):
    code, said, folder = run("--resume", "auto", "--epochs", "1")
    assert code == 0 and "nothing to resume" in said and len(rows_of(folder)) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_taken(run, earlier, damage):
    content = bytearray((earlier / "last.pth").read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        weight = read(earlier / "last.pth")["state_dict"]["head.weight"].numpy().tobytes()
        content[content.index(weight) + len(weight) // 2] ^= 0xFF
    (earlier / "last.pth").write_bytes(content)
    code, said, _ = run("--resume", "auto")
    assert code == 0 and "trying the one before it" in said and "epoch 1, batch 0" in said
    assert len(rows_of(earlier)) == 2


def test_a_run_continued_in_another_folder_takes_its_best_checkpoint_along(run, trained):
    last, best = str(trained.folder / "last.pth"), (trained.folder / "best.pth").read_bytes()
    run("--seed", "3", "--epochs", "1", experiment="old")
    for arguments, experiment in ((), "second"), (("--overwrite",), "old"):
        code, said, folder = run("--resume", last, *arguments, experiment=experiment)
        assert code == 0, said
        assert (folder / "best.pth").read_bytes() == best


def test_the_schedule_ends_at_its_end_after_resuming_with_other_batches(run, earlier):
    os.replace(earlier / "previous.pth", earlier / "last.pth")
    code, said, folder = run("--epochs", "3", "--batch-size", "4", "--resume", "auto")
    assert code == 0, said
    assert float(rows_of(folder)[-1]["lr"]) == pytest.approx(1e-5)


def test_resuming_another_run_is_refused(run, trained, make_pictures):
    last = str(trained.folder / "last.pth")
    code, said, _ = run("--resume", last, "--model", "convmlp_m")
    assert code == 2 and "its arch is convmlp_s, here it is convmlp_m" in said
    code, said, _ = run("--resume", last, data=make_pictures("others", classes=(4, 5, 6)))
    assert code == 2 and "class_names" in said
    code, said, _ = run("--resume", last, "--model-ema")
    assert code == 2 and "--model-ema cannot be switched" in said


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [({"world_size": 2}, [], "the same 2 processes"), ({}, ["--batch-size", "4"], "the same batch_size")],
)
def test_within_an_epoch_a_run_continues_with_the_same_batches_alone(run, earlier, changes, arguments, message):
    state = read(earlier / "last.pth") | {"batch": 1, "evaluated": False} | changes
    torch.save(state, earlier / "last.pth")
    code, said, _ = run("--resume", "auto", *arguments)
    assert code == 2 and f"continues only with {message}" in said


# The best epoch


@pytest.fixture
def evaluations(monkeypatch):
    """Lets the epochs of a run have these figures: evaluations([(top1, loss), ...])."""

    def apply(figures, predicted_classes=3):
        figures = iter(figures)

        def evaluate(*arguments, predictions=None, desc="", **named):
            top1, loss = (0.0, 0.0) if desc == "evaluating the best" else next(figures)
            accuracies = {"top1": top1, "top5": 100.0, "balanced_accuracy": top1, "macro_f1": top1}
            return accuracies | {"loss": loss, "predicted_classes": predicted_classes}

        monkeypatch.setattr("convmlp.classification.trainer.evaluate", evaluate)

    return apply


@pytest.mark.parametrize(
    ("metric", "figures", "best"),
    [
        ("loss", [(50, math.nan), (50, 2.0), (50, 3.0)], 1),
        ("loss", [(50, 2.0), (50, math.nan), (50, 1.0)], 2),
        ("loss", [(50, math.nan), (60, math.nan), (70, math.nan)], 0),
        ("top1", [(50, 2.0), (50, 1.0), (50, 1.5)], 1),
        ("top1", [(50, 1.0), (50, 1.0), (40, 0.5)], 0),
        ("top1", [(50, math.nan), (50, 1.0), (40, 0.5)], 1),
        ("top1", [(50, 1.0), (60, 3.0), (55, 0.5)], 1),
    ],
)
def test_the_best_epoch_has_the_best_figure_and_of_equal_ones_the_lower_loss(run, evaluations, metric, figures, best):
    evaluations(figures)
    code, said, folder = run("--epochs", "3", "--eval-metric", metric)
    assert code == 0 and f"best epoch {best}:" in said, said
    assert read(folder / "best.pth")["epoch"] == best and read(folder / "last.pth")["best"]["epoch"] == best


def test_resuming_with_another_metric_compares_like_with_like(run, evaluations):
    evaluations([(50, 2.0), (60, 3.0)])
    _, _, folder = run("--eval-metric", "top1")
    assert read(folder / "best.pth")["epoch"] == 1
    evaluations([(10, 5.0), (10, 2.5)])  # above 60, the value of then, and above 3.0; then below it
    code, said, _ = run("--eval-metric", "loss", "--epochs", "4", "--resume", "auto")
    assert code == 0 and "best epoch 3:" in said and read(folder / "best.pth")["epoch"] == 3
    assert read(folder / "previous.pth")["best"] == {"epoch": 1, "value": 3.0}


@pytest.fixture
def uneven(pictures):
    """Eight, eight and four training images."""
    for file in sorted((pictures / "train" / "digit2").iterdir())[:4]:
        file.unlink()
    return pictures


def test_with_uneven_classes_the_best_epoch_has_the_best_balanced_accuracy(run, uneven, images):
    code, said, folder = run("--epochs", "1", data=uneven)
    assert code == 0 and "best balanced accuracy, because the classes are uneven (4 to 8 training images)" in said
    assert read(folder / "best.pth")["eval_metric"] == "balanced_accuracy"
    assert yaml.safe_load((folder / "args.yaml").read_text())["eval_metric"] == "auto"
    code, said, folder = run("--epochs", "1", "--eval-metric", "macro_f1", experiment="given", data=uneven)
    assert "best balanced" not in said and read(folder / "best.pth")["eval_metric"] == "macro_f1"
    code, said, folder = run("--epochs", "1", experiment="even", data=images)
    assert "best balanced" not in said and read(folder / "best.pth")["eval_metric"] == "top1"


def test_a_resumed_run_keeps_its_metric_unless_another_is_given(run, uneven):
    run("--epochs", "1", "--eval-metric", "loss", data=uneven)
    code, said, folder = run("--resume", "auto", data=uneven)
    assert code == 0 and "eval_metric" not in said, said
    assert (
        read(folder / "last.pth")["eval_metric"] == "loss"
        and read(folder / "last.pth")["args"]["eval_metric"] == "auto"
    )
    code, said, folder = run("--resume", "auto", "--epochs", "3", data=uneven)
    assert read(folder / "last.pth")["eval_metric"] == "loss"


def test_a_run_of_an_older_version_goes_on_with_what_it_recorded(run, earlier):
    state = read(earlier / "last.pth")
    del state["eval_metric"]
    del state["args"]["warmup_prefix"]
    state["args"]["eval_metric"] = "top5"
    for row in state["history"]:
        for name in ("eval_balanced_accuracy", "eval_macro_f1", "eval_predicted_classes"):
            del row[name]
    torch.save(state, earlier / "last.pth")
    code, said, folder = run("--resume", "auto", "--epochs", "3")
    assert code == 0 and "resuming with changed options: epochs 2 -> 3\n" in said, said
    assert read(folder / "last.pth")["args"]["warmup_prefix"] is False
    assert read(folder / "last.pth")["eval_metric"] == "top5"
    assert [bool(row["eval_macro_f1"]) for row in rows_of(folder)] == [False, False, True]
    code, said, folder = run("--resume", "auto", "--epochs", "4", "--eval-metric", "macro_f1")
    assert code == 0 and read(folder / "last.pth")["best"]["epoch"] >= 2, said


def test_a_run_stops_early_and_is_complete_then(run, evaluations):
    evaluations([(50, 2.0), (60, 1.0), (60, 0.5), (55, 0.5), (99, 0.1)])
    arguments = ["--epochs", "9", "--early-stop", "2"]
    code, said, folder = run(*arguments)
    assert code == 0 and "stopping early: 2 epochs without a better top1 (--early-stop 2)" in said
    assert len(rows_of(folder)) == 4 and "best epoch 2:" in said
    code, said, folder = run(*arguments, "--resume", "auto")
    assert code == 0 and "already complete: 2 epochs without a better top1" in said and len(rows_of(folder)) == 4
    code, said, folder = run("--epochs", "5", "--early-stop", "0", "--resume", "auto")
    assert code == 0 and "complete" not in said and len(rows_of(folder)) == 5


def test_a_model_that_predicts_one_class_is_said_to_learn_nothing(run, evaluations):
    evaluations([(50, 2.0), (50, 2.0)], predicted_classes=1)
    code, said, _ = run()
    assert code == 0 and said.count("all validation images are taken for one class: nothing is being learned") == 1


# Steps


def test_accumulated_steps_make_one_update(run):
    _, _, folder = run("--batch-size", "4", "--grad-accum-steps", "4", "--epochs", "1")
    assert read(folder / "last.pth")["updates"] == 2  # six batches: four and two


def test_accumulated_batches_make_the_update_of_one_large_batch(run):
    plain = ["--no-amp", "--opt", "sgd", "--drop-path", "0", "--epochs", "1", "--lr", "0.1"]
    plain += ["--model", "pure_mlp_s"]  # which has no BatchNorm
    _, said, whole = run(*plain, "--batch-size", "8", experiment="whole", model=PURE_MLP)
    _, said, parts = run(*plain, "--batch-size", "4", "--grad-accum-steps", "2", experiment="parts", model=PURE_MLP)
    for name, weight in read(whole / "last.pth")["state_dict"].items():
        torch.testing.assert_close(read(parts / "last.pth")["state_dict"][name], weight, rtol=1e-4, atol=1e-6)


def test_training_computes_in_mixed_precision_unless_told_otherwise(run, monkeypatch):
    monkeypatch.setattr("convmlp.classification.trainer.resolve_amp_dtype", lambda choice, device: torch.bfloat16)
    assert "1 x cpu, bfloat16" in run("--epochs", "1").said
    assert "1 x cpu, float32" in run("--epochs", "1", "--no-amp", experiment="full").said


def test_the_log_tells_how_much_of_the_time_a_run_waits_for_data(trained):
    assert re.search(r"\d+ img/s, \d+% waiting for data", trained.said)


@pytest.mark.slow
def test_a_model_is_compiled_for_training_and_for_evaluation_and_no_more(run, images):
    from .conftest import call_main

    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    counters = dynamo.utils.counters
    counters.clear()
    code, said, folder = run("--compile")  # 15 images to evaluate, in batches of 8
    assert code == 0, said
    assert counters["stats"]["unique_graphs"] == 2
    best = max(float(row["eval_top1"]) for row in rows_of(folder))
    _, said = call_main("--eval", folder / "best.pth", "--no-compile", images)  # the same without
    assert f"top-1 {best:.2f} %" in said


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_from_there(run, undisturbed, monkeypatch, name):
    clip, sent = Trainer.clip_gradients, []

    def signalled(trainer):
        if trainer.batch == 2 and not sent:
            sent.append(os.kill(os.getpid(), getattr(signal, name)))
        return clip(trainer)

    monkeypatch.setattr(Trainer, "clip_gradients", signalled)
    code, said, folder = run(*RANDOM_EVERYTHING)
    assert code == STOPPED and f"{name}: saved at batch 2 of epoch 0; --resume auto goes on from there" in said
    assert run(*RANDOM_EVERYTHING, "--resume", "auto").code == 0
    assert_same_run(folder, undisturbed)


def test_a_signal_during_validation_does_not_wait_for_its_end(run, undisturbed, monkeypatch):
    evaluate_epoch, sent = Trainer.evaluate_epoch, []

    def signalled(trainer, train_loss):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return evaluate_epoch(trainer, train_loss)

    monkeypatch.setattr(Trainer, "evaluate_epoch", signalled)
    code, said, folder = run(*RANDOM_EVERYTHING)
    assert code == STOPPED and "SIGTERM: saved at batch 3 of epoch 0" in said
    assert run(*RANDOM_EVERYTHING, "--resume", "auto").code == 0
    assert_same_run(folder, undisturbed)


def test_a_second_interrupt_does_not_wait(run, monkeypatch):
    clip, earlier = Trainer.clip_gradients, signal.getsignal(signal.SIGINT)

    def interrupted_twice(trainer):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return clip(trainer)

    monkeypatch.setattr(Trainer, "clip_gradients", interrupted_twice)
    code, said, folder = run()
    assert code == 130 and "interrupted" in said and not (folder / "last.pth").exists()
    assert signal.getsignal(signal.SIGINT) is earlier


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, 2), (2, 1)])
def test_a_run_survives_kills_bit_for_bit(processes, kills):
    command = [sys.executable, str(ROOT / "tools" / "survive.py"), "--kills", str(kills), "--processes", str(processes)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} kills survived of {kills}, in 1 runs; largest difference 0.0" in result.stdout
