"""Predictions against the truth: counts, intervals, tables, Markdown."""
