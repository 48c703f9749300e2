"""Compares models of several sizes: costs and metrics, one row for each model.

- `measure.py`: `compression_report` measures;
- `record.py`: `CompressionReport` keeps, prints and draws;
- `operations.py`: counts the operations of a program of XLA.
"""

from blogkeras.compression.measure import compression_report
from blogkeras.compression.operations import Operations, count_operations
from blogkeras.compression.record import CompressionReport

__all__ = [
    "CompressionReport",
    "Operations",
    "compression_report",
    "count_operations",
]
