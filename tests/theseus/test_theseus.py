"""Module replacement: gates, gradients, state, schedules, cuts, saving."""

import math

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import close_in_ulps, replicated

from blogkeras import backend
from blogkeras.graph import copied
from blogkeras.theseus import (
    CosineReplacement,
    Distillation,
    LinearReplacement,
    ModuleReplacement,
    Theseus,
    cut_model,
    keep_blocks,
    spaced_blocks,
)

ON_TENSORFLOW = backend.BACKEND == "tensorflow"
MODES = ("batch", "sample", "mixing", "annealing")
X = toy.DENSE[:16]
Y = toy.LABELS[:16]
# TensorFlow misses the gradient of what does not run.
no_gradient = pytest.mark.filterwarnings("ignore:Gradients do not exist")


def value(x):
    return np.asarray(ops.convert_to_numpy(x))


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


def dense(units=3, **kwargs):
    kwargs.setdefault("kernel_initializer", "random_normal")
    return built(layers.Dense(units, "tanh", **kwargs), 3)


def exact():
    """A layer whose sums of eighths no rounding can change."""
    layer = built(layers.Dense(3, "relu"), 3)
    layer.set_weights([np.round(8 * w) / 8 for w in layer.get_weights()])
    return layer


def constants(rate, mode="batch", seed=0):
    """A module that says 0 for the predecessor, 1 for the successor."""
    zero, one = (
        built(layers.Dense(1, kernel_initializer=k), 1)
        for k in ("zeros", "ones")
    )
    return built(ModuleReplacement(zero, one, rate, mode, seed=seed), 1)


def fleet(rate, count, seed):
    """Modules of one Theseus that say 0 or 1, as `constants`."""
    zeros, ones = (
        [built(layers.Dense(1, kernel_initializer=k), 1) for _ in range(count)]
        for k in ("zeros", "ones")
    )
    theseus = Theseus(zeros, ones, replacement_rate=rate, seed=seed)
    theseus.build((None, 1))
    return theseus.replacements


def draws(module, count, size=1):
    """Outputs for inputs of 1 in `count` training steps, one after another."""
    fixed = [v.value for v in module.trainable_variables]
    state = [v.value for v in module.non_trainable_variables]

    def step(state):
        outputs, state = module.stateless_call(
            fixed, state, ops.ones((size, 1)), training=True
        )
        return outputs[:, 0], state

    step = backend.jit(step)
    found = []
    for _ in range(count):
        outputs, state = step(state)
        found.append(value(outputs))
    return np.array(found)


def stack(name, **kwargs):
    """Dropout, moving averages and a loss of its own."""
    return built(
        keras.Sequential(
            [
                layers.Dense(3, name=f"{name}_dense"),
                layers.BatchNormalization(name=f"{name}_normalization"),
                layers.Dropout(0.4, seed=5, name=f"{name}_dropout"),
                toy.ActivityLoss(name=f"{name}_loss"),
            ],
            name=name,
        ),
        3,
    )


def ship(rate=0.5, mode="batch", seed=1, **kwargs):
    """A predecessor of two modules, a successor, and Theseus of both."""
    old = [[stack("old_a"), dense(name="old_b")], dense(name="old_c")]
    new = [stack("new_a"), dense(name="new_b")]
    head = built(layers.Dense(3, "softmax", name="head"), 3)
    return Theseus(old, new, head, rate, mode=mode, seed=seed, **kwargs)


# The gate


@pytest.mark.parametrize("rate", [0.3])
def test_gate_frequencies(rate, count=300):
    """χ² of the four patterns of two modules: p ≥ 1e-3 for three freedoms."""
    rows = [draws(m, count, size=3) for m in fleet(rate, 2, seed=1)]
    two = np.array(rows)[:, :, 0]
    assert set(np.unique(two)) == {0, 1}
    for row in rows:  # one draw for all samples
        np.testing.assert_array_equal(row, np.repeat(row[:, :1], 3, axis=1))
    pattern = (2 * two[0] + two[1]).astype(int)
    found = np.bincount(pattern, minlength=4)
    p = np.array([1 - rate, rate])
    expected = count * np.outer(p, p).ravel()
    assert ((found - expected) ** 2 / expected).sum() < 16.27


