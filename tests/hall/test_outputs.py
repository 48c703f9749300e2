"""What an output means: read off the loss; divergences by NumPy and SciPy."""

import functools

import keras
import numpy as np
import pytest
import scipy.special
from keras import layers, losses, ops
from kit import value

from blogkeras import backend, outputs
from blogkeras.outputs import OutputMeaning, read_outputs, reading


def model_of(*units, loss=None, names=None, as_dict=False, **kwargs):
    x = keras.Input((3,))
    names = names or [f"out_{i}" for i in range(len(units))]
    heads = [
        layers.Dense(n, name=name)(x)
        for n, name in zip(units, names, strict=True)
    ]
    if as_dict:
        heads = dict(zip(names, heads, strict=True))
    model = keras.Model(x, heads[0] if len(units) == 1 else heads)
    model.compile("sgd", loss, **kwargs)
    return model


def read(model, **kwargs):
    structure = model.output
    if isinstance(model._outputs_struct, dict):
        structure = model._outputs_struct
    return read_outputs(model, structure, **kwargs)


def own_loss(y_true, y_pred):
    return losses.sparse_categorical_crossentropy(
        y_true, y_pred, from_logits=True
    )


@keras.saving.register_keras_serializable("test_outputs")
class WeightedCrossentropy(losses.SparseCategoricalCrossentropy):
    def call(self, y_true, y_pred):
        return 2 * super().call(y_true, y_pred)


class OwnLoss(losses.Loss):
    def call(self, y_true, y_pred):
        return own_loss(y_true, y_pred)


SOFTMAX, LOGITS = ("softmax", False), ("softmax", True)
SIGMOID, NUMBERS = ("sigmoid", False), ("numbers", False)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sparse_categorical_crossentropy", SOFTMAX),
        ("categorical_crossentropy", SOFTMAX),
        ("crossentropy", SOFTMAX),
        ("kld", SOFTMAX),
        ("KLDivergence", SOFTMAX),
        (losses.sparse_categorical_crossentropy, SOFTMAX),
        (losses.SparseCategoricalCrossentropy(), SOFTMAX),
        (losses.SparseCategoricalCrossentropy(from_logits=True), LOGITS),
        (
            losses.CategoricalCrossentropy(True, label_smoothing=0.1),
            LOGITS,
        ),
        (losses.CategoricalFocalCrossentropy(from_logits=True), LOGITS),
        (losses.CTC(), LOGITS),
        (
            functools.partial(
                losses.sparse_categorical_crossentropy, from_logits=True
            ),
            LOGITS,
        ),
        (WeightedCrossentropy(from_logits=True), LOGITS),
        ("binary_crossentropy", SIGMOID),
        ("bce", SIGMOID),
        (losses.BinaryCrossentropy(from_logits=True), ("sigmoid", True)),
        (losses.BinaryFocalCrossentropy(), SIGMOID),
        *(
            (name, NUMBERS)
            for name in (
                "mse",
                "mean_absolute_error",
                "MAPE",
                "msle",
                "huber",
                "log_cosh",
                "poisson",
                "cosine_similarity",
                "hinge",
                "squared_hinge",
                "categorical_hinge",
            )
        ),
        (losses.MeanSquaredError(reduction="sum"), NUMBERS),
        # What Keras makes of functions.
        (
            keras.src.losses.LossFunctionWrapper(
                losses.binary_crossentropy, from_logits=True
            ),
            ("sigmoid", True),
        ),
    ],
    ids=str,
)
def test_the_loss_tells(loss, expected):
    [meaning] = read(model_of(3, loss=loss))
    assert (meaning.kind, meaning.from_logits) == expected


def test_every_loss_of_keras_is_known_or_refused():
    """A new version of Keras with a new loss fails here."""
    known = {x[0] for x in (*reading._LOSSES, *reading._PROBABILITIES)}
    public = {
        name
        for name in dir(losses)
        if isinstance(getattr(losses, name), type)
        and issubclass(getattr(losses, name), losses.Loss)
    }
    assert public - known == {"Loss"}


