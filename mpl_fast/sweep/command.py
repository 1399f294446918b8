"""The command line of tools/sweep.py; imports neither torch nor Optuna, so that --help is quick."""

import argparse
import math
import re
import shutil
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import yaml

from mpl_fast.atomic import write_text
from mpl_fast.config import RunConfig
from mpl_fast.config.aliases import OPTION_NAMES
from mpl_fast.config.command_line import as_yaml, phases
from mpl_fast.config.fields import replaced
from mpl_fast.data.manifest import Manifest, load_manifest, read_manifest
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors
from mpl_fast.first_few import counted
from mpl_fast.packing.options import is_drawn

if TYPE_CHECKING:
    from mpl_fast.sweep.loop import Worker

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
# Of a start that was killed, with temporary ones, such as sweep.db-journal.
OWN_FILES = (".lock", "sweep.db", "sweep.json", "journal.log", "rec.unfinished")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all options before anything is written, then trains; returns the exit code."""
    options, training = _parser().parse_known_args(arguments)
    typed = [argument.partition("=")[0] for argument in training if argument.startswith("--")]
    names = [name[2:].replace("-", "_") for name in typed]
    if "run_dir" in names:
        raise ConfigError("--run-dir is set by --out")
    if "dry_run" in names:
        raise ConfigError("--dry-run is for train.py: a sweep has none")
    base, *second = phases([*training, "--run-dir", str(options.out)])
    if second:
        raise ConfigError("then is not for a sweep, which searches the options of one run")
    if base.stop_at:
        raise ConfigError(f"stop_at is {base.stop_at}: a trial that pauses there has no result")
    manifest = read_manifest(base.data.root)
    try:
        worker = _worker(options, base, manifest, {OPTION_NAMES.get(n, n) for n in names})
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        raise ConfigError(f"{missing} is missing: pip install 'mpl_fast[sweep]'") from None
    return worker.run()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sweep.py",
        usage=USAGE,
        description=ABOUT,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    return parser


def _worker(
    options: argparse.Namespace, base: RunConfig, manifest: Manifest, given: set[str]
) -> "Worker":
    """The worker of checked options, with the folder of the sweep prepared."""
    for needed in ("matplotlib", "sklearn"):  # imported at the end, for the figures
        if not find_spec(needed):
            raise ModuleNotFoundError(name=needed)
    # Imported here: Optuna takes a second, and may be missing.
    from mpl_fast.sweep.held_out import hold_out
    from mpl_fast.sweep.loop import Worker
    from mpl_fast.sweep.process import slots
    from mpl_fast.sweep.ranges import own_values, ranges_as_json, read_ranges
    from mpl_fast.sweep.study import SETTINGS, Storage, Trials, pruner

    ranges = read_ranges(options.ranges, base)
    if both := sorted(given & ranges.keys()):
        raise ConfigError(f"--{both[0]} is given, and {options.ranges} has a range for it")
    places = slots(base, options.ranks_per_trial, options.jobs, options.trials)
    out, rec = options.out.absolute(), Path(base.data.root).absolute()
    none = options.held_out in ("0", "0%")
    if none and "val" not in manifest.splits:
        raise DataError(f"{rec} has no validation split: give --held-out a share of labeled images")
    storage = Storage(options.storage)
    own = replaced(base, {"run_dir": "", "data.root": ""})
    settings = {
        "records": manifest.content,
        "held_out": options.held_out,
        "pruner": options.pruner,
        "storage": storage.shown(Path()),  # the folder may be moved
        "ranks_per_trial": options.ranks_per_trial,
        "ranges": ranges_as_json(ranges),
        "config": yaml.safe_load(as_yaml(own)),
    }
    _require_free(out, SETTINGS)
    same = not ranges.keys() & {"steps", "epochs", "eval_every", "eval_epochs"}
    known = same and not (base.epochs or base.eval_epochs)
    steps = (base.eval_every or base.steps, base.steps) if known else (0, 0)
    trials = Trials(out, storage, pruner(options.pruner, *steps), base.seed, lock=base.lock)
    values = own_values(base, ranges)

    def prepare() -> None:
        if not none:
            shutil.rmtree(out / "rec", ignore_errors=True)  # of a start that was killed
            hold_out(rec, out / "rec", options.held_out, base.seed)

    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with trials.locked():
            new = trials.open(settings, values, prepare)
            for link in (out / "rec").glob("*.rec"):
                if not link.exists():  # REC has been moved
                    link.unlink()
                    link.symlink_to((rec / link.name).resolve())
            write_text(out / "config.yaml", as_yaml(own))
    chosen_on = manifest if none else read_manifest(out / "rec")
    print(_introduction(base, manifest, chosen_on, options.held_out), flush=True)
    for key in ranges.keys() - values.keys() if new else ():
        print(f"the config's own {key} is not in its range, so no trial has all of its values")
    threads = "data.threads" in {*given, *ranges} or base.data.threads
    return Worker(
        trials,
        ranges,
        ["--config", str(out / "config.yaml"), "--data.root", str(chosen_on.root)],
        [] if threads else ["--data.threads", places[0]["OMP_NUM_THREADS"]],
        rec,
        chosen_on.splits["val"].records,
        options.trials,
        places,
        options.ranks_per_trial,
        time.monotonic() + options.timeout,
    )


def _require_free(out: Path, settings: str) -> None:
    """Raises `OutputError` for a folder that holds something else than a sweep."""
    if (out / settings).exists() or not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    for file in sorted(out.iterdir()):
        rec = file.name == "rec" and "held_out" in load_manifest(file)
        if not rec and not file.name.startswith(OWN_FILES):
            raise OutputError(f"--out {out}: holds {file.name}; name a new folder")


def _introduction(base: RunConfig, manifest: Manifest, chosen_on: Manifest, how: str) -> str:
    """Which images compare the trials, and how well."""
    labeled, unlabeled, val = (
        chosen_on.splits[name].records for name in ("labeled", "unlabeled", "val")
    )
    error = f"The standard error of a top-1 over {counted(val, 'image')} is at most "
    error += f"{50 / val**0.5:.1f} points"
    if chosen_on is not manifest:
        others = f"{labeled}" + (
            f" and {unlabeled} unlabeled ones" if base.unlabeled_images else ""
        )
        return (
            f"trials are compared by {val} of the {manifest.splits['labeled'].records} labeled "
            f"images (--held-out {how}) and trained on the other {others}; the validation split of "
            f"{manifest.root} is not read. {error}"
        )
    drawn = is_drawn(load_manifest(manifest.root)["options"].get("val"))
    which = "which were training images" if drawn else "WHICH MUST NOT BE THE TEST SET"
    return (
        f"trials are compared by the {val} validation images of {manifest.root}, {which}; a result "
        f"on them is optimistic afterwards. {error}"
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
