"""One method in full: what it is, where it stands, what it looks at, and its settings."""

from dataclasses import MISSING, fields
from typing import Any

from laco.methods import catalogue, get

# What methods may need: fields of `laco.methods.selector.Signals`, `laco.methods.decoder.DecoderSignals` and
# `laco.methods.reducer.LayerSignals`, which say more of shapes.
NEEDS = {
    "tokens": "visual tokens as the language model would read them, behind the projector",
    "features": "visual tokens as the vision encoder puts them out, before the projector",
    "keys": "keys of attention in the layer that the method looks at",
    "queries": "queries of attention in the layer that the method looks at",
    "cls_attention": "attention of the encoder's CLS token to the patches; without one, what each patch receives",
    "received": "attention that each token receives in a layer of the encoder",
    "text": "the question, as input embeddings of the language model",
    "text_attention": "attention of the question to the visual tokens in a layer of the language model, run beforehand",
    "clip_tokens": "the patches in the joint space of a CLIP model",
    "clip_text": "the question in the joint space of a CLIP model",
    "embeddings": "input embeddings of the whole prompt",
    "hidden": "hidden states of the language model where tokens leave",
    "attention": "attention in a layer of the language model",
    "logits": "attention in a layer of the language model before its softmax",
    "rotary": "rotary tables of the positions",
    "answers": "where answers begin, in training",
    "maps": "hidden states of several layers of the vision encoder",
    "grids": "rows and columns in which the visual tokens of each picture lie",
    "memory": "what the method itself notes in the layers of the language model before",
}


def all_methods() -> list[dict[str, Any]]:
    """As `laco.methods.catalogue`, with `video_only`: pictures are refused."""
    return [row | {"video_only": getattr(get(row["name"]), "video_only", False)} for row in catalogue()]


def describe(name: str) -> dict[str, Any]:
    """A row of `all_methods` with explanations of `needs`, and `settings` with their defaults.

    Raises:
        LacoError: there is no such method; the nearest is named.
    """
    method = get(name)
    row = next(row for row in all_methods() if row["name"] == name)
    settings = {
        field.name: None if field.default is MISSING else field.default
        for field in fields(method)
        if method.has_depth or field.name not in ("depth", "layer")
    }
    return row | {"needs": {need: NEEDS.get(need, "") for need in row["needs"]}, "settings": settings}
