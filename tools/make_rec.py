"""Command line that packs images into records: `make_rec.py pack --src DIR --out DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mpl_fast.errors import run_command
from mpl_fast.packing.cli import main

if __name__ == "__main__":
    run_command("make_rec", lambda: main(sys.argv[1:]))
