"""A patched `llama-server` on this machine, for as long as a block runs."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lrope_gguf.errors import LropeError
from lrope_gguf.native import tool_path

_START_SECONDS = 300.0
_ANSWER_SECONDS = 600.0


class LlamaServer:
    """`llama-server` on a free port of 127.0.0.1; entering the block waits for the model, leaving it stops the server.

    Raises `LropeError`: there is no `llama-server`, or it ends or hangs before the model is loaded.

    Args:
        model: GGUF file.
        n_ctx: Tokens of context.
        n_threads: CPU threads; None: the server's choice.
        options: Further options of `llama-server`.

    Attributes:
        url: Where it answers, without a path; inside the block.
    """

    def __init__(
        self, model: Path | str, n_ctx: int, *, n_threads: int | None = None, options: Sequence[str] = ()
    ) -> None:
        self._model = model
        threads = [] if n_threads is None else ["--threads", str(n_threads)]
        self._command = [
            *(str(tool_path("llama-server")), "--model", str(model), "--ctx-size", str(n_ctx), "--parallel", "1"),
            *("--host", "127.0.0.1", *threads, *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LlamaServer:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        try:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            command, log = [*self._command, "--port", str(port)], self._log
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._log.close()

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def complete(self, prompt: str | Sequence[int], n_predict: int) -> str:
        """Return the greedy continuation of a prompt (text, or its tokens), at most ``n_predict`` tokens.

        A prompt that begins like the one before it reuses its KV cache. Raises `LropeError`: the server fails or ends.
        """
        text = prompt if isinstance(prompt, str) else list(prompt)
        request = {"prompt": text, "n_predict": n_predict, "temperature": 0.0, "cache_prompt": True}
        return str(self._ask("/completion", request)["content"])

    def properties(self) -> dict[str, Any]:
        """Return what the server says of itself (``/props``). Raises `LropeError`: the server fails or ends."""
        answer: dict[str, Any] = self._ask("/props")
        return answer

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(LropeError):
                self._ask("/health")
                return
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                last = next((line for line in reversed(self.log.splitlines()) if line.strip()), "no output")
                raise LropeError(f"{self._model}: llama-server does not start: {last}")
            time.sleep(0.1)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        # never through a proxy: the server is on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_ANSWER_SECONDS) as response:
                return json.load(response)
        except (OSError, ValueError) as error:
            raise LropeError(f"{self._model}: llama-server does not answer {path}: {error}") from error
