"""Adversarial training and gradient penalty in one line (posts 7234, 7466).

对抗训练浅谈：意义、方法和思考（附Keras实现）, https://kexue.fm/archives/7234
"""

from blogkeras import training
from blogkeras.adversarial.ascent import PGD, FreeLB
from blogkeras.adversarial.methods import (
    FGM,
    FGSM,
    AdversarialMethod,
    GradientPenalty,
)
from blogkeras.adversarial.robustness import Robustness, evaluate_robustness
from blogkeras.adversarial.virtual import (
    NoiseStability,
    VirtualAdversarialTraining,
)

__all__ = [
    "FGM",
    "FGSM",
    "METHODS",
    "PGD",
    "AdversarialMethod",
    "FreeLB",
    "GradientPenalty",
    "NoiseStability",
    "Robustness",
    "VirtualAdversarialTraining",
    "adversarial_training",
    "evaluate_robustness",
    "plain_training",
    "virtual_adversarial_training",
]

METHODS = {
    "fgm": FGM,
    "fgsm": FGSM,
    "pgd": PGD,
    "freelb": FreeLB,
    "gradient_penalty": GradientPenalty,
    "noise_stability": NoiseStability,
    "vat": VirtualAdversarialTraining,
}


def adversarial_training(model, embedding_name=None, epsilon=1.0, method="fgm"):
    """Makes `fit` train a model adversarially, in place.

    One line before or after `compile`; from then on `fit` and `train_on_batch`
    of this very model take every step where the embedding is perturbed against
    it. A second call replaces the first, `plain_training` undoes it. All else
    (`evaluate`, `predict`, callbacks, `save`) is as before. A saved, cloned or
    pickled model is the plain one: call again after loading.

    Args:
        model: A `keras.Model` with Keras's own train step.
        embedding_name: The name or path of the layer to perturb. `None` finds
            the token embedding (the largest vocabulary that is reached from an
            input, at any depth; Keras, KerasHub and bert4keras layers alike);
            a model without embeddings is perturbed at its floating inputs.
        epsilon: Float ≥ 0. Strength; for FGM the norm of the perturbation.
        method: `"fgm"`, `"fgsm"`, `"pgd"`, `"freelb"`, `"gradient_penalty"`,
            `"noise_stability"`, `"vat"`, or an object such as
            `FGM(0.5, site="output")`, whose own `epsilon` then holds.

    Returns:
        The same model.

    Raises:
        ValueError: If the layer is not found or not unique (the message lists
            the candidates), if `epsilon` is negative or not a number, if the
            method is unknown, or if the model has a train step of its own.

    Example:

    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> adversarial_training(model, "Embedding-Token", 0.5)
    >>> model.fit(x, y)

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """
    method = _method(method, epsilon)
    training.install(model, method.hook(model, embedding_name))
    return model


def virtual_adversarial_training(
    model, embedding_name=None, epsilon=1.0, xi=10.0, iters=1
):
    """Makes `fit` train with labelled and unlabelled rows, in place.

    Adds to the loss how far the worst small step at the embedding moves the
    prediction, for every row. An unlabelled row has any label and sample weight
    0:

    >>> model.compile(
    ...     "adam",
    ...     keras.losses.SparseCategoricalCrossentropy(
    ...         reduction="mean_with_sample_weight"
    ...     ),
    ... )
    >>> virtual_adversarial_training(model, "Embedding-Token")
    >>> model.fit(x, y, sample_weight=is_labelled)

    With this reduction the supervised loss is the mean over the labelled rows
    of the batch. Keras's default divides their sum by all rows: the fewer are
    labelled, the less the labels count.

    Undone by `plain_training`; replaces `adversarial_training`, and all said
    there of saving holds here.

    Args:
        model: A `keras.Model` that classifies, with probabilities or, if its
            compiled loss says so, logits.
        embedding_name: As in `adversarial_training`.
        epsilon: Float ≥ 0. Norm of the step, over the batch.
        xi: Float > 0. Norm of the probe that finds its direction.
        iters: Integer ≥ 0. Power iterations; 0 is random noise.

    Returns:
        The same model.

    Reference:
        [blog post 7466](https://kexue.fm/archives/7466)
    """
    method = VirtualAdversarialTraining(epsilon, xi, iters)
    return adversarial_training(model, embedding_name, method=method)


def plain_training(model):
    """Undoes `adversarial_training`: `fit` trains plainly again.

    Args:
        model: A `keras.Model`; one that trains plainly is left alone.

    Returns:
        The same model.
    """
    training.uninstall(model)
    return model


def _method(method, epsilon):
    if isinstance(method, AdversarialMethod):
        if epsilon not in (1.0, method.epsilon):
            raise ValueError(
                "A method object carries its own strength: give `epsilon` to "
                f"it alone. Received: epsilon={epsilon!r}, method={method!r}"
            )
        return method
    if method not in METHODS:
        raise ValueError(
            f"Expected `method` to be one of {', '.join(map(repr, METHODS))} "
            f"or an `AdversarialMethod`. Received: method={method!r}"
        )
    return METHODS[method](epsilon)
