"""A network with its optimizer, precision, gradient averaging over ranks and weight average."""

from mpl_fast.learner.learner import Learner, Term

__all__ = ["Learner", "Term"]
