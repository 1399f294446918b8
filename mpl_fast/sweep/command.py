"""The command line of tools/sweep.py; imports neither torch nor Optuna, so that --help is quick."""

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

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
from mpl_fast.sweep.options import parser

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from mpl_fast.sweep.loop import Worker
    from mpl_fast.sweep.study import Trials

# Of a start that was killed, with temporary ones, such as sweep.db-journal.
OWN_FILES = (".lock", "sweep.db", "sweep.json", "journal.log", "rec.unfinished")


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all options before anything is written, then trains; returns the exit code."""
    options, training = parser().parse_known_args(arguments)
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


def _worker(
    options: argparse.Namespace, base: RunConfig, manifest: Manifest, given: set[str]
) -> "Worker":
    """The worker of checked options, with the folder of the sweep prepared."""
    for needed in ("matplotlib", "sklearn"):  # imported at the end, for the figures
        if not find_spec(needed):
            raise ModuleNotFoundError(name=needed)
    # Imported here: Optuna takes a second, and may be missing.
    from mpl_fast.sweep.loop import Worker
    from mpl_fast.sweep.process import slots
    from mpl_fast.sweep.ranges import own_values, read_ranges
    from mpl_fast.sweep.study import SETTINGS, Storage, Trials, pruner

    ranges = read_ranges(options.ranges, base)
    if both := sorted(given & ranges.keys()):
        raise ConfigError(f"--{both[0]} is given, and {options.ranges} has a range for it")
    places = slots(base, options.ranks_per_trial, options.jobs, options.trials)
    out, rec = options.out.absolute(), Path(base.data.root).absolute()
    if not _holds_out(options) and "val" not in manifest.splits:
        raise DataError(f"{rec} has no validation split: give --held-out a share of labeled images")
    storage = Storage(options.storage)
    _require_free(out, SETTINGS)
    steps = _evaluations(base, ranges)
    trials = Trials(out, storage, pruner(options.pruner, *steps), base.seed, lock=base.lock)
    values = own_values(base, ranges)
    new = _open(trials, options, base, manifest, ranges, values)
    chosen_on = read_manifest(out / "rec") if _holds_out(options) else manifest
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


def _holds_out(options: argparse.Namespace) -> bool:
    """Whether labeled images are held out, in records of the sweep's own."""
    return options.held_out not in ("0", "0%")


def _evaluations(base: RunConfig, ranges: Mapping[str, object]) -> tuple[int, int]:
    """The steps of every trial's first and last evaluation; zeros if they are not known."""
    searched = ranges.keys() & {"steps", "epochs", "eval_every", "eval_epochs"}
    if searched or base.epochs or base.eval_epochs:
        return 0, 0
    return base.eval_every or base.steps, base.steps


def _open(
    trials: "Trials",
    options: argparse.Namespace,
    base: RunConfig,
    manifest: Manifest,
    ranges: "Mapping[str, BaseDistribution]",
    values: Mapping[str, object],
) -> bool:
    """Opens the study and writes what trials read: config.yaml, and records with images held out.

    Returns whether the study is new.
    """
    from mpl_fast.sweep.held_out import hold_out
    from mpl_fast.sweep.ranges import ranges_as_json

    out, rec = trials.out, Path(base.data.root).absolute()
    own = replaced(base, {"run_dir": "", "data.root": ""})
    settings = {
        "records": manifest.content,
        "held_out": options.held_out,
        "pruner": options.pruner,
        "storage": trials.storage.shown(Path()),  # the folder may be moved
        "ranks_per_trial": options.ranks_per_trial,
        "ranges": ranges_as_json(ranges),
        "config": yaml.safe_load(as_yaml(own)),
    }

    defaults = {"config": yaml.safe_load(as_yaml(RunConfig(algorithm=type(base.algorithm)())))}

    def prepare() -> None:
        if _holds_out(options):
            shutil.rmtree(out / "rec", ignore_errors=True)  # of a start that was killed
            hold_out(rec, out / "rec", options.held_out, base.seed)

    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with trials.locked():
            new = trials.open(settings, values, prepare, defaults)
            for link in (out / "rec").glob("*.rec"):
                if not link.exists():  # REC has been moved
                    link.unlink()
                    link.symlink_to((rec / link.name).resolve())
            write_text(out / "config.yaml", as_yaml(own))
    return new


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
