"""What `make docs` makes from the code, and where it finds the pages."""
