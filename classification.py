#!/usr/bin/env python
"""Train or evaluate an image classifier; `--help` lists the options, docs/training.md explains them."""

import sys

from convmlp.classification import main

if __name__ == "__main__":
    sys.exit(main())
