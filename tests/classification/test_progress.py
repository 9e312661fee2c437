"""How fast an epoch goes, and what the log says of it."""

import logging

import pytest

from convmlp.classification.progress import Clock, EpochProgress, epoch_line

ROW = {"epoch": 3, "train_loss": 1.25, "eval_loss": 0.5, "eval_top1": 75.0, "eval_top5": 100.0, "lr": 0.001}
ROW |= {"eval_balanced_accuracy": 74.0, "eval_macro_f1": 73.0}


def test_waiting_is_the_time_between_asking_for_a_batch_and_having_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("convmlp.classification.progress.time.perf_counter", lambda: now[0])

    def batches():
        for _ in range(4):
            now[0] += 1
            yield object()

    clock = Clock(batch_images=8)
    for _ in clock.watch(batches()):
        now[0] += 3
    assert clock.pace() == "2 img/s, 25% waiting for data"
    assert clock.time_for(1000) == "1:06:40"  # of four seconds each


@pytest.mark.parametrize(("seconds", "left"), [(5, "1:20 left"), (400, "1:46:40 left")])
def test_the_line_of_an_epoch_says_how_long_the_run_will_take(seconds, left):
    line = epoch_line(ROW, 20, "9 img/s", seconds)
    assert line.startswith(
        "epoch  3/20  loss 1.2500  val loss 0.5000  top-1 75.00  top-5 100.00  balanced 74.00  F1 73.00"
    )
    assert "  lr 1.0e-03  9 img/s  " in line
    assert line.endswith(left) and "averaged" not in line
    assert "top-1 75.00 (averaged 80.00)" in epoch_line(ROW | {"eval_ema_top1": 80.0}, 20, "", seconds)


def test_without_a_terminal_every_so_many_batches_have_a_line(caplog):
    caplog.set_level(logging.INFO, "convmlp")
    with EpochProgress(2, first=4, n_batches=30, log_interval=10, primary=True) as progress:
        for batch in range(7, 29, 3):
            progress.show(f"at {batch}", batch)
    assert caplog.messages == [f"epoch 2 batch {n}/30: at {n}" for n in (10, 22)]


def test_without_a_terminal_the_first_batches_of_a_run_tell_how_it_goes(caplog):
    caplog.set_level("INFO", "convmlp")
    for epoch in (0, 1):
        with EpochProgress(epoch, 0, 100, 50, primary=True) as progress:
            progress.bar.disable = True
            for batch in range(1, 101):
                progress.show(f"{batch} done", batch)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "epoch 0 batch 10/100",
        "epoch 0 batch 50/100",
        "epoch 0 batch 100/100",
        "epoch 1 batch 50/100",
        "epoch 1 batch 100/100",
    ]
