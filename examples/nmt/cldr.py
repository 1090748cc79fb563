"""An English-German parallel corpus generated from the Unicode CLDR.

The Unicode Common Locale Data Repository holds the words and the patterns
with which people write names, dates, quantities and amounts of money in each
language. The `babel` library ships that data, so the corpus needs no download
and depends on nothing but the installed version of babel.

A phrase is a function of the locale: said once, written in both languages.

    Tuesday, March 5, 2024, 3:04 PM   Dienstag, 5. März 2024, 15:04
    Germany, Norway, and Chad         Deutschland, Norwegen und Tschad
    12.5 kilograms per week           12,5 Kilogramm pro Woche

The text is templated: a model must learn the dictionary of names and the
grammar of the patterns (order, plurals, clock, separators), not open-domain
translation. Scores on it are far above those on news text and must not be
compared with them.

References:
    - [Unicode CLDR](https://cldr.unicode.org)
    - [Babel](https://babel.pocoo.org)
"""

import collections
import datetime
import math
import random
import unicodedata
from collections.abc import Callable
from functools import cache
from functools import partial

try:
    from babel import Locale
    from babel import dates
    from babel import lists
    from babel import numbers
    from babel import units
except ImportError as error:
    raise ImportError(
        "The CLDR corpus requires `babel`. Install it with "
        '`pip install "keras-distilled-embedding[nmt]"`.'
    ) from error

Pair = tuple[str, str]
Phrase = Callable[..., str]  # Called as `phrase(locale=...)`.

MAX_PAIRS = 100_000
MAX_CHARACTERS = 200

ENGLISH = Locale("en")
GERMAN = Locale("de")

# The medium style is left out: "May 4, 2046" would then have two translations,
# "4. Mai 2046" and "04.05.2046". So are weeks, which each locale numbers its
# own way.
DAY_STYLES = ("full", "long")
DAY_SKELETONS = ("yMMMd", "yMMMEd", "GyMMMd", "GyMMMEd")
DATE_SKELETONS = ("MMMMd", "yMMMM", "yQQQQ")
TIME_STYLES = ("medium", "short")
INTERVAL_SKELETONS = ("MMMd", "MMMEd", "yMMMd", "yMMMEd", "yMMMM")
LIST_KINDS = ("territories", "languages", "currencies", "cities", "weekdays")
DURATION_UNITS = (
    "duration-year",
    "duration-month",
    "duration-week",
    "duration-day",
    "duration-hour",
    "duration-minute",
    "duration-second",
)
RATE_UNITS = DURATION_UNITS + (
    "mass-kilogram",
    "volume-liter",
    "length-kilometer",
    "area-square-meter",
)


def generate_pairs(seed: int = 0, num_pairs: int = 30_000) -> list[Pair]:
    """Generates distinct English-German pairs, in shuffled order.

    The pairs are one to one: no two share their source or their target, so
    the task is a function and any split of the list is free of leaks.

    Args:
        seed: Integer. The same seed gives the same pairs in every process.
        num_pairs: Integer in `[1, MAX_PAIRS]`, the number of pairs.

    Returns:
        A list of `num_pairs` tuples `(source, target)`.

    Raises:
        ValueError: If `num_pairs` is out of range.

    Example:

    >>> pairs = generate_pairs(seed=0, num_pairs=1_000)
    >>> train, validation, test = split_pairs(pairs, 100, 100)
    >>> len(train), len(validation), len(test)
    (800, 100, 100)
    """
    pairs = list(_categorized_pairs(seed, num_pairs))
    random.Random(seed).shuffle(pairs)
    return pairs


def category_counts(seed: int = 0, num_pairs: int = 30_000) -> dict[str, int]:
    """Counts the pairs of each category in `generate_pairs(seed, num_pairs)`.

    Args:
        seed: Integer, as in `generate_pairs`.
        num_pairs: Integer, as in `generate_pairs`.

    Returns:
        A dict from the names in `CATEGORIES` to numbers of pairs.
    """
    counts = collections.Counter(_categorized_pairs(seed, num_pairs).values())
    return {category: counts[category] for category in CATEGORIES}


