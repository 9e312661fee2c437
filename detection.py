#!/usr/bin/env python
"""Train or test a detector with a ConvMLP backbone on mmdet (see --help)."""

import sys

from convmlp.cli import run_openmmlab

if __name__ == "__main__":
    sys.exit(run_openmmlab("detection.py"))
