"""The translation example: data, model, training, search, main job."""

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_distilled_embedding as kde
from examples.nmt import __main__ as command
from examples.nmt import data
from examples.nmt import evaluate
from examples.nmt import pipeline
from examples.nmt import train
from examples.nmt import translate
from examples.nmt.model import build_transformer
from examples.nmt.model import decoder
from examples.nmt.model import encoder
from tests.translators import add_noise

pytestmark = [
    # TensorFlow's converter, when it reads a SavedModel.
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter.*:UserWarning"),
]

BATCHING = data.Batching(widths=(8, 12), tokens=96)
# For each width a search is compiled anew.
ONE_WIDTH = data.Batching(widths=(8,), tokens=96)


@pytest.fixture(scope="module")
def text():
    """A few hundred real pairs."""
    return data.load_corpus("cldr").train[:600]


@pytest.fixture(scope="module")
def vocabulary(text):
    return data.Vocabulary.train(text, 500)


@pytest.fixture
def model(vocabulary):
    """A small translator with weights large enough to have opinions."""
    model = build_transformer(
        vocabulary.size,
        BATCHING.max_length,
        d_model=16,
        num_heads=2,
        feed_forward_dim=24,
    )
    add_noise(model)
    return model


@pytest.fixture
def train_eagerly():
    """To trace a Transformer takes longer than a few steps.

    `test_main_job_quick` traces and compiles the same.
    """
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


# Data


def test_vocabulary_round_trip(text, vocabulary):
    sentences = text.source[:20] + text.target[:20]
    ids = vocabulary.encode(sentences)
    assert vocabulary.size == 500
    assert all(row[-1] == data.EOS_ID for row in ids.to_list())
    padded = ids.to_tensor(data.PAD_ID).numpy()
    assert vocabulary.decode(padded) == sentences


def test_vocabulary_survives_a_new_seed(text, vocabulary):
    before = vocabulary.encode(text.source[:3]).to_list()
    keras.utils.set_random_seed(1)
    assert vocabulary.encode(text.source[:3]).to_list() == before


def test_vocabulary_larger_than_the_text():
    tiny = data.ParallelText(["a b"], ["c d"])
    with pytest.raises(ValueError, match=r"`size`.*size=1000"):
        data.Vocabulary.train(tiny, 1_000)


def test_token_frequencies_count_what_the_model_meets(text, vocabulary):
    few = text[:50]
    counts = vocabulary.token_frequencies(few)
    expected = np.zeros(vocabulary.size, int)
    for source, target in zip(
        vocabulary.encode(few.source).to_list(),
        vocabulary.encode(few.target).to_list(),
    ):
        for token in [*source, data.BOS_ID, *target]:
            expected[token] += 1
    np.testing.assert_array_equal(counts, expected)
    assert counts[data.BOS_ID] == 50
    assert counts[data.EOS_ID] == 100


