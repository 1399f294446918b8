"""Searches the values of options: trials of train.py, chosen by held-out training images."""
