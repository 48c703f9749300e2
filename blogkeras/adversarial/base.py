"""The base classes of methods: training steps with gradients around a site."""

import functools
from typing import Any

import keras
from keras import ops

from blogkeras import backend
from blogkeras.adversarial.finding import find_site
from blogkeras.adversarial.norms import bounded, shifted, site_gradients
from blogkeras.adversarial.several_sites import SeveralSites
from blogkeras.arguments import check_choice, check_integer, check_number
from blogkeras.arguments import check_seed as check_any_seed

SITES = ("matrix", "output")
# Parts of a loss, by their names in the logs: the loss without perturbation
# and penalty, the loss at the perturbed values, and what is added to the first.
CLEAN, ADVERSARIAL, PENALTY = "clean_loss", "adversarial_loss", "penalty"
NORM_SCOPES = ("batch", "sample", "token", "coordinate")


def check_name(name, value):
    """A string that is not empty, or `None`."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ValueError(
            f"Expected `{name}` to be a name or None. "
            f"Received: {name}={value!r}"
        )
    return value


def check_names(name, value):
    """A name, a list of different names, or `None`."""
    if not isinstance(value, (list, tuple)):
        return check_name(name, value)
    names = [each for each in value if isinstance(each, str) and each]
    if not names or len(names) < len(value) or len(set(names)) < len(names):
        raise ValueError(
            f"Expected `{name}` to be a name, a list of names that differ, or "
            f"None. Received: {name}={value!r}"
        )
    return list(value)


def check_masks(name, value, names):
    """A name or `None`, or a list of these, one for each of several names."""
    if not isinstance(value, (list, tuple)):
        return check_name(name, value)
    if not isinstance(names, list) or len(value) != len(names):
        raise ValueError(
            f"Expected `{name}` to be one name, or a list with one for each of "
            f"the names {names!r}. Received: {name}={value!r}"
        )
    return [check_name(name, each) for each in value]


def check_strength(name, value):
    """A finite number of at least 0, or a schedule."""
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return value
    return check_number(name, value, minimum=0)


def check_seed(name, value):
    """A seed as Keras takes it, made an integer."""
    value = check_any_seed(name, value)
    if value is None:
        value = keras.random.SeedGenerator()
    if isinstance(value, keras.random.SeedGenerator):
        value = int(ops.convert_to_numpy(value.state.value)[0])
    return value


def check_bounds(name, value):
    """A pair of finite numbers in order, or `None`."""
    if value is None:
        return None
    try:
        low, high = (check_number(name, x) for x in value)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise ValueError(
            f"Expected `{name}` to be two finite numbers (low, high) with low "
            f"< high, or None. Received: {name}={value!r}"
        )
    return low, high


def check_bounded(bounds, site):
    """Raises where there are bounds and no input that they could be of."""
    if bounds is not None and not site.is_input:
        raise ValueError(
            "Expected no `bounds`: they are those of a floating input, as of "
            "images in [0, 1], and here a layer is perturbed. To perturb the "
            "input, give its name as `embedding_name`. Received: "
            f"bounds={bounds}"
        )


check_norm_scope = functools.partial(check_choice, choices=NORM_SCOPES)
check_share = functools.partial(check_number, minimum=0, maximum=1)
check_count = functools.partial(check_integer, minimum=0)
check_steps = functools.partial(check_integer, minimum=1)
check_not_negative = functools.partial(check_number, minimum=0)
check_positive = functools.partial(check_number, above=0)


class AdversarialMethod:
    """A training step that uses the loss at perturbed values of a site.

    A method of your own is a subclass with a `gradients` function:

    ```python
    class RandomNoise(AdversarialMethod):
        def gradients(self, objective, weights, site):
            seed = objective.seed(1)
            point = [
                x + self.epsilon * backend.normal(x.shape, seed=seed)
                for x in site.origin(objective, weights)
            ]
            moved, kwargs = site.at(objective, weights, point)
            return objective.value_and_grad(
                lambda weights: objective(weights, **kwargs), moved
            )
    ```

    A changed attribute (`method.epsilon = 0.5`) is used from the next step on,
    which is then compiled again: use a schedule for a value that changes often.

    Args:
        epsilon: Float ≥ 0, or a `keras.optimizers.schedules` schedule of the
            optimizer's update count. The strength; 0 is training without a
            perturbation.
        site: `"matrix"` or `"output"`; what is perturbed in a model with an
            embedding. Without one, the floating inputs are perturbed.
        start_step: Integer. Before this many updates the strength is 0.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed.

    Example:

    >>> class Plain(AdversarialMethod):
    ...     def gradients(self, objective, weights, site):
    ...         return objective.value_and_grad(objective, weights)
    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=Plain())
    >>> x = np.random.randint(0, 9, (32, 4))
    >>> history = model.fit(x, x[:, 0] % 2, verbose=0)

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(self, epsilon=1.0, site="matrix", start_step=0):
        self.epsilon = epsilon
        self.site = site
        self.start_step = start_step

    # The names of the parts that a step's loss may have, for the logs of `fit`;
    # their values are `evaluation.parts`.
    parts: tuple[str, ...] = ()

    # How each attribute is checked, when it is set and when it is changed.
    checks = {
        "epsilon": check_strength,
        "site": functools.partial(check_choice, choices=SITES),
        "start_step": check_count,
    }

    def __setattr__(self, name, value):
        if name in self.checks:
            value = self.checks[name](name, value)
        object.__setattr__(self, name, value)
        # A compiled step keeps the numbers that it was traced with. The count
        # of changes lets the train step see that it must be traced again.
        changes = vars(self).get("_version", 0) + 1
        object.__setattr__(self, "_version", changes)

    @property
    def version(self):
        """How often an attribute was set."""
        return vars(self).get("_version", 0)

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

    def find_site(self, model, name=None, padding_mask=None):
        """What is perturbed in a model, a `Site`; see `finding.find_site`."""
        return find_site(model, name, self.site, padding_mask)

    def check(self, site):
        """Raises a `ValueError` if the method cannot work at this site."""

    def describe(self, model, site):
        """What a step perturbs, as `describe_training` says it."""
        return f"{self!r} perturbs {site.describe(model)}"

    def hook(self, model, name=None, padding_mask=None, joint_norm=False):
        """The hook for `training.install`."""
        return Hook(self, model, name, padding_mask, joint_norm)

    def __repr__(self):
        arguments = ", ".join(
            f"{k}={v!r}" for k, v in vars(self).items() if k[0] != "_"
        )
        return f"{type(self).__name__}({arguments})"


