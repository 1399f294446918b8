"""Evaluates a run's newest checkpoint: torchrun --nproc-per-node=8 tools/evaluate.py RUN"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.config.command_line import parse
from mpl_fast.errors import DataError, run_command
from mpl_fast.training.process import die_with_launcher

USAGE = """usage: evaluate.py RUN [--data.root REC] [--eval-batch N] [--device auto|cpu|cuda] ...

Prints top-1, top-5 and the image count of the averaged weights in RUN's newest checkpoint.
The options are those of RUN/config.yaml; options of train.py override them. The classes of REC are
matched by name with those of the run. Under torchrun the images are divided among the ranks."""


def main() -> int:
    """Evaluates with the config of the run; options override it."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    die_with_launcher()
    run, *options = arguments
    config_file = Path(run) / "config.yaml"
    if not config_file.exists():
        raise DataError(f"{config_file} does not exist: name a run directory that has trained")
    config = parse(["--config", str(config_file), *options, "--run-dir", run])
    from mpl_fast.training.evaluate import evaluate_run

    evaluate_run(config)
    return 0


if __name__ == "__main__":
    run_command("evaluate", main)
