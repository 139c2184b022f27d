"""What this machine has for a run."""

import os
import sys
from pathlib import Path


def default_workers() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def available_bytes() -> int:
    """MemAvailable of the machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize
