"""What holds for quantizers, masking of tokens, schedules and densities."""

import functools
import warnings

import keras
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from keras import ops
from property_table import holds_for
from strategies import (
    FLOATS,
    KINDS,
    SEEDS,
    arrays,
    as_dtype,
    close,
    contents,
    mask_of,
    number,
    refuses,
    stacks,
)

import blogkeras

CASES, ROWS, DIM, CODES = 8, 3, 2, 5
VECTORS = stacks(CASES, (ROWS, DIM), 1e18, FLOATS)
CODEBOOK = arrays((CODES, DIM), 1e18)
QUANTIZERS = ("VectorQuantizer", "ResidualVectorQuantizer", "GroupedQuantizer")
ROUNDING = ("FiniteScalarQuantizer", "ResidualFiniteScalarQuantizer")
ALL_QUANTIZERS = (*QUANTIZERS, *ROUNDING, "LookupFreeQuantizer")


@functools.cache
def quantizer(name, **options):
    """A built layer; its state is set anew in each case."""
    match name:
        case "VectorQuantizer":
            layer = blogkeras.VectorQuantizer(CODES, **options)
        case "ResidualVectorQuantizer":
            layer = blogkeras.ResidualVectorQuantizer(2, CODES, **options)
        case "GroupedQuantizer":
            part = blogkeras.VectorQuantizer(CODES, **options)
            layer = blogkeras.GroupedQuantizer(part, groups=1)
        case "ResidualFiniteScalarQuantizer":
            layer = blogkeras.ResidualFiniteScalarQuantizer(2, [4, 5])
        case "LookupFreeQuantizer":
            layer = blogkeras.LookupFreeQuantizer(DIM)
        case _:
            layer = blogkeras.FiniteScalarQuantizer([4, 5], **options)
    layer.build((None, ROWS, DIM))
    return layer


def with_codebook(name, codebook, **options):
    layer = quantizer(name, **options)
    for stage in layer.codebooks():
        for variable in stage.non_trainable_variables:
            variable.assign(ops.zeros(variable.shape))
        if name in QUANTIZERS:
            stage.embeddings.assign(codebook)
    return layer


def nearest(z, codebook):
    """Squared distances to the nearest row, in float64."""
    z, codebook = z.astype("float64"), codebook.astype("float64")
    return np.square(z[..., None, :] - codebook).sum(-1).min(-1)


@holds_for("VectorQuantizer", cases=CASES)
def output_is_a_nearest_row_of_the_codebook(
    target, z=VECTORS, codebook=CODEBOOK
):
    layer = with_codebook(target.__name__, codebook)
    output, codes = map(number, layer(z, return_codes=True))
    assert output.shape == z.shape
    assert codes.shape == z.shape[:-1]
    np.testing.assert_array_equal(output, codebook[codes.astype(int)])
    taken = np.square(z.astype("float64") - output).sum(-1)
    best = nearest(z, codebook)
    # Float32 is exact relative to the size of the codebook.
    size = np.abs(codebook.astype("float64")).max()
    assert np.all(taken <= best * (1 + 1e-4) + 1e-12 * size**2)
    number(layer.losses[0])


@holds_for(*ALL_QUANTIZERS, cases=CASES, short=2)
def codes_are_decoded_to_the_output(target, z=VECTORS, codebook=CODEBOOK):
    layer = with_codebook(target.__name__, codebook)
    output, codes = layer(z, return_codes=True)
    np.testing.assert_array_equal(codes, layer.encode(z))
    decoded = number(layer.decode(codes))
    size = max(1e-30, np.abs(decoded).max())
    close(output, decoded, 1e-6, size)


@holds_for("VectorQuantizer", cases=CASES, short=1)
def cosine_ignores_the_length_of_vectors(
    target, z=VECTORS, codebook=CODEBOOK, exponent=st.integers(-9, 9)
):
    z = z.astype("float64")
    z = np.where(np.abs(z) < 1e-15, 0, z).astype("float32")
    layer = with_codebook(target.__name__, codebook, metric="cosine")
    output = number(layer(z))
    length = np.linalg.norm(output, axis=-1)
    assert np.all(np.isclose(length, 1, atol=1e-5) | (length == 0))
    codes = number(layer.encode(z))
    np.testing.assert_array_equal(layer.encode(z * 2.0**exponent), codes)


