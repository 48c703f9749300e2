"""TokenMasking: how many, which, what stands there; numbered draws."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from kit import JAX, slow_on_jax, value
from scipy import stats

from blogkeras import TokenMasking, backend

if JAX:
    import jax

VOCABULARY, LENGTH, ROWS = 50, 24, 400
MASK, CLS, SEP = 4, 2, 3


def batch(rows=ROWS, seed=0):
    """`[CLS] … [SEP] … [SEP]` and padding, with words of 1 to 4 tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCABULARY, (rows, LENGTH)).astype("int32")
    ids[:, 0], ids[:, 10] = CLS, SEP
    for row, end in zip(ids, rng.integers(14, LENGTH + 1, rows), strict=True):
        row[end - 1], row[end:] = SEP, 0
    words = rng.integers(1, 5, (rows, LENGTH))
    words = [np.repeat(np.arange(LENGTH), w)[:LENGTH] for w in words]
    return ids, np.stack(words).astype("int32")


def run(masking, ids, words=None, training=True):
    inputs = [ids] if words is None else [ids, words]
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    inputs = inputs if words is not None else inputs[0]
    if not JAX:
        outputs = masking(inputs, training=training)
        return {k: value(v) for k, v in outputs.items()}
    # As one program: one operation after another takes longer to compile.
    call = functools.partial(masking.stateless_call, training=training)
    call = jax.jit(call)
    state = [v.value for v in masking.non_trainable_variables]
    outputs, state = call([], state, inputs)
    for variable, new in zip(
        masking.non_trainable_variables, state, strict=True
    ):
        variable.assign(new)
    return {k: value(v) for k, v in outputs.items()}


def hits(outputs, shape):
    """Where a position was chosen, and how often."""
    count = np.zeros(shape, int)
    rows, places = np.nonzero(outputs["mask_weights"])
    np.add.at(count, (rows, outputs["mask_positions"][rows, places]), 1)
    return count


def masking(rate=0.2, **options):
    return TokenMasking(VOCABULARY, MASK, [CLS, SEP], rate, seed=1, **options)


def test_counts_are_exact_and_positions_differ():
    ids, _ = batch()
    outputs = run(masking(), ids)
    count = hits(outputs, ids.shape)
    places = max(1, int(0.205 * LENGTH))
    assert outputs["mask_positions"].shape == (ROWS, places)
    expected = [
        max(1, min(places, round(0.2 * int(n)))) for n in (ids != 0).sum(1)
    ]
    np.testing.assert_array_equal(count.sum(1), expected)
    assert count.max() == 1
    assert not count[np.isin(ids, [0, CLS, SEP, MASK])].any()
    # What is not chosen stays, and the targets are what was there.
    np.testing.assert_array_equal(
        outputs["token_ids"][count == 0], ids[count == 0]
    )
    np.testing.assert_array_equal(
        outputs["mask_ids"],
        np.take_along_axis(ids, outputs["mask_positions"], 1),
    )


def test_positions_are_uniform():
    ids = np.full((2000, 12), 7, "int32")
    ids[:, 0], ids[:, 11] = CLS, SEP
    count = hits(run(masking(0.3), ids), ids.shape)[:, 1:11].sum(0)
    assert count.sum() == 2000 * 3  # int(0.305 * 12)
    # Without replacement the counts vary less than chi² says: 0.7 as much.
    assert stats.chisquare(count).pvalue > 1e-3


def test_what_stands_at_the_positions():
    ids = np.full((3000, 8), 9, "int32")
    layer = masking(0.5, mask_token_rate=0.6, random_token_rate=0.3)
    outputs = run(layer, ids)
    count = hits(outputs, ids.shape)
    shown = outputs["token_ids"][count == 1]
    number = len(shown)
    masked, same = (shown == MASK).sum(), (shown == 9).sum()
    assert stats.binomtest(int(masked), number, 0.6).pvalue > 1e-3
    others = VOCABULARY - 4  # without padding, [CLS], [SEP] and the mask
    kept = 0.1 + 0.3 / others
    assert stats.binomtest(int(same), number, kept).pvalue > 1e-3
    random = np.bincount(shown[(shown != MASK) & (shown != 9)], minlength=50)
    assert not random[[0, CLS, SEP, MASK]].any()
    drawn = random[[i for i in range(50) if i not in (0, 2, 3, 4, 9)]]
    assert stats.chisquare(drawn).pvalue > 1e-3


@pytest.mark.parametrize("unit", ["word", "ngram", "span"])
def test_groups_are_whole_and_fill_the_room(unit):
    ids, words = batch()
    layer = masking(0.3, unit=unit)
    outputs = run(layer, ids, words)
    count = hits(outputs, ids.shape)
    places = layer.positions_in(LENGTH)
    assert count.max() == 1
    assert not count[np.isin(ids, [0, CLS, SEP, MASK])].any()
    for row, number, hit in zip(ids, words, count, strict=True):
        allowed = ~np.isin(row, [0, CLS, SEP, MASK])
        limit = max(1, min(places, round(0.3 * int((row != 0).sum()))))
        groups, sizes = [], []
        for i in np.flatnonzero(allowed):
            new = not (i and allowed[i - 1] and number[i] == number[i - 1])
            groups.append(len(sizes) if new else len(sizes) - 1)
            sizes = [*sizes, 1] if new else [*sizes[:-1], sizes[-1] + 1]
        chosen = hit[allowed]
        part = np.bincount(groups, chosen)
        # All of a word or nothing of it.
        assert all(p in (0, s) for p, s in zip(part, sizes, strict=True))
        assert chosen.sum() <= (
            max(limit, max(sizes)) if unit == "word" else places
        )
        if unit == "word":
            # What was left out is larger than the room that is left.
            left = [s for p, s in zip(part, sizes, strict=True) if not p]
            assert min(left, default=99) > limit - chosen.sum()