class Hook:
    """A method at work on a model, see `blogkeras.training`.

    Args:
        method: An `AdversarialMethod`.
        model: A `keras.Model`.
        name: The layer or input to perturb, a list of these, or `None`.
        padding_mask: The name of the input that marks padding, or `None`; of
            several sites also a list of these, one for each.
        joint_norm: Boolean. One norm over all sites, or one for each.
    """

    def __init__(self, method, model, name, padding_mask, joint_norm=False):
        self.method = method
        self._where = (name, padding_mask, joint_norm)
        self._kind = method.site
        self._site = self._find(model)
        method.check(self._site)

    def _find(self, model):
        names, masks, joint_norm = self._where
        if not isinstance(names, (list, tuple)):
            return self.method.find_site(model, names, masks)
        if not isinstance(masks, (list, tuple)):
            masks = [masks] * len(names)
        sites = [
            self.method.find_site(model, name, mask)
            for name, mask in zip(names, masks, strict=True)
        ]
        return SeveralSites(sites, joint_norm) if len(sites) > 1 else sites[0]

    @property
    def version(self):
        return self.method.version

    @property
    def parts(self):
        return self.method.parts

    def describe(self, model):
        """What a step perturbs."""
        return self.method.describe(model, self._site)

    def __call__(self, objective, weights):
        if self.method.site != self._kind:
            self._kind = self.method.site
            self._site = self._find(objective.model)
        # The method, and an attack that it holds.
        changes = {
            part: vars(part)["_version"]
            for part in (self.method, *vars(self.method).values())
            if isinstance(part, AdversarialMethod)
        }
        try:
            return self.method.gradients(objective, weights, self._site)
        finally:
            # An attribute that the method itself sets in a step does not count
            # as a change.
            for part, version in changes.items():
                object.__setattr__(part, "_version", version)


