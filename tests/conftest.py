"""Real pictures for the tests: scikit-learn's digits as folders of PNG files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

torch.set_num_threads(1)  # with inputs as small as here, threads that share the cores with others cost ten times more


@pytest.fixture
def make_pictures(tmp_path: Path) -> Callable[..., Path]:
    """Writes root/SPLIT/CLASS/*.png of digits and returns root."""

    def make(
        name: str = "pictures",
        classes: tuple[int, ...] = (0, 1, 2),
        splits: dict[str, int] | None = None,
    ) -> Path:
        digits = load_digits()
        root, start = tmp_path / name, 0
        for split, count in (splits or {"train": 8, "val": 5}).items():
            for digit in classes:
                folder = root / split / f"digit{digit}"
                folder.mkdir(parents=True)
                for i in np.flatnonzero(digits.target == digit)[start : start + count]:
                    picture = Image.fromarray((digits.images[i] * 15).astype("uint8"))
                    picture.resize((36, 36)).save(folder / f"{i:04d}.png")
            start += count
        return root

    return make


@pytest.fixture
def pictures(make_pictures: Callable[..., Path]) -> Path:
    """Three classes: 24 training and 15 validation pictures."""
    return make_pictures()
