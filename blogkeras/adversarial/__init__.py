"""Adversarial training and gradient penalty in one line (posts 7234, 7466).

对抗训练浅谈：意义、方法和思考（附Keras实现）, https://kexue.fm/archives/7234
"""

from typing import Any

import keras

from blogkeras import training
from blogkeras.adversarial.base import (
    AdversarialMethod,
    Hook,
    check_masks,
    check_names,
    check_strength,
)
from blogkeras.adversarial.label_free import (
    NoiseStability,
    VirtualAdversarialTraining,
)
from blogkeras.adversarial.multi_step import PGD, FreeLB
from blogkeras.adversarial.one_step import FGM, FGSM
from blogkeras.adversarial.own_loop import make_loss_function
from blogkeras.adversarial.penalty import GradientPenalty
from blogkeras.adversarial.regularized_dropout import RDrop
from blogkeras.adversarial.robustness import Robustness, evaluate_robustness
from blogkeras.adversarial.smoothness import SMART, TRADES
from blogkeras.adversarial.weight_perturbation import (
    AdversarialWeightPerturbation,
)
from blogkeras.arguments import check_boolean

__all__ = [
    "FGM",
    "FGSM",
    "METHODS",
    "PGD",
    "SMART",
    "TRADES",
    "AdversarialMethod",
    "AdversarialWeightPerturbation",
    "FreeLB",
    "GradientPenalty",
    "NoiseStability",
    "RDrop",
    "Robustness",
    "VirtualAdversarialTraining",
    "adversarial_loss",
    "adversarial_training",
    "describe_training",
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
    "trades": TRADES,
    "smart": SMART,
    "rdrop": RDrop,
    "awp": AdversarialWeightPerturbation,
}


def adversarial_training(
    model: keras.layers.Layer,
    embedding_name: str | list[str] | None = None,
    epsilon: float | None = None,
    method: Any = "fgm",
    *,
    padding_mask: Any = None,
    joint_norm: bool = False,
) -> keras.Model:
    """Makes `fit` train a model adversarially, in place.

    Call it before or after `compile`. From then on `fit` and `train_on_batch`
    of this model compute each step's gradient at a perturbed embedding, which
    makes the loss larger. A second call replaces the first, `plain_training`
    undoes it. Everything else (`evaluate`, `predict`, callbacks, `save`) is as
    before. A saved, cloned or pickled model trains as in Keras: call this again
    after loading. `describe_training` says what is perturbed.

    The logs of `fit`, and the history, have the parts of the loss beside it, as
    means over the epoch: `clean_loss`, and `adversarial_loss` at the perturbed
    values (of FreeLB: at the last of its points), or the `penalty` that is
    added to the clean loss. A part that no pass of the step computes, as the
    clean loss of an attack from a random start, is left out. A name that a
    metric has already gets the prefix `training_`. The list that
    `train_on_batch` returns is Keras's own; its dict has them.

    Args:
        model: A `keras.Model` with Keras's own train step.
        embedding_name: The name or path of the layer to perturb. `None` finds
            the token embedding (the largest vocabulary that is reached from an
            input, at any depth; Keras, KerasHub and bert4keras layers alike);
            a model without embeddings is perturbed at its floating inputs. A
            list of names: all of them at once, such as the embeddings of words
            and of positions, or an embedding and a floating input.
        epsilon: Float ≥ 0, or a schedule. Strength; for FGM the norm of the
            perturbation. `None` takes the method's own default: 1, but 0.005
            for `"awp"`.
        method: `"fgm"`, `"fgsm"`, `"pgd"`, `"freelb"`, `"gradient_penalty"`,
            `"noise_stability"`, `"vat"`, `"trades"`, `"smart"`, `"rdrop"`,
            `"awp"`, or an object such as `FGM(0.5, site="output")`, whose own
            `epsilon` is used then. Its attributes may be changed later:
            `method.epsilon = 0.3`.
        padding_mask: The name of the input that is 1 at real positions and 0 at
            padding, which is then never perturbed (with `site="output"` and at
            floating inputs). `None` takes the Keras mask of the perturbed
            layer's output, else a mask that the model gives to a layer (such as
            `attention_mask`), else an input with the name of a mask. Of
            several places it may be a list, with one for each.
        joint_norm: Boolean. Of several places: whether one norm goes over all
            of them (with `norm_scope` `"batch"` or `"sample"`, and in the
            penalty `form="norm"`), or each has a norm of its own, and so a
            perturbation of full strength.

    Returns:
        The same model.

    Raises:
        ValueError: If the layer is not found or not unique (the message lists
            the candidates), if two names are of one place, if nothing can be
            perturbed, if `epsilon` is negative or not a number, if the method
            is unknown, or if the model has a train step of its own.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model, epsilon=0.5)  # the one line
    >>> x = np.random.randint(0, 9, (32, 4))
    >>> history = model.fit(x, x[:, 0] % 2, verbose=0)

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """
    method = _method(method, epsilon)
    where = _where(model, embedding_name, padding_mask, joint_norm)
    training.install(model, method.hook(model, *where))
    return model


