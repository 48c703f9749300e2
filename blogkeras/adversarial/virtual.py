"""Without labels: virtual adversarial training and the stability penalty.

泛化性乱弹：从随机噪声、梯度惩罚到虚拟对抗训练, https://kexue.fm/archives/7466
"""

import keras
from keras import ops, tree

from blogkeras import backend
from blogkeras.adversarial.methods import (
    NORM_SCOPES,
    AdversarialMethod,
    number,
    one_of,
    shifted,
    site_gradients,
    units,
    whole,
)


class Prediction(AdversarialMethod):
    """A method that looks at the predictions f(x) and not at the labels."""

    def __init__(self, epsilon, site, start_step, from_logits):
        super().__init__(epsilon, site, start_step)
        self.from_logits = from_logits

    def log_probabilities(self, model, y_pred):
        """log f, one tensor per output, with the classes on the last axis.

        One unit is the probability of the second of two classes.
        """
        from_logits = self.from_logits
        if from_logits is None:
            losses = tree.flatten(model.loss)
            from_logits = any(getattr(x, "from_logits", False) for x in losses)
        return [
            _log_probabilities(ops.cast(y, "float32"), from_logits)
            for y in tree.flatten(y_pred)
        ]


class VirtualAdversarialTraining(Prediction):
    """The loss, plus how far the worst small step moves the prediction.

        d ← unit(noise);   r times:  d ← unit(∇_d KL(f(x) ‖ f(x + ξ d)))
        loss = L(f(x), y) + KL(f(x) ‖ f(x + ε d))

    f(x) in KL is a constant. KL is the mean over all rows, labelled or not.
    With r = 0 the step is random noise. State (BatchNormalization) and metrics
    are those of the clean pass.

    Symbols: ε is `epsilon`, ξ is `xi`, r is `iters`.

    Args:
        epsilon: Float ≥ 0, or a schedule. Norm of the step.
        xi: Float > 0. Norm of the probe.
        iters: Integer ≥ 0. Power iterations.
        norm_scope: `"batch"` (the post), `"sample"` or `"token"`.
        from_logits: Boolean. Whether the model gives logits. `None` asks the
            compiled loss.
        seed: Integer.
        start_step: Integer. Before this many updates ε is 0.

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
        epsilon=1.0,
        xi=10.0,
        iters=1,
        norm_scope="batch",
        from_logits=None,
        seed=0,
        start_step=0,
    ):
        super().__init__(epsilon, "output", start_step, from_logits)
        self.xi = number("xi", xi)
        if self.xi == 0:
            raise ValueError(
                "Expected `xi` to be positive: the divergence has no gradient "
                f"where it is zero. Received: xi={xi!r}"
            )
        self.iters = whole("iters", iters)
        self.norm_scope = one_of("norm_scope", norm_scope, NORM_SCOPES)
        self.seed = seed

    def gradients(self, objective, weights, site):
        origin = site.origin(objective, weights)
        _, clean = objective(weights)
        target = self._target(objective, clean)
        d = self.direction(objective, weights, site, origin, target)
        epsilon = self.strength(objective)
        point = shifted(origin, [epsilon * x for x in d])

        def total(weights):
            loss, evaluation = objective(weights)
            target = self._target(objective, evaluation)
            divergence, _ = self._divergence(
                objective, weights, site, point, target
            )
            loss = loss + ops.cast(divergence, loss.dtype)
            return loss, evaluation._replace(loss=loss)

        return objective.value_and_grad(total, weights)

    def direction(self, objective, weights, site, origin, target):
        """Unit tensors along which the prediction changes most."""
        seed = objective.seed(self.seed)
        noise = [
            keras.random.normal(ops.shape(x), dtype="float32", seed=seed)
            for x in origin
        ]
        d = units(site.mask(noise), self.norm_scope, site)
        for _ in range(self.iters):
            _, g = objective.value_and_grad(
                lambda point: self._divergence(
                    objective, weights, site, point, target
                ),
                shifted(origin, [self.xi * x for x in d]),
            )
            d = units(site_gradients(g, origin, site), self.norm_scope, site)
        return d

    def _target(self, objective, evaluation):
        log_f = self.log_probabilities(objective.model, evaluation.y_pred)
        return [ops.stop_gradient(x) for x in log_f]

    def _divergence(self, objective, weights, site, point, target):
        """The mean KL(target ‖ f(point)) over rows, summed over outputs."""
        moved, kwargs = site.at(objective, weights, point)
        _, evaluation = objective(moved, **kwargs)
        log_f = self.log_probabilities(objective.model, evaluation.y_pred)
        divergence = sum(
            ops.mean(ops.sum(ops.exp(p) * (p - q), axis=-1))
            for p, q in zip(target, log_f, strict=True)
        )
        return divergence / backend.num_replicas(), evaluation


class NoiseStability(Prediction):
    """Penalizes how much small noise at the site moves the prediction.

        loss = L + ½ ε mean Σᵢ fᵢ ‖∇ log fᵢ‖²

    which is the mean of KL(f(x) ‖ f(x + noise)) for Gaussian noise of variance
    ε, to second order. Since √fᵢ ∇ log fᵢ = 2 ∇√fᵢ, one gradient estimates the
    sum over the classes without bias, with random signs ηᵢ = ±1:

        Σᵢ fᵢ ‖∇ log fᵢ‖² = E ‖∇ Σᵢ 2 ηᵢ √fᵢ‖²

    No labels are needed: rows of sample weight 0 count as well.

    Args:
        epsilon: Float ≥ 0, or a schedule. Variance of the noise.
        from_logits: Boolean. Whether the model gives logits. `None` asks the
            compiled loss.
        seed: Integer, for the signs.
        start_step: Integer. Before this many updates ε is 0.

    Reference:
        [blog post 7466](https://kexue.fm/archives/7466)
    """

    def __init__(self, epsilon=1.0, from_logits=None, seed=0, start_step=0):
        super().__init__(epsilon, "output", start_step, from_logits)
        self.seed = seed

    def gradients(self, objective, weights, site):
        epsilon = self.strength(objective)

        def penalized(weights):
            origin = site.origin(objective, weights)
            loss, evaluation = objective(weights)
            squared = self.estimate(objective, weights, site, origin)
            penalty = 0.5 * epsilon * squared / backend.num_replicas()
            loss = loss + ops.cast(penalty, loss.dtype)
            return loss, evaluation._replace(loss=loss)

        with backend.second_order():
            return objective.value_and_grad(penalized, weights)

    def estimate(self, objective, weights, site, origin):
        """An estimate of the mean of Σᵢ fᵢ ‖∇ log fᵢ‖², scalar."""

        def signed_sum(point):
            moved, kwargs = site.at(objective, weights, point)
            _, evaluation = objective(moved, **kwargs)
            log_f = self.log_probabilities(objective.model, evaluation.y_pred)
            seed = objective.seed(self.seed)
            total = 0.0
            for x in log_f:
                signs = ops.sign(
                    keras.random.uniform(ops.shape(x), -1, 1, seed=seed)
                )
                total += ops.sum(2 * signs * ops.exp(0.5 * x))
            return total, evaluation

        evaluation, g = objective.value_and_grad(signed_sum, origin)
        g = site_gradients(g, origin, site)
        rows = ops.shape(tree.flatten(evaluation.y_pred)[0])[0]
        squared = sum(ops.sum(ops.square(objective.unscale(x))) for x in g)
        squared = ops.where(ops.isfinite(squared), squared, 0.0)
        return squared / ops.cast(rows, "float32")


def _log_probabilities(y, from_logits):
    tiny = keras.config.epsilon()
    if y.shape[-1] == 1:
        if from_logits:
            return ops.concatenate(
                [ops.log_sigmoid(-y), ops.log_sigmoid(y)], axis=-1
            )
        y = ops.concatenate([1 - y, y], axis=-1)
    elif from_logits:
        return ops.log_softmax(y, axis=-1)
    return ops.log(ops.clip(y, tiny, 1.0))
