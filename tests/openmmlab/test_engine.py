"""detection.py and segmentation.py at work: all nine configs, resuming, testing, several processes, mistakes."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digit_scenes import write_detection, write_segmentation
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from test_model import golden_weights
from test_openmmlab_backbone import DETECTION, SEGMENTATION

import convmlp
from convmlp.openmmlab import coco, labelmaps
from convmlp.openmmlab.checkpoints import read_run_checkpoint
from convmlp.openmmlab.engine import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
QUICK_DETECTION = "detection/quickstart_retinanet.py"
QUICK_MASKS = "detection/quickstart_maskrcnn.py"
QUICK_SEGMENTATION = "segmentation/quickstart_fpn.py"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``"),
    pytest.mark.filterwarnings("ignore:The draw is False"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_detection(folder / "detection", train=12, val=3, size=64, seed=0)
    write_segmentation(folder / "segmentation", train=12, val=3, size=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Stands for the torch.hub cache with the published files."""
    home = tmp_path_factory.mktemp("torch_home")
    cache = home / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for variant in ("convmlp_s", "convmlp_m", "convmlp_l"):
        torch.save(golden_weights(getattr(convmlp, variant)()).state_dict(), cache / f"{variant}_imagenet.pth")
    yield home
    shutil.rmtree(home)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch, weights, said):
    MMLogger._instance_dict.clear()  # or its handlers keep on writing to the output of an earlier test
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(weights))


SMALL_LOADERS = [
    f"{part}_dataloader.{key}" for part in ("train", "val") for key in ("num_workers=0", "persistent_workers=False")
]
SMALL_DETECTION = [
    *SMALL_LOADERS,
    "train_cfg.max_epochs=1",
    "train_dataloader.dataset.pipeline.2.scale=(64,64)",
    "val_dataloader.dataset.pipeline.1.scale=(64,64)",
    "default_hooks.logger.interval=1",
]
# Every anchor is a finding, so that there is something to evaluate
SMALL_RETINANET = ["model.test_cfg.score_thr=0.0"]
SMALL_MASKRCNN = [
    "model.train_cfg.rpn_proposal.max_per_img=40",
    "model.train_cfg.rcnn.sampler.num=16",
    "model.test_cfg.rpn.max_per_img=20",
    "model.test_cfg.rcnn.max_per_img=5",
]
SMALL_SEGMENTATION = [
    *SMALL_LOADERS,
    "train_cfg.max_iters=2",
    "train_cfg.val_interval=2",
    "default_hooks.checkpoint.interval=2",
    "train_dataloader.dataset.pipeline.2.scale=(128,64)",
    "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
    "model.data_preprocessor.size=(64,64)",
    "val_dataloader.dataset.pipeline.1.scale=(128,64)",
    "default_hooks.logger.interval=1",
]


def same_test(options: list[str]) -> list[str]:
    """The test loader is a copy of the validation loader in the configs, and so are its options."""
    return options + [option.replace("val_dataloader", "test_dataloader") for option in options if "val_data" in option]


def run(config: str | Path, *argv: str) -> int:
    config = CONFIGS / config
    if config.parent.name == "segmentation":
        return main("segmentation.py", labelmaps.prepare, [str(config), *map(str, argv)])
    return main("detection.py", coco.prepare, [str(config), *map(str, argv)])


@pytest.fixture
def said(capfd) -> Callable[[], str]:
    """All that was printed since the last call."""

    def read() -> str:
        captured = capfd.readouterr()
        return captured.out + captured.err

    return read


def logged(work_dir: Path) -> list[dict]:
    files = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", [*DETECTION, *SEGMENTATION])
def test_every_config_trains_and_evaluates(name, data, weights):
    segmentation = name.startswith("segmentation")
    options = same_test(SMALL_SEGMENTATION if segmentation else SMALL_DETECTION)
    if not segmentation:
        options += SMALL_MASKRCNN if "maskrcnn" in name else SMALL_RETINANET
    code = run(f"{name}.py", data / name.partition("/")[0], "--work-dir", "run", "--cfg-options", *options)
    assert code == 0

    log = logged(Path("run"))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == (2 if segmentation else 6) and all(0 < loss < 1e4 for loss in losses)
    metric = log[-1]["mIoU" if segmentation else "coco/bbox_mAP"]
    assert 0 <= metric <= 100
    if "maskrcnn" in name:
        assert {"loss_mask", "loss_rpn_cls"} <= log[0].keys()

    arch = next(part for part in (f"convmlp_{size}" for size in "sml") if part in name)
    start = torch.load(weights / "hub" / "checkpoints" / f"{arch}_imagenet.pth")
    trained = read_run_checkpoint(next(Path("run").glob("*_[0-9].pth")))["state_dict"]
    for key in ("tokenizer.block.0.weight", "stages.2.blocks.0.channel_mlp1.fc1.weight"):
        assert trained[f"backbone.{key}"].shape == start[key].shape
        assert not torch.equal(trained[f"backbone.{key}"], start[key])
        torch.testing.assert_close(trained[f"backbone.{key}"], start[key], rtol=0, atol=1e-2)  # it started there