def split_pairs(
    pairs: list[Pair], validation: int = 1_000, test: int = 1_000
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Splits pairs into training, validation and test pairs.

    Args:
        pairs: List of one-to-one pairs, as `generate_pairs` returns them.
        validation: Integer, the number of validation pairs.
        test: Integer, the number of test pairs.

    Returns:
        A tuple `(train, validation, test)` of lists that share no pair, no
        source sentence and no target sentence.

    Raises:
        ValueError: If a size is negative, if no training pairs are left, or
            if a sentence occurs twice.
    """
    for name, size in (("validation", validation), ("test", test)):
        if size < 0:
            raise ValueError(
                f"`{name}` must be zero or more pairs. Received: {name}={size}"
            )
    held_out = validation + test
    if held_out >= len(pairs):
        raise ValueError(
            "`validation` and `test` must leave at least one training pair: "
            f"their sum must be less than the {len(pairs)} pairs. "
            f"Received: validation={validation}, test={test}"
        )
    sources, targets = (set(side) for side in zip(*pairs, strict=True))
    if min(len(sources), len(targets)) < len(pairs):
        raise ValueError(
            "`pairs` must be one to one, so that no held-out sentence is "
            f"trained on. Received: {len(pairs)} pairs with {len(sources)} "
            f"distinct sources and {len(targets)} distinct targets. Pass the "
            "pairs of one call of `generate_pairs`."
        )
    return pairs[held_out:], pairs[:validation], pairs[validation:held_out]


def _categorized_pairs(seed: int, num_pairs: int) -> dict[Pair, str]:
    """Maps each generated pair to its category, in order of generation."""
    if not 1 <= num_pairs <= MAX_PAIRS:
        raise ValueError(
            f"`num_pairs` must be between 1 and {MAX_PAIRS}. "
            f"Received: num_pairs={num_pairs}"
        )
    rng = random.Random(seed)
    weights = [weight for weight, _ in CATEGORIES.values()]
    pairs, sources, targets = {}, set(), set()
    while len(pairs) < num_pairs:
        (category,) = rng.choices(list(CATEGORIES), weights)
        phrase = CATEGORIES[category][1](rng)
        source = _clean(phrase(locale=ENGLISH))
        target = _clean(phrase(locale=GERMAN))
        if source in sources or target in targets:
            continue
        if _is_translatable(source) and _is_translatable(target):
            pairs[source, target] = category
            sources.add(source)
            targets.add(target)
    return pairs


def _clean(text: str) -> str:
    """Drops invisible characters and makes every space a plain one."""
    visible = (c for c in text if unicodedata.category(c) != "Cf")
    return " ".join("".join(visible).split())


def _is_translatable(text: str) -> bool:
    """Tells words from bare numbers, and keeps sentences short."""
    return len(text) <= MAX_CHARACTERS and any(c.isalpha() for c in text)


# Vocabulary.


def _names(locale: Locale) -> dict[str, dict]:
    """Returns the names that the locale gives to the keys of each kind."""
    return {
        "territories": locale.territories,
        "languages": locale.languages,
        "scripts": locale.scripts,
        "variants": locale.variants,
        "currencies": locale.currencies,
        # A city that CLDR does not name is the last field of its zone.
        "cities": {
            zone: locale.time_zones.get(zone, {}).get("city")
            or zone.rpartition("/")[2].replace("_", " ")
            for zone in GERMAN.time_zones
        },
        "zones": {
            (zone, variant): name
            for zone, widths in locale.meta_zones.items()
            for variant, name in widths.get("long", {}).items()
        },
        "weekdays": locale.days["stand-alone"]["wide"],
        "months": locale.months["stand-alone"]["wide"],
        "quarters": locale.quarters["stand-alone"]["wide"],
        "eras": locale.eras["wide"],
    }


@cache
def _vocabulary() -> dict[str, list[Phrase]]:
    """Lists the names of each kind that both locales know.

    A later kind gives way to an earlier one where English has one word and
    German two: "Latin" is the language "Latein", not the script "Lateinisch".
    """
    english, german = _names(ENGLISH), _names(GERMAN)
    translations = {}
    vocabulary = {}
    for kind in english:
        vocabulary[kind] = []
        for key, source in english[kind].items():
            target = german[kind].get(key)
            if target and translations.setdefault(source, target) == target:
                names = {ENGLISH: source, GERMAN: target}
                vocabulary[kind].append(
                    lambda locale, names=names: names[locale]
                )
    return vocabulary


@cache
def _units() -> list[str]:
    """Lists the units with a pattern in both locales.

    Where a pattern is missing, babel prints the identifier of the unit.
    """
    return [
        unit
        for unit in ENGLISH.unit_display_names
        if unit in GERMAN.unit_display_names
        and unit not in units.format_unit(2, unit, locale=ENGLISH)
        and unit not in units.format_unit(2, unit, locale=GERMAN)
    ]


@cache
def _currencies() -> list[str]:
    """Lists the currencies in use.

    Withdrawn ones carry their years, and mostly lack a German plural.
    """
    return [
        currency
        for currency, name in ENGLISH.currencies.items()
        if currency in GERMAN.currencies and "(" not in name
    ]


# Random parts of phrases.


def _word(rng: random.Random, kind: str) -> Phrase:
    return rng.choice(_vocabulary()[kind])


def _number(rng: random.Random) -> float:
    small, decimal = rng.randint(1, 99), rng.randint(11, 999) / 10
    return rng.choice([small, small, decimal, 50 * rng.randint(2, 400)])


def _moment(rng: random.Random) -> datetime.datetime:
    century = 36_525 * 86_400
    return datetime.datetime(1950, 1, 1) + datetime.timedelta(
        seconds=rng.randrange(century)
    )


def _enumerate(rng: random.Random, phrases: list[Phrase]) -> Phrase:
    style = rng.choice(["standard", "or"])
    return lambda locale: lists.format_list(
        [phrase(locale=locale) for phrase in phrases], style, locale
    )


def _fill(pattern: str, *phrases: Phrase) -> Phrase:
    return lambda locale: pattern.format(
        *(phrase(locale=locale) for phrase in phrases)
    )


# Categories: each function draws one random phrase.


def _draw_name(rng: random.Random) -> Phrase:
    return rng.choice(
        [word for kind in _vocabulary().values() for word in kind]
    )


def _draw_list(rng: random.Random) -> Phrase:
    words = _vocabulary()[rng.choice(LIST_KINDS)]
    return _enumerate(rng, rng.sample(words, rng.randint(2, 5)))


def _draw_language_variety(rng: random.Random) -> Phrase:
    kinds = ("languages", "territories", "scripts")
    pattern = rng.choice(["{0} ({1})", "{0} ({2}, {1})"])
    return _fill(pattern, *(_word(rng, kind) for kind in kinds))


def _draw_day(rng: random.Random) -> Phrase:
    if rng.random() < 0.5:
        style = rng.choice(DAY_STYLES)
        return partial(dates.format_date, _moment(rng), style)
    skeleton = rng.choice(DAY_SKELETONS)
    return partial(dates.format_skeleton, skeleton, _moment(rng))


def _draw_date(rng: random.Random) -> Phrase:
    if rng.random() < 0.7:
        return _draw_day(rng)
    skeleton = rng.choice(DATE_SKELETONS)
    return partial(dates.format_skeleton, skeleton, _moment(rng))


def _draw_time(rng: random.Random) -> Phrase:
    moment = _moment(rng)
    if rng.random() < 0.2:  # "3:04 in the afternoon"
        return partial(dates.format_skeleton, "Bhm", moment)
    time = partial(dates.format_time, moment, rng.choice(TIME_STYLES))
    if rng.random() < 0.3:
        return time
    return _fill("{} {}", time, _word(rng, "zones"))


def _draw_datetime(rng: random.Random) -> Phrase:
    return _fill("{}, {}", _draw_day(rng), _draw_time(rng))


def _draw_interval(rng: random.Random) -> Phrase:
    start = _moment(rng)
    end = start + datetime.timedelta(days=rng.randint(1, 60))
    skeleton = rng.choice(INTERVAL_SKELETONS)
    return partial(dates.format_interval, start, end, skeleton)


def _draw_relative_time(rng: random.Random) -> Phrase:
    unit, seconds = rng.choice(dates.TIMEDELTA_UNITS)
    return partial(
        dates.format_timedelta,
        rng.choice([-1, 1]) * rng.randint(1, 400) * seconds,
        granularity=unit,
        threshold=math.inf,  # Keep the unit, however many there are of it.
        add_direction=True,
    )


def _draw_duration(rng: random.Random) -> Phrase:
    first = rng.randrange(len(DURATION_UNITS) - 1)
    chosen = DURATION_UNITS[first : first + rng.randint(2, 4)]
    return _enumerate(
        rng,
        [partial(units.format_unit, rng.randint(1, 59), x) for x in chosen],
    )


def _draw_quantity(rng: random.Random) -> Phrase:
    return partial(units.format_unit, _number(rng), rng.choice(_units()))


def _draw_quantities(rng: random.Random) -> Phrase:
    count = rng.randint(1, 3)
    return _enumerate(rng, [_draw_quantity(rng) for _ in range(count)])


def _draw_money(rng: random.Random) -> Phrase:
    return partial(
        numbers.format_currency,
        _number(rng),
        rng.choice(_currencies()),
        format="#,##0.##",  # "5 euros" and "1.5 euros", not "5.00 euros".
        currency_digits=False,
        format_type="name",
    )


def _draw_rate(rng: random.Random) -> Phrase:
    numerator = rng.choice([_draw_quantity, _draw_money])(rng)
    unit = rng.choice(RATE_UNITS)
    return lambda locale: units.format_compound_unit(
        numerator(locale=locale), denominator_unit=unit, locale=locale
    )


def _draw_compact_number(rng: random.Random) -> Phrase:
    return partial(
        numbers.format_compact_decimal,
        rng.randint(11, 9999) * 10 ** rng.choice([2, 5, 8, 11]),
        format_type="long",
        fraction_digits=1,
    )


# How often each category is drawn, in percent. The small ones end up a little
# rarer, because a phrase drawn twice is kept once.
CATEGORIES: dict[str, tuple[int, Callable[[random.Random], Phrase]]] = {
    "names": (7, _draw_name),
    "lists": (20, _draw_list),
    "language varieties": (9, _draw_language_variety),
    "dates": (8, _draw_date),
    "times": (6, _draw_time),
    "datetimes": (14, _draw_datetime),
    "intervals": (7, _draw_interval),
    "relative times": (4, _draw_relative_time),
    "durations": (6, _draw_duration),
    "quantities": (8, _draw_quantities),
    "money": (5, _draw_money),
    "rates": (4, _draw_rate),
    "compact numbers": (2, _draw_compact_number),
}
