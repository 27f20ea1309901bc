"""One fold, from cohort rows to checkpoints and out-of-fold maps."""
