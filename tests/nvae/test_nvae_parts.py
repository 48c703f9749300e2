"""NVAE: configurations, convolutions, distributions, flows, objective.

Post 7574.
"""

import dataclasses
import math

import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops
from kit import slow_on_jax, tensorflow_only, value

from blogkeras import backend
from blogkeras.nvae import objective
from blogkeras.nvae.cells import (
    BatchNorm,
    Enlargement,
    InvertedCell,
    Reduction,
    ResidualCell,
    SqueezeExcite,
)
from blogkeras.nvae.checks import check_pixels, warn_if_not_annealed
from blogkeras.nvae.convolution import (
    Convolution,
    SpectralPenalty,
    spectral_norm,
)
from blogkeras.nvae.distributions import (
    Bernoulli,
    DiscretizedLogisticMixture,
    Normal,
    NormalPixels,
    picture_numbers,
)
from blogkeras.nvae.flows import PairedFlow, ShiftFlow
from blogkeras.nvae.likelihood import importance_bound
from blogkeras.nvae.networks import Group
from blogkeras.nvae.presets import PRESETS, NVAEConfig
from blogkeras.state import NumberedDraws

# Of the published modules, built and counted.
PUBLISHED = {
    "mnist": (33_363_134, 14_400, 15),
    "cifar10": (130_852_480, 153_600, 30),
    "celeba_64": (153_281_364, 467_200, 35),
    "imagenet_32": (268_509_444, 143_360, 28),
    "celeba_hq_256": (330_798_664, 6_005_760, 36),
    "ffhq_256": (330_798_664, 6_005_760, 36),
    "mnist_small": (378_158, 1_664, 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_latents_of_presets(name):
    config = PRESETS[name]
    parameters, latents, groups = PUBLISHED[name]
    assert config.count_parameters() == parameters
    assert config.num_latents == latents
    assert len(config.latent_shapes) == sum(config.groups) == groups


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (30, 32, 3)}, "divisible by 4"),
        ({"input_shape": (28, 28, 1), "num_blocks": 3}, "divisible by 16"),
        ({"input_shape": (32, 32)}, "tuple of 3 integers"),
        ({"input_shape": 32}, "tuple of 3 integers"),
        ({"groups": ()}, "tuple of integers"),
        ({"groups": (3.0, 1)}, "integer"),
        ({"channels": 0}, "at least 2"),
        ({"padding": -1}, "at least 0"),
        ({"num_bits": 9}, "at most 8"),
        ({"likelihood": "gaussian"}, "'bernoulli'"),
        ({"kl_balance": "cubic"}, "'square'"),
        ({"binarize": "dynamic"}, "bernoulli"),
        ({"spectral_weight": -1.0}, "at least 0"),
        ({"spectral_weight": math.nan}, "finite"),
        ({"spectral_weight": 0.0, "spectral_start": 1.0}, "above 0"),
        ({"batch_norm": 1}, "True or False"),
        ({"kl_minimum": 2.0}, "at most 1"),
    ],
)
def test_configurations_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        NVAEConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "x", "message"),
    [
        ({"binarize": "dynamic"}, 255, "divide by 255"),
        ({"likelihood": "logistic_mixture"}, 255, "divide by 255"),
        ({"likelihood": "normal"}, 255, "divide by 255"),
        ({"likelihood": "normal"}, -1, "divide by 255"),
        ({"binarize": "dynamic"}, math.nan, "finite"),
    ],
)
def test_pixels_of_every_likelihood_are_checked(changes, x, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        check_pixels(np.full((1, *config.input_shape), x), config)
    some = np.full((1, *config.input_shape), 0.5)
    assert check_pixels(some, config) is some


def test_a_spectral_start_without_warm_up_warns():
    with pytest.warns(UserWarning, match="no effect.*kl_warmup_steps"):
        warn_if_not_annealed(PRESETS["imagenet_32"])
    for changes in ({"kl_warmup_steps": 1}, {"spectral_start": None}):
        warn_if_not_annealed(
            dataclasses.replace(PRESETS["imagenet_32"], **changes)
        )


def test_weight_norm_sets_the_norms():
    layer = Convolution(6, 3)
    layer.build((None, 8, 8, 4))
    log_norm = np.linspace(-1, 1, 6)
    layer.log_norm.assign(log_norm)
    norms = np.linalg.norm(value(layer.kernel()), axis=(0, 1))
    np.testing.assert_allclose(
        np.sqrt((norms**2).sum(0)), np.exp(log_norm), rtol=1e-4
    )


def test_the_norms_start_at_the_kernels():
    layer = Convolution(64, 3)
    layer.build((None, 8, 8, 32))
    np.testing.assert_allclose(
        value(layer.kernel()), value(layer.direction), rtol=0.03, atol=1e-3
    )
    # Uniform in ±1/√(9 · 32).
    direction = value(layer.direction)
    assert abs(direction).max() <= 1 / math.sqrt(288)
    assert direction.std() == pytest.approx(1 / math.sqrt(3 * 288), rel=0.02)


def test_a_halving_convolution_is_centred_on_even_pixels():
    layer = Convolution(1, 3, strides=2, weight_norm=False)
    layer.build((None, 6, 6, 1))
    kernel = np.arange(9.0).reshape(3, 3)
    layer.direction.assign(kernel[..., None, None])
    x = np.random.default_rng(0).normal(size=(6, 6))
    padded = np.pad(x, 1)
    expected = [
        [(padded[i : i + 3, j : j + 3] * kernel).sum() for j in range(0, 6, 2)]
        for i in range(0, 6, 2)
    ]
    outputs = value(layer(x[None, ..., None].astype("float32")))
    np.testing.assert_allclose(outputs[0, ..., 0], expected, rtol=1e-5)


def test_spectral_penalty_against_svd():
    keras.utils.set_random_seed(0)
    owner = keras.layers.Layer()
    layers = []
    for kwargs in (
        {"filters": 7, "kernel_size": 3},
        {"filters": 7, "kernel_size": 3},
        {"filters": 5, "kernel_size": 1, "weight_norm": False},
        {"filters": 4, "kernel_size": 5, "depthwise": True},
    ):
        layer = Convolution(**kwargs)
        layer.build((None, 8, 8, 4))
        layers.append(layer)
    penalty = SpectralPenalty(owner, layers)
    assert len(penalty.stacks) == 3
    for _ in range(25):
        total = penalty()
    expected = [
        np.linalg.svd(value(la.matrix()), compute_uv=False)[0] for la in layers
    ]
    by_vectors = []
    for stack, vectors in zip(penalty.stacks, penalty.vectors, strict=True):
        for layer, u, v in zip(stack, *map(value, vectors), strict=True):
            by_vectors.append(u @ value(layer.matrix()) @ v)
    np.testing.assert_allclose(
        by_vectors, sorted_like(penalty, expected, layers), rtol=0.01
    )
    assert float(value(total)) == pytest.approx(sum(expected), rel=0.01)


@pytest.mark.parametrize(("filters", "channels"), [(7, 2), (3, 9)])
def test_a_spectral_norm_is_the_svds(filters, channels):
    """Of matrices that are wide and tall; of zeros and of NaN."""
    layer = Convolution(filters, 1)
    layer.build((None, 4, 4, channels))
    expected = np.linalg.svd(value(layer.matrix()), compute_uv=False)[0]
    assert spectral_norm(layer) == pytest.approx(expected, rel=1e-5)
    layer.direction.assign(np.zeros(layer.direction.shape))
    assert spectral_norm(layer) == 0
    layer.direction.assign(np.full(layer.direction.shape, math.nan))
    assert math.isnan(spectral_norm(layer))


def test_a_step_makes_four_power_iterations():
    """As the published training does; here in NumPy, from the same vectors."""
    keras.utils.set_random_seed(0)
    layer = Convolution(7, 3)
    layer.build((None, 8, 8, 4))
    penalty = SpectralPenalty(keras.layers.Layer(), [layer])
    ((left, right),) = penalty.vectors
    u, matrix = value(left)[0], value(layer.matrix())
    for _ in range(4):
        v = matrix.T @ u
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
    total = float(value(penalty()))
    np.testing.assert_allclose(value(left)[0], u, atol=1e-5)
    np.testing.assert_allclose(value(right)[0], v, atol=1e-5)
    assert total == pytest.approx(u @ matrix @ v, rel=1e-5)


def test_spectral_penalty_of_zeros_recovers():
    """A kernel of zeros has no singular vectors; later it has them again."""
    keras.utils.set_random_seed(0)
    layer = Convolution(4, 3)
    layer.build((None, 8, 8, 2))
    penalty = SpectralPenalty(keras.layers.Layer(), [layer])
    direction = value(layer.direction)
    layer.direction.assign(np.zeros_like(direction))
    assert float(value(penalty())) == 0
    layer.direction.assign(direction)
    for _ in range(10):
        total = penalty()
    expected = np.linalg.svd(value(layer.matrix()), compute_uv=False)[0]
    assert float(value(total)) == pytest.approx(expected, rel=0.01)


def sorted_like(penalty, values, layers):
    order = [layers.index(la) for stack in penalty.stacks for la in stack]
    return [values[i] for i in order]


def test_enlargement_interpolates_from_corner_to_corner():
    layer = Enlargement()
    layer.build((None, 3, 4, 2))
    layer.convolution.direction.assign(np.ones((1, 1, 2, 1)))
    layer.convolution.log_norm.assign([math.log(math.sqrt(2))])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 4, 2)).astype("float32")
    rows, columns = np.linspace(0, 2, 6), np.linspace(0, 3, 8)
    image = x.sum(-1)[0]
    along = np.stack([np.interp(columns, np.arange(4), row) for row in image])
    expected = np.stack(
        [np.interp(rows, np.arange(3), column) for column in along.T], axis=1
    )
    np.testing.assert_allclose(
        value(layer(x))[0, ..., 0], expected, rtol=1e-4, atol=1e-5
    )


