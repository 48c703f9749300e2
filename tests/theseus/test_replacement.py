"""Module replacement: gates, gradients, state, schedules (post 7575)."""

import math

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import (
    TENSORFLOW,
    close_in_ulps,
    jax_only,
    lower_train_step,
    replicated,
    slow_on_tensorflow,
    value,
)
from theseus_parts import (
    MODES,
    X,
    Y,
    built,
    constants,
    dense,
    draws,
    exact,
    no_gradient,
    several_modules,
    stack,
    two_modules,
)

from blogkeras import backend
from blogkeras.theseus import (
    CosineReplacement,
    LinearReplacement,
    ModuleReplacement,
    Theseus,
    cut_model,
)

# The gate


@pytest.mark.parametrize(
    ("rate", "count"),
    [
        (0.3, 300),
        *(
            pytest.param(p, 20_000, marks=pytest.mark.verify)
            for p in (0.1, 0.5, 0.9)
        ),
    ],
)
def test_gate_frequencies(rate, count):
    """χ² of the four patterns of two modules: p ≥ 1e-3 for three freedoms."""
    rows = [draws(m, count, size=3) for m in several_modules(rate, 2, seed=1)]
    two = np.array(rows)[:, :, 0]
    assert set(np.unique(two)) == {0, 1}
    for row in rows:  # one draw for all samples
        np.testing.assert_array_equal(row, np.repeat(row[:, :1], 3, axis=1))
    pattern = (2 * two[0] + two[1]).astype(int)
    found = np.bincount(pattern, minlength=4)
    p = np.array([1 - rate, rate])
    expected = count * np.outer(p, p).ravel()
    assert ((found - expected) ** 2 / expected).sum() < 16.27


