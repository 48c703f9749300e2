"""The networks of the priors: all positions at once, or one with a cache."""

import math

import numpy as np
from keras import layers, ops


def _unchanged(x):
    return x


def _at(condition, t):
    """The condition at one position, `(batch, 1, dim)`, or None."""
    if condition is None or condition.shape[1] == 1:
        return condition
    return ops.take(condition, ops.reshape(t, [1]), axis=1)


class PixelAttention(layers.Layer):
    """The post's PixelAtt: logits of each code from the codes before it.

    `call` computes all positions at once, in training, and applies a function
    `drop` to what each layer adds to the hidden vectors. `start` and `step`
    compute one position after the other, in sampling: `start(num)` makes an
    empty cache of keys and values for `num` maps, and `step` takes a position,
    the codes before it and the cache, and returns the logits of the position
    and the cache with this position in it.

    A condition is `(batch, 1, dim)`, or `(batch, positions, dim)`.
    """

    def __init__(
        self, num_codes, code_shape, dim, num_layers, num_heads, **kwargs
    ):
        super().__init__(**kwargs)
        self.positions = math.prod(code_shape)
        self.dim = dim
        # The index of each position along each axis.
        self._places = np.indices(code_shape, "int32").reshape(
            len(code_shape), -1
        )
        # Token 0 stands before the first code.
        self.tokens = self._sublayer(
            layers.Embedding, num_codes + 1, dim, name="tokens"
        )
        self.axes = [
            self._sublayer(layers.Embedding, size, dim, name=f"axis_{i}")
            for i, size in enumerate(code_shape)
        ]
        self.blocks = [
            self._sublayer(_Attention, num_heads, name=f"attention_{i}")
            for i in range(num_layers)
        ]
        self.normalizations = [
            self._sublayer(layers.LayerNormalization, name=f"norm_{i}")
            for i in range(num_layers + 1)
        ]
        self.head = layers.Dense(num_codes, dtype="float32", name="head")

    def _sublayer(self, cls, *args, **kwargs):
        return cls(*args, dtype=self.dtype_policy, **kwargs)

    def build(self, *_):
        hidden = (None, None, self.dim)
        for layer in (self.tokens, *self.axes):
            layer.build((None, None))
        for layer in (*self.blocks, *self.normalizations, self.head):
            layer.build(hidden)

    def _embed(self, tokens, places, condition):
        """`(batch, length)` tokens at `(axes, length)` places."""
        h = self.tokens(tokens)
        for index, axis in enumerate(self.axes):
            h = h + axis(places[index])
        if condition is not None:
            h = h + condition
        return self.normalizations[0](h)

    def call(self, codes, condition, drop=_unchanged):
        shape = ops.shape(codes)
        tokens = ops.reshape(codes, [-1, self.positions]) + 1
        tokens = ops.pad(tokens[:, :-1], [[0, 0], [1, 0]])
        h = self._embed(tokens, self._places, condition)
        for block, norm in zip(
            self.blocks, self.normalizations[1:], strict=True
        ):
            h = norm(h + drop(block(h)))
        logits = self.head(h)
        return ops.reshape(logits, [*shape, logits.shape[-1]])

    def start(self, num):
        return tuple(block.start(num, self.positions) for block in self.blocks)

    def step(self, t, before, condition, cache):
        token = ops.where(t == 0, 0, before + 1)
        place = ops.take(self._places, ops.reshape(t, [1]), axis=1)
        h = self._embed(token[:, None], place, _at(condition, t))
        new = []
        for block, norm, pair in zip(
            self.blocks, self.normalizations[1:], cache, strict=True
        ):
            update, pair = block.step(t, h, pair)
            h = norm(h + update)
            new.append(pair)
        return self.head(h)[:, 0], tuple(new)