@pytest.mark.verify
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_gate_frequencies_of_many_steps(rate):
    test_gate_frequencies(rate, count=20_000)


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
def test_mixing_weights(rate, power, count=300):
    """P(w ≤ x) = x^(1/power); Kolmogorov-Smirnov, p ≥ 1e-3."""
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
    np.testing.assert_array_equal(value(module(x)), value(module.successor(x)))
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


@no_gradient
@pytest.mark.parametrize(
    "mode", ["batch", pytest.param("mixing", marks=pytest.mark.verify)]
)
def test_frozen_weights_stay_to_the_bit(mode):
    theseus = ship(mode=mode)
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
    theseus = ship()
    theseus.build((None, 3))
    for layer in [*theseus.predecessor_modules[0], theseus.head]:
        layer.trainable = True
    theseus.compile("sgd", "mse")
    ours = [w.path for m in theseus.successor_modules for w in m.weights]
    found = {w.path for w in theseus.trainable_weights}
    assert found < set(ours) and len(found) == 6
    # Of the predecessor's layers none is left that learns.
    parts = [*theseus.predecessor_modules[0], theseus.head]
    assert not any(w.trainable for m in parts for w in m.weights)


@pytest.mark.filterwarnings("ignore:Using .* cross-replica")
@no_gradient
@pytest.mark.parametrize(
    "kind",
    [
        "graph" if ON_TENSORFLOW else "xla",
        pytest.param("replicas", marks=pytest.mark.verify),
        *([pytest.param("xla", marks=pytest.mark.verify)] * ON_TENSORFLOW),
    ],
)
def test_dropout_normalization_and_losses_in_a_branch(kind):
    """At rate 1: the losses and weights of the successor trained plainly."""
    results = []
    for plain in (False, True):
        toy.reset()

        def make(plain=plain):
            theseus = model = ship(rate=1.0)
            if plain:
                parts = [*theseus.successor_modules, theseus.head]
                model = keras.Sequential([keras.Input((3,)), *parts])
            jit = kind == "xla" or not ON_TENSORFLOW
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


@no_gradient
def test_state_of_the_successor_rests_while_the_predecessor_runs():
    theseus = ship(rate=0.0)
    moving = [
        v for v in theseus.successor_modules[0].variables if "moving" in v.path
    ]
    before = [value(v) for v in moving]
    toy.compiled(theseus).fit(X, Y, batch_size=8, verbose=0)
    assert len(moving) == 2
    assert toy.difference(before, [value(v) for v in moving]) == 0


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

    assert " conditional(" in main(module) and " dot(" not in main(module)
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
    assert inside >= 7 and outside == 0
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
    """A trained fleet of two modules, and its losses."""
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


# Theseus


def test_configurations_revive():
    options = {
        "mode": "mixing",
        "train_shared": True,
        "predecessor_dropout": True,
        "seed": 3,
    }
    rate = LinearReplacement(0.1, 0.2)
    theseus = Theseus([dense()], [dense()], dense(), rate, **options)
    again = Theseus.from_config(theseus.get_config())
    assert again.replacement_rate.get_config() == rate.get_config()
    assert {name: getattr(again, name) for name in options} == options
    options = {"temperature": 3.0, "weight": 0.1, "from_logits": True}
    distillation = Distillation(dense(), dense(), **options)
    again = Distillation.from_config(distillation.get_config())
    assert {name: getattr(again, name) for name in options} == options


def test_predict_is_the_successor_and_detach_gives_it(tmp_path):
    theseus = ship(rate=0.0)
    expected = X
    for layer in [*theseus.successor_modules, theseus.head]:
        expected = layer(expected)
    np.testing.assert_array_equal(theseus(X), value(expected))
    assert not theseus.head.trainable
    model = theseus.detach()
    np.testing.assert_array_equal(value(model(X)), value(expected))
    assert type(model) is keras.Model or "Functional" in type(model).__name__
    ours = {w.path for m in theseus.predecessor_modules[0] for w in m.weights}
    assert not ours & {w.path for w in model.weights}
    assert all(layer.trainable for layer in model.layers)
    model.save(tmp_path / "successor.keras")
    text = str(keras.saving.serialize_keras_object(model))
    assert "blogkeras" not in text.replace("blogkeras>ActivityLoss", "")


