"""detection.py and segmentation.py where there is no checkout: `python -m convmlp.openmmlab CONFIG ...`."""

import os
import sys

from ..cli import run_openmmlab

if __name__ == "__main__":  # not so in the processes that load data
    sys.exit(run_openmmlab(os.environ.get("CONVMLP_COMMAND", "convmlp.openmmlab")))
