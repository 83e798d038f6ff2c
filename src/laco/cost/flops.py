"""FLOPs of every stage of a vision-language model, from its configuration alone, before anything runs.

Counted are matrix products, attention and convolutions, two FLOPs for a multiplication with addition; norms,
activations, softmax and embeddings are left out, as in torch.utils.flop_counter, with which these numbers agree.
Attention is counted over all pairs of tokens, also where a mask hides some of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig, PreTrainedModel

from laco.families import family_of_config
from laco.families.encoders.base import Size
from laco.grid import Grid, merge_map
from laco.methods import Merger, Method
from laco.surgery import place


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of one question about its pictures, stage by stage.

    `encoder_before` are the encoder layers before the first merger (all of them if there is none inside),
    `encoder_after` those on merged tokens, `unread` what runs behind the layer that the language model reads (the
    last layer of LLaVA 1.5's encoder, a pooling head). A merger in the place of the projector counts as `projector`,
    one that the stock encoder has inside by itself as `compressor`.
    A vision encoder alone has neither projector nor language model.
    """

    patch_embedding: float
    encoder_before: float
    compressor: float
    encoder_after: float
    unread: float
    projector: float
    language_model: float

    @property
    def encoder(self) -> float:
        """The vision encoder with the compressors inside it."""
        return self.patch_embedding + self.encoder_before + self.compressor + self.encoder_after + self.unread

    @property
    def forward(self) -> float:
        return self.encoder + self.projector + self.language_model

    @property
    def training_step(self) -> float:
        """Forward and backward with every parameter learning, without gradient checkpointing."""
        # Backward costs each product twice, for its input and for its weight; pixels need no gradient.
        return 3 * self.forward - self.patch_embedding - 2 * self.unread

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {name: getattr(self, name) for name in ("encoder", "forward", "training_step")}


def linear_flops(tokens: float, inputs: int, outputs: int) -> float:
    return 2 * tokens * inputs * outputs


def encoder_layer_flops(
    tokens: int, width: int, hidden: int, *, gated: bool = False, attended: int | None = None
) -> float:
    """One transformer layer: four width x width projections, attention, an MLP of two (gated: three) maps.

    `attended` counts the pairs of tokens that attend to one another; None = all.
    """
    pairs = tokens**2 if attended is None else attended
    attention = 4 * linear_flops(tokens, width, width) + 4 * pairs * width
    return attention + (3 if gated else 2) * linear_flops(tokens, width, hidden)


def pooling_head_flops(tokens: int, width: int, hidden: int) -> float:
    """SigLIP's head: one learned query attends to all tokens, then an MLP."""
    attention = 2 * linear_flops(tokens, width, width) + 2 * linear_flops(1, width, width) + 4 * tokens * width
    return attention + 2 * linear_flops(1, width, hidden)


def attention_pooling_flops(tokens: int, width: int) -> float:
    """AIMv2's head: one learned query attends to all tokens, then a projection."""
    return 2 * linear_flops(tokens, width, width) + 4 * tokens * width + linear_flops(1, width, width)


def decoder_flops(config: Any, tokens: int, logits: int = 1) -> float:
    """A Llama-like language model over a sequence: grouped-query attention, gated MLP, `logits` tokens scored."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    projections = 2 * linear_flops(tokens, width, heads * head) + 2 * linear_flops(tokens, width, groups * head)
    attention = 4 * tokens * tokens * heads * head
    mlp = 3 * linear_flops(tokens, width, config.intermediate_size)
    layers = config.num_hidden_layers * (projections + attention + mlp)
    return layers + linear_flops(logits, width, config.vocab_size)


def merger_flops(merger: Merger, grid: Grid, width: int, out_width: int | None = None) -> float:
    """A merger's own FLOPs on one grid, counted by running its module on the meta device: no weights, no memory.

    Args:
        grid: before merging.
        width: channels of the tokens.
        out_width: channels of the language model, where the merger stands in the place of the projector.
    """
    levels = 1 if out_width is None else 1 + len(merger.projector_levels)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module = merger.build(width) if out_width is None else merger.build_projector(width, out_width)
        merge_map(module, torch.empty(*grid, levels * width), merger.factor, merger.odd)
    return counter.get_total_flops()


def stage_flops(
    model: PreTrainedModel | PreTrainedConfig,
    methods: Sequence[Method] = (),
    *,
    size: Size | None = None,
    pictures: int = 1,
    text_tokens: int = 32,
    visual_tokens: int | None = None,
    logits: int = 1,
) -> StageFlops:
    """FLOPs of one question to a model.

    Args:
        model: a model of a known family, stock or compressed, or only its configuration.
        methods: mergers to count as if they were put into it.
        size: height and width in pixels of a picture, for families whose grids depend on it.
        pictures: what the vision encoder sees: pictures, tiles or frames.
        text_tokens: all other tokens of the sequence.
        visual_tokens: what the language model reads, if not every token of every picture (families that add line
            breaks or cut padding off).
        logits: tokens for which the vocabulary is scored: 1 in prefill, those of the answers in training.

    Raises:
        LacoError: the family or encoder is not known, or a method cannot stand in the model.
    """
    config: Any = model.config if isinstance(model, PreTrainedModel) else model
    family = family_of_config(config)
    steps = [*family.steps(config), *(place(method, family, config) for method in methods)]
    if methods:  # grids and what attends to what follow from the configuration that they would give
        config = family.with_steps(config, sorted(steps, key=lambda step: step.layer))
    inside = sorted((step for step in steps if step.place == "encoder"), key=lambda step: step.layer)
    connector = next((step.merger for step in steps if step.place == "projector"), None)
    kind, vision, text = family.encoder_kind(config), family.vision_config(config), family.text_config(config)
    width, text_width = family.widths(config)
    prefix, (hidden, gated) = kind.prefix(vision), kind.mlp(vision)

    # Through the encoder from merger to merger, with the grid.
    grid, merged = family.own_grid(config, size), False
    before = compressor = after = unread = 0.0
    patch_embedding = linear_flops(grid.tokens, kind.patch_values(vision), width)
    last, mergers = max(family.read_layers(config)), [*(step.merger for step in inside), *family.own_mergers(config)]
    for layer in range(kind.num_layers(vision)):
        attended = kind.attended(vision, grid, layer)
        flops = encoder_layer_flops(grid.tokens + prefix, width, hidden, gated=gated, attended=attended)
        if layer >= last:
            unread += flops
        elif merged:
            after += flops
        else:
            before += flops
        for merger in (merger for merger in mergers if merger.layer == layer + 1):
            compressor += merger_flops(merger, grid, width)
            grid, merged = merger.num_tokens(grid), True
    if getattr(vision, "vision_use_head", False):
        unread += pooling_head_flops(grid.tokens, width, hidden)
    if getattr(vision, "use_head", False):
        unread += attention_pooling_flops(grid.tokens, width)

    if connector is not None:
        projector = merger_flops(connector, grid, width, text_width)
        read = connector.num_tokens(grid).tokens
    else:
        read = family.visual_tokens(config, grid)
        projector = sum(linear_flops(read, inputs, outputs) for inputs, outputs in family.projections(config))
    sequence = (pictures * read if visual_tokens is None else visual_tokens) + text_tokens
    return StageFlops(
        patch_embedding=pictures * patch_embedding,
        encoder_before=pictures * before,
        compressor=pictures * compressor,
        encoder_after=pictures * after,
        unread=pictures * unread,
        projector=pictures * projector,
        language_model=0.0 if text is None else decoder_flops(text, sequence, logits),
    )
