"""Entries for `llama-server --models-preset`: factors for a model that stays as it is."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from support.gguf_fixtures import write_model
from support.hf_cache import Repo
from support.tiny_models import write_readable

from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_gguf.native import tool_path
from lrope_gguf.presets import plan_preset, write_preset

NEW = {"model": "/m.gguf", "rope-layer-factors": "1,1.2"}
LINES = "model = /m.gguf\nrope-layer-factors = 1,1.2\n"

FILES = [
    # before, after, what the entry [a] keeps of what decides whether factors are good
    (None, f"[a]\n{LINES}", {}),
    ("", f"[a]\n{LINES}", {}),
    ("version = 1\n", f"version = 1\n\n[a]\n{LINES}", {}),
    ("[b]\nmodel = /b.gguf", f"[b]\nmodel = /b.gguf\n\n[a]\n{LINES}", {}),
    ("[b]\nm = /b.gguf\n\n", f"[b]\nm = /b.gguf\n\n[a]\n{LINES}", {}),
    ("[a]", f"[a]\n{LINES}", {}),
    ("[a]\nm = /x\n", f"[a]\n{LINES}", {}),
    ("; of mine\n[ a ] # so\nctx-size = 99 ; y\nhf = x/y:Q8_0\n\n# é\n[b]\nm=/a\n",
     f"; of mine\n[ a ] # so\n{LINES}ctx-size = 99 ; y\n\n# é\n[b]\nm=/a\n", {}),
    ("[a]\r\nLLAMA_ARG_MODEL = /x\r\nc = 1\r\n[*]\r\nd = 2\r\n",
     "[a]\r\n" + LINES.replace("\n", "\r\n") + "c = 1\r\n[*]\r\nd = 2\r\n", {}),
    ("[a]\nm = /1\n[b]\n[a]\nm = /2\n", f"[a]\nm = /1\n[b]\n[a]\n{LINES}", {}),  # the last counts
    ("[a]\nrope-scale = 2 # x\nctk = q8_0\nctx-size = 1\n",
     f"[a]\n{LINES}rope-scale = 2 # x\nctk = q8_0\nctx-size = 1\n",
     {"rope-scale": "2", "ctk": "q8_0"}),
    ("[b]\nalias = \udcff\n", f"[b]\nalias = \udcff\n\n[a]\n{LINES}", {}),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "kept"), FILES)
def test_all_else_stays(tmp_path: Path, before: str | None, after: str, kept: dict[str, str]) -> None:
    path = tmp_path / "p.ini"
    if before is not None:
        path.write_bytes(before.encode("utf-8", "surrogateescape"))
    assert plan_preset(path, "a", NEW) == kept
    assert (path.read_bytes() if path.exists() else None) == (
        before if before is None else before.encode("utf-8", "surrogateescape")
    )
    for _ in range(2):  # once more changes nothing
        assert write_preset(path, "a", NEW) == kept
        assert path.read_bytes() == after.encode("utf-8", "surrogateescape")


def test_a_quant_is_compared_as_llama_server_does(tmp_path: Path) -> None:
    path = tmp_path / "p.ini"
    path.write_text("[me/m:q4_k_m]\nctx-size = 1\n[x:y]\n")
    write_preset(path, "me/m:Q4_K_M", NEW)
    assert path.read_text() == f"[me/m:q4_k_m]\n{LINES}ctx-size = 1\n[x:y]\n"


REFUSED = [
    ("\ufeff[b]\n", "a", NEW, "p.ini: llama-server cannot read line 1;"),
    ("[b]\n  m = 1\n", "a", NEW, "p.ini: llama-server cannot read line 2;"),
    ("[b]\nnonsense\n", "a", NEW, "cannot read line 2"),
    ("", "a]b", NEW, "--preset-name 'a]b': cannot name an entry"),
    ("", "", NEW, "--preset-name '': cannot name"),
    ("", "a\nb", NEW, "cannot name"),
    ("", "*", NEW, "cannot name"),
    ("", "default", NEW, "cannot name"),
    ("", "a", {"model": "/x;y"}, "model = '/x;y' has a character that a preset cannot store"),
    ("", "a", {"model": "/x#y"}, "cannot store"),
    ("", "a", {"model": "/x\n[b]"}, "cannot store"),
    ("", "a", {"model": "/x "}, "cannot store"),
]


@pytest.mark.parametrize(("before", "name", "options", "message"), REFUSED)
def test_what_cannot_be_held_is_refused(
    tmp_path: Path, before: str, name: str, options: dict[str, str], message: str
) -> None:
    path = tmp_path / "p.ini"
    path.write_text(before)
    for function in (plan_preset, write_preset):
        with pytest.raises(LropeError) as refused:
            function(path, name, options)
        assert message in str(refused.value)
    assert path.read_text() == before


def test_write_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    model = write_model(tmp_path / "my model.gguf")
    before = model.read_bytes()
    provenance = {
        "rope": {"scaling": "linear", "freq_scale": 0.5},
        "config": {"llama_options": {"cache_type_k": "q8_0"}},
    }
    document = {"format": "lrope-curve", "version": 1, "layer_factors": [1, 1.2, 1.1, 1], "provenance": provenance}
    (tmp_path / "best.json").write_text(json.dumps(document))
    command = ["write", "my model.gguf", "--curve", "best.json", "--preset", "my presets.ini"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.endswith("next: llama-server --models-preset 'my presets.ini'\n") and err == ""
    written = (tmp_path / "my presets.ini").read_text()
    assert written.startswith(f"[my-model-lrope]\nmodel = {tmp_path}/my model.gguf\nrope-layer-factors = 1,1.2,1.1,1\n")

    # one of the server's cache goes by its name, and what an entry keeps beside is said
    Repo(tmp_path / "cache", "me/m").add("m-Q4_K_M.gguf", before)
    assert main([*command[:1], "me/m", *command[2:-1], "p.ini", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "p.ini").read_text().startswith("[m-Q4_K_M-lrope]\nhf = me/m:Q4_K_M\nrope-layer-factors = 1,")
    assert main(["write", "me/m", "--uniform", "1.5", "--preset", "p.ini"]) == 0
    out, err = capsys.readouterr()
    assert "[m-Q4_K_M-lrope] keeps rope-scaling = linear, rope-freq-scale = 0.5, cache-type-k = q8_0; " in err
    assert main(["write", "me/m", "--uniform", "1.5", "--preset", "p.ini", "--preset-name", "me/m:Q4_K_M"]) == 0
    assert (
        "\n\n[me/m:Q4_K_M]\nhf = me/m:Q4_K_M\nrope-layer-factors = 1.5,1.5,1.5,1.5\n"
        in (tmp_path / "p.ini").read_text()
    )

    hashed = tmp_path / "blobs" / f"sha256-{'a' * 64}"
    hashed.parent.mkdir()
    hashed.write_bytes(before)
    assert main(["write", str(hashed), "--uniform", "1.5", "--preset", "q.ini"]) == 0
    assert (tmp_path / "q.ini").read_text().startswith(f"[Tiny-lrope]\nmodel = {hashed}\n")
    assert model.read_bytes() == hashed.read_bytes() == before


@pytest.mark.native
def test_the_router_serves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a path, and by the name of a model of its cache, beside the base model: the file holds no factors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
    data = write_readable(tmp_path / "tiny model.gguf").read_bytes()
    Repo(tmp_path / "cache", "me/m").add("m-Q8_0.gguf", data)
    factors = [1.0, 1.3, 0.8, 2.5, 1.07, 3.1]
    listed = ",".join(map(str, factors))
    assert main(["write", "tiny model.gguf", "--factors", listed, "--preset", "p.ini"]) == 0
    assert main(["write", "me/m", "--uniform", "1.5", "--preset", "p.ini"]) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(tool_path("llama-server")), "--models-preset", "p.ini", "--offline", "-c", "256", "-t", "1"]
    url = f"http://127.0.0.1:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def factors_of(name: str) -> list[float]:
        body = json.dumps({"model": name, "prompt": "a", "n_predict": 1}).encode()
        request = urllib.request.Request(f"{url}/completion", body, {"Content-Type": "application/json"})
        opener.open(request, timeout=120).close()  # loads it
        with opener.open(f"{url}/props?model={name}", timeout=60) as answer:
            served: list[float] = json.load(answer)["rope_layer_factors"]
        return served

    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    opener.open(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            assert factors_of("tiny-model-lrope") == pytest.approx(factors)
            assert factors_of("m-Q8_0-lrope") == pytest.approx([1.5] * 6)
            assert factors_of("me/m:Q8_0") == pytest.approx([1.0] * 6)
        finally:
            server.terminate()
            server.wait(30)
