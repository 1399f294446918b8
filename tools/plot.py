"""Draws learning curves: python tools/plot.py RUN [RUN ...] --out curves.png"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import UserError, run_command


def main() -> None:
    """One curve a run, named as it was given."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Draws the learning curves of runs as one PNG."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    chosen = parser.parse_args()
    from mpl_fast.training.curves import draw

    try:
        draw([(str(run), run) for run in chosen.runs], chosen.out)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install {error.name}") from error
    print(chosen.out)


if __name__ == "__main__":
    run_command("plot", main)
