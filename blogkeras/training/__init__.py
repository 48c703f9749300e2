"""The only package that replaces a train step, in place, on one model.

A method that takes gradients at more than one point (adversarial training, a
gradient penalty, virtual adversarial training, two networks in turn) is written
once, for every backend, as a pure *hook*:

    hook(objective, weights) -> (evaluation, gradients)

`objective` is the batch's loss as a function of the weights, and of whatever
else the hook changes: values of variables, outputs of layers, the batch itself.
Each call of it gives an `evaluation`. The one that the hook returns is
*committed*: its loss and predictions are reported, and its state updates
(BatchNormalization, seeds, metrics) are assigned. The other evaluations change
nothing. `gradients` go to the optimizer, one for each of
`model.trainable_variables`. The hook may compute them in any way, so two
networks with two losses are one hook.

Plain training is the hook

    lambda objective, weights: objective.value_and_grad(objective, weights)

and gives the weights of Keras's own `fit`: to the bit in eager mode, up to
rounding where both are compiled.

- `objective.py`: the loss of a batch as a pure function;
- `parts.py`: the parts of a loss, in the logs;
- `perturbation.py`: layers whose outputs pass through functions;
- `steps.py`: the train step of each backend;
- `installation.py`: installs a hook in a model, and removes it;
- `evaluation.py`: runs a function on the batches of `evaluate`.
"""

from blogkeras.training.evaluation import evaluate_with
from blogkeras.training.installation import (
    install,
    installed,
    step_memory,
    uninstall,
)
from blogkeras.training.objective import Evaluation, Objective
from blogkeras.training.perturbation import perturbed
from blogkeras.training.steps import make_step

__all__ = [
    "Evaluation",
    "Objective",
    "evaluate_with",
    "install",
    "installed",
    "make_step",
    "perturbed",
    "step_memory",
    "uninstall",
]