@holds_for(*ALL_QUANTIZERS, cases=CASES, short=1)
def vectors_under_the_mask_do_not_count(
    target, z=VECTORS, codebook=CODEBOOK, seed=SEEDS
):
    mask = mask_of("any", seed, z.shape[:-1])
    hidden = np.where(mask[..., None], z.astype("float32"), np.nan)
    options = {}
    if target.__name__ in QUANTIZERS:
        options = {"ema_decay": 0.5}
    results = []
    for x in (z, hidden):
        layer = with_codebook(target.__name__, codebook, **options)
        output = number(layer(x, training=True, mask=mask))
        state = [number(v) for v in layer.non_trainable_variables]
        results.append((output[mask], layer.losses, state))
    (output, losses, state), (again, other_losses, other_state) = results
    np.testing.assert_array_equal(output, again)
    for a, b in zip(
        [*losses, *state], [*other_losses, *other_state], strict=True
    ):
        np.testing.assert_array_equal(number(a), number(b))
    for book in layer.codebooks():
        counts = number(book.batch_counts)
        assert counts.min() >= 0
        assert counts.reshape(-1, counts.shape[-1])[0].sum() == mask.sum()


@holds_for(*QUANTIZERS, cases=CASES, short=1)
def moving_averages_stay_finite(
    target, z=VECTORS, codebook=CODEBOOK, restart=st.sampled_from([0.0, 0.5])
):
    layer = with_codebook(
        target.__name__, codebook, ema_decay=0.5, restart_threshold=restart
    )
    for x in (z, np.zeros_like(z), z):
        layer(x, training=True)
        for variable in layer.variables:
            number(variable)


@holds_for(*ALL_QUANTIZERS, short=4)
def inputs_that_do_not_fit_are_refused(
    target, z=VECTORS, wrong=st.integers(0, 4)
):
    layer, mask = with_codebook(target.__name__, np.zeros((CODES, DIM))), None
    z = z.astype("float32")
    match wrong:
        case 0:
            z = z[..., :1]
        case 1:
            z = np.concatenate([z, z], axis=-1)
        case 2:
            mask = np.ones((CASES, 1), bool)
        case 3:
            mask = np.ones((1, ROWS), bool)
        case 4:
            z = np.where(z == z.max(), np.nan, z)
    with refuses():
        layer._without_masked(ops.convert_to_tensor(z), mask)


@holds_for("FiniteScalarQuantizer", cases=CASES, short=2)
def outputs_are_levels(
    target,
    z=stacks(CASES, (ROWS, DIM), 1e30, FLOATS),
    activation=st.sampled_from(["tanh", "sigmoid"]),
):
    layer = with_codebook(target.__name__, None, activation=activation)
    output = number(layer(z))
    levels = [np.arange(4), np.arange(5)]
    if activation == "tanh":
        levels = [(np.arange(4) - 2) / 2, (np.arange(5) - 2) / 2]
    else:
        levels = [level / level.max() for level in levels]
    for component, level in enumerate(levels):
        off = np.abs(output[..., component, None] - level).min(-1)
        assert off.max() <= 1e-6
        # Larger components have larger levels.
        order = np.argsort(z[..., component].astype("float64"), axis=None)
        assert np.all(np.diff(output[..., component].ravel()[order]) >= 0)


@holds_for("straight_through", cases=CASES, short=3)
def is_the_forward_value_to_the_bit(
    function, forward=VECTORS, backward=VECTORS, seed=SEEDS
):
    backward = as_dtype(backward, forward.dtype.name)
    pair = [ops.convert_to_tensor(a) for a in (forward, backward)]
    value = function(*pair)
    assert value.dtype == pair[0].dtype
    # As the backend has it: JAX makes float32 of float64.
    np.testing.assert_array_equal(number(value), number(pair[0]))
    wrong = [backward[:1], backward[..., :1], backward[0], backward[:, :1]]
    with refuses():
        function(pair[0], ops.convert_to_tensor(wrong[seed % 4]))


VOCABULARY, LENGTH = 11, 12
SPECIAL = (2, 3)


@st.composite
def token_batches(draw, rows=8, length=LENGTH):
    """Tokens `(rows, length)`: padded at the end, and rows of one token."""
    rng = np.random.default_rng(draw(SEEDS))
    tokens = rng.integers(1, VOCABULARY, (rows, length))
    tokens[1] = rng.integers(0, VOCABULARY)
    tokens[2] = 0
    tokens[3] = rng.choice(SPECIAL)
    lengths = rng.integers(0, length + 1, (rows, 1))
    return np.where(np.arange(length) < lengths, tokens, 0).astype("int32")


@functools.cache
def masking(unit, rate, num_positions, **options):
    return blogkeras.TokenMasking(
        VOCABULARY,
        mask_token=1,
        special_tokens=SPECIAL,
        rate=rate,
        unit=unit,
        num_positions=num_positions,
        seed=0,
        **options,
    )


