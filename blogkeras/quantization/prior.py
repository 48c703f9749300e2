"""Autoregressive priors over code maps, sampled in one compiled loop."""

import math

import keras
import numpy as np
from keras import layers, ops

from blogkeras import backend

ARCHITECTURES = ("attention", "convolution")


@keras.saving.register_keras_serializable(package="blogkeras")
class CodePrior(keras.Model):
    """Learns to draw maps of codes: p(c) = Π p(c_t | c_1 … c_{t-1}).

    Codes stand in reading order. Two networks:

    - `"attention"`, the post's PixelAtt: embedded codes, moved on by one, plus
      an embedding for each axis (row and column), LayerNormalization, then
      `num_layers` times h + relu(W attention(h)) and LayerNormalization, with
      causal heads. For code maps of any rank.
    - `"convolution"`, PixelCNN: a 7×7 convolution that sees only what is before
      it, `num_layers` residual blocks (1×1, causal 3×3, 1×1, all but the last
      with half the channels), two 1×1 layers. For two axes. Like the original
      it has a blind spot to the upper right.

    `fit(codes)`, or `fit([codes, labels])` with `num_classes`; the loss is the
    cross entropy in nats per code, the metric `nats` is per map. `model(codes)`
    gives the logits, `(batch, *code_shape, num_codes)`, float32. Keras forgets
    sample weights where there is no `y`: then give the codes as `y` too.

    `sample` draws code by code inside one compiled loop. What earlier positions
    have computed is kept (keys and values; feature maps), so that a step costs
    one position, not a whole map.

    Args:
        num_codes: Integer ≥ 2.
        code_shape: Shape of a code map, such as `(8, 8)`.
        architecture: `"attention"` or `"convolution"`.
        num_classes: Integer, or `None` for no condition.
        dim: Integer. Size of the hidden vectors.
        num_layers: Integer.
        num_heads: Integer that divides `dim`; for attention.

    Example:

    >>> prior = CodePrior(512, (8, 8), num_classes=10)
    >>> prior.compile("adam")
    >>> prior.fit([codes, labels])
    >>> prior.sample(4, temperature=0.9, labels=[0, 1, 2, 3]).shape
    (4, 8, 8)

    Departs from the post: classes, which it does not have, are embedded and
    added at every position.

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760);
        [van den Oord et al., 2016](https://arxiv.org/abs/1601.06759), PixelCNN
    """

    def __init__(
        self,
        num_codes,
        code_shape,
        architecture="attention",
        num_classes=None,
        dim=256,
        num_layers=4,
        num_heads=8,
        **kwargs,
    ):
        super().__init__(**kwargs)
        code_shape = tuple(code_shape)
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"Expected one of {ARCHITECTURES}. Received: "
                f"architecture={architecture!r}"
            )
        if architecture == "convolution" and len(code_shape) != 2:
            raise ValueError(
                'Expected (height, width) for convolutions; "attention" takes '
                f"any shape. Received: code_shape={code_shape}"
            )
        if architecture == "attention" and dim % num_heads:
            raise ValueError(
                "Expected a dim that the heads can share equally. Received: "
                f"dim={dim}, num_heads={num_heads}"
            )
        self.num_codes = num_codes
        self.code_shape = code_shape
        self.architecture = architecture
        self.num_classes = num_classes
        self.dim = dim
        self.num_layers = num_layers
        self.num_heads = num_heads
        if architecture == "attention":
            self.network = _PixelAttention(
                num_codes,
                code_shape,
                dim,
                num_layers,
                num_heads,
                dtype=self.dtype_policy,
                name="network",
            )
        else:
            self.network = _PixelCNN(
                num_codes,
                code_shape,
                dim,
                num_layers,
                dtype=self.dtype_policy,
                name="network",
            )
        if num_classes is not None:
            self.classes = layers.Embedding(
                num_classes, dim, dtype=self.dtype_policy, name="classes"
            )
        self.nats = keras.metrics.Mean(name="nats")
        self._samplers = {}

    def compile(self, optimizer="adam", loss=None, **kwargs):
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        super().compile(optimizer, loss, **kwargs)

    def compile_from_config(self, config):
        # Keras does this itself only where `compile` is not overridden.
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built and self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def build(self, input_shape=None):
        self.network.build()
        if self.num_classes is not None:
            self.classes.build((None,))

    def call(self, inputs, training=None):
        codes, labels = self._split(inputs)
        if tuple(codes.shape[1:]) != self.code_shape:
            raise ValueError(
                f"Expected code maps of shape {self.code_shape}. Received: "
                f"codes.shape={tuple(codes.shape)}"
            )
        logits = self.network(ops.cast(codes, "int32"), self._condition(labels))
        return ops.cast(logits, "float32")

    def _split(self, inputs):
        parts = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if len(parts) != 1 + (self.num_classes is not None):
            raise ValueError(
                "Expected codes alone, or [codes, labels] where `num_classes` "
                f"is given. Received: {len(parts)} inputs, "
                f"num_classes={self.num_classes}"
            )
        return parts[0], (parts[1] if len(parts) == 2 else None)

    def _condition(self, labels):
        """`(batch, dim)`, or None."""
        return None if labels is None else self.classes(labels)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        positions = math.prod(self.code_shape)
        # One row of codes for each map: so a weight for each map fits.
        y = ops.reshape(self._split(x)[0], [-1, positions])
        y_pred = ops.reshape(y_pred, [-1, positions, self.num_codes])
        weight = sample_weight
        if weight is not None:
            weight = ops.reshape(weight, [-1, 1])
        loss = super().compute_loss(x, y, y_pred, weight)
        nats = keras.losses.sparse_categorical_crossentropy(
            y, y_pred, from_logits=True
        )
        self.nats.update_state(ops.sum(nats, axis=-1), sample_weight)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y = self._split(x)[0] if y is None else y
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def sample(self, num, temperature=1.0, top_k=None, labels=None, seed=None):
        """Draws code maps.

        Compiled once for each pair `num`, `top_k`.

        Args:
            num: Integer. How many.
            temperature: Float > 0. Logits are divided by it.
            top_k: Integer from 1 to `num_codes`: draw among so many most
                probable codes. Defaults to all.
            labels: Integers `(num,)`, or one for all; with `num_classes`.
            seed: Integer, or a `keras.random.SeedGenerator`.

        Returns:
            NumPy array of int32, `(num, *code_shape)`.
        """
        if not temperature > 0:
            raise ValueError(
                "Expected a temperature above 0; for the most probable code "
                f"take top_k=1. Received: temperature={temperature}"
            )
        if top_k is not None and not 1 <= top_k <= self.num_codes:
            raise ValueError(
                f"Expected top_k from 1 to {self.num_codes}, or None. "
                f"Received: top_k={top_k}"
            )
        if (labels is None) != (self.num_classes is None):
            raise ValueError(
                "Expected labels where `num_classes` is given, and only there. "
                f"Received: labels={labels}, num_classes={self.num_classes}"
            )
        if not self.built:
            self.build()
        positions = math.prod(self.code_shape)
        # All the randomness there is: one number for each code.
        u = keras.random.uniform((positions, num), seed=seed)
        arguments = [u, ops.convert_to_tensor(temperature, "float32")]
        if labels is not None:
            labels = np.broadcast_to(np.asarray(labels, "int32"), (num,))
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise ValueError(
                    f"Expected labels from 0 to {self.num_classes - 1}. "
                    f"Received: labels={labels}"
                )
            arguments.append(ops.convert_to_tensor(labels))
        key = num, top_k
        if key not in self._samplers:
            self._samplers[key] = backend.jit_layer(
                lambda *args: self._sample(top_k, *args), self
            )
        codes = ops.convert_to_numpy(self._samplers[key](*arguments))
        return codes.T.reshape(num, *self.code_shape)

    def _sample(self, top_k, u, temperature, labels=None):
        """`(positions, num)` codes from as many uniform numbers."""
        positions, num = u.shape
        condition = self._condition(labels)

        def body(t, state):
            codes, cache = state
            # At t = 0 there is none; the network knows.
            before = ops.take(codes, ops.maximum(t - 1, 0), axis=0)
            logits, cache = self.network.step(t, before, condition, cache)
            drawn = _draw(logits, u[t], temperature, top_k)
            return ops.slice_update(codes, [t, 0], drawn[None]), cache

        start = ops.zeros((positions, num), "int32"), self.network.start(num)
        return ops.fori_loop(0, positions, body, start)[0]

    def get_config(self):
        return {
            **super().get_config(),
            "num_codes": self.num_codes,
            "code_shape": self.code_shape,
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "dim": self.dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
        }


