"""Bundles for LiteRT-LM, against Keras's own generation.

The runtime itself generates here, from the bundle alone.
"""

import keras
import numpy as np
import pytest
from keras import ops

import keras_distilled_embedding_runner as runner_file
from keras_distilled_embedding import compress
from keras_distilled_embedding import export_litertlm
from keras_distilled_embedding.export import causal_lm
from keras_distilled_embedding.export import litertlm
from keras_distilled_embedding.export.tokenizers import StoredVocabulary
from keras_distilled_embedding.export.tokenizers import stored_vocabulary
from keras_distilled_embedding.layers import DistilledEmbedding
from keras_distilled_embedding_runner import Runner
from tests.vocabularies import byte_pairs
from tests.vocabularies import paragraphs
from tests.vocabularies import sentence_pieces

keras_hub = pytest.importorskip("keras_hub")
builder = pytest.importorskip("litert_lm_builder.litertlm_builder")
runtime = pytest.importorskip("litert_lm")

pytestmark = [
    # KerasHub's `fit` of texts, and a file that it does not close.
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings("ignore:Exception ignored in.*vocabulary.spm"),
]

VOCABULARY = 400
MAX_LENGTH = 48
PROMPTS = [
    "The return statement",
    "If a class",
    "An object",
    "Names refer to",
    "This is called when",
]


def llama():
    """With SentencePiece."""
    pieces = sentence_pieces(
        paragraphs(), VOCABULARY, pad_id=0, bos_id=1, eos_id=2, unk_id=3
    )
    tokenizer = keras_hub.tokenizers.LlamaTokenizer(pieces)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
        tie_word_embeddings=True,
    )
    return keras_hub.models.LlamaCausalLM(
        backbone,
        keras_hub.models.LlamaCausalLMPreprocessor(
            tokenizer, sequence_length=32
        ),
    )


def gpt2():
    """With byte pairs."""
    pairs = byte_pairs(paragraphs(), VOCABULARY, ["<|endoftext|>"])
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(*pairs)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(pairs[0]),
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=MAX_LENGTH,
    )
    return keras_hub.models.GPT2CausalLM(
        backbone,
        keras_hub.models.GPT2CausalLMPreprocessor(
            tokenizer, sequence_length=32
        ),
    )


@pytest.fixture(scope="module")
def tasks():
    keras.utils.set_random_seed(0)
    made = {"llama": llama(), "gpt2": gpt2()}
    for task in made.values():
        # So that they do not say one word again and again.
        task.compile(
            keras.optimizers.Adam(5e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            sampler="greedy",
            weighted_metrics=[],
        )
        task.fit(paragraphs()[:960], batch_size=16, epochs=2, verbose=0)
    return made


def generated(path, prompts):
    """What the runtime writes, a prompt at a time."""
    runtime.set_min_log_severity(runtime.LogSeverity.ERROR)
    processor = runtime.Backend.CPU(thread_count=1)
    found = []
    with runtime.Engine(str(path), processor, cache_dir=":nocache") as engine:
        for prompt in prompts:
            with engine.create_session(apply_prompt_template=False) as session:
                session.run_prefill([prompt])
                found.append(session.run_decode().texts[0])
    return found


def metadata(path, tmp_path):
    """What a bundle says of itself."""
    from google.protobuf import text_format
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    folder = tmp_path / "unpacked"
    builder.LitertLmFileBuilder.unpack(str(path), str(folder))
    text = (folder / "LlmMetadataProto.pbtext").read_text()
    return text_format.Parse(text, llm_metadata_pb2.LlmMetadata())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "compressed"), [("llama", True), ("gpt2", True), ("llama", False)]
)
def test_the_runtime_writes_what_keras_does(tasks, name, compressed, tmp_path):
    task = tasks[name]
    if compressed:
        task = compress(task, 4.0, quantization=None, verbose=0)
        task.compile(sampler="greedy")
    path = tmp_path / "model.litertlm"
    report = export_litertlm(
        task,
        path,
        max_length=MAX_LENGTH,
        prefill_lengths=[4, 16],
        prompts=paragraphs()[:2],
        verbose=False,
    )
    assert report.signatures == ("prefill_4", "prefill_16", "decode")
    assert report.tables == {"token_embedding": 1}
    assert report.bytes == path.stat().st_size
    assert report.fidelity.relative_rms_error < 1e-5
    assert report.fidelity.top1_agreement == 1.0
    assert report.fidelity.divergence < 1e-9
    found = generated(path, PROMPTS)
    for prompt, text in zip(PROMPTS, found):
        wanted = task.generate(
            prompt, max_length=MAX_LENGTH - 1, strip_prompt=True
        )
        assert text[: len(wanted)] == wanted
    # GPT-2 ends its text at once: its end is also its start and its padding.
    assert name == "gpt2" or min(map(len, found)) > 10


