"""Methods that are changed, and models that change their method, later."""

import inspect

import keras
import numpy as np
import pytest
import toy
from keras import layers
from kit import (
    TENSORFLOW,
    slow_on_jax,
)

import blogkeras
from blogkeras import (
    FGM,
    PGD,
    AdversarialWeightPerturbation,
    FreeLB,
    GradientPenalty,
    NoiseStability,
    VirtualAdversarialTraining,
    adversarial_training,
    backend,
)


def make_linear():
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(1, use_bias=False)]
    )
    model.compile(keras.optimizers.SGD(0.0), loss=lambda y, p: p[:, 0])
    model.set_weights([np.array([[3.0], [0.0], [4.0]])])
    return model


@pytest.fixture
def linear():
    """A model whose loss at ε is the clean loss plus ε ‖w‖."""
    return make_linear()


X, Y = np.ones((1, 3)), np.zeros((1, 1))
CLEAN, NORM = 7.0, 5.0


def strength(model):
    return (toy.batch_loss(model, X, Y) - CLEAN) / NORM


def strengths(model, callback, epochs=4):
    losses = model.fit(
        X, Y, epochs=epochs, verbose=0, callbacks=[callback]
    ).history["loss"]
    return (np.array(losses) - CLEAN) / NORM


def test_a_changed_strength_holds_at_once(linear):
    method = FGM(1.0)
    adversarial_training(linear, method=method)
    np.testing.assert_allclose(strength(linear), 1, rtol=1e-5)
    method.epsilon = 5.0
    np.testing.assert_allclose(strength(linear), 5, rtol=1e-5)
    method.clean_weight = 0.5
    np.testing.assert_allclose(strength(linear), 2.5, rtol=1e-5)
    method.start_step = 1000
    np.testing.assert_allclose(strength(linear), 0, atol=1e-5)


