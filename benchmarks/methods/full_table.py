"""The full table in small integers, trained as it is stored."""

from benchmarks.methods.rival import Rival
from keras_distilled_embedding.quantization import FORMATS

for name in FORMATS:
    Rival(
        f"{name} table",
        fit=lambda table, weights, budget: {"table": table},
        rebuild=lambda arrays, shape: arrays["table"],
        quantization=name,
        fixed_size=True,
    )
