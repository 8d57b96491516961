"""`python -m fmrun.sweep.child PARENT COMMAND…`: the command of fmrun, which saves and stops when the process PARENT that
started it is gone, even if that was killed (Linux; elsewhere it goes on, and the next sweep waits for it)."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

if __name__ == "__main__":
    parent = int(sys.argv.pop(1))
    sys.argv[0] = "fmrun"
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it went before the kernel was told
            sys.exit(128 + signal.SIGTERM)
    if hasattr(signal, "SIGUSR2"):  # Slurm sends it to every process of a job; the one that started this answers it
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    from ..__main__ import main

    main()
