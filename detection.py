#!/usr/bin/env python
"""Train or test a detector with a ConvMLP backbone on mmdet (see --help)."""

import sys

from convmlp.openmmlab.coco import prepare
from convmlp.openmmlab.engine import main

if __name__ == "__main__":
    sys.exit(main("detection.py", prepare))
