"""Pages for people: `report.html` of a run, made from the files in its folder and the record of its manifest alone."""