def test_own_classes_size_the_heads_and_are_kept(data, said):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick()) == 0
    checkpoint = read_run_checkpoint("run/epoch_1.pth")
    assert checkpoint["meta"]["dataset_meta"]["classes"][8] == "eight"
    assert checkpoint["state_dict"]["bbox_head.retina_cls.weight"].shape[0] == 9 * 10
    assert "10 classes from" in said()


# The quickstarts' configs, smaller still, and with nothing random in a step: see the tests of resumption


def quick(*more: str, epochs: int = 1) -> list[str]:
    options = same_test(
        [
            *SMALL_LOADERS,
            "model.backbone.init_cfg.checkpoint=imagenet",
            "model.backbone.drop_path_rate=0.0",
            f"train_cfg.max_epochs={epochs}",
            "train_cfg.val_interval=1",
            f"param_scheduler.1.end={epochs}",
            f"param_scheduler.1.T_max={epochs}",
            "param_scheduler.0.end=2",
            "train_dataloader.batch_size=4",
            "default_hooks.logger.interval=1",
        ]
    )
    return ["--cfg-options", *options, *SMALL_RETINANET, *more]


def quick_segmentation(*more: str) -> list[str]:
    options = [
        *SMALL_LOADERS,
        "model.backbone.init_cfg.checkpoint=imagenet",
        "model.backbone.drop_path_rate=0.0",
        "model.data_preprocessor.size=(64,64)",
        "train_cfg.max_iters=4",
        "train_cfg.val_interval=2",
        "default_hooks.checkpoint.interval=2",
        "param_scheduler.0.end=2",
        "param_scheduler.1.begin=2",
        "param_scheduler.1.end=4",
        "train_dataloader.batch_size=3",
        "default_hooks.logger.interval=1",
    ]
    return ["--cfg-options", *same_test(options), *more]


@HOOKS.register_module()
class Interruption(Hook):
    """Ctrl-C at the beginning of an iteration."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise KeyboardInterrupt


def interrupted_config(config: str, iteration: int) -> Path:
    """A config of the user's own, on top of one of ours."""
    folder = Path("own") / Path(config).parent
    folder.mkdir(parents=True)
    file = folder / "interrupted.py"
    file.write_text(
        f"_base_ = {str(CONFIGS / config)!r}\ncustom_hooks = [dict(type='Interruption', iteration={iteration})]\n"
    )
    return file.resolve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs")
@pytest.mark.parametrize(
    ("config", "options", "iteration", "last", "at"),
    [
        (QUICK_DETECTION, quick(epochs=2), 4, "epoch_2.pth", (1, 3)),
        (QUICK_SEGMENTATION, quick_segmentation(), 3, "iter_4.pth", (0, 2)),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(config, options, iteration, last, at, data, said):
    folder = data / Path(config).parent.name
    assert run(config, folder, "--work-dir", "whole", *options) == 0
    assert run(interrupted_config(config, iteration), folder, "--work-dir", "broken", *options) == 130
    assert "--resume continues" in said()
    assert not (Path("broken") / last).exists()
    assert run(config, folder, "--work-dir", "broken", "--resume", *options) == 0
    assert f"resumed epoch: {at[0]}, iter: {at[1]}" in said()

    whole, broken = (read_run_checkpoint(Path(name) / last) for name in ("whole", "broken"))
    for key in ("epoch", "iter"):
        assert whole["meta"][key] == broken["meta"][key]
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, broken["state_dict"][key]), key
    assert whole["param_schedulers"] == broken["param_schedulers"]
    states = [checkpoint["optimizer"]["state"] for checkpoint in (whole, broken)]
    assert len(states[0]) == len(states[1]) > 100
    for key, state in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in state.items())
    rates = [
        {entry["step"]: entry["lr"] for entry in logged(Path(name)) if "lr" in entry} for name in ("whole", "broken")
    ]
    assert rates[0] == rates[1] and len(set(rates[0].values())) > 2


