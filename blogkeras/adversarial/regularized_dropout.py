"""R-Drop: two passes with different dropout predict the same."""

from typing import Any

from keras import ops

from blogkeras import backend
from blogkeras.adversarial.base import with_penalty
from blogkeras.adversarial.label_free import LabelFreeMethod
from blogkeras.adversarial.sites import Site
from blogkeras.ops import masked_mean

SEED = "seed_generator_state"  # Keras's name of the variable


class RDrop(LabelFreeMethod):
    """Regularized dropout: two passes of a batch are to predict the same.

    With f and g the predictions of two passes with different dropout masks:

        loss = ½ (L(f, y) + L(g, y)) + ¼ α (KL(f ‖ g) + KL(g ‖ f))

    KL is the mean over all rows, labelled or not (of outputs with positions:
    over all that are not masked), and the sum over the outputs; of numbers it
    is the squared difference. Nothing is perturbed, and the batch is not
    written twice: both passes read the same rows. Metrics are those of the
    first pass, and state (seeds, BatchNormalization) moves on by two passes.
    With α = 0 the loss is L(f, y) alone.

    Symbols: α is `epsilon`; the post takes 4, the paper 0.1 to 5.

    Args:
        epsilon: Float ≥ 0, or a schedule. Weight of the divergence.
        from_logits: Boolean. Whether the model gives logits. `None` reads it
            off the compiled loss.
        start_step: Integer. Before this many updates α is 0.
        output_kind: `"softmax"`, `"sigmoid"` or `"numbers"`: what the output
            is. `None` reads it off the compiled loss, which is not possible for
            a loss function of your own.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; where the loss does not say what the output
            is; for a model without dropout or other random layers, whose two
            passes would be the same.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> h = layers.Dropout(0.3)(h)
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=RDrop(4.0))

    Reference:
        [Liang et al., 2021](https://arxiv.org/abs/2106.14448);
        [blog post 8496](https://kexue.fm/archives/8496)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        from_logits: Any = None,
        start_step: int = 0,
        output_kind: str | None = None,
    ) -> None:
        super().__init__(epsilon, start_step, output_kind, from_logits)

    def find_site(self, model, name, padding_mask):
        """No site: masks are those that the outputs carry."""
        if name is not None or padding_mask is not None:
            raise ValueError(
                "R-Drop perturbs no layer: leave out `embedding_name` and "
                "`padding_mask`. Received: embedding_name="
                f"{name!r}, padding_mask={padding_mask!r}"
            )
        if model.built:
            _check_random(model)
        return Site()

    def describe(self, model, site):
        return f"{self!r} perturbs nothing: two passes differ by dropout"

    def gradients(self, objective, weights, site):
        _check_random(objective.model)
        alpha = self.strength(objective)

        def total(weights):
            loss, first = objective(weights)
            other, second = objective(weights, values=objective.after(first))
            passes = [
                self.predictions(objective, evaluation, site)
                for evaluation in (first, second)
            ]
            divergence = 0.0
            for (meaning, f, counted), (_, g, _) in zip(*passes, strict=True):
                both = meaning.divergence(f, g) + meaning.divergence(g, f)
                divergence = divergence + masked_mean(both, counted)
            penalty = 0.25 * alpha * divergence / backend.num_replicas()
            # With α = 0 the step is that of plain training.
            share = ops.cast(ops.where(alpha > 0, 0.5, 0.0), loss.dtype)
            loss = loss + share * (other - loss)
            evaluation = with_penalty(
                second._replace(loss=loss, y_pred=first.y_pred), penalty
            )
            return evaluation.loss, evaluation

        return objective.value_and_grad(total, weights)


def _check_random(model):
    if not any(v.name == SEED for v in model.non_trainable_variables):
        raise ValueError(
            "Expected a model with dropout, or another layer that draws random "
            "numbers in training: without one the two passes are the same. "
            f"Received: model {model.name!r}"
        )
