"""What the runner writes, without Keras, equals what Keras generates."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_distilled_embedding as kde
import keras_distilled_embedding_cli as cli
import keras_distilled_embedding_runner as runner_file
from keras_distilled_embedding.export import seq2seq
from keras_distilled_embedding.export.tokenizers import StoredVocabulary
from keras_distilled_embedding.export.tokenizers import append_tokenizer
from keras_distilled_embedding_runner import Runner
from tests.translators import LENGTH
from tests.translators import add_noise
from tests.translators import sentences
from tests.translators import translator
from tests.vocabularies import paragraphs
from tests.vocabularies import sentence_pieces

keras_hub = pytest.importorskip("keras_hub")
interpreter = pytest.importorskip("ai_edge_litert.interpreter")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    # KerasHub's T5, whose layers make masks that they do not read.
    pytest.mark.filterwarnings("ignore:.*does not support masking"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*vocabulary.spm"),
]

SOURCES = [source for source, _ in sentences()][::11]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Tasks and their files: full and compressed."""
    folder = tmp_path_factory.mktemp("translators")
    made = {}
    for name in ("bart", "t5"):
        full = translator(name)
        small = kde.compress(full, 4.0, quantization=None, verbose=0)
        small.compile(sampler="greedy")
        for kind, task in (("full", full), ("small", small)):
            path = folder / f"{name}_{kind}.tflite"
            report = kde.export_litert_seq2seq(
                task, path, max_length=LENGTH, verbose=False
            )
            assert report.tables == {"token_embedding": 1}
            assert report.bytes == path.stat().st_size
            assert report.signatures == ("encode", "decode")
            made[name, kind] = task, path
    return made


def read_by(task, source, target):
    """Keras's logits `(t, V)` of a target, all at once."""
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    source, target = np.array([source]), np.array([target])
    logits = bare(
        {
            "encoder_token_ids": source,
            "encoder_padding_mask": np.ones_like(source),
            "decoder_token_ids": target,
            "decoder_padding_mask": np.ones_like(target),
        }
    )
    return keras.ops.convert_to_numpy(logits)[0]


def read_from(path, source, target, pad_id):
    """The same from a file, token by token, by the names of its tensors."""
    file = interpreter.Interpreter(str(path))
    encode, decode = map(file.get_signature_runner, ("encode", "decode"))
    padded = np.full((1, LENGTH), pad_id, "int32")
    padded[0, : len(source)] = source
    known = encode(source=padded)
    state = {
        name: np.zeros(detail["shape"], detail["dtype"])
        for name, detail in decode.get_input_details().items()
        if name in decode.get_output_details()
    }
    found = []
    for position, token in enumerate(target):
        state = decode(
            token=np.array([[token]], "int32"),
            position=np.array([position], "int32"),
            **known,
            **state,
        )
        found.append(state.pop("logits")[0])
    return np.stack(found)


def ids_of(task, source, target):
    """Ids of both sides, as KerasHub makes them."""
    read = task.preprocessor.generate_preprocess(
        {"encoder_text": [source], "decoder_text": [target]},
        encoder_sequence_length=LENGTH,
        decoder_sequence_length=LENGTH,
    )
    return [
        np.asarray(read[f"{side}_token_ids"])[
            0, : int(np.asarray(read[f"{side}_padding_mask"]).sum())
        ].tolist()
        for side in ("encoder", "decoder")
    ]


FILES = [(name, kind) for name in ("bart", "t5") for kind in ("full", "small")]


@pytest.mark.parametrize("which", FILES, ids="-".join)
def test_greedy_is_kerass(files, which):
    task, path = files[which]
    runner = Runner(path)
    wanted = task.generate(SOURCES, max_length=LENGTH)
    assert [runner.generate(source) for source in SOURCES] == wanted
    if which[1] == "full":
        assert len(set(wanted)) > 5  # it has learned something
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    bare.compile(sampler="greedy")
    for source in SOURCES[:2]:
        inputs = task.preprocessor.generate_preprocess(
            [source], sequence_length=LENGTH
        )
        end = task.preprocessor.tokenizer.end_token_id
        found = bare.generate(inputs, stop_token_ids=[end])
        start = int(np.asarray(inputs["decoder_padding_mask"]).sum())
        row = np.asarray(found["decoder_token_ids"])[0, start:].tolist()
        row = row[: row.index(end)] if end in row else row
        assert list(runner.stream_ids(source)) == row


