"""What LiteRT-LM does with a bundle, for processes that do without Keras."""

from __future__ import annotations

from benchmarks import harness

PROMPTS = [
    "The capital of France is",
    "To read a file in Python, you",
    "Once upon a time",
    "The most important thing about databases is",
    "A tokenizer is",
]
MAX_LENGTH, PREFILLED, DECODED = 128, 64, 32
SPEED_NAMES = "prefill", "decode", "load_s"


def write_with(path: str) -> dict:
    """What the runtime writes after the prompts, and in which memory.

    Args:
        path: Of the bundle.
    """
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    processor = litert_lm.Backend.CPU(thread_count=2)
    before = harness.peak_mb()
    texts = []
    with litert_lm.Engine(path, processor, cache_dir=":nocache") as engine:
        for prompt in PROMPTS:
            with engine.create_session(apply_prompt_template=False) as session:
                session.run_prefill([prompt])
                texts.append(session.run_decode().texts[0])
    return {"texts": texts, "peak_mb": round(harness.peak_mb() - before)}


def speeds_of(path: str, threads: int) -> list[float]:
    """One run of the runtime's own benchmark.

    Args:
        path: Of the bundle.
        threads: Number of threads.

    Returns:
        Tokens a second and seconds, in the order of `SPEED_NAMES`.
    """
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    info = litert_lm.Benchmark(
        path,
        litert_lm.Backend.CPU(thread_count=threads),
        prefill_tokens=PREFILLED,
        decode_tokens=DECODED,
        max_num_tokens=MAX_LENGTH,
        cache_dir=":nocache",
    ).run()
    return [
        info.last_prefill_tokens_per_second,
        info.last_decode_tokens_per_second,
        info.init_time_in_second,
    ]
