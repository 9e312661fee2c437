"""torchrun for the dist_*.sh scripts: its options, without its traceback after a process has said what is wrong."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == "__main__":
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # a negative one is the signal that ended the process
