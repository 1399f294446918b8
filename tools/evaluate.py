"""Evaluates a run's newest checkpoint: torchrun --nproc-per-node=8 tools/evaluate.py RUN"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.config.command_line import parse
from mpl_fast.config.run import CHECKPOINTS
from mpl_fast.errors import DataError, run_command
from mpl_fast.training.process import die_with_launcher

DESCRIPTION = """Prints top-1, top-5 and the image count of the averaged weights in a checkpoint of
RUN. Other options are those of RUN/config.yaml; options of train.py override them (--data.root REC,
--eval-batch N, --device cpu ...). The classes of REC are matched by name with those of the run.
Under torchrun the images are divided among the ranks."""


def main() -> int:
    """Evaluates with the config of the run; options override it."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        default="newest",
        help="the newest, or the best by validation of a run with checkpoint_best (%(default)s)",
    )
    parser.add_argument(
        "--views",
        type=int,
        choices=(1, 2, 6),
        default=1,
        help="also print the accuracy of the mean prediction over views of each image: 2: itself "
        "and mirrored; 6: these two also shifted by a pixel in two directions (%(default)s)",
    )
    own, options = parser.parse_known_args()
    die_with_launcher()
    config_file = Path(own.run) / "config.yaml"
    if not config_file.exists():
        raise DataError(f"{config_file} does not exist: name a run directory that has trained")
    config = parse(["--config", str(config_file), *options, "--run-dir", own.run])
    from mpl_fast.training.evaluate import evaluate_run

    evaluate_run(config, own.checkpoint, own.views)
    return 0


if __name__ == "__main__":
    run_command("evaluate", main)
