"""Names in annotations of public functions."""

from typing import Any

# What `keras.ops` takes and gives: a tensor of the backend, a NumPy array, a
# number or a nested list of numbers.
Tensor = Any
