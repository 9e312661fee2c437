"""segmentation.py of a checkout; without one, `python -m convmlp.segmentation`."""

import sys
from importlib.util import find_spec

SCRIPT = "segmentation.py"


def main(argv: list[str] | None = None) -> int:
    """Train or test a model of mmseg; the exit codes are those of `convmlp.openmmlab.engine.main`."""
    if find_spec("mmseg") is None:
        print(f"{SCRIPT} needs mmseg: pip install 'convmlp[openmmlab]'", file=sys.stderr)
        return 2

    from .openmmlab.engine import main as run
    from .openmmlab.labelmaps import prepare

    return run(SCRIPT, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