class Gather(layers.Layer):
    """Of several tensors one; Keras has to find out its shape."""

    def __init__(self, names, **kwargs):
        super().__init__(**kwargs)
        self.names = names
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape[self.names[0]])

    def call(self, x):
        return self.dense(x[self.names[0]]) + x[self.names[1]]


@no_gradient
@pytest.mark.parametrize("names", ["ab", (0, 1)])
def test_several_inputs(names):
    inputs = {"a": X, "b": X} if names == "ab" else [X, X]
    old, new = Gather(names), Gather(names)
    old.build({n: X.shape for n in names})
    head = built(layers.Dense(3, "softmax"), 3)
    theseus = toy.compiled(Theseus([old], [new], head))
    theseus.fit(inputs, Y, verbose=0)
    np.testing.assert_allclose(
        theseus.detach().predict(inputs, verbose=0),
        theseus.predict(inputs, verbose=0),
        atol=1e-6,
    )


@no_gradient
def test_detaching_while_it_learns_changes_nothing():
    found = []
    for looking in (False, True):
        toy.reset()
        theseus = ship()
        head = toy.weights(theseus.head)
        toy.compiled(theseus, keras.optimizers.Adam(0.01))
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, model=theseus: model.detach()
        )
        callbacks = [look] if looking else []
        for _ in "ab":
            theseus.fit(
                X, Y, batch_size=8, epochs=2, callbacks=callbacks, verbose=0
            )
        assert toy.difference(head, toy.weights(theseus.head)) == 0
        found.append(toy.weights(theseus))
    assert toy.difference(*found) == 0


def test_what_was_frozen_learns_again_and_only_that(tmp_path):
    """In a detached, copied, reloaded or newly replaced model."""
    head = keras.Sequential([keras.Input((3,)), dense(name="h"), dense()])
    head.layers[1].trainable = False
    for shared in (False, True):
        Theseus([dense()], [dense()], head)  # freezes it
        theseus = Theseus([dense()], [dense()], head, train_shared=shared)
        theseus.compile("sgd", "mse")
        count = 4 if shared else 2  # a kernel and a bias each
        assert len(theseus.trainable_variables) == count
        theseus.predict(X, verbose=0)
        theseus.save(tmp_path / "theseus.keras")
        loaded = keras.saving.load_model(tmp_path / "theseus.keras")
        assert len(loaded.trainable_variables) == count
        for model in (theseus, loaded):
            assert len(copied(model.head).trainable_variables) == 2
            small = model.detach()
            assert len(small.trainable_variables) == 4
            assert not small.get_layer(head.name).layers[1].trainable
            old = model.predecessor_modules[0]
            assert not old.trainable
            old.trainable = True  # the user's word counts
            assert old.trainable_variables
    head.trainable = False
    small = Theseus([dense()], [dense()], head).detach(keras.Input((3,)))
    assert not small.layers[-1].trainable


def test_the_rate_can_be_set():
    theseus = ship(rate=0.5)
    theseus.replacement_rate = 1.0
    assert [m.replacement_rate for m in theseus.replacements] == [1.0, 1.0]
    assert theseus.get_config()["replacement_rate"] == 1.0
    with pytest.raises(ValueError, match="Received: replacement_rate=2"):
        theseus.replacement_rate = 2


