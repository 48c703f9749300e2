"""Changed pairs of segments: next sentence and sentence order."""

from keras import ops

from blogkeras import backend
from blogkeras.state import draw_rows


def change_pairs(task, ids, segments, words, pad_token, draw, seed):
    """Changes half of the pairs `[CLS] A [SEP] B [SEP]`, on the device.

    Args:
        task: `"sentence_order"`: B and A change places (ALBERT); or
            `"next_sentence"`: B becomes that of the next sequence of the batch
            (BERT).
        ids: `(batch, length)`, int32.
        segments: Likewise; 0 for the first segment, 1 for the second.
        words: Likewise, or `None`.
        pad_token: Integer.
        draw, seed: `draw(shape, seed=seed)` gives uniform numbers.

    Returns:
        `(ids, segments, words, labels, weights)`; labels `(batch,)` are 1 where
        the pair was changed, weights `(batch,)` 0 where there are not two
        segments.
    """
    real = ids != pad_token
    first = _count(real & (segments == 0))
    both = _count(real)
    draws = draw_rows(draw, [ops.shape(ids)[0]], seed)[:, None]
    change = _swapped if task == "sentence_order" else _replaced
    parts = [ids] if words is None else [ids, words]
    (new, *rest), border, end, possible = change(parts, first, both, pad_token)
    # A pair that looks the same after the change does not count as changed.
    changed = (draws < 0.5) & ops.any(new != ids, axis=1, keepdims=True)
    changed = changed & possible
    place = _places(ids)
    behind = ops.cast((place >= border) & (place < end), "int32")
    ids = ops.where(changed, new, ids)
    segments = ops.where(changed, behind, segments)
    if words is not None:
        words = ops.where(changed, rest[0], words)
    labels, weights = (
        ops.cast(x[:, 0], "float32") for x in (changed, possible)
    )
    return ids, segments, words, labels, weights


def _swapped(parts, first, both, pad_token):
    """`[CLS] B [SEP] A [SEP]`: the tokens after `[CLS]` are rotated."""
    place, second = _places(parts[0]), both - first
    source = ops.where(place < 1 + second, place + first - 1, place - second)
    source = ops.where((place < 1) | (place >= both), place, source)
    new = [ops.take_along_axis(part, source, axis=1) for part in parts]
    return new, 1 + second, both, (first > 1) & (second > 0)


def _replaced(parts, first, both, pad_token):
    """`[CLS] A [SEP] B' [SEP]`, with B' of the next sequence."""
    length = parts[0].shape[1]
    others = [_next_rows(x) for x in [*parts, first, both]]
    *others, other_first, other_both = others
    place = _places(parts[0])
    source = ops.clip(place - first + other_first, 0, length - 1)
    end = first + other_both - other_first
    # Where B' is too long its end is cut off, and the last place is its [SEP].
    last = (place == length - 1) & (end > length)
    source = ops.where(last, ops.maximum(other_both - 1, 0), source)
    new = []
    for part, other in zip(parts, others, strict=True):
        taken = ops.take_along_axis(other, source, axis=1)
        padded = ops.where(place < end, taken, pad_token)
        new.append(ops.where(place < first, part, padded))
    possible = (first > 0) & (both > first) & (other_both > other_first)
    return new, first, end, possible


def _next_rows(x):
    """The row after each one, in the batch of all replicas.

    The replicas may have different numbers of rows, as in the last batch.
    """
    everything = backend.all_gather(x)
    rows = ops.shape(x)[0]
    sizes = backend.all_gather(ops.reshape(ops.cast(rows, "int32"), [1]))
    earlier = ops.arange(ops.shape(sizes)[0]) < backend.replica()
    start = ops.sum(ops.where(earlier, sizes, 0))
    next_row = start + ops.arange(rows) + 1
    return ops.take(everything, next_row % ops.shape(everything)[0], axis=0)


def _count(mask):
    return ops.sum(ops.cast(mask, "int32"), axis=1, keepdims=True)


def _places(ids):
    return ops.arange(ids.shape[1], dtype="int32")[None]