@pytest.mark.parametrize("shuffle_seed", [None, 0])
def test_batches(text, vocabulary, shuffle_seed):
    dataset = BATCHING.batches(text, vocabulary, shuffle_seed)
    batches = list(dataset)
    assert len(batches) == int(dataset.cardinality())
    pairs = set()
    for inputs, labels, weights in batches:
        source, target = inputs["source"].numpy(), inputs["target"].numpy()
        assert source.shape == target.shape == labels.shape == weights.shape
        assert labels.shape in {(96 // 8, 8), (96 // 12, 12)}
        np.testing.assert_array_equal(weights, labels != data.PAD_ID)
        assert (target[:, 0] == data.BOS_ID).all()
        np.testing.assert_array_equal(target[:, 1:], labels[:, :-1])
        rows = np.asarray(weights).any(axis=1)
        pairs |= set(
            zip(
                vocabulary.decode(source[rows]),
                vocabulary.decode(np.asarray(labels)[rows]),
            )
        )
    # Through the vocabulary and back, since it does not know every letter.
    sides = [vocabulary.encode(side) for side in (text.source, text.target)]
    known = list(
        zip(*(vocabulary.decode(s.to_tensor().numpy()) for s in sides))
    )
    lengths = np.maximum(*(side.row_lengths() for side in sides))
    short = {pair for pair, length in zip(known, lengths) if length <= 12}
    assert pairs <= short
    if shuffle_seed is None:
        assert pairs == short
    else:  # all but what would not fill a batch
        assert len(short) - len(pairs) < 96 // 8 + 96 // 12


def test_training_batches_come_in_a_new_order_each_epoch(text, vocabulary):
    dataset = BATCHING.batches(text, vocabulary, shuffle_seed=0)
    epochs = [
        np.concatenate([np.ravel(labels) for _, labels, _ in dataset])
        for _ in range(2)
    ]
    assert not np.array_equal(*epochs)


def test_multi30k_is_read_from_a_folder(tmp_path):
    for name in data.MULTI30K_SHA256:
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write(f"erster Satz {name}\nzweiter Satz {name}\n")
    corpus = data.load_corpus("multi30k", tmp_path)
    assert corpus.name == "multi30k"
    assert corpus.train.source[0] == "erster Satz train.en"
    assert corpus.validation.target[1] == "zweiter Satz val.de"
    assert corpus.test.source[1] == "zweiter Satz test_2016_flickr.en"


def test_multi30k_is_downloaded_with_its_checksum(tmp_path, monkeypatch):
    asked = {}

    def get_file(fname, origin, file_hash, hash_algorithm, cache_subdir):
        asked[origin] = (file_hash, hash_algorithm)
        path = tmp_path / fname
        with gzip.open(path, "wt") as file:
            file.write("one\n")
        return str(path)

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    assert data.load_corpus("multi30k").train.source == ["one"]
    assert asked == {
        f"{data.MULTI30K_URL}{name}.gz": (digest, "sha256")
        for name, digest in data.MULTI30K_SHA256.items()
    }


def test_missing_data_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file train\.en\.gz"):
        data.load_corpus("multi30k", tmp_path)


def test_unknown_corpus():
    with pytest.raises(ValueError, match="'cldr' or 'multi30k'.*'wmt'"):
        data.load_corpus("wmt")


def test_uneven_parallel_text():
    with pytest.raises(ValueError, match="1 source and 2 target"):
        data.ParallelText(["a"], ["b", "c"])


# Model and training


def test_padding_changes_nothing(model):
    source, target = np.array([[5, 6, 7]]), np.array([[2, 8]])
    padded = {
        "source": np.pad(source, [[0, 0], [0, 4]]),
        "target": np.pad(target, [[0, 0], [0, 3]]),
    }
    logits = model({"source": source, "target": target}, training=False)
    np.testing.assert_allclose(
        model(padded, training=False)[:, :2], logits, atol=1e-5
    )


def test_decoder_does_not_look_ahead(model):
    source, target = np.array([[5, 6, 7]]), np.array([[2, 8, 9]])
    other = np.array([[2, 8, 10]])
    logits = [
        model({"source": source, "target": t}, training=False)
        for t in (target, other)
    ]
    np.testing.assert_allclose(logits[0][:, :2], logits[1][:, :2], atol=1e-6)
    assert not np.allclose(logits[0][:, 2], logits[1][:, 2], atol=1e-3)


def test_halves_make_the_whole(model):
    inputs = {"source": np.array([[5, 6, 7]]), "target": np.array([[2, 8]])}
    memory = encoder(model)({"source": inputs["source"]}, training=False)
    inputs_and_memory = {"memory": np.asarray(memory), **inputs}
    np.testing.assert_allclose(
        decoder(model)(inputs_and_memory, training=False),
        model(inputs, training=False)[:, -1],
        atol=1e-5,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothed_crossentropy(smoothing):
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 3, 7)).astype("float32")
    labels = random.integers(7, size=(2, 3))
    weights = np.array([[1, 1, 0], [1, 0, 0]], "float32")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((2, 3, 7), smoothing / 7)
    np.put_along_axis(
        target, labels[..., None], smoothing / 7 + 1 - smoothing, axis=-1
    )
    expected = -(target * log_p).sum(-1)
    loss = train.LabelSmoothedCrossentropy(smoothing)
    np.testing.assert_allclose(
        loss(labels, logits, sample_weight=weights),
        (expected * weights).sum() / weights.sum(),
        rtol=1e-5,
    )


def test_too_little_text_to_train(model, text, vocabulary):
    batches = BATCHING.batches(text[:3], vocabulary, shuffle_seed=0)
    with pytest.raises(ValueError, match="no complete batch"):
        train.fit(model, batches, batches, train.Schedule())


@pytest.fixture
def batches(text, vocabulary):
    """A few of each width."""
    return dict(
        training=BATCHING.batches(text[:100], vocabulary, shuffle_seed=0),
        validation=BATCHING.batches(text[:5], vocabulary),
    )


class _Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def test_interrupted_training_goes_on(batches, model, train_eagerly, tmp_path):
    arguments = dict(
        **batches,
        schedule=train.Schedule(epochs=2),
        backup_dir=tmp_path / "backup",
        jit_compile=False,
        verbose=0,
    )
    with pytest.raises(KeyboardInterrupt):
        train.fit(model, callbacks=[_Interrupt()], **arguments)
    weights = model.get_weights()
    fresh = keras.models.clone_model(model)
    history = train.fit(fresh, **arguments)
    assert history.epoch == [1]
    steps = int(arguments["training"].cardinality())
    # The schedule, too, goes on where it was.
    assert int(fresh.optimizer.iterations) == 2 * steps
    drift = np.abs(fresh.get_weights()[0] - weights[0]).max()
    assert 0 < drift < 0.5


# Search


def test_greedy_search_is_the_argmax_of_the_model(model, text, vocabulary):
    sentences = text.source[:3]
    found = translate.Translator(model, vocabulary, BATCHING).translate(
        sentences, batch_size=2
    )
    for sentence, translation in zip(sentences, found):
        source = vocabulary.encode([sentence]).to_list()[0]
        inputs = {"source": np.array([source[: BATCHING.max_length]])}
        target = [data.BOS_ID]
        while len(target) < BATCHING.max_length and target[-1] != data.EOS_ID:
            padded = target + [data.PAD_ID] * (12 - len(target))
            logits = model({**inputs, "target": np.array([padded])})
            target.append(int(np.argmax(logits[0, len(target) - 1])))
        assert vocabulary.decode(np.array([target[1:]])) == [translation]


def test_beam_search_finds_likelier_translations(model, text, vocabulary):
    sentences = text.source[:6]

    def log_likelihood(translation, source):
        if data.EOS_ID in translation:
            translation = translation[: translation.index(data.EOS_ID) + 1]
        target = [data.BOS_ID, *translation]
        inputs = {
            "source": np.array([source]),
            "target": np.array([target[:-1]]),
        }
        log_p = tf.nn.log_softmax(model(inputs, training=False)[0])
        return sum(float(log_p[i, t]) for i, t in enumerate(target[1:]))

    totals = {}
    for beams in (1, 8):
        translator = translate.Translator(model, vocabulary, ONE_WIDTH, beams)
        totals[beams] = 0.0
        for _, source in data.sentence_batches(
            sentences, vocabulary, ONE_WIDTH, size=1
        ):
            ids = translator._generate(source).numpy()[0, 1:].tolist()
            row = [i for i in source[0].tolist() if i != data.PAD_ID]
            totals[beams] += log_likelihood(ids, row)
    assert totals[8] > totals[1]


class Shouter:
    """Stands in for a translator; breaks at a sentence if asked to."""

    def __init__(self, breaks_at=None):
        self.breaks_at = breaks_at
        self.seen = []

    def translate(self, sentences):
        if self.breaks_at in sentences:
            raise KeyboardInterrupt
        self.seen += sentences
        return [sentence.upper() for sentence in sentences]


def test_a_long_text_is_translated_on_from_where_it_stopped(tmp_path):
    # Other separators than a newline do not end a line.
    sentences = ["a", "b\u2028c", "d", "e", "f"]
    path = tmp_path / "translations.txt"
    with pytest.raises(KeyboardInterrupt):
        translate.translate_to_file(Shouter("e"), sentences, path, 2)
    with path.open("a", encoding="utf-8") as file:
        file.write("cut in the mid")
    translator = Shouter()
    lines = translate.translate_to_file(translator, sentences, path, 2)
    assert translator.seen == sentences[2:]
    assert lines == ["A", "B\u2028C", "D", "E", "F"]
    assert path.read_text(encoding="utf-8") == "A\nB\u2028C\nD\nE\nF\n"


def test_compiled_search_finds_the_same(model, text, vocabulary):
    arguments = (model, vocabulary, ONE_WIDTH, 2)
    plain, compiled = (
        translate.Translator(*arguments, jit_compile=jit_compile)
        for jit_compile in (False, True)
    )
    sentences = text.source[:3]
    assert compiled.translate(sentences) == plain.translate(sentences)


def test_the_student_may_learn_its_teachers_translations(tmp_path, monkeypatch):
    settings = dataclasses.replace(
        pipeline.PRESETS["cldr"],
        **{**pipeline.QUICK, "max_pairs": 200, "vocabulary_size": 120},
    )
    settings = dataclasses.replace(
        settings,
        student=dataclasses.replace(settings.student, sequence_level=True),
    )
    run = pipeline.Run(settings, tmp_path, verbose=False)
    monkeypatch.setattr(run, "model", lambda name: name)
    monkeypatch.setattr(
        pipeline, "Translator", lambda *arguments, **options: Shouter()
    )
    text = run.training_text
    assert text.source == run.corpus.train.source
    assert text.target == [sentence.upper() for sentence in text.source]


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 0.5, 2.0)])
def test_a_recipe_decides_the_losses(batches, model, train_eagerly, weights):
    student = kde.compress(model, 2.0, verbose=0, quantization=None)
    recipe = train.Recipe(
        epochs=1,
        logits_weight=weights[0],
        embedding_weight=weights[1],
        hidden_weight=weights[2],
    )
    history = train.distill(
        model, student, **batches, schedule=recipe, verbose=0
    ).history
    names = ("logits", "embedding", "feature")
    for name, weight in zip(names, weights):
        assert (f"{name}_distillation_loss" in history) == (weight > 0)


