"""Arguments of quantizers, pre-training, denoising models and NVAE."""

import functools

import keras
import numpy as np
import toy
from keras import layers
from wrong_values import (
    FREE,
    NAN,
    Kind,
    boolean,
    choice,
    integer,
    layer,
    number,
    on_data,
    row,
    seed,
    stack,
    verbose,
)

import blogkeras

row(
    blogkeras.VectorQuantizer,
    {"num_codes": 4},
    {
        "num_codes": integer(1),
        "codebook_cost": number(0, none=True),
        "commitment_cost": number(0, none=True),
        "ema_decay": number(0, maximum=1, none=True, more=[1.0]),
        "metric": choice(),
        "restart_threshold": number(0),
        "embeddings_initializer": FREE,
        "codebook_transform": choice(none=True),
        "codebook_dim": integer(1, none=True),
        "gradient": choice(),
        "noise_variance": number(0),
        "seed": seed(),
        "kwargs": FREE,
    },
    on_data(),
)
row(
    blogkeras.ResidualVectorQuantizer,
    {"num_quantizers": 2, "num_codes": 4},
    {
        "num_quantizers": integer(1),
        "num_codes": Kind(1, 4.0, True, "4", NAN, [4], [4, 1], [4, 4.0]),
        "codebook_cost": number(0, none=True),
        "commitment_cost": number(0, none=True),
        "ema_decay": number(0, maximum=1, none=True, more=[1.0]),
        "restart_threshold": number(0),
        "embeddings_initializer": FREE,
        "metric": choice(),
        "codebook_transform": choice(none=True),
        "codebook_dim": integer(1, none=True),
        "shared_codebook": boolean(),
        "quantizer_dropout": number(0, maximum=1),
        "gradient": choice(),
        "noise_variance": number(0),
        "seed": seed(),
        "kwargs": FREE,
    },
    on_data(),
)
row(
    blogkeras.GroupedQuantizer,
    {"quantizer": lambda: blogkeras.VectorQuantizer(4), "groups": 3},
    {"quantizer": layer(), "groups": integer(1, more=[2]), "kwargs": FREE},
    on_data(),
)
row(
    blogkeras.FiniteScalarQuantizer,
    {"levels": [3, 3, 3]},
    {
        "levels": Kind(
            3, "333", [], [3.0, 3, 3], [True, 3, 3], [1, 3, 3], [[3]]
        ),
        "activation": choice(),
        "symmetric": boolean(),
        "noise_rate": number(0, maximum=1),
        "seed": seed(),
        "kwargs": FREE,
    },
    on_data(),
)
row(
    blogkeras.ResidualFiniteScalarQuantizer,
    {"num_quantizers": 2, "levels": [3, 3, 3]},
    {
        "num_quantizers": integer(1),
        "levels": Kind(
            3, "333", [], [3.0, 3, 3], [True, 3, 3], [2, 3, 3], [[3]]
        ),
        "activation": choice(),
        "symmetric": boolean(),
        "noise_rate": number(0, maximum=1),
        "quantizer_dropout": number(0, maximum=1),
        "seed": seed(),
        "kwargs": FREE,
    },
    on_data(),
)
row(
    blogkeras.LookupFreeQuantizer,
    {"num_bits": 3},
    {
        "num_bits": integer(1),
        "entropy_cost": number(0),
        "diversity": number(0),
        "commitment_cost": number(0),
        "temperature": number(above=0),
        "spherical": boolean(),
        "kwargs": FREE,
    },
    on_data(),
)
row(
    blogkeras.VQVAE,
    {
        "encoder": lambda: keras.Sequential(
            [keras.Input((3,)), layers.Dense(2)]
        ),
        "quantizer": lambda: blogkeras.VectorQuantizer(4),
        "decoder": lambda: keras.Sequential(
            [keras.Input((2,)), layers.Dense(3)]
        ),
    },
    {
        "encoder": layer(),
        "quantizer": layer(),
        "decoder": layer(),
        "kwargs": FREE,
    },
)
row(
    blogkeras.CodePrior,
    {
        "num_codes": 5,
        "code_shape": (2, 2),
        "dim": 8,
        "num_layers": 1,
        "num_heads": 2,
    },
    {
        "num_codes": integer(2),
        "code_shape": Kind(3, "22", (), (0, 2), (2.0, 2), ((2, 2),), (True, 2)),
        "architecture": choice(),
        "num_classes": integer(1, none=True),
        "label_shape": Kind(3, "22", (2, 2), (0,), (2.0, 2), ((2, 2),)),
        "variable_length": boolean(),
        "dim": integer(1),
        "num_layers": integer(1),
        "num_heads": integer(1),
        "dropout": number(0, maximum=1, more=[1.0]),
        "seed": seed(),
        "kwargs": FREE,
    },
)
row(blogkeras.CodebookUsage, {}, {})


