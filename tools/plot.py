"""Draws learning curves: python tools/plot.py RUN [RUN ...] --out curves.png"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import UserError, fail


def main() -> None:
    """One curve a run, named as it was given."""
    parser = argparse.ArgumentParser(description="Draws the learning curves of runs as one PNG.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write")
    chosen = parser.parse_args()
    try:
        from mpl_fast.training.curves import draw

        draw([(str(run), run) for run in chosen.runs], chosen.out)
    except UserError as error:
        fail("plot", error)
    except ModuleNotFoundError as error:
        fail("plot", UserError(f"{error.name} is missing: pip install {error.name}"))
    print(chosen.out)


if __name__ == "__main__":
    main()
