"""The parts of an unfinished prediction: a folder of one file for each run of images."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpl_fast import distributed, locks
from mpl_fast.atomic import atomic_file, write_json
from mpl_fast.errors import OutputError, UserError, output_errors
from mpl_fast.untrusted import json_value, npz_arrays

_PLAN, _LOCK = "plan.json", ".lock"


class Parts:
    """Parts of `part` images each, in batches of `batch`, which are the same after a stop: they are
    kept with what is predicted.

    As a context, rank 0 makes and locks the folder; after a `UserError` before `open` it is gone
    again. Raises `OutputError` if the folder is another process's, or not of a prediction.
    """

    def __init__(self, folder: Path, *, lock: bool = True) -> None:
        self.folder, self._locks = folder, lock
        self._total = self._batch = self._part = 0

    def __enter__(self) -> "Parts":
        if distributed.rank() == 0:
            with output_errors(self.folder):
                self._lock = _locked(self.folder, self._locks)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        unused = distributed.rank() == 0 and not (self.folder / _PLAN).exists()
        if unused and kind and issubclass(kind, UserError):
            shutil.rmtree(self.folder, ignore_errors=True)

    def open(
        self, what: Mapping[str, Any], total: int, *, batch: int, part: int, anew: bool
    ) -> list[int]:
        """Divides `total` images, and returns the numbers of the parts that are missing; a
        collective.

        `what` identifies the prediction, as JSON. Raises `OutputError` if there are parts of
        another one, which are removed if `anew`.
        """
        self._total = total
        plan: dict[str, Any] = {}
        missing: list[int] = []
        if distributed.rank() == 0:
            with output_errors(self.folder):
                plan = self._plan({**what, "batch": batch, "part": part}, [*what], anew)
                self._batch, self._part = plan["batch"], plan["part"]
                numbers = range(-(-self._total // self._part))
                missing = [number for number in numbers if not self._file(number).exists()]
        plan, missing = distributed.broadcast_object((plan, missing))
        self._batch, self._part = plan["batch"], plan["part"]
        return missing

    def _plan(self, plan: dict[str, Any], keys: Sequence[str], anew: bool) -> dict[str, Any]:
        file = self.folder / _PLAN
        if file.exists():
            before = _stored(file)
            other = [key for key in keys if before.get(key) != json.loads(json.dumps(plan[key]))]
            if not other:
                return before
            if not anew:
                raise OutputError(
                    f"{self.folder} has parts of a prediction with other {' and '.join(other)}: "
                    "give the same again to continue it, or --force to begin anew"
                )
            file.unlink()
        for old in self.folder.glob("*.npz"):
            old.unlink()
        write_json(file, plan)
        return plan

    @property
    def batch(self) -> int:
        """Images of a batch, the last of a part perhaps less."""
        return self._batch

    def places(self, number: int) -> range:
        """The images of a part."""
        return range(number * self._part, min((number + 1) * self._part, self._total))

    def batches(self, number: int) -> Iterator[range]:
        """The images of each batch of a part."""
        places = self.places(number)
        for start in places[:: self._batch]:
            yield range(start, min(start + self._batch, places.stop))

    def write(
        self, number: int, good: Sequence[int], values: Sequence[NDArray[Any]], faults: Any
    ) -> None:
        """Writes a part: arrays with a row for each of the `good` places, and JSON."""
        with output_errors(self._file(number)), atomic_file(self._file(number)) as file:
            np.savez(file, np.array(good, np.int64), np.array(json.dumps(faults)), *values)

    def __iter__(self) -> Iterator[tuple[range, NDArray[np.int64], Any, list[NDArray[Any]]]]:
        """Reads all parts in order: their places, the good ones, the JSON, and the arrays."""
        for number in range(-(-self._total // self._part)):
            file = self._file(number)
            try:
                stored = npz_arrays(file)
                good, faults, *values = (stored[f"arr_{at}"] for at in range(len(stored)))
                about = json_value(str(faults))
            except (ValueError, KeyError) as error:
                raise OutputError(f"{file}: damaged ({error}); delete it and go on") from error
            yield self.places(number), good, about, values

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.npz"


def _stored(file: Path) -> dict[str, Any]:
    """The plan of a prediction. Raises `OutputError` if it is damaged."""
    try:
        plan = json_value(file.read_text())
        if not all(isinstance(plan[key], int) and plan[key] > 0 for key in ("batch", "part")):
            raise ValueError("no sizes of batches and parts")
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{file}: damaged ({error}); remove {file.parent}") from error
    found: dict[str, Any] = plan
    return found


def _locked(folder: Path, lock: bool) -> Any:
    """Makes the folder. The system releases the lock when this process ends."""
    folder.mkdir(exist_ok=True)
    if not (folder / _LOCK).exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not of a prediction: rename it, or give another --out")
    file = (folder / _LOCK).open("a")
    if lock and not locks.lock(file, folder):
        raise OutputError(f"{folder}: another process is predicting to it")
    return file
