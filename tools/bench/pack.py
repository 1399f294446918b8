"""Measures packing against a plain copy, tar, webdataset, mosaicml-streaming and MXNet's im2rec.

`python -m tools.bench.pack_peers FOLDER` installs the peers; `--peers FOLDER` then measures them
too. All variants pack the same images from a warm page cache, and each run ends when its files are
on the disk. What each wrote is read back and counted: one that lost or changed an image fails.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from tools.bench import pack_files
from tools.bench.clock import interleaved
from tools.bench.harness import Report, at_least, run
from tools.bench.machine import ROOT, output_of
from tools.bench.pack_files import Counts, count
from tools.bench.pack_peers import versions
from tools.bench.results import Json, Row, last_line, ratios, spread

TINY = {"rounds": 1, "gigabytes": 0.0005, "large_images": 20, "rows": 2000}
MAKE_REC: list[Any] = [sys.executable, ROOT / "tools" / "make_rec.py"]
SCRIPT = ROOT / "tools" / "bench" / "pack_peers.py"
PEERS = {"webdataset": "webdataset", "mds": "mosaicml-streaming", "im2rec": "mxnet"}  # packages
OUT, NUMBER = "{out}", "{number}"  # in a command: its output folder, another number in each round
SHORT_SIDE = 480
KEPT_SIDE = round(1.1 * SHORT_SIDE)  # our --min-shrink: what is hardly larger keeps its bytes
SHRINK = ("--quality", "90")
SHARDS = 8  # of 250 MB at 2 GB of images; so that two workers share the work evenly
PHOTOGRAPH = 110_000  # bytes, about
INTERRUPTED = 130
GROUPS = {"images": "pass", "large": "short", "photographs": "photos", "pack": "verify"}
GROUPS |= {"members.tar": "plan", "members.pack": "plan"}  # of variants with this source
BASES = {"images": "copy", "large": "im2rec-480", "photographs": "im2rec-480-photos"}
# (ours, other): the least ratio of speeds.
RATIOS = {
    (f"ours-{check}-j2", base): least
    for check in ("none", "decode")
    for base, least in (("copy", 1.0), ("im2rec", 2.0), ("webdataset", 5.0), ("mds", 5.0))
} | {
    ("ours-480-j1", "im2rec-480"): 3.0,
    ("ours-480-j2", "ours-480-j1"): 1.85,
    ("ours-480-j1", "codecs-480"): 0.9,
    ("ours-480-photos-j1", "im2rec-480-photos"): 3.0,
    ("ours-480-photos-j2", "ours-480-photos-j1"): 1.85,
}
TARGETS = {("list", "s"): 60.0, ("resplit", "s"): 10.0}
TARGETS |= {("verify", "MB/s"): 1000.0, ("verify-deep", "img/s"): 800.0}
MEMORY = 200e6 / 2**20  # MiB, of the largest process of our packing


class Variant(NamedTuple):
    """What is measured."""

    name: str
    source: str  # what it reads, of GROUPS
    command: list[Any]
    written: str = ""  # what the output folder is read back as, see `count`


class Setting(NamedTuple):
    """Of one run of the benchmark."""

    options: argparse.Namespace
    folder: Path  # a temporary one
    data: dict[str, Counts]  # of each source


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`; 130 when interrupted, and then nothing is left on the disk."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run("pack", __doc__, arguments, measure, options, rounds=5, tiny=TINY)
    except KeyboardInterrupt:
        print("tools.bench pack: interrupted, the temporary data is removed", file=sys.stderr)
        return INTERRUPTED


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add = parser.add_argument
    peers = "where pack_peers has installed them"
    add("--peers", type=Path, default=Path("runs/peers"), metavar="DIR", help=peers)
    add("--images", type=Path, metavar="TAR", help="archive of JPEG photographs, needed")
    add("--work", type=Path, default=Path("runs"), help="folder on the disk to measure (runs)")
    add("--gigabytes", type=float, default=2.0, metavar="X", help="to pack unchanged (%(default)s)")
    large = "to pack with short side 480 (%(default)s)"
    add("--large-images", type=at_least(1), default=2000, metavar="N", help=large)
    listed = "images in the tar that is listed (%(default)s)"
    add("--rows", type=at_least(1), default=1281167, metavar="N", help=listed)
    add("--only", default="*", metavar="NAME,...", help="variants, such as copy,ours-*")


def measure(options: argparse.Namespace, report: Report) -> None:
    """In a new folder in `--work`, which is removed."""
    if not options.smoke and not (options.images and options.images.is_file()):
        raise ConfigError("--images: give a tar file with JPEG photographs; --smoke makes some")
    with output_errors(options.work):
        options.work.mkdir(parents=True, exist_ok=True)
    require_space(options)
    found = versions(options.peers)
    report.claim = (
        f"median of at most {options.rounds} interleaved rounds; whole commands with their start, "
        "but copy, codecs, webdataset and mds without start, import and listing, and im2rec "
        "without making its list; warm page cache, synced to the disk within the time; MB are 10^6 "
        "bytes of images read, memory is that of the largest process with shared pages"
    )
    missing = [name for name, package in PEERS.items() if package not in found]
    report.skipped += [f"{name}: not installed, see tools.bench.pack_peers" for name in missing]
    with tempfile.TemporaryDirectory(prefix=".bench_pack_", dir=options.work) as folder:
        setting = Setting(options, Path(folder).resolve(), {})
        there = [x for x in all_variants(setting) if not x.name.startswith(tuple(missing))]
        chosen = choose(there, options.only)
        make_data(setting, chosen)
        runs = measure_all(setting, chosen, report)
    report.more["data"] = {name: counts._asdict() for name, counts in setting.data.items()}
    report.more["variants"] = [described(setting, one) | {"runs": runs[one.name]} for one in chosen]
    report.more |= {"peers": found, "disk": describe_disk(options.work)}
    right = [one for one in chosen if one.name not in report.failed]
    report.add(rows(right, runs, setting.data))


def require_space(options: argparse.Namespace) -> None:
    """Raises `OutputError` if the data sets, a pack of each and one output would fill the disk."""
    need = 3.3e9 * options.gigabytes + 2e6 * options.large_images + 3e3 * options.rows
    free = shutil.disk_usage(options.work).free
    if free < need:
        raise OutputError(f"{options.work}: {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def all_variants(setting: Setting) -> list[Variant]:
    """Installed or not."""
    folder, peers = setting.folder, setting.options.peers
    images, members = folder / "images", folder / "members.pack"
    mine, theirs = ([p, SCRIPT, "write"] for p in (sys.executable, peers / "streams/bin/python"))
    im2rec, resize = [*im2rec_tool(peers), f"{OUT}/train"], ["--resize", SHORT_SIDE, *SHRINK]
    verify = [*MAKE_REC, "verify", folder / "pack", "-j", 1]
    listing = pack_command(folder / "members.tar", OUT, "--check", "none", "--dry-run")
    resplit = [*MAKE_REC, "resplit", members, "--labeled", "1%", "--split-seed", NUMBER]
    found = [
        Variant("copy", "images", [*mine, "copy", images, OUT], "copy"),
        Variant("tar", "images", ["tar", "-cf", f"{OUT}/images.tar", "-C", images, "."], "tar"),
        Variant("codecs-480", "large", [*mine, "codecs", folder / "large", OUT]),
        Variant("webdataset", "images", [*theirs, "webdataset", images, OUT], "tar"),
        Variant("mds", "images", [*theirs, "mds", images, OUT], "mds"),
        Variant("im2rec", "images", [*im2rec, images, "--pass-through", "--num-thread", 2], "rec"),
        Variant("verify", "pack", verify),
        Variant("verify-deep", "pack", [*verify, "--deep"]),
        Variant("list", "members.tar", listing),
        Variant("resplit", "members.pack", resplit),
    ]
    ours = [(f"ours-{x}", "images", ["--check", x]) for x in ("none", "header", "decode")]
    # Pictures that all have to be made smaller, and photographs as ImageNet has them.
    for source, end in (("large", ""), ("photographs", "-photos")):
        command = [*im2rec, folder / source, *resize]
        found.append(Variant(f"im2rec-480{end}", source, command, "rec"))
        ours.append((f"ours-480{end}", source, ["--short-side", str(SHORT_SIDE), *SHRINK]))
    for name, source, how in ours:
        for jobs in (1, 2):
            command = pack_command(folder / source, OUT, *how, "-j", jobs)
            found.append(Variant(f"{name}-j{jobs}", source, command, "rec"))
    return found


def im2rec_tool(peers: Path) -> list[Any]:
    """The start of im2rec's command line; it lies in MXNet's package."""
    tools = (peers / "mxnet").glob("lib/python*/site-packages/mxnet/tools/im2rec.py")
    return [peers / "mxnet/bin/python", next(tools, "im2rec.py")]


def pack_command(source: Path, out: Any, *arguments: Any) -> list[Any]:
    """Our command line."""
    layout = ["--labeled", "10%", "--layout", "shared", "--shards", SHARDS]
    return [*MAKE_REC, "pack", "--src", source, "--out", out, *layout, *arguments]


def choose(variants: Sequence[Variant], only: str) -> list[Variant]:
    """Those whose names match one of the patterns. Raises `ConfigError` if there are none."""
    patterns = only.split(",")
    found = [one for one in variants if any(fnmatch.fnmatch(one.name, p) for p in patterns)]
    if not found:
        raise ConfigError(f"--only {only}: there are {', '.join(one.name for one in variants)}")
    return found


def make_data(setting: Setting, chosen: Sequence[Variant]) -> None:
    """The data sets that the chosen variants need."""
    options, folder, data = setting.options, setting.folder, setting.data
    archive, sources = options.images, {one.source for one in chosen}
    print_progress("making the data sets")
    if sources & {"images", "pack"}:
        size = round(options.gigabytes * 1e9)
        data["images"] = pack_files.make_folders(archive, folder / "images", size)
    if "large" in sources:
        made = pack_files.make_mosaics(archive, folder / "large", options.large_images)
        data["large"] = made
    if "photographs" in sources:
        size = options.large_images * PHOTOGRAPH
        data["photographs"] = pack_files.make_folders(archive, folder / "photographs", size)
    if "pack" in sources:
        call(setting, pack_command(folder / "images", folder / "pack", "--check", "none"))
        data["pack"] = data["images"]
    if sources & {"members.tar", "members.pack"}:
        pack_files.make_members(folder / "members.tar", options.rows)
    if "members.pack" in sources:
        members = folder / "members.tar", folder / "members.pack"
        call(setting, pack_command(*members, "--check", "none"))
    for source in {one.source for one in chosen if one.name.startswith("im2rec")}:
        listed = folder / f"{source}.lst"
        listed.mkdir()
        tool = im2rec_tool(options.peers)
        call(setting, [*tool, listed / "train", folder / source, "--list", "--recursive"])


def measure_all(
    setting: Setting, chosen: Sequence[Variant], report: Report
) -> dict[str, list[Json]]:
    """The runs of every variant, by name; one that is wrong is not run again."""
    done: dict[str, list[Json]] = {one.name: [] for one in chosen}

    def timer(one: Variant) -> None:
        if one.name in report.failed:
            return
        number = len(done[one.name]) + 1
        print_progress(f"{number}/{setting.options.rounds}: {one.name}")
        out = fresh_folder(setting, one)
        # Each time anew: a virtual machine's host may take unused pages back within a minute.
        read_all(setting.folder / one.source)
        taken, printed = execute(filled(one.command, out, number), out)
        if not taken["code"] and SCRIPT in one.command:  # it has a clock of its own
            taken |= json.loads(last_line(printed))
        done[one.name].append(taken)
        if wrong := last_line(printed) if taken["code"] else difference(setting, one, out, printed):
            report.fail(one.name, wrong)

    options = setting.options
    interleaved(
        {one.name: one for one in chosen},
        timer,
        rounds=options.rounds,
        warmup=0,
        seed=options.seed,
        seconds=report.seconds_left(),
    )
    return done


def difference(setting: Setting, variant: Variant, out: Path, printed: str) -> str:
    """What is wrong with the output of a command that ended well; empty if nothing is."""
    rows = setting.options.rows
    if variant.name == "list":
        return "" if str(rows) in printed.replace(",", "") else f"{rows} is not in the plan"
    if variant.name == "resplit":
        listing = setting.folder / "members.pack" / "train_label.lst"
        lines = listing.read_bytes().count(b"\n")
        return "" if lines == round(rows / 100) else f"{lines} of {rows} rows are labeled"
    if not variant.written:
        return ""
    given = setting.data[variant.source]
    try:
        found = count(variant.written, out, setting.folder / "images")
    except (OSError, ValueError, struct.error) as error:
        return f"wrote what cannot be read ({error})"
    if variant.source == "images":  # every image once, byte for byte
        return "" if found == given else f"wrote {found}, not {given}"
    # Larger images get `SHORT_SIDE`, or keep their size if they are hardly larger; im2rec enlarges.
    (smallest, largest), (least, most) = found.short_sides, given.short_sides
    if variant.name.startswith("im2rec"):
        right = smallest == largest == SHORT_SIDE
    else:
        right = smallest == min(SHORT_SIDE, least) and min(SHORT_SIDE, most) <= largest <= KEPT_SIDE
    return "" if right and found.images == given.images else f"wrote {found} of {given}"


def execute(command: Sequence[str], out: Path) -> tuple[Json, str]:
    """Runs a command until its output is on the disk; returns its `pack_peers.run`, and its log.

    `seconds` are `wall`, unless the command prints its own.
    """
    with tempfile.NamedTemporaryFile() as log:
        runner = subprocess.Popen(
            [sys.executable, "-I", "-S", SCRIPT, "run", out, log.name, *command],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            found: Json = json.loads(runner.communicate()[0])
        except BaseException:
            end(runner)
            raise
        printed = log.read().decode(errors="replace")
    return found | {"seconds": found["wall"]}, printed


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kills a command and its workers; the workers of some would wait for ever."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for _ in range(100):  # until the last is gone, and with it what it writes
            os.killpg(process.pid, 0)
            time.sleep(0.05)


def call(setting: Setting, command: Sequence[Any]) -> None:
    """Runs a command that is not measured. Raises `UserError` if it fails."""
    found, printed = execute(filled(command, setting.folder, 0), setting.folder / "out")
    if found["code"]:
        raise UserError(f"{' '.join(map(str, command))}: {last_line(printed)}")


def fresh_folder(setting: Setting, variant: Variant) -> Path:
    """An empty output folder, for im2rec with its list; nothing is left for the disk to write."""
    out = setting.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if variant.name.startswith("im2rec"):
        shutil.copytree(setting.folder / f"{variant.source}.lst", out, dirs_exist_ok=True)
    os.sync()
    return out


def read_all(root: Path) -> None:
    """Brings a file, or all of a folder, into the page cache."""
    for path in (root, *root.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


def filled(command: Sequence[Any], out: Path, number: int) -> list[str]:
    """A command with its output folder and its number."""
    return [str(part).replace(OUT, str(out)).replace(NUMBER, str(number)) for part in command]


def described(setting: Setting, variant: Variant) -> Json:
    """Name, group and command, without the folders of this machine."""
    shown, peers = " ".join(map(str, variant.command)), setting.options.peers
    places = ((sys.executable, "python"), (setting.folder, "WORK"), (f"{ROOT}/", ""))
    for place, name in (*places, (peers, "PEERS")):
        shown = shown.replace(str(place), name)
    return {"name": variant.name, "group": GROUPS[variant.source], "command": shown}


def describe_disk(folder: Path) -> Json:
    """The file system of a folder, and what else packing depends on."""
    return {
        "filesystem": output_of("df", "--output=fstype", str(folder)).split("\n")[-1],
        "kernel": platform.release().partition("-")[0],
        "tar": output_of("tar", "--version").split("\n")[0],
    }


def print_progress(line: str) -> None:
    """On stderr."""
    print(f"tools.bench pack: {line}", file=sys.stderr, flush=True)


def rows(
    variants: Sequence[Variant], runs: Mapping[str, Sequence[Json]], data: Mapping[str, Counts]
) -> list[Row]:
    """Seconds, rates and memory of each variant, then ratios within a round."""
    made = []
    for one in variants:
        made += run_rows(one, runs[one.name], data.get(one.source, Counts(0, 0, 0, (0, 0))))
    seconds = {one.name: [run["seconds"] for run in runs[one.name]] for one in variants}
    groups = {one.name: GROUPS[one.source] for one in variants}
    bases = {(one.name, BASES.get(one.source, "")): None for one in variants}
    for (name, base), target in (bases | RATIOS).items():
        if name in seconds and base in seconds and name != base:
            label = f"{groups[name]}: {name} / {base}"
            gain = ratios(seconds, base, name)
            made.append(Row(label, gain, "times", "higher", steady=True, target=target))
    return made


def run_rows(variant: Variant, runs: Sequence[Json], counts: Counts) -> list[Row]:
    """Of one variant, whose images and their bytes are `counts`."""
    name = f"{GROUPS[variant.source]}: {variant.name}"
    seconds, wall = ([run[key] for run in runs] for key in ("seconds", "wall"))
    made = [Row(name, spread(seconds), "s", target=TARGETS.get((variant.name, "s")))]
    if wall != seconds:
        made.append(Row(f"{name}, whole command", spread(wall), "s"))
    for amount, unit in ((counts.bytes / 1e6, "MB/s"), (counts.images, "img/s")):
        if amount:
            rates = spread([amount / s for s in seconds])
            target = TARGETS.get((variant.name, unit))
            made.append(Row(name, rates, unit, "higher", target=target))
    busy = [run["cpu"] for run in runs]
    if counts.images and all(busy):
        made.append(Row(name, spread([counts.images / s for s in busy]), "img/CPU s", "higher"))
    limit = MEMORY if variant.name.startswith("ours") else None
    peaks = spread([run["peak_mib"] for run in runs])
    return [*made, Row(f"{name}, memory", peaks, "MiB", target=limit)]