@holds_for("TokenMasking", cases=8, short=6, slow_on_jax=True)
def exactly_the_right_tokens_are_masked(
    _,
    tokens=token_batches(),
    unit=st.sampled_from(["token", "word", "ngram", "span"]),
    rate=st.sampled_from([0.15, 0.5, 0.9]),
    places=st.sampled_from([None, 4]),
    training=st.booleans(),
):
    layer = masking(unit, rate, places)
    words = np.cumsum(tokens % 2, axis=1).astype("int32")
    inputs = [tokens, words] if unit != "token" else tokens
    result = layer(inputs, training=training)
    result = {name: number(x).astype(int) for name, x in result.items()}
    positions, weights = result["mask_positions"], result["mask_weights"]
    assert positions.shape == (8, layer.positions_in(LENGTH))
    for row, shown in enumerate(result["token_ids"]):
        used = positions[row][weights[row] == 1]
        assert len(set(used)) == len(used)
        original = tokens[row][used]
        np.testing.assert_array_equal(
            result["mask_ids"][row][weights[row] == 1], original
        )
        assert not np.isin(original, [0, 1, *SPECIAL]).any()
        others = np.setdiff1d(np.arange(LENGTH), used)
        np.testing.assert_array_equal(shown[others], tokens[row][others])
        assert np.isin(shown[used], [0, *SPECIAL]).sum() == 0
        count = np.round(
            np.float32(rate) * np.float32((tokens[row] != 0).sum())
        )
        limit = np.clip(count, 1, positions.shape[1])
        allowed = (~np.isin(tokens[row], [0, 1, *SPECIAL])).sum()
        if unit == "token":
            assert len(used) == min(limit, allowed)
        else:
            assert (len(used) > 0) <= (allowed > 0)


@holds_for("TokenMasking", short=3)
def tokens_that_do_not_fit_are_refused(
    _, tokens=token_batches(), wrong=st.integers(0, 5)
):
    layer, words = masking("word", 0.5, None), tokens
    match wrong:
        case 0:
            words = words[:1]
        case 1:
            words = words[:, :1]
        case 2:
            tokens = tokens + VOCABULARY
        case 3:
            tokens = tokens - VOCABULARY
        case 4:
            words = words[:, 0]
        case 5:
            tokens, words = tokens[0], words[0]
    with refuses():
        layer([ops.convert_to_tensor(t) for t in (tokens, words)])


@holds_for("LinearReplacement", "CosineReplacement", cases=50, short=3)
def rates_rise_within_0_and_1(target, seed=SEEDS):
    rng = np.random.default_rng(seed)
    start = rng.choice([0.0, 1.0, rng.random()])
    if target is blogkeras.LinearReplacement:
        slope = rng.choice([0.0, 1e30, 1e-30, rng.random()])
        schedule = target(slope, start)
    else:
        slope, schedule = 1.0, target(int(rng.integers(1, 2**40)), start)
    steps = np.sort(rng.integers(0, 2 ** rng.integers(1, 41), 49))
    rates = number(schedule(np.append([0], steps)))
    assert rates.shape == (50,)
    assert np.all((rates >= start - 1e-6) & (rates <= 1))
    assert np.all(np.diff(rates) >= -1e-6)
    close(rates[0], np.float64(start), 1e-6)
    if slope:
        close(schedule(2**62), np.float64(1), 1e-6 + (slope < 1e-10))


@functools.cache
def replacement(mode, rate):
    parts = [keras.layers.Dense(2, name=name) for name in "ps"]
    for part in parts:
        part.build((None, 3))
    layer = blogkeras.ModuleReplacement(*parts, rate, mode, seed=0)
    layer.build((8, 3))
    return layer, parts


@holds_for("ModuleReplacement", cases=8, short=4)
def rows_are_of_one_of_the_branches(
    _,
    x=stacks(8, (3,), 1e6),
    mode=st.sampled_from(["batch", "sample", "mixing", "annealing"]),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    training=st.booleans(),
):
    layer, parts = replacement(mode, rate)
    output = number(layer(x, training=training))
    old, new = (number(part(x)) for part in parts)
    if not training or rate == 1:
        close(output, new, 1e-6, 1 + np.abs(new))
        return
    if mode in ("batch", "sample"):
        is_old = np.isclose(output, old, 1e-6).all(-1)
        is_new = np.isclose(output, new, 1e-6).all(-1)
        assert np.all(is_old | is_new)
        assert mode == "sample" or is_old.all() or is_new.all()
    low, high = np.minimum(old, new), np.maximum(old, new)
    slack = 1e-6 * (1 + np.abs(old) + np.abs(new))
    assert np.all((output >= low - slack) & (output <= high + slack))
    if rate == 0:
        close(output, old, 1e-6, 1 + np.abs(old) + np.abs(new))