@functools.cache
def encoder():
    tokens = keras.Input((5,), dtype="int32")
    h = layers.Embedding(toy.VOCABULARY, 3)(tokens)
    return keras.Model(tokens, layers.Dense(4)(h))


TOKEN = integer(0, more=[toy.VOCABULARY])
SPECIAL = Kind("text", [1.5], [True], [-1], [toy.VOCABULARY], 3)
SHARE = number(above=0, maximum=1, more=[1.0])
row(
    blogkeras.TokenMasking,
    {"vocabulary_size": toy.VOCABULARY, "mask_token": 1},
    {
        "vocabulary_size": integer(1),
        "mask_token": TOKEN,
        "special_tokens": SPECIAL,
        "rate": SHARE,
        "unit": choice(),
        "max_length": integer(1, none=True),
        "mask_token_rate": number(0, maximum=1),
        "random_token_rate": number(0, maximum=1),
        "num_positions": integer(1, none=True),
        "pad_token": integer(0, none=True),
        "seed": seed(),
        "kwargs": FREE,
    },
    on_data(toy.TOKENS[:4]),
)
PRETRAINING = {
    "mask_token": TOKEN,
    "special_tokens": SPECIAL,
    "mask_rate": SHARE,
    "masking": Kind("token", 3, layers.Dense(1), none=True),
    "embedding": Kind(3, True, "missing", none=True),
    "pad_token": integer(0, none=True),
    "seed": seed(),
    "kwargs": FREE,
}
row(
    blogkeras.ElectraPretrainer,
    {
        "generator": encoder,
        "discriminator": lambda: encoder.__wrapped__(),
        "mask_token": 1,
    },
    {
        **PRETRAINING,
        "generator": Kind("bogus", 3, True),
        "discriminator": layer(),
        "sharing": choice(),
        "generator_weight": number(0),
        "discriminator_weight": number(0),
        "temperature": number(above=0),
        "labels": choice(),
        "allow_original": boolean(),
    },
)
row(
    blogkeras.MaskedLanguageModel,
    {"backbone": encoder, "mask_token": 1},
    {
        **PRETRAINING,
        "backbone": layer(),
        "pairs": choice(none=True),
        "pairs_weight": number(0),
        "head": Kind("dense", 3, none=True),
    },
)
LINES = ["a b c", "b c d"]


def tokenize(line):
    return [ord(c) - 90 for c in line.split()]


row(
    blogkeras.token_blocks,
    {"lines": LINES, "tokenize": lambda: tokenize, "length": 4},
    {
        "lines": Kind("text", 3, []),
        "tokenize": Kind("bogus", 3),
        "length": integer(1),
        "pairs": Kind("bogus", 3),
        "words": Kind("bogus", 3, none=True),
        "batch_size": integer(1),
        "start_token": integer(0, none=True),
        "end_token": integer(0, none=True),
        "pad_token": integer(0),
        "join": boolean(),
        "seed": Kind(1.5, "1", True, [1], none=True),
        "position": integer(0),
        "verbose": verbose(),
    },
)
for function in (blogkeras.share_layers, blogkeras.unshare_layers):
    kinds = {"model": layer(), "boundaries": Kind(3, "bogus", none=True)}
    if function is blogkeras.share_layers:
        kinds |= {
            "source": Kind("bogus", 1.5, True),
            "groups": integer(1),
            "inner": integer(1),
        }
    row(function, {"model": stack}, kinds)
row(
    blogkeras.factorize_embedding,
    {"model": encoder, "size": 2},
    {
        "model": layer(),
        "size": integer(1),
        "embedding": Kind(3, True, "missing", none=True),
    },
)


@functools.cache
def log_density():
    return blogkeras.mlp_log_density((2,), units=(4,))


