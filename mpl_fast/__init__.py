"""High-throughput Meta Pseudo Labels, and the algorithms around it, for image classifiers.

`fit` trains a config, `load` returns a trained network; both are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpl_fast.inference.trained import Trained, load
    from mpl_fast.train import fit

__all__ = ["Trained", "fit", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the public functions late (PEP 562): torch and DALI take seconds."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module 'mpl_fast' has no attribute {name!r}")
    module = "mpl_fast.train" if name == "fit" else "mpl_fast.inference.trained"
    return getattr(import_module(module), name)
