"""Optional packages: what is missing, and the line that installs it."""

import pytest

from convmlp.common.errors import RunError
from convmlp.common.packages import missing, module_of, need, package_of, pip_line


def test_a_package_is_missing_if_its_module_cannot_be_found():
    assert missing("torch", "pyyaml", "no-such-package") == ["no-such-package"]


def test_what_is_needed_is_asked_for_by_one_line_that_installs_it():
    need("--plot", "torch", "pillow")
    with pytest.raises(RunError, match="^--plot needs a missing package: pip install no-such-package$"):
        need("--plot", "torch", "no-such-package")


def test_the_packages_of_openmmlab_are_installed_together_by_the_extra_that_pins_them():
    assert pip_line("onedl-mmcv", "onedl-mmengine", "shtab") == "pip install 'convmlp[openmmlab]' shtab"


@pytest.mark.parametrize(
    "package, module",
    [("scikit-learn", "sklearn"), ("pillow", "PIL"), ("grad-cam", "pytorch_grad_cam"), ("torch", "torch")],
)
def test_packages_and_modules_are_found_from_each_other(package, module):
    assert (module_of(package), package_of(module)) == (module, package)
