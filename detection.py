#!/usr/bin/env python
"""Train or test a detector with a ConvMLP backbone on mmdet (see --help)."""

import sys

from convmlp.detection import main

if __name__ == "__main__":
    sys.exit(main())
