"""Trained to predict the same nearby: TRADES and SMART."""

from typing import Any

from keras import ops

from blogkeras import backend
from blogkeras.adversarial.base import (
    check_bounded,
    check_bounds,
    check_norm_scope,
    check_not_negative,
    check_seed,
    check_steps,
    with_penalty,
)
from blogkeras.adversarial.label_free import LabelFreeMethod
from blogkeras.adversarial.multi_step import ascend, start
from blogkeras.adversarial.norms import (
    bounded,
    offsets,
    shifted,
    site_gradients,
)
from blogkeras.arguments import check_number
from blogkeras.ops import masked_mean


def _check_initial_norm(name, value):
    # Where the predictions are equal, their divergence has no gradient.
    return check_number(name, value, above=0, maximum=1)


class TRADES(LabelFreeMethod):
    """Accuracy traded for robustness: the loss at x, the prediction around it.

        loss = L(f(x), y) + λ max_{‖δ‖ ≤ ε} KL(f(x) ‖ f(x + δ))

    The maximum is looked for by `steps` steps of projected ascent, as in `PGD`,
    from a random δ. Labels are in the first term alone, so rows of sample
    weight 0 count in the second one as well. Both predictions have a gradient.
    KL is the mean over all rows (of outputs with positions: over all that are
    not padding); of independent labels it is the mean of theirs, and of numbers
    it is the squared difference. State (BatchNormalization) and metrics are
    those of the clean pass.

    Symbols: ε is `epsilon`, λ is `weight` (the paper's β, or 1/λ).

    Args:
        epsilon: Float ≥ 0, or a schedule. Radius of the ball.
        weight: Float ≥ 0.
        steps: Integer ≥ 1.
        step_size: Float ≥ 0, as a share of ε. Defaults to 2.5 / steps.
        initial_norm: Float in (0, 1], as a share of ε: the norm of the first δ.
        norm_scope: `"batch"`, `"sample"`, `"token"` or `"coordinate"`: what
            shares one norm. `"coordinate"` is the paper's maximum norm.
        bounds: `(low, high)`, the range of a floating input, such as (0, 1) of
            images: a perturbed value does not leave it. `None`: no bounds.
        from_logits: Boolean. Whether the model gives logits. `None` reads it
            off the compiled loss.
        seed: Integer, `None` or a `keras.random.SeedGenerator`.
        start_step: Integer. Before this many updates ε is 0.
        output_kind: `"softmax"`, `"sigmoid"` or `"numbers"`: what the output
            is. `None` reads it off the compiled loss, which is not possible for
            a loss function of your own.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; and when the method is installed, where the
            loss does not say what the output is, or where there are bounds and
            no input is perturbed.

    Example:

    >>> model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten()])
    >>> model.add(layers.Dense(10, "softmax"))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> method = TRADES(0.1, norm_scope="coordinate", bounds=(0, 1))
    >>> model = adversarial_training(model, method=method)

    Reference:
        [Zhang et al., 2019](https://arxiv.org/abs/1901.08573);
        [blog post 7466](https://kexue.fm/archives/7466) has its relative, VAT
    """

    symmetric = False

    def __init__(
        self,
        epsilon: float = 1.0,
        weight: float = 6.0,
        steps: int = 3,
        step_size: float | None = None,
        initial_norm: float = 0.1,
        norm_scope: str = "sample",
        bounds: Any = None,
        from_logits: Any = None,
        seed: int | None = 0,
        start_step: int = 0,
        output_kind: str | None = None,
    ) -> None:
        super().__init__(epsilon, start_step, output_kind, from_logits)
        self.weight = weight
        self.steps = steps
        self.step_size = step_size
        self.initial_norm = initial_norm
        self.norm_scope = norm_scope
        self.bounds = bounds
        self.seed = seed

    checks = {
        **LabelFreeMethod.checks,
        "weight": check_not_negative,
        "steps": check_steps,
        "step_size": lambda name, value: (
            None if value is None else check_not_negative(name, value)
        ),
        "initial_norm": _check_initial_norm,
        "norm_scope": check_norm_scope,
        "bounds": check_bounds,
        "seed": check_seed,
    }

    def check(self, site):
        check_bounded(self.bounds, site)

    def gradients(self, objective, weights, site):
        origin = site.origin(objective, weights)
        self.check(site)
        point = self._worst(objective, weights, site, origin)

        def total(weights):
            _, evaluation = objective(weights)
            clean = self.predictions(objective, evaluation, site)
            moved = self._predictions_at(objective, weights, site, point)
            penalty = self.weight * self._apart(clean, moved)
            evaluation = with_penalty(evaluation, penalty)
            return evaluation.loss, evaluation

        return objective.value_and_grad(total, weights)

    def _worst(self, objective, weights, site, origin):
        """The point of the ball where the prediction is farthest away."""
        epsilon = self.strength(objective)
        _, evaluation = objective(weights)
        clean = [
            (meaning, ops.stop_gradient(output), counted)
            for meaning, output, counted in self.predictions(
                objective, evaluation, site
            )
        ]

        def apart(point):
            moved = self._predictions_at(objective, weights, site, point)
            return self._apart(clean, moved), evaluation

        radius = self.initial_norm * epsilon
        delta = start(objective, site, origin, self, radius)
        for _ in range(self.steps):
            delta = offsets(origin, delta, self.bounds)
            point = bounded(shifted(origin, delta), origin, self.bounds)
            _, g = objective.value_and_grad(apart, point)
            g = site_gradients(g, origin, site)
            delta = ascend(delta, g, self, site, epsilon)
        return bounded(shifted(origin, delta), origin, self.bounds)

    def _predictions_at(self, objective, weights, site, point):
        moved, kwargs = site.at(objective, weights, point)
        _, evaluation = objective(moved, **kwargs)
        return self.predictions(objective, evaluation, site)

    def _apart(self, clean, moved):
        """The mean divergence over rows, summed over outputs."""
        total = 0.0
        for (meaning, f, counted), (_, g, _) in zip(clean, moved, strict=True):
            divergence = meaning.divergence(f, g)
            if self.symmetric and meaning.kind != "numbers":
                divergence = divergence + meaning.divergence(g, f)
            total = total + masked_mean(divergence, counted)
        return total / backend.num_replicas()


