"""Autoregressive priors over code maps, sampled in one compiled loop."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from blogkeras import backend
from blogkeras.arguments import (
    as_in_keras,
    as_numpy,
    check_boolean,
    check_choice,
    check_integer,
    check_integers,
    check_number,
    check_seed,
    check_sizes,
)
from blogkeras.graph import freeze_inside
from blogkeras.loops import ProgramCache
from blogkeras.models import TargetlessModel
from blogkeras.quantization.networks import PixelAttention, PixelCNN
from blogkeras.state import NumberedDraws, draw_rows

ARCHITECTURES = ("attention", "convolution")


@keras.saving.register_keras_serializable(package="blogkeras")
class CodePrior(TargetlessModel):
    """Learns to draw maps of codes: p(c) = Π p(c_t | c_1 … c_{t-1}).

    Codes are in row-major order. There are two networks:

    - `"attention"`, the post's PixelAtt: embedded codes, shifted by one
      position, plus an embedding for each axis (row and column),
      LayerNormalization, then `num_layers` times h + relu(W attention(h)) and
      LayerNormalization, with causal heads. For code maps of any rank.
    - `"convolution"`, PixelCNN: a 7×7 convolution over the codes before each
      position, `num_layers` residual blocks (1×1, causal 3×3, 1×1, all but the
      last with half the channels), two 1×1 layers. For two axes. Like the
      original it has a blind spot to the upper right.

    `fit(codes)`, or `fit([codes, labels])` with `num_classes`; the loss is the
    cross entropy in nats per code, the metric `nats` is per map. `model(codes)`
    gives the logits, `(batch, *code_shape, num_codes)`, float32. Sample weights
    are one for each map. The target is always the codes, whatever `y` is.

    The first step of `fit` compiles; on JAX, and with `jit_compile=True`, that
    may take half a minute before the first progress is shown.

    `sample` draws code by code inside one compiled loop. The keys and values,
    or feature maps, of earlier positions are kept, so a step computes one
    position and not a whole map.

    Args:
        num_codes: Integer ≥ 2.
        code_shape: Shape of a code map, such as `(8, 8)`.
        architecture: `"attention"` or `"convolution"`.
        num_classes: Integer, or `None` for no condition.
        label_shape: Shape of the labels of one map. By default a map has one
            label. With a shape such as `(4, 4)` it has a map of labels, the
            codes of a coarser map, say, as in VQ-VAE-2. Its sizes divide those
            of `code_shape`; each label is embedded and added at the positions
            that it covers.
        variable_length: Boolean. If true, maps end where they like, in
            row-major order: -1 stands at every position after the last code,
            and at all of them where there is no code. The network learns one
            more symbol, the end; a map's likelihood counts its codes and its
            end. A map that is full has no end.
        dim: Integer. Size of the hidden vectors.
        num_layers: Integer.
        num_heads: Integer that divides `dim`; for attention.
        dropout: Float in [0, 1). Share of the numbers that a layer adds to the
            hidden vectors which are set to 0 in training.
        seed: Integer or `None`, of the dropout. The draws are numbered by a
            count that is saved, so training goes on after `load_model` as if it
            had not stopped.

    Input shape:  codes `(batch, *code_shape)`, integers; with `num_classes`
        also labels `(batch, *label_shape)`.
    Output shape: logits `(batch, *code_shape, num_codes)`, float32; with
        `variable_length` the last of `num_codes + 1` is that of the end.

    Raises:
        ValueError: on numbers out of range, on a `dim` that the heads do not
            divide, on codes or labels out of range, and on a code after -1.

    Example:

    >>> prior = CodePrior(8, (2, 2), num_classes=3, dim=8, num_layers=1)
    >>> prior.compile("adam")
    >>> codes = np.random.randint(0, 8, (32, 2, 2))
    >>> labels = np.random.randint(0, 3, 32)
    >>> history = prior.fit([codes, labels], verbose=0)
    >>> prior.sample(4, temperature=0.9, labels=[0, 1, 2, 0]).shape
    (4, 2, 2)

    Departs from the post: classes, which it does not have, are embedded and
    added at every position.

    Reference:
        [blog post 6760](https://kexue.fm/archives/6760);
        [van den Oord et al., 2016](https://arxiv.org/abs/1601.06759), PixelCNN
    """

    ROW = "map"

    def __init__(
        self,
        num_codes: int,
        code_shape: Sequence[int],
        architecture: str = "attention",
        num_classes: int | None = None,
        dim: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        *,
        label_shape: Sequence[int] = (),
        variable_length: bool = False,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        num_codes = check_integer("num_codes", num_codes, minimum=2)
        code_shape = check_sizes("code_shape", code_shape)
        # Half of it are the channels of a convolution.
        smallest = 2 if architecture == "convolution" else 1
        dim = check_integer("dim", dim, minimum=smallest)
        num_layers = check_integer("num_layers", num_layers, minimum=1)
        num_heads = check_integer("num_heads", num_heads, minimum=1)
        if num_classes is not None:
            num_classes = check_integer("num_classes", num_classes, minimum=1)
        self.label_shape = _label_shape(label_shape, code_shape, num_classes)
        check_choice("architecture", architecture, ARCHITECTURES)
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
        self.variable_length = check_boolean("variable_length", variable_length)
        symbols = num_codes + self.variable_length
        self.dropout = check_number("dropout", dropout, minimum=0, below=1)
        self.seed = None if seed is None else check_integer("seed", seed)
        if self.dropout:
            self._draws = NumberedDraws(self, self.seed)
        if architecture == "attention":
            self.network = PixelAttention(
                symbols,
                code_shape,
                dim,
                num_layers,
                num_heads,
                dtype=self.dtype_policy,
                name="network",
            )
        else:
            self.network = PixelCNN(
                symbols,
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
        self._samplers = ProgramCache(8)

    @as_in_keras
    def compile(self, optimizer="adam", loss=None, **kwargs):
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        super().compile(optimizer, loss, **kwargs)

    def build(self, input_shape=None):
        self.network.build()
        if self.num_classes is not None:
            self.classes.build((None,))
        freeze_inside(self)

    def _symbolic_inputs(self):
        codes = keras.KerasTensor((None, *self.code_shape), "int32")
        if self.num_classes is None:
            return codes
        labels = keras.KerasTensor((None, *self.label_shape), "int32")
        return [codes, labels]

    def call(self, inputs, training=None):
        codes, labels = self._split(inputs)
        if tuple(codes.shape[1:]) != self.code_shape:
            raise ValueError(
                f"Expected code maps of shape {self.code_shape}. Received: "
                f"codes.shape={tuple(codes.shape)}"
            )
        codes, condition = self._symbols(codes), self._condition(labels)
        if not training or not self.dropout:
            return self.network(codes, condition)
        seed = self._draws.next_step()
        return self.network(
            codes, condition, drop=lambda h: _dropped(h, self.dropout, seed)
        )

    def _split(self, inputs):
        parts = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if len(parts) != 1 + (self.num_classes is not None):
            raise ValueError(
                "Expected codes alone, or [codes, labels] where `num_classes` "
                f"is given. Received: {len(parts)} inputs, "
                f"num_classes={self.num_classes}"
            )
        codes, labels = parts[0], (parts[1] if len(parts) == 2 else None)
        lowest = -1 if self.variable_length else 0
        check_integers("codes", codes, lowest, self.num_codes - 1)
        if self.variable_length:
            _check_ends(codes, len(self.code_shape))
        if labels is not None:
            check_integers("labels", labels, 0, self.num_classes - 1)
        return codes, labels

    def _symbols(self, codes):
        """Codes as the network takes them: the end in place of each -1."""
        codes = ops.cast(codes, "int32")
        if not self.variable_length:
            return codes
        return ops.where(codes < 0, self.num_codes, codes)

    def _counted(self, codes):
        """Which positions of `(batch, positions)` count: the codes, an end."""
        if not self.variable_length:
            return None
        # The position after a code counts; the first one always does.
        before = ops.concatenate(
            [ops.zeros_like(codes[:, :1]), codes[:, :-1]], axis=1
        )
        return before >= 0

    # In a compiled step values are not known, and JAX returns NaN for labels
    # that are out of range. So arrays are checked before.

    def _check_data(self, x):
        if hasattr(x, "__array__") and not ops.is_tensor(x):
            x = np.asarray(x)  # tables and tensors of another library
        if isinstance(x, (list, tuple, np.ndarray)) or ops.is_tensor(x):
            return x, len(self._split(x)[0])
        return self._check_stream(x), None

    def _check_batch(self, batch):
        self._split(batch[0] if isinstance(batch, tuple) else batch)

    def predict_on_batch(self, x):
        return super().predict_on_batch(self._check_data(x)[0])

    def _condition(self, labels):
        """`(batch, 1, dim)`, `(batch, positions, dim)` or None."""
        if labels is None:
            return None
        if not self.label_shape:
            labels = ops.reshape(labels, [-1, 1])  # also of (batch, 1)
            return self.classes(labels)
        if tuple(labels.shape[1:]) != self.label_shape:
            raise ValueError(
                f"Expected maps of labels of shape {self.label_shape}. "
                f"Received: labels.shape={tuple(labels.shape)}"
            )
        condition = self.classes(labels)
        for axis, (size, labels_along) in enumerate(
            zip(self.code_shape, self.label_shape, strict=True)
        ):
            condition = ops.repeat(condition, size // labels_along, axis + 1)
        positions = math.prod(self.code_shape)
        return ops.reshape(condition, [-1, positions, self.dim])

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        positions = math.prod(self.code_shape)
        # One row of codes for each map, so that a weight for each map fits.
        codes = ops.reshape(self._split(x)[0], [-1, positions])
        y, counted = self._symbols(codes), self._counted(codes)
        y_pred = ops.reshape(y_pred, [-1, positions, y_pred.shape[-1]])
        if counted is not None:
            backend.set_keras_mask(y_pred, counted)
        weight = sample_weight
        if weight is not None:
            if any(size not in (None, 1) for size in weight.shape[1:]):
                raise ValueError(
                    "Expected one weight for each map. Received: "
                    f"sample_weight.shape={tuple(weight.shape)}"
                )
            weight = ops.reshape(weight, [-1])
        each = None if weight is None else weight[:, None]
        loss = super().compute_loss(x, y, y_pred, each)
        nats = keras.losses.sparse_categorical_crossentropy(
            y, y_pred, from_logits=True
        )
        if counted is not None:
            nats = ops.where(counted, nats, 0.0)
        self.nats.update_state(ops.sum(nats, axis=-1), weight)
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        codes = self._split(x)[0]
        if self.variable_length:
            flat = ops.reshape(codes, [-1, math.prod(self.code_shape)])
            counted = ops.reshape(self._counted(flat), ops.shape(codes))
            backend.set_keras_mask(y_pred, counted)
        if sample_weight is not None:
            # A metric has a value for each code, a weight is one for each map.
            ones = [1] * len(self.code_shape)
            sample_weight = ops.reshape(sample_weight, [-1, *ones])
            sample_weight = ops.broadcast_to(sample_weight, ops.shape(codes))
        return super().compute_metrics(
            x, self._symbols(codes), y_pred, sample_weight
        )

    def sample(
        self,
        num,
        temperature=1.0,
        top_k=None,
        labels=None,
        seed=None,
        known=None,
    ):
        """Draws code maps, or completes them.

        It is compiled once for each pair `num`, `top_k`, which takes seconds.

        Args:
            num: Integer. How many.
            temperature: Float > 0. Logits are divided by it. For the most
                probable codes take `top_k=1`.
            top_k: Integer from 1 to `num_codes`: draw among this many of the
                most probable codes. Defaults to all.
            labels: Integers `(num, *label_shape)`, or `label_shape` for all
                maps; with `num_classes`.
            seed: Integer, or a `keras.random.SeedGenerator`.
            known: Integers `(num, *code_shape)`, or `code_shape` for all maps:
                the codes that are given, and -1 where one is to be drawn. With
                `variable_length` a map does not end before a given code. A
                drawn code follows from all codes before it in row-major order.
                So what comes after the given codes, such as the lower rows, has
                exactly the model's distribution; codes that are drawn before a
                given one do not look ahead to it.

        Returns:
            NumPy array of int32, `(num, *code_shape)`; with `variable_length`
            -1 after a map's end.
        """
        num = check_integer("num", num, minimum=1)
        temperature = check_number("temperature", temperature, above=0)
        if top_k is not None:
            top_k = check_integer(
                "top_k", top_k, minimum=1, maximum=self.num_codes
            )
        seed = check_seed("seed", seed)
        if (labels is None) != (self.num_classes is None):
            raise ValueError(
                "Expected labels where `num_classes` is given, and only there. "
                f"Received: labels={labels}, num_classes={self.num_classes}"
            )
        if not self.built:
            self.build()
        positions = math.prod(self.code_shape)
        # One random number for each code.
        u = backend.uniform((positions, num), seed=seed)
        # A smaller temperature would be 0 in float32. It gives the same draws
        # as 1e-30, since different logits differ by more than 1e-10.
        temperature = max(temperature, 1e-30)
        arguments = [
            u,
            ops.convert_to_tensor(temperature, "float32"),
            ops.convert_to_tensor(self._known_codes(known, num)),
        ]
        if labels is not None:
            check_integers("labels", labels, 0, self.num_classes - 1)
            labels = as_numpy(labels).astype("int32")
            shapes = [(n, *self.label_shape) for n in (1, num)]
            if labels.shape not in (self.label_shape, *shapes):
                raise ValueError(
                    f"Expected {num} labels, or one for all, of shape "
                    f"{self.label_shape}. Received: labels={labels}"
                )
            labels = np.broadcast_to(labels, (num, *self.label_shape))
            arguments.append(ops.convert_to_tensor(labels))
        sampler = self._samplers.get(
            (num, top_k),
            lambda: backend.jit_layer(
                lambda *args: self._sample(top_k, *args), self
            ),
        )
        codes = ops.convert_to_numpy(sampler(*arguments))
        codes = np.where(codes == self.num_codes, -1, codes)
        return codes.T.reshape(num, *self.code_shape)

    def _known_codes(self, known, num):
        """`(positions, num)` of int32, -1 where a code is to be drawn."""
        shape = (num, *self.code_shape)
        if known is None:
            known = np.full(shape, -1)
        check_integers("known", known, -1, self.num_codes - 1)
        known = as_numpy(known).astype("int32")
        if known.shape not in (shape, self.code_shape):
            raise ValueError(
                f"Expected `known` of the shape {shape}, or {self.code_shape} "
                f"for all maps. Received: known.shape={known.shape}"
            )
        return np.broadcast_to(known, shape).reshape(num, -1).T

    def _sample(self, top_k, u, temperature, known, labels=None):
        """`(positions, num)` codes from as many uniform numbers."""
        positions, num = u.shape
        condition, end = self._condition(labels), self.num_codes
        if self.variable_length:
            # No end at a position with a given code, or before one.
            later = ops.cumsum(ops.flip(ops.cast(known >= 0, "int32"), 0), 0)
            goes_on = ops.flip(later, 0) > 0

        def body(t, state):
            codes, cache = state
            # At t = 0 there is no code before; the networks ignore this value.
            before = ops.take(codes, ops.maximum(t - 1, 0), axis=0)
            logits, cache = self.network.step(t, before, condition, cache)
            if self.variable_length:
                never = ops.where(np.arange(end + 1) == end, -np.inf, logits)
                logits = ops.where(goes_on[t][:, None], never, logits)
            drawn = _draw(logits, u[t], temperature, top_k)
            if self.variable_length:
                ended = ops.logical_and(t > 0, before == end)
                drawn = ops.where(ended, end, drawn)
            drawn = ops.where(known[t] < 0, drawn, known[t])
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
            "label_shape": self.label_shape,
            "variable_length": self.variable_length,
            "dim": self.dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "seed": self.seed,
        }


def _dropped(x, rate, seed):
    """As Keras's dropout, with numbered draws."""

    def uniform(shape, seed):
        return backend.uniform(shape, dtype="float32", seed=seed)

    kept = draw_rows(uniform, ops.shape(x), seed) >= rate
    return ops.where(kept, x / (1 - rate), ops.zeros_like(x))


def _draw(logits, u, temperature, top_k):
    """Inverts the distribution function at u: `(n, K)`, `(n,)` → `(n,)`."""
    # The maximum is subtracted before the division: a small temperature makes
    # quotients infinite, and the difference of two of them NaN.
    best = ops.max(logits, axis=-1, keepdims=True)
    logits = (logits - best) / temperature
    if top_k is not None:
        # By index: a threshold would keep more than `top_k` codes where logits
        # are equal.
        chosen = ops.sort(ops.top_k(logits, top_k)[1])
        logits = ops.take_along_axis(logits, chosen, axis=-1)
    p = ops.exp(logits)
    total = ops.cumsum(p, axis=-1)
    below = total <= (u * total[:, -1])[:, None]
    drawn = ops.sum(ops.cast(below, "int32"), axis=-1)
    if top_k is not None:
        drawn = ops.take_along_axis(chosen, drawn[:, None], axis=-1)[:, 0]
    return ops.cast(drawn, "int32")


def _check_ends(codes, rank):
    """Raises where a code comes after -1, if the values are known."""
    if not backend.is_concrete(codes) or len(codes.shape) != 1 + rank:
        return
    codes = as_numpy(codes)
    flat = codes.reshape(len(codes), -1)
    wrong = ((flat[:, :-1] < 0) & (flat[:, 1:] >= 0)).any(axis=1)
    if wrong.any():
        raise ValueError(
            "Expected -1 only after the last code of a map. Received: a code "
            f"after -1 in row {wrong.argmax()}"
        )


def _label_shape(label_shape, code_shape, num_classes):
    """The shape of the labels as a tuple of integers, if it fits the codes."""
    empty = isinstance(label_shape, (tuple, list)) and not len(label_shape)
    sizes = () if empty else check_sizes("label_shape", label_shape)
    if sizes and (
        num_classes is None
        or len(sizes) != len(code_shape)
        or any(n % m for n, m in zip(code_shape, sizes, strict=True))
    ):
        raise ValueError(
            "Expected sizes of `label_shape` that divide those of the code "
            "maps, together with `num_classes`. Received: label_shape="
            f"{label_shape}, code_shape={code_shape}, num_classes={num_classes}"
        )
    return sizes
