"""torch.export programs of strangers: what is not the program of a classifier is not read, and runs nothing."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from convmlp.common.errors import RunError
from convmlp.programs import load_program

MODEL, ABOUT = "archive/models/model.json", "archive/extra/classifier.json"


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    """A harmless program of a convolution, as `convmlp export` writes them."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    program = torch.export.export(network, (torch.zeros(1, 3, 8, 8),))
    for node in program.graph.nodes:
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom"):
            node.meta.pop(key, None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"classifier.json": "{}"})
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def marker(tmp_path) -> Path:
    """A folder that is made by the code in a file, if that ever runs."""
    return tmp_path / "code_ran"


def graph(change: Callable[[dict], None]) -> Callable[[dict[str, bytes], Path], None]:
    """A change of the program in model.json; MARKER in it stands for the folder."""

    def apply(members: dict[str, bytes], marker: Path) -> None:
        program = json.loads(members[MODEL])
        change(program)
        members[MODEL] = json.dumps(program).replace("MARKER", str(marker)).encode()

    return apply


def nodes(program: dict) -> list[dict]:
    return program["graph_module"]["graph"]["nodes"]


def size_by_python(program: dict) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    expression = {"expr_str": "__import__('os').mkdir('MARKER')", "hint": None}
    values[next(iter(values))]["sizes"][0] = {"as_expr": expression}


def name_as_source(program: dict) -> None:
    text = json.dumps(program).replace('"input"', '''"input=__import__('os').mkdir('MARKER')"''')
    program.update(json.loads(text))


def guard(program: dict) -> None:
    program["guards_code"] = ["__import__('os').mkdir('MARKER')"]


def pickled(name: str) -> Callable[[dict[str, bytes], Path], None]:
    def apply(members: dict[str, bytes], marker: Path) -> None:
        members[name] = pickle.dumps((Evil(marker),))

    return apply


def pickled_weight(members: dict[str, bytes], marker: Path) -> None:
    name = "archive/data/weights/model_weights_config.json"
    config = json.loads(members[name])
    next(iter(config["config"].values()))["use_pickle"] = True
    members[name] = json.dumps(config).encode()
    members["archive/data/weights/weight_0"] = pickle.dumps(Evil(marker))


ATTACKS: dict[str, tuple[Callable[[dict[str, bytes], Path], None], str]] = {
    "Python as a size": (graph(size_by_python), "expr_str is"),
    "Python as a name": (graph(name_as_source), 'is "input=__import__'),
    "Python as a guard": (graph(guard), "guards_code is"),
    "another function": (graph(lambda p: nodes(p)[0].update(target="torch.hub.load")), "it calls torch.hub.load"),
    "a file": (graph(lambda p: nodes(p)[0].update(target="torch.ops.aten.from_file.default")), "it calls .*from_file"),
    "an attribute": (graph(lambda p: nodes(p)[0].update(target="torch.ops.aten.x.y")), "it calls torch.ops.aten.x.y"),
    "metadata": (graph(lambda p: nodes(p)[0]["metadata"].update(stack_trace="x")), "a node has metadata"),
    "a pickled example": (pickled("archive/data/sample_inputs/model.pt"), "cannot be read: Weights only load failed"),
    "a pickled weight": (pickled_weight, "a tensor is pickled"),
    "old weights": (pickled("archive/data/weights/model.pt"), "it holds data/weights/model.pt"),
    "an opaque object": (pickled("archive/data/constants/opaque_obj_0"), "it holds data/constants/opaque_obj_0"),
    "an old archive": (pickled("version"), "version"),
    "machine code": (pickled("archive/data/aotinductor/model/x.so"), "it holds data/aotinductor/model/x.so"),
}


def test_what_convmlp_export_writes_is_read(members, tmp_path):
    program, about = load_program(write(tmp_path / "x.pt2", members))
    assert about == "{}"
    assert program.module()(torch.ones(1, 3, 8, 8)).shape == (1, 4)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_else_is_read_and_nothing_runs(attack, members, tmp_path, marker):
    change, message = ATTACKS[attack]
    hostile = dict(members)
    change(hostile, marker)
    assert hostile != members
    with pytest.raises(RunError, match=message):
        load_program(write(tmp_path / "x.pt2", hostile))
    assert not marker.exists()


def test_pytorch_itself_would_run_such_code(members, tmp_path, marker):
    hostile = dict(members)
    graph(size_by_python)(hostile, marker)
    with pytest.raises(Exception):  # noqa: B017  # after it ran
        torch.export.load(write(tmp_path / "x.pt2", hostile))
    assert marker.is_dir()


def test_a_compressed_archive_is_refused(members, tmp_path):
    with pytest.raises(RunError, match="is compressed"):
        load_program(write(tmp_path / "x.pt2", members, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("content", [b"", b"PK", b"nonsense"])
def test_damage_is_one_error(content, tmp_path):
    (tmp_path / "x.pt2").write_bytes(content)
    with pytest.raises(RunError, match="x.pt2 is a torch.export program that cannot be read"):
        load_program(tmp_path / "x.pt2")
