"""The package, what it needs and its extras."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "blogkeras/__init__.py").read_text("utf-8")
)[1]
# Where the repository is published, such as "https://example.org/me/blogkeras".
# Links of README lead there from the package's description; while it is empty,
# the description has none of them.
REPOSITORY = ""

# bert4keras 0.11.5 declares keras<=2.3.1, so it can stand in no requirement
# list: pip would find no solution. Install it with
# `pip install --no-deps bert4keras==0.11.5`.
bert4keras = ["safetensors>=0.4.3"]  # weights in Hugging Face's files
jax = ["jax>=0.4.35"]
faiss = ["faiss-cpu>=1.9"]
examples = [
    *bert4keras,
    "matplotlib>=3.8",
    "rich>=13",
    "scikit-learn>=1.4",
    "snownlp>=0.12.3",
]
test = [
    *examples,
    *faiss,
    *jax,
    "hypothesis>=6.112,<7",
    "keras-hub>=0.18",
    "pytest>=8",
    "scipy>=1.11",
    "tf_keras>=2.18",
]
# Peers that run in the environment of the tests. `make bench` gives each of the
# others, which pin what we do not, an environment of its own.
bench = [*test, "dcor>=0.7", "gensim>=4.4", "ott-jax>=0.6"]
docs = [
    "jieba>=0.42",
    "mkdocs-material>=9.5,<10",
    "mkdocstrings[python]>=0.29",
]


def description(text, repository=REPOSITORY):
    """README with links that work outside of the repository.

    Args:
        text: README's text.
        repository: The address of the repository. Without one, what leads to a
            file of the repository is written as plain text, and figures are
            left out.
    """
    link = re.compile(r"(!?)\[([^]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")

    def outside(match):
        figure, label, path = match.groups()
        if not repository:
            return "" if figure else label
        kind = "raw" if figure else "blob"
        return f"{figure}[{label}]({repository}/{kind}/v{VERSION}/{path})"

    blocks = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    blocks[::2] = [link.sub(outside, block) for block in blocks[::2]]
    return "".join(blocks)


urls = {"Blog": "https://kexue.fm"}
if REPOSITORY:
    urls |= {
        "Source": REPOSITORY,
        "Changelog": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }

setup(
    name="blogkeras",
    version=VERSION,
    description="Methods of the blog Scientific Spaces, for Keras 3",
    long_description=description((ROOT / "README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="The blogkeras authors",
    url=REPOSITORY or urls["Blog"],
    project_urls=urls,
    keywords=(
        "keras bert bert4keras adversarial-training vq-vae fsq hsic "
        "word-mover-distance optimal-transport electra albert nvae "
        "bert-of-theseus score-matching energy-based-models"
    ),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Natural Language :: English",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
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
        "jax": jax,
        "faiss": faiss,
        "examples": examples,
        "test": test,
        "bench": bench,
        "docs": docs,
    },
)
