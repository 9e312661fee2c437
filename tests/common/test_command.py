"""The shell around commands: exit codes, messages, and the parser."""

import subprocess
import sys

import pytest

from convmlp.common.command import Parser, fraction, positive_float, positive_int, run
from convmlp.common.errors import CheckpointError, Diverged, RunError, Stopped


def raises(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunError("no such file: x"), 2, "name: error: no such file: x\n"),
        (CheckpointError("x is damaged"), 2, "name: error: x is damaged\n"),
        (Diverged("the loss is nan"), 1, "name: the loss is nan\n"),
        (Stopped("SIGTERM: saved"), 75, "name: SIGTERM: saved\n"),
        (KeyboardInterrupt(), 130, "name: interrupted\n"),
        (OSError(28, "No space left on device"), 2, "name: error: [Errno 28] No space left on device\n"),
        (ZeroDivisionError("by\n zero"), 3, "name: bug: ZeroDivisionError: by zero (--debug shows where)\n"),
        (KeyError(), 3, "name: bug: KeyError: KeyError (--debug shows where)\n"),
    ],
)
def test_every_end_has_its_exit_code_and_its_line(error, code, message, capsys):
    assert run("name", raises(error)) == code
    assert capsys.readouterr().err == message


def test_the_code_of_the_work_is_that_of_the_command(capsys):
    assert run("name", lambda: None) == 0
    assert run("name", lambda: 1) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("onnxruntime.capi", "onnxruntime is missing: pip install onnxruntime (convmlp doctor"),
        ("yaml", "yaml is missing: pip install pyyaml (convmlp doctor"),
        ("mmdet", "mmdet is missing: pip install 'convmlp[openmmlab]' (convmlp doctor"),
    ],
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(module, line, capsys):
    assert run("name", raises(ModuleNotFoundError(f"No module named {module!r}", name=module))) == 2
    assert f"name: error: {line}" in capsys.readouterr().err


def test_a_missing_module_of_this_package_is_a_bug(capsys):
    assert run("name", raises(ModuleNotFoundError("No module named 'convmlp.x'", name="convmlp.x"))) == 3


def test_debug_raises_what_is_otherwise_a_line():
    with pytest.raises(RunError, match="no such file"):
        run("name", raises(RunError("no such file")), debug=True)


def test_a_bug_in_a_run_keeps_its_traceback_and_an_interruption_names_the_way_on(capsys):
    with pytest.raises(ZeroDivisionError):
        run("name", raises(ZeroDivisionError()), way_on="; --resume continues")
    assert run("name", raises(KeyboardInterrupt()), way_on="; --resume continues") == 130
    assert capsys.readouterr().err == "name: interrupted; --resume continues\n"


def test_a_reader_that_leaves_is_not_an_error():
    code = "import sys\nfrom convmlp.common.command import run\n"
    code += "def work():\n    for i in range(10**6): print(i)\n    sys.stdout.flush()\n"
    code += "sys.exit(run('name', work))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_only_the_first_process_speaks_of_a_stop_and_others_say_who_they_are(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run("name", raises(Stopped("saved"))) == 75
    assert run("name", raises(RunError("no such file"))) == 2
    assert capsys.readouterr().err == "name: process 1: error: no such file\n"


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="name", surplus="one FILE is enough, got another: {}")
    parser.add_argument("file")
    parser.add_argument("--resume")
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--seconds", type=positive_float)
    parser.add_argument("--share", type=fraction)
    return parser


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: file; name --help"),
        (["a", "b"], "one FILE is enough, got another: b"),
        (["a", "--bacth-size=3"], "unknown option --bacth-size; did you mean --batch-size?"),
        (["a", "--freeze", "3"], "unknown option --freeze; name --help"),
        (["a", "--batch", "3"], "unknown option --batch; did you mean --batch-size?"),
        (["a", "--batch-size", "0"], "argument --batch-size: must be a positive integer, got 0; name --help"),
        (["a", "--batch-size", "1.5"], "argument --batch-size: must be a positive integer, got 1.5; name --help"),
        (["a", "--seconds", "inf"], "argument --seconds: must be a positive number, got inf; name --help"),
        (["a", "--seconds", "x"], "argument --seconds: must be a positive number, got x; name --help"),
        (["a", "--share", "1.1"], "argument --share: must be between 0 and 1, got 1.1; name --help"),
        (["a", "--share", "nan"], "argument --share: must be between 0 and 1, got nan; name --help"),
    ],
)
def test_the_parser_names_what_is_wrong_and_the_way_out(parser, argv, message):
    with pytest.raises(RunError) as error:
        parser.parse(argv)
    assert str(error.value) == message


def test_the_parser_fills_options_that_are_there(parser):
    options = parser.parse(["a", "--share", "0"])
    assert (options.share, parser.parse(["b"], options)) == (0.0, options)
    assert options.file == "b" and options.share == 0.0