def _draw(logits, u, temperature, top_k):
    """Inverts the distribution function at u: `(n, K)`, `(n,)` → `(n,)`."""
    logits = ops.cast(logits, "float32") / temperature
    if top_k is not None:
        least = ops.top_k(logits, top_k)[0][:, -1:]
        logits = ops.where(logits < least, -np.inf, logits)
    total = ops.cumsum(ops.softmax(logits), axis=-1)
    # Rounding leaves the last sum a little off 1.
    below = total <= (u * total[:, -1])[:, None]
    return ops.sum(ops.cast(below, "int32"), axis=-1)


class _PixelAttention(layers.Layer):
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
        self.head = self._sublayer(layers.Dense, num_codes, name="head")

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
            h = h + condition[:, None]
        return self.normalizations[0](h)

    def call(self, codes, condition):
        shape = ops.shape(codes)
        tokens = ops.reshape(codes, [-1, self.positions]) + 1
        tokens = ops.pad(tokens[:, :-1], [[0, 0], [1, 0]])
        h = self._embed(tokens, self._places, condition)
        for block, norm in zip(
            self.blocks, self.normalizations[1:], strict=True
        ):
            h = norm(h + block(h))
        logits = self.head(h)
        return ops.reshape(logits, [*shape, logits.shape[-1]])

    def start(self, num):
        return tuple(block.start(num, self.positions) for block in self.blocks)

    def step(self, t, before, condition, cache):
        token = ops.where(t == 0, 0, before + 1)
        place = ops.take(self._places, ops.reshape(t, [1]), axis=1)
        h = self._embed(token[:, None], place, condition)
        new = []
        for block, norm, kept in zip(
            self.blocks, self.normalizations[1:], cache, strict=True
        ):
            update, kept = block.step(t, h, kept)
            h = norm(h + update)
            new.append(kept)
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
            ops.slice_update(kept, [0, t, 0, 0], self._heads(dense, h))
            for dense, kept in zip((self.key, self.value), cache, strict=True)
        )
        seen = (ops.arange(keys.shape[1]) <= t)[None]
        return self._attend(h, keys, values, seen), (keys, values)


