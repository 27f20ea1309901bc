"""Images to probability maps, maps to masks, masks to files."""
