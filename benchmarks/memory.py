"""How much memory a run took. Imported on both sides of a comparison."""

import re
import resource
import sys
from pathlib import Path


def peak_mb():
    """Most memory that this process has had, MiB.

    Linux's getrusage also counts what the parent had when it started this process, /proc does not.
    """
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