@no_gradient
@pytest.mark.parametrize(
    "mode", ["batch", pytest.param("sample", marks=pytest.mark.verify)]
)
def test_half_precision_sample_weights_and_checkpoints(mode, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    theseus = ship(mode=mode)
    toy.compiled(theseus, keras.optimizers.Adam(0.01))
    best = tmp_path / "best.weights.h5"
    theseus.fit(
        X,
        Y,
        sample_weight=toy.WEIGHTS[:16],
        validation_data=(X, Y),
        callbacks=[
            keras.callbacks.ModelCheckpoint(
                best, save_weights_only=True, monitor="loss"
            )
        ],
        batch_size=8,
        verbose=0,
    )
    assert best.exists()
    assert all(np.isfinite(w).all() for w in theseus.get_weights())
    assert all(w.dtype == "float32" for w in theseus.trainable_weights)


def test_a_layer_in_full_precision_gets_its_inputs_so():
    keras.config.set_dtype_policy("mixed_bfloat16")
    old, new = dense(dtype="float32"), dense(dtype="float32")
    expected = value(new(X))
    for model in (ModuleReplacement(old, new), Theseus([old], [new])):
        np.testing.assert_array_equal(value(model(X)), expected)


@no_gradient
def test_stem_and_head_learn_if_told():
    stem = dense(name="stem")
    theseus = Theseus(
        [dense()], [dense()], [dense()], stem=stem, train_shared=True
    )
    before = value(stem.kernel)
    toy.compiled(theseus, run_eagerly=True).fit(X, Y, verbose=0)
    assert np.abs(value(stem.kernel) - before).max() > 0
    frozen = Theseus([dense()], [dense()], [dense()], stem=dense(name="s"))
    assert not frozen.stem.trainable and not frozen.head[0].trainable
    frozen.build((None, 3))
    assert all(layer.trainable for layer in frozen.detach().layers)


def test_convolutions():
    old, new = (
        [built(layers.Conv2D(4, 3, padding="same"), 6, 6, 2)] for _ in "ab"
    )
    old.append(built(layers.Conv2D(4, 3, padding="same"), 6, 6, 4))
    head = [layers.GlobalAveragePooling2D(), layers.Dense(2)]
    theseus = Theseus([old], [new], head, mode="sample", seed=0)
    images = np.random.default_rng(0).normal(size=(20, 6, 6, 2))
    x = ops.convert_to_tensor(images.astype("float32"))
    assert theseus(x, training=True).shape == (20, 2)
    module = theseus.replacements[0]
    old_y, new_y = old[1](old[0](x)), new[0](x)
    mixed = value(module(x, training=True))
    is_old, is_new = (
        (mixed == value(y)).all((1, 2, 3)) for y in (old_y, new_y)
    )
    assert (is_old ^ is_new).all() and is_old.any() and is_new.any()


@no_gradient
def test_a_convolutional_net_is_compressed():
    """It learns; the first step's statistics are NumPy's."""

    def block(name, channels=4):
        parts = [
            layers.Conv2D(4, 3, padding="same", name=f"{name}_convolution"),
            layers.BatchNormalization(momentum=0.5, name=f"{name}_norm"),
            layers.ReLU(name=f"{name}_relu"),
        ]
        return built(keras.Sequential(parts, name=name), 4, 4, channels)

    images = np.random.default_rng(0).normal(size=(16, 4, 4, 2))
    images = images.astype("float32")
    labels = np.digitize(images[..., 0].mean((1, 2)), [-0.1, 0.1])
    old = [[block("a", 2), block("b")], [block("c")]]
    new = [block("d", 2), block("e")]
    head = [layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax")]

    def fit(model, epochs):
        return model.fit(
            images, labels, batch_size=16, epochs=epochs, verbose=0
        ).history["loss"]

    frozen = [value(v) for b in sum(old, []) for v in b.variables]

    # All successors in the first step, then as it comes.
    def rate(step):
        return ops.where(step == 0, 1.0, 0.5)

    theseus = Theseus(old, new, head, rate, train_shared=True, seed=0)
    toy.compiled(theseus, keras.optimizers.Adam(0.03))
    kernel = value(new[0].layers[0].kernel).astype("float64")
    window = np.lib.stride_tricks.sliding_window_view
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.einsum(
        "nhwcij,ijco->nhwo", window(padded, (3, 3), axis=(1, 2)), kernel
    )
    first = fit(theseus, 1)
    moving = [value(v) for v in new[0].layers[1].non_trainable_variables]
    expected = sums.mean((0, 1, 2)) / 2, (1 + sums.var((0, 1, 2))) / 2
    np.testing.assert_allclose(moving, expected, rtol=1e-5)
    fit(theseus, 15)
    successor = toy.compiled(theseus.detach(), keras.optimizers.Adam(0.03))
    last = fit(successor, 12)
    assert last[-1] < first[0] / 2
    now = [value(v) for b in sum(old, []) for v in b.variables]
    assert toy.difference(frozen, now) == 0


# Masks and cuts


@keras.saving.register_keras_serializable(package="test_theseus")
class Scaled(layers.Layer):
    """Multiplies each position; the mask is that of the first input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs):
        return inputs[0] * inputs[1][..., None]

    def compute_mask(self, inputs, previous_mask=None):
        return previous_mask[0]


@keras.saving.register_keras_serializable(package="test_theseus")
class Heeding(layers.Layer):
    """Sums over the past, without what is masked."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.supports_masking = True

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], self.units))

    def call(self, x, mask=None):
        x = ops.tanh(ops.matmul(x, self.kernel))
        if mask is not None:
            x = x * ops.cast(mask, x.dtype)[..., None]
        return ops.cumsum(x, axis=1)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def tagger(blocks=3, prefix=""):
    """Tokens → a class for each, with a mask, a bias and a second input."""
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    scale = keras.Input((5,), name="scale")
    x = layers.Embedding(11, 4, mask_zero=True, name=f"{prefix}embedding")(
        tokens
    )
    bias = layers.Dense(4, name=f"{prefix}bias")(x)
    for i in range(blocks):
        h = Heeding(4, name=f"{prefix}sum_{i}")(x)
        h = Scaled(name=f"{prefix}scaled_{i}")([h, scale])
        x = layers.Add(name=f"{prefix}add_{i}")([x, h, bias])
    x = layers.Dense(3, "softmax", name=f"{prefix}classes")(x)
    return keras.Model({"tokens": tokens, "scale": scale}, x)


