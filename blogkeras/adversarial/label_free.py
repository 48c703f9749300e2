"""Without labels: virtual adversarial training and the stability penalty.

泛化性乱弹：从随机噪声、梯度惩罚到虚拟对抗训练, https://kexue.fm/archives/7466
"""

import functools
from typing import Any

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.adversarial.base import (
    CLEAN,
    PENALTY,
    AdversarialMethod,
    check_count,
    check_norm_scope,
    check_positive,
    check_seed,
    with_penalty,
)
from blogkeras.adversarial.norms import (
    random_units,
    scaled,
    shifted,
    site_gradients,
    units,
)
from blogkeras.adversarial.penalty import second_order_gradients
from blogkeras.arguments import check_choice
from blogkeras.ops import masked_mean
from blogkeras.outputs import (
    check_output_arguments,
    read_outputs,
    spread_labels,
)
from blogkeras.state import draw_rows


def _check_output_kind(name, value):
    check_output_arguments(value, None)
    return value


def _check_from_logits(name, value):
    check_output_arguments(None, value)
    return value


class LabelFreeMethod(AdversarialMethod):
    """A method that uses the predictions f(x) and not the labels.

    What a prediction means, and so how far two of them are apart, is read off
    the compiled loss, see `blogkeras.outputs.OutputMeaning`: KL for classes,
    the mean KL for independent labels, the squared difference for numbers.
    Outputs without a loss of their own are ignored.

    Args:
        epsilon: Float ≥ 0, or a schedule.
        start_step: Integer.
        output_kind: `"softmax"`, `"sigmoid"`, `"numbers"`, or a list or dict of
            these for several outputs. `None` reads it off the loss.
        from_logits: Boolean, or a list or dict. `None` reads it off the loss.
    """

    def __init__(
        self, epsilon=1.0, start_step=0, output_kind=None, from_logits=None
    ):
        super().__init__(epsilon, "output", start_step)
        self.output_kind = output_kind
        self.from_logits = from_logits

    parts = (CLEAN, PENALTY)

    checks = {
        **AdversarialMethod.checks,
        "site": functools.partial(check_choice, choices=("output",)),
        "output_kind": _check_output_kind,
        "from_logits": _check_from_logits,
    }

    def hook(self, model, name=None, padding_mask=None, joint_norm=False):
        if isinstance(model, keras.Model) and model.compiled:
            outputs = getattr(model, "outputs", None)
            if outputs:
                # Raise for a loss that cannot be read before training starts.
                is_list = isinstance(model, keras.Sequential)
                self._meanings(model, outputs[0] if is_list else model.output)
        return super().hook(model, name, padding_mask, joint_norm)

    def predictions(self, objective, evaluation, site):
        """Triples `(meaning, output, counted)` of the outputs with a meaning.

        `counted` marks the positions that count: those that are not masked in
        the output or, if it has no mask, those that are not padding at the
        site. Positions with the label `ignore_class` do not count, except where
        all positions of a sample have it: that is a sample without labels.
        """
        y_pred = evaluation.y_pred
        outputs = tree.flatten(y_pred)
        labels = spread_labels(objective.model, y_pred, objective.data[1])
        return [
            (meaning, output, _counted(meaning, output, y, site))
            for meaning, output, y in zip(
                self._meanings(objective.model, y_pred, objective.given_loss),
                outputs,
                labels,
                strict=True,
            )
            if meaning is not None
        ]

    def _meanings(self, model, outputs, loss=None):
        return read_outputs(
            model, outputs, self.output_kind, self.from_logits, loss
        )


def _counted(meaning, output, y, site):
    counted = meaning.positions(output)
    if counted is None and len(output.shape) > 2:
        possible = site.padding(tuple(output.shape)[:-1])
        if len(possible) == 1:
            (counted,) = possible.values()
    if meaning.ignore_class is None or y is None or len(output.shape) < 3:
        return counted
    known = meaning.positions(ops.stop_gradient(output), y)
    positions = tuple(range(1, len(known.shape)))
    unlabelled = ops.logical_not(ops.any(known, axis=positions, keepdims=True))
    known = ops.logical_or(known, unlabelled)
    return known if counted is None else ops.logical_and(counted, known)