def virtual_adversarial_training(
    model: keras.layers.Layer,
    embedding_name: str | list[str] | None = None,
    epsilon: float = 1.0,
    xi: float = 10.0,
    iters: int = 1,
    *,
    output_kind: str | None = None,
    from_logits: Any = None,
    padding_mask: Any = None,
) -> keras.Model:
    """Makes `fit` train with labelled and unlabelled rows, in place.

    Adds to the loss, for every row, how much the worst small step at the
    embedding changes the prediction. Give unlabelled rows the sample weight 0
    and any class that there is (not -1, unless the loss has `ignore_class=-1`):

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> loss = keras.losses.SparseCategoricalCrossentropy(
    ...     reduction="mean_with_sample_weight"
    ... )
    >>> model.compile("adam", loss)
    >>> model = virtual_adversarial_training(model)
    >>> x, is_labelled = np.random.randint(0, 9, (32, 4)), np.arange(32) < 8
    >>> history = model.fit(
    ...     x, x[:, 0] % 2, sample_weight=is_labelled.astype(float), verbose=0
    ... )

    With this reduction the supervised loss is the mean over the labelled rows
    of the batch. Keras's default divides their sum by the number of all rows:
    the fewer rows are labelled, the smaller the supervised loss would be.

    `plain_training` undoes it. It replaces `adversarial_training`. A saved,
    cloned or pickled model trains as in Keras: call this again after loading.

    Args:
        model: A `keras.Model`. Its compiled loss determines what its outputs
            are: classes, independent labels (probabilities or logits) or
            numbers.
        embedding_name: The name or path of the layer to perturb. `None` finds
            the token embedding; a model without embeddings is perturbed at its
            floating inputs. A list of names: all of them at once.
        epsilon: Float ≥ 0. Norm of the step, over the batch.
        xi: Float > 0. Norm of the probe that finds its direction.
        iters: Integer ≥ 0. Power iterations; 0 is random noise.
        output_kind: `"softmax"`, `"sigmoid"` or `"numbers"`, or a list or dict
            of these for several outputs. `None` reads it off the loss, which is
            not possible for a loss function of your own.
        from_logits: Boolean, or a list or dict. `None` reads it off the loss.
        padding_mask: The name of the input that is 1 at real positions and 0 at
            padding. `None` finds a mask of the model.

    Returns:
        The same model.

    Raises:
        ValueError: If the layer is not found or not unique, if nothing can be
            perturbed, if a number is out of range, if the model has a train
            step of its own, and if the loss does not determine what the outputs
            are.

    Reference:
        [blog post 7466](https://kexue.fm/archives/7466)
    """
    method = VirtualAdversarialTraining(
        epsilon, xi, iters, from_logits=from_logits, output_kind=output_kind
    )
    return adversarial_training(
        model, embedding_name, method=method, padding_mask=padding_mask
    )


def plain_training(model: keras.layers.Layer) -> keras.Model:
    """Undoes `adversarial_training`: `fit` uses Keras's train step again.

    Args:
        model: A `keras.Model`; one with Keras's train step is not changed.

    Returns:
        The same model.

    Raises:
        ValueError: if `model` is no `keras.Model`.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model.compile("adam", "sparse_categorical_crossentropy")
    >>> model = adversarial_training(model)
    >>> model = plain_training(model)  # the last call wins

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """
    _check_model(model)
    training.uninstall(model)
    return model


