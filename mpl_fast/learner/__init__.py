"""A network with its optimizer, precision, gradient exchange and weight averaging."""

from mpl_fast.learner.learner import Learner, Term

__all__ = ["Learner", "Term"]
