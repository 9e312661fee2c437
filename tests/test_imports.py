"""What importing needs, prints and registers, and which module may import which."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "convmlp"

BLOCKED = ("timm", "torchvision", "mmengine", "mmcv", "mmdet", "mmseg", "PIL", "yaml", "matplotlib", "safetensors")
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)

sys.meta_path.insert(0, Block())
"""


def python(code: str, blocked: tuple[str, ...] = ()) -> str:
    """Run code in a fresh interpreter at the root of the checkout, and return all that it prints."""
    code = BLOCK.format(blocked=blocked) + code
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    env["OMP_NUM_THREADS"] = "1"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def test_the_block_of_these_tests_blocks():
    code = "try:\n    import yaml.nodes\nexcept ModuleNotFoundError as error:\n    print(error)"
    assert python(code, blocked=("yaml",)) == "blocked: yaml\n"


@pytest.fixture(scope="module")
def library() -> list[str]:
    """What a fresh interpreter with torch alone prints: modules that the import brought, and the shape of logits."""
    code = "import json, torch\nbefore = {*sys.modules}\nimport convmlp, convmlp.layers, convmlp.model, convmlp.zoo\n"
    code += "print(json.dumps(sorted({*sys.modules} - before)))\n"
    code += "print(tuple(convmlp.convmlp_s(num_classes=3)(torch.zeros(2, 3, 32, 32)).shape))"
    return python(code, BLOCKED).splitlines()


def test_the_library_needs_torch_alone_and_prints_nothing(library):
    assert library[1:] == ["(2, 3)"]


def test_the_library_brings_in_nothing_but_torch(library):
    new = json.loads(library[0])
    assert [name for name in new if name.partition(".")[0] in BLOCKED] == []
    core = ("common", "common.errors", "common.packages", "layers", "model", "variations", "weights", "zoo")
    assert [name for name in new if name.startswith("convmlp")] == ["convmlp", *(f"convmlp.{name}" for name in core)]


def test_only_the_adapter_registers_with_timm_and_prints_nothing():
    code = """
import timm
before = set(timm.list_models())
import convmlp, convmlp.zoo
print(*set(timm.list_models()) - before, "|")
import convmlp.timm_models
print(*sorted(set(timm.list_models()) - before))
"""
    names = [f"convmlp_{size}{suffix}" for size in "lms" for suffix in ("", "_classification")]
    names += ["pure_mlp", *(f"pure_mlp_{size}" for size in "lms")]
    assert python(code) == "|\n" + " ".join(names) + "\n"


def test_a_checkout_works_without_installing():
    code = """
from src.convmlp import convmlp_l
model = convmlp_l(num_classes=3)
print(convmlp_l.__module__, type(model).__module__, sys.modules["src.convmlp"].__file__)
"""
    assert python(code, (*BLOCKED, "convmlp")) == f"src.convmlp.zoo src.convmlp.model {PACKAGE / '__init__.py'}\n"


# Import arrows


def module_name(path: Path) -> str:
    parts = ("convmlp", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, in functions too; a name imported from a package counts as that package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path.parent / "__init__.py").split(".")
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return found


def ours(name: str) -> set[str]:
    return {module for module in imported(MODULES[name]) if module.partition(".")[0] in ("convmlp", "src")}


# From what all build on to what builds on all; parts on one line do not know each other
FLOORS = (
    ("common",),
    ("layers",),
    ("model",),
    ("variations", "backbones"),
    ("weights",),
    ("zoo",),
    ("timm_models", "torchvision_detection", "deploy", "programs"),
    ("exported",),
    ("use", "classification", "openmmlab"),
    ("doctor", "train"),
    ("cli",),
)
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def part_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "convmlp" and not name.endswith("__main__")])
def test_imports_go_one_way(module):
    own = part_of(module)
    for other in {part_of(name) for name in ours(module) if name != "convmlp"} - {own}:
        is_command = own == "use" and module.endswith("_command")
        if is_command and other in ("openmmlab", "classification"):
            continue  # with --config they detect, and `export --data` counts as training does, when they run
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{module} imports {other}"


def test_every_part_of_the_package_has_its_floor():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "__main__"} == FLOOR_OF.keys()


@pytest.mark.parametrize("module", ["layers", "model", "variations", "weights", "zoo"])
def test_the_core_imports_torch_and_the_standard_library(module):
    name = f"convmlp.{module}"
    others = {module.partition(".")[0] for module in imported(MODULES[name]) - ours(name)}
    assert others - sys.stdlib_module_names - {"torch"} == ({"safetensors"} if module == "weights" else set())


@pytest.mark.parametrize(("library", "modules"), [("mmdet", {"coco", "drawing"}), ("mmseg", {"labelmaps", "drawing"})])
def test_each_library_is_imported_where_it_is_what_the_module_is_about(library, modules):
    found = {name for name, path in MODULES.items() if any(m.partition(".")[0] == library for m in imported(path))}
    assert found == {f"convmlp.openmmlab.{module}" for module in modules}


def test_no_module_tries_an_import_to_see_what_is_there():
    tries = [
        (name, node.lineno)
        for name, path in MODULES.items()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Try) and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(node))
    ]
    assert tries == []


@pytest.mark.parametrize(
    ("script", "modules"),
    [
        ("classification.py", {"convmlp.classification"}),
        ("detection.py", {"convmlp.cli"}),
        ("segmentation.py", {"convmlp.cli"}),
    ],
)
def test_root_scripts_import_their_part_of_the_package_alone(script, modules):
    others = {name for name in imported(ROOT / script) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others == modules
