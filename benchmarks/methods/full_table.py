"""The full table, trained as it is stored: in floats, or in small integers.

These are rounded to the nearest number, a scale a row (8 bits: one); or as the
package stores them in few bits: in coordinates that are turned at random, the
error of a column handed to those after it.
"""

from benchmarks.methods.ours import Factors
from benchmarks.methods.rival import Rival

for _name in (None, "int8", "int4", "int2"):
    Rival(
        f"round to nearest, {_name}" if _name else "full table, float32",
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
