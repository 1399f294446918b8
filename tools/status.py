"""Prints how runs are doing, a line for each: python tools/status.py RUN [RUN ...]"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import run_command

DESCRIPTION = """Prints a table of runs: recipe, steps done, images per second, time left, last
top-1, and state: running, complete, paused (stop_at), stopped (by a signal), failed with the error,
or dead (ended without writing why, as by SIGKILL)."""


def main() -> None:
    """Reads run directories and writes nothing."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=DESCRIPTION)
    help = "run directories, or folders of them"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=help)
    chosen = parser.parse_args()
    from mpl_fast.training.status import table

    print(table(chosen.runs))


if __name__ == "__main__":
    run_command("status", main)
