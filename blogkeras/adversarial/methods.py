"""What to do at a site: the attacks and penalties, as hooks of `training`."""

import math

import keras
from keras import ops

from blogkeras import backend
from blogkeras.adversarial import sites
from blogkeras.ops import safe_sqrt


class AdversarialMethod:
    """A training step that looks at the loss around a site.

    A method of your own is a subclass with a `gradients` function:

    ```python
    class RandomNoise(AdversarialMethod):
        def gradients(self, objective, weights, site):
            seed = objective.seed(1)
            point = [
                x + self.epsilon * keras.random.normal(ops.shape(x), seed=seed)
                for x in site.origin(objective, weights)
            ]
            moved, kwargs = site.at(objective, weights, point)
            return objective.value_and_grad(
                lambda weights: objective(weights, **kwargs), moved
            )
    ```

    Args:
        epsilon: Float ≥ 0. The strength; at 0 training is plain.
        site: `"matrix"` or `"output"`; where a model with an embedding is
            perturbed. A model of floating inputs is perturbed there.
    """

    def __init__(self, epsilon=1.0, site="matrix"):
        self.epsilon = _number("epsilon", epsilon)
        self.site = _one_of("site", site, ("matrix", "output"))

    def gradients(self, objective, weights, site):
        """One step, see `blogkeras.training`.

        Args:
            objective: A `training.Objective`.
            weights: List of tensors, the trainable weights.
            site: A `Site`.

        Returns:
            `(evaluation, gradients)`.
        """
        raise NotImplementedError

    def check(self, site):
        """Raises a `ValueError` if the method cannot work at this site."""

    def hook(self, model, name):
        """The hook for `training.install`."""
        site = sites.find_site(model, name, self.site)
        self.check(site)
        return lambda objective, weights: self.gradients(
            objective, weights, site
        )

    def __repr__(self):
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class FGM(AdversarialMethod):
    """Fast gradient method: train where the loss is worst, to first order.

    With g the gradient of the batch's loss L at the site E:

        Δ = ε g / ‖g‖₂        loss = (1 − c) L(E + Δ) + c L(E)

    ‖g‖ is one norm over the whole batch, as in the post; `"sample"` gives each
    sample (of an output or an input) a Δ of norm ε. At site `"matrix"` tokens
    that occur twice share their Δ, and so does a softmax tied to the matrix;
    at `"output"` each position has its own, padding none, and a tied softmax is
    left clean. Where g is zero or not finite (an overflow under float16 loss
    scaling), Δ is zero.

    The attack and the training pass share their dropout masks. Loss, metrics
    and BatchNormalization see the training pass at E + Δ. The weights are never
    assigned a perturbed value, so an interrupt leaves them clean.

    Symbols: ε is `epsilon`, c is `clean_weight`.

    Args:
        epsilon: Float ≥ 0. Norm of the perturbation.
        norm_scope: `"batch"` or `"sample"`: what shares one norm.
        site: `"matrix"` or `"output"` of the embedding.
        clean_weight: Float in [0, 1]. Share of the clean loss, 0 in the post.

    Departs from the post:
        The post's script adds Δ to the weights and subtracts it again, so they
        drift by rounding; here they do not. Its two passes draw different
        dropout masks.

    Reference:
        [Miyato et al., 2017](https://arxiv.org/abs/1605.07725);
        [blog post 7234](https://kexue.fm/archives/7234); the mixture:
        [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)
    """

    def __init__(
        self,
        epsilon=1.0,
        norm_scope="batch",
        site="matrix",
        clean_weight=0.0,
    ):
        super().__init__(epsilon, site)
        self.norm_scope = _one_of("norm_scope", norm_scope, ("batch", "sample"))
        self.clean_weight = _number("clean_weight", clean_weight, maximum=1.0)

    def check(self, site):
        if self.norm_scope != "batch" and not site.batched:
            raise ValueError(
                "The embedding matrix belongs to the whole batch: a norm per "
                'sample needs site="output". Received: '
                f"norm_scope={self.norm_scope!r}, site={self.site!r}"
            )

    def gradients(self, objective, weights, site):
        origin = site.origin(objective, weights)
        self.check(site)

        def attack(point):
            moved, kwargs = site.at(objective, weights, point)
            return objective(moved, **kwargs)

        _, g = objective.value_and_grad(attack, origin)
        point = [
            x + ops.cast(delta, x.dtype)
            for x, delta in zip(
                origin, self.perturbation(g, origin, site), strict=True
            )
        ]
        moved, kwargs = site.at(objective, weights, point)
        evaluation, gradients = objective.value_and_grad(
            lambda weights: objective(weights, **kwargs), moved
        )
        if not self.clean_weight:
            return evaluation, gradients
        other, clean_gradients = objective.value_and_grad(objective, weights)
        return mixed(
            [evaluation, other],
            [gradients, clean_gradients],
            [1 - self.clean_weight, self.clean_weight],
        )

    def perturbation(self, gradients, origin, site):
        """ε g / ‖g‖ for each tensor of the site, float32."""
        gradients = site_gradients(gradients, origin, site)
        squares = [
            ops.sum(
                ops.square(g),
                axis=None if self.norm_scope == "batch" else _but_first(g),
                keepdims=self.norm_scope != "batch",
            )
            for g in gradients
        ]
        if self.norm_scope == "batch":
            total = sum(squares)
            if not site.shared:
                total = backend.all_reduce_sum(total)
            squares = [total] * len(gradients)
        return [
            self.epsilon * unit(g, ops.sqrt(s))
            for g, s in zip(gradients, squares, strict=True)
        ]


