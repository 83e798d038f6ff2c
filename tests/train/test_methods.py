"""Methods that are trained: what they are told, the losses of their own, and the recipes that run them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import laco
from laco.errors import LacoError
from laco.families import family_of
from laco.families.reduction.lesson import Lesson
from laco.grid import Grid
from laco.methods import FlexSelect, Signals, SPViT, from_dict
from laco.methods.explainability import label, relevance, relevance_loss
from laco.methods.flexselect import order_loss
from laco.methods.spvit import ratio_loss
from laco.train import load_recipe, run
from laco.train.boxes import boxes_about
from laco.train.collate import Collator
from laco.train.data import make_source
from laco.train.recipe import Data, Stage, parse_recipe
from laco.train.scratch import build_new
from laco.train.trainer import Learner, feature_loss
from laco.world import SIDE, World
from laco.world.glyphs import COLOURS
from small_runs import ANSWER, new_model, recipe, weights

RECIPES = Path(__file__).parents[2] / "recipes"
# The parts of the loss that a recipe's last step logs.
PARTS = {
    "glimpse-prune": {"answer", "glimpse_prune"},
    "explainability": {"answer"},  # a random model says nothing right
    "spvit": {"answer", "spvit", "distill", "features"},
    "dyntok": {"answer"},
    "flexselect-lite": {"answer", "flexselect"},
}
TAUGHT = {
    "glimpse_prune": {"method": "glimpse_prune", "layer": 2, "width": 16, "condition": 16},
    "spvit": {"method": "spvit", "heads": 4},
    "explainability": {"method": "explainability", "keep": 0.3},
    "flexselect": {"method": "flexselect", "lite": 1, "width": 16, "keep": 0.3},
}


def small():
    """A model with three layers in its language model."""
    torch.manual_seed(1)
    new = new_model()
    return build_new(new.model_copy(update={"text": {**new.text, "num_hidden_layers": 3}}))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    laco.save_pretrained(*small(), directory)
    return directory


def logged(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "training_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("name", PARTS)
def test_our_recipes_run(name: str, base: Path, tmp_path: Path) -> None:
    given = load_recipe(RECIPES / f"{name}.yaml", model=str(base), output=str(tmp_path / "out")).model_dump()
    given |= {"evaluate": {"samples": 7}, "log_steps": 1}
    given["stages"] = [stage | {"steps": 2, "batch_size": 2, "warmup": 0.0} for stage in given["stages"]]
    out = run(parse_recipe(given), progress=False)
    steps = logged(out)
    assert len(steps) == 2 * len(given["stages"])
    assert steps[-1].keys() & {"answer", "dense", "distill", "features", *TAUGHT} == PARTS[name]
    assert all(np.isfinite(value) for step in steps for value in step.values() if isinstance(value, float))
    before, after = weights(base), weights(out)
    rates = given["stages"][-1]["lr"]
    frozen = isinstance(rates, dict) and rates.keys() == {"compressor"}
    assert all(torch.equal(before[key], after[key]) for key in before) == frozen
    again, _ = laco.from_pretrained(out)
    (method,) = family_of(again).methods(again.config)
    assert method == from_dict(given["compress"][0])


@pytest.mark.parametrize("name", TAUGHT)
def test_gradients_of_the_losses_reach_what_is_trained(name: str) -> None:
    """The loss is that of the method; and with a frozen model it moves the compressor alone."""
    model, learner, batch = lesson_of(name)
    out = learner(**batch)
    assert out[name] > 0
    torch.testing.assert_close(out["loss"], out["answer"] + 0.5 * out[name])
    out["loss"].backward()
    for compressor in family_of(model).compressors(model).values():
        moved = [p.grad for p in compressor.parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert len(moved) >= 0.5 * len(list(compressor.parameters()))


def lesson_of(name: str, questions: int = 1):
    torch.manual_seed(0)
    model, processor = small()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    laco.compress(model, processor, from_dict(TAUGHT[name]))
    model.requires_grad_(False)
    for compressor in family_of(model).compressors(model).values():
        compressor.requires_grad_(True)
    stage = Stage(name="s", steps=1, batch_size=3, lr=1e-3, questions=questions, method_loss=0.5)
    source = make_source(Data(), stage, 0, 0, 16)
    if name == "explainability":
        processor = small()[1]  # prompts with a placeholder for every token are answered by hand below
    batch = Collator(processor)([source[i] for i in range(3)])
    if name == "explainability":
        say_right(model, batch)
    return model, Learner(model.train(), stage), batch


def test_lessons_are_the_same_without_placeholders_for_dropped_tokens() -> None:
    """FlexSelect-Lite learns what the question attends to in the full picture, whatever the prompt has."""
    model, learner, _ = lesson_of("flexselect")
    short, full = (Collator(its) for its in (laco.compress(*small(), from_dict(TAUGHT["flexselect"]))[1], small()[1]))
    source = make_source(Data(), learner.stage, 0, 0, 16)
    items = [source[i] for i in range(3)]
    lessons = [learner(**collate(items)) for collate in (short, full)]
    visual = [(collate(items)["input_ids"] == model.config.image_token_id).sum() for collate in (short, full)]
    assert visual[0] < visual[1]
    for key in ("flexselect", "answer", "loss"):
        torch.testing.assert_close(lessons[0][key], lessons[1][key])


@torch.no_grad()
def say_right(model, batch) -> None:
    """Makes the labels what the model itself says, token after token: answers of two tokens that are right."""
    stock = model.model.language_model
    embeds = model.model.get_input_embeddings()(batch["input_ids"])
    features = torch.cat(list(model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))
    embeds[batch["input_ids"] == model.config.image_token_id] = features.view(-1, embeds.shape[-1])
    for row, labels in enumerate(batch["labels"]):
        for column in (labels != -100).nonzero().flatten().tolist():
            hidden = stock.stock_forward(
                inputs_embeds=embeds[row : row + 1, :column], attention_mask=torch.ones(1, column, dtype=torch.long)
            ).last_hidden_state
            said = model.lm_head(hidden[0, -1]).argmax()
            labels[column] = batch["input_ids"][row, column] = said
            embeds[row, column] = model.model.get_input_embeddings()(said)


def test_the_relevance_that_is_taught_is_that_of_the_stock_model() -> None:
    model, learner, batch = lesson_of("explainability")
    got = learner(**batch)["explainability"]
    method = family_of(model).methods(model.config)[0]
    module = family_of(model).compressors(model)["selector"]
    stock, _ = laco.decompress(*laco.compress(*small(), method))
    stock.load_state_dict({key: value for key, value in model.state_dict().items() if ".compressor." not in key})
    stock.eval().set_attn_implementation("eager")
    losses = []
    for row in range(3):
        length = int((batch["attention_mask"][row, 0].sum(dim=1) == batch["position_ids"][row] + 1).sum())
        said = (batch["labels"][row] != -100).nonzero().flatten()
        end = int(said[-1]) + 1
        assert end <= length
        ids = batch["input_ids"][row : row + 1, :end]
        out = stock(input_ids=ids, pixel_values=batch["pixel_values"][row : row + 1], output_attentions=True)
        visual = (ids[0] == model.config.image_token_id).nonzero().flatten()
        rows = [relevance(out.logits[0, c - 1, ids[0, c]], out.attentions, c - 1)[visual] for c in said.tolist()]
        behind = torch.arange(int(visual[-1]) + 1, int(said[0]))
        attention = out.attentions[0][0, :, behind][:, :, visual].mean(dim=(0, 1))
        logits = module(attention / attention.mean())
        losses.append(relevance_loss(logits, label(torch.stack(rows))))
    torch.testing.assert_close(got, torch.stack(losses).mean(), rtol=1e-3, atol=1e-5)


def test_wrong_answers_teach_nothing() -> None:
    _, learner, batch = lesson_of("explainability")
    column = int((batch["labels"][0] != -100).nonzero()[0])
    batch["labels"][:, column:] = batch["labels"][:, column:].where(batch["labels"][:, column:] < 0, 7)
    batch["input_ids"] = batch["input_ids"].where(batch["labels"] < 0, 7)
    out = learner(**batch)
    assert "explainability" not in out
    out["loss"].backward()  # goes through, to nothing


def test_spvit_learns_from_its_decisions() -> None:
    _, learner, batch = lesson_of("spvit", questions=3)
    torch.manual_seed(5)
    out = learner(**batch)
    torch.manual_seed(5)
    kept: list[torch.Tensor] = []
    masked = SPViT.mask

    def noting(self, *args):
        x, state = masked(self, *args)
        kept.append(state.policy_BN[:, : state.sources].mean())
        return x, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SPViT, "mask", noting)
        learner(**batch)
    wanted = 2 * ratio_loss([k[None] for k in kept], (0.7, 0.49, 0.343))
    torch.testing.assert_close(out["spvit"], wanted)
    assert len(kept) == 3


def test_the_glimpse_learns_where_to_look() -> None:
    model, learner, batch = lesson_of("glimpse_prune")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = learner(**batch)
        out["loss"].backward()
        optimizer.step()
        losses.append(out["glimpse_prune"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_order_of_scores_is_learned() -> None:
    teacher = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert order_loss(teacher.exp(), teacher) == pytest.approx(0, abs=1e-5)
    assert order_loss(-teacher, teacher) == pytest.approx(2, abs=1e-5)
    torch.manual_seed(0)
    mine = torch.rand(30)
    assert order_loss(mine, teacher) == pytest.approx(1 - spearman(mine, teacher), abs=0.02)
    assert order_loss(mine[:1], teacher[:1]) == 0

    model, learner, batch = lesson_of("flexselect")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = learner(**batch)
        out["loss"].backward()
        optimizer.step()
        losses.append(out["flexselect"].item())
    assert losses[-1] < losses[0] - 0.3


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    ranks = [[sum(y < x for y in values) for x in values] for values in (one.tolist(), other.tolist())]
    return float(np.corrcoef(ranks)[0, 1])


def test_the_lite_scorer_by_hand() -> None:
    """Of one layer, query by query; a text token sees the picture, the text up to it, and nothing else."""
    torch.manual_seed(0)
    scorer = FlexSelect(lite=1, width=8).build(6)
    tokens, text = torch.randn(5, 6), torch.randn(3, 6)
    layer = scorer.layers[0]
    x = torch.cat([scorer.visual(tokens), scorer.words(text)])
    q, k, v = layer.qkv(layer.norm1(x)).split(8, dim=-1)
    mixed = torch.zeros(8, 8)
    for row in range(8):
        for head in range(4):
            part = slice(2 * head, 2 * head + 2)
            weights = (k[: row + 1, part] @ q[row, part] / 2**0.5).softmax(dim=0)
            mixed[row, part] = weights @ v[: row + 1, part]
    x = x + layer.out(mixed)
    x = scorer.norm(x + layer.mlp(layer.norm2(x)))
    got = scorer(tokens, text)
    assert got.shape == (4, 3, 5)
    for head in range(4):
        part = slice(2 * head, 2 * head + 2)
        for row in range(3):
            logits = scorer.k(x)[: 5 + row + 1, part] @ scorer.q(x)[5 + row, part] / 2**0.5
            torch.testing.assert_close(got[head, row], logits.softmax(dim=0)[:5])
    with pytest.raises(LacoError, match="lite needs the module"):
        FlexSelect(lite=1)(Signals(grid=Grid(1, 1, 5), tokens=tokens, text=text))
    with pytest.raises(LacoError, match="4 heads divide"):
        FlexSelect(lite=1, width=6)


def test_features_are_compared_where_tokens_are() -> None:
    theirs = torch.randn(2, 4, 3)
    mine = theirs.clone()
    mine[0, 1] = mine[1, 2:] = torch.nan
    assert feature_loss(mine, theirs) == pytest.approx(0, abs=1e-6)
    mine[0, 0] += torch.tensor([1.0, 0, 0])
    p, q = theirs[0, 0].softmax(dim=0), mine[0, 0].softmax(dim=0)
    torch.testing.assert_close(feature_loss(mine, theirs), (p * (p / q).log()).sum() / 5)
    with pytest.raises(LacoError, match="puts out 4 of a picture, the model's 2"):
        feature_loss(mine[:, :2], theirs)


def test_lessons_that_cannot_be_given(base: Path, tmp_path: Path) -> None:
    stages = [ANSWER | {"method_loss": 1.0}]
    with pytest.raises(LacoError, match="no method in the model has a loss of its own"):
        run(recipe(tmp_path / "out", model=str(base), stages=stages), progress=False)
    World(0)[0].picture.save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "a.png", "question": "q", "answer": "a"}) + "\n")
    keys = {"model": str(base), "compress": [TAUGHT["glimpse_prune"]], "data": {"source": str(tmp_path / "d.jsonl")}}
    with pytest.raises(LacoError, match=r"glimpse_prune learns from boxes .* data.source: world alone has"):
        run(recipe(tmp_path / "out2", stages=stages, **keys), progress=False)
    with pytest.raises(LacoError, match="learns from boxes"):
        Lesson().boxes_of(0, laco.methods.GlimpsePrune())


def test_boxes_hold_what_a_question_is_about() -> None:
    seen = set()
    for index in range(12):
        made = World(0)[index]
        pixels = made.pixels.astype(float)
        for question in made.questions:
            boxes = boxes_about(made.scene, question)
            assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in boxes)
            crops = [
                pixels[round(y1 * SIDE) : round(y2 * SIDE), round(x1 * SIDE) : round(x2 * SIDE)]
                for x1, y1, x2, y2 in boxes
            ]
            words = {part.strip("?") for part in question.question.split()} | {question.answer}
            seen.add(question.family)
            if question.family in ("word", "number"):
                assert len(crops) == len(question.answer)
                assert all(crop.min() < 130 for crop in crops)  # ink
                continue
            told = [
                shape.colour for shape in made.scene.shapes if question.family == "relation" and shape.kind in words
            ]
            told += [word for word in words if word in COLOURS and question.family in ("chart", "colour")]
            for colour in told:
                assert any(shows(crop, colour) for crop in crops), (question, colour)
            if question.family == "count":
                assert len(crops) == len(made.scene.shapes)
            if question.family == "locate":
                (crop,) = crops
                (shape,) = (shape for shape in made.scene.shapes if shape.kind in words)
                assert shows(crop, shape.colour)
    assert seen == {"word", "number", "chart", "colour", "count", "relation", "locate"}


def shows(crop: np.ndarray, colour: str) -> bool:
    """Whether a good part of a crop is of a colour."""
    near = np.abs(crop - np.asarray(COLOURS[colour])).max(axis=-1) < 40
    return bool(near.mean() > 0.2)