@pytest.mark.parametrize("which", FILES, ids="-".join)
def test_logits_are_kerass(files, which):
    task, path = files[which]
    pad_id = task.preprocessor.tokenizer.pad_token_id
    for source, target in sentences()[::30]:
        source, target = ids_of(task, source, target)
        np.testing.assert_allclose(
            read_from(path, source, target, pad_id),
            read_by(task, source, target),
            rtol=1e-3,
            atol=1e-3,
        )


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_in_8_bits(files, name, tmp_path):
    task, whole = files[name, "full"]
    path = tmp_path / "int8.tflite"
    kde.export_litert_seq2seq(
        task, path, max_length=LENGTH, quantization="int8", verbose=False
    )
    assert path.stat().st_size < 0.8 * whole.stat().st_size
    pad_id = task.preprocessor.tokenizer.pad_token_id
    source, target = ids_of(task, *sentences()[7])
    wanted = read_by(task, source, target)
    error = read_from(path, source, target, pad_id) - wanted
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_beams(files, name):
    task, path = files[name, "full"]
    runner = Runner(path)
    stop = task.preprocessor.tokenizer.end_token_id

    def score(source, ids):
        """Of a whole text, by Keras."""
        source, start = ids_of(task, source, "")
        ids = [*ids, stop][: LENGTH - len(start)]
        logits = read_by(task, source, [*start, *ids]).astype("float64")
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        rows = np.arange(len(ids)) + len(start) - 1
        return logits[rows, ids].sum()

    scores = []
    for source in SOURCES[:5]:
        greedy = list(runner.stream_ids(source))
        assert list(runner.stream_ids(source, num_beams=1)) == greedy
        found = list(runner.stream_ids(source, num_beams=4))
        scores.append((score(source, greedy), score(source, found)))
    worse, better = np.transpose(scores)
    assert (better >= worse - 1e-3).all()


def test_draws(files):
    runner = Runner(files["bart", "full"][1])
    source = SOURCES[0]
    greedy = runner.generate(source)
    drawn = {runner.generate(source, temperature=3.0, seed=i) for i in range(4)}
    assert len(drawn) > 2
    again = [runner.generate(source, temperature=3.0, seed=1) for _ in "ab"]
    assert again[0] == again[1]
    for options in (
        {"top_k": 1},
        {"top_k": 1, "temperature": 9.0, "seed": 3},
        {"top_p": 1e-6, "temperature": 9.0},
        {"temperature": 0.0, "top_k": 9},
    ):
        assert runner.generate(source, **options) == greedy
    pieces = list(runner.stream(source))
    assert len(pieces) > 2
    assert "".join(pieces) == greedy
    ids = list(runner.stream_ids(source))
    assert list(runner.stream_ids(source, max_tokens=2)) == ids[:2]


def test_draws_have_the_probabilities_of_the_logits():
    from keras_distilled_embedding_runner import _chooser

    logits = np.array([0.0, 2.0, 1.0, -9.0, 1.5], "float32")
    shares = np.exp(logits / 0.7)
    for top_k, top_p, kept in (
        (None, None, [0, 1, 2, 3, 4]),
        (3, None, [1, 2, 4]),
        # 0.54 of the likeliest, 0.80 of two.
        (None, 0.6, [1, 4]),
    ):
        choose = _chooser(None, 0.7, top_k, top_p, 1, seed=0)
        counts = np.bincount(
            [choose(logits) for _ in range(4_000)], minlength=5
        )
        wanted = np.where(np.isin(np.arange(5), kept), shares, 0)
        np.testing.assert_allclose(
            counts / 4_000, wanted / wanted.sum(), atol=0.03
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prompt": "7 and 1 " * 20}, f"`prompt` must have 1 to {LENGTH} tok"),
        ({"prompt": [3, 10**6]}, r"`prompt` must have ids from 0.*\[1000000\]"),
        ({"prompt": [-1]}, r"`prompt`.*Received: \[-1\]"),
        ({"max_tokens": 0}, "`max_tokens` must be an integer.*=0"),
        ({"temperature": -1.0}, r"`temperature`.*=-1\.0"),
        ({"temperature": float("nan")}, "`temperature`.*=nan"),
        ({"top_k": 0}, "`top_k` must be.*=0"),
        ({"top_p": 1.5}, r"`top_p` must be.*=1\.5"),
        ({"num_beams": 2, "top_k": 3}, "`num_beams` must be 1.*top_k=3"),
    ],
)
def test_bad_use(files, options, match):
    runner = Runner(files["t5", "full"][1])
    with pytest.raises(ValueError, match=match):
        runner.generate(**{"prompt": "7 and 1", **options})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"task": "a model"}, TypeError, "`keras_hub.models.Seq2SeqLM`"),
        ({"max_length": 1}, ValueError, "at least 2. Received: max_length=1"),
        (
            {"source_length": LENGTH + 1},
            ValueError,
            f"at most {LENGTH}.*source_length={LENGTH + 1}",
        ),
        ({"quantization": "int3"}, ValueError, "quantization='int3'"),
        ({"filepath": "no/such/x"}, FileNotFoundError, "no/such"),
    ],
)
def test_bad_use_of_the_export(files, change, error, match, tmp_path):
    """Is told before any work, and leaves what was there."""
    task, _ = files["bart", "full"]
    path = tmp_path / "model.tflite"
    path.write_text("as it was")
    arguments = {"task": task, "filepath": path, "max_length": 8}
    with pytest.raises(error, match=match):
        kde.export_litert_seq2seq(**arguments | change, verbose=False)
    assert path.read_text() == "as it was"
    assert [*tmp_path.iterdir()] == [path]


