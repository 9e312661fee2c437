"""Numbers that are not finite: they end the run, or an update is left out without a trace."""

import math

import pytest
import torch

from convmlp.classification.finite import find_nonfinite
from convmlp.classification.trainer import Trainer


@pytest.fixture
def poison(monkeypatch):
    """Makes the gradients, or the loss, of these batches of epoch 0 not finite."""

    def apply(batches, where):
        clip, train_step = Trainer.clip_gradients, Trainer.train_step

        def loss_is_nan(trainer, *arguments):
            task = trainer.task
            forward = task.forward

            def poisoned(images, targets):
                result = forward(images, targets)
                if trainer.epoch == 0 and trainer.batch in batches:
                    result["loss"] = result["loss"] * float("nan")
                return result

            task.forward = poisoned
            try:
                return train_step(trainer, *arguments)
            finally:
                del task.forward

        def gradient_is_infinite(trainer):
            if trainer.epoch == 0 and trainer.batch - 1 in batches:
                trainer.model.head.weight.grad[0, 0] = float("inf")
            return clip(trainer)

        if where == "loss":
            monkeypatch.setattr(Trainer, "train_step", loss_is_nan)
        else:
            monkeypatch.setattr(Trainer, "clip_gradients", gradient_is_infinite)

    return apply


@pytest.mark.parametrize("where, what", [("loss", "the loss is nan"), ("gradient", "the norm of the gradients is inf")])
def test_numbers_that_are_not_finite_end_the_run_and_name_the_images(run, poison, where, what):
    poison({1}, where)
    code, said, folder = run()
    assert code == 1 and f"{what} at batch 1 of epoch 0" in said and "no checkpoint was written yet" in said
    lines = (folder / "nonfinite.txt").read_text().splitlines()
    assert lines[0] == f"epoch 0, batch 1, process 0: {what}"
    assert len(lines) == 1 + 8 and all(line.endswith(".png") for line in lines[1:])


def test_a_loss_that_explodes_keeps_the_last_checkpoint(run, earlier):
    before = (earlier / "last.pth").read_bytes()
    code, said, _ = run("--resume", "auto", "--lr", "1e12", "--min-lr", "1e12", "--epochs", "3")
    assert code == 1
    assert "of epoch 2" in said and ".png" in said and str(earlier / "last.pth") in said
    assert (earlier / "last.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("where", "accumulate", "batch"),
    [
        ("loss", 1, 1),
        ("gradient", 1, 1),
        ("loss", 2, 2),
        ("loss", 2, 3),
        ("gradient", 2, 3),
    ],
)
def test_some_updates_may_be_left_out_without_a_trace(run, poison, where, accumulate, batch):
    arguments = ["--batch-size", "4", "--grad-accum-steps", str(accumulate), "--model-ema", "--skip-nonfinite", "1"]
    poison({batch}, where)
    code, said, folder = run(*arguments)
    assert code == 0 and f"batch {batch} of epoch 0: its loss or gradients are not finite; the update is left" in said
    assert f"epoch 0, batch {batch}, process 0: " in (folder / "nonfinite.txt").read_text()
    state = torch.load(folder / "last.pth", weights_only=True)
    assert state["skipped"] == 1 and state["updates"] == 2 * 6 // accumulate
    for part in ("state_dict", "state_dict_ema"):
        assert all(torch.isfinite(value).all() for value in state[part].values())
    assert math.isfinite(state["history"][0]["train_loss"])
    counters = [value for key, value in state["state_dict"].items() if key.endswith("num_batches_tracked")]
    assert {int(value) for value in counters} == {2 * 6 - accumulate}  # BatchNorm has not seen the update either


def test_no_more_updates_than_allowed_are_left_out(run, poison):
    poison({0, 2}, "gradient")
    code, said, folder = run("--skip-nonfinite", "1")
    assert code == 1 and "that is more than --skip-nonfinite 1" in said
    assert len((folder / "nonfinite.txt").read_text().split("epoch 0")) == 3


@pytest.mark.parametrize(
    ("poisoned", "name"),
    [
        (lambda trainer: trainer.model.head.weight.data, "head.weight is not finite"),
        (lambda trainer: next(iter(trainer.optimizer.state.values()))["exp_avg_sq"], "exp_avg_sq is not finite"),
    ],
    ids=["weights", "moments"],
)
def test_weights_and_moments_that_are_not_finite_are_never_saved(run, monkeypatch, poisoned, name):
    save = Trainer.save

    def poison_then_save(trainer, evaluated):
        poisoned(trainer).view(-1)[0] = float("nan")
        save(trainer, evaluated)

    monkeypatch.setattr(Trainer, "save", poison_then_save)
    code, said, folder = run("--epochs", "1")
    assert code == 1 and name in said and not (folder / "last.pth").exists()


def test_the_first_bad_tensor_of_a_nested_state_is_named():
    state = {"a": [torch.ones(2), {"b": torch.tensor([1.0, math.inf])}], "c": torch.tensor(math.nan), "d": 3}
    assert find_nonfinite(state, "state") == "state.a.1.b"
    assert find_nonfinite({"a": torch.ones(1), "b": "text"}, "state") is None
