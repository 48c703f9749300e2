"""Which networks, data and numbers the denoising models refuse, and when."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import SLOW_FILE_ON_JAX, tensorflow_only, value

from blogkeras.denoising import (
    AnnealedScoreMatching,
    DenoisingAutoencoder,
    DenoisingDensityEstimator,
    DenoisingGenerator,
    annealed_langevin,
    langevin,
    log_partition,
    mlp_log_density,
    toy_densities,
)
from blogkeras.denoising.samplers import check_mask

pytestmark = SLOW_FILE_ON_JAX

X = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")


def network(*behind, **options):
    return keras.Sequential([keras.Input((2,), **options), *behind])


def estimator(**kwargs):
    model = DenoisingDensityEstimator(
        mlp_log_density((2,), (4,)), 0.5, seed=0, **kwargs
    )
    model.compile("sgd", run_eagerly=True)
    return model


def several_outputs(structure):
    inputs = keras.Input((2,))
    return keras.Model(
        inputs, structure(layers.Dense(1)(inputs), layers.Dense(1)(inputs))
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: network(layers.Dense(3)),
        lambda: network(layers.Dense(1), layers.Reshape((1, 1))),
        lambda: several_outputs(lambda a, b: [a, b]),
        lambda: several_outputs(lambda a, b: {"a": a, "b": b}),
    ],
)
def test_one_number_for_each_row_from_the_start(make):
    with pytest.raises(ValueError, match="one number for each row"):
        DenoisingDensityEstimator(make(), 0.5)
    with pytest.raises(ValueError, match="one number for each row"):
        AnnealedScoreMatching(make(), [1.0, 0.1])


def test_rows_like_the_input_from_the_start():
    with pytest.raises(ValueError, match=r"rows of shape \(2,\)"):
        DenoisingAutoencoder(network(layers.Dense(3)), 0.5)


def test_integers_have_no_gradient():
    embed = network(
        layers.Embedding(9, 3), layers.Flatten(), layers.Dense(1), dtype="int32"
    )
    with pytest.raises(ValueError, match="floating-point inputs"):
        DenoisingDensityEstimator(embed, 0.5)


@pytest.mark.parametrize("sigma", [1e-30, 1e30])
def test_sigma_whose_square_float32_cannot_hold(sigma):
    with pytest.raises(ValueError, match="`sigma`"):
        DenoisingDensityEstimator(mlp_log_density((2,), (4,)), sigma)
    with pytest.raises(ValueError, match="`sigmas`"):
        AnnealedScoreMatching(
            mlp_log_density((2,), (4,)), sorted([sigma, 0.1]), 0.1
        )


def test_step_size_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="`step_size`"):
        langevin(lambda x: -ops.sum(x**2, -1), X, 3, 1e-60)


def test_variance_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="scale the data"):
        estimator().fit(X * 1e30, verbose=0)


def test_rows_that_float32_cannot_hold():
    big = [[1e39, 0.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match="float32 can hold"):
        estimator().log_density(big)
    for sampler, argument in ((langevin, 3), (annealed_langevin, 0.1)):
        options = (0.1,) if sampler is langevin else ([1.0],)
        with pytest.raises(ValueError, match="float32 can hold"):
            sampler(lambda x: -ops.sum(x**2, -1), big, argument, *options)


def test_all_batches_of_a_generator_are_checked():
    model = estimator(annealing_steps=0)
    model.adapt(X)
    bad = np.where(np.arange(8)[:, None] == 3, np.nan, X)
    for last, message in ((bad, "finite"), (X[:, :1], r"rows of shape \(2,\)")):
        batches = ((x,) for x in (X, X, last))
        with pytest.raises(ValueError, match=message):
            model.fit(batches, steps_per_epoch=3, verbose=0)
    assert np.isfinite(model.log_density(X)).all()
    model.fit(((x, x) for x in (X, X)), steps_per_epoch=2, verbose=0)


@tensorflow_only
def test_data_that_are_divided_among_replicas():
    import tensorflow as tf

    strategy = toy.mirrored()
    data = tf.data.Dataset.from_tensors(X)
    data = strategy.experimental_distribute_dataset(data)
    with strategy.scope():
        model = DenoisingAutoencoder(network(layers.Dense(2)), 0.5)
        model.compile("sgd")
    with pytest.raises(ValueError, match="call `adapt` with an array"):
        model.fit(data, steps_per_epoch=1, verbose=0)
    model.adapt(X)
    model.fit(data, steps_per_epoch=1, verbose=0)
    assert value(model.draws.iterations) == 1


class WithoutSecondDerivative(layers.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.nn.local_response_normalization(x[:, None, None])[:, 0, 0]


@tensorflow_only
@pytest.mark.parametrize("cls", ["estimator", "annealed", "generator"])
def test_operations_without_a_second_derivative(cls):
    bad = network(WithoutSecondDerivative(), layers.Dense(1))
    if cls == "estimator":
        model = DenoisingDensityEstimator(bad, 0.5)
    elif cls == "annealed":
        model = AnnealedScoreMatching(bad, [1.0, 0.1])
    else:
        good = mlp_log_density((2,), (4,))
        model = DenoisingGenerator(network(layers.Dense(2)), good, bad, 0.5)
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"no second derivative.*LRN"):
        model.fit(X, verbose=0)


def test_a_denoiser_of_numbers_is_no_log_density():
    """Its output for rows of one number has the shape of log-densities."""
    inputs = keras.Input((1,))
    model = DenoisingAutoencoder(
        keras.Model(inputs, layers.Dense(1)(inputs)), 0.5
    )
    x = np.zeros((3, 1))
    generator = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    for call in (
        lambda: langevin(model, x, 3, 0.1),
        lambda: log_partition(model, num_steps=2),
        lambda: log_partition(model, "quadrature", bounds=[(-1, 1)]),
        lambda: DenoisingGenerator(
            generator, model, mlp_log_density((1,), (4,))
        ),
    ):
        with pytest.raises(ValueError, match="Expected a log-density, such"):
            call()


@pytest.mark.parametrize("data", [None, "rows", {"x": X}, (X, X)])
def test_what_gives_no_rows(data):
    with pytest.raises(ValueError, match="Expected rows: an array"):
        estimator().fit(data)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(X[:, :1], r"rows of shape \(2,\)"), (X * np.nan, "finite")],
)
def test_later_data_are_checked_too(bad, message):
    model = estimator()
    model.fit(X, verbose=0)
    for call in (
        lambda: model.fit(bad, verbose=0),
        lambda: model.evaluate(bad, verbose=0),
        lambda: model.predict(bad, verbose=0),
        lambda: model.train_on_batch(bad),
        lambda: model.test_on_batch(bad),
        lambda: model.fit(X, validation_data=(bad,), verbose=0),
        lambda: model.fit(X, validation_data=bad, verbose=0),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_weights_count_without_targets():
    model = estimator()
    logs = model.fit(X, sample_weight=np.zeros(8), verbose=0).history
    assert logs["loss"] == [0.0]


@pytest.mark.parametrize(
    "values",
    [
        lambda x: None,
        lambda x: (ops.sum(x, -1), ops.sum(x, -1)),
        lambda x: ops.sum(x),
        lambda x: ops.sum(x)[None],
        lambda x: ops.sum(x, -1)[:3],
    ],
)
def test_a_log_density_gives_one_number_for_each_row(values):
    with pytest.raises(ValueError, match=r"one number for each row.* 8 rows"):
        langevin(values, X, 3, 0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_density_has_no_integral(value):
    def log_density(x):
        return ops.where(x[:, 0] > 0, value, -ops.sum(x**2, -1))

    for arguments in (
        {"method": "quadrature", "bounds": [(-1, 1)] * 2, "num_points": 5},
        {
            "method": "importance",
            "mean": np.zeros(2),
            "scale": 1.0,
            "num_samples": 16,
        },
    ):
        with pytest.raises(ValueError, match=r"finite.*log_density\(x\)"):
            log_partition(log_density, **arguments)


def test_a_density_of_zero():
    with pytest.raises(ValueError, match="above 0 somewhere"):
        log_partition(
            lambda x: 0 * ops.sum(x, -1) - np.inf,
            "quadrature",
            bounds=[(-1, 1)],
            num_points=5,
        )


def test_texts_are_no_points():
    with pytest.raises(ValueError, match="Expected numbers in `x`"):
        toy_densities.rings.log_density(np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="Expected numbers in `x`"):
        estimator().log_density([[1.0], [1.0, 2.0]])


def test_a_score_that_is_not_finite_at_the_start():
    # The gradient of the norm at 0 is 0/0.
    with pytest.raises(ValueError, match="finite scores"):
        langevin(lambda x: -ops.sqrt(ops.sum(x**2, -1)), 0 * X, 3, 0.1)


def test_where_the_density_ends():
    with pytest.raises(FloatingPointError, match="part of the space"):
        langevin(
            lambda x: ops.where(x[:, 0] > 0, -ops.sum(x**2, -1), -np.inf),
            abs(X),
            20,
            1.0,
            seed=0,
        )


def test_integers_are_no_log_densities():
    with pytest.raises(ValueError, match="no gradient"):
        langevin(lambda x: ops.cast(ops.sum(x, -1), "int32"), X, 3, 0.1)


def test_two_sigmas_at_least():
    with pytest.raises(ValueError, match="two or more"):
        AnnealedScoreMatching(mlp_log_density((2,), (4,)), [0.1])


@pytest.mark.parametrize("units", [2, 5])
def test_the_densities_of_a_generator(units):
    good = mlp_log_density((2,), (4,))
    generator = network(layers.Dense(2))
    densities = [network(layers.Dense(units)), good]
    for pair in (densities, densities[::-1]):
        with pytest.raises(ValueError, match="one number for each row"):
            DenoisingGenerator(generator, *pair, 0.1)
    with pytest.raises(ValueError, match="incompatible"):
        DenoisingGenerator(
            network(layers.Dense(units + 1)),
            good,
            mlp_log_density((2,), (4,)),
            0.1,
        )


def test_a_mask_that_can_be_read_in_two_ways_is_of_one_row():
    mask = np.eye(4, dtype="bool")
    np.testing.assert_array_equal(
        np.broadcast_to(check_mask(mask, np.zeros((4, 4, 4))), (4, 4, 4)),
        np.broadcast_to(mask, (4, 4, 4)),
    )


def test_a_generator_of_integers():
    generator = network(
        layers.Embedding(9, 2), layers.Flatten(), layers.Dense(2), dtype="int32"
    )
    with pytest.raises(ValueError, match="floating-point inputs"):
        DenoisingGenerator(
            generator,
            mlp_log_density((2,), (4,)),
            mlp_log_density((2,), (4,)),
            0.1,
        )


def test_what_is_frozen_is_not_trained():
    given = estimator()
    with pytest.raises(ValueError, match="share no weights"):
        DenoisingGenerator(network(layers.Dense(2)), given, given.network)
    assert given.trainable


def test_sigma_of_an_annealed_density():
    given = AnnealedScoreMatching(mlp_log_density((2,), (4,)), [1.0, 0.1], 0.2)
    model = DenoisingGenerator(
        network(layers.Dense(2)), given, mlp_log_density((2,), (4,))
    )
    assert model.sigma == 0.2


def test_a_generator_and_a_density_of_other_rows():
    given = DenoisingDensityEstimator(mlp_log_density((3,), (4,)), 0.1)
    with pytest.raises(ValueError, match=r"shape \(2,\).*shape \(3,\)"):
        DenoisingGenerator(
            network(layers.Dense(2)), given, mlp_log_density((2,), (4,))
        )


def test_log_z_of_a_model_that_is_not_built():
    lazy = keras.Sequential([layers.Dense(1)])
    with pytest.raises(ValueError, match="`fit`, `adapt` or `build` first"):
        log_partition(DenoisingDensityEstimator(lazy, 0.1))
