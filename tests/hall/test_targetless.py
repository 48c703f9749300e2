"""Models of data without targets: what their verbs check and hand to Keras."""

import keras
import numpy as np
import pytest
from keras import ops
from kit import SLOW_FILE_ON_JAX

from blogkeras.arguments import row_weights
from blogkeras.models import TargetlessModel

pytestmark = SLOW_FILE_ON_JAX

X = np.arange(8, dtype="float32")[:, None]
WEIGHTS = np.array([0, 0, 0, 0, 0, 0, 2, 1], "float32")


class Center(TargetlessModel):
    """Learns the weighted mean of numbers: loss Σ w (x − c)² / n."""

    ROW = "number"

    def __init__(self):
        super().__init__()
        self.center = self.add_weight((), "zeros", name="center")
        self.checked = 0
        self.built = True

    def _check_data(self, x):
        self.checked += 1
        return x, len(x) if isinstance(x, np.ndarray) else None

    def call(self, x):
        return ops.square(ops.subtract(x[:, 0], self.center))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if sample_weight is not None:
            y_pred = y_pred * row_weights(sample_weight, self.ROW)
        return ops.mean(y_pred)


@pytest.fixture
def model():
    model = Center()
    model.compile("sgd", run_eagerly=True)
    return model


# Σ w x² / n of WEIGHTS, at the center 0.
WEIGHTED = (2 * 36 + 49) / 8


@pytest.mark.parametrize(
    "weights", [WEIGHTS, WEIGHTS[:, None], WEIGHTS.astype("int64").tolist()]
)
def test_weights_count_without_targets(model, weights):
    arguments = {"sample_weight": weights, "batch_size": 8, "verbose": 0}
    assert model.evaluate(X, **arguments) == pytest.approx(WEIGHTED)
    assert model.test_on_batch(X, sample_weight=weights) == pytest.approx(
        WEIGHTED
    )
    history = model.fit(
        X, validation_data=(X, None, weights), epochs=2, **arguments
    ).history
    assert history["loss"][0] == pytest.approx(WEIGHTED)
    # The center after one step from 0 is 0.01 · 2 Σ w x / n.
    center = 0.02 * (2 * 6 + 7) / 8
    expected = np.sum(WEIGHTS * np.square(X[:, 0] - center)) / 8
    assert history["val_loss"][0] == pytest.approx(expected)
    # Validation data are checked once, not in each epoch.
    assert model.checked == 4


def test_arguments_by_their_place(model):
    """As in Keras, whose `fit` has the weights in the tenth place."""
    assert model.evaluate(X, None, 8, 0, WEIGHTS) == pytest.approx(WEIGHTED)
    before = 8, 1, 0, None, 0.0
    known = X, None, WEIGHTS
    history = model.fit(X, None, *before, known, True, None, WEIGHTS).history
    assert history["loss"][0] == pytest.approx(WEIGHTED)
    assert model.checked == 3
    for verb, places in (
        (model.fit, (*before, None, True, {0: 1.0})),
        (model.train_on_batch, (None, {0: 1.0})),
    ):
        with pytest.raises(ValueError, match="`class_weight`"):
            verb(X, None, *places)


@pytest.mark.parametrize("verb", ["fit", "evaluate", "train_on_batch"])
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (WEIGHTS[:3], "one weight for each number.* 8 of them"),
        (np.ones((8, 2)), "one weight for each number"),
        (np.full(8, np.nan), "finite numbers in `sample_weight`"),
        (-WEIGHTS, "at least 0"),
        (["a"] * 8, "Expected numbers in `sample_weight`"),
    ],
)
def test_bad_weights(model, verb, weights, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, verb)(X, sample_weight=weights)


def test_weights_of_a_data_set(model):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, number):
            return X, X, np.ones((8, 2))

    with pytest.raises(ValueError, match="one weight for each number"):
        model.fit(Batches(), verbose=0)


def test_no_class_weights(model):
    for verb in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match="`class_weight`"):
            verb(X, X, class_weight={0: 1.0})


def test_a_generator_is_not_to_be_shuffled(model):
    model.fit(((X,) for _ in range(2)), steps_per_epoch=2, verbose=0)


def test_fit_twice_with_averages_of_weights():
    """Keras 3.15 alone fails here on JAX: two variables have one array.

    With rate r, momentum m and the gradient 2 (c − x̄): the weight takes over
    its average after each `fit`; the average begins with the first step.
    """
    model = Center()
    rate, momentum = 0.125, 0.5
    model.compile(
        keras.optimizers.SGD(rate, use_ema=True, ema_momentum=momentum)
    )
    center, average = 0.0, None
    for _ in range(2):
        model.fit(X, batch_size=8, epochs=2, verbose=0)
        for _ in range(2):
            center -= rate * 2 * (center - 3.5)
            if average is None:
                average = center
            average = momentum * average + (1 - momentum) * center
        center = average
        assert model.center.numpy() == pytest.approx(center, rel=1e-6)