@functools.cache
def density(kind):
    if kind == "residual_log_density":
        return blogkeras.residual_log_density((4, 4, 1), (2, 2))
    if kind == "QuadraticHead":
        inputs = keras.Input((3,))
        return keras.Model(inputs, blogkeras.QuadraticHead()(inputs))
    return blogkeras.mlp_log_density((3,), (4,), head="quadratic")


@holds_for(
    "mlp_log_density",
    "residual_log_density",
    "QuadraticHead",
    cases=8,
    short=2,
    slow_on_jax=True,
)
def rows_have_densities_of_their_own(target, seed=SEEDS):
    model = density(target.__name__)
    rng = np.random.default_rng(seed)
    shape = model.input_shape[1:]
    kinds = rng.permutation(KINDS)[:8]
    x = [contents(kind, seed, shape, 1e3) for kind in kinds]
    x = np.stack(x).astype("float32")
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    value = number(model(x, training=True))
    assert value.shape == (8, 1)
    order = rng.permutation(8)
    size = 1 + np.abs(value).max()
    close(model(x[order], training=True), value[order], 1e-5, size)
    close(model(x[[3] * 8]), value[[3] * 8], 1e-5, size)
    if target is blogkeras.QuadraticHead:
        (w1, b1), (w2, b2), (w3, b3) = (
            [number(w) for w in part.weights]
            for part in (
                model.layers[-1].first,
                model.layers[-1].second,
                model.layers[-1].third,
            )
        )
        x = x.astype("float64")
        expected = (x @ w1 + b1) * (x @ w2 + b2) + x**2 @ w3 + b3
        scale = 1 + np.square(x).sum(-1, keepdims=True) * 100
        close(value, expected, 1e-5, scale)


@functools.cache
def energy():
    """A model keeps the compiled programs of its samplers."""
    network = blogkeras.mlp_log_density((2,), (3,), head="quadratic")
    return blogkeras.DenoisingDensityEstimator(network, 0.5, seed=0)


@holds_for("langevin", cases=16, short=1, slow_on_jax=True)
@holds_for("mala", "hmc", "annealed_langevin", "Samples", cases=16, short=0)
def chains_end_in_finite_rows(
    target,
    seed=SEEDS,
    allow=st.booleans(),
    step_size=st.sampled_from([0.1, 9.0]),
):
    rng = np.random.default_rng(seed)
    x = contents(KINDS[seed % len(KINDS)], seed, (16, 2), 1e3)
    model = energy()
    for weight in model.network.weights:
        weight.assign(rng.normal(size=weight.shape))
    name = target.__name__ if target is not blogkeras.Samples else "mala"
    sampler, options = getattr(blogkeras, name), {"num_steps": 3}
    if name == "annealed_langevin":
        options = {"temperatures": [3.0, 1.0, 0.0]}
        options["mask"] = mask_of("any", seed, (16, 2))
    options |= {"step_size": step_size, "seed": seed, "allow_non_finite": allow}
    try:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            samples = sampler(model, x, **options)
            again = sampler(model, x, **options)
    except FloatingPointError:
        # Documented: chains that diverge.
        assert not allow
        return
    rows = number(samples.x)
    assert rows.shape == x.shape
    assert 0 <= samples.acceptance_rate <= 1
    assert 0 <= samples.num_non_finite <= 16
    if name == "annealed_langevin":
        known = options["mask"]
        np.testing.assert_array_equal(rows[known], x.astype("float32")[known])
    np.testing.assert_array_equal(again.x, samples.x)
    # Documented: chains that hardly move.
    told = ["hardly any proposal" in str(w.message) for w in given]
    assert sum(told) == 2 * (samples.acceptance_rate < 0.01)


@holds_for("langevin", "mala", "hmc", "annealed_langevin", short=2)
def starts_that_are_none_are_refused(
    sampler, x=arrays((4, 2), 1e3), wrong=st.integers(0, 3)
):
    options = {"num_steps": 1}
    if sampler is blogkeras.annealed_langevin:
        options = {"temperatures": [1.0]}
    if wrong == 3:
        assume(sampler is blogkeras.annealed_langevin)
        options["mask"] = np.ones((4, 1), bool)
    bad = [x[:0], np.where(x == x.max(), np.nan, x), x[0, 0], x][wrong]
    with refuses():
        sampler(energy(), bad, step_size=0.1, **options)


