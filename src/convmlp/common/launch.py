"""torchrun for the dist_*.sh scripts: its options, without its traceback after a process has said what is wrong.

A signal goes on to the processes, which then have half a minute to save; the exit code is then `STOPPED`, 75.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .command import STOPPED

if __name__ == "__main__":
    # Else processes that are started again find the addresses of their predecessors (pytorch issue 135712)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if hasattr(signal, "SIGUSR1"):  # which torchrun does not know
        signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # a negative one is the signal that ended the process
    except SignalException:
        sys.exit(STOPPED)
