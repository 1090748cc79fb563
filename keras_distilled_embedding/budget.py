"""How large the factors of each table are to be, and how they are stored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from collections.abc import Iterable
from typing import NamedTuple

from keras import ops

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding._weights import TableWeights
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import allocate_ranks
from keras_distilled_embedding.factorization import energy_shares
from keras_distilled_embedding.factorization import factor_bytes
from keras_distilled_embedding.factorization import is_lifted
from keras_distilled_embedding.factorization import largest_useful_rank
from keras_distilled_embedding.factorization import rank_for_compression
from keras_distilled_embedding.factorization import rank_for_error
from keras_distilled_embedding.factorization import rank_for_speedup
from keras_distilled_embedding.factorization import useful_ranks
from keras_distilled_embedding.factorization import validate_rank
from keras_distilled_embedding.factorization.closed_form import linear_factors
from keras_distilled_embedding.factorization.closed_form import relu_factors
from keras_distilled_embedding.factorization.ranks import check_speedup
from keras_distilled_embedding.factorization.table import lost_energy
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import round_in_place
from keras_distilled_embedding.report import dtype_bytes
from keras_distilled_embedding.targets import Target

AUTO = "auto"


class Plan(NamedTuple):
    """What is to become of the tables.

    Args:
        ranks: Of each table that is to be factorised.
        rounding: `"int8"`, `"int4"`, or `None` for floats; of all tables.
    """

    ranks: dict[Target, int]
    rounding: str | None


@dataclasses.dataclass(frozen=True)
class SizeRequest:
    """What is asked of all tables: arguments of `compress`, and as there."""

    compression: float | None
    rank: int | None = None
    max_bytes: int | None = None
    max_error: float | None = None
    quantization: str | None = None
    min_speedup: float | None = None
    activation: str | Callable | None = "relu"
    hidden_dim: int | None = None

    def __post_init__(self) -> None:
        names = ("rank", "max_bytes", "max_error")
        sizes = {name: getattr(self, name) for name in names}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        if len(sizes) > 1:
            raise ValueError(
                "Give at most one of `rank`, `max_bytes` and `max_error`. "
                f"Received: {sizes}"
            )
        if not sizes and self.compression is None:
            raise ValueError(
                "Give one of `compression`, `rank`, `max_bytes` and "
                "`max_error`. Received: compression=None and none of the others"
            )
        as_integer("max_bytes", self.max_bytes, or_none=True)
        as_integer("hidden_dim", self.hidden_dim, or_none=True)
        if self.quantization not in (None, *QUANTIZATIONS, AUTO):
            raise ValueError(
                "`quantization` must be None or one of "
                f"{(*QUANTIZATIONS, AUTO)}. "
                f"Received: quantization={self.quantization!r}"
            )
        if self.quantization == AUTO and self.max_bytes is None:
            raise ValueError(
                '`quantization="auto"` needs `max_bytes`, the budget that it '
                'chooses for: give one, or "int8" or "int4". Received: '
                f"quantization={self.quantization!r}, max_bytes=None"
            )
        if self.min_speedup is not None:
            check_speedup(self.min_speedup)
        for name in ("quantization", "min_speedup"):
            value = getattr(self, name)
            if value is not None and self.hidden_dim is not None:
                raise ValueError(
                    f"`{name}` must be None with `hidden_dim`, whose second "
                    "term is neither stored as integers nor cheaper than a "
                    f"table. Received: {name}={value!r}, "
                    f"hidden_dim={self.hidden_dim!r}"
                )

    @property
    def roundings(self) -> tuple[str | None, ...]:
        """Those to choose from."""
        if self.quantization == AUTO:
            return (None, *QUANTIZATIONS)
        return (self.quantization,)

    @property
    def is_lifted(self) -> bool:
        return is_lifted(self.activation)


def plan(
    targets: Iterable[Target],
    request: SizeRequest,
    weights: TableWeights,
    optional: bool,
) -> Plan:
    """Chooses the ranks of tables, and the rounding where that is open.

    Args:
        targets: The tables.
        request: What is asked of them.
        weights: Of their rows and columns.
        optional: Whether tables may be left out for which no rank will do,
            of a few rows, segments say. At least one has to remain.

    Raises:
        ValueError: If there is no such plan.
    """
    if request.max_bytes is None and request.max_error is None:
        return _plan_by_parameters(targets, request, optional)
    large_enough = [
        target
        for target in targets
        if largest_useful_rank(*_shape(target), request.hidden_dim)
    ]
    if not large_enough:
        raise ValueError(
            "No rank makes a table smaller. Received: tables of shapes "
            f"{[_shape(target) for target in targets]}"
        )
    if request.max_error is not None:
        return _plan_by_error(large_enough, request, weights, optional)
    return _plan_by_bytes(large_enough, request, weights, optional)


def _plan_by_parameters(
    targets: Iterable[Target], request: SizeRequest, optional: bool
) -> Plan:
    (rounding,) = request.roundings

    def rank_of(target: Target) -> int:
        sizes = (*_shape(target), request.hidden_dim)
        rank = request.rank
        if rank is None:
            rank = rank_for_compression(
                *sizes[:2], request.compression, request.hidden_dim
            )
        else:
            validate_rank(rank, *sizes)
        return _limited(rank, target, request, rounding)

    ranks = _for_each(targets, rank_of, optional)
    if request.rank is not None:
        for target, rank in ranks.items():
            if rank < request.rank:
                raise ValueError(
                    f"Layer '{target.name}': `rank` must be at most {rank} for "
                    f"`min_speedup`. Received: rank={request.rank}, "
                    f"min_speedup={request.min_speedup}"
                    + (f", quantization={rounding!r}" if rounding else "")
                )
    return Plan(ranks, rounding)


def _plan_by_error(
    targets: Iterable[Target],
    request: SizeRequest,
    weights: TableWeights,
    optional: bool,
) -> Plan:
    (rounding,) = request.roundings
    tables = weights.tables(targets)

    def rank_of(target: Target) -> int:
        rank = max(
            rank_for_error(table, request.max_error, request.is_lifted)
            for table in tables[target]
        )
        rank = _limited(rank, target, request, rounding)
        validate_rank(rank, *_shape(target), request.hidden_dim)
        return rank

    return Plan(_for_each(targets, rank_of, optional), rounding)


def _plan_by_bytes(
    targets: Iterable[Target],
    request: SizeRequest,
    weights: TableWeights,
    optional: bool,
) -> Plan:
    def largest_rank(target: Target, rounding: str | None) -> int:
        largest = largest_useful_rank(*_shape(target), request.hidden_dim)
        return _limited(largest, target, request, rounding)

    first, *others = request.roundings
    limits = {
        first: _for_each(targets, lambda t: largest_rank(t, first), optional)
    }
    chosen = list(limits[first])
    for rounding in others:
        # Whole blocks may be too slow for `min_speedup`: then that one is out.
        with contextlib.suppress(ValueError):
            limits[rounding] = {t: largest_rank(t, rounding) for t in chosen}
    tables = weights.tables(chosen)
    costs = {
        rounding: [
            _prices(target, len(tables[target]), largest, request, rounding)
            for target, largest in ranks.items()
        ]
        for rounding, ranks in limits.items()
    }
    smallest = {
        rounding: sum(min(prices.values()) for prices in of_all)
        for rounding, of_all in costs.items()
    }
    cheapest = min(smallest, key=smallest.get)
    if request.max_bytes < smallest[cheapest]:
        raise ValueError(
            "`max_bytes` is too small: the smallest factors of all tables take "
            f"{smallest[cheapest]} bytes as {cheapest or 'floats'}. "
            f"Received: max_bytes={request.max_bytes}"
        )
    shares = [energy_shares(tables[target]) for target in chosen]
    plans = []
    for rounding, prices in costs.items():
        if smallest[rounding] <= request.max_bytes:
            ranks = allocate_ranks(
                shares, prices, request.max_bytes, request.is_lifted
            )
            plans.append(Plan(dict(zip(chosen, ranks)), rounding))
    if len(plans) == 1:
        return plans[0]

    def loss(plan: Plan) -> float:
        return sum(
            expected_loss(table, rank, request.is_lifted, plan.quantization)
            for target, rank in plan.ranks.items()
            for table in tables[target]
        )

    return min(plans, key=loss)


def expected_loss(
    table: Table, rank: int, lifted: bool, rounding: str | None
) -> float:
    """The share of a table's energy that rounded factors lose.

    Measured with the closed form, which costs about one pass over the table;
    the sweeps that `factorize` adds to it gain little, at all ranks.

    Args:
        table: The table.
        rank: Integer.
        lifted: Whether the form is ReLU's, or the plain one.
        rounding: `"int8"`, `"int4"`, or `None` for floats.
    """
    if lifted:
        codes, basis, lost = relu_factors(table, rank, sweeps=0)
    else:
        codes, basis, lost = linear_factors(table, rank)
    if rounding is None:
        return lost.relative
    codes = ops.convert_to_numpy(round_in_place(codes, basis, rounding))
    return lost_energy(table, lambda rows: codes[rows] @ basis).relative


def _for_each(
    targets: Iterable[Target],
    rank_of: Callable[[Target], int],
    optional: bool,
) -> dict[Target, int]:
    """A rank for each table, but for those that none is right for.

    Raises:
        ValueError: If none is right for any, or for one that is not
            `optional`.
    """
    ranks, refused = {}, None
    for target in targets:
        try:
            ranks[target] = rank_of(target)
        except ValueError as error:
            refused = ValueError(f"Layer '{target.name}': {error}")
            if not optional:
                raise refused from error
    if not ranks:
        raise refused
    return ranks


def _limited(
    rank: int, target: Target, request: SizeRequest, rounding: str | None
) -> int:
    """The rank, or what `min_speedup` allows at most.

    Raises:
        ValueError: If it allows none.
    """
    if request.min_speedup is None:
        return rank
    fast_enough = rank_for_speedup(
        *_shape(target), request.min_speedup, rounding
    )
    return min(rank, fast_enough)


def _prices(
    target: Target,
    num_tables: int,
    largest: int,
    request: SizeRequest,
    rounding: str | None,
) -> dict[int, int]:
    """Bytes by rank; those of floats in the layer's own dtype."""
    itemsize = dtype_bytes(target.variable_dtype)
    return {
        rank: num_tables
        * factor_bytes(
            rank, *_shape(target), rounding, request.hidden_dim, itemsize
        )
        for rank in useful_ranks(largest, rounding)
    }


def _shape(target: Target) -> tuple[int, int]:
    return target.input_dim, target.output_dim