def test_resuming_takes_the_newest_checkpoint_that_can_be_read(data, said):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick(epochs=2)) == 0
    content = Path("run/epoch_2.pth").read_bytes()
    Path("run/epoch_2.pth").write_bytes(content[: len(content) // 2])
    said()
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--resume", *quick(epochs=2)) == 0
    text = said()
    assert "epoch_2.pth is truncated" in text and "resumed epoch: 1, iter: 3" in text
    assert read_run_checkpoint("run/epoch_2.pth")["meta"]["iter"] == 6


def test_resuming_needs_no_published_weights(data, monkeypatch, tmp_path):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick()) == 0
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("convmlp.zoo.MIRRORS", (f"{tmp_path.as_uri()}/nowhere/",))
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--resume", *quick(epochs=2)) == 0
    assert Path("run/epoch_2.pth").exists()
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "other", *quick()) == 2


def test_resume_without_a_run_starts_one(data, said):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--resume", *quick()) == 0
    assert "nothing to resume in run" in said()
    assert Path("run/epoch_1.pth").exists()
    options = quick("load_from=run/epoch_1.pth")
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "other", "--resume", *options) == 0
    assert re.search(r"loaded \d+ tensors from run/epoch_1.pth", said())


def test_an_earlier_run_is_not_overwritten_by_accident(data, said):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick(epochs=2)) == 0
    before = Path("run/epoch_1.pth").read_bytes()
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick()) == 2
    assert "run holds a run: --resume continues it, --overwrite replaces it" in said()
    assert Path("run/epoch_1.pth").read_bytes() == before
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--overwrite", *quick()) == 0
    assert not Path("run/epoch_2.pth").exists()


