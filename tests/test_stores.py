"""Models in stores that others fill: never changed there, and found by the names that those give them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from support.gguf_fixtures import LAYERS, write_model
from support.hf_cache import COMMIT, Repo

from lrope_gguf import read_factors, remove_factors, write_factors
from lrope_gguf.cli import main
from lrope_gguf.errors import LropeError
from lrope_gguf.stores import HUB, find_model, keeper, reference

OTHER = "f" * 40
SHA = "ab" * 32
FACTORS = "1,1.2,1.1,1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in an empty home, which is the current folder too."""
    for name in ("LLAMA_CACHE", *(name for name, _ in HUB)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".cache" / "huggingface" / "hub"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    path = write_model(tmp_path / "made.gguf")
    data = path.read_bytes()
    path.unlink()
    return data


def huggingface(root: Path, content: bytes) -> Path:
    return Repo(root / "hub", "me/m").add("m-Q4_K_M.gguf", content)


def blob(root: Path, content: bytes) -> Path:
    return huggingface(root, content).resolve()


def linked(root: Path, content: bytes) -> Path:
    path = root / "mine.gguf"
    path.symlink_to(huggingface(root, content))
    return path


def without_links(root: Path, content: bytes) -> Path:
    """As llama.cpp and `hf` store files where there are no links, as on some Windows systems."""
    path = huggingface(root, content)
    path.unlink()
    path.write_bytes(content)
    return path


def placed(*parts: str) -> Callable[[Path, bytes], Path]:
    def place(root: Path, content: bytes) -> Path:
        path = root.joinpath(*parts)
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return path

    return place


PLACES = {
    "a snapshot's link": (huggingface, "the Hugging Face cache"),
    "a blob": (blob, "the Hugging Face cache"),
    "a link to the link": (linked, "the Hugging Face cache"),
    "a snapshot's file": (without_links, "the Hugging Face cache"),
    "ollama": (placed("models", "blobs", f"sha256-{SHA}"), "the store of Ollama"),
    "docker": (placed("models", "blobs", "sha256", SHA), "the store of Docker"),
    "git lfs": (placed(".git", "lfs", "objects", "ab", "ab", SHA), "Git LFS's store"),
    "git-annex": (placed(".git", "annex", "objects", "x", f"SHA256E-s9--{SHA}.gguf"), "git-annex's store"),
    "a plain file": (placed("models", "m.gguf"), None),
    "hf download --local-dir": (placed("m", ".cache", "huggingface", "m.gguf"), None),
    "blobs of one's own": (placed("blobs", "m.gguf"), None),
}


@pytest.mark.parametrize(("place", "store"), PLACES.values(), ids=PLACES)
def test_a_store_is_never_changed(
    tmp_path: Path,
    content: bytes,
    capsys: pytest.CaptureFixture[str],
    place: Callable[[Path, bytes], Path],
    store: str | None,
) -> None:
    path = place(tmp_path, content)
    assert keeper(path) == store
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(content)
    commands = [
        ["write", str(path), "--factors", FACTORS],
        ["write", str(path), "--factors", FACTORS, "--dry-run"],
        ["write", str(plain), "--factors", FACTORS, "--output", str(path)],
    ]
    if store is None:
        assert [main(command) for command in commands] == [0] * len(commands)
        return
    hidden = [path.resolve(), *path.resolve().parent.iterdir()]
    for command in commands:
        assert main(command) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and f": is in {store}, where" in err
        assert "a copy elsewhere with --output" in err and "--rope-layer-factors best.json" in err
    assert path.read_bytes() == content and [path.resolve(), *path.resolve().parent.iterdir()] == hidden
    # what changes nothing there is free
    assert main(["show", str(path)]) == main(["remove", str(path)]) == 0
    assert main(["write", str(path), "--factors", FACTORS, "--output", str(tmp_path / "copy.gguf")]) == 0
    assert read_factors(tmp_path / "copy.gguf") == pytest.approx((1, 1.2, 1.1, 1))


def test_factors_that_a_store_holds_stay(tmp_path: Path, content: bytes) -> None:
    made = tmp_path / "m.gguf"
    made.write_bytes(content)
    write_factors(made, [1.0, 1.2, 1.1, 1.0])
    path = huggingface(tmp_path, made.read_bytes())
    assert write_factors(path, [1.0, 1.2, 1.1, 1.0]).how == "unchanged"
    for change in (lambda: write_factors(path, [1.1] * LAYERS), lambda: remove_factors(path)):
        with pytest.raises(LropeError, match="is in the Hugging Face cache"):
            change()
    assert path.is_symlink() and path.read_bytes() == made.read_bytes()


FILES = {
    "plain": ["m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "README.md"],
    "eight": ["m-F16.gguf", "m-Q8_0.gguf"],
    "first": ["m-F16.gguf", "m-Q2_K.gguf"],
    "split": [f"big/m-Q4_K_M-{i:05}-of-00003.gguf" for i in (1, 2, 3)] + ["m-F16.gguf"],
    "parts": ["mmproj-Q4_K_M.gguf", "mtp-m-Q4_K_M.gguf", "m-IQ4_XS.gguf", "imatrix-Q4_K_M.gguf"],
    "alike": ["m-Q4_K_XL.gguf", "m-UD-Q4_K_XL.gguf"],
}
NAMES = [
    ("me/plain", "m-Q4_K_M.gguf", "me/plain:Q4_K_M"), ("me/plain:Q8_0", "m-Q8_0.gguf", "me/plain:Q8_0"),
    ("me/plain:q2_k", "m-Q2_K.gguf", "me/plain:Q2_K"), ("me/eight", "m-Q8_0.gguf", "me/eight:Q8_0"),
    ("me/first", "m-F16.gguf", "me/first:F16"), ("me/split", "big/m-Q4_K_M-00001-of-00003.gguf", "me/split:Q4_K_M"),
    ("me/split:F16", "m-F16.gguf", "me/split:F16"), ("me/parts", "m-IQ4_XS.gguf", "me/parts:IQ4_XS"),
    ("me/alike:Q4_K_XL", "m-Q4_K_XL.gguf", "me/alike:Q4_K_XL"),
    ("me/alike:UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf", "me/alike:UD-Q4_K_XL"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "full"), NAMES)
def test_a_name_is_the_file_that_llama_server_takes(cache: Path, name: str, file: str, full: str) -> None:
    for repo, files in FILES.items():
        made = Repo(cache, f"me/{repo}")
        for one in files:
            made.add(one)
    folder = cache / f"models--{name.partition(':')[0].replace('/', '--')}" / "snapshots" / COMMIT
    assert find_model(name) == str(folder / file)
    assert reference(folder / file) == full
    assert find_model(full) == str(folder / file)


def test_the_commit_is_that_of_main(cache: Path) -> None:
    repo = Repo(cache, "me/m", (("a-branch", OTHER), ("main", COMMIT)))
    old, new = repo.add("m-Q4_K_M.gguf", commit=OTHER), repo.add("m-Q4_K_M.gguf")
    assert find_model("me/m") == str(new) and reference(old) is None
    (repo.folder / "refs" / "main").unlink()
    assert find_model("me/m") == str(old) and reference(new) is None


VARIABLES = [
    ({"LLAMA_CACHE": "own"}, "own", True),
    ({"LLAMA_CACHE": "own", "HF_HUB_CACHE": "hub"}, "hub", False),  # where `hf` would have put it
    ({"HF_HUB_CACHE": "hub", "HF_HOME": "other"}, "hub", True),
    ({"HUGGINGFACE_HUB_CACHE": "hub", "HF_HOME": "other"}, "hub", True),
    ({"HF_HOME": "home"}, "home/hub", True),
    ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub", True),
    ({"HF_HUB_CACHE": "", "HF_HOME": "home"}, "home/hub", True),
    ({}, ".cache/huggingface/hub", True),
]


@pytest.mark.parametrize(("variables", "folder", "server"), VARIABLES)
def test_where_the_cache_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str, server: bool
) -> None:
    home = Path.home()
    for name, value in variables.items():
        monkeypatch.setenv(name, value and str(home / value))
    path = Repo(home / folder, "me/m").add("m-Q4_K_M.gguf")
    assert find_model("me/m") == str(path)
    assert reference(path) == ("me/m:Q4_K_M" if server else None)  # llama-server looks into the first alone


def test_an_older_llama_cpps_cache(cache: Path) -> None:
    old = Path.home() / ".cache" / "llama.cpp"
    old.mkdir()
    for name in ("me_m_m-Q4_K_M.gguf", "me_m_m-Q8_0.gguf", "me_m_m-Q8_0.gguf.etag", "me_other_m-F16.gguf"):
        (old / name).write_bytes(b"")
    assert find_model("me/m:Q8_0") == str(old / "me_m_m-Q8_0.gguf")
    assert find_model("me/m") == str(old / "me_m_m-Q4_K_M.gguf")
    assert reference(find_model("me/m")) is None and keeper(find_model("me/m")) is None


def test_a_file_of_that_name_wins(cache: Path, tmp_path: Path) -> None:
    Repo(cache, "me/m").add("m-Q4_K_M.gguf")
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "m").write_bytes(b"")
    assert find_model("me/m") == "me/m"
    for name in ("me/x.gguf", "a/b/c", "plain", "me/", "/me/m", "./me", "x" * 300 + "/m:q q"):
        assert find_model(name) == name


