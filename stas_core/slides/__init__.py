"""Whole slides: what is read, how it is cut into tiles, and how the tiles become one result."""