def trap(path: Path) -> Path:
    """A checkpoint with code in it, that would leave a file behind."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (Path(path).resolve().with_suffix(".ran"),))

    torch.save({"meta": Trap(), "state_dict": {}}, path, pickle_module=pickle)
    return path


@pytest.mark.parametrize("how", ["--resume", "--test"])
def test_code_in_a_checkpoint_does_not_run(how, data, said):
    trap(Path("trap.pth"))
    assert run(QUICK_DETECTION, data / "detection", how, "trap.pth", *quick()) == 2
    assert "trap.pth is truncated, not a checkpoint, or holds more than tensors" in said()
    assert not Path("trap.ran").exists()


@pytest.mark.parametrize("config", [QUICK_DETECTION, QUICK_MASKS, QUICK_SEGMENTATION])
def test_testing_a_checkpoint_reports_every_class_and_draws(config, data, said):
    folder = data / Path(config).parent.name
    options = quick_segmentation() if "segmentation" in config else quick()
    assert run(config, folder, "--work-dir", "run", *options) == 0
    best = next(Path("run").glob("best_*.pth"))
    said()
    assert run(config, folder, "--test", best, "--work-dir", "test", "--show-dir", "pictures", *options) == 0
    table = said()
    key = "mIoU" if "segmentation" in config else "coco/bbox_mAP"
    assert sorted(file.name for file in Path("pictures").iterdir()) == ["000001.png", "000002.png", "000003.png"]
    assert all(re.search(rf"\| +{name} +\|", table) for name in ("zero", "seven", "nine"))
    trained = max((entry for entry in logged(Path("run")) if key in entry), key=lambda entry: entry[key])
    tested = json.loads(next(Path("test").glob("*/*.json")).read_text())
    metrics = [key for key in trained if key == "mIoU" or key.startswith(("coco/bbox_mAP", "coco/segm_mAP"))]
    assert metrics and all(tested[key] == pytest.approx(trained[key], nan_ok=True) for key in metrics)


def test_pictures_of_the_best_checkpoint_at_the_end_of_training(data):
    options = quick_segmentation()
    assert run(QUICK_SEGMENTATION, data / "segmentation", "--show-dir", "pictures", *options) == 0
    assert len(list(Path("pictures").glob("*.png"))) == 3
    assert Path("output/quickstart_fpn/iter_4.pth").exists()


def test_a_published_checkpoint_of_the_old_libraries_is_tested(data, said):
    """mmdet 2 and mmseg 0 wrote meta['CLASSES'], and names that are still those of the models."""
    options = quick()
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *options) == 0
    ours = read_run_checkpoint("run/epoch_1.pth")
    classes = ours["meta"]["dataset_meta"]["classes"]
    old = {"meta": {"mmdet_version": "2.11.0", "CLASSES": classes}, "state_dict": ours["state_dict"], "optimizer": {}}
    torch.save(old, "old.pth")
    assert run(QUICK_DETECTION, data / "detection", "--test", "old.pth", "--work-dir", "test", *options) == 0

    old["meta"]["CLASSES"] = tuple(reversed(classes))
    torch.save(old, "old.pth")
    assert run(QUICK_DETECTION, data / "detection", "--test", "old.pth", "--work-dir", "test", *options) == 2
    assert "was trained for other classes (10) than this run has (10): nine / zero" in said()

    old["meta"]["CLASSES"] = classes
    del old["state_dict"]["neck.fpn_convs.1.conv.bias"]
    torch.save(old, "old.pth")
    assert run(QUICK_DETECTION, data / "detection", "--test", "old.pth", "--work-dir", "test", *options) == 2
    assert "neck.fpn_convs.1.conv.bias is missing" in said()


def test_the_backbone_of_a_trained_detector_starts_another(data, said):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick()) == 0
    source = "model.backbone.init_cfg.checkpoint=run/epoch_1.pth"
    assert run(QUICK_SEGMENTATION, data / "segmentation", "--work-dir", "no", *quick_segmentation(source)) == 2
    assert "whole detector or segmentor: add prefix='backbone.'" in said()
    options = quick_segmentation(source, "model.backbone.init_cfg.prefix=backbone.")
    assert run(QUICK_SEGMENTATION, data / "segmentation", "--work-dir", "yes", *options) == 0
    assert "all 180 tensors loaded from run/epoch_1.pth" in said()


def test_the_line_that_a_run_ends_with_tests_it(data, said):
    names = Path("three four.txt")
    names.write_text("three\nfour\n")
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", "--classes", names, *quick()) == 0
    line = next(line for line in said().splitlines() if "test it: " in line)
    command = shlex.split(line.partition("test it: ")[2])
    assert command[:2] == ["python", "detection.py"]
    assert main("detection.py", coco.prepare, [*command[2:], "--work-dir", "test"]) == 0
    assert len(list(Path("pictures").glob("*.png"))) == 3


def test_documented_changes_of_the_config_are_accepted(data):
    more = ["optim_wrapper.clip_grad.max_norm=1.0", "train_dataloader.batch_size=2", "model.backbone.with_cp=True"]
    options = [*same_test(SMALL_DETECTION), *SMALL_RETINANET, *more]
    name = "detection/retinanet_convmlp_s_fpn_1x_coco.py"
    assert run(name, data / "detection", "--work-dir", "run", "--cfg-options", *options) == 0
    assert all("grad_norm" in entry for entry in logged(Path("run")) if "loss" in entry)


def test_training_without_validation(data, said):
    without = ["val_dataloader=None", "val_cfg=None", "val_evaluator=None"]
    options = [option for option in quick() if not option.startswith("val_")]
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *options, *without) == 0
    assert "so there is no best checkpoint; the last:" in said()


def test_starting_from_a_detector_of_other_classes_keeps_all_but_the_head(data, said):
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick()) == 0
    Path("names.txt").write_text("three\nfour\n")
    said()
    options = quick("load_from=run/epoch_1.pth")
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "two", "--classes", "names.txt", *options) == 0
    assert "parts of the model start from their initialisation: bbox_head.retina_cls" in said()

    spoiled = read_run_checkpoint("run/epoch_1.pth")
    del spoiled["state_dict"]["backbone.stages.0.blocks.0.connect.weight"]
    torch.save(spoiled, "run/epoch_1.pth")
    assert run(QUICK_DETECTION, data / "detection", "--work-dir", "three", *options) == 2
    assert "backbone.stages.0.blocks.0.connect.weight is missing" in said()


def test_a_run_stops_when_the_backbone_does_not_load(data, said):
    weights = golden_weights(convmlp.convmlp_s()).state_dict()
    del weights["stages.1.blocks.3.norm2.bias"]
    torch.save(weights, "short.pth")
    options = quick("model.backbone.init_cfg.checkpoint=short.pth")
    assert run(QUICK_DETECTION, data / "detection", *options) == 2
    assert "short.pth does not fit the model: stages.1.blocks.3.norm2.bias is missing" in said()
    assert not list(Path("output").rglob("*.pth"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="--amp is float16 there")
def test_amp_computes_in_bfloat16_on_cpus_that_have_it(data, monkeypatch, said):
    from convmlp.openmmlab import engine

    monkeypatch.setattr(engine, "resolve_amp_dtype", lambda choice, device: torch.bfloat16)
    seen = []
    forward = torch.nn.functional.linear

    def spy(x, *args, **kwargs):
        out = forward(x, *args, **kwargs)
        seen.append((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    assert run(QUICK_MASKS, data / "detection", "--amp", "--work-dir", "run", *quick()) == 0
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    checkpoint = read_run_checkpoint("run/epoch_1.pth")
    assert {v.dtype for k, v in checkpoint["state_dict"].items() if "num_batches" not in k} == {torch.float32}

    monkeypatch.setattr(engine, "resolve_amp_dtype", lambda choice, device: None)
    assert run(QUICK_DETECTION, data / "detection", "--amp", "--work-dir", "plain", *quick()) == 0
    assert "the run stays in float32" in said()


def test_mistakes_in_the_model_are_one_clear_line(data, said):
    for option, message in (
        ("model.backbone.arch=convmlp_x", "got 'convmlp_x'; did you mean convmlp_"),
        ("model.backbone.norm_evall=True", "unexpected keyword argument 'norm_evall'"),
    ):
        assert run(QUICK_DETECTION, data / "detection", "--work-dir", "run", *quick(option)) == 2
        text = said()
        assert message in text and "Traceback" not in text


def test_auto_scale_lr_scales_from_the_recipes_batch(data):
    options = same_test(SMALL_DETECTION)
    base = "detection/retinanet_convmlp_s_fpn_1x_coco.py"
    assert run(base, data / "detection", "--auto-scale-lr", "--work-dir", "run", "--cfg-options", *options) == 0
    optimizer = read_run_checkpoint("run/epoch_1.pth")["optimizer"]
    assert optimizer["param_groups"][0]["initial_lr"] == pytest.approx(1e-4 * 2 / 16)


def test_tensorboard_on_request(data):
    assert run(QUICK_DETECTION, data / "detection", "--tensorboard", "--work-dir", "run", *quick()) == 0
    assert list(Path("run").rglob("events.out.tfevents*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="bit for bit on CPUs")
def test_the_seed_decides(data):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert run(QUICK_DETECTION, data / "detection", "--seed", seed, "--work-dir", name, *quick()) == 0
    a, b, c = (read_run_checkpoint(f"{name}/epoch_1.pth")["state_dict"] for name in "abc")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert not torch.equal(a["bbox_head.retina_cls.weight"], c["bbox_head.retina_cls.weight"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.py"], "no such config: nowhere.py"),
        ([str(CONFIGS / "detection/retinanet_convmlp_x_fpn_1x_coco.py")], "did you mean"),
        ([str(CONFIGS / QUICK_DETECTION), "--tst", "x"], "unknown option --tst; did you mean --test?"),
        ([str(CONFIGS / QUICK_DETECTION), "a", "b"], "there is one DATA folder, got a and b"),
        ([str(CONFIGS / QUICK_DETECTION), "nowhere"], "no such data folder: nowhere"),
        ([str(CONFIGS / QUICK_DETECTION), "--test", "none.pth"], "--test: no such file: none.pth"),
        ([str(CONFIGS / QUICK_DETECTION), "--resume", "none.pth"], "--resume: no such file: none.pth"),
        ([str(CONFIGS / QUICK_DETECTION), "--resume", "."], "--resume takes a file, got the folder ."),
        ([str(CONFIGS / QUICK_DETECTION), "--classes", "none.txt"], "--classes: no such file: none.txt"),
        ([str(CONFIGS / QUICK_DETECTION), "--resume", "--check-data"], "give one of --resume and --check-data"),
        ([str(CONFIGS / QUICK_DETECTION), "--resume", "--overwrite"], "give one of --resume and --overwrite"),
        ([str(CONFIGS / QUICK_DETECTION), "--test", str(ROOT / "setup.py"), "--amp"], "--amp is for training"),
        ([str(CONFIGS / QUICK_DETECTION), "--seed", "-1"], "--seed lies between 0 and 4294967295, got -1"),
        (
            [str(CONFIGS / QUICK_DETECTION), "--work-dir", str(ROOT / "setup.py")],
            "--work-dir is a folder, got the file",
        ),
        (
            [str(CONFIGS / QUICK_DETECTION), "--cfg-options", "optim_wraper.optimizer.lr=1"],
            "the config has no 'optim_wraper' there; did you mean optim_wrapper?",
        ),
        (
            [str(CONFIGS / QUICK_DETECTION), "--cfg-options", "train_dataloader.datset.data_root=x"],
            "the config has no 'datset' there; did you mean dataset?",
        ),
        (
            [str(CONFIGS / QUICK_DETECTION), "--cfg-options", "randomnes=3"],
            "no key 'randomnes'; did you mean randomness?",
        ),
        (
            [str(CONFIGS / QUICK_DETECTION), "--cfg-options", "log_level=INFO", "folder"],
            "--cfg-options takes KEY=VALUE, got folder; DATA stands behind the config",
        ),
        (
            [str(CONFIGS / QUICK_DETECTION), "--cfg-options", "train_dataloader.dataset.pipeline.9=3"],
            "Index 9 exceeds the length of list",
        ),
        ([str(CONFIGS / "detection/_base_/schedule_1x.py")], "schedule_1x.py has no model"),
        ([str(CONFIGS / QUICK_DETECTION), "--launcher", "pytorch"], "the environment does not say RANK, WORLD_SIZE"),
    ],
)
def test_mistakes_in_the_call_are_one_clear_line(argv, message, said):
    assert main("detection.py", coco.prepare, argv) == 2
    text = said()
    assert message in text
    assert text.count("detection.py: error:") == 1 and "Traceback" not in text


# Scripts and processes


def shell(*command: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=300)


RANK_CHECK = """
import hashlib
from pathlib import Path
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class RankCheck(Hook):
    def after_train(self, runner):
        digest = hashlib.sha256()
        for value in runner.model.state_dict().values():
            digest.update(value.numpy().tobytes())
        Path(f"rank{get_rank()}.txt").write_text(f"{type(runner.model).__name__} {digest.hexdigest()}")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
