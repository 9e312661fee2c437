#!/usr/bin/env python
"""Train or test a segmentor with a ConvMLP backbone on mmseg (see --help)."""

import sys

from convmlp.segmentation import main

if __name__ == "__main__":
    sys.exit(main())
