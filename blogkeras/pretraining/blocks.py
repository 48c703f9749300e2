"""Lines of text as blocks of tokens, all of one shape."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np

from blogkeras import backend
from blogkeras.arguments import (
    as_numpy,
    check_boolean,
    check_integer,
    check_verbose,
)

_LARGEST = 2**31 - 1  # tokens are of int32


def token_blocks(
    lines: Iterable[str],
    tokenize: Callable[[str], Sequence[int]],
    length: int,
    pairs: Any = False,
    words: Any = None,
    *,
    batch_size: int = 32,
    start_token: int | None = None,
    end_token: int | None = None,
    pad_token: int = 0,
    join: bool = True,
    seed: Any = 0,
    position: int = 0,
    verbose: str | int = 0,
) -> Any:
    """Lines of text → a `tf.data.Dataset` of batches, all of one shape.

    A block is `[start] line [end] line [end] …`, cut off where it is full. The
    rest of the line begins the next block, so only the last block is padded.
    With `pairs` a block is `[start] A [end] B [end]`, where B follows A. The
    lines of a document (blank lines separate documents) are collected until a
    block is full, and divided between two lines at random. A line that fills a
    block by itself is divided in its middle. What does not fit begins the next
    block.

    The data set is endless. Each pass has all blocks once, in a new order. The
    order depends on `seed` and the number of the batch alone, and `model.steps`
    counts and saves how many batches a model has seen. So training goes on
    where it stopped:

    ```python
    model = keras.saving.load_model("checkpoint.keras")
    blocks = token_blocks(lines, encode, 64, position=model.steps)
    model.fit(blocks, steps_per_epoch=1000)
    ```

    The tokens of all lines are held in memory, 4 bytes each.

    Args:
        lines: Iterable of strings.
        tokenize: Function from a string to a list of integers, without start
            and end.
        length: Integer. Tokens in a block.
        pairs: Boolean. Whether blocks are pairs of segments.
        words: Function from a line to a list of words, such as `jieba.lcut`.
            Then each word is tokenized by itself, and `"word_ids"` give the
            number of each token's word, for `TokenMasking(unit="word")`.
        batch_size: Integer.
        start_token: Integer, or `None` for none.
        end_token: Integer, or `None` for none. Both are needed for `pairs`.
        pad_token: Integer. Padding is known by its value alone, so no other
            token may be the same.
        join: Boolean. If `False`, each line has a block of its own, or several
            if it is too long, and the rest of a block is padding. Not with
            `pairs`, which are of several lines.
        seed: Integer.
        position: Integer. How many batches to skip, without computing them.
        verbose: `"auto"`, 0, 1 or 2: a progress bar over the lines.

    Returns:
        An endless `tf.data.Dataset` (TensorFlow must be installed, on the JAX
        backend too) of int32 tensors `(batch_size, length)`: tokens, or with
        `pairs` or `words` a dict of `"token_ids"` and `"segment_ids"`,
        `"word_ids"`. `fit` needs `steps_per_epoch`.

    Raises:
        ValueError: if `lines` are not strings or make no block, `tokenize`
            gives anything but a list of integers, pairs lack their special
            tokens or are not joined, or the start, the end or a token of a line
            is `pad_token`.

    Example:

    >>> blocks = token_blocks(
    ...     ["abc", "de"], lambda line: [ord(c) - 90 for c in line], length=4,
    ...     batch_size=1, start_token=1, end_token=2,
    ... )
    >>> next(iter(blocks)).shape
    TensorShape([1, 4])

    Reference:
        [Devlin et al., 2018](https://arxiv.org/abs/1810.04805), pairs;
        [blog post 7846](https://kexue.fm/archives/7846)
    """
    if not isinstance(lines, Iterable):
        raise ValueError(
            "Expected `lines` to be an iterable of strings. Received: "
            f"lines={lines!r}"
        )
    if isinstance(lines, str):
        raise ValueError(
            "Expected `lines` to be an iterable of strings. Received: one "
            f"string, {lines[:40]!r}"
        )
    for name, function in (("tokenize", tokenize), ("words", words)):
        if not callable(function) and not (name == "words" and words is None):
            raise ValueError(
                f"Expected `{name}` to be a function of a string. Received: "
                f"{name}={function!r}"
            )
    check_boolean("pairs", pairs)
    check_boolean("join", join)
    start, end = (
        [] if token is None else [check_integer(name, token, 0, _LARGEST)]
        for name, token in (
            ("start_token", start_token),
            ("end_token", end_token),
        )
    )
    if pairs and not (start and end):
        raise ValueError(
            "Expected `start_token` and `end_token` for pairs. Received: "
            f"start_token={start_token}, end_token={end_token}"
        )
    if pairs and not join:
        raise ValueError(
            "Expected join=True for pairs, which are of several lines. "
            f"Received: pairs={pairs}, join={join}"
        )
    length = check_integer("length", length, minimum=5 if pairs else 3)
    batch_size = check_integer("batch_size", batch_size, minimum=1)
    pad_token = check_integer("pad_token", pad_token, 0, _LARGEST)
    if pad_token in (*start, *end):
        raise ValueError(
            "Expected `pad_token` to be neither `start_token` nor `end_token`, "
            "since padding is known by its value alone. Received: "
            f"pad_token={pad_token}, start_token={start_token}, "
            f"end_token={end_token}"
        )
    seed = check_integer("seed", seed, minimum=0)
    position = check_integer("position", position, minimum=0)
    verbose = check_verbose(verbose)
    texts = _tokenized(lines, tokenize, words, pad_token, verbose)
    if pairs:
        rows = _pairs(texts, length, start, end, np.random.default_rng(seed))
    elif join:
        rows = _joined(texts, length, start, end)
    else:
        rows = _lines(texts, length, start, end)
    arrays = _arrays(rows, length, pad_token)
    if not pairs:
        del arrays["segment_ids"]
    if words is None:
        del arrays["word_ids"]
    order = _Order(len(arrays["token_ids"]), batch_size, seed)

    def batch(number):
        chosen = order.rows(number)
        found = {name: array[chosen] for name, array in arrays.items()}
        return found if len(found) > 1 else found["token_ids"]

    return backend.endless_dataset(batch, position)


class _Order:
    """All rows, pass after pass, in a new order each time."""

    def __init__(self, rows, batch_size, seed):
        if not rows:
            raise ValueError(
                "Expected lines that make at least one block. Received: none"
            )
        self.size, self.batch_size, self.seed = rows, batch_size, seed
        self._passes = {}

    def rows(self, number):
        """The rows of a batch."""
        first = number * self.batch_size
        places = np.arange(first, first + self.batch_size)
        return np.array([self._row(*divmod(p, self.size)) for p in places])

    def _row(self, turn, place):
        if turn not in self._passes:
            # A batch that is not larger than a pass has rows of two passes at
            # most, so older orders are not needed any more.
            while len(self._passes) > 2:
                del self._passes[min(self._passes)]
            rng = np.random.default_rng([self.seed, int(turn)])
            self._passes[turn] = rng.permutation(self.size)
        return self._passes[turn][place]


def _tokenized(lines, tokenize, words, pad_token, verbose):
    """A list of arrays `(2, n)` of each line: tokens and word numbers."""
    lines = list(lines)
    bar = keras.utils.Progbar(len(lines), verbose=verbose) if verbose else None
    texts = []
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, str):
            raise ValueError(
                f"Expected `lines` to be strings. Received: {line!r} in line "
                f"{number}"
            )
        parts = [] if not line.strip() else [line]
        if parts and words is not None:
            parts = _words(words, line)
        tokens = [_tokens(tokenize, part) for part in parts]
        for part, given in zip(parts, tokens, strict=True):
            if pad_token in given:
                raise ValueError(
                    "Expected `tokenize` to give no `pad_token`, since padding "
                    "is known by its value alone. Received: "
                    f"pad_token={pad_token} of {part!r} in line {number}"
                )
        numbers = np.repeat(np.arange(len(tokens)), [len(t) for t in tokens])
        flat = np.concatenate([*tokens, []])
        texts.append(np.stack([flat, numbers]).astype("int32"))
        if bar is not None and (number % 256 == 0 or number == len(lines)):
            bar.update(number)
    return texts


def _words(words, line):
    """The words of a line, a list of strings."""
    given = words(line)
    parts = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(
            "Expected `words` to give a list of strings. "
            f"Received: {given!r} for {line!r}"
        )
    return parts


def _tokens(tokenize, text):
    """The tokens of a text, an array of integers."""
    given = tokenize(text)
    try:
        tokens = as_numpy(given)
    except (TypeError, ValueError):  # lists of different lengths
        tokens = np.array(None)
    if tokens.ndim != 1 or (
        tokens.size
        and (
            tokens.dtype.kind not in "iu"
            or tokens.min() < 0
            or tokens.max() > _LARGEST
        )
    ):
        raise ValueError(
            "Expected `tokenize` to give a list of integers, at least 0, such "
            "as `lambda text: tokenizer.encode(text)[0]` in bert4keras or "
            "`lambda text: tokenizer.encode(text).ids` in tokenizers. "
            f"Received: {given!r} for {text!r}"
        )
    return tokens


def _row(*parts):
    """One row of a block, `(3, n)`: tokens, words, segments.

    Each part is a list of tokens or an array `(2, n)`, with its segment. The
    words of all parts are numbered consecutively; each token of a list is a
    word of its own.
    """
    columns, word = [], 0
    for part, segment in parts:
        if isinstance(part, list):
            part = np.array([part, range(len(part))], "int32").reshape(2, -1)
        if not part.shape[1]:
            continue
        tokens, words = part
        words = words - words[0] + word
        word = words[-1] + 1
        columns.append(np.stack([tokens, words, np.full_like(tokens, segment)]))
    return np.concatenate(columns, axis=1)


def _joined(texts, length, start, end):
    """Lines one after another, cut into blocks."""
    stream, count = [], 0
    for text in texts:
        if text.shape[1]:
            line = _row((text, 0), (end, 0))[:2].copy()
            line[1] += count
            count = line[1, -1] + 1
            stream.append(line)
    if not stream:
        return []
    stream = np.concatenate(stream, axis=1)
    step = length - len(start)
    return [
        _row((start, 0), (stream[:, i : i + step], 0))
        for i in range(0, stream.shape[1], step)
    ]


def _lines(texts, length, start, end):
    """Each line by itself."""
    step = length - len(start) - len(end)
    return [
        _row((start, 0), (text[:, i : i + step], 0), (end, 0))
        for text in texts
        for i in range(0, text.shape[1], step)
    ]


def _pairs(texts, length, start, end, rng):
    """Two segments that follow each other."""
    room = length - len(start) - 2 * len(end)
    rows, lines = [], []

    def add_row():
        """A row of the first tokens of the lines; the rest of them waits."""
        lengths = [text.shape[1] for text in lines]
        joined = []
        for text in lines:
            text = text.copy()
            text[1] += joined[-1][1, -1] + 1 if joined else 0
            joined.append(text)
        joined = np.concatenate(joined, axis=1)
        text, rest = joined[:, :room], joined[:, room:]
        if len(lines) > 1:
            border = sum(lengths[: rng.integers(1, len(lines))])
        else:
            border = text.shape[1] // 2
            # Not within a word, if there is a border of words.
            places = 1 + np.flatnonzero(np.diff(text[1]))
            if len(places):
                border = places[np.abs(places - border).argmin()]
        a, b = text[:, :border], text[:, border:]
        if a.shape[1] and b.shape[1]:
            rows.append(_row((start, 0), (a, 0), (end, 0), (b, 1), (end, 1)))
        lines[:] = [rest] if rest.shape[1] else []

    for text in texts:
        if text.shape[1]:
            lines.append(text)
        while sum(line.shape[1] for line in lines) >= room:
            add_row()
        if lines and not text.shape[1]:
            add_row()
    if lines:
        add_row()
    return rows


def _arrays(rows, length, pad_token):
    """`{name: (rows, length)}`, padded."""
    arrays = {
        "token_ids": np.full((len(rows), length), pad_token, "int32"),
        "word_ids": np.full((len(rows), length), -1, "int32"),
        "segment_ids": np.zeros((len(rows), length), "int32"),
    }
    for i, row in enumerate(rows):
        for array, values in zip(arrays.values(), row, strict=True):
            array[i, : row.shape[1]] = values
    return arrays
