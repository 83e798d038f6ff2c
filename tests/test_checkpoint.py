"""Saving and loading whole models and compressors alone, and what happens when files are not as they should be."""

import json
import multiprocessing
import resource
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import laco
import tiny
from laco.families import family_of
from laco.files import atomic_directory

METHODS = {"inside": laco.LaCo(depth=1 / 2), "projector": laco.TokenPacker()}


def logits_of(model, processor):
    batch = tiny.inputs(processor, ("a <image> b", [tiny.picture(1, 50, 110)]))
    with torch.no_grad():
        return model(**batch).logits


def content(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


@pytest.fixture
def base(tmp_path):
    """A stock model on the disk."""
    laco.save_pretrained(*tiny.llava(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def compressed(request):
    model, processor = laco.compress(*tiny.llava(), request.param)
    tiny.scramble(model)
    return model, processor


@pytest.mark.parametrize("name", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_whole_models_come_back_equal(name, method, tmp_path):
    model, processor = laco.compress(*tiny.FAMILIES[name](), method)
    tiny.scramble(model)
    for _ in range(2):  # the second time over the first
        laco.save_pretrained(model, processor, tmp_path / "model", extra_files={"recipe.json": "{}"})
    assert (tmp_path / "model" / "recipe.json").read_text() == "{}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    again, other = laco.from_pretrained(tmp_path / "model")
    assert type(again) is type(model)
    assert torch.equal(logits_of(again, other), logits_of(model, processor))


def test_from_pretrained_passes_settings_on_and_compresses(base):
    model, processor = laco.from_pretrained(base, compressor=laco.LaCo(layer=2), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert family_of(model).compressors(model).keys() == {"layers.2"}
    assert processor.patch_size == 16
    laco.decompress(model, processor)
    stock = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
    assert all(torch.equal(p, stock.get_parameter(name)) for name, p in model.named_parameters())


def test_a_reloaded_model_decompresses_unless_its_projector_is_gone(compressed, tmp_path):
    model, processor = compressed
    laco.save_pretrained(model, processor, tmp_path / "model")
    again, other = laco.from_pretrained(tmp_path / "model")
    if "projector" in family_of(model).compressors(model):
        before = again.config.to_dict()
        with pytest.raises(laco.LacoError, match="is not saved with a compressed model"):
            laco.decompress(again, other)
        assert again.config.to_dict() == before
        return
    laco.decompress(again, other)
    laco.decompress(model, processor)
    assert torch.equal(logits_of(again, other), logits_of(model, processor))


# Whole models whose weights do not fit ---------------------------------------------------------------------------


def edit(directory: Path, name: str, change) -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, metadata={"format": "pt"})


KEY = "model.vision_tower.encoder.layers.1.compressor.fc1.weight"


def drop(tensors):
    del tensors[next(key for key in tensors if key.endswith("encoder.layers.1.compressor.fc1.weight"))]


def add(tensors):
    tensors["model.vision_tower.encoder.layers.3.compressor.fc1.weight"] = torch.zeros(2)


def reshape(tensors):
    tensors[next(key for key in tensors if key.endswith("encoder.layers.1.compressor.fc1.weight"))] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"encoder.layers.1.compressor.fc1.weight missing"),
        (add, r"encoder.layers.3.compressor.fc1.weight not expected"),
        (reshape, r"encoder.layers.1.compressor.fc1.weight has shape \(3, 5\) instead of \(16, 64\)"),
    ],
    ids=["missing", "extra", "misshaped"],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    laco.save_pretrained(*laco.compress(*tiny.llava(), METHODS["inside"]), tmp_path / "model")
    edit(tmp_path / "model", "model.safetensors", change)
    with pytest.raises(laco.LacoError, match=message):
        laco.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("which", ["config", "weights"])
def test_compressed_configuration_and_weights_belong_together(which, base, tmp_path):
    laco.save_pretrained(*laco.compress(*tiny.llava(), METHODS["inside"]), tmp_path / "model")
    name = {"config": "config.json", "weights": "model.safetensors"}[which]
    (base / name).write_bytes((tmp_path / "model" / name).read_bytes())
    with pytest.raises(laco.LacoError, match="missing" if which == "config" else "not expected"):
        laco.from_pretrained(base)


def truncate(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def pickled(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def no_config(directory):
    (directory / "config.json").unlink()


def no_processor(directory):
    (directory / "processor_config.json").unlink()
    (directory / "tokenizer.json").unlink()


def unknown_method(directory):
    config = json.loads((directory / "config.json").read_text())
    vision = config["vision_config"]
    vision |= {"model_type": "laco_siglip_vision_model", "compression": [{"method": "lacco", "layer": 1}]}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [truncate, pickled, no_config, no_processor, unknown_method])
def test_damaged_directories_are_one_sentence(damage, base):
    damage(base)
    with pytest.raises(laco.LacoError) as caught:
        laco.from_pretrained(base)
    assert "\n" not in str(caught.value)


def test_nothing_in_a_checkpoint_is_executed(base, tmp_path):
    marker = tmp_path / "executed"
    (base / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"},
    }
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(laco.LacoError):
        laco.from_pretrained(base)
    assert not marker.exists()


def test_a_name_that_does_not_exist(tmp_path):
    with pytest.raises(laco.LacoError, match=r"cannot load .*nowhere"):
        laco.from_pretrained(tmp_path / "nowhere")


# Compressors alone -----------------------------------------------------------------------------------------------


def test_compressors_come_back_into_the_base_model(compressed, base, tmp_path):
    model, processor = compressed
    laco.save_compressor(model, tmp_path / "compressor")
    assert content(tmp_path / "compressor").keys() == {"compressor_config.json", "compressor.safetensors", "README.md"}
    again, other = laco.from_pretrained(base, compressor=tmp_path / "compressor")
    assert torch.equal(logits_of(again, other), logits_of(model, processor))
    model, processor = laco.from_pretrained(base)
    before = logits_of(model, processor)
    laco.load_compressor(model, processor, tmp_path / "compressor")
    assert torch.equal(logits_of(model, processor), logits_of(again, other))
    laco.decompress(model, processor)
    assert torch.equal(logits_of(model, processor), before)


def test_several_compressors_travel_together(base, tmp_path):
    model, processor = laco.from_pretrained(base)
    for method in (laco.LaCo(layer=2), laco.PixelShuffle(factor=3)):
        laco.compress(model, processor, method)
    tiny.scramble(model)
    laco.save_compressor(model, tmp_path / "both")
    assert {key.rsplit(".", 2)[0] for key in load_file(tmp_path / "both" / "compressor.safetensors")} >= {"layers.2"}
    again, other = laco.from_pretrained(base, compressor=tmp_path / "both")
    assert torch.equal(logits_of(again, other), logits_of(model, processor))


def test_weights_replace_those_of_the_same_compressor_only(base, tmp_path):
    model, processor = laco.from_pretrained(base, compressor=METHODS["inside"])
    laco.save_compressor(model, tmp_path / "compressor")
    saved = logits_of(model, processor)
    tiny.scramble(model)
    assert not torch.equal(logits_of(model, processor), saved)
    laco.load_compressor(model, processor, tmp_path / "compressor")
    assert torch.equal(logits_of(model, processor), saved)
    other, processor = laco.from_pretrained(base, compressor=laco.LaCo(depth=1 / 2, norm="rmsnorm"))
    with pytest.raises(laco.LacoError, match="already compressed in another way"):
        laco.load_compressor(other, processor, tmp_path / "compressor")


def test_the_model_card_says_what_it_is_and_how_to_load_it(base, tmp_path):
    model, _ = laco.from_pretrained(base, compressor=METHODS["inside"])
    laco.save_compressor(model, tmp_path / "compressor")
    card = (tmp_path / "compressor" / "README.md").read_text()
    for text in (
        str(base),
        "LaCo patch merge layer",
        "2 of 4",
        "2507.02279",
        laco.__version__,
        "laco.from_pretrained(",
    ):
        assert text in card
    config = json.loads((tmp_path / "compressor" / "compressor_config.json").read_text())
    assert config["laco_version"] == laco.__version__
    assert config["compression"][0]["factor"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.2.fc1.weight"), r"layers.2.fc1.weight missing"),
        (lambda t: t.update({"layers.3.fc1.weight": torch.zeros(2)}), r"layers.3.fc1.weight not expected"),
        (
            lambda t: t.update({"layers.2.fc1.weight": torch.zeros(16, 32)}),
            r"layers.2.fc1.weight has shape \(16, 32\) instead of \(16, 64\)",
        ),
    ],
    ids=["missing", "extra", "misshaped"],
)
def test_compressor_weights_that_do_not_fit_are_named(change, message, tmp_path):
    model, processor = laco.compress(*tiny.llava(), METHODS["inside"])
    laco.save_compressor(model, tmp_path / "c")
    laco.decompress(model, processor)
    edit(tmp_path / "c", "compressor.safetensors", change)
    before, keys = model.config.to_dict(), set(model.state_dict())
    with pytest.raises(laco.LacoError, match=message):
        laco.load_compressor(model, processor, tmp_path / "c")
    assert (model.config.to_dict(), set(model.state_dict()), processor.patch_size) == (before, keys, 8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny.llava(image_size=64), "its image_size is 48, here it is 64"),
        (lambda: tiny.llava(patch_size=4), r"its grid is \[1, 6, 6\], here it is \[1, 12, 12\]"),
        (lambda: tiny.llava(layers=6), "its layers is 4, here it is 6"),
        (lambda: tiny.llava("clip"), "its encoder is siglip, here it is clip"),
        (lambda: tiny.llava_onevision(), "its family is llava, here it is llava_onevision"),
    ],
)
def test_a_compressor_of_another_base_is_refused(other, message, tmp_path):
    model, _ = laco.compress(*tiny.llava(), METHODS["inside"])
    laco.save_compressor(model, tmp_path / "c")
    with pytest.raises(laco.LacoError, match=message):
        laco.load_compressor(*other(), tmp_path / "c")


