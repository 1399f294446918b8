"""Rows and cells of the study of CIFAR-10: configs, their options, and how long they train."""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
FULL = 2.5e15
"""FLOPs of a full run: about an hour on two cores of a Xeon with AMX."""
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
Json = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of the table: a config of configs/ and options in which it differs."""

    name: str
    config: str
    settings: tuple[str, ...] = ()
    against: str = "uda"
    """The row that it is compared with, in pairs of one draw."""
    after: str = ""
    """The row whose run it continues, and whose FLOPs it adds its own to."""


_OFF, _SOFT = "algorithm.feedback=off", "algorithm.labels=soft"
_NETWORK = ("algorithm.targets=network", "algorithm.bn_batches=split")
_HARD = ("algorithm.labels=argmax", "algorithm.temperature=1")
ROWS = (
    Row("supervised", "fast_supervised"),
    Row("supervised_weak", "fast_supervised", ("data.labeled_view=weak",), against="supervised"),
    Row("uda", "fast_uda"),
    Row("fixmatch", "fast_fixmatch"),
    Row("best", "fast_best", against="fixmatch"),
    Row("mpl", "fast_mpl"),
    Row("mpl_exact", "fast_mpl_exact"),
    Row("smpl", "fast_smpl"),
    Row("metasemi", "fast_metasemi"),
    Row("mpl_finetuned", "fast_finetune", against="mpl", after="mpl"),
    Row("mpl_off", "fast_mpl", (_OFF,), against="mpl"),
    Row("mpl_off_soft", "fast_mpl", (_OFF, _SOFT), against="mpl_exact"),
    Row("mpl_exact_held_out", "fast_mpl_exact", ("algorithm.held_out=0.5",), against="mpl_exact"),
    # What each part of the best recipe is worth.
    Row("best_by_network", "fast_best", _NETWORK, against="best"),
    Row("best_unaligned", "fast_best", ("algorithm.alignment=false",), against="best"),
    Row("best_argmax", "fast_best", _HARD, against="best"),
    Row("best_adaptive", "fast_best", (*_HARD, "algorithm.thresholds=adaptive"), "best_argmax"),
)
BY_NAME = {row.name: row for row in ROWS}


class Cell(NamedTuple):
    """One run: a row, with a share of the FLOPs of a full run, on one draw of the labels."""

    row: Row
    share: Fraction
    labels: int
    draw: int

    @property
    def text(self) -> str:
        """For messages."""
        return (
            f"{self.row.name}, {self.share} of {FULL:.1e} FLOPs, "
            f"draw {self.draw} of {self.labels} labels"
        )

    @property
    def records(self) -> str:
        """The folder of the records, below --out."""
        return f"records/{self.labels}_{self.draw}"

    @property
    def folder(self) -> str:
        """Of the run, below --out."""
        return f"{self.row.name}/{float(self.share):g}/{self.labels}_{self.draw}"


def key_of(cell: Cell) -> Json:
    """What a result depends on, as it is in cifar.json."""
    row, share, labels, draw = cell
    config = hashlib.sha256(config_file(row).read_bytes().partition(b"\nrecipe:")[2]).hexdigest()
    return {
        "row": row.name,
        "share": str(share),
        "labels": labels,
        "draw": draw,
        "settings": list(row.settings),
        "config_sha256": config,  # below its header
    }


def config_file(row: Row) -> Path:
    """The YAML file of a row."""
    return ROOT / "configs" / f"cifar10_4k_{row.config}.yaml"


def start_of(cell: Cell) -> Cell | None:
    """The run that a cell continues."""
    return cell._replace(row=BY_NAME[cell.row.after]) if cell.row.after else None
