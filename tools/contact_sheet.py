"""Writes a PNG of training views: contact_sheet.py REC --out sheet.png [--config RECIPE.yaml]"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.config.command_line import parse
from mpl_fast.errors import ConfigError, run_command

DESCRIPTION = """Writes a PNG of real images from REC, one a row: the original, the weak view, and
several draws of the strong view. The views are those of a recipe (--config) or the
defaults; --data.magnitude 5 and the other --data.* options of train.py change them."""


def main() -> None:
    """Command line: own options, then those of train.py."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("rec", metavar="REC", help="folder that make_rec.py pack wrote")
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write")
    parser.add_argument("--images", type=int, default=8, help="rows (8)")
    parser.add_argument("--draws", type=int, default=4, help="strong views of each image (4)")
    parser.add_argument("--config", help="a recipe's YAML file")
    own, options = parser.parse_known_args()
    if own.config:
        options = ["--config", own.config, *options]
    parts = [*options, "--data.root", own.rec, "--run-dir", "none"]
    config = parse(parts, for_training=False)
    _check(own)
    # DALI takes seconds to load: only once there is something to do.
    from mpl_fast.data.contact_sheet import contact_sheet
    from mpl_fast.data.manifest import read_manifest
    from mpl_fast.data.randaugment import gray_views

    if warning := gray_views(config.data):
        print(f"warning: {warning}", file=sys.stderr)
    contact_sheet(
        config.data,
        read_manifest(own.rec),
        own.out,
        images=own.images,
        draws=own.draws,
        seed=config.seed,
    )
    print(own.out)


def _check(own: argparse.Namespace) -> None:
    for name in ("images", "draws"):
        if getattr(own, name) < 1:
            raise ConfigError(f"--{name} {getattr(own, name)}: must be at least 1")
    try:
        if not own.out.absolute().parent.is_dir():
            raise ConfigError(f"--out {own.out}: its folder does not exist")
        if own.out.is_dir() or own.out.suffix.lower() != ".png":
            raise ConfigError(f"--out {own.out}: must name a file that ends in .png")
    except OSError as error:
        raise ConfigError(f"--out {own.out}: {error.strerror}") from error


if __name__ == "__main__":
    run_command("contact_sheet", main)
