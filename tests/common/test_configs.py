"""Configs by path and by name, and copies of them."""

from pathlib import Path

import pytest
from PIL import Image

from convmlp import cli
from convmlp.common.configs import config_folder, find_config, list_configs
from convmlp.common.errors import RunError

IMAGENET = config_folder() / "classification/convmlp_s_imagenet.yml"


@pytest.mark.parametrize(
    "name",
    [
        "convmlp_s_imagenet",
        "convmlp_s_imagenet.yml",
        "classification/convmlp_s_imagenet.yml",
        "configs/classification/convmlp_s_imagenet.yml",
    ],
)
def test_a_config_of_the_package_has_a_name_and_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == IMAGENET


def test_a_file_of_ones_own_comes_before_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yml").write_text("lr: 7")
    assert find_config("quickstart.yml") == Path("quickstart.yml")
    assert find_config("quickstart") == config_folder() / "classification/quickstart.yml"


def test_what_only_others_build_on_is_found_by_its_path_alone():
    assert find_config("_base_/imagenet.yml") == config_folder() / "classification/_base_/imagenet.yml"
    assert not [config for config in list_configs() if "_base_" in str(config)]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("convmlp_s_imagnet", "did you mean convmlp_s_imagenet?"),
        ("imagenet.yml", "no such config: imagenet.yml"),  # only others are based on it
        ("detection/quickstart_retinanet.py", "no such config"),  # of another task
        ("", "no such config"),
        ("q" * 300, "`convmlp configs` lists"),
        ("a\0b", "no such config"),
    ],
)
def test_a_config_that_is_not_there_is_one_clear_line(name, hint):
    with pytest.raises(RunError, match="no such config") as error:
        find_config(name, "classification")
    assert hint in str(error.value)


def test_the_command_lists_configs_with_what_they_say_of_themselves(capsys):
    assert cli.main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list_configs()) > 20
    assert any(line.startswith("classification/convmlp_s_imagenet.yml ") and "76.8" in line for line in lines)


def test_all_configs_are_copied_into_a_new_folder(tmp_path, capsys):
    assert cli.main(["configs", "--copy", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own/classification/convmlp_s_imagenet.yml").read_text() == IMAGENET.read_text()
    assert (tmp_path / "own/detection/_base_/runtime.py").is_file()
    assert f"files copied to {tmp_path / 'own'}" in capsys.readouterr().out


def test_one_config_is_copied_into_a_new_file(tmp_path):
    assert cli.main(["configs", "convmlp_s_imagenet", "--copy", str(tmp_path / "own.yml")]) == 0
    assert (tmp_path / "own.yml").read_text() == IMAGENET.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--copy", "{folder}"], "{folder} exists: name a new folder"),
        (["template", "--copy", "{folder}/image.png"], "{folder}/image.png exists: name a new file"),
        (["template"], "convmlp configs template --copy FILE"),
        (["tmplate", "--copy", "x.yml"], "no such config: tmplate; did you mean template?"),
        (["quickstart_fpn", "--copy", "x.py"], "builds on configs beside it: `convmlp configs --copy DIR`"),
    ],
)
def test_configs_are_not_copied_over_anything(arguments, message, tmp_path, capsys):
    Image.new("L", (1, 1)).save(tmp_path / "image.png")
    assert cli.main(["configs", *(word.format(folder=tmp_path) for word in arguments)]) == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]
