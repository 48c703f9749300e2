"""Masking of tokens, on the device and anew in each step."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.arguments import (
    check_choice,
    check_integer,
    check_integers,
    check_number,
    shapes_agree,
)
from blogkeras.ops import sample_categorical
from blogkeras.state import NumberedDraws, draw_rows

# Probabilities of the lengths 1, 2, …: of n-grams as in ALBERT, of spans as in
# SpanBERT (a geometric distribution, cut off and rescaled).
LENGTHS = {
    "ngram": lambda n: 1 / n,
    "span": lambda n: 0.2 * 0.8 ** (n - 1),
}
LONGEST = {"ngram": 3, "span": 10}


@keras.saving.register_keras_serializable(package="blogkeras")
class TokenMasking(keras.layers.Layer):
    """Masks some tokens of each sequence, for a model to predict.

    In a sequence of n tokens, padding not counted,

        max(1, round(rate · n)), at most K = `num_positions`

    different positions are chosen, all equally probable. Each becomes the mask
    token with probability `mask_token_rate`, a random token with
    `random_token_rate`, and else stays. Padding, the mask token and
    `special_tokens` are never chosen. Where a sequence has fewer tokens to
    choose from, or none, the rest of its K places has weight 0.

    With `unit="word"`, `"ngram"` or `"span"` the positions are chosen in groups
    of neighbours. The sequence is cut into groups, at random for the last two.
    The groups are then taken in random order, each one if it still fits, so a
    few positions less may be chosen. The first group is taken even if it is
    larger than the number above, as long as K places hold it. An n-gram has one
    to three tokens, with probabilities in the ratio 1 : 1/2 : 1/3 (ALBERT). A
    span has one to ten, with a geometric distribution of p = 0.2 (SpanBERT).
    Given word numbers as a second input, these are n-grams and spans of whole
    words.

    In training each call draws anew. The draws are numbered by a saved count,
    so a resumed training makes the same draws as one that was not interrupted.
    Otherwise the draws depend on the batch alone, so evaluating twice gives the
    same result.

    Args:
        vocabulary_size: Integer. Tokens are from 0 to `vocabulary_size - 1`.
        mask_token: Integer. The token that is shown instead of others.
        special_tokens: Integers: `[CLS]`, `[SEP]` and the like.
        rate: Float between 0 and 1. The share of tokens to choose.
        unit: `"token"`, `"word"`, `"ngram"` or `"span"`.
        max_length: Integer. The longest n-gram or span. Defaults to 3 and 10.
        mask_token_rate: Float from 0 to 1.
        random_token_rate: Float from 0 to 1. Random tokens are never special
            ones.
        num_positions: Integer K. Defaults to `max(1, int((rate + 0.005) *
            length))`, as in ELECTRA.
        pad_token: Integer.
        seed: Integer or `None`.

    Call arguments:
        inputs: Tokens `(batch, length)`, integers, with a known length; or
            `[tokens, words]`, where neighbours with the same number in `words`,
            `(batch, length)`, are of one word (not with `unit="token"`).
        training: Boolean.

    Returns:
        Dict, with the names of KerasHub's `MaskedLMMaskGenerator`:

        - `"token_ids"`: `(batch, length)`, int32, after masking;
        - `"mask_positions"`: `(batch, K)`, int32;
        - `"mask_ids"`: `(batch, K)`, int32, the original tokens there;
        - `"mask_weights"`: `(batch, K)`, float32: 1, or 0 for unused places.

    Raises:
        ValueError: on rates outside of [0, 1], on a mask token that is the
            padding, if all tokens are special, and on `max_length` where units
            have none; and in a call, on tokens outside of the vocabulary.

    Example:

    >>> masking = TokenMasking(100, mask_token=4, special_tokens=[2, 3])
    >>> tokens = [[2, 17, 35, 60, 21, 11, 58, 3, 0, 0]]
    >>> masked = masking(keras.ops.array(tokens), training=True)
    >>> float(masked["mask_weights"][0, 0])  # 15 % of eight tokens: one
    1.0

    Reference:
        [Devlin et al., 2018](https://arxiv.org/abs/1810.04805);
        [Lan et al., 2019](https://arxiv.org/abs/1909.11942), n-grams;
        [Joshi et al., 2019](https://arxiv.org/abs/1907.10529), spans;
        [blog post 7846](https://kexue.fm/archives/7846)
    """

    def __init__(
        self,
        vocabulary_size: int,
        mask_token: int,
        special_tokens: Sequence[int] = (),
        rate: float = 0.15,
        *,
        unit: str = "token",
        max_length: int | None = None,
        mask_token_rate: float = 0.8,
        random_token_rate: float = 0.1,
        num_positions: int | None = None,
        pad_token: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        size = check_integer("vocabulary_size", vocabulary_size, minimum=2)
        self.vocabulary_size = size
        self.mask_token = check_integer("mask_token", mask_token, 0, size - 1)
        self.special_tokens = check_tokens(
            "special_tokens", special_tokens, size
        )
        self.rate = check_number("rate", rate, above=0, below=1)
        self.unit = check_choice("unit", unit, ("token", "word", *LENGTHS))
        if max_length is not None:
            max_length = check_integer("max_length", max_length, minimum=1)
            if unit not in LENGTHS:
                raise ValueError(
                    "Expected `max_length` with unit='ngram' or 'span' only. "
                    f"Received: max_length={max_length}, unit={unit!r}"
                )
        self.max_length = max_length
        self.mask_token_rate = check_number(
            "mask_token_rate", mask_token_rate, 0, 1
        )
        self.random_token_rate = check_number(
            "random_token_rate", random_token_rate, 0, 1
        )
        # Rounding may take the sum a little above 1.
        if self.mask_token_rate + self.random_token_rate > 1 + 1e-9:
            raise ValueError(
                "Expected `mask_token_rate` and `random_token_rate` to sum to "
                f"at most 1. Received: mask_token_rate={mask_token_rate}, "
                f"random_token_rate={random_token_rate}"
            )
        if num_positions is not None:
            num_positions = check_integer("num_positions", num_positions, 1)
        self.num_positions = num_positions
        self.pad_token = check_integer("pad_token", pad_token, 0, size - 1)
        if self.pad_token == self.mask_token:
            raise ValueError(
                "Expected a mask token that is not the padding. Received: "
                f"mask_token={mask_token}, pad_token={pad_token}"
            )
        self.seed = None if seed is None else check_integer("seed", seed)
        never = {self.mask_token, self.pad_token, *self.special_tokens}
        self.never = np.array(sorted(never), "int32")
        self._ordinary = np.setdiff1d(np.arange(size), self.never)
        if not len(self._ordinary):
            raise ValueError(
                "Expected tokens that are not special. Received: "
                f"special_tokens={special_tokens} of {size} tokens"
            )
        self.draws = NumberedDraws(self, seed)
        self.built = True

    def build(self, input_shape=None):
        pass  # there are no weights that depend on the shape

    def positions_in(self, length):
        """K, the number of places for chosen positions.

        Args:
            length: Integer. The length of the sequences.
        """
        if self.num_positions is not None:
            return min(self.num_positions, length)
        return min(length, max(1, int((self.rate + 0.005) * length)))

    def call(self, inputs, training=None):
        ids, words = self._split(inputs)
        seed = (
            self.draws.next_step() if training else self.draws.evaluation(ids)
        )
        positions, weights = self._choose(ids, words, seed)
        targets = ops.take_along_axis(ids, positions, axis=1)
        hidden = self._hide(targets, seed)
        return {
            "token_ids": put(ids, positions, hidden, weights),
            "mask_positions": positions,
            "mask_ids": targets,
            "mask_weights": weights,
        }

    def _split(self, inputs):
        parts = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        ids, words = parts[0], (parts[1] if len(parts) == 2 else None)
        if not 1 <= len(parts) <= 2 or (self.unit == "word" and words is None):
            raise ValueError(
                "Expected tokens, or [tokens, words]; words are needed for "
                f"unit='word'. Received: {len(parts)} inputs, "
                f"unit={self.unit!r}"
            )
        if len(ids.shape) != 2 or ids.shape[1] is None:
            raise ValueError(
                "Expected tokens of shape (batch, length) with a length that "
                "is known, so that the number of masked positions is. "
                f"Received: tokens.shape={tuple(ids.shape)}"
            )
        if words is not None:
            self.check_takes_words()
        if words is not None and not shapes_agree(words.shape, ids.shape):
            raise ValueError(
                "Expected words of the shape of the tokens. Received: "
                f"tokens.shape={tuple(ids.shape)}, "
                f"words.shape={tuple(words.shape)}"
            )
        check_integers("tokens", ids, 0, self.vocabulary_size - 1)
        return ops.cast(ids, "int32"), words

    def check_takes_words(self):
        """Raises a `ValueError` where numbers of words would be ignored."""
        if self.unit == "token":
            raise ValueError(
                "Expected a `TokenMasking` with unit='word', 'ngram' or 'span' "
                "where numbers of words are given, since single tokens may be "
                "parts of words. Received: unit='token'"
            )

    def _choose(self, ids, words, seed):
        """Positions and weights, `(batch, K)`."""
        shape, length = ops.shape(ids), ids.shape[1]
        places = self.positions_in(length)
        allowed = ops.all(ids[..., None] != self.never, axis=-1)
        tokens = ops.sum(
            ops.cast(ids != self.pad_token, "float32"), axis=1, keepdims=True
        )
        limit = ops.cast(ops.round(self.rate * tokens), "int32")
        limit = ops.clip(limit, 1, places)  # (batch, 1)
        chosen = allowed
        if self.unit != "token":
            chosen, limit = self._choose_units(allowed, words, limit, seed)
        key = draw_rows(backend.uniform, shape, seed)
        # The places of the largest keys are different ones by construction.
        key, positions = ops.top_k(ops.where(chosen, key, -1.0), places)
        weights = (key >= 0) & (ops.arange(places, dtype="int32") < limit)
        return ops.cast(positions, "int32"), ops.cast(weights, "float32")

    def _choose_units(self, allowed, words, limit, seed):
        """Which positions are in the chosen groups, `(batch, length)`."""
        shape, length = ops.shape(allowed), allowed.shape[1]
        starts = _starts(allowed, words)
        if self.unit in LENGTHS:
            starts = starts & self._cuts(starts, allowed, limit, seed)
        unit = _number(starts)
        # (batch, length): the size of each group, 0 for numbers not in use
        size = ops.sum(
            ops.cast(
                (unit[:, None, :] == ops.arange(length, dtype="int32")[:, None])
                & allowed[:, None, :],
                "int32",
            ),
            axis=-1,
        )
        key = draw_rows(backend.uniform, shape, seed)
        order = ops.argsort(ops.where(size > 0, key, 2.0), axis=1)
        size = ops.take_along_axis(size, order, axis=1)
        places = self.positions_in(length)
        first = size[:, :1]
        limit = ops.where(first <= places, ops.maximum(limit, first), limit)
        taken = _fitting(size, limit)
        taken = ops.take_along_axis(taken, ops.argsort(order, axis=1), axis=1)
        return allowed & ops.take_along_axis(taken, unit, axis=1), limit

    def _cuts(self, starts, allowed, limit, seed):
        """Where n-grams or spans begin, among the words: boolean."""
        shape = ops.shape(starts)
        longest = self.max_length or LONGEST[self.unit]
        weight = [LENGTHS[self.unit](n) for n in range(1, longest + 1)]
        lengths = 1 + sample_categorical(
            ops.convert_to_tensor(np.log(weight), "float32"),
            draw_rows(backend.uniform, shape, seed),
        )
        # A group longer than the number of tokens to choose would never fit.
        ends = ops.cumsum(ops.minimum(lengths, limit), axis=1)
        # The number of a word's group is the number of groups that end before
        # the word.
        group = ops.sum(
            ops.cast(ends[:, None, :] <= _number(starts)[..., None], "int32"),
            axis=-1,
        )
        return _starts(allowed, group)

    def _hide(self, targets, seed):
        """The tokens that are shown at the chosen positions, `(batch, K)`."""
        shape = ops.shape(targets)
        u = draw_rows(backend.uniform, shape, seed)
        hidden = ops.where(u < self.mask_token_rate, self.mask_token, targets)
        if self.random_token_rate:
            index = draw_rows(
                lambda shape, seed: backend.randint(
                    shape, 0, len(self._ordinary), seed=seed
                ),
                shape,
                seed,
            )
            table = ops.convert_to_tensor(self._ordinary, "int32")
            mixed = self.mask_token_rate + self.random_token_rate
            hidden = ops.where(
                (u >= self.mask_token_rate) & (u < mixed),
                ops.take(table, index),
                hidden,
            )
        return ops.cast(hidden, "int32")

    def compute_mask(self, inputs, previous_mask=None):
        return None

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "mask_token": self.mask_token,
            "special_tokens": list(self.special_tokens),
            "rate": self.rate,
            "unit": self.unit,
            "max_length": self.max_length,
            "mask_token_rate": self.mask_token_rate,
            "random_token_rate": self.random_token_rate,
            "num_positions": self.num_positions,
            "pad_token": self.pad_token,
            "seed": self.seed,
        }


def check_tokens(name, tokens, vocabulary_size):
    """A tuple of integers from 0 to `vocabulary_size - 1`."""
    if np.ndim(tokens) != 1:
        raise ValueError(
            f"Expected `{name}` to be a list of integers. "
            f"Received: {name}={tokens!r}"
        )
    return tuple(
        check_integer(name, token, 0, vocabulary_size - 1) for token in tokens
    )


def put(ids, positions, values, weights):
    """Writes values to positions, where the weight is not zero.

    Args:
        ids: `(batch, length)`, int32.
        positions: `(batch, K)`, int32, different ones in each row.
        values: `(batch, K)`, int32.
        weights: `(batch, K)`.

    Returns:
        Like `ids`.
    """
    places = ops.arange(ids.shape[1], dtype="int32")
    here = (positions[..., None] == places) & (weights[..., None] > 0)
    written = ops.sum(ops.where(here, values[..., None], 0), axis=1)
    return ops.where(ops.any(here, axis=1), written, ids)


def _starts(allowed, numbers):
    """Where a group begins: at new numbers and beside forbidden positions."""
    after = ~(allowed[:, 1:] & allowed[:, :-1])
    if numbers is None:
        after = ops.ones_like(after)
    else:
        after = after | (numbers[:, 1:] != numbers[:, :-1])
    return ops.concatenate([ops.ones_like(allowed[:, :1]), after], axis=1)


def _number(starts):
    """The number of the group that each position is in, from 0 on."""
    return ops.cumsum(ops.cast(starts, "int32"), axis=1) - 1


def _fitting(size, limit):
    """Goes through groups in order and takes each one that still fits.

    Args:
        size: `(batch, n)`, int32; 0 for none.
        limit: `(batch, 1)`, int32. The sum of what is taken is at most this.

    Returns:
        `(batch, n)`, boolean.
    """

    def over(left_out):
        total = ops.cumsum(ops.where(left_out, 0, size), axis=1)
        return total, total > limit

    def step(left_out):
        total, too_much = over(left_out)
        # The room that is left when the first group does not fit can only get
        # smaller, so no larger group after it fits either.
        room = limit - ops.max(
            ops.where(too_much, 0, total), axis=1, keepdims=True
        )
        return (left_out | (too_much & (size > room)),)

    left_out = ops.while_loop(
        lambda left_out: ops.any(over(left_out)[1]), step, (size == 0,)
    )[0]
    return ~left_out
