"""Command line that shows what training sees: `contact_sheet.py REC --out sheet.png`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse

from mpl_fast.config import DataConfig
from mpl_fast.errors import ConfigError, UserError


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the defaults are the recipes' defaults."""
    default = DataConfig()
    parser = argparse.ArgumentParser(
        prog="contact_sheet",
        allow_abbrev=False,
        description="Write a PNG of real images from REC, one a row: the original, the weak view, "
        "and several draws of the strong view of the same crop.",
    )
    add = parser.add_argument
    add("rec", metavar="REC", help="folder that make_rec.py pack wrote")
    add("--out", required=True, type=Path, help="PNG file to write")
    add("--images", type=int, default=8, help="rows (8)")
    add("--draws", type=int, default=4, help="strong views of each image (4)")
    add("--seed", type=int, default=0, help="another seed shows other images (0)")
    add("--image-size", type=int, default=default.image_size)
    add("--weak", choices=("imagenet", "cifar"), default=default.weak)
    add("--policy", choices=("mpl", "dali"), default=default.policy)
    add("--layers", type=int, default=default.layers)
    add("--magnitude", type=float, default=default.magnitude)
    add("--translate", type=float, default=default.translate)
    add("--cutout", type=int, default=default.cutout)
    add("--final-cutout", type=int, default=default.final_cutout)
    add("--no-flip", action="store_true", help="never mirror")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the sheet that the options ask for."""
    least = {"images": 1, "draws": 1, "image_size": 8, "layers": 0, "magnitude": 0, "cutout": 0}
    for name, low in least.items():
        value = getattr(options, name)
        if value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {low}")
    if not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out}: its folder does not exist")
    # DALI takes seconds to load: only once there is something to do.
    from mpl_fast.data.contact_sheet import contact_sheet
    from mpl_fast.data.manifest import read_manifest

    config = DataConfig(
        root=options.rec,
        image_size=options.image_size,
        weak=options.weak,
        flip=not options.no_flip,
        policy=options.policy,
        layers=options.layers,
        magnitude=options.magnitude,
        translate=options.translate,
        cutout=options.cutout,
        final_cutout=options.final_cutout,
    )
    contact_sheet(
        config,
        read_manifest(options.rec),
        options.out,
        images=options.images,
        draws=options.draws,
        seed=options.seed,
    )
    print(options.out)


def main() -> int:
    """Run the command; a user's error is one line and its exit code."""
    options = build_parser().parse_args()
    try:
        run(options)
    except UserError as error:
        print(f"contact_sheet: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
