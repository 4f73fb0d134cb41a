"""pack.toml: what `python -m models pack` reads, and the one error that packing raises.

It owns the keys, what each may hold, and the sentences that say so; docs/bring-your-own.md explains them by
example. Paths are relative to the file. What is *in* the named files is checked by pack.py.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, ValidationInfo, model_validator

from app.bundle import HOISTED
from app.features import ROW, ModelInput, Strict
from app.manifest import FunnelConfig
from app.settings import Limits
from models.errors import Refused

RESERVED = ("ids", "id_order", "embedding", ROW)


class PackError(Refused):
    """Something that must not become a bundle."""


def _is_file(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path())
    file = folder / path
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    return file


def _is_table_name(name: str) -> str:
    if (
        name in RESERVED
        or name.startswith(HOISTED)
        or not name.replace("_", "").replace("-", "").isalnum()
        or not name.isascii()
    ):
        raise ValueError(
            f"{name!r} can't name a table; allowed are letters, digits, _ and -, not {HOISTED}…, {', '.join(RESERVED)}"
        )
    return name


File = Annotated[Path, AfterValidator(_is_file)]
Files = dict[Annotated[str, AfterValidator(_is_table_name)], File]


class ItemFiles(Strict):
    """The catalogue: ids [N], embeddings [N, d], and tables [N, ...] by name; vocab: category → number."""

    ids: File
    embeddings: File
    tables: Files = Field(default_factory=dict)
    vocab: Files = Field(default_factory=dict)


class UserFiles(Strict):
    """People known beforehand: ids [U], history of item rows [U, h] (-1 pads the end), tables [U, ...].

    Without ids there may only be a vocab, for the fields that requests send in user.features.
    """

    ids: File | None = None
    history: File | None = None
    tables: Files = Field(default_factory=dict)
    vocab: Files = Field(default_factory=dict)


class FieldFiles(Strict):
    """Vocabularies of the fields of a request's `query` or `context`, or of a candidate's features."""

    vocab: Files = Field(default_factory=dict)


class ModelFile(Strict):
    """An ONNX file and what each of its inputs reads."""

    file: File
    inputs: tuple[ModelInput, ...]


class PreRankerFile(Strict):
    """An .npz with names [F], weights f32[F] and bias f32[]."""

    weights: File


class FunnelPart(FunnelConfig):
    """Widths, as the manifest holds them.

    timeout_ms: the SLA they were chosen for; a bundle doesn't hold it, since the service's SLA is the service's
    (WINNOW_SLA_MS), so `pack` only repeats it.
    """

    timeout_ms: float | None = Field(default=None, ge=1, le=Limits.TIMEOUT_MS)

    @model_validator(mode="after")
    def _narrows(self) -> "FunnelPart":
        if self.rerank > self.retrieve:
            raise ValueError(f"rerank is {self.rerank}; allowed is up to what is retrieved, {self.retrieve}")
        return self

    @property
    def config(self) -> FunnelConfig:
        return FunnelConfig(**self.model_dump(exclude={"timeout_ms"}))


class PackConfig(Strict):
    """The whole of pack.toml."""

    name: str = Field(min_length=1, max_length=100)
    version: str = Field(min_length=1, max_length=100)
    samples: File
    popular: File | None = None
    offline_metrics: File | None = None
    items: ItemFiles
    users: UserFiles | None = None
    query: FieldFiles = FieldFiles()
    context: FieldFiles = FieldFiles()
    candidate: FieldFiles = FieldFiles()
    user_tower: ModelFile
    re_ranker: ModelFile
    pre_ranker: PreRankerFile
    funnel: FunnelPart = FunnelPart()


def read_config(file: Path) -> PackConfig:
    """The configuration with its paths resolved. Raises PackError that names the key and what is allowed."""
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise PackError(f"{file}: can't be read ({e.strerror})") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise PackError(f"{file}: not TOML ({e})") from e
    try:
        return PackConfig.model_validate(document, context={"folder": file.parent})
    except ValidationError as e:
        raise PackError(f"{file.name}: {_sentence(e)}") from e


def _sentence(error: ValidationError) -> str:
    """The first thing wrong; with the allowed keys where a key is unknown."""
    first = error.errors()[0]
    path = [part for part in first["loc"] if part != "[key]"]
    where = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        return f"{where}: no such key; allowed are {', '.join(_keys_at(path[:-1]))}"
    if first["type"] == "missing":
        return f"{where}: is missing"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}, not {first['input']!r:.80}"


def _keys_at(path: list[int | str]) -> list[str]:
    model: Any = PackConfig
    for part in path:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next((a for a in (annotation, *get_args(annotation)) if _is_model(a)), model)
    return list(model.model_fields)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
