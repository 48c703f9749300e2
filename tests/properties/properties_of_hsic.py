"""What holds for measures of dependence, for kernels and for similarity."""

import functools

import keras
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from keras import ops
from property_table import holds_for
from strategies import (
    FLOATS,
    INTEGERS,
    SEEDS,
    arrays,
    close,
    mask_of,
    number,
    refuses,
    stacks,
)

import blogkeras

SETS, ROWS = 8, 6
X = stacks(SETS, (ROWS, 2))
Y = stacks(SETS, (ROWS, 1))
MEASURES = ("hsic", "cka", "nhsic")
ESTIMATORS = st.sampled_from(["biased", "blog", "unbiased"])
# nhsic inverts matrices of condition 1e5, in float32.
TOLERANCE = {"nhsic": 0.02}
LINEAR = blogkeras.LinearKernel()


def within(function):
    return TOLERANCE.get(function.__name__, 1e-4)


@holds_for(*MEASURES, cases=SETS, short=2)
def is_finite_and_not_negative(function, x=X, y=Y):
    value = number(function(x, y))
    assert value.shape == (SETS,)
    assert value.min() >= -within(function)
    assert value.max() <= (ROWS - 1 if function.__name__ == "nhsic" else 1.0001)


@holds_for(*MEASURES, cases=SETS, short=1)
def both_variables_may_be_exchanged(function, x=X, y=Y):
    close(function(x, y), function(y, x), within(function))


@holds_for(*MEASURES, cases=SETS, short=1)
def order_of_samples_has_no_influence(function, x=X, y=Y, seed=SEEDS):
    order = np.random.default_rng(seed).permutation(ROWS)
    value = function(x[:, order], y[:, order])
    close(value, function(x, y), within(function))


@holds_for(*MEASURES, cases=SETS, short=1)
def samples_under_the_mask_have_no_influence(function, x=X, y=Y, seed=SEEDS):
    mask = mask_of("any", seed, (SETS, ROWS))
    value = function(x, y, mask=mask)
    hidden = [np.where(mask[..., None], a, np.nan) for a in (x, y)]
    close(function(*hidden, mask=mask), value, within(function))
    # And they are left out: of a set with as many left each time.
    kept = np.random.default_rng(seed).permutation(ROWS) < 4
    value = function(x[0], y[0], mask=kept)
    close(value, function(x[0][kept], y[0][kept]), within(function))
    close(function(x, y, mask=np.zeros_like(mask)), np.zeros(SETS), 0)


@holds_for(*MEASURES, cases=SETS, short=1)
def a_mask_of_ones_changes_nothing(function, x=X, y=Y):
    ones = np.ones((SETS, ROWS), bool)
    close(function(x, y, mask=ones), function(x, y), within(function))


@holds_for(*MEASURES, short=1)
def sets_of_a_batch_are_independent(
    function, x=X, y=Y, k=st.integers(0, SETS - 1), linear=st.booleans()
):
    kernels = ()
    if linear and function.__name__ == "cka":
        kernels = (LINEAR, LINEAR)
    together = number(function(x, y, *kernels))
    alone = function(x[k], y[k], *kernels)
    close(together[k], alone, within(function))


@holds_for(
    *MEASURES,
    "block_hsic",
    "fourier_hsic",
    "hsic_test",
    short=2,
    slow_on_jax=True,
)
def a_constant_is_independent_of_everything(
    function,
    y=arrays((8,), 1e30, FLOATS + INTEGERS),
    constant=arrays((1, 2), 1e30, FLOATS),
):
    options = {"block_size": 4} if function.__name__ == "block_hsic" else {}
    value = function(np.repeat(constant, 8, axis=0), y, **options)
    if function.__name__ == "hsic_test":
        assert value.p_value == 1
        value = value.statistic
    close(value, 0.0, 1e-5 if function is blogkeras.nhsic else 0)