BRING = "get it with llama-server -hf {0} or hf download {1} FILE"
MISSING = [
    ("you/none", "no such file, and this model is not in {cache} or {home}/.cache/llama.cpp; "
                 + BRING.format("you/none", "you/none")),
    ("me/m:Q6_K", "no such file, and {cache} has only Q4_K_M, Q8_0 of it; "
                  + BRING.format("me/m:Q6_K", "me/m")),
    ("me/empty", "no such file, and {cache} has only other files of it; " + BRING.format("me/empty", "me/empty")),
    ("me/broken:Q4_K_M", "its download is incomplete, {cache}/models--me--broken/"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message"), MISSING)
def test_what_is_missing_is_said(cache: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    repo = Repo(cache, "me/m")
    for file in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        repo.add(file)
    Repo(cache, "me/empty").add("README.md")
    Repo(cache, "me/broken").add("m-Q4_K_M.gguf").resolve().unlink()
    for command in ("show", "write --uniform 1.1", "remove", "search", "eval"):
        assert main([*command.split(), name]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith(f"lrope-gguf: {name}: ") and message.format(cache=cache, home=Path.home()) in err


def test_commands_take_names(cache: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = Repo(cache, "me/m").add("m-Q4_K_M.gguf", content)
    assert main(["show", "me/m"]) == 0
    assert str(path) in capsys.readouterr().out
    assert main(["write", "me/m:q4_k_m", "--factors", FACTORS, "--output", "copy.gguf"]) == 0
    assert main(["remove", "me/m"]) == 0
    assert path.read_bytes() == content

    from lrope_search.commands.search import next_command

    words = ["lrope-gguf", "write", "me/m:Q4_K_M", "--curve", "best.json", "--preset", "presets.ini"]
    assert next_command(str(path), "best.json") == shlex.join(words)
    assert next_command("copy.gguf", "best.json") == "lrope-gguf write copy.gguf --curve best.json"
