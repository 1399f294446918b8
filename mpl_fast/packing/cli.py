"""Command line of make_rec: the parser of each command, exit codes, signals, printed output."""

import argparse
import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mpl_fast.errors import ANY_TEXT, INTERRUPTED, ConfigError, UserError, printable
from mpl_fast.first_few import counted
from mpl_fast.packing import commands
from mpl_fast.packing.options import ACTIONS, BALANCES, CHECKS, CLASS_ORDERS, DRAWN, LAYOUTS
from mpl_fast.packing.publish.out_folder import WORK
from mpl_fast.packing.write.pixels import PIXEL_LIMIT

_STOPS = (signal.SIGINT, signal.SIGTERM)
_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}  # powers of 2
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_PART = re.compile(r"(\d+)/(\d+)")
_CORES = len(os.sched_getaffinity(0))
_PACK = """\
Write MXNet RecordIO files with a labeled split, checked and shuffled, that DALI and MXNet read.

sources (--src, --val, --unlabeled-src):
  DIR              class folders: an image's class is the name of its folder (--class-from
                   states which one in deeper trees)
  ARCHIVE          a .tar, also .tar.xz, .tar.gz, .tar.bz2, with class folders or one tar a class
                   inside, as ILSVRC2012_img_train.tar; nothing is extracted;
                   or a .zip with class folders
  ARCHIVE:FOLDER   one folder of an archive
  FILE.lst         MXNet's list: id, label, path; the paths start at --root
  FILE.rec         records, whose names are in FILE.lst beside it
  FILE.parquet     images and labels as on Hugging Face; also a folder of them, or a pattern
  SHARD.tar        webdataset: a .cls, .json or .txt beside each image; also a pattern of shards
  cifar-10-python.tar.gz:train, train_32x32.mat, train-images-idx3-ubyte.gz
                   CIFAR-10 and -100, SVHN, MNIST as published
  --unlabeled-src takes the same, without classes and labels: folders may be flat, or of any depth,
  and a list may have paths alone
  with --labels / --val-labels FILE the images of a folder or tar need no class folders: a line is
  `name class`, or a class, in the order of the names; or a CSV with a header (id, ..., label), as
  Kaggle's LOC_val_solution.csv

examples:
  make_rec.py pack --src train --val val --out rec --labeled 10%
  make_rec.py pack --src labeled --unlabeled-src crawled photos.tar --val val --out rec
  make_rec.py pack --src ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \\
      --val-labels validation_labels.txt --out rec --labeled 10percent.txt --short-side 480
  make_rec.py pack ... --part 3/8   (on each of 8 machines that share the disk; then: finish rec)
"""
_RESPLIT = """\
Draw other labeled images in place of those of a pack: the index files of its splits labeled and
unlabeled are replaced, the records stay. Options that are not given stay as they are in OUT.
"""
_EPILOG = """\
A run that was stopped continues where it was: run the same command again. Finished shards wait in
OUT/.pack until all are there, and an older pack in OUT stays readable until then.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, in the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        print(f"make_rec: error: {printable(message)} (see --help)", file=sys.stderr)
        raise SystemExit(ConfigError.exit_code)


def build_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="make_rec",
        description="Pack images into records for training; verify, inspect and resplit them.",
        epilog="Begin with: make_rec.py pack --src train --val val --out rec --labeled 10%",
        allow_abbrev=False,
    )
    found = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pack(found)
    summary = "draw other labeled images in place of those of a pack; the records stay"
    command = _command(
        found, commands.run_resplit, summary, out="a pack of the shared layout", more=_RESPLIT
    )
    _add_split(command.add_argument_group("splits"), default="that of OUT")
    _add_lock(command)
    command.set_defaults(**dict.fromkeys(DRAWN))
    summary = "check every byte; name the shard, record and image of any damage"
    add = _command(found, commands.run_verify, summary, out="a finished pack").add_argument
    add("--deep", action="store_true", help="also decode every image, strictly")
    add("-j", type=int, default=_CORES, metavar="N", help=f"processes ({_CORES})")
    summary = "finish a pack whose parts were packed with --part"
    _add_lock(_command(found, commands.run_finish, summary, out="the folder of the parts"))
    summary = "print what a folder contains: splits, shards, sources, options"
    command = _command(found, commands.run_info, summary, out="a pack, also an unfinished one")
    listed = "also every class: label, name, title, and its records in each split"
    command.add_argument("--classes", action="store_true", help=listed)
    summary = "find the image at a position that DALI printed as `PATH at index OFFSET`"
    command = _command(found, commands.run_locate, summary, out="a finished pack")
    where = "what DALI printed, or FILE.rec and an offset in it"
    command.add_argument("where", nargs="+", help=where)
    summary = "write the image of a record to a file"
    add = _command(found, commands.run_extract, summary, out="a finished pack").add_argument
    add("what", help="a record's id, or class/name")
    add("--to", type=_path, metavar="FILE", help="default: its name, here; - is standard output")
    add("--force", action="store_true", help="replace FILE")
    return parser


def _command(
    parent: "argparse._SubParsersAction[Parser]",
    run: Callable[[argparse.Namespace], commands.Result],
    summary: str,
    *,
    out: str = "",
    more: str = "",
    epilog: str | None = None,
) -> Parser:
    """Add the command run_NAME, with its first argument OUT if `out` describes it."""
    command = parent.add_parser(
        run.__name__.removeprefix("run_"),
        allow_abbrev=False,
        help=summary,
        description=more or f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, parser=command)
    if out:
        command.add_argument("out", type=_path, metavar="OUT", help=out)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress and no summary")
    return command


def _add_pack(parent: "argparse._SubParsersAction[Parser]") -> None:
    summary = "write labeled, unlabeled and validation records from images"
    command = _command(parent, commands.run_pack, summary, more=_PACK, epilog=_EPILOG)
    add = command.add_argument
    add("--src", required=True, nargs="+", help="training images; several sources are joined")
    add("--out", required=True, type=_path, help="folder to write, made if missing")
    more = "validation images, which training needs; or how many to draw from --src (5%%, 5000)"
    add("--val", metavar="SRC|N", help=more)
    more = "draws the images of --val 5%% (0); --split-seed does not change them"
    add("--val-seed", type=int, metavar="N", help=more)
    more = "training images without labels, for the unlabeled split"
    add("--unlabeled-src", nargs="+", default=[], metavar="SRC", help=more)
    add("--root", type=_path, metavar="DIR", help="where the paths of a .lst start (its folder)")
    add("--labels", type=_path, metavar="FILE", help="classes of --src outside class folders")
    add("--val-labels", type=_path, metavar="FILE", help="the same for --val")
    more = "the folder that is the class: the first below the source, the last one, or the N-th"
    add("--class-from", type=_class_from, metavar="top|leaf|N",
        help=f"{more} (default: the one that certainly is)")  # fmt: skip
    add = command.add_mutually_exclusive_group().add_argument
    order = "labels by sorted class names, as torchvision, or naturally (2 before 10), as timm"
    add("--class-order", choices=CLASS_ORDERS, help=f"{order} (default: name)")
    listed = "or a line for each label: name, or name and title (tab or space), as in ImageNet's "
    add("--classes", type=_path, metavar="FILE", help=f"{listed}LOC_synset_mapping.txt")
    _add_split(command.add_argument_group("splits"))
    _add_files(command.add_argument_group("files"))
    _add_images(command.add_argument_group("images"))
    add = command.add_argument_group("work").add_argument
    add("-j", type=int, default=_CORES, metavar="N", help=f"processes, each at a shard ({_CORES})")
    ahead = "threads of a process that open files ahead, more for disks that answer slowly (4)"
    add("--read-threads", type=int, default=4, metavar="N", help=ahead)
    add("--part", type=_part, metavar="I/N", help="pack only the I-th of N parts; `finish` ends it")
    engine = "processes here, or tasks of a Ray cluster (RAY_ADDRESS) that has the same disks"
    add("--engine", choices=("local", "ray"), default="local", help=engine)
    dry = "print the plan and an estimate of its time; OUT is not written"
    add("--dry-run", action="store_true", help=dry)
    add("--force", action="store_true", help="replace another pack in OUT; with --part, plan anew")
    _add_lock(command)


def _add_lock(command: Parser) -> None:
    command.add_argument(
        "--lock",
        type=_switch,
        default=True,
        metavar="true|false",
        help="false: without locks, where the file system has none and no other make_rec writes to "
        "OUT: parts one after the other (true)",
    )


def _add_split(group: "argparse._ArgumentGroup", default: str = "") -> None:
    """Add the options named in DRAWN; `default` describes those of all of them, if not pack's."""
    add = group.add_argument
    drawn = default or "10%%; with --unlabeled-src: all"
    add("--labeled", metavar="HOW",
        help="share (10%%), number of images (4000), all, or a file that names them: base names as "
        f"in SimCLR's 10percent.txt, class/name, or an .lst (default: {drawn})")  # fmt: skip
    add("--balance", choices=BALANCES, default="count",
        help="the same number from every class, or by its size "
        f"(default: {default or 'count'})")  # fmt: skip
    unlabeled = "all training images, the labeled ones too, or only the rest"
    add("--unlabeled", choices=("all", "rest"), default="all",
        help=f"{unlabeled} (default: {default or 'all'})")  # fmt: skip
    add("--split-seed", type=int, default=0, metavar="N",
        help=f"draws the labeled images (default: {default or 0})")  # fmt: skip


