"""Attacks of one step: FGM and FGSM."""

from typing import Any

from keras import ops

from blogkeras.adversarial.base import Attack
from blogkeras.adversarial.norms import scaled, units, zero_if_not_finite


class FGM(Attack):
    """Fast gradient method: train where the loss is worst, to first order.

    With g the gradient of the batch's loss L at the site E:

        Δ = ε g / ‖g‖₂        loss = (1 − c) L(E + Δ) + c L(E)

    ‖g‖ is one norm over the whole batch, as in the post; with `"sample"` each
    sample (of an output or an input) has a Δ of norm ε, with `"token"` each
    token. At site `"matrix"` all occurrences of a token have the same Δ, and a
    softmax that is tied to the matrix is perturbed, too. At `"output"` each
    position has a Δ of its own, padding has none, and a tied softmax is not
    perturbed. Where g is zero or not finite (an overflow under float16 loss
    scaling), Δ is zero.

    The attack and the training pass share their dropout masks. Loss, metrics
    and BatchNormalization statistics are those of the training pass at E + Δ.
    The weights are never assigned a perturbed value, so an interrupt leaves
    them clean.

    Symbols: ε is `epsilon`, c is `clean_weight`.

    Args:
        epsilon: Float ≥ 0, or a `keras.optimizers.schedules` schedule of the
            optimizer's update count. Norm of the perturbation.
        norm_scope: `"batch"`, `"sample"` or `"token"`: what shares one norm;
            `"coordinate"` is `FGSM`.
        site: `"matrix"` or `"output"` of the embedding.
        clean_weight: Float in [0, 1]. Share of the clean loss, 0 in the post.
        start_step: Integer. Before this many updates ε is 0.
        bounds: `(low, high)`, the range of a floating input, such as (0, 1) of
            images: a perturbed value does not leave it. `None`: no bounds.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=FGM(0.5, "sample", "output"))

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
        g = self.slope(objective, weights, site, origin)
        return scaled(self.strength(objective), units(g, self.norm_scope, site))


class FGSM(Attack):
    """Fast gradient sign method: every coordinate moves by ε.

        Δ = ε sign(g)

    The strongest first-order attack within a cube; where g is zero (padding,
    tokens that are not in the batch), Δ is zero. No norm is taken, so there is
    no `norm_scope`. The attack and the training pass share their dropout masks;
    loss, metrics and BatchNormalization statistics are those of the training
    pass.

    Args:
        epsilon: Float ≥ 0, or a schedule. Largest coordinate of the
            perturbation: a vector of n coordinates moves by ε √n.
        site: `"matrix"` or `"output"` of the embedding.
        clean_weight: Float in [0, 1]. Share of the clean loss.
        start_step: Integer. Before this many updates ε is 0.
        bounds: `(low, high)`, the range of a floating input, such as (0, 1) of
            images: a perturbed value does not leave it. `None`: no bounds.

    Raises:
        ValueError: on numbers out of range and unknown strings, here and when
            an attribute is changed; on bounds where no input is perturbed, when
            it is installed.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, method=FGSM(0.001))

    Reference:
        [Goodfellow et al., 2015](https://arxiv.org/abs/1412.6572);
        [blog post 7234](https://kexue.fm/archives/7234)
    """

    def __init__(
        self,
        epsilon: float = 1.0,
        site: str = "matrix",
        clean_weight: float = 0.0,
        start_step: int = 0,
        bounds: Any = None,
    ) -> None:
        super().__init__(
            epsilon,
            site=site,
            clean_weight=clean_weight,
            start_step=start_step,
            bounds=bounds,
        )

    def perturbation(self, objective, weights, site, origin):
        g = self.slope(objective, weights, site, origin)
        signs = [ops.sign(zero_if_not_finite(x)) for x in g]
        return scaled(self.strength(objective), signs)
