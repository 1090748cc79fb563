"""Factorise an embedding table: `E ~ f(U) W`.

What does not train is NumPy, in float64 and one chunk of rows at a time, so
that a memory-mapped table never has to fit in memory. What trains is Keras.
"""

from keras_distilled_embedding.factorization.factors import Factorization
from keras_distilled_embedding.factorization.factors import factorize
from keras_distilled_embedding.factorization.ranks import rank_for_compression
from keras_distilled_embedding.factorization.ranks import validate_rank
from keras_distilled_embedding.factorization.table import check_finite_rows

__all__ = [
    "Factorization",
    "check_finite_rows",
    "factorize",
    "rank_for_compression",
    "validate_rank",
]