def test_settings_of_the_loss():
    loss = losses.SparseCategoricalCrossentropy(ignore_class=-1, axis=1)
    [meaning] = read(model_of(3, loss=loss))
    assert meaning == OutputMeaning("softmax", False, 1, -1)


def test_one_unit_of_crossentropy_is_a_label():
    [meaning] = read(model_of(1, loss="crossentropy"))
    assert meaning.kind == "sigmoid"


def test_a_loss_wrapped_for_compile():
    loss = losses.BinaryCrossentropy(from_logits=True)
    model = model_of(3, loss=loss)
    model.loss = model._compile_loss
    assert read(model) == [OutputMeaning("sigmoid", True)]


BINARY = losses.BinaryCrossentropy(from_logits=True)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("mse", ["numbers"] * 3),
        (["mse", BINARY, "kld"], ["numbers", "sigmoid", "softmax"]),
        (["mse", None, "kld"], ["numbers", None, "softmax"]),
        (
            {"a": "kld", "b": "mse", "c": BINARY},
            ["softmax", "numbers", "sigmoid"],
        ),
    ],
)
def test_several_outputs(loss, expected, as_dict):
    model = model_of(3, 2, 4, loss=loss, names="abc", as_dict=as_dict)
    kinds = [m and m.kind for m in read(model)]
    assert kinds == expected


def test_several_outputs_and_arguments():
    model = model_of(3, 2, loss=["mse", own_loss], names="ab")
    with pytest.raises(ValueError, match="loss=own_loss for output 'b'"):
        read(model)
    meanings = read(
        model, output_kind={"b": "softmax"}, from_logits=[None, True]
    )
    assert meanings == [
        OutputMeaning("numbers"),
        OutputMeaning("softmax", True),
    ]
    # An output without a loss may be named, too.
    model = model_of(3, 2, loss=["mse", None], names="ab")
    assert read(model, output_kind=[None, "numbers"])[1].kind == "numbers"
    for wrong in (["mse"] * 3, {"c": "softmax"}):
        with pytest.raises(ValueError, match="one for each output"):
            read(model, output_kind=wrong)


def test_several_losses_of_one_output():
    assert read(model_of(3, loss=["mse", "mae"]))[0].kind == "numbers"
    both = model_of(3, loss=["mse", "kld"])
    with pytest.raises(ValueError, match="agree in what it means"):
        read(both)
    assert read(both, output_kind="softmax")[0].kind == "softmax"


@pytest.mark.parametrize("loss", [own_loss, OwnLoss(), "dice", None])
def test_a_loss_that_does_not_tell(loss):
    with pytest.raises(ValueError, match=r"sparse_categorical.*output_kind"):
        read(model_of(3, loss=loss))
    with pytest.raises(ValueError, match="output_kind"):
        read(model_of(3, loss=loss), from_logits=False)


def test_a_loss_that_does_not_tell_and_arguments_that_do():
    model = model_of(3, loss=own_loss)
    with pytest.raises(ValueError, match="`from_logits` to be given"):
        read(model, output_kind="softmax")
    meaning = read(model, output_kind="softmax", from_logits=True)
    assert meaning == [OutputMeaning("softmax", True)]
    assert read(model, output_kind="numbers") == [OutputMeaning("numbers")]
    # The loss of Dice is one of probabilities.
    [meaning] = read(model_of(3, loss="dice"), output_kind="sigmoid")
    assert meaning == OutputMeaning("sigmoid", False)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        ("sparse_categorical_crossentropy", {"from_logits": True}),
        (BINARY, {"from_logits": False}),
        (BINARY, {"output_kind": "softmax"}),
        ("mse", {"from_logits": True}),
        ("dice", {"output_kind": "sigmoid", "from_logits": True}),
        ("kld", {"output_kind": "numbers", "from_logits": True}),
        ("kld", {"output_kind": "logits"}),
        ("kld", {"output_kind": True}),
        ("kld", {"from_logits": 0}),
        ("kld", {"from_logits": "yes"}),
    ],
)
def test_contradictions(loss, arguments):
    with pytest.raises(ValueError, match=r"Expected .*Received: "):
        read(model_of(3, loss=loss), **arguments)


