"""A training run: build, resume, step, log, evaluate, save."""