TEXT = {
    "tokens": toy.TOKENS[:16],
    "scale": np.abs(toy.DENSE[:16, [0, 1, 2, 0, 1]]),
}
TAGS = np.random.default_rng(1).integers(0, 3, (16, 5))


def cuts(blocks, prefix=""):
    names = ["embedding", *(f"add_{i}" for i in blocks)]
    return [prefix + name for name in names]


def test_cut_model_computes_the_same():
    model = tagger()
    segments = cut_model(model, cuts(range(3)))
    x = {k: ops.convert_to_tensor(v) for k, v in TEXT.items()}
    expected = value(model(x))
    for segment in segments:
        x = segment(x)
    np.testing.assert_array_equal(value(x), expected)
    names = [[p.name for p in s.parts] for s in segments]
    assert names[0] == ["embedding"] and names[-1] == ["classes"]
    assert "bias" in names[1] and "sum_1" in names[2]


def test_a_sequential_model_is_cut():
    models = [
        keras.Sequential(
            [keras.Input((3,)), dense(name=f"{x}1"), dense(name=f"{x}2")]
        )
        for x in "ab"
    ]
    old, new = (cut_model(m, [m.layers[0]]) for m in models)
    theseus = Theseus(old, new)
    for model in (theseus, theseus.detach()):
        np.testing.assert_allclose(
            model.predict(X, verbose=0), value(models[1](X)), atol=1e-7
        )
    assert old[-1](X).shape == (16, 3)


def test_segments_train_as_the_uncut_model():
    """Where a layer was told how to run, a functional model overrules it."""
    inputs = keras.Input((3,))
    x = layers.Dropout(0.5, seed=1, name="told")(inputs, training=True)
    x = layers.Dropout(0.5, seed=2, name="free")(x)
    model = keras.Model(inputs, x)
    for training in (False, True):
        results = []
        for cut in (False, True):
            for layer in model.layers[1:]:
                generator = layer.seed_generator
                generator.state.assign([layer.seed, 0])
            y = ops.convert_to_tensor(X)
            for part in cut_model(model, "told") if cut else [model]:
                y = part(y, training=training)
            results.append(value(y))
        np.testing.assert_array_equal(*results)
        assert (results[0] == 0).any() == training


def test_frozen_segments_stay_so():
    segment = cut_model(tagger(), cuts([0]))[1]
    serialize = keras.saving.serialize_keras_object
    for trainable in (True, False):
        segment.trainable = trainable
        copy = keras.saving.deserialize_keras_object(serialize(segment))
        assert copy.trainable == trainable
        assert len(copy.trainable_weights) == 3 * trainable


