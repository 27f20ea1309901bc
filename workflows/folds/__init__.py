"""The folds of a training run on a cluster: their workers, the board they report to, trials of a search."""
