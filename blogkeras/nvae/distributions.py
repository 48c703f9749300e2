"""Distributions of the latent variables and of the pixels.

Small objects around tensors; everything is computed in float32.
"""

import math

import numpy as np
from keras import ops

from blogkeras import backend
from blogkeras.state import draw_rows


def soft_clamp(x, limit=5.0):
    """limit · tanh(x / limit): about x where it is small, within ±limit."""
    return limit * ops.tanh(x / limit)


class Normal:
    """Independent normal distributions N(μ, σ²), from a network's outputs.

        μ = 5 tanh(mean / 5),  σ = exp(5 tanh(log_scale / 5)) + 0.01

    Args:
        mean: Tensor.
        log_scale: Tensor of the same shape.
    """

    def __init__(self, mean, log_scale):
        self.mean = soft_clamp(ops.cast(mean, "float32"))
        log_scale = ops.cast(log_scale, "float32")
        self.scale = ops.exp(soft_clamp(log_scale)) + 1e-2

    def sample(self, noise, temperature=1.0):
        """μ + temperature · σ · noise."""
        return self.mean + (temperature * self.scale) * noise

    def log_prob(self, x):
        """log N(x; μ, σ²) of each variable."""
        u = (x - self.mean) / self.scale
        return -0.5 * (ops.square(u) + math.log(2 * math.pi)) - ops.log(
            self.scale
        )

    def kl(self, prior):
        """KL divergence of this from a prior, of each variable.

        With this as N(μ + Δμ, σ² Δσ²) and the prior as N(μ, σ²), as the post
        has it:

            KL = ½ (Δμ²/σ² + Δσ² − log Δσ² − 1)
        """
        shift = (self.mean - prior.mean) / prior.scale
        ratio = self.scale / prior.scale
        return 0.5 * (ops.square(shift) + ops.square(ratio) - 1) - ops.log(
            ratio
        )


class Bernoulli:
    """Independent binary pixels.

    Args:
        parameters: Logits, `(..., channels)`.
    """

    def __init__(self, parameters):
        self.logits = ops.cast(parameters, "float32")

    def log_prob(self, x):
        """`(..., )`: summed over the channels."""
        return ops.sum(x * self.logits - ops.softplus(self.logits), axis=-1)

    def mean(self):
        return ops.sigmoid(self.logits)

    def sample(self, seed, temperature=1.0):
        """Pixels 0 and 1, of logits that are divided by the temperature.

        A temperature of 0 gives the more probable value.
        """
        # logits / temperature > threshold, multiplied by the temperature, which
        # may be 0.
        u = backend.uniform(ops.shape(self.logits), 1e-7, 1, seed=seed)
        threshold = ops.log(u) - ops.log1p(-u)
        return ops.cast(self.logits > temperature * threshold, "float32")


class NormalPixels:
    """Independent normal pixels.

    Densities are of the pixels in [0, 1]; the normal distributions are of
    pixels scaled to [−1, 1], as `Normal` has them.

    Args:
        parameters: `(..., 2 · channels)`: means, then logarithms of scales.
    """

    def __init__(self, parameters):
        self.normal = Normal(*ops.split(parameters, 2, axis=-1))

    def log_prob(self, x):
        log_prob = self.normal.log_prob(2 * x - 1)
        return ops.sum(log_prob + math.log(2), axis=-1)

    def mean(self):
        return (ops.clip(self.normal.mean, -1, 1) + 1) / 2

    def sample(self, seed, temperature=1.0):
        noise = backend.normal(ops.shape(self.normal.mean), seed=seed)
        x = self.normal.sample(noise, temperature)
        return (ops.clip(x, -1, 1) + 1) / 2


