"""Prints how many cases of each public name have been tried."""

from property_table import COUNTS


def pytest_terminal_summary(terminalreporter):
    if COUNTS:
        terminalreporter.section("cases of the properties of each name")
    for name, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{name}: {count} cases")
