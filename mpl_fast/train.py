"""Trains one recipe: torchrun --nproc-per-node=8 mpl_fast/train.py --config FILE --data.root REC
--run-dir RUN."""

import sys
from pathlib import Path

# Run by path, Python puts mpl_fast/ on the import path; it is the folder above that belongs there.
if not __package__ and not getattr(sys.flags, "safe_path", False):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mpl_fast.config.command_line import parse, wants_dry_run
from mpl_fast.errors import UserError, fail
from mpl_fast.training.process import die_with_launcher


def main() -> int:
    """Imports torch only after parsing, so that --help and a wrong option take no seconds."""
    die_with_launcher()
    try:
        config = parse(sys.argv[1:])
        if wants_dry_run(sys.argv[1:]):
            from mpl_fast.dry_run.command import dry_run

            return dry_run(config)
        from mpl_fast.training import run

        return run.train(config)
    except UserError as error:
        fail("train", error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
