#!/usr/bin/env python
"""Train or test a segmentor with a ConvMLP backbone on mmseg (see --help)."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    if find_spec("mmseg") is None:
        sys.exit("segmentation.py needs mmseg: pip install '.[openmmlab]'")
    from convmlp.openmmlab.engine import main
    from convmlp.openmmlab.labelmaps import prepare

    sys.exit(main("segmentation.py", prepare))
