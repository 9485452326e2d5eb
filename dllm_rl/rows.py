"""Rows of a data set: a local file or folder, or a name on the Hugging Face hub.

Local `.jsonl`, `.jsonl.gz` and `.csv` files are read here, so that an error can name the line and a puzzle such as 0140
stays a string; everything else goes through `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.errors import UserError

Row = Mapping[str, Any]


def load_rows(source: str, split: str, required: Sequence[str], config_name: str | None = None) -> list[Row]:
    """All rows of `source`, each checked to have a value for every required column.

    Example: `load_rows("gsm8k/test.jsonl", "test", ("question", "answer"))`

    Args:
        source: a file (`.jsonl`, `.jsonl.gz`, `.json`, `.csv`, `.parquet`), a folder with one file per split
            (`train.jsonl`, ...), or the name of a data set on the hub. It is the value of `task.data`.
        split: which split of a folder or hub data set; a single file holds one split and is read whole.
        required: columns every row must have.
        config_name: configuration of a hub data set, such as `main` for openai/gsm8k.

    Raises:
        UserError: the source does not exist or cannot be read, a row is not a JSON object, a column is missing,
            or there are no rows.
    """
    return [row for _, row in load_placed_rows(source, split, required, config_name)]


def load_placed_rows(
    source: str, split: str, required: Sequence[str], config_name: str | None = None, key: str = "task.data"
) -> list[tuple[str, Row]]:
    """`load_rows`, each row with its place for error messages; `key` is the configuration key that holds `source`.

    Example: `[("gsm8k/test.jsonl:1", {"question": "Janet's ducks lay ...", "answer": "... #### 18"}), ...]`
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = _split_file(path, split, key)
    suffix = ".jsonl.gz" if path.name.endswith(".jsonl.gz") else path.suffix
    if suffix in _READERS:
        rows: Iterable[tuple[str, Row]] = _READERS[suffix](path, key)
    else:
        rows = _with_datasets(source, path, split, config_name, key)
    checked = [(place, _checked(row, place, required)) for place, row in rows]
    if not checked:
        raise UserError(f"{key}={source}: holds no rows")
    return checked


def _split_file(folder: Path, split: str, key: str) -> Path:
    for suffix in (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"):
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise UserError(f"{key}={folder}: holds no {split}.jsonl, .jsonl.gz, .json, .csv or .parquet (it holds {found})")


def _text(path: Path, key: str) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be read ({error.strerror or error})") from None
    except (EOFError, zlib.error) as error:
        raise UserError(f"{key}={path}: is no whole gzip file ({error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def _json_lines(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(_text(path, key).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
        yield f"{path}:{number}", row


def _csv_lines(path: Path, key: str) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(_text(path, key), newline=""))
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row:  # DictReader keeps the fields beyond the header under None
                raise UserError(f"{place}: has more fields than the header ({', '.join(reader.fieldnames or ())})")
            yield place, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: is not CSV ({error})") from None


_READERS: Mapping[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines, ".jsonl.gz": _json_lines, ".csv": _csv_lines,
}


def _with_datasets(
    source: str, path: Path, split: str, config_name: str | None, key: str
) -> Iterator[tuple[str, Row]]:
    formats = {".json": "json", ".parquet": "parquet"}
    local = path.suffix in formats
    if local and not path.is_file():
        raise UserError(f"{key}={source}: no such file; give a .jsonl, .jsonl.gz, .json, .csv or .parquet file, a "
                        "folder, or a data set name on the hub")
    import datasets

    try:
        if local:
            rows = datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, config_name, split=split)
    except Exception as error:  # datasets, huggingface_hub and pyarrow each raise classes of their own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{key}={source}: is no local file or folder, and the hub gave: {reason}" if not local
                        else f"{key}={source}: cannot be read ({reason})") from None
    for index, row in enumerate(rows):
        yield f"{source}: row {index + 1}", row


def _checked(row: Row, place: str, required: Sequence[str]) -> Row:
    for column in required:
        if row.get(column) is None:
            columns = ", ".join(row) or "nothing"
            raise UserError(f"{place}: has no `{column}`; required are {', '.join(required)} (the row has {columns})")
    return row
