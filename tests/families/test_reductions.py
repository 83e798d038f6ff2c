"""Methods behind the encoder and inside the language model, in every family that takes them."""

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

import laco
import tiny
from families.matrix import NONE, ONE, SQUARE, TWO, Prompt, built
from laco.families import family_of
from laco.families.reduction import kept_columns
from laco.methods import DecoderMethod, Method, Selector, registry
from laco.methods.selector import Signals

CASES = [
    "llava-siglip",
    "llava-clip",
    "llava_onevision-siglip",
    "llava_onevision-clip",
    "internvl-internvit",
    "idefics3-idefics3",
    "smolvlm-smolvlm",
    "qwen2_vl-qwen2_vl",
    "qwen2_5_vl-qwen2_5_vl",
    "qwen3_vl-qwen3_vl",
]
LANGUAGE_LAYERS = {name: built(name, "stock")[0].config.text_config.num_hidden_layers for name in CASES}


def last_layer(name: str) -> int:
    return LANGUAGE_LAYERS[name] - 1


def methods(name: str) -> dict[str, Method]:
    """One of every kind: token by token, merged, before the projector, by the question, inside the language model."""
    layer = last_layer(name)
    return {
        "div_prune": laco.methods.DivPrune(keep=0.4),
        "renumbered": laco.methods.DivPrune(keep=0.4, positions="renumber"),
        "visionzip": laco.methods.VisionZip(keep=0.5),
        "dyntok": laco.methods.DynTok(threshold=0.2),
        "cdpruner": laco.methods.CDPruner(keep=0.3),
        "flexselect": laco.methods.FlexSelect(keep=0.3),
        "flexselect_lite": laco.methods.FlexSelect(keep=0.3, lite=1, width=16),
        "explainability": laco.methods.Explainability(keep=0.4),
        "fastv": laco.methods.FastV(keep=0.4, layer=layer),
        "fastv_renumbered": laco.methods.FastV(keep=0.4, layer=layer, positions="renumber"),
        "pyramid_drop": laco.methods.PyramidDrop(keep=0.3, layer=layer),
        "sparsevlm": laco.methods.SparseVLM(keep=0.3, layer=layer),
        "glimpse_prune": laco.methods.GlimpsePrune(keep=0.4, layer=layer, width=16, condition=16, threshold=0.0),
    }