class _Attention(layers.Layer):
    """Causal self-attention, then a relu layer."""

    def __init__(self, num_heads, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads

    def build(self, input_shape):
        dim = input_shape[-1]
        self.size = dim // self.num_heads

        def dense(name, **kwargs):
            layer = layers.Dense(
                dim, dtype=self.dtype_policy, name=name, **kwargs
            )
            layer.build(input_shape)
            return layer

        self.query = dense("query", use_bias=False)
        self.key = dense("key", use_bias=False)
        self.value = dense("value", use_bias=False)
        self.output_dense = dense("output", activation="relu")

    def _heads(self, dense, h):
        shape = [-1, h.shape[1], self.num_heads, self.size]
        return ops.reshape(dense(h), shape)

    def _attend(self, h, keys, values, seen):
        """`seen` is `(length of h, length of keys)`, boolean.

        Not Keras's `dot_product_attention`: compiled by JAX, that refuses
        float16 on a CPU.
        """
        query = self._heads(self.query, h) * self.size**-0.5
        scores = ops.einsum("btnd,bsnd->bnts", query, keys)
        scores = ops.where(seen, ops.cast(scores, "float32"), -1e9)
        weights = ops.cast(ops.softmax(scores), self.compute_dtype)
        attended = ops.einsum("bnts,bsnd->btnd", weights, values)
        return self.output_dense(ops.reshape(attended, [-1, *h.shape[1:]]))

    def call(self, h):
        keys, values = (self._heads(d, h) for d in (self.key, self.value))
        return self._attend(h, keys, values, np.tri(h.shape[1], dtype=bool))

    def start(self, num, positions):
        shape = (num, positions, self.num_heads, self.size)
        empty = ops.zeros(shape, self.compute_dtype)
        return empty, empty

    def step(self, t, h, cache):
        """One position: `h` is `(num, 1, dim)`."""
        keys, values = (
            ops.slice_update(old, [0, t, 0, 0], self._heads(dense, h))
            for dense, old in zip((self.key, self.value), cache, strict=True)
        )
        seen = (ops.arange(keys.shape[1], dtype="int32") <= t)[None]
        return self._attend(h, keys, values, seen), (keys, values)


class PixelCNN(layers.Layer):
    """Masked convolutions: logits of each code from the codes before it.

    `call`, `start` and `step` are as in `PixelAttention`; the cache holds the
    input maps of all convolutions.
    """

    def __init__(self, num_codes, code_shape, dim, num_layers, **kwargs):
        super().__init__(**kwargs)
        self.code_shape = code_shape
        self.dim = dim
        self.tokens = self._sublayer(
            layers.Embedding, num_codes, dim, name="tokens"
        )
        self.first = self._sublayer(
            _CausalConv, dim, 7, code_shape, include_self=False, name="first"
        )
        # Three lists: Keras 3.12 does not save layers in tuples in a list.
        blocks = range(num_layers)
        self.narrow = [self._dense(dim // 2, f"narrow_{i}") for i in blocks]
        self.convolutions = [
            self._sublayer(
                _CausalConv,
                dim // 2,
                3,
                code_shape,
                include_self=True,
                name=f"convolution_{i}",
            )
            for i in blocks
        ]
        self.widen = [self._dense(dim, f"widen_{i}") for i in blocks]
        self.last = [self._dense(dim, f"last_{i}") for i in range(2)]
        self.head = layers.Dense(num_codes, dtype="float32", name="head")

    def _sublayer(self, cls, *args, **kwargs):
        return cls(*args, dtype=self.dtype_policy, **kwargs)

    def _dense(self, units, name):
        return self._sublayer(layers.Dense, units, "relu", name=name)

    def build(self, *_):
        wide, narrow = (None, None, self.dim), (None, None, self.dim // 2)
        self.tokens.build((None, None))
        self.first.build(wide)
        for layer in (*self.convolutions, *self.widen):
            layer.build(narrow)
        for dense in (*self.narrow, *self.last, self.head):
            dense.build(wide)

    def _forward(self, h, condition, convolve, drop=_unchanged):
        """From the first convolution to the logits; `convolve(layer, h)`.

        The condition can be broadcast to the hidden vectors h.
        """
        h = convolve(self.first, h)
        if condition is not None:
            h = h + condition
        h = ops.relu(h)
        for reduce, convolution, widen in zip(
            self.narrow, self.convolutions, self.widen, strict=True
        ):
            h = h + drop(widen(ops.relu(convolve(convolution, reduce(h)))))
        for dense in self.last:
            h = dense(h)
        return self.head(h)

    def call(self, codes, condition, drop=_unchanged):
        if condition is not None:
            one = condition.shape[1] == 1
            shape = (1, 1) if one else self.code_shape
            condition = ops.reshape(condition, [-1, *shape, self.dim])
        return self._forward(
            self.tokens(codes), condition, lambda layer, h: layer(h), drop
        )

    def start(self, num):
        convolutions = (self.first, *self.convolutions)
        return tuple(layer.start(num) for layer in convolutions)

    def step(self, t, before, condition, cache):
        # The first convolution does not see position t. Its newest input is
        # that of position t - 1, the code `before`; the others' newest input is
        # that of position t.
        old, new = iter(cache), []

        def convolve(layer, h):
            h, maps = layer.step(t, h, next(old))
            new.append(maps)
            return h

        if condition is not None:
            condition = _at(condition, t)[:, 0]
        logits = self._forward(self.tokens(before), condition, convolve)
        return logits, tuple(new)


class _CausalConv(layers.Layer):
    """A convolution over the rows above, and to the left in the same row.

    The kernel has only these rows; a mask cuts off the right of the last one.
    """

    def __init__(self, filters, size, code_shape, include_self, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.size = size
        self.reach = size // 2
        self.code_shape = code_shape
        self.include_self = include_self

    def build(self, input_shape):
        self.channels = input_shape[-1]
        rows = self.reach + 1
        self.kernel = self.add_weight(
            shape=(rows, self.size, self.channels, self.filters), name="kernel"
        )
        self.bias = self.add_weight(
            shape=(self.filters,), initializer="zeros", name="bias"
        )
        # Row and column of each position, and of the position before it. The
        # first position has none before it: its values are written to a row
        # below the map, which no convolution reads.
        self._places = np.indices(self.code_shape, "int32").reshape(2, -1)
        self._before = np.roll(self._places, 1, axis=1)
        self._before[:, 0] = self.code_shape[0], 0
        mask = np.ones((rows, self.size, 1, 1), "float32")
        mask[-1, self.reach + self.include_self :] = 0
        self._mask = mask

    def _weights(self):
        # Keras casts weights to the compute dtype in `call` only, and `step` is
        # called outside of it.
        kernel, bias = (
            ops.cast(ops.convert_to_tensor(w), self.compute_dtype)
            for w in (self.kernel, self.bias)
        )
        return kernel * ops.cast(self._mask, self.compute_dtype), bias

    def call(self, h):
        kernel, bias = self._weights()
        padding = [[0, 0], [self.reach, 0], [self.reach] * 2, [0, 0]]
        h = ops.pad(h, padding)
        return ops.conv(h, kernel, data_format="channels_last") + bias

    def start(self, num):
        height, width = self.code_shape
        # The map with its border of zeros, and the row below it (see `build`).
        shape = height + self.reach + 1, width + 2 * self.reach
        return ops.zeros((num, *shape, self.channels), self.compute_dtype)

    def step(self, t, h, maps):
        """One position: `h` is `(num, channels)`, `maps` the inputs before."""
        row, column = (ops.take(p, t) for p in self._places)
        if self.include_self:
            place = [0, row + self.reach, column + self.reach, 0]
        else:
            before = (ops.take(p, t) for p in self._before)
            place = [0, *(p + self.reach for p in before), 0]
        maps = ops.slice_update(maps, place, h[:, None, None])
        window = ops.slice(
            maps,
            [0, row, column, 0],
            [maps.shape[0], self.reach + 1, self.size, self.channels],
        )
        kernel, bias = self._weights()
        return ops.einsum("nijc,ijcf->nf", window, kernel) + bias, maps