@holds_for(
    *MEASURES,
    "block_hsic",
    "fourier_hsic",
    "hsic_test",
    short=4,
    slow_on_jax=True,
)
def samples_that_do_not_agree_are_refused(
    function, x=arrays((8, 2), 1e6), y=arrays((8, 1), 1e6), wrong=SEEDS
):
    options = {}
    match wrong % 6:
        case 0:
            y = y[:7]
        case 1:
            y = y[:1]
        case 2:
            y = np.float32(1.0)
        case 3:
            y = np.append(y[:-1], [[np.nan]], axis=0)
        case _:
            assume(function.__name__ in MEASURES)
            mask = np.ones([(7,), (1,)][wrong % 2], bool)
            options = {"mask": mask}
    with refuses():
        function(x, y, **options)


@holds_for("cka", cases=SETS, short=1)
def is_1_of_itself_moved_and_stretched(
    function, x=X, shift=arrays((SETS, 1, 2), 1.0), exponent=st.integers(-9, 9)
):
    x = x.astype("float64")
    sizes = np.abs(x - x[:, :1]).max((1, 2))
    # Where digits are left of the differences after the move.
    fine = sizes > 1e-4 * np.abs(x).max((1, 2))
    moved = 2.0**exponent * x[..., ::-1] + shift * sizes[:, None, None]
    value = number(function(x, moved, LINEAR, LINEAR))
    close(value[fine], np.ones(fine.sum()), 1e-3)
    assert np.all(np.abs(value[~fine]) <= 1.001)


@holds_for("hsic", "hsic_from_kernels", cases=SETS, short=1)
def matrices_are_as_good_as_data(_, x=X, y=Y):
    matrices = [np.exp(-squares(a)) for a in (x, y)]
    value = number(blogkeras.hsic_from_kernels(*matrices))
    assert value.min() >= -1e-6
    kernel = blogkeras.GaussianKernel(1.0, form="blog")
    close(value, blogkeras.hsic(x, y, kernel, kernel), 1e-4)


def squares(x):
    x = x.astype("float64")
    difference = x[..., :, None, :] - x[..., None, :, :]
    return np.square(difference).sum(-1)


@holds_for("hsic_from_kernels", short=3)
def matrices_that_do_not_agree_are_refused(
    function, x=arrays((6, 6), 1e6), wrong=st.integers(0, 4)
):
    other = [
        x[:5, :5],
        x[:5],
        x[:, :1],
        x[0],
        np.where(x == x.max(), np.inf, x),
    ]
    with refuses():
        function(x, other[wrong])
    with refuses():
        function(other[wrong], x)


@holds_for("block_hsic", "fourier_hsic", short=1, slow_on_jax=True)
def approximations_are_finite(
    function, x=arrays((24, 2), 1e30, FLOATS), y=arrays((24,), 1e30), seed=SEEDS
):
    options = {"seed": seed, "num_features": 16}
    if function.__name__ == "block_hsic":
        options = {"block_size": 6, "estimator": "biased"}
    value = number(function(x, y, **options))
    assert value.shape == ()
    assert -1e-6 <= value <= 4.1
    turned = function(y, x, **options)
    if function.__name__ == "block_hsic":
        close(turned, value, 1e-4)


@holds_for("median_bandwidth", short=4)
def is_a_distance_of_the_sample(
    function,
    x=arrays(st.sampled_from([(6, 2), (6,), (1, 3)]), 1e30, FLOATS + INTEGERS),
    exponent=st.integers(-9, 9),
    seed=SEEDS,
):
    value = number(function(x))
    rows = x.astype("float64").reshape(len(x), -1)
    size = np.abs(rows).max(initial=0)
    distances = np.sqrt(squares(rows / max(size, 1e-300)))
    distances = distances[~np.eye(len(rows), dtype=bool)] * size
    if not distances.any():
        assert value == 1
        return
    assert value > 0
    slack = 1e-5 * size
    assert distances.min() - slack <= value <= distances.max() + slack
    order = np.random.default_rng(seed).permutation(len(rows))
    close(function(x[order]), value, 1e-5, value + size)
    assert np.isclose(
        function(rows * 2.0**exponent), function(rows) * 2.0**exponent, 1e-6, 0
    )


