"""The package, what it needs and its extras."""

from setuptools import find_packages, setup

# bert4keras 0.11.5 declares keras<=2.3.1, so it can stand in no requirement
# list: pip would find no solution. Install it with
# `pip install --no-deps bert4keras==0.11.5`.
examples = [
    "matplotlib>=3.8",
    "rich>=13",
    "scikit-learn>=1.4",
    "snownlp>=0.12.3",
]
bert4keras = ["safetensors>=0.4.3"]
test = [
    *examples,
    *bert4keras,
    "jax>=0.4.35",
    "keras-hub>=0.18",
    "pytest>=8",
    "scipy>=1.11",
    "tf_keras>=2.18",
]

setup(
    name="blogkeras",
    version="0.1.0",
    description="Methods of the blog Scientific Spaces, for Keras 3",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The blogkeras authors",
    keywords=(
        "keras bert bert4keras adversarial-training vq-vae hsic word-mover "
        "electra albert nvae score-matching energy-based-models"
    ),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_data={"blogkeras": ["py.typed"]},
    packages=find_packages(include=["blogkeras", "blogkeras.*"]),
    python_requires=">=3.11",
    install_requires=[
        "keras>=3.12",
        "numpy>=1.26",
        "pot>=0.9.4",
        "tensorflow>=2.18",
    ],
    extras_require={
        "bert4keras": bert4keras,
        "examples": examples,
        "test": test,
        "bench": test,
    },
)