def test_a_recipe_without_distillation_is_training(
    batches, model, train_eagerly
):
    student = kde.compress(model, 2.0, verbose=0, quantization=None)
    recipe = train.Recipe(epochs=1, student_loss_weight=1.0)
    history = train.distill(
        model, student, **batches, schedule=recipe, verbose=0
    ).history
    assert set(history) == {"loss", "nll", "val_loss", "val_nll"}


def test_litert_translates_as_keras_does(model, text, vocabulary, tmp_path):
    student = kde.compress(model, 4.0, verbose=0, quantization=None)
    for name, translator in (("teacher", model), ("student", student)):
        path = tmp_path / f"{name}.tflite"
        kde.export_litert(
            translator,
            path,
            signatures={
                "encode": encoder(translator),
                "decode": decoder(translator),
            },
            verbose=False,
        )
        keras_text = translate.Translator(
            translator, vocabulary, BATCHING
        ).translate(text.source[:10])
        litert = translate.LiteRTTranslator(
            path, vocabulary, BATCHING.max_length
        )
        assert litert.translate(text.source[:10]) == keras_text


# Results


def test_score_is_sacrebleu():
    assert evaluate.score(["the cat sat on the mat"] * 2, ["a b c d e"] * 2) < 5
    same = ["the cat sat on the mat", "on the mat the cat sat"]
    assert evaluate.score(same, same) == pytest.approx(100.0)
    assert "tok:13a" in evaluate.signature()


