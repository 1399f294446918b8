"""Makes a report: checks, predictions in the runs' caches, and the order of the page's sections."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpl_fast
from mpl_fast.distributed import ranks_of_launcher
from mpl_fast.errors import CheckpointError, ConfigError, DataError, UserError, output_errors
from mpl_fast.first_few import first_few
from mpl_fast.report import figures, page, picture_sections, sections, verdict
from mpl_fast.report.names import all_shown, shown
from mpl_fast.report.predictions import Network, Predictions, Say
from mpl_fast.report.runs import Group, Run, grouped, read
from mpl_fast.report.sections import Detail

LABELED = 2000  # labeled training images that are evaluated
UNLABELED_POINTS = 0.25  # on the map, for each validation image there
SECTIONS = {
    "summary": "Summary", "curves": "Curves", "confusion": "Confusion", "classes": "Classes",
    "calibration": "Calibration", "pseudo": "Pseudo labels", "mistakes": "Mistakes",
    "views": "Views", "features": "Feature map", "speed": "Speed", "differences": "Differences",
    "config": "Configuration",
}  # fmt: skip
OF_VALIDATION = ("summary", "confusion", "classes", "calibration", "mistakes", "features")


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    out: Path
    figures: Path | None = None
    unlabeled: int = 5000
    """Unlabeled images to predict at most."""
    points: int = 2000
    """Validation images on the map of features at most; 0: no map."""
    force: bool = False
    options: tuple[str, ...] = ()
    """Options of train.py that replace those of the runs."""


def write_report(folders: Sequence[Path], wanted: Wanted, say: Say = print) -> None:
    """Writes the page, and the figures where they are wanted. Raises `UserError` before anything is
    written if a folder is no run, or no folder has anything to show."""
    _check(wanted)
    named: dict[Path, Path] = {}
    for folder in folders:
        named.setdefault(folder.resolve(), folder)  # a run that is named twice is one run
    runs = [read(folder) for folder in named.values()]
    groups = grouped(runs)
    networks = [_network(run, wanted, say) for run in runs]
    if not any(run.curves for run in runs) and not any(isinstance(n, Network) for n in networks):
        raise DataError(f"{folders[0]} has nothing to show yet: let it train to a checkpoint")
    validated = [_validated(network, wanted, say) for network in networks]
    of_run = {run.path: v for run, v in zip(runs, validated, strict=True) if not isinstance(v, str)}
    detail = Detail(groups[0], runs[0], val=of_run.get(runs[0].path))
    if isinstance(validated[0], str):
        detail.gone = dict.fromkeys(OF_VALIDATION, validated[0])
    if isinstance(networks[0], Network):
        detail.network = networks[0]
        _predict_training_images(detail, networks[0], wanted)
    else:
        detail.gone |= dict.fromkeys(("pseudo", "views"), networks[0])
    page.write(wanted.out, page.render(_values(detail, groups, of_run, wanted)))
    if wanted.figures:
        written = figures.save(detail.charts, wanted.figures)
        say(f"{wanted.figures}: {len(written)} figures")
    for name, reason in detail.gone.items():
        say(f"not shown: {name}: {reason}")
    say(f"{wanted.out} ({wanted.out.stat().st_size / 1e6:.1f} MB)")


def _check(wanted: Wanted) -> None:
    if ranks_of_launcher()[1] > 1:
        raise ConfigError("a report is made by one process: run it without torchrun")
    for name in ("unlabeled", "points"):
        if getattr(wanted, name) < 0:
            raise ConfigError(f"--{name} {getattr(wanted, name)}: must be at least 0")
    page.check_out(wanted.out, wanted.force)
    if wanted.figures:
        with output_errors(wanted.figures):
            wanted.figures.mkdir(parents=True, exist_ok=True)
    # Before minutes of predictions, and by writing: permissions do not say it of every file system.
    for folder in (wanted.out.absolute().parent, *([wanted.figures] if wanted.figures else [])):
        with output_errors(folder), tempfile.TemporaryFile(dir=folder):
            pass


def _network(run: Run, wanted: Wanted, say: Say) -> Network | str:
    """The network, or why there is none."""
    try:
        network = Network(run.path, wanted.options, say)
    except CheckpointError as error:
        return shown(str(error))
    for warning in network.warnings:
        say(f"warning: {warning}")
    return network


def _validated(network: Network | str, wanted: Wanted, say: Say) -> Predictions | str:
    """Predictions on the validation split, or why there are none."""
    if isinstance(network, str):
        return network
    try:
        found = network.predictions("val", 0, wanted.points)
    except UserError as error:
        return shown(str(error))
    return found if found.known.all() else "not every validation image has a label"


def _predict_training_images(detail: Detail, network: Network, wanted: Wanted) -> None:
    detail.labeled = detail.attempt((), lambda: network.predictions("labeled", LABELED, 0))
    if wanted.unlabeled:
        mapped = round(wanted.points * UNLABELED_POINTS)
        detail.unlabeled = detail.attempt(
            ("pseudo",), lambda: network.predictions("unlabeled", wanted.unlabeled, mapped)
        )


def _values(
    detail: Detail, groups: list[Group], of_run: dict[Path, Predictions], wanted: Wanted
) -> dict[str, Any]:
    """All values of the template."""
    run = detail.run
    several = len(groups) > 1 or len(groups[0].runs) > 1
    names = first_few(all_shown([group.name for group in groups]), 3, " · ")
    values = {
        "title": f"Training report: {names}",
        "subtitle": sections.subtitle(detail, several),
        "findings": verdict.findings(run, detail.val, detail.labeled, detail.unlabeled),
        "tiles": sections.tiles(detail),
        "comparison": sections.comparison(groups, of_run) if several else None,
        "comparison_notes": sections.comparison_notes(groups, of_run) if several else [],
        "curves": sections.curves(detail, groups, sections.CURVES),
        "curves_text": sections.curves_text(groups),
        **sections.confusion(detail),
        **sections.calibration(detail, groups, of_run),
        **sections.pseudo(detail, groups),
        "mistakes": picture_sections.mistakes(detail),
        **picture_sections.views(detail),
        **picture_sections.feature_map(detail),
        "speed": sections.curves(detail, groups, sections.SPEED_CURVES),
        "speed_table": sections.speed(groups),
        **sections.options(detail, groups),
        "footer": f"mpl_fast {mpl_fast.__version__}. This page loads nothing from the network.",
    }
    if not run.curves:
        why = f"{run.path}/metrics.jsonl has no rows"
        detail.gone |= {name: shown(why) for name in ("curves", "speed") if not values[name]}
    listed = [*SECTIONS.items()]
    if not values["different"]:
        listed.remove(("differences", SECTIONS["differences"]))
    return values | {"gone": detail.gone, "sections": listed}
