"""Options of rounding: symmetric levels, noise, several stages (post 9826)."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import SLOW_FILE_ON_JAX, slow_on_jax, value

from blogkeras import backend
from blogkeras.quantization import (
    VQVAE,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    ResidualFiniteScalarQuantizer,
)

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
Z = RNG.normal(size=(6, 4, 3)).astype("float32")
LEVELS = [2, 4, 5]


def slope(layer, z, **call):
    def output(z):
        with keras.StatelessScope():
            return ops.sum(layer(z, **call)), None

    return value(backend.value_and_grad(output, z)[1])


def test_symmetric_levels_are_equally_spaced():
    layer = FiniteScalarQuantizer(LEVELS, symmetric=True)
    z = 2 * np.repeat(Z, 50, axis=1)
    output, codes = layer(z, return_codes=True)
    output, z = value(output), z.astype("f8")
    top = np.array(LEVELS) - 1
    bounded = top * (np.tanh(z) + 1) / 2
    digits = np.round(bounded)
    assert np.abs(np.abs(bounded - digits) - 0.5).min() > 1e-6
    np.testing.assert_allclose(output, 2 * digits / top - 1, atol=1e-6)
    np.testing.assert_array_equal(value(codes), digits @ [1, 2, 8])
    for axis, levels in enumerate(LEVELS):
        expected = np.linspace(-1, 1, levels)
        np.testing.assert_allclose(
            np.unique(output[..., axis].round(5)), expected, atol=1e-5
        )
    np.testing.assert_allclose(value(layer.decode(codes)), output, atol=1e-6)
    np.testing.assert_allclose(
        slope(layer, z.astype("f4")), 1 - np.tanh(z) ** 2, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "width"),
    [({}, [1, 1, 0.5]), ({"symmetric": True}, [1, 2 / 3, 0.5])],
    ids=["google", "symmetric"],
)
def test_noise_is_as_wide_as_the_distance_of_levels(options, width):
    levels = [3, 4, 5] if options else [3, 3, 5]
    layer = FiniteScalarQuantizer(levels, noise_rate=0.3, seed=0, **options)
    smooth = FiniteScalarQuantizer(levels, **options)
    z = np.repeat(Z, 400, axis=1)
    rounded, codes = layer(z, return_codes=True)
    noisy, same = layer(z, training=True, return_codes=True)
    np.testing.assert_array_equal(value(codes), value(same))
    noisy, rounded, z = value(noisy), value(rounded), z.astype("f8")
    changed = noisy != rounded
    np.testing.assert_allclose(changed.mean(), 0.3, atol=0.01)
    if options:
        bounded = np.tanh(z)
    else:
        bounded = np.tanh(z) * (1 - 1e-3)
    error = (noisy - bounded) / width
    for axis in range(3):
        noise = error[..., axis][changed[..., axis]]
        assert np.abs(noise).max() < 0.5 + 1e-5
        np.testing.assert_allclose(noise.mean(), 0, atol=0.02)
        np.testing.assert_allclose(noise.var(), 1 / 12, rtol=0.05)
    again = value(layer(z.astype("f4"), training=True))
    assert np.mean(again != noisy) > 0.3
    z = Z
    np.testing.assert_allclose(
        slope(layer, z, training=True), slope(smooth, z), atol=1e-6
    )


# Several stages.


KINDS = {
    "google": ("tanh", False, [3, 4, 5]),
    "symmetric": ("tanh", True, [2, 4, 5]),
    "sigmoid": ("sigmoid", False, [2, 4, 5]),
}


def by_kind(kind, stages, **options):
    activation, symmetric, levels = KINDS[kind]
    return ResidualFiniteScalarQuantizer(
        stages, levels, activation, symmetric=symmetric, **options
    )


def reference(z, kind, stages):
    """`(output, digits, bounded output)` from the rest and a scale by stage.

    The first stage has the levels of its kind. Each further one has L equally
    spaced levels on both sides of 0, at the middles of the L equal parts of the
    interval that rounding leaves: L^-i as far apart as those of the first.
    """
    activation, symmetric, levels = KINDS[kind]
    top, z = np.array(levels) - 1.0, z.astype("f8")
    if activation == "sigmoid":
        lowest, step, y = 0.0, 1 / top, 1 / (1 + np.exp(-z))
    elif symmetric:
        lowest, step, y = -1.0, 2 / top, np.tanh(z)
    else:
        # h tanh(z + s) - o over ⌊L/2⌋, from the paper
        h, o = top / 2 * 0.999, np.where(top % 2, 0.5, 0)
        width = (top + 1) // 2
        lowest, step = -1.0, 1 / width
        y = (h * np.tanh(z + np.arctanh(o / h)) - o) / width
    rest, digits = y, []
    for stage in range(stages):
        scale = step * (top + 1) ** -stage
        first = lowest if stage == 0 else -scale * top / 2
        place = (rest - first) / scale
        assert np.abs(np.abs(place - np.round(place)) - 0.5).min() > 1e-5
        digits.append(np.round(place))
        assert np.all((digits[-1] >= 0) & (digits[-1] <= top))
        rest = rest - first - scale * digits[-1]
        assert np.all(np.abs(rest) <= scale / 2)
    return y - rest, np.stack(digits, -2), y


@pytest.mark.parametrize("kind", KINDS)
def test_stages_round_the_rest(kind):
    levels = KINDS[kind][2]
    layer = by_kind(kind, 3)
    expected, digits, _ = reference(Z, kind, 3)
    radix = np.cumprod([1, *levels[:2]])
    output, codes = layer(Z, training=True, return_codes=True)
    np.testing.assert_allclose(value(output), expected, atol=1e-6)
    np.testing.assert_array_equal(value(codes), digits @ radix)
    np.testing.assert_array_equal(value(layer.encode(Z)), value(codes))
    for stages in (1, 2, 3):
        np.testing.assert_allclose(
            value(layer.decode(codes[..., :stages])),
            reference(Z, kind, stages)[0],
            atol=1e-6,
        )
    counts = value(layer.stacked_counts("batch_counts"))
    flat = digits.reshape(-1, 9).astype(int)
    np.testing.assert_array_equal(
        counts, [np.bincount(d, minlength=5) for d in flat.T]
    )
    assert layer.alphabets == tuple(levels) * 3
    z, h = Z.astype("f8"), 1e-5
    derivative = (
        reference(z + h, kind, 1)[2] - reference(z - h, kind, 1)[2]
    ) / (2 * h)
    np.testing.assert_allclose(slope(layer, Z), derivative, atol=1e-5)
    assert layer.losses == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_stage_is_a_finite_scalar_quantizer(kind):
    activation, symmetric, levels = KINDS[kind]
    options = {"noise_rate": 0.4, "seed": 3}
    alone = FiniteScalarQuantizer(
        levels, activation, symmetric=symmetric, **options
    )
    layer = by_kind(kind, 1, **options)
    for call in ({}, {"training": True}):
        for ours, theirs in zip(
            layer(Z, return_codes=True, **call),
            alone(Z, return_codes=True, **call),
            strict=True,
        ):
            np.testing.assert_array_equal(
                value(ours).ravel(), value(theirs).ravel()
            )


def test_two_levels_get_finer():
    z = np.linspace(-4, 4, 2001, dtype="f4")[:, None]
    for stages in (1, 2, 3, 4):
        layer = ResidualFiniteScalarQuantizer(stages, [2], symmetric=True)
        output = value(layer(z))
        # The middles of 2^(n - 1) equal parts of [-1, 1]; both ends for n = 1.
        parts = 2 ** (stages - 1)
        expected = (np.arange(parts) + 0.5) * 2 / parts - 1
        if stages == 1:
            expected = [-1, 1]
        np.testing.assert_allclose(np.unique(output), expected, atol=1e-6)
        error = np.abs(output - np.tanh(z)).max()
        assert error <= 2.0 ** (1 - stages) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_as_wide_as_the_distance_of_levels_of_the_last_stage(kind):
    levels = np.array(KINDS[kind][2])
    layer = by_kind(kind, 2, noise_rate=0.3, quantizer_dropout=0.6, seed=0)
    rows = np.repeat(Z, 500, axis=0)
    y = reference(Z, kind, 1)[2].repeat(500, axis=0)
    outputs = [reference(Z, kind, n)[0].repeat(500, axis=0) for n in (1, 2)]
    output, codes = layer(rows, training=True, return_codes=True)
    np.testing.assert_array_equal(value(codes), value(layer.encode(rows)))
    output = value(output)
    rounded = [np.abs(output - x) < 1e-5 for x in outputs]
    # Seven in ten of the components of a row show how many stages it keeps.
    kept = np.argmax([r.sum((1, 2)) for r in rounded], axis=0)
    np.testing.assert_allclose(np.mean(kept == 0), 0.3, atol=0.03)
    step = {"sigmoid": 1 / (levels - 1), "symmetric": 2 / (levels - 1)}
    step = step.get(kind, 1 / (levels // 2))
    for depth in (0, 1):
        noisy = (kept == depth)[:, None, None] & ~rounded[depth]
        share = noisy[kept == depth].mean()
        np.testing.assert_allclose(share, 0.3, atol=0.02)
        for axis in range(3):
            width = step[axis] * float(levels[axis]) ** -depth
            noise = ((output - y) / width)[..., axis][noisy[..., axis]]
            assert np.abs(noise).max() < 0.5 + 1e-4
            np.testing.assert_allclose(noise.mean(), 0, atol=0.03)
            np.testing.assert_allclose(noise.var(), 1 / 12, rtol=0.06)


@slow_on_jax
def test_rows_keep_their_first_stages():
    layer = ResidualFiniteScalarQuantizer(
        2, [5, 5, 5], quantizer_dropout=0.5, seed=0
    )
    z = np.repeat(Z, 1000, axis=0)
    mask = np.ones(z.shape[:-1], bool)
    mask[:, 0] = False
    output, codes = layer(z, training=True, return_codes=True, mask=mask)
    full, coarse = (value(layer.decode(codes[..., :n])) for n in (2, 1))
    output = value(output)
    is_full, is_coarse = (
        np.abs(output - x).max((1, 2)) < 1e-5 for x in (full, coarse)
    )
    assert np.all(is_full | is_coarse)
    kept = is_full
    np.testing.assert_allclose(kept.mean(), 0.75, atol=0.02)
    counts = value(layer.stacked_counts("batch_counts")).sum(1)
    np.testing.assert_array_equal(counts[:3], 3 * len(z))
    np.testing.assert_array_equal(counts[3:], 3 * kept.sum())
    np.testing.assert_allclose(value(layer(z)), full, atol=1e-6)


@pytest.mark.verify
def test_truncated_codes_decode_better_after_dropout():
    rng = np.random.default_rng(0)
    x = np.tanh(rng.normal(size=(768, 3)) @ rng.normal(size=(3, 8)))
    x, test = np.split(x.astype("f4"), [512])
    errors = []
    for rate in (0.0, 0.5):
        keras.utils.set_random_seed(0)
        encoder, decoder = (
            keras.Sequential(
                [
                    keras.Input((first,)),
                    keras.layers.Dense(32, activation="tanh"),
                    keras.layers.Dense(last),
                ]
            )
            for first, last in ((8, 4), (4, 8))
        )
        layer = ResidualFiniteScalarQuantizer(
            3, [3] * 4, quantizer_dropout=rate, seed=0
        )
        model = VQVAE(encoder, layer, decoder)
        model.compile(keras.optimizers.Adam(0.02), jit_compile=ON_JAX)
        model.fit(x, batch_size=64, epochs=12, verbose=0)
        codes = model.encode(test)
        errors.append(
            [
                np.mean((model.decode(codes[:, :n]) - test) ** 2)
                for n in (1, 2, 3)
            ]
        )
    without, kept = np.array(errors) / test.var()
    assert kept[0] < 0.6 * without[0], (without, kept)
    # Of all stages both know the data.
    assert max(kept[2], without[2]) < 0.1, (without, kept)


@pytest.mark.verify
def test_all_kinds_train_and_draw_on(tmp_path):
    kinds = (
        lambda: ResidualFiniteScalarQuantizer(
            2, [4, 4], noise_rate=0.5, quantizer_dropout=0.5, seed=1
        ),
        lambda: GroupedQuantizer(
            FiniteScalarQuantizer([2], symmetric=True, noise_rate=0.5, seed=1),
            2,
        ),
    )
    for make in kinds:
        models = []
        for _ in range(2):
            keras.utils.set_random_seed(0)
            encoder = keras.Sequential(
                [keras.Input((4, 3)), keras.layers.Dense(2)]
            )
            decoder = keras.Sequential(
                [keras.Input((4, 2)), keras.layers.Dense(3)]
            )
            model = VQVAE(encoder, make(), decoder)
            model.compile(keras.optimizers.Adam(0.01), jit_compile=ON_JAX)
            model.build(Z.shape)
            model.train_on_batch(Z, Z)
            models.append(model)
        models[1].save(tmp_path / "model.keras")
        models[1] = keras.saving.load_model(tmp_path / "model.keras")
        for model in models:
            model.train_on_batch(Z, Z)
        for ours, theirs in zip(
            *(m.get_weights() for m in models), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_finite_keeps_its_place():
    layer = ResidualFiniteScalarQuantizer(2, [3, 4])
    layer.build((None, 2))
    z = np.array([[np.nan, 1], [np.inf, -np.inf]], "f4")
    output, symbols, _ = layer._quantize(ops.convert_to_tensor(z), None, True)
    output, symbols = value(output), value(symbols)
    assert np.isnan(output[0, 0])
    # The ends of the levels, up to the bound's 10⁻³ and half a level.
    np.testing.assert_allclose(output[1], [1, -1], atol=1 / 8 + 2e-3)
    assert symbols.min() >= 0
    assert np.all(symbols < [3, 4, 3, 4])
    assert value(layer.batch_counts).sum(1).max() == 0


def test_bad_arguments():
    for cls, args, kwargs, message in (
        (FiniteScalarQuantizer, [[2, 3]], {}, "at least 3 .symmetric, of at"),
        (FiniteScalarQuantizer, [[1]], {"symmetric": True}, "at least 2"),
        (
            FiniteScalarQuantizer,
            [[3], "sigmoid"],
            {"symmetric": True},
            "equally spaced anyhow",
        ),
        (FiniteScalarQuantizer, [[3]], {"noise_rate": 2}, "noise_rate=2"),
        (FiniteScalarQuantizer, [[3]], {"seed": 0.5}, "seed=0.5"),
        (ResidualFiniteScalarQuantizer, [0, [3]], {}, "num_quantizers=0"),
        (
            ResidualFiniteScalarQuantizer,
            [2, [2]],
            {},
            r"at least 3 .symmetric, of at.*levels=\[2\]",
        ),
        (
            ResidualFiniteScalarQuantizer,
            [2, [2], "sigmoid"],
            {"symmetric": True},
            "equally spaced anyhow",
        ),
        (
            ResidualFiniteScalarQuantizer,
            [2, [3]],
            {"noise_rate": 2},
            "noise_rate=2",
        ),
        (
            ResidualFiniteScalarQuantizer,
            [2, [3]],
            {"quantizer_dropout": -1},
            "quantizer_dropout=-1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            cls(*args, **kwargs)
    layer = ResidualFiniteScalarQuantizer(2, [3, 3])
    layer.build((None, 2))
    with pytest.raises(ValueError, match=r"at most 2.*\(1, 3\)"):
        layer.decode([[0, 1, 2]])
    large = ResidualFiniteScalarQuantizer(2, [8] * 11)
    with pytest.raises(ValueError, match="at most 2³¹ codes"):
        large.encode(np.zeros((1, 11), "f4"))
