"""The parts of a method's loss in the logs, and what a method perturbs."""

import keras
import numpy as np
import pytest
import toy
from keras import layers, ops
from kit import replica_run, slow_on_jax

import blogkeras
from blogkeras import (
    FGM,
    FGSM,
    PGD,
    SMART,
    TRADES,
    AdversarialMethod,
    AdversarialWeightPerturbation,
    FreeLB,
    GradientPenalty,
    NoiseStability,
    RDrop,
    VirtualAdversarialTraining,
    adversarial_training,
    describe_training,
    plain_training,
)
from blogkeras.training.parts import find_parts

RNG = np.random.default_rng(5)
X = RNG.normal(size=(5, 3)).astype("float32")
Y = np.zeros((5, 1), "float32")
W = np.array([[3.0], [0.0], [4.0]], "float32")  # of norm 5
PARTS = {"clean_loss", "adversarial_loss", "penalty"}


def first_column(y_true, y_pred):
    return y_pred[:, 0]


def linear(rate=0.0, **kwargs):
    """A model whose loss is the mean of w · x over a batch."""
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(1, use_bias=False)]
    )
    kwargs.setdefault("run_eagerly", True)
    model.compile(keras.optimizers.SGD(rate), loss=first_column, **kwargs)
    model.set_weights([W])
    return model


def fit(model, method, epochs=1, x=X, y=Y, **kwargs):
    adversarial_training(model, method=method)
    return model.fit(
        x, y, batch_size=2, epochs=epochs, shuffle=False, verbose=0, **kwargs
    ).history


def by_hand(share, rate=0.0, epochs=1):
    """`(clean losses, losses)` of the epochs, weighted by batch size.

    A batch is perturbed by `share` of a unit along its gradient.
    """
    w, clean, total = W[:, 0].astype("float64"), [], []
    for _ in range(epochs):
        sums = np.zeros(2)
        for start in (0, 2, 4):
            rows = X[start : start + 2]
            loss = (rows @ w).mean()
            # The gradient at the input is w / batch in each row.
            norm = np.linalg.norm(w) / np.sqrt(len(rows))
            sums += len(rows) * np.array([loss, loss + share * norm])
            step = share * w / (len(rows) * norm)  # of each row
            w = w - rate * (rows.mean(0) + step)
        clean.append(sums[0] / 5)
        total.append(sums[1] / 5)
    return clean, total


@slow_on_jax
@pytest.mark.parametrize(
    ("method", "share"),
    [
        (FGM(0.5), 0.5),
        (FGM(0.5, clean_weight=0.25), 0.5),
        (PGD(0.5, steps=2), 0.5),
        # The second and last point is half as far away.
        (FreeLB(0.5, steps=2, initial_norm=0, norm_scope="batch"), 0.25),
    ],
    ids=["fgm", "mixture", "pgd", "freelb"],
)
def test_parts_of_attacks_by_hand(method, share):
    history = fit(linear(), method)
    clean, worst = by_hand(share)
    np.testing.assert_allclose(history["clean_loss"], clean, rtol=1e-5)
    np.testing.assert_allclose(history["adversarial_loss"], worst, rtol=1e-5)
    assert PARTS & set(history) == {"clean_loss", "adversarial_loss"}


def test_the_loss_is_the_mixture_of_its_parts():
    history = fit(linear(), FGM(0.5, clean_weight=0.25))
    np.testing.assert_allclose(
        history["loss"],
        0.75 * np.array(history["adversarial_loss"])
        + 0.25 * np.array(history["clean_loss"]),
        rtol=1e-6,
    )


@pytest.mark.parametrize("compile", [{"run_eagerly": True}, {}])
def test_means_start_anew_in_each_epoch(compile):
    history = fit(linear(0.1, **compile), FGM(0.5), epochs=3)
    clean, worst = by_hand(0.5, 0.1, 3)
    np.testing.assert_allclose(history["clean_loss"], clean, rtol=1e-5)
    np.testing.assert_allclose(history["adversarial_loss"], worst, rtol=1e-5)


def test_compiled_with_several_steps_in_one_execution():
    compile = {"jit_compile": True, "steps_per_execution": 2}
    history = fit(linear(0.1, run_eagerly=False, **compile), FGM(0.5), epochs=2)
    clean, worst = by_hand(0.5, 0.1, 2)
    np.testing.assert_allclose(history["clean_loss"], clean, rtol=1e-5)
    np.testing.assert_allclose(history["loss"], worst, rtol=1e-5)
    np.testing.assert_allclose(
        history["adversarial_loss"], history["loss"], rtol=1e-6
    )


def test_penalty_of_the_gradient_by_hand():
    history = fit(linear(), GradientPenalty(0.5, form="norm"))
    clean, total = by_hand(0.5)
    np.testing.assert_allclose(history["clean_loss"], clean, rtol=1e-5)
    np.testing.assert_allclose(
        history["penalty"], np.subtract(total, clean), rtol=1e-5
    )


