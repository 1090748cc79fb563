"""A headless Chromium, told what to do over its DevTools pipe."""

import itertools
import json
import os
import shutil
import signal
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find():
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab, until it is closed."""

    def __init__(self, folder):
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        command = [
            find(),
            "--headless",
            "--remote-debugging-pipe",  # it reads from 3 and writes to 4
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder}",
        ]
        self._process = os.posix_spawn(
            command[0],
            command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, read, 3),
                (os.POSIX_SPAWN_DUP2, write, 4),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        os.close(read)
        os.close(write)
        self._answers = os.fdopen(self._read, "rb")
        self._numbers = itertools.count(1)
        self._session = {}
        target = self.call("Target.createTarget", url="about:blank")
        session = self.call("Target.attachToTarget", flatten=True, **target)
        self._session = session

    def __enter__(self):
        return self

    def __exit__(self, *error):
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._write)
        self._answers.close()

    def call(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        content = json.dumps(message | self._session).encode() + b"\0"
        os.write(self._write, content)
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        content = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        return json.loads(content)

    def evaluate(self, expression):
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression, seconds=120):
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.1)
        return value