@pytest.fixture(scope="module")
def bundles(tasks, tmp_path_factory):
    """One of each tokenizer, read in pieces of four tokens."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {}
    for name, task in tasks.items():
        made[name] = folder / f"{name}.litertlm"
        export_litertlm(
            task,
            made[name],
            max_length=MAX_LENGTH,
            prefill_lengths=[4],
            verbose=False,
        )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_runner_writes_what_keras_does(tasks, bundles, name):
    """Without the runtime."""
    task, runner = tasks[name], Runner(bundles[name])
    bare = type(task)(backbone=task.backbone, preprocessor=None)
    bare.compile(sampler="greedy")
    stop = task.preprocessor.tokenizer.end_token_id
    for prompt in PROMPTS:
        # For GPT-2 without a stop: KerasHub takes its padding for an end.
        read = task.preprocessor.generate_preprocess(
            [prompt], sequence_length=MAX_LENGTH
        )
        start = int(np.asarray(read["padding_mask"]).sum())
        wanted = bare.generate(read, stop_token_ids=None)["token_ids"]
        wanted = np.asarray(wanted)[0].tolist()
        ids = list(runner.stream_ids(prompt))
        assert [*ids, stop][: MAX_LENGTH - start] == (
            wanted[start : start + len(ids) + 1]
        )
        # Ids are read as they are, in pieces or one by one.
        assert list(runner.stream_ids(wanted[:start])) == ids
        assert list(runner.stream_ids(prompt, max_tokens=3)) == ids[:3]
        if name == "llama":
            assert runner.generate(prompt) == task.generate(
                prompt, max_length=MAX_LENGTH, strip_prompt=True
            )


@pytest.mark.slow
def test_prompts_up_to_the_last_place(tasks, bundles):
    runner = Runner(bundles["llama"])
    stop = tasks["llama"].preprocessor.tokenizer.end_token_id
    found = []
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(4, VOCABULARY, MAX_LENGTH)
        whole = ids[None, :-1].astype("int32")
        logits = tasks["llama"](
            {"token_ids": whole, "padding_mask": np.ones_like(whole)}
        )
        (token,) = [*runner.stream_ids(ids[:-1]), stop][:1]
        assert token == np.asarray(logits)[0, -1].argmax()
        found.append(token)
    assert set(found) - {stop}
    with pytest.raises(
        ValueError, match=f"`prompt` must have 1 to {MAX_LENGTH - 1} tok"
    ):
        runner.generate(ids)
    with pytest.raises(ValueError, match="`prompt` must have 1 to"):
        runner.generate([])
    # Hypotheses have caches of their own.
    found = [
        list(runner.stream_ids(ids[:9], num_beams=beams, max_tokens=5))
        for beams in (1, 4)
    ]
    scores = []
    for answer in found:
        text = np.array([[*ids[:9], *answer]], "int32")
        row = np.asarray(
            tasks["llama"](
                {"token_ids": text, "padding_mask": np.ones_like(text)}
            ),
            "float64",
        )[0, 8:-1]
        row -= row.max(axis=-1, keepdims=True)
        row -= np.log(np.exp(row).sum(axis=-1, keepdims=True))
        scores.append(row[np.arange(len(answer)), answer].sum())
    assert scores[1] >= scores[0] - 1e-3


@pytest.mark.slow
def test_damaged_bundles(bundles, tmp_path):
    """No part of them is used."""
    whole = bundles["llama"].read_bytes()
    path = tmp_path / "model.litertlm"
    damaged = [whole[: int(share * len(whole))] for share in (1e-4, 0.3, 0.99)]
    for position in (len(whole) - 20_000, len(whole) - 1):
        content = bytearray(whole)
        content[position] ^= 1
        damaged.append(bytes(content))
    damaged += [whole[:8], whole[:40] + bytes(20_000)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"`model_path` must be .*writte"):
            Runner(path)


def rebuilt(path, folder, tokenizer=None, **settings):
    """A bundle of the same model with another tokenizer, other settings."""
    parts = runner_file._read_parts(path)
    (content,) = parts.tokenizer.values()
    model_file = folder / "model.tflite"
    model_file.write_bytes(parts.model)
    settings = parts.settings | settings
    changed = folder / "changed.litertlm"
    with changed.open("wb") as file:
        litertlm._bundle(
            model_file,
            StoredVocabulary(tokenizer or content, is_sentencepiece=True),
            settings,
            litertlm._metadata(settings, None),
            litertlm._state_buffers(causal_lm.CacheForm(False, 0, ())),
            folder,
        ).build(file)
    return changed


@pytest.mark.slow
def test_a_tokenizer_that_does_not_belong_there(bundles, tmp_path):
    other = sentence_pieces(paragraphs(), VOCABULARY + 50)
    changed = rebuilt(bundles["llama"], tmp_path, other)
    with pytest.raises(ValueError, match="450 pieces for a model of 400"):
        Runner(changed)


@pytest.mark.slow
def test_a_stop_that_is_never_met(bundles, tmp_path):
    """The text fills the caches; with one that is, it ends there."""
    ids = list(Runner(bundles["llama"]).stream_ids(PROMPTS[0]))
    unmet = next(i for i in range(4, VOCABULARY) if i not in ids)
    whole = Runner(rebuilt(bundles["llama"], tmp_path, stop_ids=[unmet]))
    longer = list(whole.stream_ids(PROMPTS[0]))
    start = len(whole._prompt_ids(PROMPTS[0]))
    assert longer[: len(ids)] == ids
    assert unmet in longer or len(longer) == MAX_LENGTH - start
    met = Runner(rebuilt(bundles["llama"], tmp_path, stop_ids=[ids[3]]))
    assert list(met.stream_ids(PROMPTS[0])) == ids[: ids.index(ids[3])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ids_out_of_range(bundles, name):
    runner = Runner(bundles[name])
    for wrong in (-1, runner.vocabulary_size):
        with pytest.raises(
            ValueError, match=rf"`prompt` must have ids from 0.*\[{wrong}\]"
        ):
            runner.generate([5, wrong])


@pytest.mark.slow
def test_control_c_while_it_writes(bundles, interrupted, capsys):
    """What is written stays, and no traceback follows."""
    path, prompt = str(bundles["llama"]), PROMPTS[0]
    whole = Runner(path).generate(prompt)
    interrupted(after=12)
    assert runner_file.main([path, prompt]) == 130
    shown, errors = capsys.readouterr()
    assert errors == "" and shown.endswith("\n")
    assert 0 < len(shown) - 1 < len(whole) and whole.startswith(shown[:-1])


@pytest.mark.slow
def test_in_few_bits(tasks, tmp_path):
    """Smaller, and as near as the table's rounding lets it be."""
    sizes, divergences = [], []
    for quantization in ("int8", "int2"):
        report = export_litertlm(
            tasks["llama"],
            tmp_path / "model.litertlm",
            max_length=MAX_LENGTH,
            prefill_lengths=[4],
            quantization=quantization,
            prompts=paragraphs()[:2],
            verbose=False,
        )
        sizes.append(report.table_bytes["token_embedding"])
        divergences.append(report.fidelity.divergence)
    assert sizes[1] < 0.7 * sizes[0]  # the scales of rows take as much
    assert divergences[0] < 1e-3 < divergences[1] < 0.5
    # What was there is replaced; nothing else is left.
    assert [path.name for path in tmp_path.iterdir()] == ["model.litertlm"]
    assert len(generated(tmp_path / "model.litertlm", PROMPTS[:1])[0]) > 10


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompts_start_as_kerashubs(tasks, name, starts):
    """Which takes a start token for prompts, whatever it trains with."""
    old = tasks[name].preprocessor
    preprocessor = type(old)(old.tokenizer, 32, add_start_token=starts)
    read = preprocessor.generate_preprocess([PROMPTS[0]])
    length = int(np.asarray(read["padding_mask"]).sum())
    ids = np.asarray(read["token_ids"])[0, :length].tolist()
    start = litertlm._settings(preprocessor, 32)["start_ids"]
    assert start and ids == [*start, *map(int, old.tokenizer(PROMPTS[0]))]


