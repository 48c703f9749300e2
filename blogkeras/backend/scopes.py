"""Scopes in which variables have given values, and keep their own dtype."""

import contextlib

import keras

# Inside a layer a variable is read in the layer's compute dtype. State that
# travels through a branch must be exact, and Keras has no public name for that.
from keras.src.backend.common import global_state


class RecordingScope(keras.StatelessScope):
    """A `keras.StatelessScope` that remembers what was assigned in it.

    Args:
        state_mapping: Pairs `(variable, value)` to be read inside.

    Attributes:
        assigned: Dict `{id(variable): (variable, value)}`.
        losses: What `add_loss` was given inside.
    """

    def __init__(self, state_mapping):
        super().__init__(state_mapping, collect_losses=True)
        self.assigned = {}

    def add_update(self, update):
        super().add_update(update)
        self.assigned[id(update[0])] = update


@contextlib.contextmanager
def no_autocast():
    """Variables inside are read in the dtype that they are kept in."""
    # Under Keras's `AutocastScope(None)` the dtype of each would be float32.
    before = global_state.get_global_attribute("autocast_scope")
    global_state.set_global_attribute("autocast_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("autocast_scope", before)