@slow_on_jax
@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("ngram", np.array([6, 3, 2]) / 11),
        ("span", 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)),
    ],
)
def test_lengths_of_groups(unit, expected):
    layer = masking(unit=unit)
    shape = (300, 64)
    allowed = ops.ones(shape, "bool")
    starts = layer._cuts(
        allowed,
        allowed,
        ops.full((300, 1), 64, "int32"),
        layer.draws.next_step(),
    )
    lengths = np.concatenate(
        [np.diff(np.flatnonzero(row))[:6] for row in value(starts)]
    )
    count = np.bincount(lengths, minlength=len(expected) + 1)[1:]
    assert stats.chisquare(count, expected * count.sum()).pvalue > 1e-3


def test_a_word_too_large_for_the_rate_is_taken_where_places_hold_it():
    ids = np.full((50, 10), 9, "int32")
    ids[:, 6:] = 0
    words = np.repeat(np.arange(5), 2)[None].repeat(50, 0).astype("int32")
    layer = masking(0.15, unit="word", num_positions=2)
    assert (hits(run(layer, ids, words), ids.shape).sum(1) == 2).all()
    layer = masking(0.15, unit="word", num_positions=1)
    assert not hits(run(layer, ids, words), ids.shape).any()


def test_nothing_to_mask():
    ids = np.array([[CLS, SEP, 0, 0], [0, 0, 0, 0], [CLS, 9, SEP, 0]], "int32")
    for unit in ("token", "ngram"):
        outputs = run(masking(unit=unit, num_positions=2), ids)
        np.testing.assert_array_equal(outputs["mask_weights"].sum(1), [0, 0, 1])
        np.testing.assert_array_equal(outputs["token_ids"][:2], ids[:2])


def test_almost_every_token_of_a_long_sequence():
    layer = TokenMasking(50, 4, rate=0.999)
    outputs = layer(np.full((2, 256), 7))
    assert outputs["mask_positions"].shape == (2, 256)
    np.testing.assert_array_equal(value(outputs["mask_weights"]), 1.0)


@slow_on_jax
def test_draws_are_numbered_and_evaluation_repeats():
    ids, _ = batch(8)
    one, two = masking(), masking()
    first, second = run(one, ids), run(one, ids)
    assert (first["mask_positions"] != second["mask_positions"]).any()
    run(two, ids)
    np.testing.assert_array_equal(
        run(two, ids)["mask_positions"], second["mask_positions"]
    )
    still = run(one, ids, training=False)
    np.testing.assert_array_equal(
        run(one, ids, training=False)["mask_positions"],
        still["mask_positions"],
    )
    assert int(one.draws.iterations) == 2


@pytest.mark.parametrize("unit", ["token", "span"])
def test_compiled(unit):
    """With XLA TensorFlow draws other numbers: only the counts are equal."""
    ids, words = batch(8)
    layer = masking(unit=unit)
    inputs = [ids] if unit == "token" else [ids, words]
    inputs = [ops.convert_to_tensor(x) for x in inputs]
    program = backend.jit_layer(lambda *x: layer([*x]), layer)
    count = hits({k: value(v) for k, v in program(*inputs).items()}, ids.shape)
    assert count.max() == 1
    assert (count.sum(1) > 0).all()
    assert not count[np.isin(ids, [0, CLS, SEP, MASK])].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 1}, "vocabulary_size"),
        ({"mask_token": None}, "mask_token"),
        ({"mask_token": 50}, "mask_token"),
        ({"mask_token": 0}, "not the padding"),
        ({"special_tokens": [50]}, "special_tokens"),
        ({"special_tokens": 3}, "special_tokens"),
        ({"special_tokens": range(50)}, "not special"),
        ({"rate": 0.0}, "rate"),
        ({"rate": 1}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": "0.1"}, "rate"),
        ({"unit": "letter"}, "unit"),
        ({"max_length": 3}, "max_length"),
        ({"unit": "span", "max_length": 0}, "max_length"),
        ({"mask_token_rate": 1.1}, "mask_token_rate"),
        ({"mask_token_rate": 0.8, "random_token_rate": 0.3}, "sum to"),
        ({"num_positions": 0}, "num_positions"),
        ({"num_positions": 2.0}, "num_positions"),
        ({"pad_token": -1}, "pad_token"),
        ({"seed": "1"}, "seed"),
    ],
)
def test_bad_arguments(options, message):
    options = {"vocabulary_size": 50, "mask_token": 4, **options}
    with pytest.raises(ValueError, match=message):
        TokenMasking(**options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.zeros((2, 3)), "integers in `tokens`"),
        (np.full((2, 3), 50), "tokens"),
        (np.full((2, 3), -1), "tokens"),
        (np.zeros(3, "int32"), "batch, length"),
        ([np.zeros((2, 3), "int32"), np.zeros((2, 4), "int32")], "words"),
        ([np.zeros((2, 3), "int32"), np.zeros((1, 3), "int32")], "words"),
        ([np.zeros((2, 3), "int32")] * 3, "3 inputs"),
    ],
)
def test_bad_tokens(inputs, message):
    inputs = keras.tree.map_structure(ops.convert_to_tensor, inputs)
    with pytest.raises(ValueError, match=message):
        masking()(inputs)


def test_words_are_needed_for_whole_words():
    with pytest.raises(ValueError, match="words are needed"):
        masking(unit="word")(ops.ones((2, 3), "int32"))
