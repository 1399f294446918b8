"""High-throughput Meta Pseudo Labels, and the algorithms around it, for image classifiers."""

__version__ = "0.1.0"
