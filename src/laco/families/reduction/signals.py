"""What selectors look at, gathered while the vision encoder runs."""

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from laco.families.encoders import encoder_of
from laco.families.reduction.hooks import Tap
from laco.families.reduction.pictures import Pictures, View
from laco.methods import Method

FROM_ENCODER = {"features", "keys", "queries", "cls_attention"}


class Rows(NamedTuple):
    """Values of one picture: (P, ...) of prefix tokens, (n, ...) of its rows, view after view."""

    prefix: Tensor
    rows: Tensor

    def of(self, first: int, size: int) -> Tensor:
        """(P + size, ...) of the view that begins at row `first`."""
        return torch.cat([self.prefix, self.rows[first : first + size]])


def rows_of(
    pictures: Pictures, body: Any, x_TSC: Tensor, count: int, inputs: Mapping[str, Any], video: bool
) -> list[Rows]:
    """Values of the encoder's tokens as values of each of `count` pictures."""
    config = pictures.encoder(body).config
    prefix, tiles = encoder_of(config).prefix(config), pictures.tiles(body, count, inputs, video)
    x_TSC = x_TSC if x_TSC.ndim == 3 else x_TSC[None]  # of a packed sequence
    heads = [part[:, :prefix].mean(dim=0) for part in x_TSC.split(tiles)] if prefix else [x_TSC[0, :0]] * count
    x_TNC = x_TSC[:, prefix:]
    if pictures.by_token:  # a merger may stand in the place of the projector
        x_TNC = pictures.merged(pictures.projector(body), x_TNC)
    return list(map(Rows, heads, pictures.gathered(body, x_TNC, inputs, video)))


def from_encoder(
    pictures: Pictures,
    body: Any,
    read: Tap,
    tap: Tap,
    count: int,
    inputs: Mapping[str, Any],
    video: bool,
    needs: Set[str],
) -> list[dict[str, Rows]]:
    """The fields of `Signals` that come from the encoder, for each of `count` pictures.

    Attention stands by tokens, (n, H). Prefix tokens of a picture in tiles are the mean of its tiles'. Where tokens are
    merged behind the attention, its queries, keys and values of attention are the means of the windows.

    Args:
        read: the layer whose output the projector reads.
        tap: the layer of queries, keys and attention.
    """
    from laco.attention import cls_rows, received

    config = pictures.encoder(body).config
    kind = encoder_of(config)
    prefix = kind.prefix(config)

    def spread(x_TSC: Tensor) -> list[Rows]:
        return rows_of(pictures, body, x_TSC, count, inputs, video)

    def spread_entered(x_TSC: Tensor) -> list[Rows]:
        """The same of values of the tokens inside the layer `tap`, which may merge them when it puts them out."""
        merged_TNC = pictures.merged(tap.layer, x_TSC[:, prefix:])
        return spread(torch.cat([x_TSC[:, :prefix], merged_TNC], dim=1))

    assert tap.entered is not None
    assert read.put_out is not None
    fields: dict[str, list[Rows]] = {}
    if "features" in needs:
        fields["features"] = spread(read.put_out)
    if needs & {"keys", "queries", "cls_attention"}:
        with torch.no_grad():
            q, k = kind.queries_keys(tap.layer, tap.entered, tap.kwargs)
        for name, x in (("keys", k), ("queries", q)):
            if name in needs:
                both = spread_entered(rearrange(x, "t h s d -> t s (h d)"))
                fields[name] = [Rows(*(part.unflatten(-1, (x.shape[1], -1)) for part in rows)) for rows in both]
        if "cls_attention" in needs and prefix:
            fields["cls_attention"] = spread_entered(rearrange(cls_rows(q, k), "t h s -> t s h"))
        elif "cls_attention" in needs:
            lengths = pictures.attending(tap.layer, tap.kwargs)
            parts = zip(q.split(lengths, dim=2), k.split(lengths, dim=2), strict=True) if lengths else [(q, k)]
            fields["received"] = spread_entered(torch.cat([received(*part) for part in parts], dim=1)[..., None])
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def map_counts(method: Method | None, num_layers: int) -> list[int]:
    """After how many of an encoder's layers a method wants to see what they put out; deep ones first."""
    depths: tuple[float, ...] = getattr(method, "maps", ()) if method is not None and "maps" in method.needs else ()
    return [max(round(depth * num_layers), 1) for depth in depths]


def map_layers(encoder: Any, method: Method | None) -> list[Any]:
    layers = encoder_of(encoder.config).layers(encoder)
    return [layers[count - 1] for count in map_counts(method, len(layers))]


def maps_of(
    pictures: Pictures,
    body: Any,
    taps: Sequence[Tap],
    views: Sequence[Sequence[View]],
    inputs: Mapping[str, Any],
    video: bool,
) -> list[tuple[Tensor, ...]]:
    """What these layers put out, for each picture: (N, C) of a layer, one view after the other, without a gradient."""
    levels: list[list[Rows]] = []
    for tap in taps:
        assert tap.put_out is not None
        levels.append(rows_of(pictures, body, tap.put_out.detach(), len(views), inputs, video))
    maps = [tuple(level[index].rows for level in levels) for index in range(len(views))]
    for own, some in zip(views, maps, strict=True):  # `Family.why_no_maps` lets mergers stand before these layers alone
        assert all(len(map_NC) == sum(view.grid.tokens for view in own) for map_NC in some)
    return maps
