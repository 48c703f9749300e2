"""Distillation of hidden states and attention (TinyBERT, MiniLM, post 7575)."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import replicated, slow_on_jax, slow_on_tensorflow, value

from blogkeras import training
from blogkeras.theseus import Distillation, bert_of_theseus

JAX = keras.backend.backend() == "jax"
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 11, (8, 5)).astype("int32")
IDS[:4, 3:] = 0  # padding
LABELS = RNG.integers(0, 3, 8).astype("int32")
WEIGHTS = np.array([1.0, 2.0, 0.5, 0.0, 1.0, 1.0, 3.0, 0.25], "float32")


@keras.saving.register_keras_serializable(package="toy")
class Attention(layers.Layer):
    """Returns attention of two heads, and what is attended to."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, shape):
        self.query = layers.Dense(shape[-1], name="query")
        self.query.build(shape)

    def compute_mask(self, inputs, previous_mask):
        return None

    def call(self, x):
        q, k = (
            ops.reshape(h, [-1, x.shape[1], 2, x.shape[2] // 2])
            for h in (self.query(x), x)
        )
        scores = ops.softmax(ops.einsum("bthd,bshd->bhts", q, k))
        return scores, ops.einsum("bhts,bsd->btd", scores, x)


def wide():
    return keras.initializers.RandomNormal(stddev=1.0)


def make(dim, prefix, blocks=1, seed=0, name="ids", dropout=0.0):
    """Embedding, blocks, attention that is not used, mean, classes."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5,), dtype="int32", name=name)
    x = layers.Embedding(
        11, dim, mask_zero=True, embeddings_initializer=wide()
    )(inputs)
    if dropout:
        x = layers.Dropout(dropout)(x)
    for i in range(blocks):
        x = layers.Dense(
            dim,
            "tanh",
            kernel_initializer=wide(),
            name=prefix + str(i),
        )(x)
    _, x = Attention(name=prefix + "scores")(x)
    outputs = layers.Dense(3, "softmax")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs, name=prefix)


def body(model, name):
    """The part of a model up to a layer."""
    return keras.Model(model.inputs[0], model.get_layer(name).output)


def distillation(teacher, student, pairs, **kwargs):
    keras.utils.set_random_seed(1)
    model = Distillation(teacher, student, hidden=pairs, **kwargs)
    if model.weight:
        return model
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=not JAX)
    return model


def inside(model, name):
    output = keras.tree.flatten(model.get_layer(name).output)[0]
    return value(keras.Model(model.inputs[0], output)(IDS), "f8")


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def distances(kind, z, s, kernel=None):
    """Of each position, by the formulas of the docstring."""
    if kind == "mse":
        return ((z - s @ kernel) ** 2).mean(-1)
    if kind == "cosine":
        norms = np.linalg.norm(z, axis=-1) * np.linalg.norm(s, axis=-1)
        return 1 - (z * s).sum(-1) / norms
    if kind == "attention":
        return (z * (np.log(z) - np.log(s))).sum(-1).mean(1)
    found = []
    for x in (z, s):
        x = x.reshape(*x.shape[:2], 2, -1)
        scores = np.einsum("bthd,bshd->bhts", x, x) / x.shape[-1] ** 0.5
        found.append(
            log_softmax(np.where(IDS[:, None, None] > 0, scores, -1e9))
        )
    z, s = found
    return (np.exp(z) * (z - s)).sum(-1).mean(1)


@pytest.mark.parametrize("kind", ["mse", "cosine", "relation", "attention"])
def test_each_kind_by_its_formula(kind):
    teacher = make(6, "t", seed=1)
    student = make(6 if kind == "cosine" else 4, "s", seed=2)
    names = ("tscores", "sscores") if kind == "attention" else ("t0", "s0")
    model = distillation(
        teacher,
        student,
        [names],
        hidden_loss=kind,
        hidden_weight=2.0,
        hidden_heads=2,
        weight=0.0,
    )
    z, s = inside(teacher, names[0]), inside(student, names[1])
    kernel = None
    if kind == "mse":
        kernel = value(model.hidden_maps[0].kernel, "f8")
    each = distances(kind, z, s, kernel)
    # The layer of attention hands on no mask.
    mask = np.ones(IDS.shape) if kind == "attention" else IDS > 0
    weights = WEIGHTS[:, None] * mask
    expected = 2 * (each * weights).sum() / mask.sum()
    # Without labels there is nothing but the hidden states.
    model.loss = None
    found = model.compute_loss(
        IDS, None, model(IDS, training=True), ops.convert_to_tensor(WEIGHTS)
    )
    assert float(value(found)) == pytest.approx(expected, rel=2e-5)


@slow_on_jax
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_padding_stays_out_of_relations_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    teacher, student = make(6, "t", seed=1), make(4, "s", seed=2)
    pairs = [("t0", "s0", "relation")]
    model = distillation(teacher, student, pairs, hidden_heads=2, weight=0.0)
    each = distances("relation", inside(teacher, "t0"), inside(student, "s0"))
    expected = each[IDS > 0].mean()
    found = model.compute_loss(IDS, None, model(IDS, training=True))
    assert float(value(found)) == pytest.approx(expected, rel=1e-3)


@slow_on_tensorflow
def test_it_is_added_in_training_and_without_labels():
    teacher, student = make(4, "t", seed=1), make(4, "s", seed=2)
    start = student.get_weights()
    logs, tests = [], []
    for weight in (0.0, 3.0):
        student.set_weights(start)
        pairs = [("t0", "s0"), ("t0", "s0", "cosine")]
        model = Distillation(
            teacher, student, hidden=pairs, hidden_weight=weight
        )
        model.compile(
            keras.optimizers.SGD(0.0),
            "sparse_categorical_crossentropy",
            jit_compile=JAX,
        )
        labels = (LABELS, None)
        tests.append([model.evaluate(IDS, y, verbose=0) for y in labels])
        logs.append(model.train_on_batch(IDS, LABELS))
    z, s = inside(teacher, "t0"), inside(student, "s0")
    mask = IDS > 0
    each = distances("mse", z, s, np.eye(4)) + distances("cosine", z, s)
    hidden = (each / 2 * mask).sum() / mask.sum()
    assert logs[1] - logs[0] == pytest.approx(3 * hidden, rel=1e-4)
    labelled, unlabelled = (b - a for a, b in zip(*tests, strict=True))
    assert labelled == 0
    assert unlabelled == pytest.approx(3 * hidden, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_without_labels_evaluation_is_what_is_learned(weight):
    """Without dropout; `val_loss` is the same number."""
    teacher, student = make(4, "t", seed=1), make(4, "s", seed=2, dropout=0.5)
    each = distances(
        "mse", inside(teacher, "t0"), inside(student, "s0"), np.eye(4)
    )
    p, q = (value(m(IDS), "f8") for m in (teacher, student))
    divergence = np.mean(np.sum(p * np.log(p / q), -1))
    expected = 2 * each[IDS > 0].mean() + weight * divergence
    if not weight:
        student = body(student, "s0")  # TensorFlow warns of unused weights
    model = Distillation(
        teacher,
        student,
        1.0,
        weight,
        from_logits=False,
        output_kind="softmax",
        hidden=[("t0", "s0")],
        hidden_weight=2.0,
    )
    model.compile(keras.optimizers.SGD(0.0), jit_compile=JAX)
    assert model.evaluate(IDS, verbose=0) == pytest.approx(expected, rel=1e-4)
    history = model.fit(
        IDS, batch_size=8, validation_data=(IDS,), verbose=0
    ).history
    assert history["val_loss"] == pytest.approx([expected], rel=1e-4)
    # With dropout the numbers are others.
    assert history["loss"] != pytest.approx([expected], rel=1e-2)


@slow_on_jax
def test_each_model_runs_once_in_a_step():
    teacher, student = make(4, "t", seed=1), make(4, "s", seed=2)
    model = Distillation(teacher, student, hidden=[("t0", "s0")])
    model.compile(
        keras.optimizers.SGD(0.1),
        "sparse_categorical_crossentropy",
        run_eagerly=True,
    )
    model.train_on_batch(IDS, LABELS)  # builds
    calls = []

    def count(output, *args, **kwargs):
        calls.append(output.shape)
        return output

    watched = [teacher.get_layer("t0"), student.get_layer("s0")]
    with training.perturbed(dict.fromkeys(watched, count)):
        model.train_on_batch(IDS, LABELS)
    assert len(calls) == 2


@slow_on_tensorflow
def test_a_student_learns_what_is_inside(tmp_path):
    teacher = make(6, "t", 4, seed=1)
    student = body(make(4, "s", 2, seed=2), "s1")
    pairs = [("t1", "s0"), ("t3", "s1", "relation")]
    model = distillation(teacher, student, pairs, weight=0.0, hidden_heads=2)
    model.compile(keras.optimizers.Adam(0.03), jit_compile=JAX)
    before = teacher.get_weights()
    losses = model.fit(
        IDS, batch_size=4, epochs=15, shuffle=False, verbose=0
    ).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.detach() is student
    path = tmp_path / "model.keras"
    model.save(path)
    again = keras.saving.load_model(path, safe_mode=False)
    kwargs = {"batch_size": 4, "shuffle": False, "verbose": 0}
    ours, theirs = (m.fit(IDS, **kwargs) for m in (model, again))
    assert ours.history["loss"] == pytest.approx(
        theirs.history["loss"], rel=1e-5
    )


def test_two_replicas_are_one():
    def build():
        teacher, student = make(6, "t", seed=1), make(4, "s", seed=2)
        model = distillation(teacher, student, [("t0", "s0")])
        model.compile(
            keras.optimizers.SGD(0.5),
            "sparse_categorical_crossentropy",
            jit_compile=JAX,
        )
        return model

    found = []
    for new in (build, lambda: replicated(build)):
        model = new()
        model.fit(
            # As many padded positions on each replica.
            IDS[[0, 1, 4, 5, 2, 3, 6, 7]],
            LABELS,
            sample_weight=WEIGHTS,
            batch_size=8,
            shuffle=False,
            verbose=0,
        )
        found.append(toy.weights(model))
        keras.distribution.set_distribution(None)
    assert toy.difference(*found) <= 2e-6


def blocks(number, dim):
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, dim)(inputs)
    for i in range(number):
        x = layers.Dense(dim, "tanh", name=f"transformer_layer_{i}")(x)
    return keras.Model(inputs, x)


def test_blocks_are_mapped_evenly():
    head = [layers.GlobalAveragePooling1D(), layers.Dense(3, "softmax")]
    model = bert_of_theseus(
        blocks(5, 4), blocks(2, 4), head, method="distillation", hidden="blocks"
    )
    assert model.hidden == [
        ["transformer_layer_1", "transformer_layer_0", "mse"],
        ["transformer_layer_4", "transformer_layer_1", "mse"],
    ]
    with pytest.raises(ValueError, match="2 and 1 blocks"):
        Distillation(blocks(1, 4), blocks(2, 4), hidden="blocks")


def test_each_model_takes_its_own_inputs():
    teacher = make(4, "t", seed=1, name="their_ids")
    student = body(make(4, "s", seed=2, name="our_ids"), "s0")
    model = distillation(teacher, student, [("t0", "s0")], weight=0.0)
    data = {"their_ids": IDS, "our_ids": IDS[::-1].copy()}
    z = inside(teacher, "t0")
    s = value(student(IDS[::-1]), "f8")
    mask = IDS[::-1] > 0
    expected = (((z - s) ** 2).mean(-1) * mask).sum() / mask.sum()
    assert model.train_on_batch(data) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="their_ids"):
        model.train_on_batch({"our_ids": IDS})


class Subclassed(keras.Model):
    """An inner layer that no graph knows."""

    def __init__(self, twice=False):
        super().__init__()
        self.embed = layers.Embedding(11, 4)
        self.inner = layers.Dense(4, "tanh", name="inner")
        self.twice = twice

    def call(self, x):
        x = self.inner(self.embed(x))
        return self.inner(x) if self.twice else x


def test_layers_inside_of_a_subclassed_model():
    teacher, student = make(4, "t", seed=1), Subclassed()
    student(IDS)
    model = distillation(
        teacher, student, [(teacher.get_layer("t0"), student.inner)], weight=0.0
    )
    s = value(student.inner(student.embed(IDS)), "f8")
    expected = ((inside(teacher, "t0") - s) ** 2).mean()
    assert model.train_on_batch(IDS) == pytest.approx(expected, rel=1e-5)
    twice = Subclassed(twice=True)
    twice(IDS)
    model = distillation(teacher, twice, [("t0", "inner")], weight=0.0)
    with pytest.raises(ValueError, match="called 2 times"):
        model.train_on_batch(IDS)
    # A functional model has no map to a size that is not known in time.
    model = distillation(
        make(6, "t", seed=1), student, [("t0", "inner")], weight=0.0
    )
    with pytest.raises(ValueError, match="same size"):
        model.train_on_batch(IDS)


@pytest.mark.parametrize(
    ("hidden", "kwargs", "message"),
    [
        ("block", {}, "list of pairs"),
        ([("t0",)], {}, "list of pairs"),
        ([("t0", "s0", "mae")], {}, "mae"),
        ([("t0", "s7")], {}, "'s7', of which it has 0"),
        ([("tscores", "s0")], {}, "same positions"),
        ([("t0", "s0", "cosine")], {}, "same positions"),
        ([("t0", "s0", "attention")], {}, "attention"),
        ([("t0", "s0", "relation")], {"hidden_heads": 4}, "hidden_heads=4"),
        ([("t0", "s0")], {"hidden_loss": "l1"}, "hidden_loss"),
        ([("t0", "s0")], {"hidden_weight": -1.0}, "hidden_weight"),
    ],
)
def test_bad_pairs(hidden, kwargs, message):
    teacher, student = make(6, "t"), make(4, "s")
    with pytest.raises(ValueError, match=message):
        Distillation(teacher, student, hidden=hidden, **kwargs)


def test_weights_that_fit_no_hidden_state():
    teacher, student = make(6, "t"), body(make(4, "s"), "s0")
    model = distillation(teacher, student, [("t0", "s0")], weight=0.0)
    with pytest.raises(ValueError, match=r"\(8, 4\)"):
        model.train_on_batch(IDS, None, np.ones((8, 4)))


def test_functions_around_a_recording_stay():
    layer = layers.Dense(2, kernel_initializer="ones")
    layer.build((None, 3))
    seen = []
    with training.perturbed({layer: lambda x, *_: x + 1}):
        with training.perturbed({layer: lambda x, *_: seen.append(x) or 2 * x}):
            assert np.all(value(layer(np.ones((1, 3)))) == 8)
        assert np.all(value(layer(np.ones((1, 3)))) == 4)
    assert np.all(value(seen[0]) == 4)
    assert np.all(value(layer(np.ones((1, 3)))) == 3)


@keras.saving.register_keras_serializable(package="toy")
class Mixer(layers.Layer):
    """A layer around two layers whose names Keras makes."""

    def build(self, shape):
        self.first = layers.Dense(4, "tanh", kernel_initializer=wide())
        self.second = layers.Dense(4)
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return self.second(self.first(x))


def mixers(dim, seed):
    """Layers of one name each in two others, and one of the model itself."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5, dim))
    blocks = [Mixer(name=f"block_{i}") for i in range(2)]
    x = inputs
    for block in blocks:
        block.build((None, 5, dim))
        block.first.name = "first"
        x = block(x)
    return keras.Model(inputs, layers.Dense(3, "softmax")(x)), blocks


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("number", [0, 1])
def test_layers_themselves_may_have_one_name(number, tmp_path):
    (teacher, theirs), (student, ours) = (mixers(4, seed) for seed in (1, 2))
    pair = theirs[number].first, ours[1].first
    model = distillation(teacher, student, [pair], weight=0.0)
    x = np.random.default_rng(3).normal(size=(8, 5, 4)).astype("float32")

    def state(blocks, count):
        h = x.astype("float64")
        for block in blocks[: count + 1]:
            kernel, bias = (value(w, "f8") for w in block.first.weights)
            first = np.tanh(h @ kernel + bias)
            h = first @ value(block.second.kernel, "f8")
        return first

    expected = ((state(theirs, number) - state(ours, 1)) ** 2).mean()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        found = each.train_on_batch(x)
        assert found == pytest.approx(expected, rel=1e-5)
    # A name alone says too little.
    with pytest.raises(ValueError, match="'first', of which it has 2"):
        Distillation(teacher, student, hidden=[("first", "first")])
    with pytest.raises(ValueError, match="of which it has 0"):
        Distillation(teacher, student, hidden=[(99, ours[0])])


def test_names_that_keras_makes_anew_when_it_loads(tmp_path):
    """A name is the model's own layer's before that of one inside."""
    teacher, student = (mixers(4, seed)[0] for seed in (1, 2))
    own = student.layers[-1].name
    pairs = [(teacher.layers[-1].name, own)]
    model = distillation(teacher, student, pairs, weight=0.0)
    x = np.random.default_rng(3).normal(size=(8, 5, 4)).astype("float32")
    for layer in student._flatten_layers():
        if isinstance(layer, Mixer):
            layer.second.name = own
    z, s = (value(m(x), "f8") for m in (teacher, student))
    expected = ((z - s) ** 2).mean()
    assert model.train_on_batch(x) == pytest.approx(expected, rel=1e-5)


@slow_on_jax
@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("size", [(8, 8), (2, 3), (4, 4, 4)])
def test_weights_of_hidden_states_of_images(size, kind):
    """Of pictures and volumes, as many rows as there are pixels or not."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(8, *size, 2)).astype("float32")
    models = []
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        hidden = layers.Dense(3, kernel_initializer=wide(), name="hidden")
        models.append(
            keras.Sequential(
                [keras.Input((*size, 2)), hidden, layers.Flatten()]
            )
        )
    model = distillation(*models, [("hidden", "hidden", kind)], weight=0.0)
    kernels = [value(m.get_layer("hidden").kernel, "f8") for m in models]
    z, s = (x @ kernel for kernel in kernels)
    each = distances(kind, z, s, np.eye(3))
    for weights in (WEIGHTS, rng.random((8, *size)).astype("float32")):
        scale = weights.reshape(
            8, *weights.shape[1:], *[1] * (1 + len(size) - weights.ndim)
        )
        found = model.compute_loss(
            ops.convert_to_tensor(x),
            None,
            model(x, training=True),
            ops.convert_to_tensor(weights),
        )
        expected = (each * scale).mean()
        assert float(value(found)) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_what_the_teacher_adds_to_its_loss_stays_its_own(hidden_weight):
    """Regularizers of activities, of the teacher and in a second pass."""
    keras.utils.set_random_seed(0)
    models = []
    for strength in (100.0, 0.5):
        hidden = layers.Dense(
            3,
            kernel_initializer=wide(),
            activity_regularizer=keras.regularizers.L2(strength),
            name="h",
        )
        outputs = layers.Dense(3, "softmax")
        models.append(keras.Sequential([keras.Input((4,)), hidden, outputs]))
    teacher, student = models
    x = np.random.default_rng(3).normal(size=(8, 4)).astype("float32")
    z, s = (x @ value(m.get_layer("h").kernel, "f8") for m in models)
    kernel, bias = student.layers[-1].weights
    scores = log_softmax(s @ value(kernel, "f8") + value(bias, "f8"))
    entropy = -scores[np.arange(8), LABELS].mean()
    # Keras's regularizer of activities is a mean over the rows.
    own = 0.5 * (s**2).sum() / 8
    expected = entropy + own + hidden_weight * ((z - s) ** 2).mean()
    model = Distillation(
        teacher,
        student,
        weight=0.0,
        hidden=[("h", "h")],
        hidden_weight=hidden_weight,
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert model.train_on_batch(x, LABELS) == pytest.approx(expected, rel=1e-5)
