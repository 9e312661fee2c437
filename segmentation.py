#!/usr/bin/env python
"""Train or test a segmentor with a ConvMLP backbone on mmseg (see --help)."""

import sys

from convmlp.openmmlab.engine import main
from convmlp.openmmlab.labelmaps import prepare

if __name__ == "__main__":
    sys.exit(main("segmentation.py", prepare))
