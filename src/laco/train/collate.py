"""From pictures with questions to tensors: several questions about one picture, asked side by side.

The picture's tokens are encoded once; every question sees them and itself, never another question (a block mask, and
positions that start anew after the picture), so a packed sample is exactly as many separate ones, for the price of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from laco.evaluate import prompt
from laco.methods.glimpse_prune import Box
from laco.world.labels import LABELS

IGNORE = -100
_QUESTION = "\x00"  # stands for the question when the prompt's two halves are cut apart


@dataclass
class Item:
    """One sample of training: pictures, questions with answers; dense labels and boxes where the world gives them.

    `boxes` are around what the first question is about, in fractions of the picture's sides. `video`: the pictures are
    the frames of one.
    """

    images: list[Image.Image]
    asked: list[tuple[str, str]] = field(default_factory=list)
    dense: dict[str, np.ndarray] | None = None
    boxes: list[Box] | None = None
    video: bool = False


@dataclass
class Collator:
    """Batches `Item`s for a model.

    Args:
        processor: the model's processor with a chat template; pictures must come before the question in its prompt.
        teacher: the processor of the uncompressed model, for distillation: its inputs come under the key "teacher".

    Returns (on call):
        The processor's picture inputs; `input_ids` and `position_ids` (B, L); `attention_mask` (B, 1, L, L), True
        where a token may look; `labels` (B, L), -100 but for answers and the end token; `dense_labels`
        {name: (B, H, W)}; `boxes`, a list for each sample.
    """

    processor: Any
    teacher: Any = None

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        batch = self._encode(self.processor, items)
        if self.teacher is not None:
            batch["teacher"] = self._encode(self.teacher, items)
        if all(item.dense is not None for item in items):
            batch["dense_labels"] = {
                name: torch.from_numpy(np.stack([item.dense[name] for item in items if item.dense])) for name in LABELS
            }
        if all(item.boxes is not None for item in items):
            batch["boxes"] = [item.boxes for item in items]
        return batch

    def _encode(self, processor: Any, items: Sequence[Item]) -> dict[str, Any]:
        images = [image for item in items for image in item.images if not item.video]
        sized = _has_size(processor, images)
        if not any(item.asked for item in items):
            return dict(processor.image_processor(images=images, return_tensors="pt", **sized))
        heads, tails = zip(*(self._prompt(processor, item) for item in items), strict=True)
        # nested, as some treat several pictures unlike one
        shown = {"images": [item.images for item in items if item.images and not item.video] or None}
        if clips := [item.images for item in items if item.video]:
            shown["videos"] = clips
        inputs = dict(processor(**shown, text=list(heads), return_tensors="pt", padding=True, **sized))
        prefixes = [
            ids[mask.bool()] for ids, mask in zip(inputs.pop("input_ids"), inputs.pop("attention_mask"), strict=True)
        ]
        inputs.pop("mm_token_type_ids", None)
        rows = [_row(processor, *row) for row in zip(prefixes, tails, items, strict=True)]
        return inputs | _stack(rows, processor.tokenizer.pad_token_id)

    def _prompt(self, processor: Any, item: Item) -> tuple[str, str]:
        """The chat template's text up to the last picture, and what follows, with `_QUESTION` for the question."""
        text = prompt(processor, _QUESTION, len(item.images), item.video)
        token = processor.video_token if item.video else processor.image_token
        cut = text.rfind(token) + len(token) if item.images else 0
        return text[:cut], text[cut:]


def _has_size(processor: Any, images: Sequence[Image.Image]) -> dict[str, bool]:
    """Skips the resizing of pictures that already have the processor's size: it takes longer than all the rest."""
    size = getattr(processor.image_processor, "size", None) or {}
    target = (size.get("width"), size.get("height"))
    plain = type(processor).__name__ == "LlavaProcessor" and not getattr(processor.image_processor, "do_center_crop", 0)
    return {"do_resize": False} if plain and images and all(i.size == target for i in images) else {}


def _row(processor: Any, prefix: Tensor, tail: str, item: Item) -> dict[str, Tensor]:
    """One sample's sequence: the prefix, then every question with its answer as a block of its own."""
    tokenizer = processor.tokenizer
    ids, labels, blocks = [prefix], [torch.full_like(prefix, IGNORE)], [torch.zeros_like(prefix)]
    positions = [torch.arange(len(prefix))]
    for block, (question, answer) in enumerate(item.asked, start=1):
        asked = tokenizer(tail.replace(_QUESTION, question), add_special_tokens=False).input_ids
        said = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(asked + said))
        labels.append(torch.tensor([IGNORE] * len(asked) + said))
        blocks.append(torch.full((len(asked) + len(said),), block))
        positions.append(torch.arange(len(prefix), len(prefix) + len(asked) + len(said)))
    return {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels),
        "blocks": torch.cat(blocks),
        "position_ids": torch.cat(positions),
    }


def _stack(rows: list[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    fill = {"input_ids": pad_id, "labels": IGNORE, "blocks": -1, "position_ids": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    block_BL = batch.pop("blocks")
    length = block_BL.shape[1]
    before_LL = torch.ones(length, length, dtype=torch.bool).tril()
    shared_BLL = (block_BL[:, None, :] == 0) | (block_BL[:, None, :] == block_BL[:, :, None])
    batch["attention_mask"] = (before_LL & shared_BLL)[:, None]
    return batch
