"""Estimates of a run before it starts: images a step, operations, memory, time."""
