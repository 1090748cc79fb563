"""The translation example: data, model, training, search, main job."""

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
from examples.nmt.stepwise import write_file
from keras_distilled_embedding_runner import Runner
from tests.keras_search import translate as translate_with_keras
from tests.translators import add_noise

pytestmark = [
    # TensorFlow's converter, when it reads a SavedModel.
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter.*:UserWarning"),
]

BATCHING = data.Batching(widths=(8, 12), tokens=96)


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


def write_pairs(folder, source, target, ending=""):
    paths = [folder / f"text.{side}{ending}" for side in ("en", "pt")]
    for path, lines in zip(paths, (source, target)):
        content = "\n".join(lines).encode("utf-8")
        path.write_bytes(gzip.compress(content) if ending else content)
    return paths


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_corpus_of_ones_own(tmp_path, ending):
    source = [f"sentence {i}\u2028" for i in range(100)]
    target = [f"frase {i}" for i in range(100)]
    # Twice, without a translation, and what another sentence says, too.
    source += ["sentence 0\u2028", "nothing", *(f"same {i}" for i in range(50))]
    target += ["frase 0", " ", *(f"frase {i}" for i in range(50))]
    paths = write_pairs(tmp_path, source, target, ending)
    corpus = data.read_corpus(*paths)
    assert corpus.name == f"text.en{ending} to text.pt{ending}"
    assert len(corpus.validation) == len(corpus.test) == 150 // 20
    held, parts = [set(), set()], []
    for part in (corpus.validation, corpus.test):
        for sides, sentences in zip(held, (part.source, part.target)):
            sides |= set(sentences)
        parts += zip(part.source, part.target)
    trained = set(zip(corpus.train.source, corpus.train.target))
    wanted = {
        pair
        for pair in zip(map(str.strip, source), map(str.strip, target))
        if all(pair)
    }
    assert trained.isdisjoint(parts)
    assert not held[0] & {s for s, _ in trained}
    assert not held[1] & {t for _, t in trained}
    # All that is left out has a held-out sentence on one side.
    for pair in wanted - trained - set(parts):
        assert pair[0] in held[0] or pair[1] in held[1]
    assert data.read_corpus(*paths) == corpus
    assert data.read_corpus(*paths, seed=1).test != corpus.test


