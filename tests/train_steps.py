"""Every trainable public model and every method of training, small.

What is asked of all train steps (`conformance/test_matrix.py`), of saved files
(`conformance/`) and of several processes (`scale/`) is tried on these. A maker
takes the optimizer and options of `compile`, and gives a compiled model.
"""

import functools

import keras
import numpy as np
import toy
from kit import TENSORFLOW

import blogkeras


def dense(units=3, inputs=3, activation="tanh", name=None):
    layer = keras.layers.Dense(units, activation, name=name)
    layer.build((None, inputs))
    return layer


def compiled(model, *loss, optimizer="sgd", jit_compile=True, **options):
    if options.get("run_eagerly"):
        jit_compile = False
    model.compile(optimizer, *loss, jit_compile=jit_compile, **options)
    return model


def theseus(**options):
    head = dense(3, 3, "softmax", "head")
    model = blogkeras.Theseus(
        [[dense(4), dense(3, 4)], dense()], [dense(), dense()], head, seed=1
    )
    return compiled(model, "sparse_categorical_crossentropy", **options)


def distillation(**options):
    teacher, student = (
        keras.Sequential([keras.Input((3,)), dense(3, 3, "softmax")])
        for _ in range(2)
    )
    model = blogkeras.Distillation(teacher, student)
    return compiled(model, "sparse_categorical_crossentropy", **options)


def bottleneck(**options):
    model = blogkeras.HSICBottleneck([dense(4), dense(3, 4)], 3)
    return compiled(model, metrics=["accuracy"], **options)


def vqvae(**options):
    encoder = keras.Sequential([keras.Input((3,)), dense(4)])
    decoder = keras.Sequential([keras.Input((4,)), dense(3, 4)])
    model = blogkeras.VQVAE(encoder, blogkeras.VectorQuantizer(5), decoder)
    return compiled(model, **options)


def code_prior(**options):
    model = blogkeras.CodePrior(
        11, (5,), dim=8, num_layers=1, num_heads=2, name="code_prior"
    )
    return compiled(model, **options)


def token_encoder(dim, name):
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    h = keras.layers.Embedding(toy.VOCABULARY, 3)(tokens)
    return keras.Model(tokens, dense(dim)(h), name=name)


def masked_language_model(**options):
    model = blogkeras.MaskedLanguageModel(
        token_encoder(4, "encoder"), mask_token=1, seed=1
    )
    return compiled(model, **options)


def electra(**options):
    model = blogkeras.ElectraPretrainer(
        token_encoder(4, "generator"),
        token_encoder(6, "discriminator"),
        mask_token=1,
        name="electra",
        seed=1,
    )
    return compiled(model, **options)


def density_estimator(**options):
    network = blogkeras.mlp_log_density((3,), (4,))
    model = blogkeras.DenoisingDensityEstimator(network, 0.5, seed=0)
    return compiled(model, **options)


def denoising_generator(**options):
    model = blogkeras.DenoisingGenerator(
        keras.Sequential([keras.Input((3,)), dense(2)]),
        blogkeras.mlp_log_density((2,), (4,)),
        blogkeras.mlp_log_density((2,), (4,)),
        0.5,
        seed=0,
    )
    return compiled(model, **options)


def annealed_score_matching(**options):
    network = blogkeras.mlp_log_density((3,), (4,), head="quadratic")
    model = blogkeras.AnnealedScoreMatching(network, [0.1, 1.0], seed=0)
    return compiled(model, **options)


def denoising_autoencoder(**options):
    network = keras.Sequential([keras.Input((3,)), dense(3, 3)])
    model = blogkeras.DenoisingAutoencoder(network, 0.5, seed=0)
    return compiled(model, **options)


def nvae(**options):
    config = blogkeras.NVAEConfig(
        (4, 4, 1),
        groups=(1,),
        channels=2,
        latent_channels=2,
        cells_per_block=1,
        cells_per_group=1,
        likelihood="normal",
    )
    # Depthwise convolutions compile slowly.
    options.setdefault("jit_compile", not TENSORFLOW)
    return compiled(blogkeras.NVAE(config, seed=0), **options)


def trained_by(method, **options):
    """A classifier of tokens that trains by a method, `None` for plainly."""
    # Statistics of a batch and dropout are other on two replicas, in Keras
    # itself. R-Drop wants a layer of dropout, which here drops nothing.
    model = toy.classifier(
        dropout=1e-9 if method == "rdrop" else 0.0,
        normalization=keras.layers.LayerNormalization,
    )
    compiled(
        model,
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        **options,
    )
    if method is None:
        return blogkeras.plain_training(model)
    return blogkeras.adversarial_training(model, method=method)


PICTURES = np.abs(np.tanh(toy.DENSE[:, :1, None, None] * np.ones((4, 4, 1))))
# {class: (maker, x, y)}
MODELS = {
    "NVAE": (nvae, PICTURES[:16], None),
    "DenoisingDensityEstimator": (density_estimator, toy.DENSE[:16], None),
    "DenoisingAutoencoder": (denoising_autoencoder, toy.DENSE[:16], None),
    "AnnealedScoreMatching": (annealed_score_matching, toy.DENSE[:16], None),
    "DenoisingGenerator": (denoising_generator, toy.DENSE[:16], None),
    "ElectraPretrainer": (electra, toy.TOKENS[:16], None),
    "MaskedLanguageModel": (masked_language_model, toy.TOKENS[:16], None),
    "CodePrior": (code_prior, toy.TOKENS[:16], None),
    "VQVAE": (vqvae, toy.DENSE[:16], None),
    "HSICBottleneck": (bottleneck, toy.DENSE[:8], toy.LABELS[:8]),
    "Theseus": (theseus, toy.DENSE[:16], toy.LABELS[:16]),
    "Distillation": (distillation, toy.DENSE[:16], toy.LABELS[:16]),
}
if not hasattr(keras.optimizers, "MultiOptimizer"):
    del MODELS["DenoisingGenerator"]  # needs Keras 3.15
# The same of methods; `None` is `plain_training`.
METHODS = {
    name: (functools.partial(trained_by, name), toy.TOKENS[:16], y)
    for y in [toy.LABELS[:16]]
    for name in (None, *blogkeras.adversarial.METHODS)
}
