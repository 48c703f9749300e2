"""The penalty of the loss's gradient."""

import functools
import weakref

from keras import ops

from blogkeras import backend
from blogkeras.adversarial.base import (
    CLEAN,
    PENALTY,
    AdversarialMethod,
    with_penalty,
)
from blogkeras.adversarial.norms import (
    scaled,
    site_gradients,
    squared_length,
)
from blogkeras.arguments import check_choice
from blogkeras.ops import safe_sqrt

FORMS = ("squared", "norm")


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

    L is the mean over the batch, so ‖g‖² is proportional to 1 / batch size:
    with batches of 16 the same ε gives twice the penalty of batches of 32.

    Args:
        epsilon: Float ≥ 0, or a schedule of the optimizer's update count.
        form: `"squared"` or `"norm"`.
        site: `"output"` or `"matrix"` of the embedding.
        start_step: Integer. Before this many updates ε is 0.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> method = GradientPenalty(1.0, form="norm")
    >>> model = adversarial_training(model, method=method)

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        form: str = "squared",
        site: str = "output",
        start_step: int = 0,
    ) -> None:
        super().__init__(epsilon, site, start_step)
        self.form = form

    parts = (CLEAN, PENALTY)

    checks = {
        **AdversarialMethod.checks,
        "form": functools.partial(check_choice, choices=FORMS),
    }

    def gradients(self, objective, weights, site):
        epsilon = self.strength(objective)

        def penalized(weights):
            origin = site.origin(objective, weights)

            def at(point):
                moved, kwargs = site.at(objective, weights, point)
                return objective(moved, **kwargs)

            evaluation, g = objective.value_and_grad(at, origin)
            g = site_gradients(g, origin, site)
            backend.check_second_order(g)
            groups = site.groups([objective.unscale(x) for x in g])
            penalty = sum(map(self._of_group, groups))
            (penalty,) = scaled(epsilon, [penalty])
            # Each replica adds its share.
            evaluation = with_penalty(
                evaluation, penalty / backend.num_replicas()
            )
            return evaluation.loss, evaluation

        return second_order_gradients(objective, penalized, weights)

    def _of_group(self, group):
        squared = squared_length(group)
        # It is not finite where loss scaling overflows. The optimizer skips
        # that step; the reported loss stays finite.
        squared = ops.where(ops.isfinite(squared), squared, 0.0)
        return 0.5 * squared if self.form == "squared" else safe_sqrt(squared)


def second_order_gradients(objective, penalized, weights):
    """The gradients of a loss that itself contains gradients.

    Raises:
        ValueError: If TensorFlow has no second derivative of an operation.
    """
    model = objective.model
    with backend.second_order():
        if backend.is_concrete(weights) and model not in _checked:
            # A missing derivative can be found in a graph only.
            backend.trace(lambda: penalized(weights)[0])
            _checked.add(model)
        return objective.value_and_grad(penalized, weights)


# Models that run eagerly and whose second derivatives were checked.
_checked = weakref.WeakSet()
