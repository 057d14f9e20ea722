"""Whatever the system refuses to write is one clear error with exit code 2. `make torture` tries real disks."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import labeltune
from helpers.rows import classification_rows, write_jsonl
from helpers.runs import predictor_for
from helpers.training import config_for
from labeltune.data.loading import load_rows
from labeltune.errors import DataError, OutputError
from labeltune.export.folder import whole_folder
from labeltune.inference.files import predict_file
from labeltune.io.outputs import why_not_written

FULL = OSError(errno.ENOSPC, "No space left on device")


def refuse(*_: Any, **__: Any) -> Any:
    raise FULL


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "a/b"), "Read-only file system (a/b)"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8512 vs 8406"),
            "disk is full",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "disk is full"),
        (
            SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
            "File too large",
        ),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
    ],
)
def test_what_libraries_say_of_a_full_disk_is_understood(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    assert reason in str(why_not_written(error))
    with pytest.raises(OutputError, match="out cannot be written"), whole_folder(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError("no file named config.json"),
        RuntimeError("shapes"),
        SafetensorError("bad header"),
        Exception("(os error 2)"),
    ],
)
def test_other_errors_are_left_alone(error: Exception, tmp_path: Path) -> None:
    assert why_not_written(error) is None
    with pytest.raises(type(error)), whole_folder(tmp_path / "out"):
        raise error


def test_predict_into_a_read_only_folder(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(in_folder / "rows.jsonl", [{"text": "a"}])
    predictor = predictor_for()

    def read_only(self: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OutputError, match=r"out\.jsonl cannot be written: Read-only"):
        predict_file(predictor, path, in_folder / "out.jsonl")


def test_a_full_token_cache_is_named(
    in_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABELTUNE_CACHE", str(in_folder / "cache"))  # nothing is kept there of other tests
    config = config_for(in_folder, model_folder, max_steps=1)
    monkeypatch.setattr("labeltune.training.dataset._write_tokens", refuse)
    with pytest.raises(OutputError, match=r"tokens cannot be written: No space left.*LABELTUNE_CACHE"):
        labeltune.train(config)


def test_a_full_temporary_folder_is_not_blamed_on_the_data(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    from datasets import arrow_writer

    path = write_jsonl(in_folder / "rows.jsonl", classification_rows(3))
    with monkeypatch.context() as patched:
        patched.setattr(arrow_writer.ArrowWriter, "write", refuse)
        with pytest.raises(OutputError, match=r"checked rows cannot be kept in .*No space left.*TMPDIR"):
            load_rows(str(path), "classification")
    with monkeypatch.context() as patched:
        patched.setattr("labeltune.io.lock._folders", {})
        patched.setattr(tempfile, "mkdtemp", refuse)
        with pytest.raises(OutputError, match=r"there is no temporary folder: No space left.*TMPDIR"):
            load_rows(str(path), "classification")
    with pytest.raises(DataError, match="does not exist"):
        load_rows(str(in_folder / "other.jsonl"), "classification")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_standard_output_is_one_error(in_folder: Path) -> None:
    path = write_jsonl(in_folder / "rows.jsonl", classification_rows(6))
    command = [sys.executable, "-m", "labeltune", "data", "check", str(path)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "error: the output cannot be written: No space left on device"
    ]
