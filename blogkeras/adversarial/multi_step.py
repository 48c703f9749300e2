"""Attacks of several steps: PGD and FreeLB."""

from typing import Any

from keras import ops

from blogkeras.adversarial.base import (
    ADVERSARIAL,
    CLEAN,
    Attack,
    check_not_negative,
    check_seed,
    check_share,
    check_steps,
    mixed,
)
from blogkeras.adversarial.norms import (
    float_dtype,
    norms,
    offsets,
    random_units,
    scaled,
    site_gradients,
    units,
)
from blogkeras.arguments import check_boolean


class PGD(Attack):
    """Projected gradient descent: FGM in several steps.

    From δ₀ = 0, or a random one, for `steps` steps:

        δ ← Π (δ + α g(E + δ) / ‖g‖)

    where Π shrinks perturbations that are longer than ε to the norm ε, and
    norms are taken over `norm_scope`. Training happens at the last δ. Each step
    costs a forward and a backward pass without weight gradients.

    Symbols: ε is `epsilon`, α is `step_size`.

    Args:
        epsilon: Float ≥ 0, or a schedule. Radius of the ball.
        steps: Integer ≥ 1.
        step_size: Float, as a share of ε. Defaults to 2.5 / steps, which can
            cross the ball.
        random_start: Boolean. Start at a random δ₀ of norm ε; with
            `norm_scope="coordinate"` at one that is uniform in the cube. Needs
            a site of positions, since noise on a matrix mostly falls on tokens
            that are not in the batch.
        norm_scope: `"batch"`, `"sample"`, `"token"` or `"coordinate"`: what
            shares one norm. With `"coordinate"` the ball is that of the maximum
            norm, and a step is α sign(g).
        site: `"matrix"` or `"output"` of the embedding.
        seed: Integer, for the random start.
        **kwargs: `clean_weight`, float in [0, 1], the share of the clean loss;
            `start_step`, integer, before this many updates ε is 0; `bounds`,
            the range `(low, high)` of a floating input, which no step leaves.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; on `random_start` at the embedding matrix
            and on bounds where no input is perturbed, when it is installed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=PGD(0.3, steps=2))

    Reference:
        [Madry et al., 2018](https://arxiv.org/abs/1706.06083);
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        steps: int = 3,
        step_size: float | None = None,
        random_start: bool = False,
        norm_scope: str = "batch",
        site: str = "matrix",
        seed: int | None = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(epsilon, norm_scope, site, **kwargs)
        self.steps = steps
        self.step_size = step_size
        self.random_start = random_start
        self.seed = seed

    checks = {
        **Attack.checks,
        "steps": check_steps,
        "step_size": lambda name, value: (
            None if value is None else check_not_negative(name, value)
        ),
        "random_start": check_boolean,
        "seed": check_seed,
    }

    def check(self, site):
        super().check(site)
        if self.random_start and not site.batched:
            raise ValueError(
                "A random start on the embedding matrix would fall on tokens "
                'that are not in the batch: use site="output". Received: '
                f"random_start=True, site={self.site!r}"
            )

    def perturbation(self, objective, weights, site, origin):
        epsilon = self.strength(objective)
        radius = epsilon if self.random_start else 0.0
        delta = start(objective, site, origin, self, radius)
        for step in range(self.steps):
            delta = offsets(origin, delta, self.bounds)
            point = self.point(origin, delta)
            if step == 0 and not self.random_start:
                point = None
            g = self.slope(objective, weights, site, origin, point)
            delta = ascend(delta, g, self, site, epsilon)
        return delta


class FreeLB(Attack):
    """Free large batch: every step of the attack is also a training step.

    From a random δ₀ of norm `initial_norm`, for `steps` steps: the gradient of
    the weights at δ is added to the mean, and δ climbs as in PGD. The weights
    move by the mean gradient of all the steps; the reported loss is their mean.

        gradient = 1/K Σₜ ∇θ L(E + δₜ)        δₜ₊₁ = Π (δₜ + α gₜ / ‖gₜ‖)

    Symbols: K is `steps`, α is `step_size`, ε the radius of Π is `epsilon`.
    Dropout masks are the same in all steps, as in the paper. Each step costs a
    full forward and backward pass.

    Args:
        epsilon: Float ≥ 0, or a schedule. Radius of the ball.
        steps: Integer ≥ 1.
        step_size: Float, as a share of ε.
        initial_norm: Float in [0, 1], as a share of ε.
        norm_scope: `"batch"`, `"sample"`, `"token"` or `"coordinate"` (the
            maximum norm).
        site: `"output"` or `"matrix"` (then not with `norm_scope="sample"`, and
            with `initial_norm=0`).
        seed: Integer, for the start.
        **kwargs: `start_step`, integer, before this many updates ε is 0;
            `bounds`, the range `(low, high)` of a floating input.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; on a start away from 0 at the embedding
            matrix and on bounds where no input is perturbed, when it is
            installed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=FreeLB(0.1))

    Reference:
        [Zhu et al., 2020](https://arxiv.org/abs/1909.11764)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        steps: int = 3,
        step_size: float = 0.5,
        initial_norm: float = 0.5,
        norm_scope: str = "sample",
        site: str = "output",
        seed: int | None = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(epsilon, norm_scope, site, **kwargs)
        self.steps = steps
        self.step_size = step_size
        self.initial_norm = initial_norm
        self.seed = seed

    checks = {
        **Attack.checks,
        "steps": check_steps,
        "step_size": check_not_negative,
        "initial_norm": check_share,
        "seed": check_seed,
    }

    def check(self, site):
        super().check(site)
        if self.initial_norm and not site.batched:
            raise ValueError(
                "A random start on the embedding matrix would fall on tokens "
                'that are not in the batch: use site="output" or '
                "initial_norm=0. Received: "
                f"initial_norm={self.initial_norm}, site={self.site!r}"
            )
        if self.clean_weight:
            raise ValueError(
                "FreeLB has no clean pass: its first step is the one nearest "
                "to it, with initial_norm=0. Received: "
                f"clean_weight={self.clean_weight}"
            )

    def gradients(self, objective, weights, site):
        origin = site.origin(objective, weights)
        self.check(site)
        epsilon = self.strength(objective)
        delta = start(
            objective, site, origin, self, self.initial_norm * epsilon
        )

        def at(args):
            moved, kwargs = site.at(objective, *args)
            return objective(moved, **kwargs)

        evaluations, gradients = [], []
        for _ in range(self.steps):
            delta = offsets(origin, delta, self.bounds)
            point = self.point(origin, delta)
            evaluation, (of_weights, of_point) = objective.value_and_grad(
                at, (weights, point)
            )
            evaluations.append(evaluation)
            gradients.append(site.merge(objective, of_weights, of_point))
            g = site_gradients(of_point, origin, site)
            delta = ascend(delta, g, self, site, epsilon)
        if not self.initial_norm:
            objective.parts[CLEAN] = evaluations[0].loss
        objective.parts[ADVERSARIAL] = evaluations[-1].loss
        return mixed(evaluations, gradients, [1 / self.steps] * self.steps)


def start(objective, site, origin, method, radius):
    """Random offsets of norm `radius`; zero if the radius is."""
    if isinstance(radius, float) and radius == 0:
        return [ops.zeros(ops.shape(x), float_dtype(x)) for x in origin]
    return scaled(radius, random_units(objective, site, origin, method))


def ascend(delta, gradients, method, site, epsilon):
    """One step of gradient ascent, projected to the ball of radius ε."""
    directions = units(gradients, method.norm_scope, site)
    size = method.step_size
    if size is None:
        size = 2.5 / method.steps
    steps = scaled(size * epsilon, directions)
    delta = [d + step for d, step in zip(delta, steps, strict=True)]
    return project(delta, epsilon, method.norm_scope, site)


def project(delta, epsilon, scope, site):
    """Shrinks perturbations that are longer than ε to the norm ε."""
    return [
        d * ops.minimum(1.0, ops.cast(epsilon, d.dtype) / ops.maximum(n, 1e-30))
        for d, n in zip(delta, norms(delta, scope, site), strict=True)
    ]
