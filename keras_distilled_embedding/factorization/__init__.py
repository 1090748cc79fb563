"""Factorise an embedding table: `E ~ f(U) W`.

What does not train is NumPy, one block of rows at a time, so that a
memory-mapped table never has to fit in memory. What trains is Keras.
"""

from keras_distilled_embedding.factorization.activations import is_lifted
from keras_distilled_embedding.factorization.factors import Factorization
from keras_distilled_embedding.factorization.factors import factorize
from keras_distilled_embedding.factorization.ranks import allocate_ranks
from keras_distilled_embedding.factorization.ranks import energy_shares
from keras_distilled_embedding.factorization.ranks import factor_bytes
from keras_distilled_embedding.factorization.ranks import largest_useful_rank
from keras_distilled_embedding.factorization.ranks import rank_for_compression
from keras_distilled_embedding.factorization.ranks import rank_for_error
from keras_distilled_embedding.factorization.ranks import rank_for_speedup
from keras_distilled_embedding.factorization.ranks import useful_ranks
from keras_distilled_embedding.factorization.ranks import validate_rank
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import as_metric
from keras_distilled_embedding.factorization.table import check_finite_rows

__all__ = [
    "Factorization",
    "Table",
    "allocate_ranks",
    "as_metric",
    "check_finite_rows",
    "energy_shares",
    "factor_bytes",
    "factorize",
    "is_lifted",
    "largest_useful_rank",
    "rank_for_compression",
    "rank_for_error",
    "rank_for_speedup",
    "useful_ranks",
    "validate_rank",
]
