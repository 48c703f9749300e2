"""A codebook learns where the data is, in seconds.

Points in the plane lie around 40 centers, away from the origin. Three layers of
64 codes learn to stand for them: the codebook of the post, trained by its loss;
a moving average; and a moving average that restarts the codes nobody uses.

Blog: VQ-VAE的简明介绍：量子化自编码器, https://kexue.fm/archives/6760
"""

import keras
import numpy as np

from blogkeras import CodebookUsage, VectorQuantizer

NUM_CODES = 64


def make_data(size, rng):
    centers = 5 + 2 * np.random.default_rng(1).normal(size=(40, 2))
    noise = 0.1 * rng.normal(size=(size, 2))
    return (centers[rng.integers(0, 40, size)] + noise).astype("float32")


def main():
    rng = np.random.default_rng(0)
    points, test = make_data(4096, rng), make_data(1024, rng)
    layers = {
        "by its loss": VectorQuantizer(NUM_CODES),
        "average": VectorQuantizer(NUM_CODES, ema_decay=0.95),
        "with restarts": VectorQuantizer(
            NUM_CODES, ema_decay=0.95, restart_threshold=0.1
        ),
    }
    print("codebook", "error", "codes used", "perplexity", sep="\t")
    results = {}
    for name, layer in layers.items():
        model = keras.Sequential([keras.Input((2,)), layer])
        # The layer brings its own loss.
        model.compile(keras.optimizers.Adam(0.02), jit_compile=True)
        history = model.fit(
            points,
            batch_size=256,
            epochs=5,
            verbose=0,
            callbacks=[CodebookUsage()],
        ).history
        codes = layer.encode(test)
        error = np.mean(np.square(test - np.asarray(layer.decode(codes))))
        use = history[f"{layer.name}_usage"][-1]
        effective = history[f"{layer.name}_perplexity"][-1]
        results[name] = error, use
        print(name, f"{error:.4f}", f"{use:.2f}", f"{effective:.1f}", sep="\t")
    return results


if __name__ == "__main__":
    main()
