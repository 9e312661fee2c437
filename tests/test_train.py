"""`convmlp train`: which program it starts for what, and a run of it as a user would start it."""

import subprocess
import sys

import pytest

from convmlp import train
from convmlp.common.configs import config_folder
from convmlp.common.errors import RunError


@pytest.fixture
def started(monkeypatch):
    """What `convmlp train` would start: started(words) -> (processes, words of the program)."""
    calls = []
    monkeypatch.setattr(train, "launch", lambda processes, program, **names: calls.append((processes, program)))

    def call(words: str) -> tuple[int, list[str]]:
        calls.clear()
        train.train(words.split())
        return calls[0]

    return call


def test_without_a_config_the_settings_come_from_the_images(started):
    assert started("images") == (1, "-m convmlp.classification --recipe auto images".split())
    assert started("images --recipe probe --processes 2") == (
        2,
        "-m convmlp.classification images --recipe probe".split(),
    )
    assert started("--eval best.pth images") == (1, "-m convmlp.classification --eval best.pth images".split())


def test_a_config_says_which_program_runs(started):
    folder = config_folder()
    classifier = str(folder / "classification" / "template.yml")
    assert started("-c template images") == (1, ["-m", "convmlp.classification", "-c", classifier, "images"])
    for name in ("detection/retinanet_convmlp_s_fpn_1x_coco", "segmentation/fpn_convmlp_s_512x512_40k_ade20k"):
        config = str(folder / f"{name}.py")
        assert started(f"own -c {name.rpartition('/')[2]} --amp") == (
            1,
            ["-m", "convmlp.openmmlab", config, "own", "--amp"],
        )


def test_an_unknown_config_is_an_error_before_anything_starts(started):
    with pytest.raises(RunError, match="no such config: templates; did you mean template?"):
        started("-c templates images")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_user_trains_and_predicts(pictures, tmp_path, processes):
    command = [sys.executable, "-m", "convmlp"]
    words = ["--processes", processes, "--epochs", 1, "--no-pretrained", "--output", tmp_path / "out", pictures]
    run = subprocess.run([*command, "train", *map(str, words)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "recipe scratch for 24 training images of 36 px" in run.stderr and f"{processes} x " in run.stderr
    image = next((pictures / "val").rglob("*.png"))
    words = ["predict", image, "--checkpoint", tmp_path / "out" / "convmlp_s" / "best.pth", "--csv", "-"]
    run = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and "digit" in run.stdout


def test_mistakes_carry_the_name_of_the_command(tmp_path):
    command = [sys.executable, "-m", "convmlp", "train", "--epoch", "3", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr == "convmlp train: error: unknown option --epoch; did you mean --epochs?\n"