KINDS = list(methods(CASES[0]))
every_case = pytest.mark.parametrize("name", CASES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def reduced(name: str, method: Method) -> tuple[Any, Any]:
    model, processor = deepcopy(built(name, "stock"))
    laco.compress(model, processor, method)
    return model, processor


def last_logits(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def prompts(name: str) -> list[Prompt]:
    """Unequal ones, with words behind the pictures, which some methods want."""
    asked = [(f"{text} or not?", pictures) for text, pictures in (ONE, TWO, SQUARE)]
    return asked if "text_only" in tiny.CASES[name].cannot else [*asked[:2], NONE, asked[2]]


def generated(model: Any, batch: Any, tokens: int = 5, **settings: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **settings
    )


@pytest.mark.parametrize("kind", ["div_prune", "fastv"])
def test_a_compiled_model(kind):
    model, processor = reduced("llava-siglip", methods("llava-siglip")[kind])
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    wanted = last_logits(model, batch)
    torch.compiler.reset()
    torch.testing.assert_close(last_logits(torch.compile(model, backend="eager"), batch), wanted)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llava-siglip", laco.DivPrune(keep=0.4)),
        ("internvl-internvit", laco.FastV(layer=1)),
        ("qwen2_5_vl-qwen2_5_vl", laco.LaCo(layer=2)),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_model_is_pickled(name, method):
    """Before it has run, as the stock model: transformers then hooks on what cannot be pickled."""
    model, processor = tiny.CASES[name].build()
    laco.compress(model, processor, method)
    batch = tiny.CASES[name].inputs(processor, ONE)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(last_logits(again, batch), last_logits(model, batch))


@every_case
def test_a_full_budget_is_the_stock_model(name):
    stock, processor = built(name, "stock")
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    wanted = last_logits(stock, batch)
    full = [
        laco.methods.DivPrune(keep=1.0),
        laco.methods.CDPruner(keep=1.0),
        laco.methods.FastV(keep=1.0, layer=last_layer(name)),
    ]
    for method in full:
        model, _ = reduced(name, method)
        torch.testing.assert_close(last_logits(model, batch), wanted, rtol=1e-4, atol=1e-5)


@every_kind
@every_case
def test_a_batch_of_unequal_prompts_equals_each_alone(name, kind):
    model, processor = reduced(name, methods(name)[kind])
    case, some = tiny.CASES[name], prompts(name)
    together = last_logits(model, case.inputs(processor, *some))
    alone = torch.cat([last_logits(model, case.inputs(processor, prompt)) for prompt in some])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=2e-5)
    stock, its = built(name, "stock")
    assert (together[:1] - last_logits(stock, case.inputs(its, ONE))).abs().max() > 1e-3  # something was left out


@every_kind
@every_case
def test_generate_with_cache_equals_without(name, kind):
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    steps = {
        cached: generated(model, batch, use_cache=cached, return_dict_in_generate=True, output_logits=True)
        for cached in (True, False)
    }
    assert torch.equal(steps[True].sequences, steps[False].sequences)
    for with_cache, without in zip(steps[True].logits, steps[False].logits, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["div_prune", "renumbered", "visionzip", "dyntok"])
@every_case
def test_the_language_model_reads_what_is_left_at_its_own_positions(name, kind):
    """The stock language model, given by hand what the selector leaves, says the same."""
    method = methods(name)[kind]
    model, processor = reduced(name, method)
    batch = tiny.CASES[name].inputs(processor, ONE)
    seen: dict[str, Any] = {}
    language_model = family_of(model).language_model(model)
    hook = language_model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    logits = last_logits(model, batch)
    hook.remove()
    there = ~seen["inputs_embeds"][0, :, 0].isnan()
    stock, its = built(name, "stock")
    all_ids = tiny.CASES[name].inputs(its, ONE)["input_ids"]
    assert len(there) == all_ids.shape[1]  # whatever has a placeholder in the prompt
    assert 0 < int((~there).sum()) < int((all_ids == model.config.image_token_id).sum())
    positions = seen.get("position_ids")
    positions = torch.arange(len(there))[None] if positions is None else positions
    positions = positions[..., there]
    if method.positions == "renumber":
        order = {value: rank for rank, value in enumerate(sorted(set(positions[-3:].flatten().tolist())))}
        positions = torch.tensor([order[value] for value in positions.flatten().tolist()]).view_as(positions)
    extra: dict[str, Any] = {}
    if seen.get("visual_pos_masks") is not None:
        mask = seen["visual_pos_masks"]
        extra["visual_pos_masks"] = mask[:, there]
        extra["deepstack_visual_embeds"] = [level[there[mask[0]]] for level in seen["deepstack_visual_embeds"]]
    with torch.no_grad():
        hidden = (
            family_of(stock)
            .language_model(stock)(
                inputs_embeds=seen["inputs_embeds"][:, there],
                position_ids=positions,
                attention_mask=torch.ones(1, int(there.sum()), dtype=torch.long),
                **extra,
            )
            .last_hidden_state
        )
        wanted = stock.get_output_embeddings()(hidden[:, -1])
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl-qwen2_5_vl"])
@pytest.mark.parametrize("method", [laco.methods.VisionZip, laco.methods.DynTok], ids=lambda method: method.name)
def test_merged_tokens_have_the_position_of_what_stands_for_them(name, method):
    logits = []
    for positions in ("keep", "representative", "renumber"):
        model, processor = reduced(name, method(positions=positions))
        logits.append(last_logits(model, tiny.CASES[name].inputs(processor, ONE)))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


@every_case
def test_the_tokens_left_are_those_of_the_plan(name):
    """Of a selector on tensors, over what the stock model gives to its language model, picture by picture."""
    method = laco.methods.DivPrune(keep=0.4)
    model, processor = reduced(name, method)
    stock, its = built(name, "stock")
    batch = tiny.CASES[name].inputs(its, SQUARE)
    columns = (batch["input_ids"][0] == stock.config.image_token_id).nonzero().flatten()
    seen: dict[str, Any] = {}
    for which in (stock, model):
        hook = (
            family_of(which)
            .language_model(which)
            .register_forward_pre_hook(
                lambda _, __, kwargs, which=which: seen.update({which.__class__.__name__: kwargs["inputs_embeds"]}),
                with_kwargs=True,
            )
        )
        last_logits(which, batch if which is stock else tiny.CASES[name].inputs(processor, SQUARE))
        hook.remove()
    full, left = seen[type(stock).__name__][0, columns], seen[type(model).__name__][0, columns]
    there = ~left[:, 0].isnan()
    torch.testing.assert_close(left[there], full[there], rtol=0, atol=0)
    grids = views_by_hand(name, stock, batch, len(full))
    wanted = torch.zeros(len(full), dtype=torch.bool)
    for rows, grid in grids:
        wanted[rows[method(Signals(grid=grid, tokens=full[rows])).kept]] = True
    structure = torch.ones(len(full), dtype=torch.bool)
    for rows, _ in grids:
        structure[rows] = False
    assert torch.equal(there & ~structure, wanted)


def views_by_hand(name: str, model: Any, batch: Any, total: int) -> list[Any]:
    from laco.grid import Grid

    config, family = model.config, family_of(model)
    if "image_grid_thw" in batch:
        frames, height, width = batch["image_grid_thw"][0].tolist()
        merge = config.vision_config.spatial_merge_size
        return [(torch.arange(total), Grid(frames, height // merge, width // merge))]
    tile = family.visual_tokens(config, family.grid(config))
    side = int(tile**0.5)
    if name.startswith("llava_onevision"):
        out = [(torch.arange(tile), Grid(1, side, side))]
        rest = total - tile
        if rest > 1:  # a square picture: as many rows as columns, and a line break behind each row
            rows = int(rest**0.5)
            assert rows * (rows + 1) == rest
            index = torch.arange(rest).view(rows, rows + 1)[:, :-1].flatten()
            out.append((index + tile, Grid(1, rows, rows)))
        return out
    return [(torch.arange(first, first + tile), Grid(1, side, side)) for first in range(0, total, tile)]


@pytest.mark.parametrize(
    "kind", ["visionzip", "renumbered", "fastv", "explainability", "glimpse_prune", "flexselect_lite"]
)
@every_case
def test_saved_and_loaded_through_the_auto_classes(name, kind, tmp_path):
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.reduction == model.config.reduction
    torch.testing.assert_close(last_logits(again.eval(), batch), last_logits(model, batch), rtol=0, atol=0)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)


@pytest.mark.parametrize("kind", ["fastv", "flexselect_lite", "explainability", "glimpse_prune"])
@pytest.mark.parametrize("name", ["llava-clip", "qwen3_vl-qwen3_vl"])
def test_what_it_trains_is_saved_alone(name, kind, tmp_path):
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    torch.manual_seed(1)
    for compressor in family_of(model).compressors(model).values():
        for parameter in compressor.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    wanted = last_logits(model, batch)
    laco.save_compressor(model, tmp_path / "adapter")
    again, its = deepcopy(built(name, "stock"))
    laco.load_compressor(again, its, tmp_path / "adapter")
    assert torch.equal(last_logits(again, batch), wanted)


@every_kind
@every_case
def test_decompressed_is_the_model_from_before(name, kind):
    stock, processor = built(name, "stock")
    model, _ = reduced(name, methods(name)[kind])
    laco.decompress(model, None)
    assert [type(part) for part in model.modules()] == [type(part) for part in stock.modules()]
    assert model.config.to_dict() == stock.config.to_dict()
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    assert torch.equal(last_logits(model, batch), last_logits(stock, batch))


@pytest.mark.parametrize("kind", ["fastv", "fastv_renumbered"])
@pytest.mark.parametrize("name", ["llava-siglip", "llava_onevision-clip", "qwen2_5_vl-qwen2_5_vl"])
def test_positions_behind_a_point_inside_the_language_model(name, kind):
    """The stock layers, the last of which gets by hand what is left at its old positions, or counted anew."""
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].inputs(processor, ONE)
    seen: dict[str, Any] = {}
    language_model = family_of(model).language_model(model)
    hook = language_model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        outputs = model(**batch, use_cache=True)
    hook.remove()
    columns = kept_columns(outputs.past_key_values)
    assert columns is not None
    (left,) = columns[-1]
    length = batch["input_ids"].shape[1]
    assert len(left) < length
    positions = seen.get("position_ids")
    positions = (torch.arange(length)[None] if positions is None else positions)[-3:]
    stock = family_of(model).language_model(built(name, "stock")[0])
    with torch.no_grad():
        entered = stock(inputs_embeds=seen["inputs_embeds"], position_ids=positions, output_hidden_states=True)
        x_LD = entered.hidden_states[last_layer(name)][:, left]
        if kind == "fastv_renumbered":
            order = {value: rank for rank, value in enumerate(sorted(set(positions[..., left].flatten().tolist())))}
            place = torch.tensor(
                [[order[value] for value in axis.tolist()] for axis in positions[..., left].view(-1, len(left))]
            )
            place = place.view(*positions.shape[:-1], len(left))
        else:
            place = positions[..., left]
        tables = stock.rotary_emb(x_LD, place)
        out = stock.layers[-1](x_LD, position_embeddings=tables, attention_mask=None)
        hidden = stock.norm(out[0] if isinstance(out, tuple) else out)
        wanted = built(name, "stock")[0].get_output_embeddings()(hidden[:, -1])
    torch.testing.assert_close(outputs.logits[:, -1], wanted, rtol=1e-4, atol=1e-5)


def test_positions_are_counted_anew_after_every_point():
    """Each point lowers the positions of what follows; so does the second of two pictures' turns, in its own layers."""
    model, processor = reduced("llava-siglip", laco.methods.FastV(keep=0.4, layer=1, positions="renumber"))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    places: list[list[int]] = []
    language_model = family_of(model).language_model(model)
    rotary = language_model.rotary_emb.register_forward_pre_hook(lambda _, args: places.append(args[1][0].tolist()))
    with torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
        length = batch["input_ids"].shape[1]
        columns = kept_columns(past)
        assert columns is not None
        left = columns[-1].shape[1]
        assert places == [list(range(length)), list(range(left))]
        places.clear()
        token = batch["input_ids"][:, -1:]
        model(input_ids=token, past_key_values=past)
        assert places == [[length], [left]]
        places.clear()
        model(**batch, past_key_values=past)  # a second picture
        assert places[0] == list(range(length + 1, 2 * length + 1))
        assert places[1] == list(range(left + 1, 2 * left + 1))
    rotary.remove()


@pytest.mark.parametrize("kind", ["div_prune", "renumbered", "visionzip"])
@every_case
def test_the_second_turn_of_a_dialogue_with_the_cache_of_the_first(name, kind):
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].inputs(processor, ONE)
    first = generated(model, batch, return_dict_in_generate=True)
    more = processor.tokenizer(" and now?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([first.sequences, more], dim=1)
    longer = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in longer:
        types = longer["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
    anew = generated(model, longer)
    texts = {key: value for key, value in longer.items() if key in ("input_ids", "attention_mask")}
    went_on = generated(model, texts, past_key_values=first.past_key_values)
    assert torch.equal(went_on, anew)


@every_kind
@every_case
def test_going_on_with_a_cache_at_once_equals_token_by_token(name, kind):
    """Of methods that look at the question, a second turn reads what the first question has left."""
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].inputs(processor, ONE)
    more = processor.tokenizer(" and now?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        pasts = [model(**batch, use_cache=True).past_key_values for _ in range(2)]
        at_once = model(input_ids=more, past_key_values=pasts[0]).logits
        one_by_one = [model(input_ids=token, past_key_values=pasts[1]).logits for token in more.split(1, dim=1)]
    torch.testing.assert_close(at_once, torch.cat(one_by_one, dim=1), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("method", ["div_prune", "visionzip", "vispruner", "scope", "holov", "prunesid"])
@pytest.mark.parametrize("name", ["llava-siglip", "llava-clip", "llava-dinov2", "internvl-internvit"])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_how_many_tokens_are_read_is_known_beforehand(name, method, keep):
    """Some methods keep CLS, too, which takes the place of a token that leaves, if it passes the projector at all."""
    model, processor = reduced(name, registry()[method](keep=keep))
    batch = tiny.CASES[name].inputs(processor, ONE)
    family = family_of(model)
    grid = family.grid(model.config)
    told = family.tokens_read(model.config, grid)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    parts = [rows.view(-1, round(family.visual_tokens(model.config, grid)), rows.shape[-1]) for rows in features]
    assert {int(count) for tiles in parts for count in (~tiles[..., 0].isnan()).sum(dim=1)} == {told}


def test_prumerge_looks_at_the_last_layer(monkeypatch):
    """Its queries and keys are of the encoder's last layer, its features of the one that the projector reads."""
    model, processor = reduced("llava-clip", laco.methods.PruMerge())
    assert model.config.vision_feature_layer == -2
    batch = tiny.CASES["llava-clip"].inputs(processor, ONE)
    seen: list[Signals] = []
    plan = laco.methods.PruMerge.plan
    monkeypatch.setattr(
        laco.methods.PruMerge, "plan", lambda self, signals: (seen.append(signals), plan(self, signals))[1]
    )
    last_logits(model, batch)
    encoder = family_of(model).encoder(model)
    layer = family_of(model).layers(model)[-1]
    with torch.no_grad():
        hidden = encoder(batch["pixel_values"], output_hidden_states=True).hidden_states
        normed = layer.layer_norm1(hidden[-2][0])
        assert torch.equal(seen[0].features, hidden[-2][0])
        for found, project in ((seen[0].queries, layer.self_attn.q_proj), (seen[0].keys, layer.self_attn.k_proj)):
            torch.testing.assert_close(found.flatten(1), project(normed))


def test_pyramid_drop_asks_for_every_answer_in_training(monkeypatch):
    """The queries are the tokens before answers, in one sample two, in the other, which is padded, one."""
    model, processor = reduced("llava-siglip", laco.methods.PyramidDrop(keep=0.3, layer=1))
    batch = tiny.CASES["llava-siglip"].inputs(processor, *prompts("llava-siglip")[:2])
    labels = torch.full_like(batch["input_ids"], -100)
    ends = batch["attention_mask"].flip(1).argmax(dim=1).neg() + labels.shape[1]
    for row, starts in enumerate([(-5, -2), (-3,)]):
        for start in starts:
            place = int(ends[row]) + start
            labels[row, place : place + 2] = batch["input_ids"][row, place : place + 2]
    rows: list[list[int]] = []
    queries = laco.methods.PyramidDrop.queries

    def noting(self, signals):
        rows.append(queries(self, signals).tolist())
        return queries(self, signals)

    monkeypatch.setattr(laco.methods.PyramidDrop, "queries", noting)
    model.train()(**batch, labels=labels).loss.backward()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert rows == [[lengths[0] - 6, lengths[0] - 3], [lengths[1] - 4]]


@every_case
def test_the_cache_holds_what_is_left_and_counts_what_was_read(name):
    model, processor = reduced(name, laco.methods.FastV(keep=0.4, layer=last_layer(name)))
    batch = tiny.CASES[name].inputs(processor, ONE)
    with torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
    length = batch["input_ids"].shape[1]
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    held = [layer.keys.shape[-2] for layer in past.layers]
    assert held == [length] * last_layer(name) + [length - visual + round(0.4 * visual)]
    assert past.get_seq_length() == length
    assert [columns.shape[1] for columns in kept_columns(past)] == held


@every_kind
@pytest.mark.parametrize("name", ["llava-siglip", "qwen3_vl-qwen3_vl"])
def test_gradients_and_their_checkpointing(name, kind):
    from laco.families.compat import checkpoint_activations

    model, processor = reduced(name, methods(name)[kind])
    model.train()
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    labels[:, :-3] = -100

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    family = family_of(model)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in family.layers(model)[0].parameters())
    checkpoint_activations(model)
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llava-clip", "llava_onevision-siglip"])
@pytest.mark.parametrize("method", [laco.EViT(keep=0.5), laco.ToMe(r=4)], ids=lambda method: method.name)
def test_tokens_that_reducers_leave_out_have_no_gradient(name, method):
    """A row of NaN must not reach the gradient of the projector's weights, which sums over all rows."""
    model, processor = reduced(name, method)
    model.train()
    batch = tiny.CASES[name].inputs(processor, *prompts(name))
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)
    model(**batch, labels=labels).loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["model.multi_modal_projector.linear_1.weight"].abs().max() > 0


@pytest.mark.parametrize("name", ["llava_onevision-siglip", "qwen2_5_vl-qwen2_5_vl"])
@pytest.mark.parametrize("kind", ["div_prune", "dyntok", "fastv", "glimpse_prune"])
def test_videos(name, kind):
    model, processor = reduced(name, methods(name)[kind])
    batch = tiny.CASES[name].videos(model, processor, 3, 0)
    full = tiny.CASES[name].videos(*built(name, "stock"), 3, 0)
    assert (last_logits(model, batch) - last_logits(built(name, "stock")[0], full)).abs().max() > 1e-4
    cached, uncached = (generated(model, batch, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_beams_keep_their_own_cache():
    model, processor = reduced("llava-siglip", laco.methods.DynTok(threshold=0.2))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE, TWO)
    cached, uncached = (generated(model, batch, num_beams=3, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_a_method_by_the_question_wants_the_question():
    model, processor = reduced("llava-siglip", laco.methods.CDPruner(keep=0.3))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    with pytest.raises(laco.LacoError, match="needs the question"):
        model.get_image_features(pixel_values=batch["pixel_values"])
    alone = {**batch, "input_ids": batch["input_ids"][batch["input_ids"] == model.config.image_token_id][None]}
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    with pytest.raises(laco.LacoError, match="needs text, but the prompt has none"):
        model(**alone)


def test_errors_of_compress():
    model, processor = deepcopy(built("llava-siglip", "stock"))
    with pytest.raises(laco.LacoError, match="last point can be"):
        laco.compress(model, processor, laco.methods.FastV(layer=10))
    laco.compress(model, processor, laco.methods.DivPrune(keep=0.5))
    with pytest.raises(laco.LacoError, match="already has div_prune at that place"):
        laco.compress(model, processor, laco.methods.CDPruner())
    gemma, its = deepcopy(built("gemma3-siglip", "stock"))
    with pytest.raises(laco.LacoError, match="div_prune cannot run here"):
        laco.compress(gemma, its, laco.methods.DivPrune(keep=0.5))
    assert type(gemma) is type(built("gemma3-siglip", "stock")[0])


def test_a_selector_and_a_method_inside_the_language_model_and_a_merger_together():
    model, processor = deepcopy(built("llava-siglip", "stock"))
    laco.compress(model, processor, laco.LaCo(depth=1 / 2, factor=2))
    laco.compress(model, processor, laco.methods.DivPrune(keep=7))
    laco.compress(model, processor, laco.methods.FastV(keep=3, layer=last_layer("llava-siglip")))
    batch = tiny.CASES["llava-siglip"].inputs(processor, ONE)
    with torch.no_grad():
        past = model(**batch, use_cache=True).past_key_values
    text = int((batch["input_ids"] != model.config.image_token_id).sum())
    assert {layer.keys.shape[-2] - text for layer in past.layers} == {7, 3}
    assert batch["input_ids"].shape[1] - text == 7  # of the 9 that the merger leaves


# Methods that drop tokens at several points need as many layers.
SEVERAL_POINTS = {"pyramid_drop", "sparsevlm", "transprune"}
IN_TINY_MODELS = [
    name
    for name, method in registry().items()
    if issubclass(method, Selector | DecoderMethod)
    and name not in SEVERAL_POINTS
    and not getattr(method, "video_only", False)
]


@pytest.mark.parametrize("kind", IN_TINY_MODELS)
def test_every_method_runs_as_it_is_by_default(kind):
    model, processor = deepcopy(built("llava-clip", "stock"))
    method = laco.methods.get(kind)
    laco.compress(model, processor, method(layer=1) if issubclass(method, DecoderMethod) else method())
    assert last_logits(model, tiny.CASES["llava-clip"].inputs(processor, ONE)).isfinite().all()


@pytest.mark.parametrize("kind", sorted(SEVERAL_POINTS))
def test_points_past_the_end_are_refused(kind):
    model, processor = deepcopy(built("llava-clip", "stock"))
    with pytest.raises(laco.LacoError, match=f"{kind} drops tokens between layers .* last point can be 1; got 3"):
        laco.compress(model, processor, laco.methods.get(kind)())
