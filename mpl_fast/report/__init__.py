"""One page about one or several runs: numbers, figures, pictures."""
