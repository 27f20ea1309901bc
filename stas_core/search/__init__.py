"""Search spaces, thresholds searched on maps, and what a search is worth."""