def _add_files(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    add("--layout", choices=LAYOUTS, default="shared",
        help="one copy of the training images, splits are index files; or separate .rec files, "
        "as SemiMeta and MXNet expect (default: shared)")  # fmt: skip
    cut = group.add_mutually_exclusive_group()
    cut.add_argument("--shard-size", type=_size, default=1 << 30, metavar="BYTES",
                     help="about the size of a .rec file, such as 512M (default: 1G)")  # fmt: skip
    cut.add_argument("--shards", type=int, metavar="N", help="or the number of .rec files of each")
    add("--order", choices=("shuffle", "list"), default="shuffle",
        help="of the records: shuffled, or by class and name (default: shuffle)")  # fmt: skip
    add("--shuffle-seed", type=int, default=0, metavar="N", help="shuffles them (0)")


def _add_images(group: "argparse._ArgumentGroup") -> None:
    add = group.add_argument
    smaller = "make images smaller whose shorter side has more than S pixels; none is enlarged"
    add("--short-side", type=int, metavar="S", help=smaller)
    add("--quality", type=int, default=90, metavar="Q", help="of those, as JPEG (90)")
    add("--min-shrink", type=float, default=1.1, metavar="F",
        help="keep an image as it is when it is less than F times too large (1.1)")  # fmt: skip
    add("--check", choices=CHECKS, default="decode",
        help="decode every image strictly; or (header) look for its first bytes and any end mark, "
        "which misses damage and most images cut after a thumbnail; or only refuse empty files "
        "(default: decode)")  # fmt: skip
    largest = "an image of more, by the size in its header, is bad and never decoded"
    add("--max-pixels", type=int, default=PIXEL_LIMIT, metavar="N",
        help=f"{largest} (default, and the most: {PIXEL_LIMIT})")  # fmt: skip
    add("--on-bad", choices=tuple(ACTIONS), default="fail",
        help="images that are damaged or of a kind that DALI may not decode (GIF, TIFF): list all "
        "and stop; leave them out; or convert what can be, also PNG named .JPEG and CMYK, to RGB "
        "JPEG (default: fail)")  # fmt: skip


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("its value is empty; give a path")
    return Path(text)


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text == "true"


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = float(found[1]) * (1 << _UNITS[found[2].lower()]) if found else 0.0
    if not 1 <= size < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is no size; write 512M or 1G")
    return int(size)


def _class_from(text: str) -> str:
    if not re.fullmatch("top|leaf|[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text} is not top, leaf or the number of a folder")
    return text


def _part(text: str) -> tuple[int, int]:
    found = _PART.fullmatch(text)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= parts:
        raise argparse.ArgumentTypeError(f"{text} is no part; write 1/8 to 8/8")
    return number, parts


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Return the parsed options; an unknown one is an error that suggests the closest known one."""
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        command: Parser = known.parser
        names = [name for action in command._actions for name in action.option_strings]
        words = {name.lstrip("-"): name for name in names}  # the dashes make all of them alike
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], words, 1)
        hint = f"; did you mean {words[near[0]]}?" if near else ""
        parser.error(f"unknown: {unknown[0]}{hint}")
    return known


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    known = parse(build_parser(), arguments)
    for number in _STOPS:
        signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8
        sys.stdout.reconfigure(errors=ANY_TEXT)
    try:
        result, lines = known.run(known)
    except UserError as error:
        print(f"make_rec: error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(printable(f"make_rec: interrupted{_kept(known)}"), file=sys.stderr)
        return INTERRUPTED
    if known.json:
        lines = [json.dumps(result, indent=1)]
    elif known.quiet:
        lines = []
    else:
        lines = [printable(line) for line in lines]
    print("\n".join(lines), end="\n" if lines else "")
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt once: the cleanup after a first Ctrl-C ignores a second one."""
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    raise KeyboardInterrupt


def _kept(known: argparse.Namespace) -> str:
    if known.command != "pack":
        return ""
    work = known.out / WORK
    finished = len(list(work.glob("*.rec.done")))
    if not finished:
        return f"; nothing was kept in {known.out}"
    kept = counted(finished, "finished shard is", "finished shards are")
    return f"; {kept} kept in {work}, the same command goes on"
