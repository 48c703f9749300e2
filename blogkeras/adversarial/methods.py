"""What to do at a site: one-step attacks and penalties of the gradient."""

import math

import keras
from keras import ops

from blogkeras import backend
from blogkeras.adversarial import sites
from blogkeras.ops import safe_sqrt

SITES = ("matrix", "output")
NORM_SCOPES = ("batch", "sample", "token")


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
        epsilon: Float ≥ 0, or a `keras.optimizers.schedules` schedule of the
            optimizer's update count. The strength; at 0 training is plain.
        site: `"matrix"` or `"output"`; where a model with an embedding is
            perturbed. A model of floating inputs is perturbed there.
        start_step: Integer. Before this many updates the strength is 0.
    """

    def __init__(self, epsilon=1.0, site="matrix", start_step=0):
        self.epsilon = _strength(epsilon)
        self.site = one_of("site", site, SITES)
        self.start_step = whole("start_step", start_step)

    def strength(self, objective):
        """The present ε, a number or a scalar tensor."""
        step = objective.iterations
        epsilon = self.epsilon
        if callable(epsilon):
            epsilon = ops.cast(epsilon(step), "float32")
        if self.start_step:
            epsilon = ops.where(step < self.start_step, 0.0, epsilon)
        return epsilon

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


class Attack(AdversarialMethod):
    """A method that moves a point of the site, and trains there.

    Args:
        epsilon: Float ≥ 0 or a schedule.
        norm_scope: `"batch"`, `"sample"` or `"token"`: what shares one norm.
            A token is a row of the matrix, or a position of an output (for
            other tensors: a vector along the last axis).
        site: `"matrix"` or `"output"`.
        clean_weight: Float in [0, 1]. Share of the clean loss.
        start_step: Integer.
    """

    def __init__(
        self,
        epsilon=1.0,
        norm_scope="batch",
        site="matrix",
        clean_weight=0.0,
        start_step=0,
    ):
        super().__init__(epsilon, site, start_step)
        self.norm_scope = one_of("norm_scope", norm_scope, NORM_SCOPES)
        self.clean_weight = number("clean_weight", clean_weight, maximum=1.0)

    def check(self, site):
        if self.norm_scope == "sample" and not site.batched:
            raise ValueError(
                "The embedding matrix belongs to the whole batch: a norm per "
                'sample needs site="output". Received: '
                f"norm_scope={self.norm_scope!r}, site={self.site!r}"
            )

    def perturbation(self, objective, weights, site, origin):
        """The offsets from the origin at which to train.

        Args:
            objective: A `training.Objective`.
            weights: List of tensors.
            site: A `Site`.
            origin: List of tensors, the site's values.

        Returns:
            List of tensors of the shapes of `origin`, float32.
        """
        raise NotImplementedError

    def gradients(self, objective, weights, site):
        origin = site.origin(objective, weights)
        self.check(site)
        delta = self.perturbation(objective, weights, site, origin)
        moved, kwargs = site.at(objective, weights, shifted(origin, delta))
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

    def slope(self, objective, weights, site, origin, point):
        """The gradient of the loss at a point of the site, float32."""

        def attack(point):
            moved, kwargs = site.at(objective, weights, point)
            return objective(moved, **kwargs)

        _, g = objective.value_and_grad(attack, point)
        return site_gradients(g, origin, site)


class FGM(Attack):
    """Fast gradient method: train where the loss is worst, to first order.

    With g the gradient of the batch's loss L at the site E:

        Δ = ε g / ‖g‖₂        loss = (1 − c) L(E + Δ) + c L(E)

    ‖g‖ is one norm over the whole batch, as in the post; `"sample"` gives each
    sample (of an output or an input), `"token"` each token a Δ of norm ε. At
    site `"matrix"` tokens that occur twice share their Δ, and so does a softmax
    tied to the matrix; at `"output"` each position has its own, padding none,
    and a tied softmax is left clean. Where g is zero or not finite (an overflow
    under float16 loss scaling), Δ is zero.

    The attack and the training pass share their dropout masks. Loss, metrics
    and BatchNormalization see the training pass at E + Δ. The weights are never
    assigned a perturbed value, so an interrupt leaves them clean.

    Symbols: ε is `epsilon`, c is `clean_weight`.

    Args:
        epsilon: Float ≥ 0, or a `keras.optimizers.schedules` schedule of the
            optimizer's update count. Norm of the perturbation.
        norm_scope: `"batch"`, `"sample"` or `"token"`: what shares one norm.
        site: `"matrix"` or `"output"` of the embedding.
        clean_weight: Float in [0, 1]. Share of the clean loss, 0 in the post.
        start_step: Integer. Before this many updates ε is 0.

    Departs from the post:
        The post's script adds Δ to the weights and subtracts it again, so they
        drift by rounding; here they do not. Its two passes draw different
        dropout masks.

    Reference:
        [Miyato et al., 2017](https://arxiv.org/abs/1605.07725);
        [blog post 7234](https://kexue.fm/archives/7234); the mixture:
        [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572)
    """

    def perturbation(self, objective, weights, site, origin):
        g = self.slope(objective, weights, site, origin, origin)
        epsilon = self.strength(objective)
        return [epsilon * u for u in units(g, self.norm_scope, site)]


class FGSM(Attack):
    """Fast gradient sign method: every coordinate moves by ε.

        Δ = ε sign(g)

    The strongest first-order attack within a cube; where g is zero (padding,
    tokens that are not in the batch), Δ is zero. `norm_scope` is of no
    consequence here. Otherwise as `FGM`.

    Args:
        epsilon: Float ≥ 0, or a schedule. Largest coordinate of the
            perturbation: a vector of n coordinates moves by ε √n.
        site: `"matrix"` or `"output"` of the embedding.
        clean_weight: Float in [0, 1]. Share of the clean loss.
        start_step: Integer. Before this many updates ε is 0.

    Reference:
        [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572);
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(
        self, epsilon=1.0, site="matrix", clean_weight=0.0, start_step=0
    ):
        super().__init__(
            epsilon,
            site=site,
            clean_weight=clean_weight,
            start_step=start_step,
        )

    def perturbation(self, objective, weights, site, origin):
        g = self.slope(objective, weights, site, origin, origin)
        epsilon = self.strength(objective)
        return [epsilon * ops.sign(finite(g)) for g in g]


class GradientPenalty(AdversarialMethod):
    """Penalizes the gradient of the loss: FGM to first order in ε.

    With g the gradient of the batch's loss L at the site:

        form="squared":  loss = L + ½ ε ‖g‖²      (Δ = ε g, the post)
        form="norm":     loss = L + ε ‖g‖         (Δ = ε g / ‖g‖)

    The gradient of the penalty is exact, second derivatives included, with
    Keras's own cross-entropies and under XLA. At g = 0 both forms are zero with
    gradient zero.

    At site `"output"` g is taken per occurrence of a token, at `"matrix"` the
    occurrences of a token are summed first. The post's script for the penalty
    sums the squares of the embedding's sparse gradient, which is `"output"`;
    its script for FGM uses `"matrix"`. Where tokens repeat the two differ.

    L is the mean over the batch, so ‖g‖² falls as 1 / batch size: an ε for
    batches of 32 is worth twice as much at 16.

    Args:
        epsilon: Float ≥ 0, or a schedule of the optimizer's update count.
        form: `"squared"` or `"norm"`.
        site: `"output"` or `"matrix"` of the embedding.
        start_step: Integer. Before this many updates ε is 0.

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(
        self, epsilon=1.0, form="squared", site="output", start_step=0
    ):
        super().__init__(epsilon, site, start_step)
        self.form = one_of("form", form, ("squared", "norm"))

    def gradients(self, objective, weights, site):
        epsilon = self.strength(objective)

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
                0.5 * epsilon * squared
                if self.form == "squared"
                else epsilon * safe_sqrt(squared)
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


def shifted(origin, delta):
    """origin + delta, in the dtype of the origin."""
    return [
        x + ops.cast(d, x.dtype) for x, d in zip(origin, delta, strict=True)
    ]


def norms(tensors, scope, site):
    """Euclidean norms of what `scope` says, broadcastable to the tensors."""
    if scope == "batch":
        total = sum(ops.sum(ops.square(x)) for x in tensors)
        if not site.shared:
            total = backend.all_reduce_sum(total)
        return [ops.sqrt(total)] * len(tensors)
    return [
        ops.sqrt(
            ops.sum(
                ops.square(x),
                axis=-1 if scope == "token" else tuple(range(1, len(x.shape))),
                keepdims=True,
            )
        )
        for x in tensors
    ]


def units(tensors, scope, site):
    """x / ‖x‖, and zero where the norm is zero or not finite."""
    found = []
    for x, norm in zip(tensors, norms(tensors, scope, site), strict=True):
        usable = ops.logical_and(norm > 0, ops.isfinite(norm))
        norm = ops.where(usable, norm, ops.ones_like(norm))
        found.append(ops.where(usable, x / norm, ops.zeros_like(x)))
    return found


def finite(x):
    """x, and zero where it is not finite."""
    return ops.where(ops.isfinite(x), x, ops.zeros_like(x))


def mixed(evaluations, gradients, shares):
    """The weighted mean of several passes; state is that of the first."""
    loss = sum(e.loss * s for e, s in zip(evaluations, shares, strict=True))
    return evaluations[0]._replace(loss=loss), [
        None if parts[0] is None else backend.weighted_sum(parts, shares)
        for parts in zip(*gradients, strict=True)
    ]


def _strength(epsilon):
    if isinstance(epsilon, keras.optimizers.schedules.LearningRateSchedule):
        return epsilon
    return number("epsilon", epsilon)


def number(name, value, maximum=math.inf):
    """Checks a finite number in [0, maximum]."""
    try:
        checked = float(value)
    except (TypeError, ValueError):
        checked = math.nan
    if not (0 <= checked <= maximum and math.isfinite(checked)):
        limit = "" if maximum == math.inf else f" and at most {maximum:g}"
        raise ValueError(
            f"Expected `{name}` to be a finite number of at least 0{limit}. "
            f"Received: {name}={value!r}"
        )
    return checked


def whole(name, value, minimum=0):
    """Checks an integer of at least `minimum`."""
    checked = number(name, value)
    if checked != int(checked) or checked < minimum:
        raise ValueError(
            f"Expected `{name}` to be an integer of at least {minimum}. "
            f"Received: {name}={value!r}"
        )
    return int(checked)


def one_of(name, value, allowed):
    """Checks one of several names."""
    if value not in allowed:
        raise ValueError(
            f"Expected `{name}` to be one of {', '.join(map(repr, allowed))}. "
            f"Received: {name}={value!r}"
        )
    return value
