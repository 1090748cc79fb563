"""Factorize an embedding table: `E ~ f(U) W + 1 c`.

What does not train is NumPy, one block of rows at a time, so that a
memory-mapped table never has to fit in memory. What trains is Keras.
"""

from keras_distilled_embedding.factorization.activations import get_activation
from keras_distilled_embedding.factorization.activations import is_linear
from keras_distilled_embedding.factorization.activations import is_relu
from keras_distilled_embedding.factorization.closed_form import Factors
from keras_distilled_embedding.factorization.factors import Factorization
from keras_distilled_embedding.factorization.factors import check_method
from keras_distilled_embedding.factorization.factors import factorize
from keras_distilled_embedding.factorization.factors import factorize_table
from keras_distilled_embedding.factorization.rounding import can_round
from keras_distilled_embedding.factorization.rounding import expected_error
from keras_distilled_embedding.factorization.rounding import round_features
from keras_distilled_embedding.factorization.rounding import rounded_factors
from keras_distilled_embedding.factorization.spectrum import Spectrum
from keras_distilled_embedding.factorization.spectrum import spectrum_of
from keras_distilled_embedding.factorization.table import Table
from keras_distilled_embedding.factorization.table import check_finite_rows
from keras_distilled_embedding.factorization.table import lost_energy

__all__ = [
    "Factorization",
    "Factors",
    "Spectrum",
    "Table",
    "can_round",
    "check_finite_rows",
    "check_method",
    "expected_error",
    "factorize",
    "factorize_table",
    "get_activation",
    "is_linear",
    "is_relu",
    "lost_energy",
    "round_features",
    "rounded_factors",
    "spectrum_of",
]