def test_table_compares_with_the_first_row():
    results = [
        evaluate.Result("teacher", 30.0, 8_000_000, 20_000_000, 2.0, 31.0),
        evaluate.Result("student", 29.5, 1_000_000, 13_000_000, 1.5),
    ]
    headings, teacher, student = evaluate.table_cells(results)
    assert headings.index("BLEU beam") == 3
    assert teacher[1:5] == ["30.00", "+0.00", "31.00", "8.000 MB"]
    assert student[1:5] == ["29.50", "-0.50", "", "1.000 MB"]
    lines = evaluate.markdown_table([headings, teacher, student]).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3].startswith("| student | 29.50 | -0.50 |")


# The main job


def test_main_job_quick(quick_run, tmp_path, capsys):
    work_dir = tmp_path / "run"
    shutil.copytree(quick_run, work_dir)
    for name in ("training.png", "quality.png", "student.tflite", "report.md"):
        assert (work_dir / name).stat().st_size > 1_000
    assert not list(work_dir.glob("part_*"))
    student = keras.saving.load_model(work_dir / "student.keras")
    (row,) = kde.compression_report(student).rows
    assert row.ratio >= 8.0

    # Again: everything is there, so nothing is trained.
    arguments = ["--quick", "--work-dir", str(work_dir)]
    stages = (work_dir / "stages.jsonl").read_text()
    assert command.main(arguments) == 0
    assert (work_dir / "stages.jsonl").read_text() == stages

    # What is missing is made again, nothing else.
    result = work_dir / "result_student.json"
    before = json.loads(result.read_text())
    result.unlink()
    assert command.main(arguments) == 0
    after = json.loads(result.read_text())
    assert after["bleu"] == before["bleu"]
    added = (work_dir / "stages.jsonl").read_text().removeprefix(stages)
    (stage,) = added.splitlines()
    assert json.loads(stage)["stage"] == "evaluate student"
    assert "compressed, distilled, LiteRT" in capsys.readouterr().out


def test_work_dir_of_another_run(tmp_path, capsys):
    pipeline.Run(pipeline.PRESETS["cldr"], tmp_path)
    code = command.main(["--work-dir", str(tmp_path), "--d-model", "32"])
    assert code == 2
    error = capsys.readouterr().err
    assert "another d_model" in error
    assert "d_model=32" in error


def test_missing_data_ends_the_main_job(tmp_path, capsys):
    arguments = ["--dataset", "multi30k", "--data-dir", str(tmp_path / "none")]
    code = command.main([*arguments, "--work-dir", str(tmp_path / "run")])
    assert code == 2
    assert "no file train.en.gz" in capsys.readouterr().err


def test_help_is_quick_and_bad_use_exits_2():
    root = Path(__file__).parent.parent

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "examples.nmt", *arguments],
            capture_output=True,
            text=True,
            cwd=root,
            timeout=60,
        )

    shown = run("--help")
    assert shown.returncode == 0
    assert "--dataset" in shown.stdout
    assert run("--dataset", "wmt").returncode == 2
