#!/usr/bin/env python
"""Train or test a segmentor with a ConvMLP backbone on mmseg (see --help)."""

import sys

from convmlp.cli import run_openmmlab

if __name__ == "__main__":
    sys.exit(run_openmmlab("segmentation.py"))
