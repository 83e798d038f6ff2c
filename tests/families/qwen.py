"""Independent reference for the Qwen encoders: stock weights, one picture after another, everything by coordinates.

A token is found by (frame, row, column) of the first patch that it stands for. Nothing here knows an order of tokens
but that of the blocks in which patches come and tokens go.
"""

from typing import Any

import torch
from torch import Tensor, nn

from laco.families import family_of

Place = tuple[int, int, int]  # frame, row, column, in patches


def blocks(grid: tuple[int, int, int], side: int, step: int = 1) -> list[list[Place]]:
    """The places of every block of side x side patches, row by row, every `step`-th; blocks along rows, then frames."""
    frames, height, width = grid
    return [
        [(f, top + dy, left + dx) for dy in range(0, side, step) for dx in range(0, side, step)]
        for f in range(frames)
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def rotated(x_HD: Tensor, row: int, column: int) -> Tensor:
    """Two-dimensional rotary position: channels i and i + D/2 turn by an angle of the row, or of the column."""
    half, quarter = x_HD.shape[1] // 2, x_HD.shape[1] // 4
    speeds = [10000 ** (-2 * i / half) for i in range(quarter)]
    angles = torch.tensor([position * speed for position in (row, column) for speed in speeds], dtype=x_HD.dtype)
    a_HD, b_HD = x_HD[:, :half], x_HD[:, half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a_HD * cos - b_HD * sin, b_HD * cos + a_HD * sin], dim=1)


def attention(attn: nn.Module, places: list[Place], x_NC: Tensor, window: int | None) -> Tensor:
    """Every token attends to those of its frame, and of its window of patches where there are windows."""
    q_NHD, k_NHD, v_NHD = attn.qkv(x_NC).unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
    q_NHD, k_NHD = (
        torch.stack([rotated(x_HD, row, column) for (_, row, column), x_HD in zip(places, x_NHD, strict=True)])
        for x_NHD in (q_NHD, k_NHD)
    )
    neighbours: dict[Place, list[int]] = {}
    for i, (f, y, x) in enumerate(places):
        neighbours.setdefault((f, y // window, x // window) if window else (f, 0, 0), []).append(i)
    out_NHD = torch.empty_like(v_NHD)
    for seen in neighbours.values():
        for head in range(attn.num_heads):
            scores = q_NHD[seen, head] @ k_NHD[seen, head].T / q_NHD.shape[-1] ** 0.5
            out_NHD[seen, head] = scores.softmax(1) @ v_NHD[seen, head]
    return attn.proj(out_NHD.flatten(1))


def merged(
    compressor: nn.Module, grid: tuple[int, int, int], tokens: dict[Place, Tensor], step: int, factor: int
) -> dict[Place, Tensor]:
    """Merges tokens that stand `step` patches apart, window by window or each frame's map."""
    wide = step * factor
    if compressor.sees == "windows":
        windows = blocks(grid, wide, step)
        return {window[0]: compressor(torch.stack([tokens[place] for place in window])) for window in windows}
    new = {}
    for f in range(grid[0]):
        rows, columns = range(0, grid[1], step), range(0, grid[2], step)
        map_HWC = torch.stack([torch.stack([tokens[f, y, x] for x in columns]) for y in rows])
        for y, row in enumerate(compressor(map_HWC[None])[0]):
            for x, token in enumerate(row):
                new[f, y * wide, x * wide] = token
    return new


def learned_position(tower: nn.Module, grid: tuple[int, int, int], place: Place) -> Tensor:
    """Qwen3-VL: bilinear in the square table, whose corners are the picture's."""
    side = int(tower.config.num_position_embeddings**0.5)
    table = tower.pos_embed.weight.unflatten(0, (side, side))
    y, x = (p * (side - 1) / max(length - 1, 1) for p, length in zip(place[1:], grid[1:], strict=True))
    top, left = min(int(y), side - 2), min(int(x), side - 2)
    dy, dx = y - top, x - left
    upper = table[top, left] * (1 - dx) + table[top, left + 1] * dx
    lower = table[top + 1, left] * (1 - dx) + table[top + 1, left + 1] * dx
    return upper * (1 - dy) + lower * dy


def features(stock: nn.Module, model: nn.Module, grid: tuple[int, int, int], patches: Tensor) -> list[Tensor]:
    """What the language model reads of one picture: the features, then those of every tap.

    Args:
        stock: the uncompressed model, for its weights.
        model: the same one compressed, for its mergers and its configuration.
        grid: of the picture, in patches.
        patches: in blocks of the compressed model's merge size.
    """
    config: Any = model.config.vision_config
    tower, family = stock.model.visual, family_of(model)
    compressors = family.compressors(model)
    steps = {step.layer: step.merger.factor for step in family.steps(model.config)}
    unit, step, own = config.spatial_merge_size, 1, stock.config.vision_config.spatial_merge_size
    taps = list(getattr(config, "deepstack_visual_indexes", []))
    places = [place for block in blocks(grid, unit) for place in block]
    tokens = dict(zip(places, tower.patch_embed(patches), strict=True))
    if hasattr(tower, "pos_embed"):
        tokens = {place: token + learned_position(tower, grid, place) for place, token in tokens.items()}

    def read(tokens: dict[Place, Tensor], step: int, join: nn.Module) -> Tensor:
        """Every block, joined from own x own tokens, each of which is the mean of those that lie in its patches."""
        wide = unit // own
        joined = []
        for block in blocks(grid, unit, wide):
            parts = [
                torch.stack(
                    [tokens[f, y + dy, x + dx] for dy in range(0, wide, step) for dx in range(0, wide, step)]
                ).mean(0)
                for f, y, x in block
            ]
            joined.append(join(torch.stack(parts))[0])
        return torch.stack(joined)

    tapped: dict[int, Tensor] = {}
    for index, layer in enumerate(tower.blocks):
        windows = hasattr(config, "window_size") and index not in config.fullatt_block_indexes
        places, x_NC = list(tokens), torch.stack(list(tokens.values()))
        window = config.window_size // config.patch_size if windows else None
        x_NC = x_NC + attention(layer.attn, places, layer.norm1(x_NC), window)
        x_NC = x_NC + layer.mlp(layer.norm2(x_NC))
        tokens = dict(zip(places, x_NC, strict=True))
        if (count := index + 1) in steps:
            tokens = merged(compressors[f"layers.{count}"], grid, tokens, step, steps[count])
            step *= steps[count]
        if index in taps:
            tapped[index] = read(tokens, step, tower.deepstack_merger_list[taps.index(index)])
    return [read(tokens, step, tower.merger), *(tapped[index] for index in taps)]
