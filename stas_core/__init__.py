"""Spread-through-air-spaces segmentation: the library under the Ray workflows. It never imports Ray."""

__version__ = "0.1.0"
