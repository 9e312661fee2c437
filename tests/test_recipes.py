"""Every recipe under docs/recipes/ runs as it stands, in a folder of its own and without a network, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "docs/recipes").glob("*.md"))
SUFFIXES = {"python": ".py", "shell": ".sh"}

# What a recipe must print, as regular expressions in order
PRINTS: dict[str, list[str]] = {}


def code_of(recipe: Path) -> tuple[str, str]:
    """Language and text of its one block of code; a block of language `text` is what it prints."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", recipe.read_text(), re.MULTILINE | re.DOTALL)
    blocks = [(language, code) for language, code in blocks if language != "text"]
    assert len(blocks) == 1 and blocks[0][0] in SUFFIXES, f"one block of code is expected in {recipe}"
    return blocks[0]


def test_every_recipe_says_what_it_prints():
    assert {recipe.stem for recipe in RECIPES} == set(PRINTS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_recipe_runs_as_it_stands(recipe, tmp_path):
    language, code = code_of(recipe)
    file = tmp_path / f"recipe{SUFFIXES[language]}"
    file.write_text(code)
    offline = {"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(tmp_path / "torch"), "MPLBACKEND": "Agg"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` and `convmlp` are those of the tests
    run = subprocess.run(
        [sys.executable, file] if language == "python" else ["bash", "-euo", "pipefail", file],
        cwd=tmp_path,
        env={**os.environ, **offline, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    place = 0
    for pattern in PRINTS[recipe.stem]:
        found = re.compile(pattern).search(run.stdout, place)
        assert found, f"{pattern!r} is missing in\n{run.stdout}"
        place = found.end()
