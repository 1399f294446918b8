"""The options of tools/sweep.py that are not those of train.py."""

import argparse
import math
import re
from pathlib import Path
from typing import NoReturn

from mpl_fast.errors import ConfigError

USAGE = """sweep.py --config configs/NAME.yaml --ranges RANGES.yaml --data.root REC --out SWEEP
                [--trials N] [--timeout 2h] [any option of train.py]"""
ABOUT = """Searches values of options with Optuna: trials of mpl_fast/train.py, one a GPU or a group
of GPUs. They are compared by a part of the labeled training images that is held out, never by the
validation split of REC, which usually is the test set. All other options are those of train.py and
hold for all trials; --seed also seeds the draws. The same command continues after any stop."""
EPILOG = """ranges: a YAML file over keys of the config
  algorithm.student.lr: {low: 0.01, high: 0.3, log: true}
  algorithm.student.warmup: {low: 0, high: 100, step: 20}
  data.num_ops: [1, 2, 3]

The first trial has the values of --config, if they are in the ranges. The result of a trial is its
last evaluation. SWEEP gets best.yaml (a config for train.py), trials.csv, figures/, trials/NNNN
(run directories, with train.log) and rec/ (links to the records of REC below other index files).
Checkpoints of pruned trials are deleted.

Several machines: the same command on each adds workers to one sweep. They share the folder SWEEP,
and need --storage journal (a file in SWEEP) or a database's URL, since SQLite is for one machine.
"""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parser() -> argparse.ArgumentParser:
    """Of the sweep's own options; it leaves those of train.py."""
    made = _Parser(
        prog="sweep.py",
        usage=USAGE,
        description=ABOUT,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_search(made)
    _add_comparison(made)
    _add_processes(made)
    return made


def _add_search(parser: argparse.ArgumentParser) -> None:
    """What is searched, and for how long."""
    add = parser.add_argument
    add("--ranges", required=True, metavar="FILE", help="YAML file of what is searched, see below")
    add("--out", type=Path, required=True, metavar="SWEEP", help="folder for everything")
    add("--trials", type=_count, default=20, metavar="N", help="trials in all (%(default)s)")
    add(
        "--timeout",
        type=_seconds,
        default=math.inf,
        metavar="TIME",
        help="such as 90m or 1d12h, after which running trials save and the command ends; run "
        "again, it continues",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    """By what trials are compared."""
    add = parser.add_argument
    add(
        "--held-out",
        default="20%",
        metavar="SHARE",
        help="labeled images that compare the trials, a share or a number, divided among the "
        "classes by their sizes (%(default)s); they are not trained on. 0: compare by REC's own "
        "validation split, for one that was held out for it, as by pack --val 5%%",
    )
    add(
        "--pruner",
        choices=("median", "hyperband", "none"),
        default="median",
        help="ends trials early whose evaluations are behind those of others (%(default)s)",
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """Which processes train, and where they record it."""
    add = parser.add_argument
    add(
        "--storage",
        default="sqlite",
        metavar="sqlite|journal|URL",
        help="SWEEP/sweep.db, SWEEP/journal.log, or a database, such as "
        "mysql://USER@HOST/NAME (%(default)s)",
    )
    add(
        "--ranks-per-trial",
        type=_count,
        default=1,
        metavar="R",
        help="processes of a trial, each with a GPU if there are any (%(default)s)",
    )
    add(
        "--jobs",
        type=lambda text: 0 if text == "auto" else _count(text),
        default=0,
        metavar="J|auto",
        help="trials at a time (auto: as many as fit on the GPUs, or on the CPU cores)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def _seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise argparse.ArgumentTypeError(f"must be a time such as 90m or 1d12h, not {text}")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)
