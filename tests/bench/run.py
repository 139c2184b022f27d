"""`make bench`: what is asked of the kernels' and the sweeps' speed, and what they do; a table, and results/bench.json.

Times are thread CPU time, medians of at least seven runs after one that does not count (three for many vCPUs, one for the
compilation); ratios are of runs in turns in one process on the same arrays. Ratios hold across machines, absolute figures do not.
Those of sweeps: see sweep.py.
"""

import json
import os
import platform
import sys
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from sweep.configs import config_root
from tests.bench import replay, sweep
from tests.bench.figures import GROUPS
from tests.bench.table import line


def main() -> int:
    print(f"{'figure':52} {'asked':22} {'measured':20}")
    found = []
    for figure in chain(*(group() for group in (*GROUPS, *replay.GROUPS)), sweep.figures()):
        print(f"{line(figure)}\n    {figure.method}", flush=True)
        found.append(asdict(figure) | {"met": figure.met})
    path = config_root().parent / "results" / "bench.json"
    host = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    path.write_text(json.dumps({"host": host, "figures": found}, indent=1) + "\n")
    print(f"written: {Path('results') / path.name}; {sum(f['met'] for f in found)} of {len(found)} met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
