"""`make bench`: what is asked of the kernels' speed, and what they do; a table, and results/bench.json.

Times are thread CPU time, medians of at least seven runs after one that does not count (three for many vCPUs, one for the
compilation); ratios are of runs in turns in one process on the same arrays. Ratios hold across machines, absolute figures do not.
"""

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

from sweep.configs import config_root
from tests.bench import replay
from tests.bench.figures import GROUPS, Figure


def cell(value: float, unit: str) -> str:
    number = f"{value:.2e}" if value >= 1e5 else f"{value:.4f}" if value < 0.05 else f"{value:.2f}"
    return f"{number} {unit}"


def line(figure: Figure) -> str:
    sign = ">=" if figure.more_is_better else "<="
    asked, measured = f"{sign} {cell(figure.asked, figure.unit)}", cell(figure.measured, figure.unit)
    return f"{figure.name:52} {asked:22} {measured:20} {'met' if figure.met else 'NOT MET'}"


def main() -> int:
    print(f"{'figure':52} {'asked':22} {'measured':20}")
    found = []
    for group in (*GROUPS, *replay.GROUPS):
        for figure in group():
            print(f"{line(figure)}\n    {figure.method}", flush=True)
            found.append(asdict(figure) | {"met": figure.met})
    path = config_root().parent / "results" / "bench.json"
    host = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    path.write_text(json.dumps({"host": host, "figures": found}, indent=1) + "\n")
    print(f"written: {Path('results') / path.name}; {sum(f['met'] for f in found)} of {len(found)} met")
    return 0


if __name__ == "__main__":
    sys.exit(main())
