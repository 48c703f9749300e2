"""What XLA is told before Keras is imported.

Compiling the small programs of the tests takes longer than running them.
"""

import os
from importlib import metadata


def _at_least(package, *version):
    installed = metadata.version(package).split(".")
    return tuple(map(int, installed[: len(version)])) >= version


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
flags = [
    "--xla_force_host_platform_device_count=2",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# This one halves the time of JAX. XLA ends the process at a flag that it does
# not know, and the oldest versions that setup.py allows do not know it.
if (
    _at_least("jaxlib", 0, 6)
    if os.environ.get("KERAS_BACKEND") == "jax"
    else _at_least("tensorflow", 2, 21)
):
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(flags))
