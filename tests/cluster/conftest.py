"""The table of faults that a session ends with."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what became of each stage under each fault, as Markdown."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [value for report in reports for name, value in report.user_properties if name == "fault"]
    if not rows:
        return
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    faults = list(dict.fromkeys(row["fault"] for row in rows))
    cells = {(row["fault"], row["stage"]): ", ".join(filter(None, (row["outcome"], row.get("pause")))) for row in rows}
    terminalreporter.section("faults: outcome, and the pause beyond the fault itself")
    terminalreporter.write_line(f"| fault | {' | '.join(stages)} |\n|---|{'---|' * len(stages)}")
    for fault in faults:
        terminalreporter.write_line(f"| {fault} | {' | '.join(cells.get((fault, stage), '') for stage in stages)} |")
