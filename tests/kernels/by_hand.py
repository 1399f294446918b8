"""Six rows of logits, and arithmetic in Python's own numbers to check losses on them by."""

import math

import torch
from torch import Tensor

DOUBLE = torch.float64
LABELED = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]]
WEAK = [[2.0, 0.0, -1.0], [0.3, 0.2, 0.1]]  # sure of class 0, unsure
STRONG = [[0.5, 1.0, -0.5], [1.5, 0.0, -2.0]]  # arg-max 1 and 0
TARGET = [2, 1]
LOGITS = torch.tensor(LABELED + WEAK + STRONG, dtype=DOUBLE)
NONE = torch.empty(0, dtype=torch.int64)


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [p / sum(powers) for p in powers]


def cross_entropy(target: list[float], row: list[float]) -> float:
    return -dot(target, [math.log(p) for p in softmax(row)])


def one_hot(index: int, classes: int, smoothing: float = 0.0) -> list[float]:
    return [(1 - smoothing) * (c == index) + smoothing / classes for c in range(classes)]


def smooth(q: list[float], smoothing: float) -> list[float]:
    return [(1 - smoothing) * p + smoothing / len(q) for p in q]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    """d loss / d logits, the graph kept for the next question."""
    (result,) = torch.autograd.grad(loss, logits, retain_graph=True)
    return result