@pytest.mark.parametrize("name", ["compressor_config.json", "compressor.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_damaged_compressors(name, damage, tmp_path):
    model, processor = laco.compress(*tiny.llava(), METHODS["inside"])
    laco.save_compressor(model, tmp_path / "c")
    laco.decompress(model, processor)
    path = tmp_path / "c" / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-40] if damage == "cut" else b"[1]")
    with pytest.raises(laco.LacoError, match="holds no compressor that can be read"):
        laco.load_compressor(model, processor, tmp_path / "c")


def test_there_must_be_a_compressor_to_save(tmp_path):
    model, _ = tiny.llava()
    with pytest.raises(laco.LacoError, match="no compressor to save"):
        laco.save_compressor(model, tmp_path / "c")
    assert not (tmp_path / "c").exists()


# A full disk and a kill -------------------------------------------------------------------------------------------


def with_full_disk(save, directory) -> None:
    """In a process of its own: no file may grow past 10 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with pytest.raises(laco.LacoError, match="nothing has changed"):
        save(directory)


def in_process(target, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


@pytest.mark.parametrize("there", [True, False], ids=["over an old one", "new"])
@pytest.mark.parametrize("what", ["model", "compressor"])
def test_a_full_disk_leaves_what_was_there(what, there, tmp_path):
    old, processor = laco.compress(*tiny.llava(), METHODS["inside"])
    new, processor = laco.compress(*tiny.llava(seed=1, layers=8), laco.TokenPacker())

    def save(model, directory):
        if what == "model":
            laco.save_pretrained(model, processor, directory)
        else:
            laco.save_compressor(model, directory)

    if there:
        save(old, tmp_path / "saved")
        before = content(tmp_path / "saved")
    process = in_process(with_full_disk, lambda directory: save(new, directory), tmp_path / "saved")
    process.join()
    assert process.exitcode == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"] * there
    assert not there or content(tmp_path / "saved") == before


def save_and_wait(model, processor, directory, ready) -> None:
    with atomic_directory(directory) as beside:
        model.save_pretrained(beside)
        ready.set()
        time.sleep(600)


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    model, processor = laco.compress(*tiny.llava(), METHODS["inside"])
    laco.save_pretrained(model, processor, tmp_path / "saved")
    before = content(tmp_path / "saved")
    tiny.scramble(model)
    ready = multiprocessing.get_context("fork").Event()
    process = in_process(save_and_wait, model, processor, tmp_path / "saved", ready)
    assert ready.wait(60)
    process.kill()
    process.join()
    assert content(tmp_path / "saved") == before
    again, _ = laco.from_pretrained(tmp_path / "saved")
    assert again.config.vision_config.compression