def classifier(dropout=0.0):
    toy.reset()
    model = toy.classifier(
        dropout=dropout,
        normalization=layers.LayerNormalization,
        regularizer=None,
    )
    return toy.compiled(model, keras.optimizers.SGD(0.0), run_eagerly=True)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(NoiseStability(0.5), marks=pytest.mark.verify),
        VirtualAdversarialTraining(0.5),
        TRADES(0.5, steps=1),
        pytest.param(SMART(0.5), marks=pytest.mark.verify),
        FGM(0.5),
        FGSM(0.5),
        FreeLB(0.5, initial_norm=0),
        AdversarialWeightPerturbation(0.1),
        AdversarialWeightPerturbation(0.1, attack=FGM(0.5)),
    ],
    ids=lambda method: type(method).__name__,
)
@slow_on_jax
def test_the_clean_loss_is_that_of_the_model(method):
    model, rows = classifier(), (toy.TOKENS[:8], toy.LABELS[:8])
    expected = toy.batch_loss(model, *rows)
    adversarial_training(model, method=method)
    logs = model.train_on_batch(*rows, return_dict=True)
    np.testing.assert_allclose(logs["clean_loss"], expected, rtol=1e-6)
    other = logs.get("penalty", logs.get("adversarial_loss"))
    assert other > 1e-4
    if "penalty" in logs:
        np.testing.assert_allclose(logs["loss"], expected + other, rtol=1e-6)
    assert set(method.parts) == PARTS & set(logs)


@slow_on_jax
def test_parts_of_r_drop():
    model, rows = classifier(0.5), (toy.TOKENS[:8], toy.LABELS[:8])
    adversarial_training(model, method=RDrop(4.0))
    logs = model.train_on_batch(*rows, return_dict=True)
    np.testing.assert_allclose(
        logs["loss"], logs["clean_loss"] + logs["penalty"], rtol=1e-6
    )
    assert logs["penalty"] > 1e-4


@slow_on_jax
def test_a_part_that_no_pass_computes_is_left_out():
    model = classifier()
    adversarial_training(model, method=FreeLB(0.5))
    logs = model.train_on_batch(
        toy.TOKENS[:8], toy.LABELS[:8], return_dict=True
    )
    assert PARTS & set(logs) == {"adversarial_loss"}


@pytest.mark.verify
def test_two_replicas():
    def make(model):
        return FGM(0.5, site="output").hook(model)

    _, one = replica_run(make, 1)
    _, two = replica_run(make, 2)
    assert {"clean_loss", "adversarial_loss"} < set(two)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4)


# Keras's own logs stay what they are


def test_evaluate_knows_no_parts():
    model = linear(metrics=["mae"])
    expected = model.evaluate(X, Y, verbose=0, return_dict=True)
    history = fit(model, FGM(0.5), epochs=2, validation_data=(X, Y))
    assert [n for n in history if n.startswith("val_")] == [
        "val_loss",
        "val_mae",
    ]
    assert model.evaluate(X, Y, verbose=0, return_dict=True) == expected
    model.train_on_batch(X, Y)
    assert model.test_on_batch(X, Y, return_dict=True).keys() == {"loss", "mae"}
    assert len(model.evaluate(X, Y, verbose=0)) == 2


def test_the_list_of_train_on_batch_is_that_of_keras():
    model = adversarial_training(linear(), epsilon=0.5)
    assert np.ndim(model.train_on_batch(X, Y)) == 0
    model = adversarial_training(linear(metrics=["mae"]), epsilon=0.5)
    loss, mae = model.train_on_batch(X, Y)
    logs = model.train_on_batch(X, Y, return_dict=True)
    assert (loss, mae) == (logs["loss"], logs["mae"])
    assert set(logs) == {"loss", "mae", "clean_loss", "adversarial_loss"}


def test_a_name_that_is_taken():
    def penalty(y_true, y_pred):
        return 0.0 * y_pred[:, 0] + 3.0

    history = fit(
        linear(metrics=[penalty]), GradientPenalty(0.5, form="norm"), epochs=2
    )
    clean, total = by_hand(0.5)
    assert history["penalty"] == [3.0, 3.0]
    np.testing.assert_allclose(
        history["training_penalty"], np.subtract(total, clean)[[0, 0]], 1e-5
    )


def test_an_output_of_the_name_of_a_part():
    x = keras.Input((3,))
    outputs = {
        "clean": layers.Dense(1, use_bias=False, name="clean")(x),
        "other": layers.Dense(1, use_bias=False, name="other")(x),
    }
    model = keras.Model(x, outputs)
    model.compile("sgd", {k: first_column for k in outputs}, run_eagerly=True)
    history = fit(model, FGM(0.5), y={k: Y for k in outputs})
    assert {"clean_loss", "other_loss", "training_clean_loss"} < set(history)


