"""Writes a page about runs: python tools/report.py RUN [RUN ...] --out report.html"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import UserError, run_command

DESCRIPTION = """Writes one HTML page about one or several runs, which loads nothing from the
network: verdict, learning curves, confusion, calibration, pseudo labels, mistakes, views, a map of
the features, speed, configuration. Runs that differ in their seed only become one curve with a
band. The first run is shown in detail. Predictions are cached in RUN/report_cache. Options of
train.py override those of the runs: --data.root REC where the records lie elsewhere, --device,
--eval-batch."""


def main() -> None:
    """Command line: own options, then those of train.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--out", required=True, type=Path, help="page to write, ending in .html")
    parser.add_argument("--figures", type=Path, help="folder for the figures as PNG and PDF")
    parser.add_argument(
        "--unlabeled",
        type=int,
        default=5000,
        metavar="N",
        help="unlabeled images to predict (5000)",
    )
    parser.add_argument(
        "--points", type=int, default=2000, metavar="N", help="validation images on the map (2000)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is no report")
    own, options = parser.parse_known_args()
    try:
        from mpl_fast.report.command import Wanted, write_report
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'mpl_fast[report]'") from error
    wanted = Wanted(own.out, own.figures, own.unlabeled, own.points, own.force, tuple(options))
    write_report(own.runs, wanted)


if __name__ == "__main__":
    run_command("report", main)
