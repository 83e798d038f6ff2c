"""How the tokens of a vision encoder become the rows that a language model reads of a picture, and their grid.

As they are, `Pictures` fits models with one square picture after another. Shape letters: T pictures (or tiles, or
frames) in the encoder, P prefix tokens and N others of each, n rows that the language model reads of one picture, C
channels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from laco.families.connector import Connector
from laco.families.encoders import encoder_of
from laco.families.encoders.base import MergingLayer
from laco.grid import Grid, pool_map


@dataclass(frozen=True)
class View:
    """Rows of a picture that are one grid: the picture, the overview beside its tiles, or a video.

    Args:
        rows: (n,) which rows of the picture, in raster order.
        grid: frames x height x width of them.
    """

    rows: Tensor
    grid: Grid


class Pictures:
    """Of a family. `body` is the model without its language-model head, `inputs` the arguments of
    `get_image_features`, or of `get_video_features` where `video`.
    """

    # The family's own projector maps every token by itself, so that tokens may be merged before it.
    by_token = True

    def encoder(self, body: Any) -> Any:
        return body.vision_tower

    def language_model(self, body: Any) -> Any:
        return body.language_model

    def projector(self, body: Any) -> Any:
        """What maps features of the encoder, token by token, to what the language model reads."""
        return body.multi_modal_projector

    def projects_tokens(self, body: Any) -> bool:
        """Whether the projector that is there maps every token by itself."""
        return self.by_token and not isinstance(self.projector(body), Connector)

    def project(self, body: Any, x_NC: Tensor) -> Tensor:
        return self.projector(body)(x_NC)

    def tokens(self, body: Any, features: Any) -> list[Tensor]:
        """(n, D) for each picture, of the model's `pooler_output`."""
        return [rows.flatten(0, -2) for rows in features]

    def like(self, tokens: Sequence[Tensor], features: Any) -> Any:
        """The inverse of `tokens`, in the form of the model's own."""
        parts = torch.cat(list(tokens)).split([rows.shape[:-1].numel() for rows in features])
        parts = [part.view_as(rows) for part, rows in zip(parts, features, strict=True)]
        return torch.stack(parts) if isinstance(features, Tensor) else type(features)(parts)

    def tiles(self, body: Any, pictures: int, inputs: Mapping[str, Any], video: bool) -> list[int]:
        """How many of the T belong to each picture."""
        return [1] * pictures

    def read_layer(self, body: Any, inputs: Mapping[str, Any]) -> Any:
        """The encoder's layer whose output the projector reads, the last of several."""
        encoder = self.encoder(body)
        layers = encoder_of(encoder.config).layers(encoder)
        read: Any = inputs.get("vision_feature_layer")
        read = getattr(body.config, "vision_feature_layer", -1) if read is None else read
        last = read if isinstance(read, int) else read[-1]
        return layers[last % (len(layers) + 1) - 1]

    def last_layer(self, body: Any) -> Any:
        """The encoder's last layer, also where the projector reads one before."""
        encoder = self.encoder(body)
        return encoder_of(encoder.config).layers(encoder)[-1]

    def attending(self, layer: Any, kwargs: Mapping[str, Any]) -> list[int] | None:
        """Lengths of the parts of a packed sequence that attend to themselves alone in a layer, which is called like
        this; None where nothing is packed.
        """
        return None

    def merged(self, part: Any, x_TNC: Tensor) -> Tensor:
        """Values of tokens that enter a layer or the projector -> means of the windows that it merges, if it does."""
        return pooled(x_TNC, part.factor, part.odd) if isinstance(part, MergingLayer | Connector) else x_TNC

    def views(self, body: Any, lengths: Sequence[int], inputs: Mapping[str, Any], video: bool) -> list[list[View]]:
        """The views of each picture, which has so many rows. What is in none of them is a line break or the like."""
        return [[square_view(length)] for length in lengths]

    def placeholders(self, lengths: Sequence[int], video: bool) -> list[int]:
        """How many tokens of a prompt stand for each picture, which has so many rows, if all of them have one."""
        return list(lengths)

    def frames_of(self, body: Any, tokens: int, grids: Mapping[str, Any]) -> int:
        """Frames of a video of so many placeholders; `grids` are arguments that say how large videos are."""
        return 1

    def gathered(self, body: Any, x_TNC: Tensor, inputs: Mapping[str, Any], video: bool) -> list[Tensor]:
        """Values of the encoder's tokens as those of each picture's rows, view after view, line breaks left out."""
        return list(x_TNC)


def square_view(length: int, first: int = 0) -> View:
    side = math.isqrt(length)
    extra = length - side * side  # a CLS token that the language model reads too
    return View(torch.arange(extra, length) + first, Grid(1, side, side))


def pooled(x_TNC: Tensor, factor: int, odd: str = "error") -> Tensor:
    """(T, N, C) of a square grid -> the mean of every window: what a connector joins, or a merger merges."""
    x_THWC = rearrange(x_TNC, "t (h w) c -> t h w c", h=math.isqrt(x_TNC.shape[1]))
    return pool_map(x_THWC, factor, odd).flatten(1, 2)
