"""Reads pickles of plain values and NumPy arrays; nothing that they name is imported or called."""

import pickle
import re
from typing import IO, TYPE_CHECKING, Any

from mpl_fast.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUMBERS = re.compile(r"[|<>=]?([iu][1248]|f[248]|b1)")


def load_plain(stream: IO[bytes], where: str) -> Any:
    """Return a pickled value of dicts, lists, tuples, bytes, str, numbers and arrays.

    Texts of Python 2 are bytes, arrays are `PlainArray`. Raises DataError, which names `where`, for
    anything else.
    """
    try:
        return _Unpickler(stream, encoding="bytes").load()
    except _ForbiddenError as error:
        raise DataError(f"{where}: refused, its pickle calls {error}") from error
    except Exception as error:  # a damaged pickle may raise any
        raise DataError(f"{where}: damaged pickle ({type(error).__name__}: {error})") from error


class PlainArray:
    """An array of numbers."""

    values: "NDArray[Any] | None" = None  # if the pickle made the array and never filled it

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self._set(content, kind, shape, "F" if fortran else "C")

    def _set(self, content: Any, kind: Any, shape: Any, order: Any) -> None:
        import numpy as np

        if not isinstance(kind, _Kind):
            raise ValueError("no kind of numbers")
        if not isinstance(content, (bytes, bytearray)):  # bytes(number) would be that many
            raise ValueError("the content of an array is no bytes")
        self.values = np.frombuffer(bytes(content), kind.dtype()).reshape(shape, order=order)


class _Kind:
    """The kind of numbers in an array."""

    def __init__(self, code: Any, *_: object) -> None:
        self._code, self._order = _text(code), "="
        if not _NUMBERS.fullmatch(self._code):
            raise ValueError(f"an array of {self._code}, not of numbers")

    def __setstate__(self, state: Any) -> None:
        self._order = _text(state[1])

    def dtype(self) -> "np.dtype[Any]":
        import numpy as np

        dtype: np.dtype[Any] = np.dtype(self._code).newbyteorder(self._order)
        return dtype


class _ForbiddenError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        key = f"{module.replace('numpy._core', 'numpy.core')}.{name}"
        if key not in _ALLOWED:
            raise _ForbiddenError(f"{module}.{name}")
        return _ALLOWED[key]


class _Calls:
    """What stands for the functions of a pickle; bound methods, which no pickle can change."""

    def array(self, *_: object) -> PlainArray:
        """Return an array, whose content follows."""
        return PlainArray()

    def array_of(self, content: Any, kind: Any, shape: Any, order: Any) -> PlainArray:
        array = PlainArray()
        array._set(content, kind, shape, _text(order))
        return array

    def encoded(self, text: str, encoding: Any) -> bytes:
        """Return bytes, as protocol 2 of Python 3 stores them."""
        if _text(encoding) != "latin1":
            raise ValueError("an unknown text")
        return text.encode("latin1")


def _text(value: Any) -> Any:
    return value.decode("ascii") if isinstance(value, bytes) else value


_CALLS = _Calls()
_ALLOWED = {
    "numpy.core.multiarray._reconstruct": _CALLS.array,
    "numpy.core.numeric._frombuffer": _CALLS.array_of,
    "numpy.ndarray": "ndarray",  # named, not called
    "numpy.dtype": _Kind,
    "_codecs.encode": _CALLS.encoded,
}
