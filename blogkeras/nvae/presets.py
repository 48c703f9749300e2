"""Configurations of NVAE: the published ones, and two for a CPU."""

import dataclasses
from typing import Any

from blogkeras.arguments import (
    check_boolean,
    check_choice,
    check_integer,
    check_number,
    check_sizes,
)

LIKELIHOODS = ("bernoulli", "logistic_mixture", "normal")
BALANCES = (None, "equal", "linear", "sqrt", "square")


@dataclasses.dataclass(frozen=True)
class NVAEConfig:
    """The architecture and the loss of an `NVAE`.

    A picture passes `num_blocks` blocks of cells, each of which halves its
    sides and doubles its channels. Then come the scales, each of half the sides
    and twice the channels of the one before; a scale has one or more groups of
    latent variables, each with `latent_channels` at every position.

    Args:
        input_shape: `(height, width, channels)` of the pictures.
        padding: Integer. Rows and columns of zeros put around a picture inside
            the model; they are not part of the loss. 28 × 28 needs 2.
        groups: Tuple of integers: the number of groups of each scale, from
            the finest to the coarsest. They are drawn in the other direction.
        channels: Integer ≥ 2. Channels after the first convolution.
        latent_channels: Integer. Channels of one group.
        num_blocks: Integer. Halvings before the first scale, and doublings
            after it.
        cells_per_block: Integer. Cells of such a block.
        cells_per_group: Integer. Cells in front of each group, on both sides.
        num_flows: Integer. Pairs of autoregressive flows after each posterior.
        likelihood: `"bernoulli"`, `"logistic_mixture"` (discretized) or
            `"normal"`.
        num_mixtures: Integer. Logistic distributions of a mixture.
        num_bits: Integer from 1 to 8. Pictures are rounded down to so many
            bits a value (mixture only).
        residual_posterior: Boolean. Whether the posterior is relative to the
            prior; the post's N(μ + Δμ, σ² Δσ²).
        squeeze_excite: Boolean. Whether cells scale their channels.
        batch_norm: Boolean. Whether cells normalize batches.
        spectral_weight: Number ≥ 0. Weight λ of the sum of the largest singular
            values of all convolutions and of the largest |γ| of each batch
            normalization.
        spectral_start: Number > 0 or `None`. λ at the start; it then goes to
            `spectral_weight` as the weight of the KL term goes to 1, linearly
            in its logarithm: during `kl_warmup_steps`, or at once after
            `kl_constant_steps` where there is no warm-up. Without both it has
            no effect, and `compile` warns. `None`: constant.
        kl_warmup_steps: Integer. Training steps in which the weight of the KL
            term goes from 0 to 1. Published: 0.3 of all. 0: none.
        kl_constant_steps: Integer. Steps before them, at `kl_minimum`.
        kl_minimum: Number from 0 to 1. Least weight of the KL term.
        kl_balance: `"square"` (published), `"equal"`, `"linear"`, `"sqrt"` or
            `None`: how the KL terms of groups are weighted until the warm-up
            ends. Without `kl_warmup_steps` they have equal weights.
        binarize: `"dynamic"` draws binary pictures anew at each step, with
            the pixels in [0, 1] as probabilities. `None`: pixels are 0 or 1
            already. For `"bernoulli"` only.

    Raises:
        ValueError: on arguments out of range, and if height and width with
            their padding cannot be halved as often as the scales ask for.

    Example:

    >>> config = NVAEConfig((28, 28, 1), padding=2, groups=(3, 1), channels=8)
    >>> config.num_latents  # 3 · 16 · 16 · 20 + 1 · 8 · 8 · 20
    16640

    Reference:
        [Vahdat & Kautz, 2020](https://arxiv.org/abs/2007.03898)
    """

    input_shape: tuple = (32, 32, 3)
    padding: int = 0
    groups: tuple = (10, 5)
    channels: int = 32
    latent_channels: int = 20
    num_blocks: int = 1
    cells_per_block: int = 2
    cells_per_group: int = 2
    num_flows: int = 0
    likelihood: str = "logistic_mixture"
    num_mixtures: int = 10
    num_bits: int = 8
    residual_posterior: bool = True
    squeeze_excite: bool = True
    batch_norm: bool = True
    spectral_weight: float = 1e-2
    spectral_start: float | None = None
    kl_warmup_steps: int = 0
    kl_constant_steps: int = 0
    kl_minimum: float = 1e-4
    kl_balance: str | None = "square"
    binarize: str | None = None

    def __post_init__(self):
        checked = {
            "input_shape": check_sizes(
                "input_shape", self.input_shape, length=3
            ),
            "groups": check_sizes("groups", self.groups),
            **{
                name: check_integer(name, getattr(self, name), minimum)
                for minimum, names in (
                    (0, "padding num_flows kl_warmup_steps kl_constant_steps"),
                    (
                        1,
                        "latent_channels num_blocks cells_per_block "
                        "cells_per_group num_mixtures",
                    ),
                    # Half as many, rounded down, from each corner of a cell.
                    (2, "channels"),
                )
                for name in names.split()
            },
            "num_bits": check_integer("num_bits", self.num_bits, 1, 8),
            **{
                name: check_boolean(name, getattr(self, name))
                for name in (
                    "residual_posterior",
                    "squeeze_excite",
                    "batch_norm",
                )
            },
            "spectral_weight": check_number(
                "spectral_weight", self.spectral_weight, 0
            ),
            "kl_minimum": check_number("kl_minimum", self.kl_minimum, 0, 1),
        }
        if self.spectral_start is not None:
            checked["spectral_start"] = check_number(
                "spectral_start", self.spectral_start, above=0
            )
            if not checked["spectral_weight"]:
                raise ValueError(
                    "Expected `spectral_weight` above 0 where it is approached "
                    "from `spectral_start`. Received: spectral_weight="
                    f"{self.spectral_weight}"
                )
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        check_choice("kl_balance", self.kl_balance, BALANCES)
        check_choice("binarize", self.binarize, (None, "dynamic"))
        if self.binarize and self.likelihood != "bernoulli":
            raise ValueError(
                "Expected `binarize` with likelihood='bernoulli' only. "
                f"Received: binarize={self.binarize!r}, "
                f"likelihood={self.likelihood!r}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        factor = 2 ** (self.num_blocks + len(self.groups) - 1)
        if any(size % factor for size in self.padded_shape[:2]):
            raise ValueError(
                "Expected height and width, padding included, to be divisible "
                f"by {factor}: the picture is halved so often (`num_blocks`, "
                "and once for each scale after the first). Change `padding`, "
                f"`groups` or `num_blocks`. Received: input_shape="
                f"{self.input_shape}, padding={self.padding}, "
                f"num_blocks={self.num_blocks}, groups={self.groups}"
            )

    @property
    def padded_shape(self):
        """Height, width and channels inside the model."""
        height, width, channels = self.input_shape
        return (height + 2 * self.padding, width + 2 * self.padding, channels)

    @property
    def num_dimensions(self):
        """How many numbers a picture has, without the padding."""
        height, width, channels = self.input_shape
        return height * width * channels

    @property
    def num_outputs(self):
        """Parameters of the likelihood at each pixel."""
        channels = self.input_shape[-1]
        if self.likelihood == "bernoulli":
            return channels
        if self.likelihood == "normal":
            return 2 * channels
        # For each mixture: its logit; a mean and a scale for each channel; a
        # coefficient for each pair of channels.
        return self.num_mixtures * (
            1 + 2 * channels + channels * (channels - 1) // 2
        )

    @property
    def latent_shapes(self):
        """`(height, width, channels)` of each group, in the order of drawing.

        That is from the coarsest scale to the finest.
        """
        height, width, _ = self.padded_shape
        shapes = []
        for scale, count in enumerate(self.groups):
            factor = 2 ** (self.num_blocks + scale)
            shape = (height // factor, width // factor, self.latent_channels)
            shapes = [shape] * count + shapes
        return tuple(shapes)

    @property
    def num_latents(self):
        """How many latent variables a picture has."""
        return sum(h * w * c for h, w, c in self.latent_shapes)

    def count_parameters(self):
        """The number of trained parameters, computed without building a model.

        Norms of convolutions and the learned start are among them; singular
        vectors and moving averages, which are not trained, are not.
        """

        def conv(inputs, outputs, size=1, weight_norm=True, bias=True):
            return outputs * (inputs * size**2 + weight_norm + bias)

        def norm(channels):
            return 2 * channels * self.batch_norm

        def excite(channels):
            hidden = max(channels // 16, 4)
            return (
                2 * channels * hidden + hidden + channels
            ) * self.squeeze_excite

        def residual(c, down=False):
            out = 2 * c if down else c
            skip = conv(c, out) if down else 0
            cell = norm(c) + conv(c, out, 3) + norm(out) + conv(out, out, 3)
            return cell + excite(out) + skip

        def inverted(c, expansion, up=False):
            out, wide = (c // 2 if up else c), expansion * c
            skip = conv(c, out, bias=False) if up else 0
            cell = norm(c) + c * wide + norm(wide) + 25 * wide + norm(wide)
            return cell + wide * out + norm(out) + excite(out) + skip

        def flow():
            latent, wide = self.latent_channels, 6 * self.latent_channels
            cell = conv(latent, wide, 3, bias=False)
            cell += conv(1, wide, 5, bias=False) + conv(wide, latent)
            return 2 * cell

        c, latent = self.channels, self.latent_channels
        total = conv(self.input_shape[-1], c, 3)
        for _ in range(self.num_blocks):
            total += (self.cells_per_block - 1) * residual(c)
            total += residual(c, down=True)
            c *= 2
        for scale, count in enumerate(self.groups):
            cells = self.cells_per_group
            total += count * cells * (residual(c) + inverted(c, 6))
            # Combiner and sampler of the encoder, sampler and combiner of the
            # decoder, flows.
            total += count * (
                conv(c, c)
                + conv(c, 2 * latent, 3)
                + conv(c, 2 * latent)
                + conv(c + latent, c)
                + self.num_flows * flow()
            )
            if scale < len(self.groups) - 1:
                total += residual(c, down=True) + inverted(2 * c, 6, up=True)
                c *= 2
        # The first group that is drawn has no decoder cells in front, a fixed
        # prior, and a head where others have a combiner of equal size.
        total -= self.cells_per_group * inverted(c, 6) + conv(c, 2 * latent)
        height, width, _ = self.latent_shapes[0]
        total += height * width * c
        c = self.channels * 2**self.num_blocks
        for _ in range(self.num_blocks):
            total += inverted(c, 3, up=True)
            c //= 2
            total += (self.cells_per_block - 1) * inverted(c, 3)
        return total + conv(c, self.num_outputs, 3)

    def to_dict(self):
        """The fields as a dict that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


# The published commands, without their optimizer. Their steps of warm-up depend
# on data and batch size: 0.3 of all steps, given by the user.
_BINARY: dict[str, Any] = {
    "input_shape": (28, 28, 1),
    "padding": 2,
    "num_blocks": 2,
    "likelihood": "bernoulli",
    "binarize": "dynamic",
}
_FACES: dict[str, Any] = {
    "input_shape": (256, 256, 3),
    "groups": (16, 8, 4, 4, 4),
    "channels": 30,
    "num_flows": 2,
    "num_bits": 5,
    "spectral_start": 1.0,
}
PRESETS = {
    "mnist": NVAEConfig(
        **_BINARY, groups=(10, 5), channels=32, cells_per_block=3
    ),
    "cifar10": NVAEConfig(groups=(30,), channels=128, num_flows=1),
    "celeba_64": NVAEConfig(
        (64, 64, 3),
        groups=(20, 10, 5),
        channels=64,
        num_flows=1,
        spectral_weight=0.1,
    ),
    "imagenet_32": NVAEConfig(
        groups=(28,), channels=192, num_flows=1, spectral_start=1.0
    ),
    "celeba_hq_256": NVAEConfig(**_FACES),
    "ffhq_256": NVAEConfig(**_FACES, spectral_weight=0.1),
    "mnist_small": NVAEConfig(
        **_BINARY,
        groups=(3, 1),
        channels=8,
        latent_channels=8,
        cells_per_group=1,
    ),
    "digits": NVAEConfig(
        (8, 8, 1),
        groups=(2, 1),
        channels=8,
        latent_channels=4,
        cells_per_block=1,
        cells_per_group=1,
        likelihood="bernoulli",
        binarize="dynamic",
    ),
}
