"""A study: the directory of one search run, safe against a kill at any instant."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from lrope_gguf.curve import CurveFile
from lrope_gguf.errors import LropeError
from lrope_gguf.files import atomic_write_text, write_all, write_error

from ..optimizers.protocol import Candidate, Score
from ..scores import GUARD, ContextScore, DivergenceScore, Evaluation, Job, ProbeScore, read_factors, rows_of

T = TypeVar("T")

_ADVICE = "delete that line (its evaluation is then made again) or "
_KEPT = "what was recorded is kept: the same command resumes"


class Study:
    """Config, results and best curve of one search, for one process at a time.

    ``config.json`` holds all that decides the results and is written once. ``evaluations.jsonl`` gets one line a
    result, on disk before `record` returns. ``best.json`` is a curve file, replaced atomically. ``candidates.jsonl``
    gets one line a candidate and is written anew by every run, replay included: it is for reports, and no search
    reads it. ``log.txt`` is for people. Resume is replay: a search that starts again finds every result that was
    recorded through `lookup`, so that a kill costs at most what was in flight.

    Args:
        directory: Made if it is missing.
        config: JSON object; it must equal the one that the study was begun with, but for the names of files whose
            content is the same, and for its ``versions``, which `changed_versions` then tells.

    Raises:
        LropeError: another process uses the directory, the config differs (each difference is named), a
            file is damaged, or the directory cannot be written.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = json.loads(json.dumps(config))  # as it comes back from disk
        self._results: dict[Job, Evaluation] = {}
        # of programs whose version is another one than when the study was begun: that one and this
        self.changed_versions: dict[str, tuple[Any, Any]] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LropeError(f"{directory}: cannot be used ({error.strerror}); choose another directory") from None
        try:
            self._acquire()
            self._check_config()
            self._evaluations = Journal(self.directory / "evaluations.jsonl", _parse, _ADVICE)
            if self._evaluations.torn:
                self._evaluations.append()
                line = len(self._evaluations.records) + 1
                self.log(f"dropped the torn last line of evaluations.jsonl (line {line})")
            for job, score in self._evaluations.records:
                self._results.setdefault(job, score)
        except OSError as error:
            os.close(self._lock)
            raise write_error(self.directory, error, _KEPT) from None
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._results)

    def close(self) -> None:
        """Let others use the directory."""
        os.close(self._lock)

    @property
    def results(self) -> Mapping[Job, Evaluation]:
        """Every result on record."""
        return self._results

    def lookup(self, job: Job) -> Evaluation | None:
        """Return the recorded result of ``job``, if there is one."""
        return self._results.get(job)

    def record(self, job: Job, score: Evaluation) -> None:
        """Append a result; it is on disk when this returns.

        Raises `LropeError`: it could not be written, as on a full disk.
        """
        self._evaluations.append(_record(job, score))
        self._results[job] = score

    @staticmethod
    def kept(directory: Path, name: str) -> Any:
        """Return what an earlier run in ``directory`` kept as ``name``; None if there is no such thing.

        Raises `LropeError`: the file is damaged.
        """
        path = Path(directory) / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            return None
        except (ValueError, RecursionError) as error:
            raise LropeError(f"{path}: is not JSON ({error}); choose another study directory") from None

    def keep(self, name: str, value: Any) -> None:
        """Keep what another machine might find otherwise, unless it was kept before."""
        path = self.directory / f"{name}.json"
        if not path.exists():
            atomic_write_text(path, json.dumps(value) + "\n")

    def begin_candidates(self) -> None:
        """Forget the candidates of an earlier run: replay tells them again."""
        self._write_candidates("w", "")

    def record_candidate(self, candidate: Candidate, score: Score) -> None:
        """Note a candidate whose score is final."""
        contexts, fitness = score
        record = {
            "id": candidate.id,
            "origin": candidate.origin,
            "control_points": candidate.control_points,
            "factors": candidate.factors,
            **rows_of(candidate.factors),
            "contexts": contexts,
            "fitness": _encode(fitness),
        }
        self._write_candidates("a", json_line(record).decode())

    def _write_candidates(self, mode: str, text: str) -> None:
        path = self.directory / "candidates.jsonl"
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise write_error(path, error, _KEPT) from None

    def save_best(self, best: CurveFile) -> None:
        """Replace ``best.json`` in one atomic step."""
        best.save(self.directory / "best.json")

    def log(self, line: str) -> None:
        """Append ``line`` to ``log.txt`` with the local time before it."""
        try:
            with (self.directory / "log.txt").open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {line}\n")
        except OSError as error:
            raise write_error(self.directory / "log.txt", error, _KEPT) from None

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise LropeError(
                f"{self.directory}: another search is using this study (process {owner}); "
                "wait for it to end or choose another study directory"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _check_config(self) -> None:
        path = self.directory / "config.json"
        if not path.exists():
            if (self.directory / "evaluations.jsonl").exists():
                raise LropeError(f"{path}: is missing, but there are evaluations; choose another study directory")
            atomic_write_text(path, json.dumps(self.config, indent=2, sort_keys=True) + "\n")
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LropeError(f"{path}: is not JSON ({error}); choose another study directory") from None
        differences = []
        for key, old, new in _differences(stored, self.config):
            if key.startswith("versions."):
                self.changed_versions[key.removeprefix("versions.")] = (old, new)
            else:
                differences.append(f"{key} was {_show(old)}, is {_show(new)}")
        if differences:
            raise LropeError(
                f"{path}: the study was begun with other settings: {', '.join(differences)}; "
                "use the same settings or choose another study directory"
            )


def holds_search(config: Any) -> bool:
    """Return whether a directory's ``config.json`` is of a search, and not of what `measure` keeps.

    Old searches did not say how they computed; a measurement always does.
    """
    return not (isinstance(config, dict) and "computing" in config and "search" not in config)


def parse_evaluations(data: bytes, path: Path) -> tuple[list[tuple[Job, Evaluation]], int]:
    """Return the results in the bytes of an ``evaluations.jsonl``, line by line, and the length of the whole lines.

    A last line that is torn is left out. Raises `LropeError`: another line is damaged; ``path`` stands for the file in
    the message.
    """
    return _whole_lines(data, path, _parse, _ADVICE)


def _whole_lines(data: bytes, path: Path, parse: Callable[[bytes], T], advice: str = "") -> tuple[list[T], int]:
    lines = data.splitlines(keepends=True)
    results: list[T] = []
    end = 0
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn")
            results.append(parse(line))
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                raise LropeError(f"{path}: line {number} is damaged; {advice}choose another study directory") from None
        else:
            end += len(line)
    return results, end


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return a JSON object as a line."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def json_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. Raises `ValueError`: it is something else."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("no object")
    return record


class Journal(Generic[T]):
    """A file of JSON objects in a study, a line each, on disk before `append` returns; a torn last line is dropped.

    Args:
        path: Of the file, which need not exist yet.
        parse: Makes a record of a line.
        advice: What else to do where another line is damaged.

    Attributes:
        records: Of all lines.
        torn: Whether there was a torn last line.

    Raises:
        LropeError: it cannot be read, or another line than the last is damaged.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T], advice: str = "") -> None:
        self._path, self._parse = path, parse
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise LropeError(f"{path}: cannot be read ({error.strerror}); choose another study directory") from None
        self.records, self._end = _whole_lines(data, path, parse, advice)
        self.torn = self._end < len(data)

    def append(self, *records: Mapping[str, Any]) -> None:
        """Add objects; without any, drop what is torn. Raises `LropeError`: the file could not be written."""
        lines = [json_line(record) for record in records]
        try:
            with self._path.open("ab", buffering=0) as file:
                file.truncate(self._end)
                try:
                    write_all(file, b"".join(lines))
                    os.fsync(file.fileno())
                except OSError:
                    with contextlib.suppress(OSError):
                        file.truncate(self._end)
                    raise
        except OSError as error:
            raise write_error(self._path, error, _KEPT) from None
        self._end += sum(map(len, lines))
        self.records += map(self._parse, lines)


def _record(job: Job, score: Evaluation) -> dict[str, Any]:
    record: dict[str, Any] = {
        "factors": job.factors,
        **rows_of(job.factors),
        "split": job.split,
        "index": job.index,
        "n_tokens": score.n_tokens,
        "seconds": score.seconds,
        "probes": [[depth, _encode(log_probability), correct] for depth, log_probability, correct in _probes(score)],
    }
    if isinstance(score, ContextScore) and score.task:
        record["task"] = score.task
    return record


def _probes(score: Evaluation) -> Iterator[tuple[float, float, float]]:
    """Yield the depth, log-probability and correctness of each probe, as they stand in a line.

    A divergence stands there as it always has: as two probes, of short texts at depth 0 and of the long one at
    depth 1, with minus the KL divergence for a log-probability. `_parse` turns that back.
    """
    if isinstance(score, DivergenceScore):
        for depth, kl in ((0.0, score.short), (1.0, score.long)):
            yield depth, -kl, math.isfinite(kl)
    else:
        for probe in score.probes:
            yield probe.depth, probe.log_probability, probe.correct


def _encode(value: float) -> float | str:
    """JSON has no infinities and no NaN: they travel as the strings that ``float`` reads."""
    return value if math.isfinite(value) else repr(value)


def _parse(line: bytes) -> tuple[Job, Evaluation]:
    record = json.loads(line)
    job = Job(read_factors(record), str(record["split"]), int(record["index"]))
    probes = tuple(ProbeScore(float(d), float(lp), bool(correct)) for d, lp, correct in record["probes"])
    n_tokens, seconds = int(record["n_tokens"]), float(record["seconds"])
    score: Evaluation = ContextScore(job.split, job.index, probes, n_tokens, seconds, str(record.get("task", "")))
    if job.split == GUARD:
        short, long = sorted(probes, key=lambda probe: probe.depth)
        score = DivergenceScore(-short.log_probability, -long.log_probability, n_tokens, seconds)
    sound = (
        probes
        and all(0.0 <= probe.depth <= 1.0 for probe in probes)
        and min(job.index, n_tokens, seconds) >= 0
        and seconds < math.inf
    )
    if not sound:
        raise ValueError("out of range")
    return job, score


_ABSENT = object()
_CONTENT = re.compile(r".* (sha256:[0-9a-f]{16})", re.DOTALL)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)


def _same_content(old: Any, new: Any) -> bool:
    """Whether both are files (`lrope_search.tasks.file_identity`) of one content, whatever their names."""
    found = [_CONTENT.fullmatch(value) for value in (old, new) if isinstance(value, str)]
    return len(found) == 2 and None not in found and len({match and match[1] for match in found}) == 1


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(dotted key, old value, new value)`` wherever two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else name)
    elif (old != new or type(old) is not type(new)) and not _same_content(old, new):
        yield key or "the whole", old, new