def test_byte_pairs_are_kerashubs(tasks):
    """The stored description of a tokenizer, read by another library."""
    import tokenizers

    tokenizer = tasks["gpt2"].preprocessor.tokenizer
    stored = stored_vocabulary(tokenizer)
    read = tokenizers.Tokenizer.from_str(stored.content.decode())
    assert not stored.is_sentencepiece
    for text in [*paragraphs()[:20], "1234.5  x\n\n\ty's caf\u00e9 \U0001f600"]:
        assert read.encode(text).ids == [int(i) for i in tokenizer(text)]
    end = read.encode("a<|endoftext|>b").ids
    assert end.count(tokenizer.end_token_id) == 1


def test_a_bundle_knows_its_tokens(tasks, tmp_path):
    path = tmp_path / "model.litertlm"
    before = [np.asarray(w) for w in tasks["gpt2"].weights]
    preprocessor = tasks["gpt2"].preprocessor
    export_litertlm(
        tasks["gpt2"],
        path,
        max_length=16,
        prompt_template="{{ messages[0].content }}",
        verbose=False,
    )
    found = metadata(path, tmp_path)
    tokenizer = preprocessor.tokenizer
    assert found.max_num_tokens == 16
    assert [*found.start_token.token_ids.ids] == [tokenizer.start_token_id]
    (stop,) = found.stop_tokens
    assert [*stop.token_ids.ids] == [tokenizer.end_token_id]
    assert found.jinja_prompt_template == "{{ messages[0].content }}"
    assert tasks["gpt2"].preprocessor is preprocessor
    for weight, old in zip(tasks["gpt2"].weights, before):
        np.testing.assert_array_equal(np.asarray(weight), old)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"task": "a model"},
            TypeError,
            "`keras_hub.models.CausalLM`.*'a model'",
        ),
        ({"max_length": 1}, ValueError, "at least 2. Received: max_length=1"),
        ({"max_length": 49}, ValueError, "at most 48, .* max_length=49"),
        ({"prefill_lengths": []}, ValueError, r"Received: prefill_lengths=\[]"),
        (
            {"prefill_lengths": [8, 17]},
            ValueError,
            r"at most max_length=16. Received: prefill_lengths=\[8, 17]",
        ),
        (
            {"prefill_lengths": [0]},
            ValueError,
            "positive integer. Received: prefill_lengths=0",
        ),
        ({"prompts": "one"}, ValueError, "list of texts. Received: prompts='o"),
        ({"quantization": "int3"}, ValueError, "Received: quantization='int3'"),
        ({"filepath": "no/such/folder/x"}, FileNotFoundError, "no/such"),
    ],
)
def test_bad_use(tasks, change, error, message, tmp_path):
    """Is told before any work, and leaves what was there."""
    path = tmp_path / "model.litertlm"
    path.write_text("as it was")
    arguments = {"task": tasks["gpt2"], "filepath": path, "max_length": 16}
    with pytest.raises(error, match=message):
        export_litertlm(**arguments | change, verbose=False)
    assert path.read_text() == "as it was"
    assert [*tmp_path.iterdir()] == [path]


