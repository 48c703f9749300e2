"""Adversarial weight perturbation: the weights themselves are attacked."""

from keras import ops

from blogkeras import backend
from blogkeras.adversarial.base import (
    ADVERSARIAL,
    CLEAN,
    AdversarialMethod,
    Attack,
)
from blogkeras.adversarial.norms import at_least_float32, length

# What layers call their biases and gains; that of a GRU has two axes.
_LEFT_OUT = ("bias", "gamma", "beta", "scale")


def _check_attack(name, value):
    if value is None:
        return None
    if not isinstance(value, Attack) or value.clean_weight:
        raise ValueError(
            f"Expected `{name}` to be None or an attack without a clean pass, "
            f"such as FGM(0.5). Received: {name}={value!r}"
        )
    if type(value).perturbation is Attack.perturbation:
        raise ValueError(
            f"Expected `{name}` to be an attack that ends at one point. "
            f"Received: {name}={value!r}, which trains at each of its steps"
        )
    return value


class AdversarialWeightPerturbation(AdversarialMethod):
    """Trains where a small step of the weights makes the loss worst.

    For each trainable tensor w of two or more axes (matrices, convolutions,
    embeddings), with g its gradient of the loss L:

        v = ε ‖w‖ g / ‖g‖        loss = L(w + v)

    with Euclidean norms over the tensor. Biases and gains, those that are named
    "bias", "gamma", "beta" or "scale", are left out, of two axes too. The
    gradient at w + v moves w, so the training ends where the loss is flat. The
    weights are never assigned a perturbed value, so an interrupt leaves them
    clean. Where g is zero or not finite, v is zero. Both passes share their
    dropout masks; loss, metrics and BatchNormalization statistics are those of
    the pass at w + v.

    With an `attack` the inputs (or the embedding) are perturbed first, as in
    the paper, and L is the loss at its perturbed values.

    Symbols: ε is `epsilon`, the paper's γ.

    Args:
        epsilon: Float ≥ 0, or a schedule. Size of the step relative to the
            weights, 0.005 in the paper.
        attack: An attack such as `FGM(0.5)` or `PGD(0.3)`, or `None`. Its
            `clean_weight` is 0.
        start_step: Integer. Before this many updates ε is 0.

    Raises:
        ValueError: on numbers out of range and an attack that is none, here and
            when an attribute is changed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> method = AdversarialWeightPerturbation(0.01, attack=FGM(0.5))
    >>> model = adversarial_training(model, method=method)

    Reference:
        [Wu et al., 2020](https://arxiv.org/abs/2004.05884);
        [blog post 7234](https://kexue.fm/archives/7234), for the attacks
    """

    def __init__(
        self,
        epsilon: float = 0.005,
        attack: Attack | None = None,
        start_step: int = 0,
    ) -> None:
        self.epsilon = epsilon
        self.attack = attack
        self.start_step = start_step

    parts = (CLEAN, ADVERSARIAL)

    checks = {
        "epsilon": AdversarialMethod.checks["epsilon"],
        "attack": _check_attack,
        "start_step": AdversarialMethod.checks["start_step"],
    }

    @property
    def site(self):
        """That of the attack."""
        return None if self.attack is None else self.attack.site

    @site.setter
    def site(self, value):
        raise ValueError(
            "The site is that of the attack: set it there. Received: "
            f"site={value!r}"
        )

    @property
    def version(self):
        # A pair, since in a sum changes of the two could cancel.
        attack = self.attack
        return super().version, None if attack is None else attack.version

    def find_site(self, model, name=None, padding_mask=None):
        if self.attack is not None:
            return self.attack.find_site(model, name, padding_mask)
        if name is not None or padding_mask is not None:
            raise ValueError(
                "Without an `attack` all weights are perturbed: leave out "
                "`embedding_name` and `padding_mask`. Received: "
                f"embedding_name={name!r}, padding_mask={padding_mask!r}"
            )
        return None

    def describe(self, model, site):
        weights = (
            "all trainable weights of two or more axes but biases and gains"
        )
        if self.attack is None:
            return f"{self!r} perturbs {weights}"
        return f"{self!r} perturbs {site.describe(model)}, and {weights}"

    def check(self, site):
        if self.attack is not None:
            self.attack.check(site)

    def gradients(self, objective, weights, site):
        attack, at = self.attack, None
        if attack is not None:
            origin = site.origin(objective, weights)
            attack.check(site)
            delta = attack.perturbation(objective, weights, site, origin)
            at = attack.point(origin, delta)
            weights, _ = site.at(objective, weights, at)

        def loss(weights):
            # What `at` returns holds for one evaluation.
            kwargs = {} if at is None else site.at(objective, weights, at)[1]
            return objective(weights, **kwargs)

        first, gradients = objective.value_and_grad(loss, weights)
        if attack is None:
            objective.parts[CLEAN] = first.loss
        strength = self.strength(objective)
        moved = [
            w if v.name in _LEFT_OUT else _uphill(w, g, strength)
            for v, w, g in zip(
                objective.model.trainable_variables,
                weights,
                gradients,
                strict=True,
            )
        ]
        evaluation, gradients = objective.value_and_grad(loss, moved)
        objective.parts[ADVERSARIAL] = evaluation.loss
        return evaluation, gradients


def _uphill(weight, gradient, strength):
    """w + ε ‖w‖ g / ‖g‖ of a tensor of two or more axes, else w."""
    if gradient is None or len(weight.shape) < 2:
        return weight
    # All replicas have the same weights, and so the same step.
    g = backend.all_reduce_sum(at_least_float32(backend.dense(gradient)))
    w = ops.cast(weight, g.dtype)
    norm = length(g)
    usable = ops.logical_and(norm > 0, ops.isfinite(norm))
    direction = g / ops.where(usable, norm, ops.ones_like(norm))
    size = ops.cast(strength, g.dtype) * length(w)
    step = ops.where(usable, size * direction, ops.zeros_like(g))
    return ops.cast(w + step, weight.dtype)
