"""torchrun without its traceback after a process has printed its error.

A signal is passed on to the processes, which have half a minute to save; the exit code is then `STOPPED`, 75.
"""

import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from .command import STOPPED

if __name__ == "__main__":
    # Otherwise restarted processes find the addresses of the old ones (pytorch issue 135712)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if hasattr(signal, "SIGUSR1"):  # torchrun does not handle it
        signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)  # a negative code is the signal that ended the process
    except SignalException:
        sys.exit(STOPPED)