NETWORK = layer()
POINTS = np.zeros((3, 2), "float32")
SAMPLER = {
    "log_density": Kind("bogus", 3, True),
    "x": Kind("text", np.full((3, 2), NAN), np.array(3.0)),
    "num_steps": integer(0),
    "step_size": number(above=0),
    "temperature": number(0),
    "seed": seed(),
    "allow_non_finite": boolean(),
    "verbose": verbose(),
}
CHAIN = {
    "log_density": lambda: lambda x: -keras.ops.sum(x**2, -1) / 2,
    "x": POINTS,
    "num_steps": 2,
    "step_size": 0.1,
}
row(blogkeras.langevin, CHAIN, SAMPLER)
row(blogkeras.mala, CHAIN, SAMPLER)
row(
    blogkeras.hmc,
    CHAIN,
    {
        **SAMPLER,
        "num_leapfrog": integer(1),
        "step_size_jitter": number(minimum=0, maximum=1),
    },
)
row(
    blogkeras.annealed_langevin,
    {
        "log_density": CHAIN["log_density"],
        "x": POINTS,
        "step_size": 0.1,
        "temperatures": [2.0, 1.0],
    },
    {
        **{
            k: v
            for k, v in SAMPLER.items()
            if k not in ("num_steps", "temperature")
        },
        "temperatures": Kind("text", 3, [], [-1.0], [NAN], ["a"]),
        "sigmas": Kind("text", [], [-1.0], [NAN], none=True),
        "steps_per_level": integer(1),
        "mask": FREE,
        "known_sigmas": Kind(0.1, "text", [0.1], [-1.0, 1.0], none=True),
    },
)
SIGMA = number(above=0)
ESTIMATOR_ARGUMENTS = {
    "network": NETWORK,
    "sigma": SIGMA,
    "seed": seed(),
    "kwargs": FREE,
}
row(
    blogkeras.DenoisingDensityEstimator,
    {"network": log_density, "sigma": 0.1},
    {
        **ESTIMATOR_ARGUMENTS,
        "annealing_steps": integer(0),
        "control_variate": boolean(),
        "allow_piecewise": boolean(),
    },
)
row(
    blogkeras.DenoisingAutoencoder,
    {"network": lambda: layers.Dense(2), "sigma": 0.1},
    {**ESTIMATOR_ARGUMENTS, "annealing_steps": integer(0)},
)
row(
    blogkeras.AnnealedScoreMatching,
    {"network": log_density, "sigmas": [1.0, 0.5, 0.1]},
    {
        "network": NETWORK,
        "sigmas": Kind("text", [], [0.1, 1.0, 0.5], [-1.0], [NAN], ["a"]),
        "sigma0": SIGMA,
        "conditional": boolean(),
        "allow_piecewise": boolean(),
        "seed": seed(),
        "kwargs": FREE,
    },
)
for function in (blogkeras.mlp_log_density, blogkeras.residual_log_density):
    sizes = Kind(3, "44", [], [0], [4.0], [True])
    kinds = {
        "input_shape": Kind(3, "22", (), (0,), (2.0,)),
        "activation": FREE,
        "head": choice(),
        "name": FREE,
        "allow_piecewise": boolean(),
    }
    if function is blogkeras.mlp_log_density:
        row(function, {"input_shape": (2,)}, {**kinds, "units": sizes})
    else:
        row(
            function,
            {"input_shape": (8, 8, 1), "filters": (4,)},
            {**kinds, "filters": sizes, "num_blocks": integer(1)},
        )
row(
    blogkeras.log_partition,
    {
        "log_density": CHAIN["log_density"],
        "method": "quadrature",
        "bounds": [(-9, 9)] * 2,
        "num_points": 9,
        "mean": None,
    },
    {
        "log_density": Kind("bogus", 3, True),
        "method": choice(),
        "bounds": Kind("text", 3, (4, -4), (NAN, 1)),
        "num_points": integer(2, none=True),
        "mean": FREE,
        "scale": FREE,
        "num_samples": integer(1, none=True),
        "num_steps": integer(1, none=True),
        "samples": FREE,
        "seed": seed(),
        "verbose": verbose(),
    },
)
row(
    blogkeras.NVAEConfig,
    {
        "input_shape": (8, 8, 1),
        "groups": (1, 1),
        "channels": 4,
        "likelihood": "bernoulli",
    },
    {
        "input_shape": Kind(
            3, "881", (8, 8), (0, 8, 1), (8.0, 8, 1), (7, 8, 1)
        ),
        "padding": integer(0),
        "groups": Kind(3, "11", (), (0,), (1.0,), (True,)),
        "channels": integer(1),
        "latent_channels": integer(1),
        "num_blocks": integer(0),
        "cells_per_block": integer(1),
        "cells_per_group": integer(0),
        "num_flows": integer(0),
        "likelihood": choice(),
        "num_mixtures": integer(1),
        "num_bits": integer(1, more=[9]),
        "residual_posterior": boolean(),
        "squeeze_excite": boolean(),
        "batch_norm": boolean(),
        "spectral_weight": number(0),
        "spectral_start": number(above=0, none=True),
        "kl_warmup_steps": integer(0),
        "kl_constant_steps": integer(0),
        "kl_minimum": number(0, maximum=1),
        "kl_balance": choice(none=True),
        "binarize": choice(none=True),
    },
)
row(
    blogkeras.NVAE,
    {
        "config": lambda: blogkeras.NVAEConfig(
            (8, 8, 1),
            groups=(1,),
            channels=4,
            latent_channels=1,
            cells_per_block=1,
            cells_per_group=1,
            likelihood="bernoulli",
        )
    },
    {
        "config": Kind("mnist", 3, {"bogus": 1}),
        "recompute": boolean(),
        "seed": seed(),
        "kwargs": FREE,
    },
)