def t5gemma():
    layer = dict(
        hidden_dim=16,
        intermediate_dim=16,
        num_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        layer_types=["full_attention"],
    )
    sides = {f"encoder_{k}": v for k, v in layer.items()}
    sides |= {f"decoder_{k}": v for k, v in layer.items()}
    backbone = keras_hub.models.T5GemmaBackbone(vocabulary_size=300, **sides)
    special = dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    names = dict(pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>")
    pieces = sentence_pieces(paragraphs(), 300, **special, **names)
    preprocessor = keras_hub.models.T5GemmaSeq2SeqLMPreprocessor(
        keras_hub.models.T5GemmaTokenizer(pieces), 16, 16
    )
    return keras_hub.models.T5GemmaSeq2SeqLM(backbone, preprocessor)


def moonshine():
    """Which hears."""
    backbone = keras_hub.models.MoonshineBackbone(
        vocabulary_size=300,
        filter_dim=16,
        encoder_num_layers=1,
        decoder_num_layers=1,
        hidden_dim=16,
        intermediate_dim=16,
        encoder_num_heads=2,
        decoder_num_heads=2,
    )
    return keras_hub.models.MoonshineAudioToText(backbone)


@pytest.mark.parametrize("make", [t5gemma, moonshine])
def test_tasks_that_decode_in_another_way(make, tmp_path, monkeypatch):
    """Are refused before any work."""
    task = make()
    monkeypatch.setattr(seq2seq, "step_models", None)
    monkeypatch.setattr(seq2seq, "export_litert", None)
    with pytest.raises(
        ValueError, match=f"as BART and T5 do. Received: {type(task).__name__}"
    ):
        kde.export_litert_seq2seq(task, tmp_path / "x.tflite", max_length=8)
    assert not list(tmp_path.iterdir())


def test_two_tables(tmp_path):
    """Of T5 1.1: one looks up, another projects; at 8x."""
    task = translator("t5")
    config = task.backbone.get_config() | dict(tie_embedding_weights=False)
    backbone = type(task.backbone).from_config(config)
    untied = type(task)(backbone=backbone, preprocessor=task.preprocessor)
    add_noise(untied)
    small = kde.compress(untied, 8.0, quantization=None, verbose=0)
    path = tmp_path / "small.tflite"
    kde.export_litert_seq2seq(small, path, max_length=LENGTH, verbose=False)
    pad_id = task.preprocessor.tokenizer.pad_token_id
    for source, target in sentences()[::30]:
        source, target = ids_of(task, source, target)
        np.testing.assert_allclose(
            read_from(path, source, target, pad_id),
            read_by(small, source, target),
            rtol=1e-3,
            atol=1e-3,
        )


def test_a_stop_that_is_never_met(files, tmp_path):
    """The text is as long as the caches are."""
    _, path = files["t5", "full"]
    parts = runner_file._read_parts(path)
    unmet = parts.settings | {"stop_ids": [63]}  # a row without a piece
    (pieces,) = parts.tokenizer.values()
    changed = tmp_path / "changed.tflite"
    changed.write_bytes(parts.model)
    vocabulary = StoredVocabulary(pieces, is_sentencepiece=True)
    append_tokenizer(changed, changed, vocabulary, unmet)
    # The source ends with the usual token.
    source = Runner(path)._prompt_ids(SOURCES[0])
    ids = list(Runner(path).stream_ids(source))
    longer = list(Runner(changed).stream_ids(source))
    assert longer[: len(ids)] == ids
    assert len(ids) < len(longer) == LENGTH - 1


def test_another_source_length(files, tmp_path):
    task, path = files["bart", "full"]
    other = tmp_path / "other.tflite"
    kde.export_litert_seq2seq(
        task, other, max_length=6, source_length=LENGTH, verbose=False
    )
    for source in SOURCES[:3]:
        # Two of the six are the start.
        ids = list(Runner(path).stream_ids(source))[:4]
        assert list(Runner(other).stream_ids(source)) == ids


# The command


def test_the_command(files, capsys):
    _, path = files["bart", "full"]
    runner = Runner(path)
    options = ["--beams", "2", "--max-tokens", "3"]
    assert cli.main(["generate", str(path), *SOURCES[:2], *options]) == 0
    wanted = [
        runner.generate(source, num_beams=2, max_tokens=3)
        for source in SOURCES[:2]
    ]
    assert capsys.readouterr().out.splitlines() == wanted
    drawing = ["--temperature", "9", "--top-k", "9", "--top-p", "0.9"]
    arguments = [str(path), SOURCES[0], *drawing, "--seed", "5", "--json"]
    assert cli.main(["generate", *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    ids = list(
        runner.stream_ids(
            SOURCES[0], temperature=9.0, top_k=9, top_p=0.9, seed=5
        )
    )
    assert ids != list(runner.stream_ids(SOURCES[0]))
    assert shown == {
        "prompt": SOURCES[0],
        "text": runner.decode(ids),
        "ids": ids,
    }


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["FILE", "a", "--top-k", "0"], "`top_k` must be an integer"),
        (["FILE", "a", "--beams", "two"], "--beams: invalid int value: 'two'"),
        (["no.tflite", "a"], "`model_path` must be a file"),
        ([], "required: FILE"),
    ],
)
def test_bad_use_of_the_command(files, arguments, match, capsys):
    path = str(files["bart", "full"][1])
    try:
        status = cli.main(
            ["generate", *(path if a == "FILE" else a for a in arguments)]
        )
    except SystemExit as exit:
        status = exit.code
    shown = capsys.readouterr()
    assert (status, shown.out) == (2, "")
    (line,) = shown.err.splitlines()
    assert line.startswith("keras-distilled-embedding generate: error: ")
    assert match in line


