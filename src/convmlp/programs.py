"""torch.export programs of strangers: read only after a look at all that is in them.

`torch.export.load` trusts its file. It unpickles what the archive calls pickled, gives expressions to sympy, which
evaluates them as Python, and writes the names in the graph into Python source, which it compiles. Here an archive must
consist of what the program of an image classifier consists of, whose every text is of a harmless form.
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from .common.errors import RunError, one_line

MODEL, SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
MEMBER = re.compile(
    rf"{MODEL}|{SAMPLE}|{'|'.join(CONFIGS)}|data/weights/weight_\d+|data/constants/tensor_\d+|extra/classifier\.json"
    r"|archive_format|archive_version|byteorder|\.data/\w+"
)

# What a text may be, by the key that it stands under; the compiler sees names, and sympy sees expressions
NAME = re.compile(r"[\w.+]*")
TERM = r"Symbol\('\w+'(, \w+=True)*\)|[A-Z]\w*(?=\()|-?\d+|[(), ]|true|false"
TEXTS = {
    "expr_str": re.compile(rf"({TERM})*"),
    "as_string": re.compile(r"[\w .,'<>=+*/()-]*"),  # is quoted in the source
    "in_spec": re.compile(r'[\w ."\[\]{}:,]*'),  # JSON
    "out_spec": re.compile(r'[\w ."\[\]{}:,]*'),
}
FUNCTIONS = {"Add", "Mul", "Max", "Min", "Integer", "FloorDiv", "CeilDiv", "Mod", "PythonMod", "Pow", "Symbol"}
FUNCTIONS |= {"Equality", "GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan"}
FUNCTIONS |= {"And", "Or", "Not", "Rational", "ToFloat", "FloorToInt", "CeilToInt", "TruncToInt"}
OPERATORS = "add sub mul floordiv truediv mod neg eq ne ge gt le lt getitem and_ or_ not_".split()
NUMBERS = {f"_operator.{name}" for name in OPERATORS} | {
    f"torch.sym_{name}" for name in "float int max min not".split()
}
NEVER = {"as_custom_obj", "as_graph", "as_operator"}


def load_program(path: Path) -> tuple[torch.export.ExportedProgram, str]:
    """A program that `convmlp export` wrote, and its classifier.json, or '' if it has none.

    Raises:
        RunError: the archive is damaged, or holds more than an image classifier needs.
    """
    content = path.read_bytes()
    try:
        _check(content)
        extra = {"classifier.json": ""}
        return torch.export.load(io.BytesIO(content), extra_files=extra), extra["classifier.json"]
    except Forbidden as error:
        raise RunError(
            f"{path} is not read: {error}, which no file of `convmlp export` holds; one of an older version, or of "
            f"another PyTorch than {torch.__version__}, must be exported again"
        ) from error
    except Exception as error:  # whatever a damaged archive provokes
        raise RunError(f"{path} is a torch.export program that cannot be read: {one_line(error)}") from error


class Forbidden(Exception):
    """Something in an archive that may not be there."""


def _check(content: bytes) -> None:
    """Raise `Forbidden` for an archive that is more than data."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            _require(member.compress_type == zipfile.ZIP_STORED, f"{member.filename} is compressed")
        names = [name.partition("/")[2] for name in archive.namelist()]  # what the loader of old archives sees
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))  # what that of new ones sees
    for name in {*names, *reader.get_all_records()}:
        _require(MEMBER.fullmatch(name), f"it holds {name}")
    program = json.loads(reader.get_record(MODEL))
    _check_texts(program)
    for node in program["graph_module"]["graph"]["nodes"]:
        _require(not node["metadata"], "a node has metadata")
        _check_target(node["target"])
    for config in CONFIGS:
        for payload in json.loads(reader.get_record(config))["config"].values():
            _require(payload["use_pickle"] is False, "a tensor is pickled")
            _require(re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]), f"a tensor is {payload['path_name']}")
    torch.load(io.BytesIO(reader.get_record(SAMPLE)), weights_only=True)  # else it would be tried without


def _check_texts(value: Any, key: str = "") -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _require(name not in NEVER, f"the graph has {name}")
            _check_texts(name)
            _check_texts(part, name)
    elif isinstance(value, list):
        for part in value:
            _check_texts(part, key)
    elif isinstance(value, str):
        fits = TEXTS.get(key, NAME).fullmatch(value) and not re.search(r"__[A-Za-z]\w*__", value)
        functions = set(re.findall(r"(\w+)\(", value)) if key == "expr_str" else set()
        _require(fits and functions <= FUNCTIONS, f"{key or 'a key'} is {value!r:.80}")


def _check_target(target: str) -> None:
    """Only PyTorch's own operators and arithmetic on sizes, and none that opens files."""
    if target in NUMBERS:
        return
    found = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    _require(found and found[1] != "from_file", f"it calls {target}")
    assert found
    operator = getattr(getattr(torch.ops.aten, found[1], None), found[2], None)
    _require(isinstance(operator, torch._ops.OpOverload), f"it calls {target}")


def _require(holds: object, otherwise: str) -> None:
    if not holds:
        raise Forbidden(otherwise)
