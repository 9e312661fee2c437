"""The console command: its verbs, its help, its completion; configs and torch.hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import convmlp
from convmlp import cli
from convmlp.common.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("predict", "visualize", "export", "info", "configs", "doctor", "completion")


def convmlp_command(*arguments: object) -> subprocess.CompletedProcess:
    """Run the installed command as a user would."""
    command = [str(Path(sys.executable).with_name("convmlp")), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_help_lists_the_verbs_and_waits_for_no_library():
    code = (
        "import sys\nfrom convmlp.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n"
        "    print({'torch', 'timm', 'PIL', 'matplotlib', 'rich'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    for verb in VERBS:
        assert f"\n    {verb}" in run.stdout
    assert run.stdout.endswith("set()\n")


def test_without_a_verb_it_prints_its_help(capsys):
    assert cli.main([]) == 0
    assert "\n    predict" in capsys.readouterr().out


def test_the_installed_command_tells_its_version():
    run = convmlp_command("--version")
    assert (run.returncode, run.stdout) == (0, f"convmlp {convmlp.__version__}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_manual(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0 and f"convmlp {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("predct cat.png", "unknown verb predct; did you mean predict?"),
        ("completion fish", "invalid choice: 'fish'"),
    ],
)
def test_an_error_is_one_line(call, message, capsys):
    assert cli.main(call.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("convmlp: error: ") and err.count("\n") == 1 and message in err


def test_debug_shows_where_an_error_comes_from(capsys):
    with pytest.raises(RunError):
        cli.main(["predict", "nowhere.png", "--debug"])
    assert cli.main(["predict", "nowhere.png"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rest", "code", "message"),
    [(">&-", 0, ""), ("> /dev/full", 2, "No space left"), ("| true; exit ${PIPESTATUS[0]}", 0, "")],
)
def test_output_that_nobody_takes_is_not_a_bug(rest, code, message):
    command = f"'{sys.executable}' -m convmlp configs {rest}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert run.returncode == code and message in run.stderr and "bug" not in run.stderr, run


def test_completion_is_a_script_that_the_shell_takes(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    shell = subprocess.run(["bash", "-c", f"{script}\ncomplete -p convmlp"], capture_output=True, text=True, timeout=60)
    assert shell.returncode == 0 and shell.stdout.startswith("complete ")
    assert "predict" in script and "--save-dir" in script


# torch.hub


def test_torch_hub_loads_the_checkout_without_installing_it(tmp_path):
    code = f"""
import sys
sys.path = [p for p in sys.path if not p.endswith("main/src")]
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
import torch
model = torch.hub.load({str(ROOT)!r}, "convmlp_s", source="local", num_classes=3)
print(tuple(model(torch.zeros(2, 3, 32, 32)).shape), sys.modules["convmlp"].__file__)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout == f"(2, 3) {ROOT / 'src' / 'convmlp' / '__init__.py'}\n", run.stderr
