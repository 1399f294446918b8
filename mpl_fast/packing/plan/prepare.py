"""First phase of packing: checks the options against the file system, opens sources, plans."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mpl_fast.errors import ConfigError, DataError, OutputError, printable
from mpl_fast.packing.options import PackOptions, is_drawn
from mpl_fast.packing.plan.choose_labeled import check_labeled, read_amount
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.sources.kinds import find_path, open_source
from mpl_fast.packing.sources.labels import Labels
from mpl_fast.packing.sources.labels_file import read_labels
from mpl_fast.packing.sources.tar import clean_name


def warn(lines: Sequence[str]) -> None:
    """Print warnings to stderr, without the empty ones."""
    for line in filter(None, lines):
        print(f"make_rec: warning: {printable(line)}", file=sys.stderr, flush=True)


def check_options(options: PackOptions) -> None:
    """Refuse what can be refused before anything is created or unpacked."""
    try:
        out = options.out.resolve()
        if options.out.exists() and not options.out.is_dir():
            raise OutputError(f"--out {options.out}: is a file, not a folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise OutputError(f"--out {options.out}: {_reason(error)}") from error
    drawn = is_drawn(options.val)
    if options.val_labels and (options.val is None or drawn):
        raise ConfigError(f"--val-labels {options.val_labels}: there is no --val that needs them")
    if options.val_seed is not None and not drawn:
        raise ConfigError(f"--val-seed {options.val_seed}: is that of a drawn --val, such as 5%")
    if options.val is not None and drawn:
        _check_drawn(options.val)
    given = {
        "--src": options.src,
        "--val": () if drawn else (options.val,),
        "--unlabeled-src": options.unlabeled_src,
    }
    for name, specs in given.items():
        for spec in specs:
            if spec == "":
                raise ConfigError(f"{name}: its value is empty; give a folder or an archive")
            if spec and _is_inside(out, name, spec):
                raise ConfigError(f"--out {options.out}: is inside the source {spec}")
            if spec:  # before the first compressed archive is unpacked
                find_path(spec)
    for file in filter(None, (options.labels, options.val_labels, options.classes)):
        try:
            file.stat()  # not opened: a pipe can be read only once
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from error
    check_labeled(options.split.labeled)


def _check_drawn(val: str) -> None:
    """ConfigError unless val is a share or a number, and no folder or file has that name."""
    read_amount("--val", val)
    if Path(val).exists():
        raise ConfigError(
            f"--val {val}: a number of images, or what is called {val} here? Write ./{val} for "
            "that, or rename it"
        )


def _is_inside(out: Path, name: str, spec: str) -> bool:
    try:
        path = Path(spec).resolve()
        return path.is_dir() and (out == path or path in out.parents)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} {spec}: {_reason(error)}") from error


def _reason(error: OSError | RuntimeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def plan_to(path: Path, options: PackOptions) -> None:
    """Write the plan to path, in a work folder into which compressed archives are unpacked."""
    report = _reporter(options)
    labels = read_labels(options.labels, report) if options.labels else None
    if labels and not labels.has_names and len(options.src) > 1:
        fault = "one class a line, in the order of the names, is for one source"
        raise DataError(f"{labels.path}: {fault}, not {len(options.src)}; write `name class`")
    how = (options.root, path.parent, report, options.class_from)
    # Of their images, labels files may name some only: the others of --src then have classes of
    # their own, as one round of self-training has.
    pools = {_identity(spec) for spec in options.unlabeled_src}
    named = {spec for spec in options.src if _identity(spec) in pools}
    train = [
        open_source(
            spec, *how, labels=labels if spec in named or not named else None, partial=spec in named
        )
        for spec in options.src
    ]
    val = None
    if options.val is not None and not is_drawn(options.val):
        held = _val_labels(options.val_labels, labels, report)
        in_pool = _identity(options.val) in pools
        val = open_source(options.val, *how, labels=held, partial=in_pool)
    if options.class_from and not any(source.by_folder for source in filter(None, [*train, val])):
        fault = "no source has class folders to name the classes"
        raise ConfigError(f"--class-from {options.class_from}: {fault}")
    pool = [open_source(spec, *how, unlabeled=True) for spec in options.unlabeled_src]
    make_plan(path, train, val, options, pool, warn=warn)


def _val_labels(
    path: Path | None, labels: Labels | None, report: Callable[[str], None]
) -> Labels | None:
    if path and labels and labels.has_names and path.samefile(labels.path):
        return labels.for_validation()
    return read_labels(path, report) if path else None


def _reporter(options: PackOptions) -> Callable[[str], None]:
    def report(line: str) -> None:
        if not options.quiet:
            print(f"make_rec: {printable(line)}", file=sys.stderr, flush=True)

    return report


def _identity(spec: str) -> tuple[object, ...]:
    """Return what is equal for two ways to write one source."""
    path, folder, files = find_path(spec)
    return os.path.realpath(path), clean_name(folder), files
