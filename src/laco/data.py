"""Questions about pictures and videos, from files or from the embedded world.

Read are: JSONL (one object a line: image, question, answer, and where present id, family or category,
split, and video: true where the pictures are the frames of one), a directory that holds one such file, LLaVA
JSON (a list of {image, conversations}), and the words "world" and "world-video". Pictures stay paths until
they are asked for. Nothing in a data file is executed.
"""

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from laco.errors import LacoError
from laco.pictures import open_picture

DEFAULT_LIMIT = 1000
WORLDS = ("world", "world-video")  # the embedded pictures, and the embedded clips
Entry = TypeVar("Entry", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class Sample:
    """A question with its answer and pictures (paths, opened when needed, or PIL pictures).

    `family` groups questions that are scored together; `extra` holds all further fields of a file's line. `video`:
    the pictures are the frames of one video, in their order.
    """

    id: str
    images: tuple[Path | Image.Image, ...]
    question: str
    answer: str
    family: str
    extra: dict[str, Any] = field(default_factory=dict)
    video: bool = False

    @property
    def picture_key(self) -> tuple[Path | int, ...]:
        """What samples about the same pictures share: the paths, or the identities of pictures in memory."""
        return tuple(image if isinstance(image, Path) else id(image) for image in self.images)

    def pictures(self) -> list[Image.Image]:
        """The pictures, opened, RGB; raises `LacoError` for a file that is no picture."""
        return [open_picture(image) if isinstance(image, Path) else image for image in self.images]


class Row(BaseModel):
    """A line of a JSONL file."""

    model_config = ConfigDict(extra="allow")

    image: str | list[str]
    question: str
    answer: str | int | float
    id: str | int | None = None
    family: str | None = None
    category: str | None = None
    split: str | None = None
    video: bool = False


class Turn(BaseModel):
    """One turn of a LLaVA conversation; its speaker is called `from`."""

    model_config = ConfigDict(extra="allow")

    value: str


class Conversation(BaseModel):
    """An entry of a LLaVA JSON file; without `image` it is text only."""

    model_config = ConfigDict(extra="allow")

    conversations: list[Turn]
    image: str | list[str] = []
    id: str | int | None = None
    family: str | None = None
    category: str | None = None
    split: str | None = None


def load_samples(source: str | Path, split: str | None = None, limit: int | None = None, seed: int = 0) -> list[Sample]:
    """Loads questions.

    Args:
        source: "world", "world-video", a .jsonl file, a directory that holds exactly one, or a LLaVA .json
            file. Pictures are looked for relative to the file.
        split: only lines of this split; all by default. Of the world: "test" (the default) or "train".
        limit: at most so many, spread as evenly over the families as they allow; of the world 1000 by
            default.
        seed: chooses the pictures of the world, or which lines of a file remain under `limit`.

    Raises:
        LacoError: the source is missing or empty, a line is malformed or names a picture that is not there;
            file and line are named.
    """
    if limit is not None and limit < 1:
        raise LacoError(f"the number of samples is 1 or more; got {limit}")
    if str(source) in WORLDS:
        return world_samples(split or "test", DEFAULT_LIMIT if limit is None else limit, seed, str(source))
    path = find_file(Path(source))
    if not path.stat().st_size:
        raise LacoError(f"{path} is empty")
    samples = list(read_llava(path) if path.suffix == ".json" else read_jsonl(path))
    if split is not None:
        there = {sample.extra.get("split") for sample in samples}
        if split not in there:
            names = ", ".join(sorted(name for name in there if name)) or "none"
            raise LacoError(f"{path} has no split {split!r}; it has {names}")
        samples = [sample for sample in samples if sample.extra.get("split") == split]
    return samples if limit is None else spread(samples, limit, seed)


def spread(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """At most `limit` samples, spread evenly over the families, chosen by the seed, in their old order."""
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    seen: Counter[str] = Counter()
    ranks = []
    for index in order:
        ranks.append((seen[samples[index].family], index))
        seen[samples[index].family] += 1
    ranks.sort(key=lambda rank: rank[0])
    return [samples[index] for index in sorted(index for _, index in ranks[:limit])]


def world_samples(split: str, limit: int, seed: int, source: str = "world") -> list[Sample]:
    """`limit` questions about pictures or clips of the embedded world, spread evenly over its families."""
    from laco.world import CLIP_FAMILIES, FAMILIES, Clips, World

    video = source == "world-video"
    world = (Clips if video else World)(seed=seed, split=split)
    families = CLIP_FAMILIES if video else FAMILIES
    wanted = {name: limit // len(families) + (i < limit % len(families)) for i, name in enumerate(families)}
    samples: list[Sample] = []
    index = 0
    while len(samples) < limit:
        shown = world[index]
        pictures = tuple(shown.pictures)
        for number, (family, question, answer) in enumerate(shown.questions):
            if wanted[family]:
                wanted[family] -= 1
                name = f"{source}-{split}-{seed}-{index}-{number}"
                samples.append(Sample(name, pictures, question, answer, family, video=video))
        index += 1
    return samples


def find_file(path: Path) -> Path:
    """The data file that `path` is or holds."""
    if not path.exists():
        raise LacoError(
            f"there is no data at {path}; name a .jsonl file, a directory that holds one, a LLaVA .json file,"
            ' or "world" or "world-video" for the embedded pictures or clips'
        )
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.jsonl"))
    if not found:
        raise LacoError(f"the directory {path} holds no .jsonl file; name the data file itself")
    if len(found) > 1:
        raise LacoError(f"{path} holds several data files, name one: {', '.join(file.name for file in found)}")
    return found[0]


def read_jsonl(path: Path) -> Iterator[Sample]:
    """The samples of a JSONL file, one a line."""
    pictures = Pictures(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                raise LacoError(f"{where} is empty; every line must hold a JSON object")
            row = parse(Row, load_json(line, where), where)
            extra = {**(row.model_extra or {}), "split": row.split}
            yield Sample(
                id=f"{path.stem}-{number}" if row.id is None else str(row.id),
                images=pictures.find(row.image, where),
                question=row.question,
                answer=str(row.answer),
                family=row.family or row.category or path.stem,
                extra=extra,
                video=row.video,
            )


def read_llava(path: Path) -> Iterator[Sample]:
    """The samples of a LLaVA JSON file: each pair of turns of a conversation is a question of its own."""
    entries = load_json(path.read_bytes(), str(path))
    if not isinstance(entries, list) or not entries:
        raise LacoError(f"{path} is not LLaVA JSON, a list (not empty) of {{image, conversations}}")
    pictures = Pictures(path)
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        row = parse(Conversation, entry, where)
        images = pictures.find(row.image, where)
        turns = [turn.value.replace("<image>", "").strip() for turn in row.conversations]
        if not turns or len(turns) % 2:
            raise LacoError(f"{where} has {len(turns)} turns; a conversation is pairs of question and answer")
        name = f"{path.stem}-{number}" if row.id is None else str(row.id)
        for pair, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            yield Sample(
                id=name if len(turns) == 2 else f"{name}-{pair}",
                images=images,
                question=question,
                answer=answer,
                family=row.family or row.category or path.stem,
                extra={**(row.model_extra or {}), "split": row.split},
            )


class Pictures:
    """Finds the pictures that the lines of a data file name, and looks for each of them once."""

    def __init__(self, file: Path):
        self.root = file.parent
        self.found: dict[str, Path] = {}

    def find(self, names: str | list[str], where: str) -> tuple[Path, ...]:
        names = [names] if isinstance(names, str) else names
        for name in names:
            if name not in self.found:
                if not os.path.isfile(self.root / name):  # never raises, unlike Path.is_file
                    raise LacoError(f"{where}: there is no picture {self.root / name}")
                self.found[name] = self.root / name
        return tuple(self.found[name] for name in names)


def load_json(text: bytes, where: str) -> Any:
    """Parses JSON; bad JSON and bad UTF-8 become a `LacoError` that names the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LacoError(f"{where} is not JSON: {error}") from error


def parse(model: type[Entry], value: Any, where: str) -> Entry:
    """Checks an entry against its pydantic model; the first thing wrong becomes a `LacoError`."""
    if not isinstance(value, dict):
        raise LacoError(f"{where} is not a JSON object")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "missing" and len(first["loc"]) == 1:
            raise LacoError(f"{where} has no field {name!r}") from error
        raise LacoError(f"{where}: field {name!r} is wrong: {first['msg'].lower()}") from error


def by_family(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Indices of the samples of each family, families in order of appearance."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        groups[sample.family].append(index)
    return dict(groups)