def test_the_export_of_the_command(files, tmp_path, capsys):
    task, path = files["bart", "small"]
    saved, out = tmp_path / "student.keras", tmp_path / "student.tflite"
    kde.save_model(task, saved)
    arguments = ["export", saved, "-o", out, "--max-length", LENGTH]
    assert cli.main([str(a) for a in arguments]) == 0
    assert "encode, decode" in capsys.readouterr().out
    for source in SOURCES[:3]:
        assert Runner(out).generate(source) == Runner(path).generate(source)
    assert cli.main([*map(str, arguments), "--batch-size", "1"]) == 2
    assert "leave --sequence-length" in capsys.readouterr().err


def test_control_c_ends_it(files):
    """While it waits for a line and has written one."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "keras_distilled_embedding_cli"),
            *("generate", files["t5", "full"][1]),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # A shell's background jobs ignore the signal, and so do theirs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.stdin.write(f"{SOURCES[0]}\n")
    process.stdin.flush()
    assert process.stdout.readline().strip()
    time.sleep(0.5)  # until it waits: Python ignores it while it cleans up
    process.send_signal(signal.SIGINT)
    # Its input stays open: an end of it would end it, too.
    assert process.wait(timeout=60) == 130
    errors = process.communicate()[1]
    assert "Traceback" not in errors


def test_control_c_while_it_writes(files, interrupted, capsys):
    """What is written stays, and no traceback follows."""
    path, source = str(files["bart", "full"][1]), SOURCES[0]
    whole = Runner(path).generate(source)
    interrupted(after=4)
    assert cli.main(["generate", path, source]) == 130
    shown, errors = capsys.readouterr()
    assert errors == "" and shown.endswith("\n")
    assert 0 < len(shown) - 1 < len(whole) and whole.startswith(shown[:-1])