@pytest.mark.parametrize(
    ("loss", "arguments", "expected"),
    [
        ("mse", {"output_kind": "softmax", "from_logits": False}, SOFTMAX),
        ("binary_crossentropy", {"output_kind": "softmax"}, SOFTMAX),
        (BINARY, {"output_kind": "numbers"}, NUMBERS),
        ("mse", {"from_logits": False}, NUMBERS),
        (BINARY, {"from_logits": True}, ("sigmoid", True)),
    ],
)
def test_arguments_override(loss, arguments, expected):
    [meaning] = read(model_of(3, loss=loss), **arguments)
    assert (meaning.kind, meaning.from_logits) == expected


RNG = np.random.default_rng(0)
Z, S = RNG.normal(0, 2, (2, 4, 5, 3)).astype("float32")


def bernoulli(p, q):
    kl_div = scipy.special.kl_div
    return np.mean(kl_div(p, q) + kl_div(1 - p, 1 - q), axis=-1)


def categorical(f, g):
    return np.sum(scipy.special.kl_div(f, g), axis=-1)


EXPECTED = {
    "softmax": lambda z, s: categorical(
        scipy.special.softmax(z, -1), scipy.special.softmax(s, -1)
    ),
    "sigmoid": lambda z, s: bernoulli(
        scipy.special.expit(z), scipy.special.expit(s)
    ),
    "numbers": lambda z, s: np.mean((z - s) ** 2, axis=-1),
}
TO_OUTPUT = {
    "softmax": lambda z: scipy.special.softmax(z, -1),
    "sigmoid": scipy.special.expit,
    "numbers": lambda z: z,
}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("kind", outputs.KINDS)
def test_divergences_by_scipy(kind, from_logits, temperature):
    if kind == "numbers" and from_logits:
        return
    to_output = (lambda z: z) if from_logits else TO_OUTPUT[kind]
    meaning = OutputMeaning(kind, from_logits)
    found = meaning.divergence(to_output(Z), to_output(S), temperature)
    z, s = (x.astype("float64") / temperature for x in (Z, S))
    expected = temperature**2 * EXPECTED[kind](z, s)
    assert found.shape == (4, 5)
    np.testing.assert_allclose(value(found), expected, rtol=2e-5, atol=2e-6)
    # The teacher's logits beside the student's probabilities.
    if kind != "numbers":
        mixed = meaning.divergence(
            TO_OUTPUT[kind](Z),
            to_output(S),
            temperature,
            OutputMeaning(kind, False),
        )
        np.testing.assert_allclose(value(mixed), expected, rtol=2e-5, atol=2e-6)


def test_known_numbers():
    labels = OutputMeaning("sigmoid")
    f, g = np.full((1, 3), 0.9), np.full((1, 3), 0.1)
    expected = 0.9 * np.log(9) + 0.1 * np.log(1 / 9)
    np.testing.assert_allclose(value(labels.divergence(f, g)), [expected], 1e-6)
    numbers = OutputMeaning("numbers")
    found = numbers.divergence(ops.array([[5.0]]), ops.array([[1.5]]), 7.0)
    assert value(found) == [12.25]
    with pytest.raises(ValueError, match="of one kind"):
        numbers.divergence(f, g, 1.0, labels)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_certain_predictions_are_finite(kind):
    f, g = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    found = value(OutputMeaning(kind).divergence(f, g))
    np.testing.assert_allclose(found, [-np.log(1e-7)], rtol=2e-2)
    hard = value(OutputMeaning(kind, True).divergence(1e4 * f, -1e4 * f))
    assert np.isfinite(hard).all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_logits_of_minus_infinity(kind):
    """Classes that are masked out have no share in the divergence."""
    meaning = OutputMeaning(kind, True)
    z, s = Z.copy(), S.copy()
    z[..., 1] = s[..., 1] = -np.inf
    z[..., 2] = -np.inf  # certain in the target alone
    expected = EXPECTED[kind](z, s)
    np.testing.assert_allclose(value(meaning.divergence(z, s)), expected, 1e-5)
    _, gradients = backend.value_and_grad(
        lambda args: (ops.sum(meaning.divergence(*args)), None),
        (ops.convert_to_tensor(z), ops.convert_to_tensor(s)),
    )
    assert all(np.isfinite(value(g)).all() for g in gradients)
    features = value(meaning.features(z))
    assert np.isfinite(features).all()