def test_keep_blocks():
    """Against the layers called by hand; the copy is independent."""
    model = tagger()
    small = keep_blocks(model, [0, 2], cuts(range(3)))
    get = model.get_layer
    x = get("embedding")(TEXT["tokens"])
    bias = get("bias")(x)
    for i in (0, 2):
        h = get(f"sum_{i}")(x) * TEXT["scale"][..., None]
        x = get(f"add_{i}")([x, h, bias])
    expected = value(get("classes")(x))
    mask = TEXT["tokens"] != 0
    np.testing.assert_allclose(
        value(small(TEXT))[mask], expected[mask], atol=1e-6
    )
    small.get_layer("sum_2").set_weights(
        [0 * w for w in small.get_layer("sum_2").get_weights()]
    )
    assert np.abs(get("sum_2").get_weights()[0]).max() > 0
    assert spaced_blocks(12, 3) == [0, 4, 8] and spaced_blocks(12, 5) == [
        0,
        2,
        4,
        7,
        9,
    ]
    with pytest.raises(ValueError, match="Expected numbers of the model's 3"):
        keep_blocks(model, [3], cuts(range(3)))
    with pytest.raises(ValueError, match="left out makes what another"):
        keep_blocks(model, [1, 2], cuts(range(3)))


def sailing_tagger(rate, **kwargs):
    old = cut_model(tagger(), cuts([1, 2]))
    new = cut_model(tagger(2, "new_"), cuts([0, 1], "new_"))
    return Theseus(old[:3], new[:3], old[3], rate, seed=0, **kwargs)


@no_gradient
def test_masks_and_side_inputs_cross_the_modules(tmp_path):
    """At rate 1 and 0: the loss of the whole models, masked positions out."""
    keras.utils.set_random_seed(1)
    theseus = sailing_tagger(1.0)
    old, new = (
        m[0].cut.model
        for m in (theseus.predecessor_modules, theseus.successor_modules)
    )
    new.get_layer("new_classes").set_weights(
        old.get_layer("classes").get_weights()
    )
    for rate, model in ((1.0, new), (0.0, old)):
        for module in theseus.replacements:
            module.replacement_rate = rate
        losses = []
        for m in (theseus, model):
            m.compile("sgd", "sparse_categorical_crossentropy")
            x = {k: ops.convert_to_tensor(v) for k, v in TEXT.items()}
            y_pred = m(x, training=True)
            losses.append(float(m.compute_loss(x, TAGS, y_pred)))
        np.testing.assert_allclose(*losses, rtol=1e-6)
    # The mask makes the difference.
    free = keras.losses.SparseCategoricalCrossentropy()
    assert abs(float(free(TAGS, value(y_pred))) - losses[0]) > 1e-3
    toy.compiled(theseus).fit(TEXT, TAGS, batch_size=8, verbose=0)
    theseus.save(tmp_path / "theseus.keras")
    loaded = keras.saving.load_model(tmp_path / "theseus.keras")
    expected = theseus.predict(TEXT, verbose=0)
    found = loaded.predict(TEXT, verbose=0)
    np.testing.assert_array_equal(found, expected)
    found = theseus.detach().predict(TEXT, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_layers_used_in_several_segments(tmp_path):
    """One block called three times is one set of weights, saved as such."""

    def shared(count, name):
        x = inputs = keras.Input((3,), name=f"{name}_input")
        block = layers.Dense(3, "tanh", name=name)
        for _ in range(count):
            x = block(x)
        return keras.Model(inputs, layers.Dense(3, name=f"{name}_head")(x))

    old, new = shared(4, "old"), shared(2, "new")
    theseus = Theseus(
        cut_model(old, "old")[1:4:2],
        cut_model(new, "new")[:2],
        cut_model(old, "old")[4],
    )
    assert len(theseus.trainable_variables) == 2
    np.testing.assert_allclose(
        value(theseus(X)),
        value(old.layers[-1](new.layers[1](new.layers[1](X)))),
        atol=1e-6,
    )
    theseus.save(tmp_path / "theseus.keras")
    loaded = keras.saving.load_model(tmp_path / "theseus.keras")
    assert len(loaded.trainable_variables) == 2
    np.testing.assert_array_equal(value(loaded(X)), value(theseus(X)))


# Bad input


def test_bad_rates_and_modes():
    for rate in (-0.1, 1.5, float("nan"), None, "0.5"):
        with pytest.raises(ValueError, match="a probability in"):
            ModuleReplacement(dense(), dense(), rate)
        with pytest.raises(ValueError, match="Received: start="):
            LinearReplacement(0.1, rate)
    for slope in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"Received: slope={slope}"):
            LinearReplacement(slope)
    for steps in (0, float("nan")):
        with pytest.raises(ValueError, match=f"Received: steps={steps}"):
            CosineReplacement(steps)
    with pytest.raises(ValueError, match="Received: mode='token'"):
        ModuleReplacement(dense(), dense(), mode="token")


