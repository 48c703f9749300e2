"""The benchmarks' harness: rows, intervals, pages."""

import argparse
import pathlib
import sys

import numpy as np
import pytest
from kit import JAX

BENCHMARKS = pathlib.Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from harness import command_line, contest, page, recording, statistics  # noqa: E402

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


def test_what_is_left_to_record(tmp_path, capsys):
    columns = ["name", "seed", "value"]
    rows = recording.Recording(tmp_path / "x.csv", columns, columns[:2])
    runs = [("a", 0), ("a", 1), ("b", 0)]
    rows.append("a", 0, 1)
    options = argparse.Namespace(runs=1, minutes=float("inf"))
    seen = []
    for name, seed in rows.todo(runs, options):
        seen.append((name, seed))
        rows.append(name, seed, 2)
    assert seen == [("a", 1)]
    options = argparse.Namespace(runs=None, minutes=0.0)
    assert list(rows.todo(runs, options)) == []
    options.minutes = float("inf")
    runs.append(("b", 1))
    for _ in rows.todo(runs, options):
        # One run may record the next one, too.
        rows.extend([("b", seed, 3) for seed in (0, 1)])
    assert len(rows.rows()) == 4
    assert "recorded" in capsys.readouterr().out
    groups = recording.group(rows.rows(), "name")
    assert [len(group) for group in groups.values()] == [2, 2]
    assert list(recording.group(rows.rows(), "name", "value")) == [
        ("a", "1"),
        ("a", "2"),
        ("b", "3"),
    ]


def test_measurements_replace_older_ones(tmp_path):
    path = tmp_path / "folder/x.csv"
    state = recording.Measurements(path)
    assert state.of("seconds") == {}
    state.save("seconds", "a", [0.5, 1.0])
    state.save("environment", "line", "of; one ÷ thing")
    state.save("seconds", "a", [0.25])
    assert recording.Measurements(path).of("seconds") == {"a": [0.25]}
    assert state.of("environment") == {"line": "of; one ÷ thing"}
    assert path.read_text("utf-8").count("\n") == 2


SCRIPT = """
import json, sys
sys.path.insert(0, {path!r})
from harness import command_line, contest
parser = command_line.benchmark("doc", ["a", "b"], "x.md", size=1)
options = parser.parse_args()
if options.worker is None:
    print(json.dumps([options.rounds, options.size]))
else:
    def prepare():
        print("a line of the contender's own")
        size = options.size if options.worker == "a" else 1
        return (lambda: sum(range(10_000 * size))), {{"size": size}}
    contest.serve(prepare)
"""


def test_a_contest_of_two_processes(tmp_path, monkeypatch):
    """A step of a hundred times the work takes longer, in each round."""
    script = tmp_path / "bench_x.py"
    script.write_text(SCRIPT.format(path=str(BENCHMARKS)), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bench_x.py", "--size", "100"])
    facts = {}
    seconds = contest.compete(
        str(script), ["a", "b"], rounds=5, warm_up=1, facts=facts
    )
    assert facts == {"a": {"size": 100}, "b": {"size": 1}}
    assert seconds["a"].shape == seconds["b"].shape == (5,)
    assert np.median(seconds["a"] / seconds["b"]) > 10
    assert contest.ask(str(script), "--size=7") == [10, 7]
    script.write_text("", encoding="utf-8")
    with pytest.raises(RuntimeError, match="'a' ended early"):
        contest.compete(str(script), ["a"])


def test_options_of_a_recording(tmp_path):
    parser = command_line.recording("doc", tmp_path / "x.csv", ["a"], seeds=2)
    options = parser.parse_args(["--only", "a", "--runs", "3", "--table"])
    assert options.report
    assert (options.only, options.runs, options.seeds) == (["a"], 3, 2)
    assert options.rows == tmp_path / "x.csv"
    with pytest.raises(SystemExit):
        parser.parse_args(["--only", "b"])


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
    assert page.interval_cells(1.5, np.nan, np.nan) == ("1.50", "")
    assert page.interval_cells(0.1, -1.0, 2.0, 1, sign=True) == (
        "+0.1",
        "-1.0 to +2.0",
    )
    assert page.deviation(["1.0", "3.0"], 1) == "2.0 ± 1.4"
    assert page.deviation([2], 2) == "2.00"
    seconds = {"a": np.full(9, 0.2), "b": np.full(9, 0.1)}
    assert page.times(seconds, {"a": "A", "b": "B"}, 2)[2:] == [
        "| A | 0.100 | 0.100 |",
        "| B | 0.050 | 0.050 |",
    ]
    rows = [("a / b", "a", "b", ">= 2"), ("not measured", "c", "b", "")]
    assert page.ratios(seconds, rows)[2:] == [
        "| a / b | 2.00 | 2.00 to 2.00 | >= 2 |"
    ]
    assert page.ratios(seconds, [("a / b", "a", "b")], None)[2:] == [
        "| a / b | 2.00 | 2.00 to 2.00 |"
    ]
    path = tmp_path / "page.md"
    page.update(path, ["# T"], {"A": ["old", "", "### B", "old"], "C": ["c"]})
    page.update(path, ["# T", "", "head"], {"A": ["better"], "D": ["d"]})
    assert path.read_text() == (
        "# T\n\nhead\n\n## A\n\nbetter\n\n## C\n\nc\n\n## D\n\nd\n"
    )
    assert "numpy" in page.environment(["numpy"])
    assert page.versions(sys.executable, ["numpy"]).startswith("numpy ")