def convolve(layer, x, strides=1):
    """The convolution of a layer as sums of products over shifted pictures."""
    kernel = value(layer.kernel(), "float64")
    size = len(kernel)
    x = np.pad(x, [(0, 0), *[(size // 2,) * 2] * 2, (0, 0)])
    height, width = (n - size + 1 for n in x.shape[1:3])
    total = 0.0
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + height : strides, j : j + width : strides]
            if layer.depthwise:
                total = total + part * kernel[i, j, :, 0]
            else:
                total = total + part @ kernel[i, j]
    return total + value(layer.bias) if layer.use_bias else total


def normalize(norm, x):
    """A batch norm in training."""
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) / np.sqrt(variance + 1e-5)
    return x * value(norm.gamma) + value(norm.beta)


def silu(x):
    return x / (1 + np.exp(-x))


def squeeze_excite(layer, x):
    (w1, b1), (w2, b2) = (
        (value(dense.kernel), value(dense.bias))
        for dense in (layer.squeeze, layer.excite)
    )
    hidden = np.maximum(x.mean((1, 2)) @ w1 + b1, 0)
    return (1 / (1 + np.exp(-(hidden @ w2 + b2))))[:, None, None]


def disturbed(layer, shape):
    """The layer, built, without weights that are 0 or 1 at the start."""
    keras.utils.set_random_seed(0)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(1)
    for w in layer.trainable_variables:
        w.assign(value(w) + rng.normal(scale=0.3, size=w.shape))
    return layer, rng.normal(size=shape).astype("float32")


def check_layer(layer, x, expected, **kwargs):
    np.testing.assert_allclose(
        value(layer(x, **kwargs)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("channels", "hidden"), [(80, 5), (6, 4)])
def test_squeeze_and_excitation(channels, hidden):
    layer, x = disturbed(SqueezeExcite(), (2, 3, 4, channels))
    assert layer.squeeze.units == hidden
    check_layer(layer, x, squeeze_excite(layer, x))


def halved(layer, x):
    """The shortcut: the four corners in the published order."""
    x = silu(x)
    corners = x[:, ::2, ::2], x[:, 1::2, 1::2], x[:, ::2, 1::2], x[:, 1::2, ::2]
    return np.concatenate(
        [
            convolve(part, corner)
            for part, corner in zip(layer.parts, corners, strict=True)
        ],
        axis=-1,
    )


def test_a_reduction_takes_the_corners_in_the_published_order():
    layer, x = disturbed(Reduction(), (2, 4, 6, 3))
    assert [part.filters for part in layer.parts] == [1, 1, 1, 3]
    check_layer(layer, x, halved(layer, x))


@slow_on_jax
@pytest.mark.parametrize("down", [False, True])
def test_a_residual_cell(down):
    cell, x = disturbed(ResidualCell(down=down), (3, 4, 6, 4))
    h = silu(normalize(cell.norm_1, x))
    h = silu(normalize(cell.norm_2, convolve(cell.conv_1, h, 1 + down)))
    h = convolve(cell.conv_2, h)
    h = 0.1 * squeeze_excite(cell.scale, h) * h
    expected = h + (halved(cell.skip, x) if down else x)
    check_layer(cell, x, expected, training=True)


def test_an_inverted_cell():
    cell, x = disturbed(InvertedCell(expansion=2), (3, 4, 6, 4))
    h = convolve(cell.widen, normalize(cell.norm_1, x))
    h = convolve(cell.depthwise, silu(normalize(cell.norm_2, h)))
    h = convolve(cell.narrow, silu(normalize(cell.norm_3, h)))
    h = normalize(cell.norm_4, h)
    expected = x + 0.1 * squeeze_excite(cell.scale, h) * h
    check_layer(cell, x, expected, training=True)


@pytest.mark.parametrize(
    "options", [{}, {"strides": 2}, {"depthwise": True}], ids=str
)
def test_channels_are_last_whatever_keras_is_told(options):
    size = 5 if "depthwise" in options else 3
    layer, x = disturbed(Convolution(4, size, **options), (2, 4, 6, 4))
    expected = convolve(layer, x, options.get("strides", 1))
    keras.config.set_image_data_format("channels_first")
    try:
        check_layer(layer, x, expected)
    finally:
        keras.config.set_image_data_format("channels_last")


@slow_on_jax
def test_a_cell_doubles_as_if_it_doubled_first():
    """Published: rows and columns are repeated before everything else."""
    keras.utils.set_random_seed(0)
    cell = InvertedCell(expansion=3, up=True)
    cell.build((None, 4, 6, 8))
    x = np.random.default_rng(0).normal(size=(5, 4, 6, 8)).astype("float32")
    outputs = value(cell(x, training=True))
    statistics = [value(w) for w in cell.non_trainable_variables]
    h = x.repeat(2, axis=1).repeat(2, axis=2)
    h = cell.widen(cell.norm_1(h, training=True))
    h = ops.silu(cell.norm_2(h, training=True))
    h = ops.silu(cell.norm_3(cell.depthwise(h), training=True))
    h = cell.norm_4(cell.narrow(h), training=True)
    expected = value(cell.skip(x) + 0.1 * cell.scale(h) * h)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
    # The same step again: what moved then by d from the start is 1.95 d away.
    for w, once in zip(cell.non_trainable_variables, statistics, strict=True):
        start = 1.0 if "variance" in w.path else 0.0
        np.testing.assert_allclose(
            value(w) - start, 1.95 * (once - start), rtol=1e-3, atol=1e-5
        )


@slow_on_jax
@pytest.mark.parametrize("channels", [16, 5])
def test_batch_norm_is_kerass(channels):
    """Values, gradients, state and its use; two ways by channels on a CPU."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(1, 2, size=(2, 3, 4, 4, channels)).astype("float32")
    found = []
    for cls in (BatchNorm, keras.layers.BatchNormalization):
        norm = cls(momentum=0.9)
        norm.build(x.shape)
        norm.gamma.assign(np.linspace(-1, 2, channels))
        norm.beta.assign(np.linspace(1, 0, channels))
        arguments = [x, value(norm.gamma), value(norm.beta)]

        def loss(arguments, norm=norm):
            x, *values = arguments
            mapping = zip((norm.gamma, norm.beta), values, strict=True)
            with keras.StatelessScope(list(mapping)):
                return ops.sum(norm(x, training=True) * weight), None

        _, gradients = backend.value_and_grad(loss, arguments)
        found.append(
            [
                norm(x, training=True),
                *gradients,
                norm.moving_mean,
                norm.moving_variance,
                norm(x, training=False),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(
            value(ours), value(theirs), rtol=1e-4, atol=1e-5
        )


def test_depthwise_gradients_are_kerass():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 3, 4, 5, 6)).astype("float32")
    kernel = rng.normal(size=(5, 5, 6, 1)).astype("float32")
    found = []
    for convolve in (
        backend.depthwise_convolution,
        lambda x, k: ops.depthwise_conv(x, k, padding="same"),
    ):

        def loss(arguments, convolve=convolve):
            y = convolve(*arguments)
            return ops.sum(y * weight), y

        (_, y), gradients = backend.value_and_grad(loss, [x, kernel])
        found.append([y, *gradients])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(
            value(ours), value(theirs), rtol=1e-4, atol=1e-4
        )


def test_kl_against_monte_carlo_and_the_post():
    rng = np.random.default_rng(0)
    q = Normal(*rng.normal(size=(2, 3)))
    p = Normal(*rng.normal(size=(2, 3)))
    noise = rng.normal(size=(200_000, 3)).astype("float32")
    z = q.sample(noise)
    log_ratio = value(q.log_prob(z) - p.log_prob(z))
    error = log_ratio.std(0) / math.sqrt(len(noise))
    kl = value(q.kl(p))
    assert (abs(log_ratio.mean(0) - kl) < 4 * error).all()
    # The post's formula.
    shift = value(q.mean) - value(p.mean)
    ratio = (value(q.scale) / value(p.scale)) ** 2
    expected = (shift**2 / value(p.scale) ** 2 + ratio - np.log(ratio) - 1) / 2
    np.testing.assert_allclose(kl, expected, rtol=1e-4)
    # Against another library.
    np.testing.assert_allclose(
        value(q.log_prob(z))[:9],
        scipy.stats.norm.logpdf(value(z)[:9], value(q.mean), value(q.scale)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_temperature_multiplies_the_scale():
    mean, log_scale = np.asarray([[0.5, -2.0], [1.0, -1.0]], "float32")
    noise = np.asarray([[1.0, -2.0], [0.0, 3.0]], "float32")
    expected = 5 * np.tanh(mean / 5)
    scale = np.exp(5 * np.tanh(log_scale / 5)) + 0.01
    found = value(Normal(mean, log_scale).sample(noise, 0.25))
    np.testing.assert_allclose(found, expected + noise * scale / 4, rtol=1e-5)


def test_no_change_no_kl():
    rng = np.random.default_rng(0)
    p = Normal(*rng.normal(size=(2, 30)))
    assert (abs(value(p.kl(p))) < 1e-6).all()


@pytest.mark.parametrize("residual", [True, False])
def test_the_posterior_is_relative_to_the_prior(residual):
    """N(μ + Δμ, σ² Δσ²) before the clamp; equal to the prior at Δ = 0."""
    keras.utils.set_random_seed(0)
    config = dataclasses.replace(CONFIG, residual_posterior=residual)
    group = Group(config)
    group.build((None, 4, 4, 6))
    h, features = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 6))
    h, features = h.astype("float32"), features.astype("float32")
    prior, posterior = group.distributions(h, features)
    mean, log_scale = np.split(value(group.prior(ops.elu(h))), 2, -1)
    met = features + value(group.combine_features(h))
    change, log_change = np.split(value(group.posterior(met)), 2, -1)
    for distribution, m, s in (
        (prior, mean, log_scale),
        (
            posterior,
            residual * mean + change,
            residual * log_scale + log_change,
        ),
    ):
        np.testing.assert_allclose(
            value(distribution.mean), 5 * np.tanh(m / 5), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            value(distribution.scale),
            np.exp(5 * np.tanh(s / 5)) + 0.01,
            rtol=1e-4,
        )
    group.posterior.direction.assign(np.zeros(group.posterior.direction.shape))
    prior, posterior = group.distributions(h, features)
    kl = abs(value(posterior.kl(prior))).max()
    assert kl < 1e-6 if residual else kl > 0.01


def test_normal_stays_finite():
    extremes = np.asarray([-1e30, -300, 0, 300, 1e30], "float32")
    q, p = Normal(extremes, extremes), Normal(-extremes, -extremes)
    assert np.isfinite(value(q.kl(p))).all()
    assert value(q.scale)[2] == pytest.approx(1.01)


def mixture(bits, channels, rows=4, mixtures=3, seed=0, repeats=1):
    rng = np.random.default_rng(seed)
    parameters = 1 + 2 * channels + channels * (channels - 1) // 2
    parameters = rng.normal(size=(rows, parameters * mixtures))
    parameters = parameters.astype("float32").repeat(repeats, axis=0)
    return DiscretizedLogisticMixture(parameters, channels, mixtures, bits)


@pytest.mark.parametrize("bits", [5, 8])
def test_mixture_sums_to_one_over_a_channel(bits):
    distribution = mixture(bits, 1)
    levels = np.arange(2**bits) / (2**bits - 1)
    x = np.repeat(levels[:, None, None], 4, 1).astype("float32")
    total = np.exp(value(distribution.log_prob(x), "float64")).sum(0)
    np.testing.assert_allclose(total, 1, atol=1e-4)


def test_mixture_sums_to_one_over_a_pixel():
    levels = np.arange(8) / 7
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
    x = np.repeat(grid, 4, 1).astype("float32")
    log_prob = value(mixture(3, 3).log_prob(x), "float64")
    np.testing.assert_allclose(np.exp(log_prob).sum(0), 1, atol=1e-4)


@pytest.mark.parametrize("log_scale", [-50.0, 0.0, 80.0])
def test_mixture_stays_finite(log_scale):
    parameters = np.zeros((256, 3), "float32")
    parameters[:, 1], parameters[:, 2] = 3.0, log_scale
    distribution = DiscretizedLogisticMixture(parameters, 1, 1)
    x = np.arange(256, dtype="float32")[:, None] / 255
    assert np.isfinite(value(distribution.log_prob(x))).all()


def frequencies(distribution, draws, temperature=1.0, seed=1):
    """How often each value was drawn, and the probabilities of all values."""
    levels = distribution.levels + 1
    values = np.arange(levels) / (levels - 1)
    channels = distribution.channels
    grid = np.stack(np.meshgrid(*[values] * channels, indexing="ij"), -1)
    grid = grid.reshape(-1, 1, channels).astype("float32")
    log_prob = value(distribution.log_prob(grid), "float64")[:, 0]
    drawn = value(
        distribution.sample(keras.random.SeedGenerator(seed), temperature)
    )
    steps = np.rint(drawn * (levels - 1)).astype(int)
    np.testing.assert_allclose(drawn, steps / (levels - 1), atol=1e-6)
    index = np.ravel_multi_index(steps.T, [levels] * channels)
    return np.bincount(index, minlength=len(grid)), np.exp(log_prob)


@slow_on_jax
@pytest.mark.parametrize(("bits", "channels"), [(5, 1), (2, 3)])
def test_samples_of_the_mixture_follow_it(bits, channels):
    draws = 20_000
    one = mixture(bits, channels, rows=1)
    one.sample = mixture(bits, channels, rows=1, repeats=draws).sample
    counts, probabilities = frequencies(one, draws)
    expected = probabilities / probabilities.sum() * draws
    usual = expected >= 5
    counts = np.append(counts[usual], counts[~usual].sum())
    expected = np.append(expected[usual], expected[~usual].sum())
    kept = expected > 0
    assert scipy.stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3


def test_temperature_narrows_and_sharpens_the_mixture():
    draws = 4000
    parameters = np.zeros((draws, 6), "float32")
    # Two components: logits 1 and 0, means −0.5 and 0.5, log scales −3.
    parameters[:, 0], parameters[:, 2], parameters[:, 3] = 1, -0.5, 0.5
    parameters[:, 4:] = -3
    distribution = DiscretizedLogisticMixture(parameters, 1, 2)
    shares, spreads = [], []
    for temperature in (1.0, 0.5, 0.1):
        x = 2 * value(distribution.sample(3, temperature))[:, 0] - 1
        shares.append((x < 0).mean())
        spreads.append(x[x < 0].std())
    # softmax([1, 0] / t); the deviation of a logistic is π s / √3.
    np.testing.assert_allclose(
        shares, [0.731, 0.881, 1.0], atol=3 * 0.5 / math.sqrt(draws)
    )
    deviation = math.pi * math.exp(-3) / math.sqrt(3)
    np.testing.assert_allclose(
        spreads[:2], [deviation, deviation / 2], rtol=0.05
    )
    mode = value(distribution.sample(3, 0.0))
    assert (mode == round(0.25 * 255) / 255).all()


def test_the_mean_of_a_mixture():
    """Σ π_k m_k; a channel's mean is linear in the means before it."""
    rng = np.random.default_rng(0)
    rows = rng.normal(scale=0.4, size=(2, 10, 2)).astype("float32")
    logits, means, coefficients = rows[:, 0], rows[:, 1:4], rows[:, 7:]
    a, b, c = np.moveaxis(np.tanh(coefficients), 1, 0)
    red, green, blue = np.moveaxis(means, 1, 0)
    green = green + a * red
    blue = blue + b * red + c * green
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [(weights * x).sum(-1) for x in (red, green, blue)]
    distribution = DiscretizedLogisticMixture(rows.reshape(2, 20), 3, 2)
    np.testing.assert_allclose(
        value(distribution.mean()),
        (np.clip(np.stack(expected, -1), -1, 1) + 1) / 2,
        rtol=1e-5,
    )
    far = np.asarray([[0, 5, 0]], "float32")
    assert value(DiscretizedLogisticMixture(far, 1, 1).mean()) == 1


def test_bernoulli():
    logits = np.asarray([[-2.0, 0.5], [3.0, 0.0]], "float32")
    x = np.asarray([[0.0, 1.0], [1.0, 1.0]], "float32")
    distribution = Bernoulli(logits)
    p = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(
        value(distribution.log_prob(x)),
        scipy.stats.bernoulli.logpmf(x, p).sum(-1),
        rtol=1e-5,
    )
    np.testing.assert_allclose(value(distribution.mean()), p, rtol=1e-5)
    many = Bernoulli(np.repeat(logits[:1], 20_000, 0))
    drawn = value(many.sample(1)).mean(0)
    np.testing.assert_allclose(drawn, p[0], atol=0.015)
    # At half the temperature the logits are twice as large.
    drawn = value(many.sample(1, 0.5)).mean(0)
    expected = 1 / (1 + np.exp(-2 * logits[0]))
    np.testing.assert_allclose(drawn, expected, atol=0.015)
    np.testing.assert_array_equal(value(many.sample(1, 0.0))[0], [0, 1])


def test_normal_pixels_are_a_density_of_the_pixels():
    distribution = NormalPixels(np.asarray([[0.3, -1.0]], "float32"))
    x = np.linspace(-3, 4, 4001, dtype="float32")[:, None, None]
    density = np.exp(value(distribution.log_prob(x), "float64"))[:, 0]
    assert np.trapezoid(density, x[:, 0, 0]) == pytest.approx(1, abs=1e-3)


def test_normal_pixels_are_drawn():
    """N(m, s²) of pixels in [−1, 1]; t multiplies s; clipped at the ends."""
    draws = 20_000
    row = np.asarray([0.3, -9.0, -2.0, -2.0], "float32")
    distribution = NormalPixels(np.repeat(row[None], draws, 0))
    mean = (5 * math.tanh(0.06) + 1) / 2
    scale = (math.exp(5 * math.tanh(-0.4)) + 0.01) / 2
    np.testing.assert_allclose(
        value(distribution.mean())[0], [mean, 0], rtol=1e-5
    )
    for temperature in (1.0, 0.5):
        x = value(distribution.sample(1, temperature), "float64")
        error = temperature * scale / math.sqrt(draws)
        assert x[:, 0].mean() == pytest.approx(mean, abs=4 * error)
        assert x[:, 0].std() == pytest.approx(temperature * scale, rel=0.03)
        assert (x[:, 1] == 0).all()


def test_a_batch_is_known_by_its_pictures():
    rng = np.random.default_rng(0)
    x = (rng.random((400, 4, 4, 1)) < 0.5).astype("float32")
    x = np.unique(x, axis=0)

    def numbers(x):
        return value(ops.sum(picture_numbers(x), axis=(1, 2, 3)))

    assert len(np.unique(numbers(x))) == len(x)
    grey = np.linspace(0, 1, 256)[:, None, None, None]
    assert len(np.unique(numbers(grey))) == 256


@tensorflow_only
def test_two_replicas_balance_and_number_one_batch():
    """γ by the KL terms of the whole batch; draws by all of its pictures."""
    import tensorflow as tf
    import toy

    config = dataclasses.replace(CONFIG, groups=(1, 1))
    rng = np.random.default_rng(0)
    kl = rng.normal(size=(6, 2)).astype("float32") * [1, 3]
    x = rng.random((6, 4, 4, 1)).astype("float32")
    strategy = toy.mirrored()
    with strategy.scope():
        draws = NumberedDraws(keras.layers.Layer(), 3)

    def replica(kl, x):
        seed = draws.evaluation(picture_numbers(x)).next()
        return objective.balance(config, kl, 0.5), tf.cast(seed, "int64")

    def parts(array):
        array = array.astype("float32")
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(
                array[3 * context.replica_id_in_sync_group :][:3]
            )
        )

    results = tf.function(lambda *args: strategy.run(replica, args))(
        parts(kl), parts(x)
    )
    size = (abs(kl).mean(0) + 0.01) / [1, 4]
    seed = value(draws.evaluation(picture_numbers(x)).next())
    for gamma, number in zip(
        *map(strategy.experimental_local_results, results), strict=True
    ):
        np.testing.assert_allclose(gamma, size / size.mean(), rtol=1e-5)
        np.testing.assert_array_equal(number, seed)


@pytest.mark.parametrize("backward", [False, True])
def test_flows_see_what_comes_before(backward):
    """The Jacobian is triangular with ones: its determinant is 1."""
    keras.utils.set_random_seed(0)
    flow = ShiftFlow(backward)
    flow.build((None, 3, 3, 2))
    # Far from the small start.
    flow.convolutions[-1].log_norm.assign([1.0, 1.0])
    z = np.random.default_rng(0).normal(size=(3, 3, 2)).astype("float32")
    steps = np.eye(18, dtype="float32").reshape(18, 3, 3, 2)
    width = 0.02
    jacobian = value(flow(z + width * steps)) - value(flow(z - width * steps))
    jacobian = jacobian.reshape(18, 18).T / (2 * width)
    order = np.arange(18).reshape(9, 2)
    order = order[::-1].ravel() if backward else order.ravel()
    jacobian = jacobian[np.ix_(order, order)]
    np.testing.assert_allclose(np.triu(jacobian), np.eye(18), atol=1e-4)
    below = abs(np.tril(jacobian, -1)) > 1e-3
    assert below.sum() > 60, "the flow looks at something"
    assert np.linalg.slogdet(jacobian)[1] == pytest.approx(0, abs=1e-3)


def undo(flow, z):
    """The input of a `ShiftFlow` that gives z: x ← z + μ(x), from x = z on.

    After t iterations the first t variables are right.
    """
    x = z
    for _ in range(z[0].size):
        x = z + value(flow.shift(x))
    return x


def test_flows_are_undone():
    keras.utils.set_random_seed(0)
    flow = PairedFlow()
    flow.build((None, 4, 4, 3))
    for part in flow.flows:
        part.convolutions[-1].log_norm.assign([0.5] * 3)
    z = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype("float32")
    outputs = value(flow(z))
    assert abs(outputs - z).max() > 0.1
    for part in reversed(flow.flows):
        outputs = undo(part, outputs)
    np.testing.assert_allclose(outputs, z, atol=1e-4)


CONFIG = NVAEConfig(
    (8, 8, 1),
    groups=(2, 1),
    likelihood="bernoulli",
    kl_warmup_steps=100,
    kl_constant_steps=10,
    spectral_start=1.0,
)


@pytest.mark.parametrize(
    ("step", "beta", "weight"),
    [
        (0, 1e-4, 1.0),
        (10, 1e-4, 1.0),
        (60, 0.5, 0.1),
        (110, 1.0, 0.01),
        (1000, 1.0, 0.01),
    ],
)
def test_warm_up(step, beta, weight):
    found = objective.kl_weight(CONFIG, ops.convert_to_tensor(step, "int32"))
    assert float(found) == pytest.approx(beta)
    found = objective.spectral_weight(CONFIG, found)
    assert float(found) == pytest.approx(weight, rel=1e-3)


def test_balance():
    kl = np.asarray([[1.0, 2.0, -3.0, 0.0], [3.0, 2.0, 5.0, 0.0]], "float32")
    size = np.asarray([2.01, 2.01, 4.01, 0.01])
    groups = dataclasses.replace(CONFIG, groups=(3, 1))
    for balance, alpha in (
        ("square", [1, 4 / 3, 4 / 3, 4 / 3]),
        ("linear", [1, 2, 2, 2]),
        ("sqrt", [1, *[math.sqrt(2)] * 3]),
        ("equal", [1, 1, 1, 1]),
    ):
        config = dataclasses.replace(groups, kl_balance=balance)
        expected = size / alpha
        found = value(objective.balance(config, kl, 0.5))
        np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-5)
    done = value(objective.balance(groups, kl, ops.ones(())))
    np.testing.assert_array_equal(done, 1)
    config = dataclasses.replace(groups, kl_balance=None)
    np.testing.assert_array_equal(value(objective.balance(config, kl, 0.5)), 1)


def test_importance_bound_of_a_linear_gaussian_model():
    """x = z + noise, z and noise standard normal: x is N(0, 2)."""
    rows = 4000
    rng = np.random.default_rng(0)
    x = (rng.normal(size=rows) * math.sqrt(2)).astype("float32")
    exact = scipy.stats.norm.logpdf(x, 0, math.sqrt(2))

    def bound(k, mean, scale):
        noise = ops.convert_to_tensor(
            rng.normal(size=(k, rows)).astype("float32")
        )

        def log_weight(i):
            z = mean * x + scale * noise[i]
            log_w = -ops.square(z) / 2 - ops.square(x - z) / 2
            log_q = -ops.square(noise[i]) / 2 - math.log(scale)
            log_w = log_w - log_q - math.log(2 * math.pi) / 2
            return log_w, log_w

        return map(value, importance_bound(log_weight, k, rows))

    # With the exact posterior N(x / 2, 1 / 2) each weight is p(x).
    for k in (1, 7):
        iwae, elbo = bound(k, 0.5, math.sqrt(0.5))
        np.testing.assert_allclose(iwae, exact, atol=1e-4)
        np.testing.assert_allclose(elbo, exact, atol=1e-4)
    # With another one the bound rises with k and stays below.
    means = []
    for k in (1, 4, 16, 256):
        iwae, elbo = bound(k, 0.2, 1.0)
        means.append((iwae - exact).mean())
        error = (iwae - exact).std() / math.sqrt(rows)
        assert means[-1] < 3 * error
    assert (np.diff(means) > 0).all()
    assert means[-1] > -0.01
    # One weight: its expectation is known. E log w − log p(x) = −KL(q, p(z|x)).
    shift = 0.2 * x - 0.5 * x
    kl = (1 / 0.5 - 1 - math.log(1 / 0.5)) / 2 + shift**2 / (2 * 0.5)
    assert means[0] == pytest.approx(-kl.mean(), abs=0.05)
