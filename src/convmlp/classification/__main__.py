"""classification.py where there is no checkout: `python -m convmlp.classification`."""

import sys

from . import main

if __name__ == "__main__":  # not so in the processes that load data
    sys.exit(main())