class DiscretizedLogisticMixture:
    """Pixels with 2^bits values, from a mixture of logistic distributions.

    All channels of a pixel come from one component; the mean of a channel is
    linear in the channels before it, with coefficients in (−1, 1). A value has
    the probability of the interval around it; the lowest and the highest have
    that of all below and above. Scales are e⁻⁷ at least.

    Args:
        parameters: `(..., num_mixtures · (1 + 2 C + C (C − 1) / 2))` for C
            channels.
        channels: Integer C.
        num_mixtures: Integer.
        num_bits: Integer.

    Reference:
        [Salimans et al., 2017](https://arxiv.org/abs/1701.05517)
    """

    def __init__(self, parameters, channels, num_mixtures=10, num_bits=8):
        self.channels = channels
        self.levels = 2**num_bits - 1
        parameters = ops.cast(parameters, "float32")
        parameters = ops.reshape(
            parameters, (*ops.shape(parameters)[:-1], -1, num_mixtures)
        )
        # Lists of `(..., mixtures)` for the channels: slicing them from one
        # tensor would add a tensor of zeros for each to the gradient.
        self.logits, *rows = ops.unstack(parameters, axis=-2)
        self.means = rows[:channels]
        self.log_scales = [
            ops.maximum(x, -7.0) for x in rows[channels : 2 * channels]
        ]
        self.coefficients = [ops.tanh(x) for x in rows[2 * channels :]]

    def _mean(self, channel, before, means, coefficients):
        """Mean of a channel, given the list of the channels before it."""
        mean = means[channel]
        first = channel * (channel - 1) // 2
        for i, x in enumerate(before):
            mean = mean + coefficients[first + i] * x
        return mean

    def log_prob(self, x):
        """`(..., )`: of all channels of a pixel in [0, 1]."""
        x = 2 * x - 1
        half = 1 / self.levels
        channels = [x[..., i, None] for i in range(self.channels)]
        total = ops.log_softmax(self.logits, axis=-1)
        for i, value in enumerate(channels):
            mean = self._mean(i, channels[:i], self.means, self.coefficients)
            inverse = ops.exp(-self.log_scales[i])
            above = (value + half - mean) * inverse
            below = (value - half - mean) * inverse
            # log σ(above) and log (1 − σ(below))
            log_upper, log_lower = -ops.softplus(-above), -ops.softplus(below)
            # log (σ(a) − σ(b))
            #     = log σ(a) + log (1 − σ(b)) + log (1 − e^(b − a))
            # For very wide scales the width rounds to 0, whose logarithm is
            # infinite.
            width = ops.maximum(2 * half * inverse, 1e-30)
            inside = log_upper + log_lower + ops.log(-ops.expm1(-width))
            inside = ops.where(value > 1 - half, log_lower, inside)
            total += ops.where(value < half - 1, log_upper, inside)
        return ops.logsumexp(total, axis=-1)

    def mean(self):
        """The mean of the continuous mixture, clipped to [0, 1]."""
        # Keras's softmax warns where there is one component only.
        weights = ops.exp(ops.log_softmax(self.logits, axis=-1))
        before = []
        for i in range(self.channels):
            before.append(self._mean(i, before, self.means, self.coefficients))
        mean = ops.stack([ops.sum(weights * x, axis=-1) for x in before], -1)
        return (ops.clip(mean, -1, 1) + 1) / 2

    def sample(self, seed, temperature=1.0):
        """Pixels in [0, 1], multiples of 1 / (2^bits − 1).

        The temperature multiplies scales, and divides the mixture's logits: 0
        is the most probable component at its mean.
        """
        shape = ops.shape(self.logits)
        u = backend.uniform(shape, 1e-7, 1 - 1e-7, seed=seed)
        # logits / temperature + Gumbel noise, multiplied by the temperature,
        # which may be 0.
        gumbel = -ops.log(-ops.log(u))
        component = ops.argmax(self.logits + temperature * gumbel, axis=-1)
        chosen = ops.one_hot(component, self.logits.shape[-1])
        means, log_scales, coefficients = (
            [ops.sum(x * chosen, axis=-1) for x in rows]
            for rows in (self.means, self.log_scales, self.coefficients)
        )
        shape = (*shape[:-1], self.channels)
        u = backend.uniform(shape, 1e-7, 1 - 1e-7, seed=seed)
        noise = temperature * (ops.log(u) - ops.log1p(-u))
        values = []
        for i in range(self.channels):
            x = self._mean(i, values, means, coefficients)
            x = x + ops.exp(log_scales[i]) * noise[..., i]
            # The next channel depends on the rounded value, as in `log_prob`.
            x = ops.round((ops.clip(x, -1, 1) + 1) / 2 * self.levels)
            values.append(2 * x / self.levels - 1)
        return (ops.stack(values, axis=-1) + 1) / 2


def pixels(config, parameters):
    """The distribution of the pixels by a configuration."""
    if config.likelihood == "bernoulli":
        return Bernoulli(parameters)
    if config.likelihood == "normal":
        return NormalPixels(parameters)
    return DiscretizedLogisticMixture(
        parameters, config.input_shape[-1], config.num_mixtures, config.num_bits
    )


def picture_sum(log_prob):
    """`(batch, height, width)` summed over the pixels."""
    return ops.sum(log_prob, axis=(1, 2))


def noise(seed, rows=False):
    """Standard normal noise by shapes; `rows`: of a batch replicas share."""

    def draw(shape):
        if rows:
            return draw_rows(backend.normal, shape, seed)
        return backend.normal(shape, seed=seed)

    return draw


def picture_numbers(x):
    """Integers by which a batch of pictures is known: `(batch, ...)`, int32.

    Their sum tells batches apart: each place of a pixel has a factor of its
    own, with all 32 bits mixed.

    Args:
        x: `(batch, height, width, channels)` in [0, 1].
    """
    shape = x.shape[1:]
    places = np.arange(1, math.prod(shape) + 1, dtype="uint32")
    places *= np.uint32(0x9E3779B9)  # 2³² / the golden ratio
    places ^= places >> np.uint32(15)
    steps = ops.cast(ops.round(ops.cast(x, "float32") * 65535), "int32")
    return steps * places.view("int32").reshape(shape)
