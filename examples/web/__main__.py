"""Builds the page and serves it: `python -m examples.web --help`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SOURCE = Path(__file__).parent
# The models of a work directory of `examples.nmt`, as they are shown.
TRANSLATORS = {
    "teacher": "Full table, int8",
    "student": "Compressed table, int8",
}


def bundle(folder: Path) -> None:
    """Writes the page, its one script and LiteRT.js's runtime to `folder`."""
    if shutil.which("npm") is None:
        raise OSError("npm is missing: install Node.js, which bundles the page")
    modules = SOURCE / "node_modules"
    installed = modules / ".package-lock.json"
    if not installed.exists() or (
        installed.stat().st_mtime
        < (SOURCE / "package-lock.json").stat().st_mtime
    ):
        _run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    esbuild = [modules / ".bin" / "esbuild", "page.js", "--bundle", "--minify"]
    _run(*esbuild, "--format=esm", "--log-level=warning", f"--outdir={folder}")
    for name in ("index.html", "sw.js"):
        shutil.copy(SOURCE / name, folder)
    (folder / "wasm").mkdir(exist_ok=True)
    # Without threads; "compat" is for browsers without relaxed SIMD.
    for kind in ("", "compat_"):
        for end in ("js", "wasm"):
            file = f"litert_wasm_{kind}internal.{end}"
            shutil.copy(
                modules / "@litertjs" / "core" / "wasm" / file, folder / "wasm"
            )


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), cwd=SOURCE, check=True)


def export(work_dir: Path, folder: Path) -> None:
    """Writes the translators of `work_dir`, and a list of them, to `folder`.

    A browser needs fixed sizes: a batch of one, and sentences that are padded
    to the longest.
    """
    import keras

    import keras_distilled_embedding as kde
    from examples.nmt.data import load_corpus
    from examples.nmt.stepwise import embed_vocabulary
    from examples.nmt.stepwise import stepwise_signatures

    settings = json.loads((work_dir / "settings.json").read_text())
    length = settings["batching"]["widths"][-1]
    translators = []
    for name, shown_name in TRANSLATORS.items():
        model = keras.saving.load_model(
            work_dir / f"{name}.keras", compile=False
        )
        file = folder / f"{name}.tflite"
        report = kde.export_litert(
            model,
            file,
            quantization="int8",
            signatures=stepwise_signatures(model, length),
            batch_size=1,
            sequence_length=length,
        )
        embed_vocabulary(
            file, work_dir / "vocabulary.spm", model, max_length=length
        )
        translators.append(
            {
                "name": shown_name,
                "file": file.name,
                "table_bytes": sum(report.table_bytes.values()),
            }
        )
    text = load_corpus(settings["dataset"], seed=settings["seed"]).test
    content = {"translators": translators, "examples": text.source[:3]}
    (folder / "translators.json").write_text(json.dumps(content), "utf-8")


class Handler(SimpleHTTPRequestHandler):
    """Static files, whatever this computer takes their endings for."""

    extensions_map = {
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".wasm": "application/wasm",
        "": "application/octet-stream",
    }

    def end_headers(self) -> None:
        # Kept, but asked about: a page that is built again is seen at once.
        self.send_header("Cache-Control", "no-cache")
        # Browsers measure time more finely for a page that is on its own.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    handler = partial(Handler, directory=str(folder))
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.web",
        description="Builds a page that translates in a browser; serves it.",
    )
    add = parser.add_argument
    add("--work-dir", type=Path, default="runs/cldr", help="of examples.nmt")
    add("--folder", type=Path, default=SOURCE / "build", help="of the page")
    add("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        bundle(options.folder.resolve())
        export(options.work_dir, options.folder)
        with server(options.folder, options.port) as pages:
            print(f"http://localhost:{options.port}", flush=True)
            pages.serve_forever()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
