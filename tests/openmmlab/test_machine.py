"""Several processes, and a machine without a GPU: mixed precision, gloo, the scripts that start processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from small_runs import (
    CONFIGS,
    FPN,
    MASKRCNN,
    QUICK,
    RETINANET,
    ROOT,
    TINY,
    logged,
    own_config,
    quick_detection,
    quick_masks,
    run,
)

from convmlp.openmmlab import machine
from convmlp.openmmlab.checkpoints import read_run_checkpoint


@pytest.mark.skipif(torch.cuda.is_available(), reason="--amp is float16 there")
def test_amp_computes_in_bfloat16_on_cpus_that_have_it(scenes, monkeypatch):
    monkeypatch.setattr(machine, "resolve_amp_dtype", lambda choice, device: torch.bfloat16)
    seen = []
    forward = torch.nn.functional.linear

    def spy(x, *args, **kwargs):
        out = forward(x, *args, **kwargs)
        seen.append((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    assert run(MASKRCNN, scenes / "detection", "--amp", "--work-dir", "run", *quick_masks()) == 0
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
    checkpoint = read_run_checkpoint("run/epoch_1.pth")
    assert {v.dtype for k, v in checkpoint["state_dict"].items() if "num_batches" not in k} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="--amp is float16 there")
def test_amp_is_float32_on_other_cpus(scenes, monkeypatch, said):
    monkeypatch.setattr(machine, "resolve_amp_dtype", lambda choice, device: None)
    assert run(RETINANET, scenes / "detection", "--amp", "--work-dir", "plain", *quick_detection()) == 0
    assert "the run stays in float32" in said()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what GPUs need stays there")
def test_a_config_for_gpus_is_changed_for_cpus(monkeypatch):
    monkeypatch.setattr(machine, "resolve_amp_dtype", lambda choice, device: torch.bfloat16)
    norm = dict(type="SyncBN")
    cfg = Config(dict(model=dict(heads=[dict(norm_cfg=norm)]), launcher="pytorch"))
    cfg.optim_wrapper = dict(type="AmpOptimWrapper", loss_scale="dynamic", dtype="float16", optimizer=dict(lr=1))
    machine.adapt_to_machine(cfg, amp=False)
    assert cfg.model.heads[0].norm_cfg.type == "BN"
    assert cfg.optim_wrapper == dict(type="AutocastOptimWrapper", optimizer=dict(lr=1))
    assert cfg.model_wrapper_cfg.device_ids is None

    test_only = Config(dict(model={}, launcher="none"))
    machine.adapt_to_machine(test_only, amp=False)
    assert "optim_wrapper" not in test_only and "model_wrapper_cfg" not in test_only


def shell(*command: object, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=300)


RANK_CHECK = f"""
import hashlib
from pathlib import Path
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from convmlp.zoo import VARIANTS

VARIANTS["tiny"] = {TINY}

@HOOKS.register_module()
class RankCheck(Hook):
    def after_train(self, runner):
        digest = hashlib.sha256()
        for value in runner.model.state_dict().values():
            digest.update(value.numpy().tobytes())
        Path(f"rank{{get_rank()}}.txt").write_text(f"{{type(runner.model).__name__}} {{digest.hexdigest()}}")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for CPUs")
@pytest.mark.parametrize("config", [pytest.param(RETINANET, marks=pytest.mark.slow), FPN])
def test_two_processes_train_the_same_model(config, scenes):
    task = Path(config).parent.name
    Path("rank_check.py").write_text(RANK_CHECK)
    own = own_config(
        config,
        "custom_imports = dict(imports=['convmlp.openmmlab', 'rank_check'])\ncustom_hooks = [dict(type='RankCheck')]",
    )
    options = QUICK[config]() if config == FPN else quick_detection("train_dataloader.batch_size=2")
    paths = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    call = (ROOT / f"dist_{task}.sh", own, 2, scenes / task, "--work-dir", "run", *options)
    done = shell(*call, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (Path(f"rank{rank}.txt").read_text() for rank in (0, 1))
    assert first == second and first.startswith("MMDistributedDataParallel")
    assert done.stdout.count("The data set is in order.") == 1

    # What was validated by two processes is what one finds in the checkpoint
    key = "mIoU" if task == "segmentation" else "coco/bbox_mAP_50"
    last = max(Path("run").glob("*_[0-9].pth"))
    assert run(config, scenes / task, "--test", last, "--work-dir", "test", *options) == 0
    tested = json.loads(next(Path("test").glob("*/*.json")).read_text())
    assert tested[key] == pytest.approx([entry[key] for entry in logged("run") if key in entry][-1], abs=0.02)


@pytest.mark.slow
def test_a_mistake_of_all_processes_is_told_once(scenes):
    done = shell(ROOT / "dist_detection.sh", CONFIGS / RETINANET, 2, scenes / "segmentation")
    assert done.returncode == 2
    assert done.stderr.count("detection.py: error: there is no annotation file for train") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_scripts_explain_themselves(task):
    done = shell(ROOT / f"dist_{task}.sh", "config.py")
    assert done.returncode == 2 and f"usage: {ROOT}/dist_{task}.sh CONFIG NUMBER_OF_PROCESSES" in done.stderr


def test_the_help_names_the_options():
    done = shell(ROOT / "dist_detection.sh", CONFIGS / RETINANET, 1, "--help")
    assert done.returncode == 0
    for option in ("--work-dir", "--resume", "--amp", "--auto-scale-lr", "--cfg-options", "--seed", "--deterministic"):
        assert option in done.stdout
    assert all(option in done.stdout for option in ("--test", "--show-dir", "--check-data", "--classes"))
