"""Tests of the English-German corpus generated from the Unicode CLDR."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Importing the module raises ImportError where babel is missing.
cldr = pytest.importorskip("examples.nmt.cldr", exc_type=ImportError)

ROOT = Path(__file__).parents[1]

NAMES = {
    "Germany": "Deutschland",
    "Austria": "Österreich",
    "Norway": "Norwegen",
    "South Korea": "Südkorea",
    "Europe": "Europa",
    "French": "Französisch",
    "Swedish": "Schwedisch",
    "Japanese": "Japanisch",
    "Latin": "Latein",  # The language, although there is a script too.
    "Cyrillic": "Kyrillisch",
    "Swiss Franc": "Schweizer Franken",
    "Japanese Yen": "Japanischer Yen",
    "Vienna": "Wien",
    "Warsaw": "Warschau",
    "Central European Summer Time": "Mitteleuropäische Sommerzeit",
    "Wednesday": "Mittwoch",
    "March": "März",
    "3rd quarter": "3. Quartal",
}
MONTHS = {
    "January": "Januar",
    "February": "Februar",
    "March": "März",
    "April": "April",
    "May": "Mai",
    "June": "Juni",
    "July": "Juli",
    "August": "August",
    "September": "September",
    "October": "Oktober",
    "November": "November",
    "December": "Dezember",
}
WEEKDAYS = {
    "Monday": "Montag",
    "Tuesday": "Dienstag",
    "Wednesday": "Mittwoch",
    "Thursday": "Donnerstag",
    "Friday": "Freitag",
    "Saturday": "Samstag",
    "Sunday": "Sonntag",
}


def comma(number):
    """Writes an English number the German way."""
    return number.translate(str.maketrans(".,", ",."))


def twenty_four_hours(hour, minutes, half):
    return f"{int(hour) % 12 + 12 * (half == 'PM'):02}:{minutes}"


# An English pattern, and its German translation by hand.
RULES = [
    (r"in (\d+) days", lambda n: f"in {n} Tagen"),
    (r"(\d+) days ago", lambda n: f"vor {n} Tagen"),
    (r"in (\d+) hours", lambda n: f"in {n} Stunden"),
    (r"([\d,.]+) hours", lambda n: f"{comma(n)} Stunden"),
    (r"([\d,.]+) million", lambda n: f"{comma(n)} Millionen"),
    (r"([\d,.]+) US dollars", lambda n: f"{comma(n)} US-Dollar"),
    (
        r"([\d,.]+) kilometers per (day|week)",
        lambda n, unit: (
            f"{comma(n)} Kilometer pro {'Tag' if unit == 'day' else 'Woche'}"
        ),
    ),
    (
        r"(\d+) minutes and (\d+) seconds",
        lambda m, s: f"{m} Minuten und {s} Sekunden",
    ),
    (
        r"(\w+day), (\w+) (\d+), (\d{4})",
        lambda w, m, d, y: f"{WEEKDAYS[w]}, {d}. {MONTHS[m]} {y}",
    ),
    (
        rf"({'|'.join(MONTHS)}) (\d+), (\d{{4}}), (\d+):([\d:]+) (AM|PM)",
        lambda m, d, y, *time: (
            f"{d}. {MONTHS[m]} {y}, {twenty_four_hours(*time)}"
        ),
    ),
    (
        r"(\w+day), (\w+day), or (\w+day)",
        lambda a, b, c: f"{WEEKDAYS[a]}, {WEEKDAYS[b]} oder {WEEKDAYS[c]}",
    ),
]


@pytest.fixture(scope="module")
def pairs():
    return cldr.generate_pairs(seed=0)


def test_pairs_are_distinct_and_one_to_one(pairs):
    sources, targets = zip(*pairs)
    assert len(pairs) == 30_000
    assert len(set(sources)) == len(set(targets)) == 30_000


def test_the_seed_decides_the_pairs(pairs):
    assert cldr.generate_pairs(0, 500) == cldr.generate_pairs(0, 500)
    ours, others = (set(cldr.generate_pairs(seed, 500)) for seed in (0, 1))
    assert len(ours & others) < 100


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_every_process_generates_the_same_pairs(hash_seed):
    code = (
        "from examples.nmt.cldr import generate_pairs;"
        "print(ascii(generate_pairs(3, 500)))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "LANG": "de_DE"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == ascii(cldr.generate_pairs(3, 500))


def test_names_are_translated(pairs):
    translations = dict(pairs)
    found = {
        name: translations.get(name, german) for name, german in NAMES.items()
    }
    assert found == NAMES
    assert sum(name in translations for name in NAMES) >= len(NAMES) // 3


@pytest.mark.parametrize("pattern, translate", RULES)
def test_patterns_are_translated(pairs, pattern, translate):
    matches = [(re.fullmatch(pattern, s), target) for s, target in pairs]
    matches = [(match, target) for match, target in matches if match]
    assert matches
    for match, target in matches:
        assert target == translate(*match.groups())


def test_one_english_word_has_one_translation(pairs):
    # CLDR calls the language "Latein" and the script "Lateinisch".
    assert not any("(Latin, " in english for english, _ in pairs)
    # The long and the medium style of a date differ in German only.
    assert all(" Mai" in de for en, de in pairs if re.match(r"May \d+, ", en))


def test_relative_times_keep_their_unit(pairs):
    seconds = [re.fullmatch(r"in (\d+) seconds", en) for en, _ in pairs]
    assert max(int(match[1]) for match in seconds if match) > 60


def test_long_sentences_are_left_out(monkeypatch):
    monkeypatch.setattr(cldr, "MAX_CHARACTERS", 30)
    pairs = cldr.generate_pairs(0, 500)
    assert max(len(text) for pair in pairs for text in pair) == 30


def test_the_translations_are_not_copies(pairs):
    # Names such as "Angola" are the same in both languages.
    assert sum(source == target for source, target in pairs) < 0.05 * len(pairs)


def test_sentences_are_clean(pairs):
    for text in (text for pair in pairs for text in pair):
        assert text == text.strip()
        assert 0 < len(text) <= 200
        # No-break, thin and narrow spaces, soft hyphens, bidi marks, newlines.
        assert not re.search(
            r"  |[\n\t\u00a0\u00ad\u2000-\u200f\u202a-\u202f\u2060-\u206f]",
            text,
        )
        assert re.search(r"[^\W\d_]", text)


def test_no_identifier_stands_for_a_missing_pattern(pairs):
    # Babel knows the unit "acceleration-g-force", but no German pattern.
    for pair in pairs:
        assert not re.search(r"acceleration-|speed-|pressure-", " ".join(pair))


def test_no_category_dominates():
    counts = cldr.category_counts(seed=0)
    assert set(counts) == set(cldr.CATEGORIES)
    assert sum(counts.values()) == 30_000
    assert max(counts.values()) < 0.25 * 30_000
    assert min(counts.values()) > 0.01 * 30_000


def test_splits_are_disjoint(pairs):
    train, validation, test = cldr.split_pairs(pairs)
    assert (len(validation), len(test)) == (1_000, 1_000)
    assert sorted(train + validation + test) == sorted(pairs)
    for side in (0, 1):
        seen, tuned, held_out = (
            {pair[side] for pair in split}
            for split in (train, validation, test)
        )
        assert not (seen & tuned or seen & held_out or tuned & held_out)


def test_the_splits_have_the_same_mix():
    pairs = cldr.generate_pairs(0, 10_000)
    train, _, test = cldr.split_pairs(pairs, 0, 5_000)
    for word in (" and ", "(", "2", "Time"):
        in_train, in_test = (
            sum(word in source for source, _ in split)
            for split in (train, test)
        )
        assert in_train == pytest.approx(in_test, rel=0.2)


@pytest.mark.parametrize("num_pairs", [0, -1, cldr.MAX_PAIRS + 1])
def test_num_pairs_out_of_range(num_pairs):
    with pytest.raises(
        ValueError,
        match=f"between 1 and 100000.* Received: num_pairs={num_pairs}",
    ):
        cldr.generate_pairs(num_pairs=num_pairs)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_negative_split(name):
    sizes = {"validation": 1, "test": 1, name: -1}
    with pytest.raises(ValueError, match=f"zero or more.*Received: {name}=-1"):
        cldr.split_pairs(cldr.generate_pairs(0, 10), **sizes)


def test_split_that_leaves_no_training_pair():
    pairs = cldr.generate_pairs(0, 10)
    assert len(cldr.split_pairs(pairs, 4, 5)[0]) == 1
    with pytest.raises(
        ValueError, match="less than the 10 .* Received: validation=5, test=5"
    ):
        cldr.split_pairs(pairs, 5, 5)


@pytest.mark.parametrize("twin", [("one", "zwei"), ("two", "eins")])
def test_split_of_repeated_sentences(twin):
    with pytest.raises(ValueError, match="one to one.* Received: 3 pairs"):
        cldr.split_pairs([("one", "eins"), ("three", "drei"), twin], 1, 1)


def test_missing_babel_names_the_extra():
    code = "import sys; sys.modules['babel'] = None; import examples.nmt.cldr"
    error = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert "ImportError" in error
    assert 'pip install "keras-distilled-embedding[nmt]"' in error