class VirtualAdversarialTraining(LabelFreeMethod):
    """Adds to the loss how much the worst small step changes the prediction.

        d ← unit(noise);   r times:  d ← unit(∇_d KL(f(x) ‖ f(x + ξ d)))
        loss = L(f(x), y) + KL(f(x) ‖ f(x + ε d))

    f(x) in KL is a constant. KL is the mean over all rows (of outputs with
    positions: over all that are not padding), labelled or not, and the sum over
    the outputs; of numbers it is the squared difference. With r = 0 the step is
    random noise. State (BatchNormalization) and metrics are those of the clean
    pass.

    Symbols: ε is `epsilon`, ξ is `xi`, r is `iters`.

    Args:
        epsilon: Float ≥ 0, or a schedule. Norm of the step.
        xi: Float > 0. Norm of the probe.
        iters: Integer ≥ 0. Power iterations.
        norm_scope: `"batch"` (the post), `"sample"` or `"token"`.
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
            loss does not say what the output is.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> method = VirtualAdversarialTraining(norm_scope="sample")
    >>> model = adversarial_training(model, method=method)

    Departs from the post:
        The noise is drawn at the positions of the batch, not on the whole
        embedding matrix; there may be any number of inputs; both losses share
        one forward pass and one optimizer, where the script alternates two.

    Reference:
        [Miyato et al., 2018](https://arxiv.org/abs/1704.03976);
        [blog post 7466](https://kexue.fm/archives/7466)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        xi: float = 10.0,
        iters: int = 1,
        norm_scope: str = "batch",
        from_logits: Any = None,
        seed: int | None = 0,
        start_step: int = 0,
        output_kind: str | None = None,
    ) -> None:
        super().__init__(epsilon, start_step, output_kind, from_logits)
        self.xi = xi
        self.iters = iters
        self.norm_scope = norm_scope
        self.seed = seed

    checks = {
        **LabelFreeMethod.checks,
        # At 0 the divergence has no gradient.
        "xi": check_positive,
        "iters": check_count,
        "norm_scope": check_norm_scope,
        "seed": check_seed,
    }

    def gradients(self, objective, weights, site):
        origin = site.origin(objective, weights)
        _, clean = objective(weights)
        target = self._target(objective, clean, site)
        d = self.direction(objective, weights, site, origin, target)
        point = shifted(origin, scaled(self.strength(objective), d))

        def total(weights):
            _, evaluation = objective(weights)
            target = self._target(objective, evaluation, site)
            divergence, _ = self._divergence(
                objective, weights, site, point, target
            )
            evaluation = with_penalty(evaluation, divergence)
            return evaluation.loss, evaluation

        return objective.value_and_grad(total, weights)

    def direction(self, objective, weights, site, origin, target):
        """Unit tensors along which the prediction changes most."""
        d = random_units(objective, site, origin, self)
        for _ in range(self.iters):
            _, g = objective.value_and_grad(
                lambda point: self._divergence(
                    objective, weights, site, point, target
                ),
                shifted(origin, scaled(self.xi, d)),
            )
            d = units(site_gradients(g, origin, site), self.norm_scope, site)
        return d

    def _target(self, objective, evaluation, site):
        """The clean predictions, as constants."""
        return [
            (meaning, ops.stop_gradient(output), counted)
            for meaning, output, counted in self.predictions(
                objective, evaluation, site
            )
        ]

    def _divergence(self, objective, weights, site, point, target):
        """The mean D(target ‖ f(point)) over rows, summed over outputs."""
        moved, kwargs = site.at(objective, weights, point)
        _, evaluation = objective(moved, **kwargs)
        outputs = self.predictions(objective, evaluation, site)
        divergence = sum(
            masked_mean(meaning.divergence(f, g), counted)
            for (meaning, f, counted), (_, g, _) in zip(
                target, outputs, strict=True
            )
        )
        return divergence / backend.num_replicas(), evaluation


class NoiseStability(LabelFreeMethod):
    """Penalizes how much small noise at the site changes the prediction.

        loss = L + ½ ε mean Σᵢ fᵢ ‖∇ log fᵢ‖²

    which is the mean of KL(f(x) ‖ f(x + noise)) for Gaussian noise of variance
    ε, to second order; the mean is over rows (of outputs with positions: over
    all that are not padding), and several outputs are added. Since
    √fᵢ ∇ log fᵢ = 2 ∇√fᵢ, one gradient estimates the sum over the classes and
    the mean over the rows without bias, with random signs η = ±1:

        Σᵢ fᵢ ‖∇ log fᵢ‖² = E ‖∇ Σᵢ 2 ηᵢ √fᵢ‖²

    For independent labels and for numbers, 2 √fᵢ is replaced by other features
    (`blogkeras.outputs.OutputMeaning.features`). Labels are not used: rows of
    sample weight 0 count as well.

    Args:
        epsilon: Float ≥ 0, or a schedule. Variance of the noise.
        from_logits: Boolean. Whether the model gives logits. `None` reads it
            off the compiled loss.
        seed: Integer, `None` or a `keras.random.SeedGenerator`, for the signs.
        start_step: Integer. Before this many updates ε is 0.
        output_kind: `"softmax"`, `"sigmoid"` or `"numbers"`: what the output
            is. `None` reads it off the compiled loss, which is not possible for
            a loss function of your own.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; and when the method is installed, where the
            loss does not say what the output is.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=NoiseStability(0.1))

    Reference:
        [blog post 7466](https://kexue.fm/archives/7466)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        from_logits: Any = None,
        seed: int | None = 0,
        start_step: int = 0,
        output_kind: str | None = None,
    ) -> None:
        super().__init__(epsilon, start_step, output_kind, from_logits)
        self.seed = seed

    checks = {**LabelFreeMethod.checks, "seed": check_seed}

    def gradients(self, objective, weights, site):
        epsilon = self.strength(objective)

        def penalized(weights):
            origin = site.origin(objective, weights)
            _, evaluation = objective(weights)
            squared = self.estimate(objective, weights, site, origin)
            (penalty,) = scaled(epsilon, [0.5 * squared])
            evaluation = with_penalty(
                evaluation, penalty / backend.num_replicas()
            )
            return evaluation.loss, evaluation

        return second_order_gradients(objective, penalized, weights)

    def estimate(self, objective, weights, site, origin):
        """An estimate of the mean of Σᵢ fᵢ ‖∇ log fᵢ‖², scalar."""

        def signed_sum(point):
            moved, kwargs = site.at(objective, weights, point)
            _, evaluation = objective(moved, **kwargs)
            seed = objective.seed(self.seed)
            total = 0.0
            for meaning, output, counted in self.predictions(
                objective, evaluation, site
            ):
                features = meaning.features(output)
                signs = draw_rows(_signs, ops.shape(features), seed)
                products = ops.sum(signs * features, axis=-1)
                if counted is None:
                    count = ops.cast(ops.size(products), "float32")
                else:
                    for _ in range(len(products.shape) - len(counted.shape)):
                        counted = ops.expand_dims(counted, -1)
                    counted = ops.broadcast_to(counted, ops.shape(products))
                    products = ops.where(counted, products, 0.0)
                    count = ops.sum(ops.cast(counted, "float32"))
                # The square of the gradient is then a mean.
                total += ops.sum(products) / ops.sqrt(ops.maximum(count, 1.0))
            return total, evaluation

        _, g = objective.value_and_grad(signed_sum, origin)
        g = site_gradients(g, origin, site)
        backend.check_second_order(g)
        squared = sum(ops.sum(ops.square(objective.unscale(x))) for x in g)
        return ops.where(ops.isfinite(squared), squared, 0.0)


def _signs(shape, seed):
    return ops.sign(backend.uniform(shape, -1, 1, "float32", seed=seed))
