"""Ties a worker's life to torchrun's: a launcher killed outright leaves nobody behind.

torchrun starts its workers in sessions of their own. Killed by SIGKILL it cannot end them, and they
would train on, holding GPUs and the run directory's lock.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_launcher() -> None:
    """Asks Linux for a SIGKILL when torchrun dies. Without torchrun, or elsewhere, does nothing."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
