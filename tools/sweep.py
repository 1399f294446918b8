"""Searches values of options: sweep.py --config FILE --ranges FILE --data.root REC --out SWEEP"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import run_command
from mpl_fast.sweep.command import main

if __name__ == "__main__":
    run_command("sweep", main)