def test_a_strength_changed_by_a_callback_holds_in_the_same_fit(linear):
    method = FGM(9.0)
    adversarial_training(linear, method=method)

    class Climb(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            method.epsilon = epoch

    np.testing.assert_allclose(
        strengths(linear, Climb()), [0, 1, 2, 3], atol=1e-5
    )


@pytest.mark.skipif(TENSORFLOW, reason="keras.distribution is JAX's")
def test_a_strength_changed_by_a_callback_under_a_distribution():
    method = FGM(9.0, norm_scope="sample", site="output")

    class Climb(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            method.epsilon = self.model.count
            self.model.count += 1

    with backend.distribution().scope():
        model = make_linear()
        model.count = 0
        adversarial_training(model, method=method)
        losses = model.fit(
            np.ones((4, 3)),
            np.zeros((4, 1)),
            batch_size=2,
            epochs=2,
            verbose=0,
            callbacks=[Climb()],
        ).history["loss"]
    np.testing.assert_allclose(
        (np.array(losses) - CLEAN) / NORM, [0.5, 2.5], atol=1e-5
    )
    assert model.optimizer.iterations == 4
    np.testing.assert_allclose(model.get_weights()[0][:, 0], [3, 0, 4])


def test_a_callback_may_install_and_uninstall(linear):
    class Switch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            adversarial_training(self.model, epsilon=1.0)

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                blogkeras.plain_training(self.model)
            if epoch == 2:
                adversarial_training(self.model, epsilon=7.0)

        def on_train_batch_end(self, batch, logs=None):
            adversarial_training(self.model, epsilon=self.params["epochs"])

    expected = [1, 0, 7, 4]
    np.testing.assert_allclose(strengths(linear, Switch()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        (FGM(0.5), {"norm_scope": "token", "site": "output"}),
        (PGD(0.5, 1, 0.3), {"steps": 3, "step_size": 0.6}),
        (PGD(0.5, 2, site="output"), {"random_start": True, "seed": 4}),
        (FreeLB(0.5, 1), {"steps": 2, "initial_norm": 0.1}),
        (GradientPenalty(0.5), {"form": "norm", "epsilon": 0.1}),
        (VirtualAdversarialTraining(0.5), {"xi": 1.0, "iters": 2, "seed": 1}),
        (NoiseStability(0.5), {"epsilon": 2.0, "seed": 3}),
    ],
    ids=lambda value: type(value).__name__,
)
@slow_on_jax
def test_a_changed_method_is_a_new_one(method, changes):
    def losses(method, changes):
        toy.reset()
        model = toy.compiled(
            toy.classifier(regularizer=None, dropout=0.0),
            keras.optimizers.SGD(0.0),
            run_eagerly=TENSORFLOW,
        )
        rows = toy.TOKENS[:8], toy.LABELS[:8]
        adversarial_training(model, method=method)
        first = toy.batch_loss(model, *rows)
        for name, value in changes.items():
            setattr(method, name, value)
        return first, toy.batch_loss(model, *rows)

    before, changed = losses(method, changes)
    assert abs(before - changed) > 1e-6
    _, expected = losses(method, {})
    np.testing.assert_allclose(changed, expected, rtol=1e-6)


def test_two_models_of_one_method(linear):
    other = make_linear()
    method = FGM(1.0)
    for model in (linear, other):
        adversarial_training(model, method=method)
        np.testing.assert_allclose(strength(model), 1, rtol=1e-5)
    method.epsilon = 2.0
    for model in (other, linear):
        np.testing.assert_allclose(strength(model), 2, rtol=1e-5)


class Noting(FGM):
    """It sets an attribute of its own while it is traced."""

    traces = 0

    def perturbation(self, *args):
        self.traces = self.traces + 1
        return super().perturbation(*args)


def test_what_a_method_notes_down_compiles_nothing_anew(linear):
    method = Noting(1.0)
    adversarial_training(linear, method=method)
    for _ in range(4):
        strength(linear)
    assert method.traces <= 2


def test_changes_of_an_attack_inside_do_not_cancel():
    method = AdversarialWeightPerturbation(0.0, FGM(1.0))
    other = FGM(2.0)
    method.attack.epsilon = 3.0
    before = method.version
    method.attack = other
    assert method.version != before


def test_what_an_attack_inside_notes_down_compiles_nothing_anew(linear):
    attack = Noting(1.0)
    adversarial_training(
        linear, method=AdversarialWeightPerturbation(0.0, attack)
    )
    for _ in range(4):
        strength(linear)
    assert attack.traces <= 2
    attack.epsilon = 2.0
    np.testing.assert_allclose(strength(linear), 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        (FGM(), "epsilon", -1),
        (FGM(), "site", "logits"),
        (PGD(), "steps", 0),
        (VirtualAdversarialTraining(), "xi", 0),
        (VirtualAdversarialTraining(), "site", "matrix"),
    ],
)
def test_a_change_is_checked(method, name, value):
    before = getattr(method, name)
    with pytest.raises(ValueError, match=f"Received: {name}={value!r}"):
        setattr(method, name, value)
    assert getattr(method, name) == before


def test_a_change_that_does_not_fit_the_site():
    model = toy.compiled(toy.classifier(), run_eagerly=True)
    method = FGM()
    adversarial_training(model, method=method)
    method.norm_scope = "sample"
    with pytest.raises(ValueError, match='needs site="output"'):
        model.fit(toy.TOKENS[:8], toy.LABELS[:8], verbose=0)


# Arguments

WRONG = {
    "count": (4.0, 4.5, True, "4", None, float("inf"), float("nan"), -1, [2]),
    "number": ("4", True, None, float("inf"), float("nan"), -1, [0.5]),
    "choice": (1, None, True, "matrices", ["matrix"]),
    "boolean": (0, 1, None, "yes", [True]),
    "seed": (4.0, True, "4", float("nan"), [1]),
    "bounds": (3, True, (1, 0), (0, 1, 2), (0, float("inf")), "01"),
    "output": ("tanh", 3, True, ["softmax", "tanh"], {"labels": 0.5}),
    "logits": ("yes", 1, 0.5, [True, "no"], {"labels": 0}),
    "attack": (3, True, "fgm", FGM, FreeLB(), FGM(clean_weight=0.5)),
}
KINDS = {
    "epsilon": "number",
    "site": "choice",
    "start_step": "count",
    "norm_scope": "choice",
    "clean_weight": "number",
    "steps": "count",
    "step_size": "number",
    "random_start": "boolean",
    "initial_norm": "number",
    "form": "choice",
    "xi": "number",
    "iters": "count",
    "seed": "seed",
    "bounds": "bounds",
    "weight": "number",
    "output_kind": "output",
    "from_logits": "logits",
    "attack": "attack",
}
ALLOWED = {(name, "step_size"): (None,) for name in ("PGD", "TRADES", "SMART")}


def table():
    for cls in blogkeras.adversarial.METHODS.values():
        names = {*cls.checks, *inspect.signature(cls).parameters}
        for name in sorted(names - {"kwargs"}):
            yield cls, name


@pytest.mark.parametrize(
    ("cls", "name"), list(table()), ids=lambda v: getattr(v, "__name__", v)
)
def test_each_argument_of_each_method(cls, name):
    for value in WRONG[KINDS[name]]:
        if value in ALLOWED.get((cls.__name__, name), ()):
            continue
        method = cls()
        before = getattr(method, name)
        with pytest.raises(ValueError, match=rf"Expected .*Received: {name}="):
            setattr(method, name, value)
        assert getattr(method, name) == before


@pytest.mark.parametrize(
    ("function", "name", "values"),
    [
        ("adversarial_training", "model", ("model", None, layers.Dense(2))),
        ("adversarial_training", "embedding_name", (3, "", ["a"], True)),
        (
            "adversarial_training",
            "epsilon",  # `None` is the method's own
            [value for value in WRONG["number"] if value is not None],
        ),
        ("adversarial_training", "method", (3, None, "magic", FGM, ["fgm"])),
        ("adversarial_training", "padding_mask", (3, "", ["a"])),
        ("virtual_adversarial_training", "model", ("model", None)),
        ("virtual_adversarial_training", "epsilon", WRONG["number"]),
        ("virtual_adversarial_training", "xi", (0, *WRONG["number"])),
        ("virtual_adversarial_training", "iters", WRONG["count"]),
        ("virtual_adversarial_training", "output_kind", ("tanh", 3)),
        ("virtual_adversarial_training", "from_logits", ("yes", 1)),
        ("plain_training", "model", ("model", None)),
        ("evaluate_robustness", "model", ("model", None)),
        ("evaluate_robustness", "epsilons", ((), "a", None, [-1], [True])),
        ("evaluate_robustness", "attack", (3, None, "fgsm")),
        ("evaluate_robustness", "embedding_name", (3, "")),
        ("evaluate_robustness", "relative", (1, None, "yes")),
        ("evaluate_robustness", "steps", (0, *WRONG["count"])),
        ("evaluate_robustness", "batch_size", (0, 4.0, True, "4", -1)),
        ("evaluate_robustness", "verbose", ("loud", 3, None, 1.5)),
        ("evaluate_robustness", "max_batches", (0, 4.0, True, "4")),
        ("evaluate_robustness", "padding_mask", (3, "")),
    ],
)
def test_each_argument_of_each_function(function, name, values):
    model = toy.compiled(toy.classifier(), run_eagerly=True)
    arguments = {"model": model}
    if function == "evaluate_robustness":
        arguments |= {"x": toy.TOKENS[:8], "y": toy.LABELS[:8], "verbose": 0}
    for value in values:
        with pytest.raises(ValueError, match=rf"Expected .*Received: .*{name}"):
            getattr(blogkeras, function)(**{**arguments, name: value})
