"""What holds for Qwen2-VL, Qwen2.5-VL and Qwen3-VL alike. What is special about one has a file of its own."""

import math
import random
from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from typer.testing import CliRunner

import laco
import tiny
from families import qwen
from laco.ask import ask
from laco.cli import app
from laco.cost import stage_flops
from laco.errors import LacoError
from laco.evaluate.generation import answer, encode, greedy
from laco.families import family_of
from laco.families.encoders import encoder_of
from laco.train.trainer import group_of
from tiny.families.qwen2_5_vl import qwen2_5_vl
from tiny.families.qwen2_vl import PATCH, patches, qwen2_vl
from tiny.families.qwen3_vl import qwen3_vl

MAKE = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
families = pytest.mark.parametrize("name", MAKE)
SIZES = random.Random(0)

METHODS = {
    "none": [],
    "after the first": [laco.LaCo(layer=1, shortcut="saliency")],
    "after the third": [laco.WindowMerger(layer=3)],
    "after the last": [laco.LaCo(layer=4)],
    "map": [laco.LDPv2(layer=2)],
    "map after the last": [laco.LDPv2(layer=4)],
    "TokenPacker": [laco.TokenPacker()],
    "factor 3": [laco.LaCo(layer=2, factor=3, shortcut="saliency")],
    "map, factor 3": [laco.LDPv2(layer=1, factor=3)],
    "factor 4": [laco.LaCo(layer=1, factor=4)],
    "two": [laco.LaCo(layer=1), laco.LDPv2(layer=3)],
    "two, the later one first": [laco.LaCo(layer=4), laco.LDPv2(layer=2)],
    "factor 1 and 2": [laco.LaCo(layer=1, factor=1), laco.LaCo(layer=3)],
}


def compressed(name, methods, **settings):
    """A model in double precision, how it was before, and its processor."""
    model, processor = MAKE[name](**settings)
    model.double()
    stock = deepcopy(model)
    for method in methods:
        laco.compress(model, processor, method)
    tiny.scramble(model)
    return model, stock, processor