@holds_for("median_bandwidth", short=1)
def bandwidth_ignores_what_is_masked(
    function, x=arrays((6, 2), 1e30), seed=SEEDS
):
    mask = mask_of("any", seed, (6,))
    hidden = np.where(mask[:, None], x, np.nan)
    assert function(hidden, mask) == function(x, mask) == function(x[mask])


@holds_for("hsic_test", "HSICTest", short=2)
def p_values_are_probabilities(
    _,
    x=arrays((8, 2), 1e30, FLOATS),
    y=arrays((8,), 1e30, FLOATS),
    null=st.sampled_from(["gamma", "permutation"]),
    seed=SEEDS,
):
    options = {"null": null, "num_permutations": 19, "seed": seed}
    result = blogkeras.hsic_test(x, y, **options)
    least = 1 / 20 if null == "permutation" else 0.0
    assert least - 1e-12 <= number(result.p_value) <= 1
    assert -1e-6 <= number(result.statistic) <= 1
    number(result.null)
    again = blogkeras.hsic_test(x, y, **options)
    assert again.p_value == result.p_value


@holds_for("dhsic", cases=SETS, short=2)
def several_variables(function, x=X, y=Y, seed=SEEDS):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(SETS, ROWS, 1)) * 10.0 ** rng.integers(-9, 9)
    value = number(function([x, y, z]))
    assert value.shape == (SETS,)
    assert value.min() >= -1e-4
    assert value.max() <= 1.0001
    close(function([z, x, y]), value, 1e-4)
    order = rng.permutation(ROWS)
    close(function([x[:, order], y[:, order], z[:, order]]), value, 1e-4)
    # A constant changes nothing, and of two variables it is HSIC.
    pair = number(function([x, y]))
    close(pair, blogkeras.hsic(x, y), 1e-4)
    close(function([x, np.full_like(z, z[0, 0, 0]), y]), pair, 1e-4)
    mask = mask_of("any", seed, (SETS, ROWS))
    hidden = [np.where(mask[..., None], a, np.nan) for a in (x, y, z)]
    close(function(hidden, mask=mask), function([x, y, z], mask=mask), 1e-4)


@holds_for("dhsic_test", short=1, slow_on_jax=True)
def p_values_of_several_variables(
    function, x=arrays((8, 2), 1e30, FLOATS), y=arrays((8,), 1e30), seed=SEEDS
):
    labels = np.random.default_rng(seed).integers(0, 2, 8).astype(str)
    options = {"num_permutations": 19, "seed": seed}
    result = function([x, labels, y], **options)
    assert 1 / 20 <= number(result.p_value) <= 1
    assert -1e-5 <= number(result.statistic) <= 1.0001
    assert number(result.null).shape == (19,)
    assert function([x, labels, y], **options).p_value == result.p_value


@holds_for("kci_test", short=2, slow_on_jax=True)
def p_values_given_a_variable(
    function,
    x=arrays((12, 2), 1e30, FLOATS),
    y=arrays((12,), 1e30),
    z=arrays((12, 1), 1e30, FLOATS + INTEGERS),
    null=st.sampled_from(["gamma", "spectral"]),
    seed=SEEDS,
):
    options = {"null": null, "num_draws": 19, "seed": seed}
    result = function(x, y, z, **options)
    least = 1 / 20 if null == "spectral" else 0.0
    assert least <= number(result.p_value) <= 1
    assert number(result.statistic) >= -1e-6
    number(result.null)
    assert function(x, y, z, **options).p_value == result.p_value
    labels = np.random.default_rng(seed).integers(0, 2, 12).astype(str)
    assert 0 <= number(function(x, labels, z, **options).p_value) <= 1


