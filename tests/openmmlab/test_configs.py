"""Configs, and every mistake in a call of detection.py in one line."""

from pathlib import Path

import pytest
from small_runs import CONFIGS, RETINANET, ROOT, logged, quick_detection, run

from convmlp.cli import run_openmmlab
from convmlp.openmmlab.checkpoints import read_run_checkpoint

QUICK = str(CONFIGS / RETINANET)
RECIPE = "detection/retinanet_convmlp_s_fpn_1x_coco.py"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.py"], "no such config: nowhere.py"),
        ([str(CONFIGS / "detection/retinanet_convmlp_x_fpn_1x_coco.py")], "did you mean"),
        ([QUICK, "--tst", "x"], "unknown option --tst; did you mean --test?"),
        ([QUICK, "a", "b"], "there is one DATA folder, behind the config; got another: b"),
        ([QUICK, "nowhere"], "no such data folder: nowhere"),
        ([QUICK, "--test", "none.pth"], "--test: no such file: none.pth"),
        ([QUICK, "--resume", "none.pth"], "--resume: no such file: none.pth"),
        ([QUICK, "--resume", "."], "--resume takes a file, got the folder ."),
        ([QUICK, "--classes", "none.txt"], "--classes: no such file: none.txt"),
        ([QUICK, "--resume", "--check-data"], "give one of --resume and --check-data"),
        ([QUICK, "--resume", "--overwrite"], "give one of --resume and --overwrite"),
        ([QUICK, "--test", str(ROOT / "setup.py"), "--amp"], "--amp is for training"),
        ([QUICK, "--seed", "-1"], "--seed lies between 0 and 4294967295, got -1"),
        (
            [QUICK, "--work-dir", str(ROOT / "setup.py")],
            "--work-dir is a folder, got the file",
        ),
        (
            [QUICK, "--cfg-options", "optim_wraper.optimizer.lr=1"],
            "the config has no 'optim_wraper' there; did you mean optim_wrapper?",
        ),
        (
            [QUICK, "--cfg-options", "train_dataloader.datset.data_root=x"],
            "the config has no 'datset' there; did you mean dataset?",
        ),
        (
            [QUICK, "--cfg-options", "randomnes=3"],
            "no key 'randomnes'; did you mean randomness?",
        ),
        (
            [QUICK, "--cfg-options", "log_level=INFO", "folder"],
            "--cfg-options takes KEY=VALUE, got folder; DATA stands behind the config",
        ),
        (
            [QUICK, "--cfg-options", "train_dataloader.dataset.pipeline.9=3"],
            "Index 9 exceeds the length of list",
        ),
        ([str(CONFIGS / "detection/_base_/schedule_1x.py")], "schedule_1x.py has no model"),
        ([QUICK, "--launcher", "pytorch"], "the environment does not say RANK, WORLD_SIZE"),
    ],
)
def test_mistakes_in_the_call_are_one_clear_line(argv, message, said):
    assert run_openmmlab("detection.py", argv) == 2
    text = said()
    assert message in text
    assert text.count("detection.py: error:") == 1 and "Traceback" not in text


def test_mistakes_in_the_model_are_one_clear_line(scenes, said):
    for option, message in (
        ("model.backbone.arch=convmlp_x", "got 'convmlp_x'; did you mean convmlp_"),
        ("model.backbone.norm_evall=True", "unexpected keyword argument 'norm_evall'"),
    ):
        assert run(RETINANET, scenes / "detection", "--work-dir", "run", *quick_detection(option)) == 2
        text = said()
        assert message in text and "Traceback" not in text


def test_documented_changes_of_the_config_are_accepted(scenes):
    more = ["optim_wrapper.clip_grad.max_norm=1.0", "train_dataloader.batch_size=6", "model.backbone.with_cp=True"]
    options = quick_detection(*more)
    options = [option for option in options if not option.startswith("param_scheduler")]
    assert run(RECIPE, scenes / "detection", "--work-dir", "run", *options) == 0
    losses = [entry for entry in logged("run") if "loss" in entry]
    assert len(losses) == 2 and all("grad_norm" in entry for entry in losses)


def test_auto_scale_lr_scales_from_the_recipes_batch_and_tensorboard_logs(scenes):
    options = [option for option in quick_detection() if not option.startswith("param_scheduler")]
    assert run(RECIPE, scenes / "detection", "--auto-scale-lr", "--tensorboard", "--work-dir", "run", *options) == 0
    optimizer = read_run_checkpoint("run/epoch_1.pth")["optimizer"]
    assert optimizer["param_groups"][0]["initial_lr"] == pytest.approx(1e-4 * 4 / 16)
    assert list(Path("run").rglob("events.out.tfevents*"))


def test_tensorboard_that_is_missing_is_asked_for(scenes, monkeypatch, said):
    monkeypatch.setattr("convmlp.common.packages.missing", lambda *packages: list(packages))
    assert run(RETINANET, scenes / "detection", "--tensorboard", *quick_detection()) == 2
    assert "--tensorboard needs a missing package: pip install tensorboard" in said()
