"""Trains one recipe: torchrun --nproc-per-node=8 mpl_fast/train.py --config FILE --data.root REC
--run-dir RUN."""

import sys
from pathlib import Path
from typing import NoReturn

# Run by path, Python puts mpl_fast/ on the import path; it is the folder above that belongs there.
if not __package__ and not getattr(sys.flags, "safe_path", False):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mpl_fast.config.command_line import dry_run_of, phases
from mpl_fast.errors import run_command
from mpl_fast.training.process import die_with_launcher


def main() -> NoReturn:
    """Trains, or prints what training would need."""
    die_with_launcher()
    run_command("train", _train)


def _train() -> int:
    """Imports torch only after parsing, so that --help and a wrong option take no seconds."""
    configs = phases(sys.argv[1:])
    if dry := dry_run_of(sys.argv[1:]):
        from mpl_fast.dry_run.command import dry_run

        return max(dry_run(config, dry) for config in configs)
    from mpl_fast.training import run

    return run.train(*configs)


if __name__ == "__main__":
    main()