def test_tasks_that_cannot_be_bundled(tasks, tmp_path):
    task, path = tasks["gpt2"], tmp_path / "model.litertlm"
    bare = keras_hub.models.GPT2CausalLM(task.backbone, None)
    with pytest.raises(ValueError, match="tokenizer.*preprocessor=None"):
        export_litertlm(bare, path, max_length=16)

    class Words(keras_hub.tokenizers.WordPieceTokenizer):
        pass

    class Preprocessor:
        tokenizer = Words(["[UNK]", "a"])

    bare.preprocessor = Preprocessor()
    with pytest.raises(ValueError, match="byte-pair.* Received: Words"):
        export_litertlm(bare, path, max_length=16)
    assert not path.exists()


def test_steps_read_a_text_as_the_whole_does(tasks):
    """Through the caches, in pieces of any size."""
    student = compress(tasks["llama"], 4.0, quantization=None, verbose=0)
    (layer,) = (
        x
        for x in student._flatten_layers()
        if isinstance(x, DistilledEmbedding)
    )
    assert layer.name == "token_embedding"
    form, models = causal_lm.step_models(student, 12, [2, 5])
    assert (form.num_layers, form.shape) == (2, (1, 12, 2, 16))
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(1, 8))
    ids = ids.astype("int32")
    whole = student({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    state, start = causal_lm.empty_caches(form), 0
    for name, length in (("prefill_5", 5), ("prefill_2", 2), ("decode", 1)):
        positions = np.arange(start, start + length, dtype="int32")
        state = models[name](
            {
                "tokens": ops.convert_to_tensor(ids[:, positions]),
                "input_pos": ops.convert_to_tensor(positions),
                **keras.tree.map_structure(ops.convert_to_tensor, state),
            }
        )
        start += length
    np.testing.assert_allclose(
        np.asarray(state["logits"])[0, 0],
        np.asarray(whole)[0, -1],
        atol=1e-4,
    )