@holds_for("HSICLasso", short=2, slow_on_jax=True)
def selects_the_same_in_any_order_and_unit(
    function, x=arrays((12, 4), 1e30, FLOATS), seed=SEEDS
):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 12).astype(str)
    selector = function(2).fit(x, labels)
    cka = number(selector.relevance_)
    assert np.all((cka > -1e-5) & (cka < 1 + 1e-5))
    support = selector.get_support()
    assert support.sum() <= 2
    assert np.all((number(selector.coef_) > 0) == support)
    order, columns = rng.permutation(12), rng.permutation(4)
    scaled = 2.0 * x[order][:, columns].astype("float64")
    other = function(2).fit(scaled, labels[order])
    close(other.relevance_, cka[columns], 1e-4)
    # scikit-learn itself does not take bfloat16.
    if support.any() and x.dtype.kind == "f":
        close(selector.transform(x), x[:, support], 0)


KERNELS = {
    "GaussianKernel": {"bandwidth": 1.5, "form": "standard"},
    "LaplacianKernel": {"bandwidth": 0.5},
    "LinearKernel": {},
    "PolynomialKernel": {"degree": 2},
    "CosineKernel": {},
    "DeltaKernel": {},
}
# Values of these grow with the data, and leave float32 where these are huge.
LARGEST = {"LinearKernel": 1e15, "PolynomialKernel": 1e6}


@holds_for(*KERNELS, cases=4, short=3)
def is_a_positive_matrix(
    kernel, x=stacks(4, (5, 3), 1e30, FLOATS), tensors=st.booleans()
):
    name = kernel.__name__
    kernel = kernel(**KERNELS[name])
    largest = LARGEST.get(name, np.inf)
    x = np.clip(x.astype("float64"), -largest, largest).astype(x.dtype)
    given = ops.convert_to_tensor(x) if tensors else x
    matrix = number(kernel(given, given))
    assert matrix.shape == (4, 5, 5)
    scale = np.maximum(np.abs(matrix).max((1, 2)), 1e-30)
    unit = matrix / scale[:, None, None]
    close(unit, unit.swapaxes(1, 2), 1e-5)
    assert np.linalg.eigvalsh(unit).min() >= -1e-4
    if name not in LARGEST and name != "CosineKernel":
        assert np.all(np.diagonal(matrix, axis1=1, axis2=2) == 1)
    if name not in LARGEST:
        assert np.abs(matrix).max() <= 1 + 1e-6


@holds_for(*KERNELS, short=4)
def features_that_do_not_agree_are_refused(
    kernel,
    x=arrays((5, 3), 1e6),
    wrong=st.integers(0, 3),
    tensors=st.booleans(),
):
    kernel = kernel(**KERNELS[kernel.__name__])
    other = [x[:, :2], x[:, :1], x[:, 0], np.stack([x] * 2)[..., :1]][wrong]
    if tensors:
        x, other = map(ops.convert_to_tensor, (x, other))
    with refuses():
        kernel(x, other)


@holds_for("DeltaKernel", short=2)
def is_1_where_all_is_equal(
    kernel, x=arrays((5, 2), 1e30, FLOATS + INTEGERS), seed=SEEDS
):
    # Some of the entries of `y` are those of `x`.
    y = np.random.default_rng(seed).permutation(x.reshape(-1)).reshape(5, 2)
    y = np.concatenate([y, x[:1]])
    matrix = number(kernel()(x, y))
    expected = (x[:, None] == y[None]).all(-1)
    close(matrix, expected, 0)


@holds_for("PrecomputedKernel", cases=SETS, short=1)
def a_matrix_stands_in_the_place_of_its_variable(kernel, x=X, y=Y):
    matrix = np.exp(-squares(x))
    gaussian = blogkeras.GaussianKernel(1.0, form="blog")
    for function in (blogkeras.hsic, blogkeras.cka):
        value = function(matrix, y, kernel_x=kernel())
        close(value, function(x, y, kernel_x=gaussian), 2e-3)
    with refuses():
        kernel()(x, x)
    with refuses():
        blogkeras.hsic(x, y, kernel_x=kernel())


