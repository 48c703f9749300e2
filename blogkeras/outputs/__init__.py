"""What a model's outputs mean, and how far two predictions are apart.

A model does not say whether its output is the probabilities of classes that
exclude each other, the probabilities of independent labels, or plain numbers,
nor whether these are logits. The loss that it is compiled with does.
`read_outputs` reads it off the loss, for every method that compares
predictions.

- `losses.py`: the loss of one output, as `compile` makes it;
- `meaning.py`: `OutputMeaning`, and the divergence of two predictions;
- `reading.py`: reads the meanings off a compiled model;
- `structure.py`: values for each of several outputs.
"""

from blogkeras.outputs.losses import as_loss
from blogkeras.outputs.meaning import KINDS, OutputMeaning
from blogkeras.outputs.reading import (
    UnreadableLossError,
    check_output_arguments,
    read_outputs,
)
from blogkeras.outputs.structure import (
    known_outputs,
    output_losses,
    output_names,
    spread,
    spread_labels,
)

__all__ = [
    "KINDS",
    "OutputMeaning",
    "UnreadableLossError",
    "as_loss",
    "check_output_arguments",
    "known_outputs",
    "output_losses",
    "output_names",
    "read_outputs",
    "spread",
    "spread_labels",
]