@holds_for("log_partition", "LogPartition", short=3, slow_on_jax=True)
def a_constant_is_added_to_log_z(
    _,
    seed=SEEDS,
    shift=st.sampled_from([-50.0, 0.0, 3.0, 80.0]),
    method=st.sampled_from(["quadrature", "importance"]),
):
    model, rng = energy(), np.random.default_rng(seed)
    for weight in model.network.weights:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    options = {"method": method, "seed": seed}
    if method == "quadrature":
        options |= {"bounds": [(-2, 2)] * 2, "num_points": 9}
    else:
        options |= {"mean": [0.0, 1.0], "scale": 1.0, "num_samples": 64}
    results = []
    for added in (0.0, shift):
        head = model.network.layers[-1].third
        head.bias.assign(ops.full((1,), added))
        results.append(estimate(model, options))
    first, second = results
    close(second.value, first.value + shift, 1e-3)
    close(second.standard_error, first.standard_error, 1e-2, 1)
    assert first.standard_error >= 0
    count = 81 if method == "quadrature" else 64
    assert 0 < number(first.effective_sample_size) <= count + 1e-6


def estimate(model, options):
    import warnings

    with warnings.catch_warnings():
        # A warning is documented where the estimate is poor.
        warnings.simplefilter("ignore", UserWarning)
        return blogkeras.log_partition(model, **options)


@holds_for("toy_densities", cases=16, short=3)
def densities_of_the_plane_are_bounded(
    module,
    name=st.sampled_from(
        ["eight_gaussians", "two_spirals", "checkerboard", "rings"]
    ),
    x=arrays((16, 2), 1e6, ("float64", "float32", "int32")),
    sigma=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
    seed=SEEDS,
):
    toy = getattr(module, name)
    x = np.clip(x, -(10**6), 10**6)
    value = toy.log_density(x, sigma)
    assert value.shape == (16,)
    assert value.dtype == "float64"
    assert not np.isnan(value).any()
    assert not np.any(value == np.inf)
    if sigma:
        # The density of the noise alone is the largest there can be.
        assert np.all(value <= -np.log(2 * np.pi * sigma**2) + 1e-6)
    order = np.random.default_rng(seed).permutation(16)
    np.testing.assert_array_equal(
        toy.log_density(x[order], sigma), value[order]
    )
    drawn = number(toy.sample(16, seed=seed))
    assert np.isfinite(toy.log_density(drawn, sigma)).all()
    with refuses():
        toy.log_density(x[:, :1], sigma)


@holds_for("SkipNonFinite", short=3)
def only_finite_gradients_change_anything(
    target,
    gradients=stacks(2, (3,), 1e15),
    broken=st.sampled_from([None, np.nan, np.inf, -np.inf]),
    place=st.integers(0, 5),
):
    if broken is not None:
        gradients.reshape(-1)[place] = broken
    finals = []
    for wrap in (target, lambda optimizer: optimizer):
        optimizer = wrap(keras.optimizers.SGD(0.5, momentum=0.5))
        weights = [keras.Variable(np.ones(3, "float32")) for _ in range(2)]
        for grads in (gradients, np.zeros_like(gradients)):
            optimizer.apply(list(map(ops.convert_to_tensor, grads)), weights)
        finals.append(np.stack([ops.convert_to_numpy(w) for w in weights]))
        if wrap is target:
            assert int(optimizer.skipped) == (broken is not None)
    if broken is None:
        np.testing.assert_array_equal(*finals)
    else:
        assert np.all(finals[0] == 1)


@holds_for("CodebookUsage", cases=4, short=3)
def shares_of_codes_are_shares(target, seed=SEEDS):
    rng = np.random.default_rng(seed)
    callback = target()
    layer = quantizer("VectorQuantizer")
    callback.set_model(usage_model(layer))
    for kind in ("point", "uniform", "none", "any"):
        counts = rng.integers(0, 2**20, CODES) * (rng.random(CODES) < 0.6)
        if kind != "any":
            counts = np.eye(CODES)[0] if kind == "point" else np.zeros(CODES)
            counts = counts + (kind == "uniform")
        layer.total_counts.assign(counts)
        logs = {}
        callback.on_epoch_end(0, logs)
        share = logs[f"{layer.name}_usage"]
        close(share, np.mean(counts > 0), 1e-6)
        effective = number(logs[f"{layer.name}_perplexity"])
        assert 1 - 1e-4 <= effective <= max(1, (counts > 0).sum()) + 1e-3
        if kind == "uniform":
            close(effective, np.float64(CODES), 1e-3)


@functools.cache
def usage_model(layer):
    return keras.Sequential([keras.Input((ROWS, DIM)), layer])
