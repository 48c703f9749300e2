"""All encoders of KerasHub: pre-trained, saved, shared and un-shared."""

import keras
import numpy as np
import pytest
from kit import value

from blogkeras import (
    ElectraPretrainer,
    MaskedLanguageModel,
    layerwise_optimizer,
    share_layers,
    unshare_layers,
)

pytestmark = pytest.mark.verify

VOCABULARY, LENGTH, MASK = 23, 10, 4
IDS = np.random.default_rng(0).integers(5, VOCABULARY, (8, LENGTH))
IDS[:3, 7:] = 0
KINDS = [
    "Bert",
    "Roberta",
    "XLMRoberta",
    "DistilBert",
    "DebertaV3",
    "Albert",
    "FNet",
    "Electra",
    "GPT2",
    "OPT",
]


def backbone(kind):
    keras_hub = pytest.importorskip("keras_hub")
    sizes = {
        "vocabulary_size": VOCABULARY,
        "num_layers": 2,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "max_sequence_length": LENGTH,
    }
    if kind == "Electra":
        sizes["vocab_size"] = sizes.pop("vocabulary_size")
    if kind in ("Electra", "Albert"):
        sizes["embedding_dim"] = 8
    if kind != "FNet":
        sizes["num_heads"] = 2
    return getattr(keras_hub.models, f"{kind}Backbone")(**sizes)


def sequence(model):
    inputs = {
        name: (
            IDS != 0
            if "mask" in name
            else np.zeros_like(IDS)
            if "segment" in name
            else IDS
        )
        for name in model.input
    }
    outputs = model(inputs)
    if isinstance(outputs, dict):
        outputs = outputs["sequence_output"]
    return value(outputs)


@pytest.mark.parametrize("kind", KINDS)
# Their pooled outputs are not trained here.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_pre_training(kind, tmp_path):
    model = ElectraPretrainer(
        backbone(kind), backbone(kind), mask_token=MASK, seed=1
    )
    model.compile("sgd", run_eagerly=True)
    losses = model.fit(IDS, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.detect_replaced(IDS), model.detect_replaced(IDS)
    )
    filler = MaskedLanguageModel(backbone(kind), mask_token=MASK)
    masked = IDS.copy()
    masked[[0, 1], [2, 3]] = MASK
    places, tokens, probabilities = filler.fill_mask(masked, top_k=3)
    np.testing.assert_array_equal(places, [[0, 2], [1, 3]])
    assert tokens.shape == probabilities.shape == (2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_sharing(kind):
    model = backbone(kind)
    apart = unshare_layers(model)
    np.testing.assert_array_equal(sequence(apart), sequence(model))
    shared = share_layers(apart)
    assert shared.count_params() < apart.count_params()
    np.testing.assert_array_equal(
        sequence(unshare_layers(shared)), sequence(shared)
    )
    optimizer = layerwise_optimizer(model, keras.optimizers.AdamW(1e-3))
    optimizer.build(model.trainable_variables)