@families
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_features_equal_a_reference_by_coordinates(name, methods):
    factors = math.prod(method.factor for method in methods)
    unit = 2 * factors
    windows = {"window": 2 * unit} if name == "qwen2_5_vl" else {}  # of several blocks, so that their order changes
    model, stock, _ = compressed(name, methods, **windows)
    # Pictures of several sizes, with whole and cut windows, then videos of an odd and an even number of frames.
    grids = [(1, 2 * unit, 3 * unit), (1, unit, unit), (3, unit, 2 * unit), (2, 2 * unit, unit)]
    values = patches(model.config.vision_config, *grids).double()
    parts = values.split([math.prod(grid) for grid in grids])
    wanted = [qwen.features(stock, model, grid, part) for grid, part in zip(grids, parts, strict=True)]

    output = model.model.get_image_features(values, torch.tensor(grids))
    taps = getattr(output, "deepstack_features", None) or []
    found = [output.pooler_output, *taps]
    assert [len(picture) for picture in output.pooler_output] == [math.prod(grid) // unit**2 for grid in grids]
    for level, pictures in enumerate(found):
        reference = torch.cat([levels[level] for levels in wanted])
        packed = pictures if isinstance(pictures, torch.Tensor) else torch.cat(pictures)  # transformers < 5.19: taps
        torch.testing.assert_close(packed, reference, rtol=0, atol=2e-6)


@families
def test_hidden_states_are_merged_from_k_on(name):
    model, _, _ = compressed(name, [laco.AveragePool(layer=1), laco.AveragePool(layer=3)])
    values = patches(model.config.vision_config, (1, 16, 8)).double()
    states = model.model.visual(values, torch.tensor([[1, 16, 8]]), output_hidden_states=True).hidden_states
    assert [len(state) for state in states] == [128, 32, 32, 8, 8]


@families
@pytest.mark.parametrize(
    "methods",
    [[laco.LaCo(layer=1)], [laco.LDPv2(layer=4)], [laco.LaCo(layer=1), laco.LaCo(layer=2)]],
    ids=["one", "last", "two"],
)
@torch.no_grad()
def test_placeholders_equal_features_for_many_sizes(name, methods):
    model, processor = MAKE[name]()
    for method in methods:
        laco.compress(model, processor, method)
    family, pictures = family_of(model), processor.image_processor
    unit = PATCH * model.config.vision_config.spatial_merge_size
    for count in range(200):
        height, width = SIZES.randint(2, 300), SIZES.randint(2, 300)
        patch_count = pictures.get_number_of_image_patches(height, width)
        placeholders = processor._get_num_multimodal_tokens([[height, width]]).num_image_tokens[0]
        assert placeholders * unit**2 == patch_count * PATCH**2
        if count < 20:
            batch = processor(text="<image>", images=[tiny.picture(count, height, width)], return_tensors="pt")
            assert (batch["input_ids"] == model.config.image_token_id).sum() == placeholders
            (found,) = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
            assert len(found) == placeholders
            _, rows, columns = batch["image_grid_thw"][0].tolist()
            grid = family.grid(model.config, (rows * PATCH, columns * PATCH))
            assert family.visual_tokens(model.config, grid) == placeholders


@families
def test_numbers_of_the_processor_and_of_the_configuration(name):
    model, processor = MAKE[name]()
    size = dict(processor.image_processor.size)
    laco.compress(model, processor, laco.LaCo(layer=1))
    vision = model.config.vision_config
    assert (vision.spatial_merge_size, vision.own_merge_size, processor.image_processor.merge_size) == (4, 2, 4)
    assert dict(processor.image_processor.size) == size
    assert next(m for m in model.model.visual.merger.modules() if isinstance(m, torch.nn.Linear)).in_features == 4 * 16
    laco.decompress(model, processor)
    assert (model.config.vision_config.spatial_merge_size, processor.image_processor.merge_size) == (2, 2)
    assert not hasattr(model.config.vision_config, "own_merge_size")


@families
def test_a_video_processor_gets_the_same_numbers(name):
    """Stock processors have one; here it is a stand-in, because a real one needs torchvision."""

    class Videos:
        merge_size, patch_size, temporal_patch_size = 2, PATCH, 2

    model, processor = MAKE[name]()
    processor.video_processor = Videos()
    laco.compress(model, processor, laco.LaCo(layer=1))
    assert processor.video_processor.merge_size == 4
    processor.video_processor.merge_size = 2
    with pytest.raises(LacoError, match=r"video_processor\.merge_size is 2, the model needs 4"):
        laco.decompress(model, processor)
    processor.video_processor.merge_size = 4
    laco.decompress(model, processor)
    assert processor.video_processor.merge_size == 2


@families
@pytest.mark.parametrize("part", ["patch_size", "temporal_patch_size", "merge_size"])
def test_other_processors_are_refused(name, part):
    model, processor = MAKE[name]()
    setattr(processor.image_processor, part, 3)
    with pytest.raises(LacoError, match=f"image_processor.{part} is 3, the model needs"):
        laco.compress(model, processor, laco.LaCo(layer=1))
    assert type(model) is family_of(model).stock


@families
def test_a_contradicting_configuration_is_refused(name):
    model, processor = MAKE[name]()
    laco.compress(model, processor, laco.LaCo(layer=1))
    settings = model.config.vision_config.to_dict() | {"spatial_merge_size": 2}
    with pytest.raises(LacoError, match="spatial_merge_size 2 contradicts the compression"):
        type(model.config.vision_config)(**settings)


@families
def test_the_grid_needs_a_size_that_the_processor_gives(name):
    model, processor = MAKE[name]()
    laco.compress(model, processor, laco.LaCo(layer=1))
    family = family_of(model)
    assert family.own_grid(model.config, (32, 48)) == (1, 8, 12)
    assert family.grid(model.config, (32, 48)) == (1, 4, 6)
    with pytest.raises(LacoError, match=f"the grid of {name} depends on the picture"):
        family.grid(model.config)
    with pytest.raises(LacoError, match="multiples of 16 pixels"):
        family.grid(model.config, (40, 48))


@families
@pytest.mark.parametrize(
    "methods", [v for k, v in METHODS.items() if "factor 3" not in k], ids=[k for k in METHODS if "factor 3" not in k]
)
def test_flops_are_what_torch_counts(name, methods):
    model, processor = MAKE[name]()
    planned = stage_flops(model.config, methods, size=(64, 96))
    for method in methods:
        laco.compress(model, processor, method)
    flops = stage_flops(model, size=(64, 96))
    assert planned == flops == stage_flops(model.config, size=(64, 96))
    model.set_attn_implementation("eager")
    grid = torch.tensor([[1, 16, 24]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.visual(patches(model.config.vision_config, (1, 16, 24)), grid)
    assert flops.encoder + flops.projector == counter.get_total_flops()


@families
def test_ask_counts_and_places_pictures_as_generate_does(name):
    model, processor = MAKE[name]()
    shown = [tiny.picture(seed, 100, 60) for seed in range(2)]
    before = ask(model, processor, shown, "what?", max_new_tokens=4)
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    tiny.scramble(model)
    asked = ask(model, processor, shown, "what?", max_new_tokens=4)
    assert before.visual_tokens == asked.visual_tokens_before > asked.visual_tokens

    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    inputs = encode(processor, ["what?"], [shown])
    with torch.inference_mode():
        output = model.generate(**inputs, **greedy(processor, model, 4))
    plain, count = seen[0], len(seen)
    ask(model, processor, shown, "what?", max_new_tokens=4)
    assert torch.equal(seen[count][-3:], plain[-3:])
    assert processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == asked.answer


@families
def test_evaluation_in_batches_answers_as_one_by_one(name, tmp_path):
    from laco.data import Sample

    model, processor = MAKE[name]()
    laco.compress(model, processor, laco.LaCo(depth=1 / 4))
    samples = []
    for seed, (height, width) in enumerate([(40, 60), (90, 30), (50, 50)]):
        path = tmp_path / f"{seed}.png"
        tiny.picture(seed, height, width).save(path)
        samples += [
            Sample(id=f"{seed}{word}", family="a", question=word, answer="x", images=(path,))
            for word in ("a?", "and b?")
        ]
    together = answer(model, processor, samples, batch_size=4, max_new_tokens=3, progress=False)
    alone = answer(model, processor, samples, batch_size=1, max_new_tokens=3, progress=False)
    assert together == alone
    assert all(count > 0 for count in together.visual_tokens)


@families
def test_the_command_line(name, tmp_path):
    model, processor = MAKE[name]()
    laco.save_pretrained(model, processor, tmp_path / "stock")
    tiny.picture(1, 80, 64).save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text('{"id": "1", "image": "a.png", "question": "what?", "answer": "this"}\n')

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    small, short = tmp_path / "small", ("--max-new-tokens", 2)
    said = run("compress", tmp_path / "stock", "-o", small, "--depth", "1/4")
    assert "parameters" in said
    assert "visual tokens" not in said  # they depend on the picture
    assert "80 → 20" in run("ask", small, "what?", "--image", tmp_path / "a.png", *short)
    assert "visual tokens: 20.0" in run("eval", small, "--data", tmp_path / "data.jsonl", *short)


@families
def test_reloaded_configurations_keep_their_classes(name, tmp_path):
    model, processor = MAKE[name]()
    laco.compress(model, processor, laco.LaCo(layer=1))
    model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(model.config)
    assert type(again.vision_config) is type(model.config.vision_config)
    assert again.vision_config.to_dict() == model.config.vision_config.to_dict()
    assert encoder_of(again.vision_config).name == name


def test_hub_keys_of_qwen2_load(tmp_path):
    """Checkpoints on the hub have `visual.*` and `model.layers.*`, from before transformers 5."""
    from safetensors.torch import save_file

    for make in (qwen2_vl, qwen2_5_vl):
        model, processor = make()
        directory = tmp_path / type(model).__name__
        laco.save_pretrained(model, processor, directory)
        renamed = {
            key.removeprefix("model.") if key.startswith("model.visual") else key.replace("language_model.", ""): tensor
            for key, tensor in model.state_dict().items()
            if key != "lm_head.weight"  # tied
        }
        assert {key.split(".")[0] for key in renamed} == {"visual", "model"}
        save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
        laco.compress(model, processor, laco.LaCo(layer=1))
        again, info = type(model).from_pretrained(directory, config=model.config, output_loading_info=True)
        assert info["missing_keys"] == {key for key in model.state_dict() if ".compressor." in key}
        assert not info["unexpected_keys"]
        torch.testing.assert_close(again.state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
        torch.testing.assert_close(
            again.model.visual.blocks[3].attn.qkv.weight, model.model.visual.blocks[3].attn.qkv.weight
        )


@families
def test_mergers_of_the_encoder_are_projectors_in_training(name):
    model, _ = MAKE[name]()
    groups = {group_of(key, 2) for key, _ in model.named_parameters() if ".merger." in key or "deepstack" in key}
    assert groups == {"projector"}
    assert group_of("model.visual.blocks.1.norm1.weight", 2) == "encoder_before"
    assert group_of("model.visual.blocks.2.norm1.weight", 2) == "encoder_after"


@pytest.mark.parametrize("kind", ["Qwen3VLMoe", "Qwen2_5OmniThinker"])
def test_relatives_are_refused(kind):
    import transformers

    model = type(f"{kind}ForConditionalGeneration", (torch.nn.Module,), {})()
    with pytest.raises(LacoError, match=f"{kind}ForConditionalGeneration belongs to no family"):
        laco.compress(model, None, laco.LaCo())
    with pytest.raises(LacoError, match="belongs to no family"):
        stage_flops(getattr(transformers, f"{kind}Config")())