@holds_for("HSICLoss", "CKA", short=2, slow_on_jax=True)
def weights_of_0_leave_rows_out(
    target,
    x=arrays((8, 2, 3), 1e12, FLOATS),
    y=arrays((8, 2), 1e12, FLOATS),
    seed=SEEDS,
):
    # Always as many: each number of rows is compiled anew.
    weights = np.random.default_rng(seed).permutation(8) >= 3
    x, y = x.astype("float32"), y.astype("float32")
    hidden = [a.copy() for a in (x, y)]
    for a in hidden:
        a[~weights] = np.nan
    value = measured(target, *hidden, weights.astype("float32"))
    assert np.all(np.abs(value) <= 1.0001)
    tolerance = 1e-3 if target is blogkeras.HSICLoss else 1e-6
    close(measured(target, x[weights], y[weights]), value, tolerance)
    ones = measured(target, x, y, np.ones(8, "float32"))
    close(ones, measured(target, x, y), tolerance)


def measured(target, x, y, weights=None):
    """The value of the loss, or what the metric has summed after one batch.

    Not the metric's value: it is a ratio, and of data with one outlier its
    denominator is 0 but for rounding.
    """
    x, y = map(ops.convert_to_tensor, (x, y))
    if target is blogkeras.HSICLoss:
        return number(target()(x, y, weights))
    metric = target(*[blogkeras.GaussianKernel(form="blog")] * 2)
    metric.update_state(x, y, weights)
    assert np.abs(number(metric.result())) <= 1.0001
    return np.array([number(total) for total in metric.sums])


@holds_for("HSICLoss", "CKA", "HSICRegularization", short=3)
def batches_that_do_not_agree_are_refused(
    target, x=arrays((8, 3), 1e6), wrong=st.integers(0, 3)
):
    y, weights = x[:, 0], np.ones(8, "float32")
    match wrong:
        case 0:
            y = y[:7]
        case 1:
            y = y[:1]
        case 2:
            weights = weights[:1]
        case 3:
            weights = weights[:7]
    with refuses():
        if target is blogkeras.HSICRegularization:
            assume(wrong < 2)
            target(1.0)([x, y])
        else:
            measured(target, x, y, weights)


@holds_for("HSICRegularization", short=2, slow_on_jax=True)
def passes_its_first_input_through(
    layer,
    x=arrays((8, 3, 2), 1e30),
    y=arrays((8,), 1e30),
    rate=SEEDS,
    seed=SEEDS,
):
    layer = layer(rate / 2**20)
    mask = mask_of("any", seed, (8, 3))
    np.testing.assert_array_equal(number(layer([x, y])), x)
    (loss,) = layer.losses
    expected = rate / 2**20 * number(blogkeras.hsic(x.reshape(8, -1), y))
    close(loss, expected, 1e-4)
    hidden = np.where(mask[..., None], x, x + 1)
    losses = []
    for values in (x, hidden):
        layer([values, y], mask=[ops.convert_to_tensor(mask), None])
        losses.append(number(layer.losses[0]))
    close(*losses, 1e-4)


@functools.cache
def stack(units):
    model = keras.Sequential([keras.Input((3,))])
    for _ in range(units):
        model.add(keras.layers.Dense(3))
    return model


@holds_for(
    "compare_layers", "LayerSimilarity", cases=16, short=1, slow_on_jax=True
)
def similarities_are_at_most_1(_, data=arrays((8, 3), 1e3), seed=SEEDS):
    rng = np.random.default_rng(seed)
    model = stack(4)
    # Weights of several sizes, and layers without any.
    for weight in model.weights:
        size = 10.0 ** rng.integers(-3, 3) * (rng.random() < 0.8)
        weight.assign(size * rng.normal(size=weight.shape))
    result = blogkeras.compare_layers(model, model, data)
    matrix = number(result.matrix)
    assert (
        matrix.shape == (4, 4) == (len(result.layers_a), len(result.layers_b))
    )
    close(matrix, matrix.T, 1e-6)
    assert np.abs(matrix).max() <= 1 + 1e-6
    diagonal = np.diagonal(matrix)
    assert np.all(np.isclose(diagonal, 1) | (diagonal == 0))
