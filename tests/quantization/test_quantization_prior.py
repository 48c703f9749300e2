"""Priors of codes: dropout, and maps of which some codes are given."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import SLOW_FILE_ON_JAX, slow_on_jax, value

from blogkeras.quantization import CodePrior, prior

pytestmark = SLOW_FILE_ON_JAX

RNG = np.random.default_rng(0)
ON_JAX = keras.backend.backend() == "jax"
CODES, SHAPE = 5, (3, 4)
MAPS = RNG.integers(0, CODES, (8, *SHAPE)).astype("int32")
each_kind = pytest.mark.parametrize("kind", ["attention", "convolution"])


def make(kind="attention", shape=SHAPE, **kwargs):
    keras.utils.set_random_seed(0)
    model = CodePrior(
        CODES, shape, kind, dim=8, num_layers=2, num_heads=2, **kwargs
    )
    # Eagerly: TensorFlow compiles longer than it computes here.
    model.compile(
        keras.optimizers.Adam(0.03),
        jit_compile=ON_JAX,
        run_eagerly=not ON_JAX,
    )
    model.build()
    return model


@each_kind
@slow_on_jax
def test_given_codes_stay_and_the_others_follow(kind):
    model = make(kind)
    first = model.sample(6, seed=3)
    # The same random numbers after the same codes draw the same codes.
    known = first.copy()
    known[:, 1:] = -1
    known[:, 1, 0] = first[:, 1, 0]
    np.testing.assert_array_equal(model.sample(6, seed=3, known=known), first)
    # After other codes they draw others, and before them the same.
    place = np.full(SHAPE, -1)
    place[1, 1] = 2
    drawn = model.sample(6, seed=3, known=place)
    assert np.all(drawn[:, 1, 1] == 2)
    np.testing.assert_array_equal(drawn[:, 0], first[:, 0])
    np.testing.assert_array_equal(drawn[:, 1, 0], first[:, 1, 0])
    np.testing.assert_array_equal(model.sample(2, known=MAPS[:2]), MAPS[:2])


def test_what_follows_has_the_models_probabilities():
    model = make(shape=(2,), num_classes=2)
    model.fit([MAPS[:, 0, :2], MAPS[:, 1, 0] % 2], epochs=3, verbose=0)
    num = 4000
    drawn = model.sample(num, labels=1, seed=0, known=[3, -1])
    assert np.all(drawn[:, 0] == 3)
    labels = np.ones(1, "int32")
    logits = value(model([np.array([[3, 0]], "int32"), labels]), "f8")[0, 1]
    p = np.exp(logits - logits.max())
    shares = np.bincount(drawn[:, 1], minlength=CODES) / num
    np.testing.assert_allclose(shares, p / p.sum(), atol=0.03)


@each_kind
@slow_on_jax
def test_a_map_of_labels_is_added_where_its_labels_are(kind, tmp_path):
    shape, labels = (4, 6), RNG.integers(0, 3, (5, 2, 3)).astype("int32")
    codes = RNG.integers(0, CODES, (5, *shape)).astype("int32")
    model = make(kind, shape, num_classes=3, label_shape=(2, 3))
    before = value(model([codes, labels]))
    # A label has a say at the positions that it covers, and after them.
    other = labels.copy()
    other[:, 1, 2] = (labels[:, 1, 2] + 1) % 3  # covers rows 2-3, columns 4-5
    changed = np.abs(value(model([codes, other])) - before).max(-1) > 1e-6
    first = np.ravel_multi_index((2, 4), shape)
    assert not changed.reshape(5, -1)[:, :first].any()
    assert changed[:, 2, 4].all()
    # Equal labels everywhere are one label of the whole map.
    single = make(kind, shape, num_classes=3)
    for a, b in zip(model.variables, single.variables, strict=True):
        if a.shape == b.shape:
            b.assign(value(a))
    np.testing.assert_allclose(
        value(model([codes, np.full((5, 2, 3), 2)])),
        value(single([codes, np.full(5, 2)])),
        atol=1e-5,
    )
    # Sampling position by position follows the same logits.
    model.fit([codes, labels], verbose=0)
    drawn = model.sample(5, top_k=1, labels=labels, seed=0)
    best = value(model([drawn, labels])).argmax(-1)
    np.testing.assert_array_equal(best, drawn)
    model.save(tmp_path / "prior.keras")
    loaded = keras.saving.load_model(tmp_path / "prior.keras")
    np.testing.assert_allclose(
        value(loaded([codes, labels])), value(model([codes, labels])), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        model([codes, labels[:, :1]])
    with pytest.raises(ValueError, match=r"of shape \(2, 3\)"):
        model.sample(5, labels=labels[:2])


def test_dropout_keeps_the_mean():
    x = ops.ones((400, 100))
    found = value(prior._dropped(x, 0.25, seed=3))
    np.testing.assert_allclose(np.unique(found), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_allclose(np.mean(found == 0), 0.25, atol=0.01)


@each_kind
@slow_on_jax
def test_dropout_is_of_training_and_goes_on_when_resumed(kind, tmp_path):
    models = [make(kind, dropout=0.5, seed=1) for _ in range(2)]
    plain = make(kind)
    for a, b in zip(
        models[0].trainable_variables, plain.trainable_variables, strict=True
    ):
        b.assign(value(a))
    np.testing.assert_allclose(
        value(models[0](MAPS)), value(plain(MAPS)), atol=1e-6
    )
    for model in (*models, plain):
        model.train_on_batch(MAPS)
    apart = [
        np.abs(value(a) - value(b)).max()
        for a, b in zip(
            models[0].trainable_variables,
            plain.trainable_variables,
            strict=True,
        )
    ]
    assert max(apart) > 1e-3
    models[1].save(tmp_path / "prior.keras")
    models[1] = keras.saving.load_model(tmp_path / "prior.keras")
    for model in models:
        model.train_on_batch(MAPS)
    for ours, theirs in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(value(models[0]._draws.iterations)) == 2


def test_bad_arguments():
    for kwargs, message in (
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"seed": "1"}, "seed='1'"),
        ({"label_shape": (3, 2)}, "num_classes=None"),
        ({"label_shape": (2, 2), "num_classes": 3}, r"label_shape=\(2, 2\)"),
        ({"label_shape": (3,), "num_classes": 3}, r"label_shape=\(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**kwargs)
    with pytest.raises(ValueError, match=r"at least 2.*dim=1"):
        CodePrior(CODES, (2, 3), "convolution", dim=1)
    model = make()
    for known, message in (
        (np.zeros((2, *SHAPE)), "integers in `known`"),
        (np.full(SHAPE, -2), "at least -1"),
        (np.full(SHAPE, CODES), "at most 4"),
        (np.zeros((3, *SHAPE), int), r"\(2, 3, 4\).*\(3, 3, 4\)"),
        ([[0, 1]], r"known.shape=\(1, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(2, known=known)


# Maps that end: -1 after the last code.
ENDED = np.array([[3, 1, -1], [0, 2, 4], [-1, -1, -1], [2, -1, -1]], "int32")
COUNTED = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0]])


def log_probabilities(model, codes):
    logits = value(model(codes), "f8")
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@each_kind
def test_codes_and_the_end_of_a_map_count(kind):
    shape = (3,) if kind == "attention" else (1, 3)
    model = make(kind, shape, variable_length=True)
    codes = ENDED.reshape(-1, *shape)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
        run_eagerly=not ON_JAX,
    )
    log_p = log_probabilities(model, codes).reshape(4, 3, CODES + 1)
    target = np.where(ENDED < 0, CODES, ENDED)
    each = -np.take_along_axis(log_p, target[..., None], -1)[..., 0] * COUNTED
    weight = np.array([1.0, 2.0, 0.5, 0.0])
    hit = (log_p.argmax(-1) == target) * COUNTED
    counted = COUNTED * weight[:, None]
    logs = model.evaluate(
        codes, sample_weight=weight, verbose=0, return_dict=True
    )
    expected = {
        "loss": (each * weight[:, None]).sum() / COUNTED.sum(),
        "nats": (each.sum(1) * weight).sum() / weight.sum(),
        "accuracy": (hit * counted).sum() / counted.sum(),
    }
    assert logs == pytest.approx(expected, rel=1e-5)


def test_batches_are_checked():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, number):
            return (MAPS + CODES,)

    model = make()
    for data in (Batches(), iter([(MAPS,), (MAPS + CODES,)])):
        with pytest.raises(ValueError, match="codes"):
            model.fit(data, verbose=0)
    with pytest.raises(ValueError, match="`class_weight`: a map"):
        model.fit(MAPS, class_weight={0: 1.0})


@each_kind
def test_samples_end_as_often_as_the_model_says(kind):
    shape = (2,) if kind == "attention" else (1, 2)
    model = make(kind, shape, variable_length=True)
    model.fit(ENDED[:, :2].reshape(-1, *shape), epochs=2, verbose=0)
    first = np.array([[code, -1] for code in range(-1, CODES)], "int32")
    log_p = log_probabilities(model, first.reshape(-1, *shape))
    p = np.exp(log_p).reshape(CODES + 1, 2, CODES + 1)
    num = 4000
    drawn = model.sample(num, seed=0).reshape(num, 2)
    # Probabilities of no code, of each single code, and of each pair.
    pairs = p[0, 0, :CODES, None] * p[1:, 1]
    expected = [p[0, 0, CODES], *pairs[:, CODES], *pairs[:, :CODES].ravel()]
    assert sum(expected) == pytest.approx(1, abs=1e-5)
    found = [np.all(drawn == -1, axis=1).mean()]
    found += [np.all(drawn == [c, -1], axis=1).mean() for c in range(CODES)]
    found += [
        np.all(drawn == [a, b], axis=1).mean()
        for a in range(CODES)
        for b in range(CODES)
    ]
    assert sum(found) == pytest.approx(1)
    np.testing.assert_allclose(found, expected, atol=0.03)


def test_a_map_does_not_end_before_a_given_code():
    model = make(shape=(3,), variable_length=True)
    # A network that says the end everywhere.
    model.network.head.bias.assign([0.0] * CODES + [50.0])
    assert np.all(model.sample(20, seed=0) == -1)
    drawn = model.sample(20, seed=0, known=[-1, 4, -1])
    assert np.all(drawn[:, 0] >= 0)
    assert np.all(drawn[:, 1:] == [4, -1])
    again = CodePrior.from_config(model.get_config())
    assert again.variable_length


def test_no_code_comes_after_the_end():
    model = make(shape=(3,), variable_length=True)
    with pytest.raises(ValueError, match="row 1"):
        model.fit(np.array([[1, 2, -1], [1, -1, 2]]))
    with pytest.raises(ValueError, match="at least -1"):
        model.fit(np.array([[1, 2, -2]]))
    with pytest.raises(ValueError, match="at least 0"):
        make(shape=(3,)).fit(ENDED)


class Table:
    """As those of pandas: it can be made an array, and has rows of its own."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)


def test_tables_of_codes_are_arrays():
    model = make(shape=(4,))
    maps, weight = MAPS[:, 0], np.linspace(0, 2, len(MAPS))
    expected = model.evaluate(maps, sample_weight=weight, verbose=0)
    found = model.evaluate(Table(maps), sample_weight=weight, verbose=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 0 and at most 4"):
        model.fit(Table(maps + CODES), verbose=0)
