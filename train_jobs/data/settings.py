"""What ``data:`` may say. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from cluster.config import Frozen

FormName = Literal[
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "preference",
    "unpaired",
    "asked",
    "labelled",
    "tagged",
    "pair",
    "text",
]
"""What the columns of a source mean; `train_jobs.data.forms` has a function for each."""

HUB = "hub:"


class Source(Frozen):
    """One source of rows. A text alone is its path."""

    path: Path
    """A file (json, jsonl, csv, tsv, parquet, txt, arrow), a pattern as ``part-*.jsonl``, a folder
    written by ``datasets.save_to_disk``, or ``hub:owner/name[:split]``. A relative path is relative
    to the config file."""
    config: str | None = None
    """Of a hub's data set that has several, as ``de-en``: ``load_dataset`` calls it ``name``."""
    weight: PositiveFloat = 1.0
    """How often each row comes in an epoch: 2 is twice; 0.5 is one half of the rows, chosen by
    their content and the same in every epoch; 1.5 is once, and again for one half."""
    form: FormName | None = None
    """What the columns mean; by default recognised from their names."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name of a column to that of the file, as ``{instruction: question}``. A dot steps into
    an object: ``{source: translation.de}``."""
    names: tuple[str, ...] | None = None
    """The columns of a csv or tsv file that has no header line."""
    text: Literal["line", "paragraph", "file"] = "line"
    """Of a text file: a document is a line, what stands between blank lines, or the file."""

    @property
    def is_hub(self) -> bool:
        """Whether it names a data set of a hub instead of files."""
        return str(self.path).startswith(HUB)

    @model_validator(mode="after")
    def _configured(self) -> Source:
        if self.config is not None and not self.is_hub:
            raise ValueError(
                f"config={self.config!r:.40} with {self.path}: only a hub's data set has "
                "configurations (path: hub:owner/name); leave it out"
            )
        return self


def _listed(value: Any) -> Any:
    """Read ``a.jsonl``, ``{path: a.jsonl}`` and lists of either as a list of sources."""
    if isinstance(value, str | Path | dict | Source):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [{"path": one} if isinstance(one, str | Path) else one for one in value]


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_listed, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1),
]


class Data(Frozen):
    """Rows to learn from, and what to do with those that do not fit."""

    train: Sources
    """A path, a source, or a list of them."""
    heldout: Sources | None = None
    """Rows that are only measured, before and after."""
    split: float = Field(0.0, ge=0, lt=1)
    """Instead of ``heldout``: the share of ``train`` to hold out. Its content decides where a row
    goes: neither its place in the file nor other rows move it, and equal rows stay together."""
    max_len: PositiveInt = 512
    """Tokens of one row of a batch: packed, it holds several examples; else one document."""
    truncate: Literal["error", "end", "drop"] = "error"
    """What happens to an example that is longer: an error that names its line, cut at its end, or
    left out and counted."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """A row that is not what its form asks for ends the run, or is left out and counted."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Share of rows that ``on_bad_row: skip`` may leave out before the run is refused."""
    max_empty_share: float = Field(0.0, ge=0, le=1)
    """Share of rows that may have no trained token before the run is refused."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Keep the first of equal rows: equal but for case and white space, or by MinHash to at least
    0.8 of their pieces. Rows of ``train`` that are held out as well leave ``train``."""
    scrub: bool = False
    """Replace e-mail addresses, phone, card and account numbers and the like by placeholders."""

    @model_validator(mode="after")
    def _checks(self) -> Data:
        if self.split and self.heldout:
            raise ValueError("split and heldout both say what is held out; give one of them")
        if any(source.weight != 1 for source in self.heldout or ()):
            raise ValueError(
                "heldout: a weight has no meaning for rows that are only measured; leave it out"
            )
        return self