class _PixelCNN(layers.Layer):
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
        # Not one list of triples: Keras 3.12 would not save what is in them.
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
        self.head = self._sublayer(layers.Dense, num_codes, name="head")

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

    def _forward(self, h, condition, convolve):
        """From the first convolution to the logits; `convolve(layer, h)`."""
        h = convolve(self.first, h)
        if condition is not None:
            axes = [1] * (len(h.shape) - 2)
            h = h + ops.reshape(condition, [-1, *axes, self.dim])
        h = ops.relu(h)
        for reduce, convolution, widen in zip(
            self.narrow, self.convolutions, self.widen, strict=True
        ):
            h = h + widen(ops.relu(convolve(convolution, reduce(h))))
        for dense in self.last:
            h = dense(h)
        return self.head(h)

    def call(self, codes, condition):
        return self._forward(
            self.tokens(codes), condition, lambda layer, h: layer(h)
        )

    def start(self, num):
        convolutions = (self.first, *self.convolutions)
        return tuple(layer.start(num) for layer in convolutions)

    def step(self, t, before, condition, cache):
        # The first convolution does not see position t: it reads position
        # t - 1, which is new. The others read position t.
        kept, new = iter(cache), []

        def convolve(layer, h):
            h, maps = layer.step(t, h, next(kept))
            new.append(maps)
            return h

        logits = self._forward(self.tokens(before), condition, convolve)
        return logits, tuple(new)


class _CausalConv(layers.Layer):
    """A convolution that sees what is above, or left in the same row.

    The kernel has only the rows that can be seen; the mask cuts the last one.
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
        # Row and column of each position, and of the one before it. Before the
        # first there is none: that goes below the map.
        self._places = np.indices(self.code_shape, "int32").reshape(2, -1)
        self._before = np.roll(self._places, 1, axis=1)
        self._before[:, 0] = self.code_shape[0], 0
        mask = np.ones((rows, self.size, 1, 1), "float32")
        mask[-1, self.reach + self.include_self :] = 0
        self._mask = mask

    def _weights(self):
        # Outside of `call` nobody casts them.
        kernel, bias = (
            ops.cast(ops.convert_to_tensor(w), self.compute_dtype)
            for w in (self.kernel, self.bias)
        )
        return kernel * ops.cast(self._mask, self.compute_dtype), bias

    def call(self, h):
        kernel, bias = self._weights()
        padding = [[0, 0], [self.reach, 0], [self.reach] * 2, [0, 0]]
        return ops.conv(ops.pad(h, padding), kernel) + bias

    def start(self, num):
        height, width = self.code_shape
        # The border, and a row below that catches what is written for t = 0.
        shape = height + self.reach + 1, width + 2 * self.reach
        return ops.zeros((num, *shape, self.channels), self.compute_dtype)

    def step(self, t, h, maps):
        """One position: `h` is `(num, channels)`, `maps` what came before."""
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