@pytest.mark.parametrize("config", [QUICK_DETECTION, QUICK_SEGMENTATION])
def test_two_processes_train_the_same_model(config, data):
    task = Path(config).parent.name
    Path("rank_check.py").write_text(RANK_CHECK)
    Path("own.py").write_text(
        f"_base_ = {str(CONFIGS / config)!r}\n"
        "custom_imports = dict(imports=['convmlp.openmmlab', 'rank_check'])\n"
        "custom_hooks = [dict(type='RankCheck')]\n"
    )
    options = quick_segmentation() if task == "segmentation" else quick("train_dataloader.batch_size=2")
    done = shell(ROOT / f"dist_{task}.sh", "own.py", 2, data / task, "--work-dir", "run", *options, PYTHONPATH=".")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (Path(f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and first.startswith("MMDistributedDataParallel")
    assert done.stdout.count("The data set is in order.") == 1

    # What was validated by two processes is what one finds in the checkpoint
    key = "mIoU" if task == "segmentation" else "coco/bbox_mAP_50"
    last = next(Path("run").glob("*_[0-9].pth"))
    assert run(config, data / task, "--test", last, "--work-dir", "test", *options) == 0
    tested = json.loads(next(Path("test").glob("*/*.json")).read_text())
    assert tested[key] == pytest.approx([entry[key] for entry in logged(Path("run")) if key in entry][-1], abs=0.02)


def test_a_mistake_of_all_processes_is_told_once(data):
    done = shell(ROOT / "dist_detection.sh", CONFIGS / QUICK_DETECTION, 2, data / "segmentation")
    assert done.returncode == 2
    assert done.stderr.count("detection.py: error: there is no annotation file for train") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_scripts_explain_themselves(task):
    done = shell(ROOT / f"dist_{task}.sh", "config.py")
    assert done.returncode == 2 and f"usage: {ROOT}/dist_{task}.sh CONFIG NUMBER_OF_PROCESSES" in done.stderr
    done = shell(ROOT / f"dist_{task}.sh", CONFIGS / QUICK_DETECTION, 1, "--help")
    assert done.returncode == 0
    for option in ("--work-dir", "--resume", "--amp", "--auto-scale-lr", "--cfg-options", "--seed", "--deterministic"):
        assert option in done.stdout
    assert all(option in done.stdout for option in ("--test", "--show-dir", "--check-data", "--classes"))