@pytest.mark.parametrize("kind", outputs.KINDS)
def test_features_are_half_a_squared_length(kind):
    """By a small step: D(f, f + δ) / (½ ‖Δφ‖²) tends to 1."""
    meaning = OutputMeaning(kind, kind != "numbers")
    with backend.full_precision():
        steps = [Z, Z + 0.03 * S]
        phi = [value(meaning.features(z), "float64") for z in steps]
        half = 0.5 * np.sum((phi[0] - phi[1]) ** 2, axis=-1)
    exact = EXPECTED[kind](*(x.astype("float64") for x in steps))
    np.testing.assert_allclose(half, exact, rtol=0.06, atol=1e-7)


def test_log_probabilities():
    found = OutputMeaning("softmax", True).log_probabilities(Z)
    expected = scipy.special.log_softmax(Z, -1)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5, atol=1e-6)
    found = OutputMeaning("sigmoid", True).log_probabilities(Z)
    expected = np.stack([-np.logaddexp(0, Z), -np.logaddexp(0, -Z)], -1)
    np.testing.assert_allclose(value(found), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="of numbers"):
        OutputMeaning("numbers").log_probabilities(Z)


def test_another_axis():
    found = OutputMeaning("softmax", True, axis=1).divergence(
        np.moveaxis(Z, -1, 1), np.moveaxis(S, -1, 1)
    )
    expected = EXPECTED["softmax"](Z, S)
    np.testing.assert_allclose(value(found), expected, rtol=1e-4, atol=1e-6)


def test_one_number_a_sample_without_an_axis():
    found = OutputMeaning("numbers").divergence(Z[:, 0, 0], S[:, 0, 0])
    expected = (Z[:, 0, 0] - S[:, 0, 0]) ** 2
    np.testing.assert_allclose(value(found), expected, rtol=1e-5)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="binary_crossentropy"):
        OutputMeaning("softmax").divergence(Z[..., :1], S[..., :1])


def test_positions():
    x = ops.copy(Z)
    meaning = OutputMeaning("softmax", True)
    assert meaning.positions(x) is None
    mask = RNG.random((4, 5)) < 0.5
    backend.set_keras_mask(x, ops.convert_to_tensor(mask))
    assert (value(meaning.positions(x)) == mask).all()
    y = RNG.integers(-1, 3, (4, 5))
    ignoring = OutputMeaning("softmax", True, ignore_class=-1)
    for labels in (y, y[..., None].astype("float32")):
        assert (value(ignoring.positions(x, labels)) == mask & (y >= 0)).all()
    assert (value(ignoring.positions(ops.copy(Z), y)) == (y >= 0)).all()
    backend.set_keras_mask(x, ops.ones((4, 5, 3), "bool"))
    with pytest.raises(ValueError, match="mask of other axes"):
        meaning.positions(x)


def test_half_precision_is_computed_in_float32():
    half = [ops.cast(x, "bfloat16") for x in (Z, S)]
    found = OutputMeaning("softmax", True).divergence(*half)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    z, s = (value(ops.cast(x, "float32"), "float64") for x in half)
    expected = EXPECTED["softmax"](z, s)
    np.testing.assert_allclose(value(found), expected, rtol=2e-5, atol=2e-6)
