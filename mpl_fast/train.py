"""Trains one recipe: torchrun --nproc-per-node=8 mpl_fast/train.py --config FILE --data.root REC
--run-dir RUN."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

# Run by path, Python puts mpl_fast/ on the import path; it is the folder above that belongs there.
if not __package__ and not getattr(sys.flags, "safe_path", False):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mpl_fast.config.command_line import as_arguments, dry_run_of, phases
from mpl_fast.errors import PREEMPTED, run_command
from mpl_fast.training.process import die_with_launcher

if TYPE_CHECKING:
    from mpl_fast.inference.trained import Trained


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
    from mpl_fast import distributed
    from mpl_fast.training.phases import train

    code = train(*configs)
    # Not in `finally`: after an error the other ranks may be waiting in a collective, and leaving
    # the group would wait for them instead of reporting the error.
    distributed.shutdown()
    return code


def fit(config: str | Path, options: Mapping[str, Any] | None = None) -> "Trained":
    """Trains as the command does, in this process, and returns the trained network.

    With ``then`` it is that of the second run. Under torchrun every rank calls it; the process
    group stays, for more calls. `config` is a YAML file, `options` has keys that override it, such
    as ``{"data.root": "REC", "run_dir": "RUN", "algorithm.student.lr": 0.1}``. A run that was
    stopped resumes; one that is complete is loaded. Raises `UserError` for what the command would
    print as an error, and `KeyboardInterrupt` after a first Ctrl-C has saved a checkpoint.
    """
    configs = phases(["--config", str(config), *as_arguments(options or {})])
    from mpl_fast.inference.trained import load
    from mpl_fast.training.phases import train

    if train(*configs) == PREEMPTED:
        raise KeyboardInterrupt(f"stopped and saved: the same call resumes {configs[0].run_dir}")
    return load(configs[-1].run_dir, device=configs[-1].device)


if __name__ == "__main__":
    main()
