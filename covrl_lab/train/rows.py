"""Rows of files and Hugging Face data sets, and the question and answer in each. No torch."""

import csv
import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from ..files import readable
from ..types import UNFIT, ConfigError, did_you_mean
from .answers import LETTERS, boxes
from .presets import Preset

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_file(path: Path, limit: int | None = None) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Column names and rows (at most ``limit``) of a data file."""
    what = f"data file {str(path)!r}"
    with readable(what, "mend it" if path.suffix == ".parquet" else "mend it; text must be UTF-8"):
        if path.suffix == ".parquet":
            import pyarrow.parquet

            file = pyarrow.parquet.ParquetFile(path)
            return file.schema_arrow.names, [] if limit else file.read().to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix in (".csv", ".tsv"):  # the csv module keeps "007" and "NA" as they stand
                header, _ = file.readline(), file.seek(0)
                # Spreadsheets write semicolons in many languages: what cuts the header into most columns.
                cuts = {sign: len(next(csv.reader([header], delimiter=sign), ())) for sign in ",;\t"}
                reader = csv.DictReader(file, delimiter=max(cuts, key=cuts.get))
                return list(reader.fieldnames or []), [] if limit else list(reader)
            if path.suffix == ".json":
                rows = json.load(file)
            else:
                lines, rows = ((n, line) for n, line in enumerate(file, start=1) if line.strip()), []
                for number, line in islice(lines, limit):
                    with readable(f"line {number} of {what}", "mend it"):
                        rows.append(json.loads(line))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"data file {str(path)!r} must hold a list of objects, one per question")
    return list(rows[0]) if rows else [], rows


def read_hub(name: str, preset: Preset) -> tuple[list[str], Iterable[dict[str, Any]]]:
    """Column names of a data set, and its rows with the columns that are read only; pictures stay encoded."""
    import datasets

    source, where = preset.source, {"revision": preset.revision} if preset.revision else {}
    if source.startswith("https://"):
        source, where = "json", {"data_files": source}
    with readable(repr(name), "check the name and the network", "cannot be loaded"):  # config or split, too
        data = datasets.load_dataset(source, preset.config, split=preset.split or "train", **where)
    names, read = data.column_names, {path.split(".")[0] for path in preset.columns} | set(preset.columns)
    data = data.select_columns([column for column in names if column in read])
    for column, feature in data.features.items():
        if isinstance(feature, datasets.Image):
            data = data.cast_column(column, datasets.Image(decode=False))
    return names, data


def check_columns(name: str, found: list[str], preset: Preset, own: bool) -> None:
    """ConfigError where a column is missing; ``own``: the columns can be chosen."""
    if not found:
        raise ConfigError(f"data set {name!r} is empty; it needs one row per question")
    for column in preset.columns:
        if found.count(column) > 1:
            raise ConfigError(f"data set {name!r} has two columns {column!r}; rename one")
        if column not in found and column.split(".")[0] not in found:
            if not own:
                hint = f"; the preset reads {', '.join(preset.columns)}"
            elif column in ("question", "answer"):  # what is read unless said otherwise
                hint = f"; set {column}_column to the one that holds it"
            else:
                hint = did_you_mean(column, found)
            raise ConfigError(f"data set {name!r} has columns {str(found):.200} but not {column!r}{hint}")


def lookup(row: dict[str, Any], path: str | None) -> Any:
    """The value of a column, or of a path into its cell: names and places joined by dots. None where there is none."""
    if path is None or path in row:
        return row.get(path)
    value: Any = row
    for part in path.split("."):
        try:
            value = value[part] if isinstance(value, dict) else value[int(part)]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value


class BadRow(ValueError):
    """Why a row is no question, and what to do."""


def cell(row: dict[str, Any], column: str | None) -> str:
    """The text of a cell. BadRow where it is no text and no finite number."""
    value = lookup(row, column)
    text = "" if value is None else str(value).strip()
    several = hasattr(value, "__len__") and not isinstance(value, str)
    if several or UNFIT.search(text) or (isinstance(value, float | Decimal) and not math.isfinite(value)):
        place = f"name a place in it, as in {column}.0.content"
        remedy = place if several else "put text or a finite number there, or remove it"
        raise BadRow(f"has {value!r:.60} in {column!r}", remedy)
    return text


def _options(row: dict[str, Any], preset: Preset, question: str) -> tuple[list[str], str]:
    """The options of a multiple-choice question, and the letter of the right one."""
    cells, answer = [lookup(row, column) for column in preset.choices], lookup(row, preset.answer)
    cells = cells[0] if isinstance(cells[0], list) else cells
    options = [str(text or "").strip() for text in cells]
    lettered = [re.fullmatch(rf"\(?{mark}\)\s*(.*)", text, re.S) for mark, text in zip(LETTERS, options, strict=False)]
    options = [found.group(1) for found in lettered] if all(lettered) else options
    if preset.answer in preset.choices:
        answer = preset.choices.index(preset.answer)
    elif isinstance(answer, str):
        answer = dict(zip(LETTERS, range(len(options)), strict=False)).get(answer.strip("() "))
    place = answer[0] if isinstance(answer, list) and answer else answer
    if not (1 < len(options) <= len(LETTERS) and all(options) and place in range(len(options))):
        raise BadRow(f"has {len(options)} options and the answer {answer!r:.60}", "mend it or remove it")
    order = list(range(len(options)))
    if preset.answer in preset.choices:
        Random(f"options/{question}").shuffle(order)
    return [options[i] for i in order], LETTERS[order.index(place)]


def to_question(row: dict[str, Any], preset: Preset) -> tuple[str, str, dict[str, Any]]:
    """Question, answer and metadata of a row.

    Of an answer with working what follows ``####`` (GSM8K) counts, or what its last ``\\boxed`` holds (MATH).
    """
    if None in row:
        raise BadRow("has more cells than there are columns", "put quotes around commas")
    asked = cell(row, preset.question)
    asked = re.sub(preset.strip, "", asked).strip() if preset.strip else asked
    answered = "-" if preset.choices else cell(row, preset.answer).rpartition("####")[2].strip()
    answered = [answered, *boxes(answered)][-1]
    for column, text in ((preset.question, asked), (preset.answer, answered)):
        if not text:
            raise BadRow(f"has an empty {column!r}", "fill it in or remove it")
    if preset.choices:
        options, letter = _options(row, preset, asked)
        lines = [f"({each}) {option}" for each, option in zip(LETTERS, options, strict=False)]
        text = "\n".join([asked, *lines, "Answer with the letter of the right option."])
        return text, letter, {"asked": asked, "options": options}
    if preset.boolean and answered.casefold() in ("true", "false"):
        return f"{asked} (True or False)", answered, {"asked": asked}
    return asked, answered, {}
