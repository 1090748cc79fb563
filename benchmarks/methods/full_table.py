"""The full table in small integers, trained as it is stored.

Rounded to the nearest number, a scale a row (8 bits: one); and as the package
stores it in few bits: in coordinates that are turned at random, the error of a
column handed to those after it.
"""

from benchmarks.methods.ours import Factors
from benchmarks.methods.rival import Rival

for _name in ("int8", "int4", "int2"):
    Rival(
        f"round to nearest, {_name}",
        fit=lambda table, weights, budget: {"table": table},
        rebuild=lambda arrays, shape: arrays["table"],
        quantization=_name,
        fixed_size=True,
    )
for _name in ("int4", "int2"):
    Factors(
        f"full table, {_name}",
        quantization=_name,
        fixed_size=True,
        activation=None,
    )