def adversarial_loss(
    model: keras.layers.Layer,
    loss: Any = None,
    method: Any = "fgm",
    embedding_name: str | list[str] | None = None,
    epsilon: float | None = None,
    *,
    padding_mask: Any = None,
    joint_norm: bool = False,
) -> Any:
    """The loss of a method as a function, for a training loop of your own.

    The function gives the loss, and differentiating it gives the gradients that
    `fit` would train by after `adversarial_training`. It has two forms:

        result = fn(x, y, sample_weight, step)
        result, non_trainable = fn.stateless(
            trainable, non_trainable, x, y, sample_weight, step
        )

    The first is for `tf.GradientTape`, within `tf.function` or not: the loss is
    differentiated with respect to `model.trainable_variables`, and the model's
    state (seeds, BatchNormalization) is assigned. The second is for `jax.grad`,
    and works like Keras's `stateless_call`: values of the variables come in,
    and new values of the not trainable ones go out. `result` has the fields
    `loss`, `y_pred` (the predictions, for metrics) and `parts` (dict of the
    parts of the loss, as in the logs of `fit`).

    The losses that layers add, and regularizers, are in the loss: do not add
    `model.losses` again. `step` is the number of the update, such as
    `optimizer.iterations`: schedules of ε and the random numbers of a method
    depend on it. The gradient is of first order. Under a TensorFlow
    distribution strategy the loss is each replica's share of the mean over all,
    as in `fit`. Scale the loss yourself under `LossScaleOptimizer`.

    Args:
        model: A `keras.Model`, built. It may have a train step of its own, and
            call the function there.
        loss: The loss of the model's one output as `compile` takes it: a name,
            a function or a `keras.losses.Loss`. `None` takes that which the
            model is compiled with, which may be of several outputs.
        method: As for `adversarial_training`.
        embedding_name: As for `adversarial_training`.
        epsilon: As for `adversarial_training`.
        padding_mask: As for `adversarial_training`.
        joint_norm: As for `adversarial_training`.

    Returns:
        The function.

    Raises:
        ValueError: as `adversarial_training`, and if the model is not built or
            has neither this nor a compiled loss.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.GlobalAveragePooling1D()(layers.Embedding(9, 2)(tokens))
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> fn = adversarial_loss(model, "sparse_categorical_crossentropy")
    >>> x = np.random.randint(0, 9, (32, 4))
    >>> result = fn(x, x[:, 0] % 2)
    >>> sorted(result.parts)
    ['adversarial_loss', 'clean_loss']

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """
    method = _method(method, epsilon)
    where = _where(model, embedding_name, padding_mask, joint_norm)
    return make_loss_function(model, loss, method, *where)


def describe_training(model: keras.layers.Layer) -> str:
    """Says in one line what a training step of `fit` perturbs.

    The layer or input is that which `adversarial_training` found or was given,
    by the path under which it can be named as `embedding_name`. In a model that
    cannot be traced ahead, such as a subclassed one, it is found in the first
    step.

    Args:
        model: A `keras.Model`.

    Returns:
        String: the method with its arguments, and the place.

    Raises:
        ValueError: if `model` is no `keras.Model`.

    Example:

    >>> tokens = keras.Input((4,), dtype="int32")
    >>> h = layers.Embedding(9, 2, name="words")(tokens)
    >>> h = layers.GlobalAveragePooling1D()(h)
    >>> model = keras.Model(tokens, layers.Dense(2, "softmax")(h))
    >>> model = adversarial_training(model, method=FGSM(0.01))
    >>> describe_training(model).split(" perturbs ")[1]
    "the embedding matrix of layer 'words', 9 x 2"
    >>> describe_training(plain_training(model))
    "Keras's own training step perturbs nothing"

    Reference:
        [blog post 7234](https://kexue.fm/archives/7234)
    """
    _check_model(model)
    hook = training.installed(model)
    if hook is None:
        return "Keras's own training step perturbs nothing"
    if not isinstance(hook, Hook):
        return f"{hook!r} perturbs nothing that is known"
    return hook.describe(model)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            "Expected `model` to be a `keras.Model`, since the training step "
            f"of `fit` is what changes. Received: model={model!r}"
        )


def _where(model, embedding_name, padding_mask, joint_norm):
    """What a method is told of the places that it perturbs, checked."""
    _check_model(model)
    names = check_names("embedding_name", embedding_name)
    masks = check_masks("padding_mask", padding_mask, names)
    return names, masks, check_boolean("joint_norm", joint_norm)


def _method(method, epsilon):
    if epsilon is not None:
        epsilon = check_strength("epsilon", epsilon)
    if isinstance(method, AdversarialMethod):
        if epsilon not in (None, method.epsilon):
            raise ValueError(
                "A method object carries its own strength: give `epsilon` to "
                f"it alone. Received: epsilon={epsilon!r}, method={method!r}"
            )
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"Expected `method` to be one of {', '.join(map(repr, METHODS))} "
            f"or an `AdversarialMethod`. Received: method={method!r}"
        )
    return METHODS[method](*([] if epsilon is None else [epsilon]))
