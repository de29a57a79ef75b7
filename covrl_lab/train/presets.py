"""Data sets and chat formats by name, as ``presets.yaml`` lists them. No torch.

A task may be the name of a preset, or ``NAME@FILE`` for a file with the same columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Preset:
    """A data set: ``source`` is OWNER/NAME on the Hub, or the address of one file of JSON lines.

    Columns may be paths into nested cells, such as ``reward_model.ground_truth``. ``choices`` is one column with a
    list, or a column an option; the answer is then a letter, a place, or one of these columns, and a hash of the
    question orders them. ``keep`` and ``drop`` filter rows by the values of a column; what matches the regular
    expression ``strip`` is taken out of questions; ``boolean`` adds "(True or False)" where that is the answer.
    """

    source: str
    question: str = "question"
    answer: str = "answer"
    trace: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    choices: Sequence[str] = ()
    strip: str = ""
    boolean: bool = False
    keep: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    drop: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    tolerance: float = 0.0
    licence: str = "not stated"
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        own = [self.question, self.answer, *([self.trace] if self.trace else [])]
        return [*own, *self.choices, *self.keep, *self.drop]


@dataclass(frozen=True)
class ChatPreset:
    """The tag around the reasoning, the system prompt ("": the template's own), a template for tokenizers without."""

    think_tag: str = "think"
    system: str = ""
    template: str | None = None


_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PRESETS = {name: Preset(**fields) for name, fields in _TABLE["data"].items()}
CHATS = {name: ChatPreset(**fields) for name, fields in _TABLE["chats"].items()}
