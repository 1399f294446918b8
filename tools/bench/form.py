"""The form of a benchmark's result, which writers and `compare.py` agree on."""

FORM = "mpl_fast.bench/1"
ROW = ("name", "unit", "better", "steady", "median", "low", "high")  # what every row has
