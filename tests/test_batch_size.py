"""Tokens a batch: by default what the device wants, and of a study what it was begun with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_search.evaluation.binding import llama_library
from lrope_search.evaluation.model import Model

pytestmark = pytest.mark.native

SEARCH = ["--set", "kv.identifiers=number", "--keys", "6", "--set", "kv.probes=3", "--max-evaluations", "3",
          "--set", "search_contexts=1",
          "--set", "validation_contexts=1", "--set", "test_contexts=1", "--threads", "1",
          "--max-kl", "100"]  # fmt: skip


def pretend_a_gpu(patch: pytest.MonkeyPatch, there: bool) -> None:
    patch.setattr(llama_library(), "llama_supports_gpu_offload", lambda: there)


def test_the_default_is_what_the_device_wants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_readable(tmp_path / "m.gguf")
    for gpu, n_gpu_layers, wanted in ((False, None, 512), (True, None, 2048), (True, 3, 2048), (True, 0, 512)):
        pretend_a_gpu(monkeypatch, gpu)
        with Model(path, n_gpu_layers=n_gpu_layers) as model:
            assert model.n_batch == wanted
        with Model(path, n_batch=100, n_gpu_layers=n_gpu_layers) as model:
            assert model.n_batch == 100


def test_a_study_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_readable(tmp_path / "m.gguf"))

    def run(name: str, *options: str) -> int:
        return main(["search", path, *SEARCH, "--output", str(tmp_path / f"{name}.json"), *options])

    def computing(name: str) -> dict[str, int | None]:
        document = json.loads((tmp_path / f"{name}.study" / "config.json").read_text())
        computing: dict[str, int | None] = document["computing"]
        return computing

    pretend_a_gpu(monkeypatch, False)
    assert run("cpu") == 0
    assert computing("cpu") == {"batch_size": 512, "n_gpu_layers": None}
    pretend_a_gpu(monkeypatch, True)
    assert run("cpu") == 0  # as studies on GPUs have 512 that are older than this default
    assert computing("cpu")["batch_size"] == 512
    assert run("gpu") == 0 and computing("gpu")["batch_size"] == 2048
    pretend_a_gpu(monkeypatch, False)
    assert run("gpu") == 0 and run("gpu", "--set", "batch_size=2048") == 0
    capsys.readouterr()
    assert run("gpu", "--set", "batch_size=512") == 1
    assert "computing.batch_size was 2048, is 512" in capsys.readouterr().err
    damaged = tmp_path / "cpu.study" / "config.json"
    damaged.write_text("{")
    assert run("cpu") == 1 and "config.json: is not JSON" in capsys.readouterr().err
