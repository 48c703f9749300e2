"""Runs the unmodified PyPI package bert4keras 0.11.5 on Keras 3.

>>> import blogkeras.bert4keras
>>> from bert4keras.models import build_transformer_model

Importing this package imports bert4keras; from then on bert4keras builds
genuine Keras 3 models, on the TensorFlow backend. The user's `keras` is not
changed.
"""

from blogkeras.bert4keras.importing import import_bert4keras

import_bert4keras()

from blogkeras.bert4keras.weights import read_safetensors  # noqa: E402

__all__ = ["read_safetensors"]