def test_files_that_are_no_corpus(tmp_path):
    source = [str(i) for i in range(30)]
    with pytest.raises(ValueError, match="30 lines of .*en and 29 of .*pt"):
        data.read_corpus(*write_pairs(tmp_path, source, source[1:]))
    with pytest.raises(ValueError, match="at least 20 .*Received: 19"):
        data.read_corpus(*write_pairs(tmp_path, source[:19], source[:19]))
    paths = write_pairs(tmp_path, source, source)
    paths[1].write_bytes("Bräuche".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text\.pt must be text in UTF-8"):
        data.read_corpus(*paths)


def test_a_vocabulary_as_large_as_the_text_bears(text):
    vocabulary = data.Vocabulary.train(text)
    assert vocabulary.size == 500
    # Nine pieces of ten would occur ten times, if only the text were longer.
    longer = data.ParallelText(text.source * 10, text.target * 10)
    larger = data.Vocabulary.train(longer)
    counts = larger.token_frequencies(longer)
    assert larger.size > 500
    assert np.mean(counts >= 10) >= 0.9


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


@pytest.fixture
def vocabulary_path(vocabulary, tmp_path):
    path = tmp_path / "vocabulary.spm"
    path.write_bytes(vocabulary.proto)
    return path


def test_files_translate_by_turns(
    model, text, vocabulary, vocabulary_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(translate, "TURN", 4)
    student = kde.compress(model, 4.0, verbose=0, quantization=None)
    models = {"full": model, "small": student}
    paths = {name: tmp_path / f"{name}.tflite" for name in models}
    for name, translator in models.items():
        write_file(
            translator,
            paths[name],
            vocabulary_path,
            BATCHING.max_length,
            verbose=False,
        )
    sentences = text.source[:15]  # some are too long
    lengths = vocabulary.encode(sentences).row_lengths().numpy()
    assert max(lengths) > BATCHING.max_length > min(lengths)
    found = translate.translate_by_turns(
        paths, sentences, vocabulary, BATCHING.max_length
    )
    for name, translator in models.items():
        expected = translate_with_keras(
            translator,
            vocabulary,
            [s for s, n in zip(sentences, lengths) if n <= 12],
            BATCHING.max_length,
        )
        lines = found[name].lines
        assert len(lines) == 15
        assert [x for x, n in zip(lines, lengths) if n <= 12] == expected
        assert found[name].ms_per_sentence > 0
        # What is cut still ends.
        longest = int(np.argmax(lengths))
        ids = vocabulary.encode(sentences).to_list()[longest][:11]
        runner = Runner(paths[name])
        assert lines[longest] == runner.generate([*ids, data.EOS_ID])


# Training as a recipe says


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


# Results


def test_score_is_sacrebleu():
    assert evaluate.score(["the cat sat on the mat"] * 2, ["a b c d e"] * 2) < 5
    same = ["the cat sat on the mat", "on the mat the cat sat"]
    assert evaluate.score(same, same) == pytest.approx(100.0)
    assert "tok:13a" in evaluate.signature()


RESULTS = [
    evaluate.Result("full, float32", 30.0, 8_000_000, 20_000_000, 2.0, 31.0),
    evaluate.Result("full, int8", 29.9, 2_000_000, 5_000_000, 1.6),
    evaluate.Result("small", 29.5, 1_000_000, 4_000_000, 1.2),
]


def test_table_compares_with_the_first_row():
    headings, full, _, small = evaluate.table_cells(RESULTS)
    assert headings.index("BLEU beam") == 3
    assert full[1:5] == ["30.00", "+0.00", "31.00", "8.000 MB"]
    assert small[1:5] == ["29.50", "-0.50", "", "1.000 MB"]
    lines = evaluate.markdown_table([headings, full, small]).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[3].startswith("| small | 29.50 | -0.50 |")


def test_the_conclusion_compares_with_the_fastest_full_file():
    said = evaluate.conclusion(RESULTS)
    assert "20% of the bytes" in said
    assert "its table 12.5%" in said
    assert "BLEU -0.50" in said
    assert "60% of the time, and 75% of that of the fastest" in said


def test_samples_stand_side_by_side():
    texts = {"source": ["a", "b", "c"], "full": ["A", "B", "C"]}
    assert evaluate.samples(texts, 2) == (
        "source  a\n  full  A\n\nsource  b\n  full  B"
    )


# The main job


def test_main_job_quick(quick_run, tmp_path, capsys):
    work_dir = tmp_path / "run"
    shutil.copytree(quick_run, work_dir)
    for name in ("training.png", "quality.png", "translator.tflite"):
        assert (work_dir / name).stat().st_size > 1_000
    assert not list(work_dir.glob("part_*"))
    student = keras.saving.load_model(work_dir / "student.keras")
    (row,) = kde.compression_report(student).rows
    assert row.ratio >= 8.0
    results = json.loads((work_dir / "results.json").read_text())
    assert [row["name"] for row in results] == [
        "full, float32",
        "full, int8",
        "compressed, not distilled",
        "compressed, distilled",
    ]
    for result, name in zip(results, pipeline.EXPORTS):
        path = work_dir / f"{name}.tflite"
        assert result["file_bytes"] == path.stat().st_size
        lines = (work_dir / f"test_{name}.txt").read_text().split("\n")
        runner = Runner(path)
        source = (work_dir / "test_source.txt").read_text().split("\n")
        assert lines[:3] == [runner.generate(s) for s in source[:3]]
        references = (work_dir / "test_reference.txt").read_text().split("\n")
        assert result["bleu"] == evaluate.score(lines[:-1], references[:-1])
    assert results[0]["table_bytes"] == 4 * 500 * 64
    assert results[-1]["table_bytes"] == row.bytes_after

    # Again: everything is there, so nothing is trained.
    arguments = ["--quick", "--work-dir", str(work_dir)]
    stages = (work_dir / "stages.jsonl").read_text()
    assert command.main(arguments) == 0
    assert (work_dir / "stages.jsonl").read_text() == stages

    # What is missing is made again, nothing else.
    (work_dir / "results.json").unlink()
    capsys.readouterr()
    assert command.main(arguments) == 0
    again = json.loads((work_dir / "results.json").read_text())
    assert [row["bleu"] for row in again] == [row["bleu"] for row in results]
    added = (work_dir / "stages.jsonl").read_text().removeprefix(stages)
    (stage,) = added.splitlines()
    assert json.loads(stage)["stage"] == "translate"
    shown = capsys.readouterr().out
    assert "compressed, distilled" in shown
    assert f"python -m examples.web --work-dir {work_dir}" in shown
    report = (work_dir / "report.md").read_text()
    assert evaluate.conclusion([evaluate.Result(**r) for r in again]) in report


@pytest.mark.slow
def test_main_job_of_ones_own_files(text, tmp_path, capfd):
    source, target = write_pairs(tmp_path, text.source, text.target)
    work_dir = tmp_path / "run"
    arguments = ["--quick", "--work-dir", str(work_dir)]
    arguments += ["--source", str(source), "--target", str(target)]
    assert command.main(arguments) == 0
    shown, noted = capfd.readouterr()
    assert "text.en to text.pt: table of 500 x 64" in shown
    assert (work_dir / "translator.tflite").exists()
    # Nothing of the frameworks' notes on themselves.
    assert noted == ""
    target.write_text("\n".join(text.target[1:]))
    (work_dir / "results.json").unlink()
    assert command.main(arguments) == 2
    noted = capfd.readouterr().err
    assert noted.startswith("error: `source` and `target` must have a line")
    assert noted.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "here"], "--source and --target: give both, or none"),
        (["--source", "no", "--target", "no"], "--source: no file no"),
    ],
)
def test_ones_own_files_are_looked_for_first(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


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