class SMART(TRADES):
    """Smoothness-inducing regularization: fine-tuning that stays smooth.

        loss = L(f(x), y) + λ max_{‖δ‖ ≤ ε} D(f(x), f(x + δ))

    with the symmetric D(f, g) = KL(f ‖ g) + KL(g ‖ f) of classes (of
    independent labels the mean of theirs), and D = (f - g)² of numbers. All
    else is as in `TRADES`: projected ascent from a random δ, means over rows
    and positions that are not padding, gradients through both predictions,
    state and metrics of the clean pass.

    Symbols: ε is `epsilon`, λ is `weight`.

    Args:
        epsilon: Float ≥ 0, or a schedule. Radius of the ball.
        weight: Float ≥ 0.
        steps: Integer ≥ 1, one in the paper.
        step_size: Float ≥ 0, as a share of ε. Defaults to 2.5 / steps.
        initial_norm: Float in (0, 1], as a share of ε: the norm of the first δ.
        norm_scope: `"batch"`, `"sample"`, `"token"` or `"coordinate"`: what
            shares one norm. `"coordinate"` is the paper's maximum norm.
        bounds: `(low, high)`, the range of a floating input: a perturbed value
            does not leave it. `None`: no bounds.
        from_logits: Boolean. Whether the model gives logits. `None` reads it
            off the compiled loss.
        seed: Integer, `None` or a `keras.random.SeedGenerator`.
        start_step: Integer. Before this many updates ε is 0.
        output_kind: `"softmax"`, `"sigmoid"` or `"numbers"`: what the output
            is. `None` reads it off the compiled loss, which is not possible for
            a loss function of your own.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; and when the method is installed, where the
            loss does not say what the output is, or where there are bounds and
            no input is perturbed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=SMART(0.5))

    Departs from the paper:
        Its second part, Bregman proximal steps, is not in it: it limits how far
        an update goes, as a smaller learning rate does.

    Reference:
        [Jiang et al., 2020](https://arxiv.org/abs/1911.03437);
        [blog post 7466](https://kexue.fm/archives/7466)
    """

    symmetric = True

    def __init__(
        self,
        epsilon: float = 1.0,
        weight: float = 1.0,
        steps: int = 1,
        step_size: float | None = None,
        initial_norm: float = 0.1,
        norm_scope: str = "sample",
        bounds: Any = None,
        from_logits: Any = None,
        seed: int | None = 0,
        start_step: int = 0,
        output_kind: str | None = None,
    ) -> None:
        super().__init__(
            epsilon,
            weight,
            steps,
            step_size,
            initial_norm,
            norm_scope,
            bounds,
            from_logits,
            seed,
            start_step,
            output_kind,
        )
