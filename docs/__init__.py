"""The documentation: pages, and what makes them."""
