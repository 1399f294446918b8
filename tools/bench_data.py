"""Measures DALI's training input against torchvision v2 in a DataLoader, on the same records.

All contestants are open at once and take turns in short rounds, so that what else the machine does
meets them alike. Each delivers normalized float32 batches with equal threads, or worker processes.
`--smoke` runs everything once on generated images and claims nothing about speed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mpl_fast.config import DataConfig
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import ConfigError, UserError
from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.pack import pack
from tools.bench.report import add_options, publish
from tools.bench.report import result as form
from tools.bench_input.clock import rounds
from tools.bench_input.contestants import Setting, all_contestants, swept
from tools.bench_input.report import rows

Json = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2: there are no records, or no CUDA for --device gpu."""
    options = _options(arguments)
    if options.device == "gpu" and not torch.cuda.is_available():
        print("bench_data: there is no CUDA device for --device gpu", file=sys.stderr)
        return 2
    if not (options.rec or options.smoke):
        print("bench_data: --rec names a folder of records; --smoke makes some", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = _measured(options, options.rec or _generated(Path(folder)))
    except UserError as error:
        print(f"bench_data: {error}", file=sys.stderr)
        return 2
    publish(result, options.out)
    print(f"load average before and after: {result['load_average']}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--rec", type=Path, metavar="DIR", help="records that make_rec.py packed")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="where DALI works (cpu)")
    add("--threads", type=int, default=2, metavar="N", help="DALI threads or worker processes (2)")
    add("--batch", type=int, default=64, metavar="N", help="images in a batch (64)")
    add("--batches", type=int, default=8, metavar="N", help="timed batches in a round (8)")
    add(
        "--interpolation",
        choices=("bicubic", "bilinear"),
        default="bicubic",
        help="of all contestants; bilinear is torchvision's default (%(default)s)",
    )
    add("--only", default="", metavar="TEXT", help="contestants with this in 'views name'")
    add("--sweep", action="store_true", help="our own settings against each other instead")
    add_options(parser, "bench_data", rounds=5)
    return parser.parse_args(arguments)


def _measured(options: argparse.Namespace, folder: Path) -> Json:
    if options.smoke:
        options.batch, options.batches, options.rounds = 8, 1, 1
    size = 64 if options.smoke else 224
    config = DataConfig(image_size=size, interpolation=options.interpolation)
    device = torch.device("cuda" if options.device == "gpu" else "cpu")
    split = read_manifest(folder).splits["unlabeled"]
    setting = Setting(config, split, options.batch, options.threads, device)
    everybody = swept(setting) if options.sweep else all_contestants(setting)
    contestants = [one for one in everybody if options.only in f"{one.task} {one.name}"]
    if not contestants:
        raise ConfigError(f"--only {options.only}: there is no such contestant")
    load = [os.getloadavg()[0]]
    found = rounds(
        contestants,
        batch=options.batch,
        batches=options.batches,
        repeats=options.rounds,
        seed=options.seed,
        seconds=60 * options.minutes if options.minutes else float("inf"),
    )
    load.append(os.getloadavg()[0])
    made = rows(contestants, found, smoke=options.smoke)
    return {
        **form("bench_data", options, _claim(options), made),
        "records": split.records,
        "load_average": [round(value, 2) for value in load],
    }


def _claim(options: argparse.Namespace) -> str:
    return (
        f"median (lowest to highest) of {options.rounds} interleaved rounds of {options.batches} "
        f"batches of {options.batch}; {options.threads} threads or workers each"
    )


def _generated(folder: Path) -> Path:
    """Records of 24 smooth images of different sizes."""
    chance = np.random.default_rng(0)
    (folder / "images" / "one").mkdir(parents=True)
    for number in range(24):
        seed = Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8))
        image = seed.resize((80 + number, 100 - number), Image.Resampling.BICUBIC)
        image.save(folder / "images" / "one" / f"{number}.jpg")
    images = str(folder / "images")
    split = SplitOptions(labeled="8")
    pack(PackOptions(src=(images,), val=images, out=folder / "rec", split=split, quiet=True))
    return folder / "rec"


if __name__ == "__main__":
    raise SystemExit(main())