def test_bad_modules_are_named():
    a, b, c, d = (dense(name=name) for name in "abcd")
    with pytest.raises(ValueError, match="Received: 2 and 1"):
        Theseus([a, b], [c])
    with pytest.raises(ValueError, match="Module 1 of the predecessor.*'a'"):
        Theseus([a, a], [c, d])
    with pytest.raises(ValueError, match="Module 0 of the successor.*'a'"):
        Theseus([a, b], [[c, a], d])
    with pytest.raises(ValueError, match="'module_1': the predecessor has no"):
        Theseus([a, layers.Dense(3)], [c, d])
    with pytest.raises(ValueError, match="Module 0 of the successor.*None"):
        Theseus([a], [None])
    with pytest.raises(ValueError, match="Module 0 of the successor.*one lay"):
        Theseus([a, b], [[], c])
    whole = keras.Model(x := keras.Input((3,), name="start"), b(x))
    with pytest.raises(ValueError, match="Module 0 of the pred.*'start'"):
        Theseus([whole.layers], [c])
    wrapped = keras.Sequential([keras.Input((3,)), b])
    with pytest.raises(ValueError, match="Module 1 of the successor.*b/kernel"):
        Theseus([a, b], [c, wrapped])
    with pytest.raises(ValueError, match="Module 0 of the successor.*The head"):
        Theseus([a], [b], head=b)
    with pytest.raises(ValueError, match="weights of its own.*The stem"):
        Theseus([a], [wrapped], stem=b)
    Theseus([a], [wrapped], stem=b, train_shared=True)
    with pytest.raises(ValueError, match="Module 0 of the successor.*'d'"):
        ModuleReplacement(d, d)
    with pytest.raises(ValueError, match="a list of predecessor modules"):
        Theseus(a, c)
    with pytest.raises(ValueError, match="different names.*'a' twice"):
        Theseus([dense()], [a], head=dense(name="a"))
    wide = layers.Dense(4)
    with pytest.raises(
        ValueError, match=r"'module_0': expected.*\(None, 3\).*\(None, 4\)"
    ):
        Theseus([a], [wide]).build((None, 3))


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


def test_bad_cuts():
    model = tagger()
    with pytest.raises(ValueError, match="Received: nowhere"):
        cut_model(model, ["nowhere"])
    with pytest.raises(ValueError, match="in the order of the computation"):
        cut_model(model, ["add_1", "add_0"])
    with pytest.raises(ValueError, match="to depend on the one before"):
        cut_model(model, ["sum_0", "bias", "add_1"])
    with pytest.raises(ValueError, match="Found no blocks"):
        cut_model(model)
    x = keras.Input((3,))
    bare = keras.Model(x, layers.Dense(3, name="transformer_layer_0")(x))
    with pytest.raises(ValueError, match="before the first block.*layer_0"):
        cut_model(bare)
    assert len(cut_model(bare, ["transformer_layer_0"])) == 1
    with pytest.raises(ValueError, match="Expected a functional model"):
        cut_model(toy.Subclassed())
    segment = cut_model(model, cuts([0]))[1]
    with pytest.raises(ValueError, match="takes . tensors.*Received: 1"):
        segment(ops.ones((2, 5, 4)))
