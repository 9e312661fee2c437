#!/usr/bin/env python
"""Train or test a detector with a ConvMLP backbone on mmdet (see --help)."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("mmdet") is None:
        sys.exit("detection.py needs mmdet: pip install '.[openmmlab]'")
    from convmlp.openmmlab.coco import prepare
    from convmlp.openmmlab.engine import main

    sys.exit(main("detection.py", prepare))