class GradientPenalty(AdversarialMethod):
    """Penalizes the gradient of the loss: FGM to first order in ε.

    With g the gradient of the batch's loss L at the site:

        form="squared":  loss = L + ½ ε ‖g‖²      (Δ = ε g, the post)
        form="norm":     loss = L + ε ‖g‖         (Δ = ε g / ‖g‖)

    The gradient of the penalty is exact, second derivatives included, for any
    Keras loss and under XLA. At g = 0 both forms are zero with gradient zero.

    At site `"output"` g is taken per occurrence of a token, at `"matrix"` the
    occurrences of a token are summed first. The post's script for the penalty
    sums the squares of the embedding's sparse gradient, which is `"output"`;
    its script for FGM uses `"matrix"`. Where tokens repeat the two differ.

    L is the mean over the batch, so ‖g‖² falls as 1 / batch size: an ε for
    batches of 32 is worth twice as much at 16.

    Args:
        epsilon: Float ≥ 0.
        form: `"squared"` or `"norm"`.
        site: `"output"` or `"matrix"` of the embedding.

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(self, epsilon=1.0, form="squared", site="output"):
        super().__init__(epsilon, site)
        self.form = _one_of("form", form, ("squared", "norm"))

    def gradients(self, objective, weights, site):
        def penalized(weights):
            origin = site.origin(objective, weights)

            def at(point):
                moved, kwargs = site.at(objective, weights, point)
                return objective(moved, **kwargs)

            evaluation, g = objective.value_and_grad(at, origin)
            g = site_gradients(g, origin, site)
            squared = sum(ops.sum(ops.square(objective.unscale(x))) for x in g)
            if not site.shared:
                squared = backend.all_reduce_sum(squared)
            # An overflow under loss scaling: the optimizer skips the step, and
            # the reported loss stays finite.
            squared = ops.where(ops.isfinite(squared), squared, 0.0)
            penalty = (
                0.5 * self.epsilon * squared
                if self.form == "squared"
                else self.epsilon * safe_sqrt(squared)
            )
            # Each replica adds its share.
            penalty = penalty / backend.num_replicas()
            loss = evaluation.loss + ops.cast(penalty, evaluation.loss.dtype)
            return loss, evaluation._replace(loss=loss)

        with backend.second_order():
            return objective.value_and_grad(penalized, weights)


def site_gradients(gradients, origin, site):
    """Gradients at a site as float32 tensors: dense, masked, over replicas."""
    gradients = [
        ops.zeros_like(x) if g is None else backend.dense(g)
        for g, x in zip(gradients, origin, strict=True)
    ]
    gradients = site.mask([at_least_float32(g) for g in gradients])
    if site.shared:
        gradients = [backend.all_reduce_sum(g) for g in gradients]
    return gradients


def at_least_float32(x):
    dtype = keras.backend.result_type(x.dtype, "float32")
    return ops.cast(x, dtype)


def unit(x, norm):
    """x / norm, and zero where the norm is zero or not finite."""
    usable = ops.logical_and(norm > 0, ops.isfinite(norm))
    norm = ops.where(usable, norm, ops.ones_like(norm))
    return ops.where(usable, x / norm, ops.zeros_like(x))


def mixed(evaluations, gradients, shares):
    """The weighted mean of several passes; state is that of the first."""
    loss = sum(e.loss * s for e, s in zip(evaluations, shares, strict=True))
    return evaluations[0]._replace(loss=loss), [
        None if parts[0] is None else backend.weighted_sum(parts, shares)
        for parts in zip(*gradients, strict=True)
    ]


def _but_first(x):
    return tuple(range(1, len(x.shape)))


def _number(name, value, maximum=math.inf):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number <= maximum and math.isfinite(number)):
        limit = "" if maximum == math.inf else f" and at most {maximum:g}"
        raise ValueError(
            f"Expected `{name}` to be a finite number of at least 0{limit}. "
            f"Received: {name}={value!r}"
        )
    return number


def _one_of(name, value, allowed):
    if value not in allowed:
        raise ValueError(
            f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}. "
            f"Received: {name}={value!r}"
        )
    return value
