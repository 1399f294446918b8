"""Predicts the classes of images: python tools/predict.py RUN IMAGES --out predictions.parquet"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpl_fast.errors import run_command
from mpl_fast.packing.write.pixels import PIXEL_LIMIT
from mpl_fast.training.process import die_with_launcher

USAGE = "predict.py RUN IMAGES --out FILE [--keep P] [--device auto|cpu|cuda] [--eval-batch N] ..."
DESCRIPTION = """Predicts the class of each image by the averaged weights of RUN, on images as
evaluation makes them. Options of train.py override those of RUN/config.yaml. Under torchrun the
images are divided among the ranks. The same command continues after any stop, on any number of
ranks: what is done is in FILE.parts until then.

IMAGES is a folder of any depth, a tar or zip (ARCHIVE:FOLDER), a list (.lst), records (.rec),
parquet, webdataset shards ('DIR/{0000..0146}.tar'), one image, or all that make_rec.py pack
--unlabeled-src takes, or a pack: REC:val, REC:labeled; REC alone is REC:unlabeled.

FILE has a row for each image, in the order of IMAGES (of folders: of their paths): image (its path
in IMAGES, or its name in the pack), label, class, probability, the next classes (lists top_classes
and top_probabilities; in CSV class_2, probability_2, ...), and error. A bad image (empty, cut
short, of too many pixels, of a kind that DALI does not decode) has an error in place of a
prediction, and is a warning: the exit code stays 0 unless all are bad. A CSV cell that a
spreadsheet would take for a formula (=, +, -, @, a tab or a line end first) begins with '. Bytes of
a name that are not UTF-8 are \\xb1 in Parquet and JSON.

Where folders or records give classes that RUN has, the accuracy is printed."""


def main() -> int:
    """Predicts with the config of the run; options that are not here are train.py's."""
    options, pipeline = _parser().parse_known_args()
    die_with_launcher()
    from mpl_fast.inference.predict import PredictOptions, predict

    predict(PredictOptions(**vars(options), pipeline=pipeline))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="run directory")
    add("images", metavar="IMAGES", help="what to predict")
    add("--out", required=True, type=Path, metavar="FILE", help=".parquet, .csv or .jsonl")
    add("--top-k", type=int, default=5, metavar="N", help="classes of each image (5)")
    add("--logits", action="store_true", help="a list of logits for each image, not in CSV")
    add("--features", action="store_true", help="what the last layer receives, not in CSV")
    kept = "also write FILE's name with the suffix .kept.csv: the class of each image that has at "
    add("--keep", type=float, metavar="P", help=f"{kept}least this probability, for make_rec.py "
        "pack --labels; images of a pack that are labeled keep their labels")  # fmt: skip
    add("--keep-per-class", type=int, metavar="N", help="keep at most N images of a class, the "
        "most probable ones, since a threshold alone keeps few of hard classes")  # fmt: skip
    bad = "skip: images that DALI cannot decode have no prediction; convert: predict what OpenCV "
    add("--on-bad", choices=("skip", "convert"), default="skip", help=f"{bad}decodes of them: GIF, "
        "TIFF, AVIF, the rest of damaged ones, as make_rec.py pack does (skip)")  # fmt: skip
    largest = f"an image of more, by its header, is bad and never decoded ({PIXEL_LIMIT})"
    add("--max-pixels", type=int, default=PIXEL_LIMIT, metavar="N", help=largest)
    best = "best: of runs with checkpoint_best (newest)"
    add("--checkpoint", choices=("newest", "best"), default="newest", help=best)
    add("--force", action="store_true", help="replace FILE, and parts of another prediction")
    return parser


if __name__ == "__main__":
    run_command("predict", main)
