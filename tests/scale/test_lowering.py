"""Further train steps, and sampling, lower for a TPU and for a GPU.

No such device is needed: JAX lowers for platforms that are not there. One step
of each model and method is lowered in `conformance/test_matrix.py`; here are
their variants, and layers inside of models.
"""

import keras
import numpy as np
import pytest
import toy
from kit import JAX, assert_full_precision, lower_train_step

import blogkeras

pytestmark = pytest.mark.skipif(not JAX, reason="JAX lowers for any device")


def adversarial(method, **options):
    def make():
        model = toy.compiled(toy.classifier(**options))
        blogkeras.adversarial_training(model, method=method)
        return model, toy.TOKENS[:8], toy.LABELS[:8]

    return make


def plain():
    return toy.compiled(toy.classifier()), toy.TOKENS[:8], toy.LABELS[:8]


def disentangled_electra():
    def encoder(name):
        tokens = keras.Input((5,), dtype="int32", name="tokens")
        h = keras.layers.Embedding(toy.VOCABULARY, 4)(tokens)
        return keras.Model(tokens, keras.layers.Dense(4)(h), name=name)

    model = blogkeras.ElectraPretrainer(
        encoder("generator"), encoder("discriminator"), 1, (), "disentangled"
    )
    model.compile("adam", jit_compile=True)
    return model, toy.TOKENS[:8]


def vqvae(quantizer):
    def make():
        encoder = keras.Sequential(
            [keras.Input((4, 4, 2)), keras.layers.Conv2D(3, 2, 2)]
        )
        decoder = keras.Sequential(
            [keras.Input((2, 2, 3)), keras.layers.Conv2DTranspose(2, 2, 2)]
        )
        model = blogkeras.VQVAE(encoder, quantizer(), decoder)
        model.compile("adam", jit_compile=True)
        return model, np.ones((8, 4, 4, 2), "float32")

    return make


def code_prior(architecture):
    def make():
        model = blogkeras.CodePrior(
            5, (2, 3), architecture, dim=8, num_layers=1, num_heads=2
        )
        model.compile("adam", jit_compile=True)
        return model, np.ones((8, 2, 3), "int32")

    return make


def hsic_regularization():
    x, nuisance = keras.Input((8,)), keras.Input((1,))
    features = blogkeras.HSICRegularization(1.0)(
        [keras.layers.Dense(12)(x), nuisance]
    )
    model = keras.Model([x, nuisance], keras.layers.Dense(1)(features))
    model.compile("adam", "mse", jit_compile=True)
    data = np.ones((8, 8), "float32"), np.ones((8, 1), "float32")
    return model, data, np.ones((8, 1), "float32")


def word_mover_distance():
    tokens = [keras.Input((5,), dtype="int32") for _ in range(2)]
    embedding = keras.layers.Embedding(toy.VOCABULARY, 12, mask_zero=True)
    distance = blogkeras.WordMoverDistance()([embedding(t) for t in tokens])
    model = keras.Model(tokens, keras.layers.Reshape((1,))(distance))
    model.compile("adam", "mse", jit_compile=True)
    data = (toy.TOKENS[:8], toy.TOKENS[8:16])
    return model, data, np.ones((8, 1), "float32")


def denoising_of_pictures():
    pictures = blogkeras.residual_log_density((4, 4, 1), (2, 2))
    model = blogkeras.DenoisingDensityEstimator(pictures, 0.5, 10)
    model.compile("adam", jit_compile=True)
    return model, np.ones((8, 4, 4, 1), "float32")


# Whose promises rest on the digits of their products.
FULL_PRECISION = ("word mover's distance",)
STEPS = {
    "codebook": vqvae(
        lambda: blogkeras.VectorQuantizer(
            5, ema_decay=0.9, restart_threshold=0.1
        )
    ),
    "residual": vqvae(lambda: blogkeras.ResidualVectorQuantizer(2, 5)),
    "codec": vqvae(
        lambda: blogkeras.ResidualVectorQuantizer(
            2,
            5,
            metric="cosine",
            codebook_dim=2,
            quantizer_dropout=0.5,
            gradient="rotation",
        )
    ),
    "frozen codes": vqvae(
        lambda: blogkeras.VectorQuantizer(
            5, codebook_transform="linear", gradient="diveq"
        )
    ),
    "signs": vqvae(lambda: blogkeras.LookupFreeQuantizer(3, spherical=True)),
    "scalar": vqvae(lambda: blogkeras.FiniteScalarQuantizer([8] * 3)),
    "convolution prior": code_prior("convolution"),
    "dropout and statistics of a batch": plain,
    "fgm at the output": adversarial(blogkeras.FGM(0.5, "sample", "output")),
    "fgm at look-ups": adversarial(blogkeras.FGM(0.5), regularizer=None),
    "pgd from a random start": adversarial(
        blogkeras.PGD(0.5, 2, random_start=True, site="output")
    ),
    "electra, disentangled": disentangled_electra,
    "hsic regularization": hsic_regularization,
    "word mover's distance": word_mover_distance,
    "denoising of pictures": denoising_of_pictures,
}


@pytest.mark.parametrize("name", STEPS)
def test_train_step_lowers(name):
    model, x, *y = STEPS[name]()
    program = lower_train_step(model, x, *(y or [None]), "tpu", "cuda")
    assert "stablehlo" in program
    # A call into Python would need the host in every step.
    assert "callback" not in program
    if name in FULL_PRECISION:
        assert_full_precision(program)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("architecture", ["attention", "convolution"])
def test_sampling_lowers(architecture, platform):
    import jax

    model, _ = code_prior(architecture)()
    model.build()

    known = keras.ops.convert_to_tensor(model._known_codes(None, 4))

    def sample(values, u):
        mapping = zip(model.variables, values, strict=True)
        with keras.StatelessScope([*mapping]):
            return model._sample(3, u, 0.9, known)

    exported = jax.export.export(jax.jit(sample), platforms=[platform])(
        [v.value for v in model.variables], np.ones((6, 4), "float32")
    )
    program = exported.mlir_module()
    assert "stablehlo.while" in program
    assert "callback" not in program
