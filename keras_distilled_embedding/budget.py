"""How large the factors of each table are to be, and how they are stored."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import numpy as np

from keras_distilled_embedding._utils.arguments import as_integer
from keras_distilled_embedding.factorization import Spectrum
from keras_distilled_embedding.factorization import Table
from keras_distilled_embedding.factorization import can_round
from keras_distilled_embedding.factorization import expected_error
from keras_distilled_embedding.factorization import get_activation
from keras_distilled_embedding.factorization import is_linear
from keras_distilled_embedding.factorization import spectrum_of
from keras_distilled_embedding.quantization import QUANTIZATIONS
from keras_distilled_embedding.quantization import Format
from keras_distilled_embedding.quantization import formats_of
from keras_distilled_embedding.quantization import name_of
from keras_distilled_embedding.sizes import check_compression
from keras_distilled_embedding.sizes import check_rank
from keras_distilled_embedding.sizes import check_speedup
from keras_distilled_embedding.sizes import factor_bytes
from keras_distilled_embedding.sizes import largest_rank
from keras_distilled_embedding.sizes import rank_for_compression
from keras_distilled_embedding.sizes import rank_for_products
from keras_distilled_embedding.sizes import rank_for_speedup
from keras_distilled_embedding.sizes import table_bytes
from keras_distilled_embedding.targets import Target

AUTO = "auto"
DEFAULT_COMPRESSION = 8.0
# What a planned projection may multiply more than with the table.
MORE_PRODUCTS = 1.05

Tables = Mapping[Target, Sequence[Table]]


class Plan(NamedTuple):
    """What is to become of the tables.

    Args:
        ranks: The rank of each table that is to be factorized.
        kind: The storage format of all tables, or `None` for floats.
        reason: Why this plan, in one line.
    """

    ranks: dict[Target, int]
    kind: Format | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SizeRequest:
    """Checked size options of `compress`, which documents them."""

    compression: float | None = None
    rank: int | None = None
    max_bytes: int | None = None
    max_error: float | None = None
    min_speedup: float | None = None
    quantization: str | None = AUTO
    activation: str | Callable | None = "relu"
    use_bias: bool = True

    def __post_init__(self) -> None:
        names = ("compression", "rank", "max_bytes", "max_error")
        given = {name: getattr(self, name) for name in names}
        given = {name: size for name, size in given.items() if size is not None}
        if len(given) > 1:
            raise ValueError(
                "Give at most one of `compression`, `rank`, `max_bytes` and "
                "`max_error`. Received: "
                + ", ".join(f"{name}={size}" for name, size in given.items())
            )
        if not given:
            object.__setattr__(self, "compression", DEFAULT_COMPRESSION)
        else:
            ((name, size),) = given.items()
            _SIZE_CHECKS[name](size)
        if self.min_speedup is not None:
            check_speedup(self.min_speedup)
        if self.quantization not in (None, AUTO, *QUANTIZATIONS):
            raise ValueError(
                "`quantization` must be None or one of "
                f"{(AUTO, *QUANTIZATIONS)}. "
                f"Received: quantization={self.quantization!r}"
            )
        get_activation(self.activation)

    @property
    def candidates(self) -> list[Format | None]:
        """The storage formats to choose from.

        With a rank alone nothing is saved by rounding, so floats stay.
        """
        if self.quantization is None:
            return [None]
        if self.quantization == AUTO and self.rank is not None:
            return [None]
        names = (
            QUANTIZATIONS if self.quantization == AUTO else (self.quantization,)
        )
        floats = [None] if self.quantization == AUTO else []
        return floats + [
            kind
            for name in names
            for kind in formats_of(name)
            if can_round(kind, self.uses_relu, self.use_bias)
        ]

    @property
    def uses_relu(self) -> bool:
        """Whether there is an activation: those without a closed form, too."""
        return not is_linear(get_activation(self.activation))

    def components(self, rank: int) -> int:
        """How many principal components the factors of a rank hold."""
        return rank - (self.uses_relu and not self.use_bias)


def _check_max_error(max_error: Any) -> None:
    is_number = isinstance(max_error, numbers.Real)
    if not is_number or not 0 < max_error < 1:
        raise ValueError(
            "`max_error` must be a number between 0 and 1, a share of the "
            f"table's energy. Received: max_error={max_error!r}"
        )


_SIZE_CHECKS: dict[str, Callable[[Any], object]] = {
    "compression": check_compression,
    "rank": lambda rank: as_integer("rank", rank),
    "max_bytes": lambda max_bytes: as_integer("max_bytes", max_bytes),
    "max_error": _check_max_error,
}


def plan(tables: Tables, request: SizeRequest, optional: bool) -> Plan:
    """Chooses the ranks of tables, and the storage format where that is open.

    Where it is open, a plan is made for each format. With `max_error` the
    smallest is taken, otherwise the one that is expected to lose least.

    Args:
        tables: The weighted tables of each target.
        request: What is asked of them.
        optional: Whether tables may be left out for which no rank will do,
            such as those of a few rows. At least one has to remain.

    Raises:
        ValueError: If there is no such plan.
    """
    planner = _Planner(tables, request, optional)
    plans, refusals = [], []
    for kind in request.candidates:
        try:
            plans.append(Plan(planner.ranks(kind), kind))
        except ValueError as error:
            refusals.append((factor_bytes(1, 1000, 1, kind), error))
    if not plans:
        # Of the format that reaches furthest.
        raise min(refusals, key=lambda refusal: refusal[0])[1]
    plans = [p for p in plans if not planner.is_too_slow(p.kind)] or plans
    most = max(len(found.ranks) for found in plans)
    plans = [found for found in plans if len(found.ranks) == most]
    if request.max_error is not None and len(plans) > 1:
        plans = [min(plans, key=planner.bytes_of)]
    return planner.least_loss(plans)


def expected_loss(tables: Tables, request: SizeRequest, found: Plan) -> float:
    """The share of the energy that a plan is expected to lose.

    The mean of the tables', as `plan` compares it.

    Args:
        tables: As of `plan`.
        request: As of `plan`.
        found: What `plan` returned.
    """
    planner = _Planner(tables, request, optional=True)
    count = sum(target.num_tables for target in found.ranks)
    return float(planner.loss(found, rounded=True) / count)


def knows_logits(tables: Tables) -> bool:
    """Whether losses are of the logits' energy, or of the tables' own."""
    return any(
        table.metric is not None
        for of_target in tables.values()
        for table in of_target
    )


class _Planner:
    """Plans the ranks of several tables for one storage format at a time."""

    def __init__(
        self, tables: Tables, request: SizeRequest, optional: bool
    ) -> None:
        self._tables = tables
        self._request = request
        self._optional = optional

    def ranks(self, kind: Format | None) -> dict[Target, int]:
        """The rank of each table that can be factorized as requested.

        Raises:
            ValueError: If none can be, or one that is not optional.
        """
        if self._request.max_bytes is not None:
            return self._ranks_for_bytes(kind, self._request.max_bytes)
        if self._request.rank is not None:
            rank_of = self._requested_rank
        elif self._request.max_error is not None:
            rank_of = self._rank_for_error
        else:
            rank_of = self._rank_for_compression
        return self._for_each(lambda target: rank_of(target, kind))

    def is_too_slow(self, kind: Format | None) -> bool:
        """Whether a projection would not be fast, whatever it multiplies."""
        if self._request.min_speedup is None or kind is None:
            return False
        is_felt = any(target.projects for target in self._tables)
        return is_felt and not kind.is_delegated

    def bytes_of(self, plan: Plan) -> int:
        """Bytes of the factors of all tables."""
        return sum(
            self._bytes(target, rank, plan.kind)
            for target, rank in plan.ranks.items()
        )

    def least_loss(self, plans: list[Plan]) -> Plan:
        """The plan that is expected to lose the least of the tables' energy.

        Rounding only adds to what a rank loses: plans that lose more by their
        ranks alone are not tried.
        """
        if len(plans) == 1:
            return plans[0]
        bounds = [self.loss(plan, rounded=False) for plan in plans]
        losses: dict[str, float] = {}
        best, least = plans[0], np.inf
        for index in np.argsort(bounds, kind="stable"):
            plan, loss = plans[index], bounds[index]
            if loss < least and plan.kind is not None:
                loss = self.loss(plan, rounded=True)
            name = name_of(plan.kind)
            losses[name] = min(loss, losses.get(name, np.inf))
            if loss < least:
                best, least = plan, loss
        if len(losses) == 1:
            return best
        return best._replace(reason=self._reason(best, losses))

    def _reason(self, best: Plan, losses: Mapping[str, float]) -> str:
        """Why this plan, in one line."""
        count = sum(target.num_tables for target in best.ranks)
        chosen = name_of(best.kind)
        ranks = ", ".join(map(str, best.ranks.values()))
        others = ", ".join(
            f"{name} {loss / count:.2g}"
            for name, loss in sorted(losses.items(), key=lambda item: item[1])
            if name != chosen
        )
        of_what = "logits'" if knows_logits(self._tables) else "tables'"
        return (
            f"{chosen} at rank {ranks} is expected to lose "
            f"{losses[chosen] / count:.2g} of the {of_what} energy; at the "
            f"same size, others lose at least: {others}"
        )

    def loss(self, plan: Plan, rounded: bool) -> float:
        """What a plan loses, the sum of the shares of all tables.

        Args:
            plan: The plan.
            rounded: Whether rounding is counted, too.
        """
        return sum(
            self._expected_loss(table, rank, plan.kind)
            if rounded
            else self._spectrum(table).error(self._request.components(rank))
            for target, rank in plan.ranks.items()
            for table in self._tables[target]
        )

    def _expected_loss(
        self, table: Table, rank: int, kind: Format | None
    ) -> float:
        """The share of the energy that the factors are expected to lose."""
        if kind is None:
            spectrum = self._spectrum(table)
            return spectrum.error(self._request.components(rank))
        request = self._request
        return expected_error(
            table, rank, kind, request.uses_relu, request.use_bias
        )

    def _requested_rank(self, target: Target, kind: Format | None) -> int:
        rank = check_rank(
            self._request.rank,
            *target.shape,
            kind,
            self._request.use_bias,
        )
        fast = self._fast_rank(rank, target, kind)
        if fast < rank:
            raise ValueError(
                f"`rank` must be at most {fast} for `min_speedup`. Received: "
                f"rank={rank}, min_speedup={self._request.min_speedup}, "
                f"quantization={kind and kind.name!r}"
            )
        return rank

    def _rank_for_compression(self, target: Target, kind: Format | None) -> int:
        rank = rank_for_compression(
            *target.shape,
            self._request.compression or DEFAULT_COMPRESSION,
            kind,
            self._request.use_bias,
        )
        return self._worthwhile_rank(rank, target, kind)

    def _rank_for_error(self, target: Target, kind: Format | None) -> int:
        """The smallest rank that loses no more, rounding included."""
        limit = self._useful_rank(target, kind)
        max_error = self._request.max_error or 0.0
        rank = max(
            _rank_for_error(table, self._request)
            for table in self._tables[target]
        )

        def loses_more(rank: int) -> bool:
            return kind is not None and any(
                self._expected_loss(table, rank, kind) > max_error
                for table in self._tables[target]
            )

        while rank <= limit and loses_more(rank):
            further = rank + max(1, rank // 16)
            rank = limit if rank < limit < further else further
        if rank > limit:
            raise ValueError(
                "`max_error` is too small: factors that lose so little in "
                f"{name_of(kind)} are no smaller than the table, "
                f"of shape {target.shape}. "
                f"Received: max_error={max_error}"
            )
        return self._fast_rank(rank, target, kind)

    def _ranks_for_bytes(
        self, kind: Format | None, max_bytes: int
    ) -> dict[Target, int]:
        limits = self._for_each(
            lambda target: self._worthwhile_rank(
                self._useful_rank(target, kind), target, kind
            )
        )
        prices = [
            self._prices(target, limit, kind)
            for target, limit in limits.items()
        ]
        shares = [
            np.sum(
                [self._spectrum(t).shares for t in self._tables[target]], axis=0
            )
            for target in limits
        ]
        skipped = 1 - self._request.components(1)
        ranks = allocate_ranks(shares, prices, max_bytes, skipped)
        return dict(zip(limits, ranks))

    def _prices(
        self, target: Target, limit: int, kind: Format | None
    ) -> dict[int, int]:
        """Bytes of the ranks that no larger one undercuts, ascending."""
        prices: dict[int, int] = {}
        least = self._bytes(target, limit, kind) + 1
        for rank in range(limit, 0, -1):
            price = self._bytes(target, rank, kind)
            if price < least:
                prices[rank] = least = price
        return dict(reversed(prices.items()))

    def _useful_rank(self, target: Target, kind: Format | None) -> int:
        """The largest rank whose factors are smaller than the table.

        Raises:
            ValueError: If there is none.
        """
        rank = largest_rank(
            *target.shape,
            table_bytes(*target.shape) - 1,
            kind,
            self._request.use_bias,
        )
        if rank == 0:
            raise ValueError(
                f"No rank makes a table of shape {target.shape} smaller: "
                "leave it as it is"
            )
        return rank

    def _fast_rank(self, rank: int, target: Target, kind: Format | None) -> int:
        """The rank, or what `min_speedup` allows at most."""
        if self._request.min_speedup is None:
            return rank
        fast = rank_for_speedup(*target.shape, self._request.min_speedup, kind)
        return min(rank, fast)

    def _worthwhile_rank(
        self, rank: int, target: Target, kind: Format | None
    ) -> int:
        """The same, and no more than leaves the projection as cheap as it was.

        Few bits leave room for all columns of a table. Of one with few rows
        the basis then takes a large part of bytes and multiplications.
        """
        cheap = rank_for_products(*target.shape, MORE_PRODUCTS, kind)
        return min(self._fast_rank(rank, target, kind), max(1, cheap))

    def _bytes(self, target: Target, rank: int, kind: Format | None) -> int:
        return target.num_tables * factor_bytes(
            rank, *target.shape, kind, self._request.use_bias
        )

    def _spectrum(self, table: Table) -> Spectrum:
        centered = self._request.use_bias or self._request.uses_relu
        return spectrum_of(table, 1, centered)

    def _for_each(self, rank_of: Callable[[Target], int]) -> dict[Target, int]:
        """A rank for each table, except those that none is right for.

        Raises:
            ValueError: If none is right for any, or for one that is not
                optional.
        """
        ranks: dict[Target, int] = {}
        refused: ValueError | None = None
        for target in self._tables:
            try:
                ranks[target] = rank_of(target)
            except ValueError as error:
                refused = ValueError(f"Layer '{target.name}': {error}")
                if not self._optional:
                    raise refused from error
        if not ranks:
            assert refused is not None
            raise refused
        return ranks


def allocate_ranks(
    shares: Sequence[np.ndarray],
    prices: Sequence[Mapping[int, int]],
    budget: int,
    skipped: int = 0,
) -> list[int]:
    """Spends a budget on several tables, where it helps most.

    Every step to a larger rank is taken by the table that loses the largest
    further share of its (weighted) energy for its cost: at the end the
    marginal gains of all tables are equal, and the sum of their relative
    errors is the least for the budget, up to a last step that does not fit.

    Args:
        shares: For each table, what each further component keeps of its
            energy, descending.
        prices: For each table the ranks to choose from, ascending, and what
            each costs; every step costs as much.
        budget: For all tables together.
        skipped: How many columns of codes hold no component.

    Returns:
        A rank for each table.

    Raises:
        ValueError: If not even the smallest ranks fit.
    """
    ranks = [list(of_table) for of_table in prices]
    spent, offers = 0, []
    for index, (energies, of_table) in enumerate(zip(shares, prices)):
        spent += of_table[ranks[index][0]]
        for smaller, larger in itertools.pairwise(of_table):
            cost = of_table[larger] - of_table[smaller]
            gain = energies[smaller - skipped : larger - skipped].sum()
            offers.append((gain / cost if cost else np.inf, index, cost))
    if spent > budget:
        raise ValueError(
            "`max_bytes` is too small: the smallest factors of all tables "
            f"take {spent} bytes. Received: max_bytes={budget}"
        )
    taken = [0] * len(ranks)
    # Of one table the gains fall, so its steps are bought in their order.
    for _, index, cost in sorted(offers, key=lambda offer: -offer[0]):
        if spent + cost <= budget:
            taken[index] += 1
            spent += cost
    return [options[step] for options, step in zip(ranks, taken)]


def _rank_for_error(table: Table, request: SizeRequest) -> int:
    """The smallest rank whose exact float factors lose no more."""

    def smallest(spectrum: Spectrum) -> int:
        errors = [spectrum.error(r) for r in range(len(spectrum.energies))]
        return int(np.argmax(np.array([*errors, 0.0]) <= request.max_error))

    centered = request.use_bias or request.uses_relu
    components = smallest(spectrum_of(table, smallest, centered))
    return max(1, components + 1 - request.components(1))
