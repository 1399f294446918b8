"""Command line that packs images into records: `make_rec.py pack --src DIR --out DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import difflib
import io
import os
import signal
from typing import NoReturn

from mpl_fast.errors import ConfigError, UserError
from mpl_fast.packing.pack import PackOptions, pack
from mpl_fast.packing.plan import Division

INTERRUPTED = 130  # exit code after Ctrl-C, as shells use it


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line of the same form as every other error."""

    def error(self, message: str) -> NoReturn:
        print(f"make_rec: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(ConfigError.exit_code)


def build_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog="make_rec", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_pack(commands)
    return parser


def add_pack(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `pack`."""
    command = commands.add_parser(
        "pack",
        allow_abbrev=False,
        help="write labeled, unlabeled and validation records from images in class folders",
        description="Write MXNet RecordIO files with a class-balanced labeled split, checked and "
        "shuffled. An image's class is the name of its folder. SRC and VAL are a folder, "
        "a .tar (also .tar.xz, .tar.gz, .tar.bz2), or ARCHIVE:FOLDER for a folder inside one.",
    )
    add = command.add_argument
    add("--src", required=True, help="training images")
    add("--out", required=True, type=_folder, help="folder to write, made if missing")
    add("--val", help="validation images")
    add(
        "--labeled",
        default="10%",
        help="share (10%%), number of images (4000), or a file that names them; "
        "shares and numbers are spread evenly over the classes (default: 10%%)",
    )
    add(
        "--unlabeled",
        choices=("all", "rest"),
        default="all",
        help="all training images, the labeled ones too, or only the rest (default: all)",
    )
    add("--split-seed", type=int, default=0, metavar="N", help="draws the labeled images (0)")
    add("--shuffle-seed", type=int, default=0, metavar="N", help="orders each split (0)")
    add("--shards", type=int, default=1, metavar="N", help=".rec files a split (1)")
    cores = len(os.sched_getaffinity(0))
    add("-j", type=int, default=cores, metavar="N", help=f"processes, one a shard ({cores})")
    add(
        "--check",
        choices=("decode", "header", "none"),
        default="decode",
        help="decode every image strictly; or (header) look for its first bytes and any end mark, "
        "which misses damage and most images cut after a thumbnail; or only refuse empty files "
        "(default: decode)",
    )
    add("--force", action="store_true", help="replace another pack in --out")
    add("--quiet", action="store_true", help="no progress and no summary")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("its value is empty; give a folder")
    return Path(text)


def parse(parser: Parser, arguments: list[str]) -> PackOptions:
    """Return the options of a command line; an unknown one is answered with its near match."""
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        names = ["--src", "--out", *(f"--{key.replace('_', '-')}" for key in vars(known))]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], names, 1)
        parser.error(f"unknown: {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
    return PackOptions(
        src=known.src,
        out=known.out,
        val=known.val,
        division=Division(
            labeled=known.labeled,
            unlabeled=known.unlabeled,
            split_seed=known.split_seed,
            shuffle_seed=known.shuffle_seed,
            shards=known.shards,
            check=known.check,
        ),
        processes=known.j,
        force=known.force,
        quiet=known.quiet,
    )


def main() -> int:
    """Run the command line; return the exit code."""
    options = parse(build_parser(), sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path need not be UTF-8
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        summary = pack(options)
    except UserError as error:
        print(f"make_rec: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"make_rec: interrupted, nothing was kept in {options.out}", file=sys.stderr)
        return INTERRUPTED
    if not options.quiet:
        print("\n".join(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
