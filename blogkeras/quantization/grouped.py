"""Grouped quantization: a quantizer of its own for each part of a vector."""

from typing import Any

import keras
import numpy as np
from keras import ops

from blogkeras.arguments import check_integer
from blogkeras.quantization.quantizer import Quantizer, floats


@keras.saving.register_keras_serializable(package="blogkeras")
class GroupedQuantizer(Quantizer):
    """Divides vectors into equal parts, and quantizes each on its own.

    Each group has a quantizer of the same configuration, with its own codebook,
    state and usage, in `parts`. So `VectorQuantizer` becomes product
    quantization with K^groups codes, `ResidualVectorQuantizer` the grouped
    residual quantizer of audio codecs, and `FiniteScalarQuantizer` has several
    codes for a vector. The loss is the mean over groups.

    Args:
        quantizer: Quantizer, not built: the configuration of every group. (With
            a `seed` the groups have this seed and those that follow.)
        groups: Integer ≥ 1, which divides the size of the vectors.

    Call arguments:
        inputs: `(..., dim)`, floating.
        training: Boolean, as for the quantizer.
        return_codes: Boolean. Whether to return `(quantized, codes)`.
        mask: Boolean, `(...)`. Which vectors count.

    Input shape:  `(..., dim)`, floating.
    Output shape: `(..., dim)`; codes `(..., groups)`, int32, or
        `(..., groups, num_quantizers)` of a residual quantizer.

    Raises:
        ValueError: if `quantizer` is no quantizer or is built, if the groups do
            not divide the vectors, and on what the quantizer refuses.

    Example:

    >>> layer = GroupedQuantizer(ResidualVectorQuantizer(2, 64), groups=4)
    >>> codes = layer.encode(keras.ops.ones((3, 50, 32)))
    >>> tuple(codes.shape)
    (3, 50, 4, 2)

    Reference:
        [Yang et al., 2023](https://arxiv.org/abs/2305.02765), groups of
        residual quantizers; [blog post 6760](https://kexue.fm/archives/6760)
    """

    def __init__(
        self, quantizer: keras.layers.Layer, groups: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(quantizer, Quantizer):
            raise ValueError(
                "Expected a quantizer, such as VectorQuantizer. Received: "
                f"quantizer={quantizer!r}"
            )
        if quantizer.built:
            raise ValueError(
                "Expected a quantizer that is not built: its configuration is "
                "copied for each group, and not its weights. Received: "
                f"quantizer={quantizer!r}"
            )
        self.groups = check_integer("groups", groups, minimum=1)
        self.parts = [
            self._part(quantizer, index) for index in range(self.groups)
        ]
        self.num_codes = quantizer.num_codes
        self.alphabets = quantizer.alphabets * self.groups
        self.codes_per_vector = (self.groups, *quantizer.codes_per_vector)

    def _part(self, quantizer, index):
        config = _with_later_seed(quantizer.get_config(), index)
        config["name"] = f"group_{index}"
        config["trainable"] = config["trainable"] and self.trainable
        return type(quantizer).from_config(config)

    @property
    def quantizer(self):
        """The quantizer of the first group."""
        return self.parts[0]

    def codebooks(self):
        """The layers that count codes, group by group."""
        return [book for part in self.parts for book in part.codebooks()]

    def _sizes(self):
        return self.quantizer._sizes()

    def check_codes(self, codes):
        """Raises a `ValueError` unless all codes are integers within range.

        Args:
            codes: `(..., groups)`, or with a further axis of stages.
        """
        super().check_codes(codes)
        if not ops.is_tensor(codes):
            codes = np.asarray(codes)
        shape = tuple(codes.shape)
        axis = len(shape) - len(self.codes_per_vector)
        if axis < 0 or shape[axis] not in (None, self.groups):
            raise ValueError(
                f"Expected the codes of {self.groups} groups along axis "
                f"{-len(self.codes_per_vector)}. Received: codes.shape={shape}"
            )
        for part, own in zip(self.parts, self._by_group(codes), strict=True):
            part.check_codes(own)

    def build(self, input_shape):
        dim = input_shape[-1] if len(input_shape) else None
        if dim is None or dim % self.groups:
            raise ValueError(
                "Expected vectors of a known size that the groups divide. "
                f"Received: input_shape={input_shape}, groups={self.groups}"
            )
        self.input_spec = keras.layers.InputSpec(axes={-1: dim})
        for part in self.parts:
            part.build((*input_shape[:-1], dim // self.groups))

    def _split(self, z):
        return ops.split(z, self.groups, axis=-1)

    def _by_group(self, codes):
        """The codes of each group, without their axis."""
        stages = (slice(None),) * len(self.quantizer.codes_per_vector)
        return [codes[(..., index, *stages)] for index in range(self.groups)]

    def _quantize(self, z, weights, training):
        outputs, symbols, losses = zip(
            *(
                part._quantize(own, weights, training)
                for part, own in zip(self.parts, self._split(z), strict=True)
            ),
            strict=True,
        )
        loss = None
        if losses[0] is not None:
            loss = sum(losses) / self.groups
        return ops.concatenate(outputs, -1), ops.concatenate(symbols, -1), loss

    def _symbols(self, z):
        parts = zip(self.parts, self._split(z), strict=True)
        return ops.concatenate([part._symbols(own) for part, own in parts], -1)

    def _codes(self, symbols):
        parts = zip(self.parts, self._split(symbols), strict=True)
        codes = [part._codes(own) for part, own in parts]
        return ops.stack(codes, -len(self.codes_per_vector))

    def _decode(self, codes):
        parts = zip(self.parts, self._by_group(codes), strict=True)
        return ops.concatenate([part._decode(own) for part, own in parts], -1)

    def compute_output_spec(
        self, inputs, training=False, return_codes=False, mask=None
    ):
        if return_codes:  # finite scalars may have too many codes
            shape = (*inputs.shape[:-1], inputs.shape[-1] // self.groups)
            self.quantizer.compute_output_spec(
                keras.KerasTensor(shape, inputs.dtype), return_codes=True
            )
        return super().compute_output_spec(inputs, training, return_codes, mask)

    def adapt(self, vectors, iterations=10, seed=0, verbose=0):
        """Sets the codebooks of each group by `adapt` of its quantizer.

        Args:
            vectors, iterations, seed, verbose: As for `VectorQuantizer.adapt`.
        """
        vectors = floats("vectors", vectors)
        if not self.built:
            self.build(tuple(vectors.shape))
        vectors = self._vectors(vectors)
        for part, own in zip(self.parts, self._split(vectors), strict=True):
            part.adapt(own, iterations, seed, verbose)

    def get_config(self):
        serialized = keras.saving.serialize_keras_object(self.quantizer)
        # Otherwise Keras would build what is only a configuration.
        serialized.pop("build_config", None)
        return {
            **super().get_config(),
            "quantizer": serialized,
            "groups": self.groups,
        }

    @classmethod
    def from_config(cls, config):
        quantizer = keras.saving.deserialize_keras_object(config["quantizer"])
        return cls(**{**config, "quantizer": quantizer})


def _with_later_seed(config, steps):
    """A configuration of a quantizer, or of groups of it, with a later seed."""
    if config.get("seed") is not None:
        return {**config, "seed": config["seed"] + steps}
    if "groups" not in config:
        return dict(config)
    inner = config["quantizer"]
    moved = _with_later_seed(inner["config"], steps * config["groups"])
    return {**config, "quantizer": {**inner, "config": moved}}