def test_gate_of_a_seed():
    first, again, other = (
        value(constants(0.5, "sample", seed)(ops.ones((50, 1)), training=True))
        for seed in (7, 7, 8)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_gate_of_samples():
    rows = draws(constants(0.3, "sample"), 2, size=4000)
    assert set(np.unique(rows)) == {0, 1}
    assert not np.array_equal(*rows)
    # Three standard deviations of a mean of 4000 draws.
    assert np.abs(rows.mean(1) - 0.3).max() < 3 * math.sqrt(0.21 / 4000)


@pytest.mark.parametrize(("rate", "power"), [(0.5, 1.0), (0.8, 0.25)])
def test_mixing_weights(rate, power):
    """P(w ≤ x) = x^(1/power); Kolmogorov-Smirnov, p ≥ 1e-3."""
    count = 300
    w = np.sort(draws(constants(rate, "mixing"), count)[:, 0])
    steps = np.arange(count + 1) / count
    model = w ** (1 / power)
    distance = max(np.max(steps[1:] - model), np.max(model - steps[:-1]))
    assert distance < 1.95 / math.sqrt(count)


class Several(layers.Layer):
    """x + c, a table without samples, integers, what came second, and c."""

    def __init__(self, constant):
        super().__init__()
        self.constant = constant
        self.built = True

    def call(self, inputs):
        x, side = inputs
        table = self.constant * ops.ones((5, 2))
        whole = ops.cast(self.constant + 0 * x, "int32")
        return [x + self.constant, table, whole, side, table[0, 0]]

    def compute_output_shape(self, shapes):
        return [shapes[0], (5, 2), shapes[0], shapes[1], ()]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_mixed(mode):
    """Tables are the successor's, integers one branch's, inputs themselves.

    And so are numbers without any axis.
    """
    module = ModuleReplacement(Several(1.0), Several(2.0), 0.5, mode, seed=0)
    x, side = ops.zeros((40, 1)), ops.convert_to_tensor(X)
    y, table, whole, handed, number = module([x, side], training=True)
    assert handed is side
    share, whole = value(y)[:, 0] - 1, value(whole)[:, 0]
    if mode == "sample":
        assert set(share) == {0, 1}
        np.testing.assert_array_equal(value(table), np.full((5, 2), 2))
    else:
        assert (share == share[0]).all()
        np.testing.assert_allclose(value(table), 1 + share[0], atol=1e-6)
    np.testing.assert_array_equal(whole, np.where(share > 0, 2, 1))
    assert float(number) == value(table)[0, 0]


def test_annealing_is_the_rate():
    module = constants(LinearReplacement(0.25, 0.1), "annealing")
    found = draws(module, 5)[:, 0]
    np.testing.assert_allclose(found, [0.1, 0.35, 0.6, 0.85, 1.0], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_ends_of_the_rate_are_one_branch_to_the_bit(mode):
    x = ops.convert_to_tensor(np.round(8 * X) / 8)
    old = [exact(), layers.Dropout(0.5)]
    for rate in (0.0, 1.0):
        new = [exact(), layers.Dropout(0.5, seed=3)]
        module = ModuleReplacement(old, new, rate, mode)
        expected = (
            layers.Dropout(0.5, seed=3)(new[0](x), training=True)
            if rate
            else old[0](x)
        )
        found = module(x, training=True)
        np.testing.assert_array_equal(value(found), value(expected))


def test_inference_is_the_successor():
    module = ModuleReplacement(dense(), dense(), 0.0)
    x = ops.convert_to_tensor(X)
    close_in_ulps(value(module(x)), value(module.successor(x)))
    assert int(module.iterations.value) == 0


def test_masks_may_be_arguments():
    mean = layers.GlobalAveragePooling1D()
    module = ModuleReplacement(mean, layers.GlobalAveragePooling1D())
    x = np.arange(12.0, dtype="float32").reshape(2, 3, 2)
    x = ops.convert_to_tensor(x)
    mask = ops.convert_to_tensor([[True, False, False], [True, True, False]])
    theseus = Theseus([mean], [layers.GlobalAveragePooling1D()])
    for model in (module, theseus):
        for training in (False, True):
            found = model(x, training=training, mask=mask)
            np.testing.assert_allclose(value(found), [[0, 1], [7, 8]])
            other = model(x, training=training, mask=~mask)
            np.testing.assert_allclose(value(other), [[3, 4], [10, 11]])
            whole = model(x, training=training)
            np.testing.assert_allclose(value(whole), [[2, 3], [8, 9]])


def attentive(count, name):
    """Blocks of Keras's own attention, which takes masks off its inputs."""
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True, name=f"{name}_start")(tokens)
    for i in range(count):
        h = layers.MultiHeadAttention(2, 2, name=f"{name}_attention_{i}")(x, x)
        h = layers.Add(name=f"{name}_sum_{i}")([x, h])
        x = layers.LayerNormalization(name=f"{name}_block_{i}")(h)
    return keras.Model(tokens, layers.Dense(3, name=f"{name}_classes")(x))


@slow_on_tensorflow
@pytest.mark.parametrize("mode", MODES)
def test_masks_that_a_branch_takes_away(mode):
    tokens = np.array([[1, 2, 3, 0, 0, 0], [4, 1, 0, 0, 0, 0]], "int32")
    old, new = attentive(2, "old"), attentive(1, "new")
    new.get_layer("new_classes").set_weights(
        old.get_layer("old_classes").get_weights()
    )
    modules = cut_model(old, ["old_start", "old_block_1"])
    successors = cut_model(new, ["new_start", "new_block_0"])[:2]
    for rate, whole in ((0.0, old), (1.0, new)):
        theseus = Theseus(modules[:2], successors, modules[2], rate, mode=mode)
        found = value(theseus(tokens, training=True))
        expected = value(whole(tokens))
        free = value(whole(np.where(tokens, tokens, 1)))
        seen = tokens > 0
        np.testing.assert_allclose(found[seen], expected[seen], atol=1e-6)
        assert np.abs(free - expected)[seen].max() > 1e-3


def test_masks_are_chosen_with_what_they_mask():
    # Zeros are masked by the one; by the other ones, which become zeros, too.
    x = np.tile([[0.0], [1.0], [0.0]], (16, 1, 1)).astype("float32")
    masking = layers.Masking(0.0), layers.Masking(1.0)
    module = ModuleReplacement(*masking, mode="sample", seed=0)
    found = module(x, training=True)
    replaced = value(found).sum((1, 2)) == 0
    assert 0 < replaced.sum() < 16
    np.testing.assert_array_equal(
        value(backend.get_keras_mask(found)),
        np.where(replaced[:, None], x[..., 0] != 1, x[..., 0] != 0),
    )
    for rate, masked in ((0.0, 0), (0.3, 1), (1.0, 1)):
        module = ModuleReplacement(*masking, rate, mode="annealing")
        mask = backend.get_keras_mask(module(x, training=True))
        np.testing.assert_array_equal(value(mask), x[..., 0] != masked)


@pytest.mark.parametrize("mode", MODES)
def test_a_successor_of_less_precision(mode):
    old, new = dense(), dense(dtype="bfloat16")
    for rate in (0.0, 1.0):
        found = ModuleReplacement(old, new, rate, mode)(X, training=True)
        assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
        expected = ops.cast((new if rate else old)(X), "bfloat16")
        close_in_ulps(found, expected)


def test_dropout_of_the_predecessor_is_optional():
    x = ops.ones((50, 3))
    drop = layers.Dropout(0.5, seed=3)
    for dropout in (False, True):
        module = ModuleReplacement(
            drop, dense(), 0.0, predecessor_dropout=dropout
        )
        theseus = Theseus(
            [layers.Dropout(0.5, seed=3)],
            [dense()],
            replacement_rate=0.0,
            predecessor_dropout=dropout,
        )
        for model in (module, theseus):
            zeros = (value(model(x, training=True)) == 0).any()
            assert zeros == dropout


# Gradients and state


def slopes(rates):
    """Gradients of the mean square of two modules' output, by weight."""
    old, new = [dense() for _ in "ab"], [dense() for _ in "ab"]
    modules = [
        ModuleReplacement(p, s, r)
        for p, s, r in zip(old, new, rates, strict=True)
    ]
    weights = [v for layer in [*old, *new] for v in layer.weights]
    kinds = [w.value for w in weights]

    def loss(values):
        with keras.StatelessScope([*zip(weights, values, strict=True)]):
            x = ops.convert_to_tensor(X)
            for module in modules:
                x = module(x, training=True)
            return ops.mean(x**2), None

    (_, _), found = backend.value_and_grad(loss, kinds)

    return old, new, [value(g) for g in found]


@pytest.mark.parametrize("rates", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_gradients_reach_the_chosen_modules_only(rates):
    """Against central differences of the same net in NumPy, float64."""
    old, new, found = slopes(rates)
    chosen = [new[i] if rate else old[i] for i, rate in enumerate(rates)]
    values = [
        [value(w).astype("float64") for w in layer.weights] for layer in chosen
    ]

    def loss():
        x = X.astype("float64")
        for kernel, bias in values:
            x = np.tanh(x @ kernel + bias)
        return np.mean(x**2)

    for frozen in found[:4]:
        np.testing.assert_array_equal(frozen, np.zeros(frozen.shape))
    for i, rate in enumerate(rates):
        ours = found[4 + 2 * i]  # the successor's kernel
        if not rate:
            np.testing.assert_array_equal(ours, np.zeros((3, 3)))
            continue
        kernel = values[i][0]
        for place in np.ndindex(3, 3):
            ends = []
            for sign in (1, -1):
                kernel[place] += sign * 1e-5
                ends.append(loss())
                kernel[place] -= sign * 1e-5
            slope = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(ours[place], slope, rtol=1e-3, atol=1e-6)


@slow_on_tensorflow
@no_gradient
@pytest.mark.parametrize(
    "mode", ["batch", pytest.param("mixing", marks=pytest.mark.verify)]
)
def test_frozen_weights_stay_to_the_bit(mode):
    theseus = two_modules(mode=mode)
    frozen = [
        w
        for m in [*theseus.predecessor_modules[0], theseus.head]
        for w in m.weights
    ]
    before = [value(w) for w in frozen]
    first = [value(w) for m in theseus.successor_modules for w in m.weights]
    toy.compiled(theseus).fit(X, Y, batch_size=4, epochs=2, verbose=0)
    for w, old in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(value(w), old)
    last = [value(w) for m in theseus.successor_modules for w in m.weights]
    assert toy.difference(first, last) > 1e-3
    assert len(theseus.trainable_variables) == 2 + 2 + 2


def test_compile_freezes_again():
    """The predecessor was trained on since it was given."""
    theseus = two_modules()
    theseus.build((None, 3))
    for layer in [*theseus.predecessor_modules[0], theseus.head]:
        layer.trainable = True
    theseus.compile("sgd", "mse")
    ours = [w.path for m in theseus.successor_modules for w in m.weights]
    found = {w.path for w in theseus.trainable_weights}
    assert found < set(ours)
    assert len(found) == 6
    # Of the predecessor's layers none is left that learns.
    parts = [*theseus.predecessor_modules[0], theseus.head]
    assert not any(w.trainable for m in parts for w in m.weights)


@slow_on_tensorflow
@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@no_gradient
@pytest.mark.parametrize(
    "kind",
    [
        "graph" if TENSORFLOW else "xla",
        pytest.param("replicas", marks=pytest.mark.verify),
        *([pytest.param("xla", marks=pytest.mark.verify)] * TENSORFLOW),
    ],
)
def test_dropout_normalization_and_losses_in_a_branch(kind):
    """At rate 1: the losses and weights of the successor trained plainly."""
    results = []
    for plain in (False, True):
        toy.reset()

        def make(plain=plain):
            theseus = model = two_modules(rate=1.0)
            if plain:
                parts = [*theseus.successor_modules, theseus.head]
                model = keras.Sequential([keras.Input((3,)), *parts])
            jit = kind == "xla" or not TENSORFLOW
            return theseus, toy.compiled(model, jit_compile=jit)

        theseus, model = replicated(make) if kind == "replicas" else make()
        history = model.fit(
            X, Y, batch_size=4, shuffle=False, verbose=0
        ).history
        keras.distribution.set_distribution(None)
        state = [
            value(v) for m in theseus.successor_modules for v in m.variables
        ]
        results.append((state, history["loss"]))
    (ours, loss), (expected, plain_loss) = results
    assert toy.difference(ours, expected) <= 1e-6
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)


@slow_on_tensorflow
@no_gradient
def test_state_of_the_successor_rests_while_the_predecessor_runs():
    theseus = two_modules(rate=0.0)
    moving = [
        v for v in theseus.successor_modules[0].variables if "moving" in v.path
    ]
    before = [value(v) for v in moving]
    toy.compiled(theseus).fit(X, Y, batch_size=8, verbose=0)
    assert len(moving) == 2
    assert toy.difference(before, [value(v) for v in moving]) == 0


@slow_on_tensorflow
def test_where_the_gate_is_known_the_branch_runs_alone(monkeypatch):
    """Eager steps equal those of a graph; only the first compares branches."""
    conds = []
    cond = backend.cond
    monkeypatch.setattr(
        backend, "cond", lambda *args: conds.append(1) or cond(*args)
    )
    found = []
    for known in (True, False):
        toy.reset()
        module = ModuleReplacement(stack("old"), stack("new"), 0.5, seed=1)
        built(module, 3)
        if not known:
            monkeypatch.setattr(backend, "is_concrete", lambda x: False)
        outputs, losses = [], []
        for _ in range(6):
            outputs.append(value(module(X, training=True)))
            losses.append(float(sum(module.losses)))
        state = [value(v) for v in module.variables]
        found.append((outputs, losses, state))
        assert len(conds) == (1 if known else 7)
    for ours, theirs in zip(*found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close_in_ulps(a, b, dtype="float32")
    assert len({round(x, 4) for x in found[0][1]}) >= 2


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_what_did_not_run_has_a_gradient_of_zero(rate):
    """Eagerly as in a graph: optimizers with momentum move it."""
    module = built(ModuleReplacement(dense(), dense(), rate), 3)
    weights = [v.value for v in module.trainable_variables]
    x = ops.convert_to_tensor(X)
    module(x, training=True)  # compares the branches

    def gradients():
        if TENSORFLOW:
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = ops.sum(module(x, training=True))
            return tape.gradient(
                loss, [v.value for v in module.successor.weights]
            )

        def loss(weights):
            fixed = [v.value for v in module.non_trainable_variables]
            return ops.sum(
                module.stateless_call(weights, fixed, x, training=True)[0]
            ), None

        return backend.value_and_grad(loss, weights)[1]

    sizes = [np.abs(value(g)).max() for g in gradients()]
    assert all(size > 0 for size in sizes) if rate else sizes == [0, 0]


def test_only_the_chosen_branch_is_computed():
    """The products stand in the branches of a conditional, none outside."""
    module = ModuleReplacement(dense(), dense())
    both = ModuleReplacement(dense(), dense(), mode="mixing")

    def main(module):
        state = [v.value for v in module.variables]

        def run(state, x):
            with keras.StatelessScope(
                [*zip(module.variables, state, strict=True)]
            ):
                return module(x, training=True)

        text = backend.hlo_text(run, state, ops.convert_to_tensor(X))
        return text.split("ENTRY")[1]

    assert " conditional(" in main(module)
    assert " dot(" not in main(module)
    assert main(both).count(" dot(") == 2


def test_only_the_chosen_branch_has_a_gradient_to_compute():
    """All products, forward and backward, stand in the branches.

    Where both branches of two layers run there are seven: four forward, two of
    the successor's weights, and one of what is between them.
    """

    def products(mode):
        branches = [[dense(), dense()] for _ in "ab"]
        module = built(ModuleReplacement(*branches, mode=mode), 3)

        def run(weights, x):
            def loss(weights):
                fixed = [v.value for v in module.non_trainable_variables]
                outputs, _ = module.stateless_call(
                    weights, fixed, x, training=True
                )
                return ops.sum(outputs), None

            return backend.value_and_grad(loss, weights)

        weights = [v.value for v in module.trainable_variables]
        text = backend.hlo_text(run, weights, ops.convert_to_tensor(X))
        return [part.count(" dot(") for part in text.split("ENTRY")]

    inside, outside = products("batch")
    assert inside >= 7
    assert outside == 0
    assert products("mixing") == [0, 7]


class Positions(layers.Layer):
    """Adds vectors that it spreads over a batch of any size."""

    def build(self, input_shape):
        self.table = self.add_weight(input_shape[1:], name="table")

    def call(self, x):
        return x + ops.broadcast_to(self.table, ops.shape(x))


@no_gradient
def test_branches_of_unknown_batch_size_under_xla():
    """The same weights with and without; `fit` hides the batch's size."""
    x = np.random.default_rng(0).normal(size=(8, 2, 3)).astype("float32")

    def model(name):
        inputs = keras.Input((2, 3))
        y = Positions(name=f"{name}_positions")(dense(name=name)(inputs))
        return keras.Model(inputs, y, name=f"{name}_model")

    results = []
    for jit in (True, False):
        keras.utils.set_random_seed(1)
        # The draws may differ, so that there is no choice.
        theseus = Theseus([model("a")], [model("b")], replacement_rate=1.0)
        theseus.compile("sgd", "mse", jit_compile=jit)
        theseus.fit(x, x, batch_size=2, shuffle=False, verbose=0)
        results.append(toy.weights(theseus))
    assert toy.difference(*results) <= 1e-6


# Replicas


def replica_run(rate, mode, replicas):
    """A trained several_modules of two modules, and its losses."""
    toy.reset()

    def make():
        old, new, shared = (
            [
                [dense(name=f"{kind}{i}"), built(toy.ActivityLoss(), 3)]
                for i in range(2)
            ]
            for kind in ("old", "new", "shared")
        )
        theseus = Theseus(
            old,
            new,
            [*shared[1], layers.Softmax()],
            rate,
            stem=shared[0],
            mode=mode,
            train_shared=True,
            seed=3,
        )
        return toy.compiled(theseus)

    theseus = replicated(make) if replicas == 2 else make()
    fitted = theseus.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    keras.distribution.set_distribution(None)
    return theseus, fitted.history["loss"]


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@no_gradient
@pytest.mark.parametrize(
    ("rate", "mode"),
    [
        pytest.param(0.0, "batch", marks=pytest.mark.verify),
        pytest.param(1.0, "batch", marks=pytest.mark.verify),
        (0.5, "batch"),
        (0.5, "sample"),
        pytest.param(0.5, "mixing", marks=pytest.mark.verify),
    ],
)
def test_two_replicas_equal_one(rate, mode):
    """Also with random gates: all replicas draw the same, or each its share."""
    one, loss = replica_run(rate, mode, 1)
    two, other = replica_run(rate, mode, 2)
    steps = [int(value(m.iterations)) for m in two.replacements]
    assert steps == [8, 8]
    assert toy.difference(toy.weights(one), toy.weights(two)) <= 1e-6
    np.testing.assert_allclose(loss, other, rtol=1e-6)


# Schedules


def test_schedules():
    linear = LinearReplacement(0.0006, 0.3)
    np.testing.assert_allclose(
        [float(linear(t)) for t in (0, 500, 1000, 5000)],
        [0.3, 0.6, 0.9, 1.0],
        rtol=1e-6,
    )
    # More steps than an int32 holds.
    assert float(CosineReplacement(2**40)(2**40)) == pytest.approx(1)
    cosine = CosineReplacement(100, 0.2)
    np.testing.assert_allclose(
        [float(cosine(t)) for t in (0, 50, 100, 600)],
        [0.2, 0.6, 1.0, 1.0],
        rtol=1e-6,
    )
    module = constants(lambda t: 3.0 - t)
    assert float(module.rate()) == 1
    module.iterations.assign(5)
    assert float(module.rate()) == 0


@slow_on_tensorflow
@no_gradient
def test_saved_and_resumed(tmp_path):
    """Three steps, saved, loaded, three more: six steps in one go."""
    x, y = toy.DENSE[:24], toy.LABELS[:24]

    def model():
        keras.utils.clear_session()
        keras.utils.set_random_seed(3)
        theseus = Theseus(  # without dropout, whose seeds Keras does not save
            [dense(name=name) for name in "ab"],
            [dense(name=name) for name in "cd"],
            built(layers.Dense(3, "softmax", name="head"), 3),
            CosineReplacement(6, 0.2),
        )
        return toy.compiled(theseus, keras.optimizers.Adam(0.01))

    def fit(model, *rows):
        model.fit(
            x[rows[0] :][:12],
            y[rows[0] :][:12],
            batch_size=4,
            shuffle=False,
            verbose=0,
        )

    one = model()
    fit(one, 0)
    fit(one, 12)
    two = model()
    fit(two, 0)
    two.save(tmp_path / "theseus.keras")
    keras.utils.set_random_seed(4)
    three = keras.saving.load_model(tmp_path / "theseus.keras")
    assert [int(m.iterations.value) for m in three.replacements] == [3, 3]
    fit(three, 12)
    assert toy.difference(toy.weights(one), toy.weights(three)) == 0
    assert int(three.optimizer.iterations) == 6


@jax_only
@pytest.mark.parametrize("mode", MODES)
def test_the_train_step_lowers_for_a_tpu(mode):
    """One branch alone stands in a conditional; both stand outside."""
    theseus = toy.compiled(two_modules(mode=mode), jit_compile=True)
    program = lower_train_step(theseus, X[:8], Y[:8])
    assert program.count("stablehlo.case") >= (mode == "batch")


# Bad input


def test_bad_branches_are_named():
    def pair(x):
        return keras.Model(x, [x + 1.0, x + 2.0])

    module = ModuleReplacement(
        pair(keras.Input((3,))), pair(keras.Input((3,))), name="two"
    )
    assert len(module(ops.ones((2, 3)), training=True)) == 2
    single = keras.Input((3,))
    module = ModuleReplacement(
        pair(keras.Input((3,))), keras.Model(single, single + 1.0), name="odd"
    )
    module.built = True
    with pytest.raises(ValueError, match="'odd': expected as many outputs"):
        module(ops.ones((2, 3)), training=True)
    masked = built(layers.Embedding(11, 4, mask_zero=True), 5)
    plain = built(layers.Embedding(11, 4), 5)
    module = ModuleReplacement(masked, plain, name="unmasked")
    with pytest.raises(ValueError, match="'unmasked': expected a mask"):
        module(toy.TOKENS, training=True)
