"""The environment of a process on JAX.

Most of the tests' time on JAX is XLA's for programs that run once: it takes a
quarter as long if it optimizes little.
"""

JAX_SETTINGS = {
    "KERAS_BACKEND": "jax",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}
