"""detection.py of a checkout; without one, `python -m convmlp.detection`."""

import sys
from importlib.util import find_spec

SCRIPT = "detection.py"


def main(argv: list[str] | None = None) -> int:
    """Train or test a model of mmdet; the exit codes are those of `convmlp.openmmlab.engine.main`."""
    if find_spec("mmdet") is None:
        print(f"{SCRIPT} needs mmdet: pip install 'convmlp[openmmlab]'", file=sys.stderr)
        return 2

    from .openmmlab.coco import prepare
    from .openmmlab.engine import main as run

    return run(SCRIPT, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
