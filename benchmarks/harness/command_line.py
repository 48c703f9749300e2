"""The options that benchmarks and recordings share."""

import argparse
import pathlib


def _parser(doc):
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def benchmark(doc, contenders, page, rounds=10, **sizes):
    """Options of a benchmark: `--only`, `--rounds`, `--page` and the sizes.

    Args:
        doc: The benchmark's description, `__doc__`.
        contenders: Their names.
        page: Path of the page that it writes.
        rounds: Integer. Counted rounds.
        **sizes: Integers; each is an option of that name with that default.

    Returns:
        A parser, for further options. `--worker` is given by `contest`.
    """
    parser = _parser(doc)
    add = parser.add_argument
    add("--worker", choices=contenders, help=argparse.SUPPRESS)
    add(
        "--only",
        nargs="*",
        choices=contenders,
        default=[*contenders],
        metavar="CONTENDER",
    )
    add("--rounds", type=int, default=rounds)
    add("--page", "--table", type=pathlib.Path, default=page)
    for name, default in sizes.items():
        add(f"--{name}", type=int, default=default)
    return parser


def recording(doc, rows, only=None, seeds=3):
    """Options of a recording: how much of it, and `--report`.

    Args:
        doc: The recording's description, `__doc__`.
        rows: Path of the CSV file, the default of `--rows`. The page stands
            beside it.
        only: Names that `--only` takes; any where it is None.
        seeds: Integer, the default of `--seeds`; no such option if None.

    Returns:
        A parser, for further options.
    """
    parser = _parser(doc)
    add = parser.add_argument
    add("--rows", type=pathlib.Path, default=rows)
    add("--only", nargs="*", choices=only, metavar="NAME")
    if seeds is not None:
        add("--seeds", type=int, default=seeds)
    add("--runs", type=int, help="do so many at most")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no run after these",
    )
    add("--report", "--table", action="store_true", help="write the page")
    return parser
