"""Measure the memory of a run. Both sides of a comparison import this module."""

import re
import resource
import sys
from pathlib import Path


def peak_mb():
    """Return the peak memory of this process in MiB.

    On Linux, getrusage includes the memory of the parent when it started this process; /proc does not.
    """
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
