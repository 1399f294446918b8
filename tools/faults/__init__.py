"""The fault campaign: random kills of training and packing, named faults, and a soak."""
