"""What a trained network is used for: predictions, exports and figures."""

from mpl_fast.inference.trained import Trained, load

__all__ = ["Trained", "load"]
