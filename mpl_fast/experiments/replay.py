"""Replays recorded steps of MPL-pytorch: python -m mpl_fast.experiments.replay FILE.json"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.config.command_line import fail
from mpl_fast.errors import UserError
from mpl_fast.experiments.command import Parser

if TYPE_CHECKING:
    from mpl_fast.experiments.replay_difference import Difference
    from mpl_fast.experiments.replay_file import Run

PROGRAM = "replay"
LIMIT = 1e-10
INTERRUPTED = 130  # as shells have it after Ctrl-C
ABOUT = f"""Runs feedback parity_kekmodel in float64 on the weights and batches of a JSON file, and
compares all that the file has logged of kekmodel/MPL-pytorch's step, and its last weights. Exit
code 0: no relative difference is above {LIMIT:g}; 1: one is; 2: the file is not such a file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Replays a file; ends the program with 1 where it differs."""
    try:
        replay(_parse(arguments))
    except UserError as error:
        fail(PROGRAM, error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def replay(chosen: argparse.Namespace) -> None:
    """Prints the differences of every run. Raises `UserError` if one of them is too large."""
    from mpl_fast.experiments.replay_file import read

    trajectory = read(chosen.file)
    import torch

    from mpl_fast.experiments.replay_difference import differences, largest
    from mpl_fast.experiments.replay_run import play

    torch.set_num_threads(1)  # the tensors are tiny
    found: list[tuple[str, Difference]] = []
    for run in trajectory.runs:
        log, finals = play(trajectory, run, chosen.norm_momentum)
        of_run = list(differences(run, log, finals, trajectory.knobs))
        _print(run, largest(of_run))
        found += [(run.name, item) for item in of_run]
    name, worst = max(found, key=lambda pair: pair[1].relative)
    print(
        f"largest relative difference {worst.relative:.2g} ({name}, {worst.where}: "
        f"{worst.quantity}); {len(trajectory.runs)} runs, limit {LIMIT:g}",
        flush=True,
    )
    for name, item in found:  # the first is the cause of those that follow
        if not item.relative <= LIMIT:
            raise UserError(
                f"{chosen.file}: {name}, {item.where}: {item.quantity} is {item.ours!r} here and "
                f"{item.theirs!r} in the file (relative difference {item.relative:.2g})"
            )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=ABOUT, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE.json", help="the recorded trajectory")
    parser.add_argument(
        "--norm-momentum",
        type=_share,
        default=0.001,
        metavar="M",
        help="share of the new batch in batch norm's running statistics, of which the file says "
        "nothing (0.001, as in that code)",
    )
    return parser.parse_args(arguments)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1], not {text!r}")
    return value


def _print(run: "Run", worst: "Sequence[Difference]") -> None:
    print(run.name)
    for item in worst:
        print(f"  {item.quantity:<20} {item.relative:9.2g}  {item.where}")
    if run.unknown:
        print(f"  not compared: {', '.join(run.unknown)}")


if __name__ == "__main__":
    main()
