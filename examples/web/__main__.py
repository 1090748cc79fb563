"""Builds the page and serves it: `python -m examples.web --help`."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path

from keras_distilled_embedding_cli import quiet_frameworks

SOURCE = Path(__file__).parent
# The models of a work directory of `examples.nmt`: what they are called, and
# how they are stored, by default as they were trained.
TRANSLATORS = {
    "teacher": ("Full table", "int8"),
    "student": ("Compressed table", None),
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

    from examples.nmt.stepwise import write_file

    settings = json.loads((work_dir / "settings.json").read_text())
    length = settings["batching"]["widths"][-1]
    translators = []
    for name, (title, quantization) in TRANSLATORS.items():
        file = folder / f"{name}.tflite"
        report = write_file(
            keras.saving.load_model(work_dir / f"{name}.keras", compile=False),
            file,
            work_dir / "vocabulary.spm",
            length,
            quantization=quantization,
            batch_size=1,
            sequence_length=length,
        )
        translators.append(
            {
                "name": f"{title}, {report.quantization}",
                "file": file.name,
                "table_bytes": sum(report.table_bytes.values()),
            }
        )
    test = (work_dir / "test_source.txt").read_text("utf-8").split("\n")
    content = {"translators": translators, "examples": test[:3]}
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
        with quiet_frameworks():
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
