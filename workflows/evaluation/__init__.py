"""An evaluation: which files of a run and of the truth belong together; tables, report and figures."""
