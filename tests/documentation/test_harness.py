"""The benchmarks' harness: rows, intervals, pages."""

import pathlib
import sys

import numpy as np
import pytest
from kit import JAX

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from harness import page, recording, statistics  # noqa: E402

pytestmark = pytest.mark.skipif(JAX, reason="once is enough")


def test_a_recording_goes_on_where_it_stopped(tmp_path):
    arguments = tmp_path / "folder/x.csv", ["name", "seed", "value"]
    rows = recording.Recording(*arguments, key=["name", "seed"])
    assert rows.rows() == []
    rows.append('a, "b"', 0, 1.5)
    again = recording.Recording(*arguments, key=["name", "seed"])
    assert again.missing([('a, "b"', 0), ("c", 0)]) == [("c", 0)]
    again.append("c", 0, "")
    assert arguments[0].read_text() == (
        'name,seed,value\n"a, ""b""",0,1.5\nc,0,\n'
    )
    with pytest.raises(ValueError, match="Received"):
        again.append("c", 0)
    with pytest.raises(ValueError, match="Received"):
        recording.Recording(arguments[0], ["name", "value"], ["name"])
    with pytest.raises(ValueError, match="Received"):
        recording.Recording(arguments[0], arguments[1], ["missing"])


def test_ratios_are_of_pairs():
    """A slow round slows both: the ratio is 2 whatever the round."""
    base = np.random.default_rng(0).uniform(1, 9, 30)
    seconds = {"a": 2 * base, "b": base}
    assert statistics.ratio(seconds, "a", "b") == (2, 2, 2)
    seconds["a"] = base * np.linspace(1, 3, 30)
    middle, low, high = statistics.ratio(seconds, "a", "b")
    # Order statistics 10 and 21 of 30, the binomial's bounds for a median.
    steps = np.linspace(1, 3, 30)
    assert (middle, low, high) == pytest.approx((2, steps[9], steps[20]))


def test_intervals_of_means_and_shares():
    """t(4, .975) = 2.776445, from a printed table."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    half = 2.776445 * np.sqrt(2.5 / 5)
    assert statistics.mean_interval(values) == pytest.approx(
        (3, 3 - half, 3 + half), rel=1e-6
    )
    assert np.isnan(statistics.mean_interval([1.0])[1:]).all()
    assert statistics.mean_interval([2.0, 2.0]) == (2, 2, 2)
    rng = np.random.default_rng(0)
    # Of a constant denominator, Fieller's is Student's over it.
    share = statistics.share_interval(np.array(values), np.full(5, 2.0))
    assert share == pytest.approx((1.5, (3 - half) / 2, (3 + half) / 2))
    lost = statistics.share_interval(rng.normal(size=5), rng.normal(size=5))
    assert np.isinf(lost[1:]).all()


def test_pages(tmp_path):
    lines = page.table(["a", "b"], [[1, "x"]])
    assert lines == ["| a | b |", "|---|---|", "| 1 | x |"]
    with pytest.raises(ValueError, match="Received"):
        page.table(["a"], [[1, 2]])
    assert page.interval(1.556, 1.5, 1.6) == "1.56 (1.50 to 1.60)"
    assert page.interval(0.1, np.nan, np.nan, sign=True) == "+0.10"
    path = tmp_path / "page.md"
    page.write(path, ["# T", "", "## A", "", "old", "", "### B", "old"])
    page.replace_section(path, "## C", ["new"])
    page.replace_section(path, "## A", ["better"])
    assert path.read_text() == "# T\n\n## A\n\nbetter\n\n## C\n\nnew\n"
    assert "numpy" in page.environment(["numpy"])
