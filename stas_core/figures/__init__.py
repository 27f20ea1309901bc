"""Figures as PNG bytes; the only package that loads matplotlib."""