class Attack(AdversarialMethod):
    """A method that computes a perturbation and trains at the perturbed values.

    Args:
        epsilon: Float ≥ 0 or a schedule.
        norm_scope: `"batch"`, `"sample"`, `"token"` or `"coordinate"`: what
            shares one norm. A token is a row of the matrix, or a position of an
            output (for other tensors: a vector along the last axis). With
            `"coordinate"` each number moves by at most ε: the maximum norm.
        site: `"matrix"` or `"output"`.
        clean_weight: Float in [0, 1]. Share of the clean loss.
        start_step: Integer.
        bounds: `(low, high)`, the range of a floating input, such as (0, 1) of
            images: a perturbed value does not leave it. `None`: no bounds.
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        norm_scope: str = "batch",
        site: str = "matrix",
        clean_weight: float = 0.0,
        start_step: int = 0,
        bounds: Any = None,
    ) -> None:
        super().__init__(epsilon, site, start_step)
        self.norm_scope = norm_scope
        self.clean_weight = clean_weight
        self.bounds = bounds

    parts = (CLEAN, ADVERSARIAL)

    checks = {
        **AdversarialMethod.checks,
        "norm_scope": check_norm_scope,
        "clean_weight": check_share,
        "bounds": check_bounds,
    }

    def check(self, site):
        check_bounded(self.bounds, site)
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
        point = self.point(origin, delta)
        moved, kwargs = site.at(objective, weights, point)
        evaluation, gradients = objective.value_and_grad(
            lambda weights: objective(weights, **kwargs), moved
        )
        objective.parts[ADVERSARIAL] = evaluation.loss
        if not self.clean_weight:
            return evaluation, gradients
        other, clean_gradients = objective.value_and_grad(objective, weights)
        objective.parts[CLEAN] = other.loss
        return mixed(
            [evaluation, other],
            [gradients, clean_gradients],
            [1 - self.clean_weight, self.clean_weight],
        )

    def point(self, origin, delta):
        """origin + delta, within the bounds."""
        return bounded(shifted(origin, delta), origin, self.bounds)

    def slope(self, objective, weights, site, origin, point=None):
        """The gradient of the loss at a point, by default the origin, float32.

        At the origin the loss is the clean one, which the logs show.
        """
        is_clean = point is None
        point = origin if is_clean else point

        def attack(point):
            moved, kwargs = site.at(objective, weights, point)
            return objective(moved, **kwargs)

        evaluation, g = objective.value_and_grad(attack, point)
        if is_clean:
            objective.parts[CLEAN] = evaluation.loss
        return site_gradients(g, origin, site)


def with_penalty(evaluation, penalty):
    """An evaluation whose loss has a penalty more."""
    clean = evaluation.loss
    penalty = ops.cast(penalty, clean.dtype)
    return evaluation._replace(
        loss=clean + penalty, parts={CLEAN: clean, PENALTY: penalty}
    )


def mixed(evaluations, gradients, shares):
    """The weighted mean of several passes; state is that of the first."""
    loss = sum(e.loss * s for e, s in zip(evaluations, shares, strict=True))
    return evaluations[0]._replace(loss=loss), [
        None if parts[0] is None else backend.weighted_sum(parts, shares)
        for parts in zip(*gradients, strict=True)
    ]