class OwnMetrics(keras.Model):
    """A model that lists its metrics itself, as Keras's pages show."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)
        self.tracker = keras.metrics.Mean(name="mean")

    def call(self, x):
        return self.dense(x)

    @property
    def metrics(self):
        return [self._loss_tracker, self.tracker]


def test_a_model_with_metrics_of_its_own():
    model = OwnMetrics()
    model.compile("sgd", first_column, run_eagerly=True)
    history = fit(model, FGM(0.5))
    assert set(history) == {"loss", "mean"}


class OwnLogs(keras.Model):
    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"error": ops.mean(y_pred)}


def test_a_model_with_logs_of_its_own():
    x = keras.Input((3,))
    model = OwnLogs(x, layers.Dense(1)(x))
    model.compile("sgd", first_column, run_eagerly=True)
    history = fit(model, FGM(0.5))
    assert set(history) == {"error", "clean_loss", "adversarial_loss"}


# Installing


def test_another_method_in_the_middle_of_fit():
    class Switch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                method = GradientPenalty(0.5, form="norm")
                adversarial_training(self.model, method=method)
            if epoch == 2:
                plain_training(self.model)

    logs = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, values: logs.append(dict(values))
    )
    fit(linear(), FGM(0.5), epochs=3, callbacks=[Switch(), record])
    assert [PARTS & set(each) for each in logs] == [
        {"clean_loss", "adversarial_loss"},
        {"clean_loss", "penalty"},
        set(),
    ]
    _, total = by_hand(0.5)
    np.testing.assert_allclose(logs[0]["adversarial_loss"], total, rtol=1e-5)
    np.testing.assert_allclose(logs[1]["loss"], total, rtol=1e-5)


def test_plain_training_takes_the_parts_away(tmp_path):
    model = linear()
    names = model.metrics_names
    fit(model, FGM(0.5))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"first_column": first_column}
    )
    assert find_parts(loaded) is None
    plain_training(model)
    assert model.metrics_names == names
    assert "train_on_batch" not in vars(model)


def test_no_retracing_for_the_parts():
    class Counting(FGM):
        traces = 0

        def perturbation(self, *args):
            self.traces = self.traces + 1
            return super().perturbation(*args)

    method, model = Counting(0.5), linear(run_eagerly=False)
    adversarial_training(model, method=method)
    for _ in range(3):
        model.fit(X[:4], Y[:4], batch_size=2, epochs=2, verbose=0)
        model.evaluate(X, Y, verbose=0)
    assert 1 <= method.traces <= 2


def test_parts_of_a_method_of_your_own():
    class Smaller(AdversarialMethod):
        parts = ("largest_weight",)

        def gradients(self, objective, weights, site):
            evaluation, gradients = objective.value_and_grad(objective, weights)
            largest = ops.max(ops.abs(weights[0]))
            return (
                evaluation._replace(parts={"largest_weight": largest}),
                gradients,
            )

    assert fit(linear(), Smaller())["largest_weight"] == [4.0]


# What is perturbed


def test_what_is_perturbed_is_said():
    model = classifier()
    assert describe_training(model).endswith("perturbs nothing")
    adversarial_training(model, method=FGM(0.5))
    line = describe_training(model)
    assert line.startswith("FGM(epsilon=0.5, ")
    assert line.endswith(
        f"the embedding matrix of layer 'embedding', {toy.VOCABULARY} x 4"
    )
    adversarial_training(model, method=FGM(0.5, site="output"))
    assert describe_training(model).endswith(
        "perturbs the outputs of layer 'embedding'"
    )
    adversarial_training(model, method=AdversarialWeightPerturbation())
    assert describe_training(model).endswith(
        "two or more axes but biases and gains"
    )
    adversarial_training(
        model, method=AdversarialWeightPerturbation(attack=FGM(1.0))
    )
    assert "layer 'embedding'" in describe_training(model)
    adversarial_training(classifier(0.5), method=RDrop())
    with pytest.raises(ValueError, match="Received: model="):
        describe_training(None)


def test_inputs_and_nested_layers_are_said():
    model = adversarial_training(linear())
    assert "all floating inputs" in describe_training(model)
    x = keras.Input((3,), name="pixels")
    named = keras.Model(x, layers.Dense(1)(x))
    adversarial_training(named, "pixels")
    assert describe_training(named).endswith("the input 'pixels'")
    inner = toy.classifier()
    outer = keras.Sequential([keras.Input((5,), dtype="int32"), inner])
    adversarial_training(outer)
    assert f"'{inner.name}/embedding'" in describe_training(outer)


def test_a_place_that_is_found_in_the_first_step():
    model = OwnMetrics()
    model.compile("sgd", first_column, run_eagerly=True)
    adversarial_training(model)
    assert "first step" in describe_training(model)
    model.fit(X, Y, verbose=0)
    assert "all floating inputs" in describe_training(model)


def test_a_hook_of_another_room_is_said():
    model = linear()
    blogkeras.training.install(
        model,
        lambda objective, weights: objective.value_and_grad(objective, weights),
    )
    assert "nothing that is known" in describe_training(model)
