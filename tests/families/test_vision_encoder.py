"""Encoders alone: every one that the Auto classes load by itself, compressed in place, with its image processor."""

import json
import sys
from copy import deepcopy

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, SiglipImageProcessorPil
from transformers.utils import is_torchvision_available

import laco
import tiny
from laco import cli
from laco.cost import stage_flops
from laco.families import FAMILIES, family_of, family_of_config
from tiny.families.vision_encoder import NAMES, Tower, tower

METHODS = {"inside": laco.LaCo(layer=2, shortcut="saliency"), "map": laco.LDPv2(layer=2)}
PLAIN = ["siglip", "clip", "internvit", "dinov2", "dinov2_with_registers", "aimv2"]  # take pixels and nothing else
names = pytest.mark.parametrize("name", NAMES)
loads_image_processors = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.19") and not is_torchvision_available(),
    reason="AutoImageProcessor wants torchvision before transformers 5.19",
)
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def compressed(name: str, method: laco.methods.Method) -> Tower:
    subject = tower(name)
    laco.compress(subject.encoder, subject.pictures, method)
    tiny.scramble(subject.encoder)
    return subject


def features(encoder: nn.Module, inputs: dict, **options) -> Tensor:
    with torch.no_grad():
        return encoder(**inputs, **options).last_hidden_state


# The object and its state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name != "siglip2"])  # which is in none of the families
@methods
def test_alone_it_computes_what_it_does_in_its_model(name, method):
    subject = compressed(name, method)
    whole, processor = deepcopy(subject.whole)
    laco.compress(whole, processor, method)
    family = family_of(whole)
    (there,) = family.compressors(whole).values()
    (here,) = family_of(subject.encoder).compressors(subject.encoder).values()
    there.load_state_dict(here.state_dict())
    inputs = subject.inputs(method)
    assert torch.equal(features(subject.encoder, inputs), features(family.encoder(whole), inputs))
    assert subject.encoder.config.to_dict() == family.encoder(whole).config.to_dict()


@names
@methods
def test_the_same_object_captures_before_and_after(name, method):
    subject = tower(name)
    encoder, stock_inputs = subject.encoder, subject.inputs()
    stock_class, stock_config = type(encoder), encoder.config.to_dict()
    numbers = deepcopy(subject.pictures.to_dict())
    with torch.no_grad():
        before = encoder(**stock_inputs, output_hidden_states=True)
    assert laco.compress(encoder, subject.pictures, method) == (encoder, subject.pictures)
    family = tiny.scramble(encoder)
    assert type(encoder) in family.compressed_classes
    assert family_of_config(encoder.config) is family
    inputs = subject.inputs(method)
    with torch.no_grad():
        states = encoder(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == len(before.hidden_states) == 1 + len(family.layers(encoder))
    token_axis = states[0].ndim - 2
    counts = [state.shape[token_axis] for state in states]
    assert counts[0] == counts[1] > counts[2] == counts[3] == counts[-1]
    laco.decompress(encoder, subject.pictures)
    with torch.no_grad():
        after = encoder(**stock_inputs, output_hidden_states=True)
    assert type(encoder) is stock_class
    assert encoder.config.to_dict() == stock_config
    assert subject.pictures.to_dict() == numbers
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    for one, other in zip(after.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(one, other)


@names
def test_state_and_hooks_stay(name):
    subject = tower(name)
    encoder, called = subject.encoder, []
    family = family_of(encoder)
    encoder.set_attn_implementation("eager")
    getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()
    encoder.note = "mine"
    first = family.layers(encoder)[0]
    encoder.eval()
    first.train()
    first.requires_grad_(False)
    hooks = [
        module.register_forward_hook(lambda *_, place=place: called.append(place))
        for place, module in {"root": encoder, "merging": family.layers(encoder)[1]}.items()
    ]
    for change in (lambda: laco.compress(encoder, None, METHODS["inside"]), lambda: laco.decompress(encoder, None)):
        change()
        method = METHODS["inside"] if family.compressors(encoder) else None
        features(encoder, subject.inputs(method), output_hidden_states=True)
        assert called == ["merging", "root"]
        called.clear()
        assert encoder.note == "mine"
        layers = family.layers(encoder)
        assert layers[0].training
        assert not encoder.training
        assert not any(layer.training for layer in layers[1:])
        assert not any(p.requires_grad for p in layers[0].parameters())
        assert all(p.requires_grad for p in layers[1].parameters())
        assert all(layer.gradient_checkpointing for layer in layers)
        assert encoder.config._attn_implementation == "eager"
        configs = [module.config for layer in layers for module in layer.modules() if hasattr(module, "config")]
        assert configs
        assert all(config is encoder.config for config in configs)  # by which attention can be switched later
    for hook in hooks:
        hook.remove()
    features(encoder, subject.inputs())
    assert called == []


@names
def test_one_family_owns_it(name):
    encoder = tower(name).encoder
    for _ in range(2):
        assert [f.name for f in FAMILIES if f.owns(encoder)] == ["vision_encoder"]
        assert [f.name for f in FAMILIES if f.owns_config(encoder.config)] == ["vision_encoder"]
        if not family_of(encoder).steps(encoder.config):
            laco.compress(encoder, None, METHODS["inside"])


# Training and running -----------------------------------------------------------------------------------------------


def gradients(encoder: nn.Module, inputs: dict) -> dict[str, Tensor]:
    encoder.zero_grad()
    output = encoder(**inputs).last_hidden_state
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (weights * output).sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@names
@methods
def test_gradients_and_their_checkpointing(name, method):
    subject = compressed(name, method)
    encoder, inputs = subject.encoder.train(), subject.inputs(method)
    plain = gradients(encoder, inputs)
    (compressor,) = family_of(encoder).compressors(encoder).values()
    for part in (family_of(encoder).layers(encoder)[0], compressor):
        for key, parameter in part.named_parameters():
            # The softmax of attention does not see a bias of its keys.
            assert key.endswith(("k_proj.bias", "key.bias")) or parameter.grad.abs().max() > 0, key
    getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)()
    torch.testing.assert_close(gradients(encoder, inputs), plain, rtol=1e-4, atol=1e-6)


@names
@methods
def test_sdpa_equals_eager_and_bfloat16_is_close(name, method):
    subject = compressed(name, method)
    encoder, inputs = subject.encoder, subject.inputs(method)
    assert encoder.config._attn_implementation == "sdpa"
    sdpa = features(encoder.double(), to(inputs, torch.double))
    encoder.set_attn_implementation("eager")
    torch.testing.assert_close(features(encoder, to(inputs, torch.double)), sdpa, rtol=0, atol=1e-5)
    found = features(encoder.bfloat16(), to(inputs, torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.double() - sdpa).norm() < 0.05 * sdpa.norm()


def to(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


class Features(nn.Module):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.encoder(**inputs).last_hidden_state


def traced(name: str, what: str) -> tuple[nn.Module, dict, Tensor]:
    method = METHODS["inside"]
    subject = compressed(name, method)
    if what in subject.cannot:
        pytest.skip(subject.cannot[what])
    encoder, inputs = Features(subject.encoder.requires_grad_(False)).eval(), subject.inputs(method)
    return encoder, inputs, encoder(**inputs)


@names
def test_it_compiles_whole(name):
    encoder, inputs, wanted = traced(name, "compile")
    torch._dynamo.reset()
    whole = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(**inputs), wanted, rtol=0, atol=1e-6)


@names
def test_it_exports(name):
    encoder, inputs, wanted = traced(name, "export")
    program = torch.export.export(encoder, (), kwargs=inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's exporter uses what torch has deprecated
def test_onnx_runs_batches_of_any_length(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    subject = compressed(name, METHODS["inside"])
    encoder = subject.encoder.requires_grad_(False)
    pixels = torch.cat([subject.inputs(METHODS["inside"])["pixel_values"]] * 3)[:3]
    pixels[1:] += torch.randn_like(pixels[1:])
    file, shapes = tmp_path / "encoder.onnx", {"pixel_values": {0: torch.export.Dim("batch")}}
    torch.onnx.export(
        Pixels(encoder).eval(),
        (pixels[:2],),
        file,
        input_names=["pixels"],
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    session = runtime.InferenceSession(file)
    for batch in (pixels, pixels[:1]):
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        wanted = encoder(batch).last_hidden_state
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


class Pixels(Features):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(pixel_values).last_hidden_state


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("method", [None, laco.LaCo(layer=1), laco.LDPv2(layer=4)], ids=["stock", "first", "last"])
def test_flops_are_what_torch_counts(name, method):
    subject = tower(name)
    encoder, pixels = subject.encoder, subject.inputs()["pixel_values"]
    if method is not None:
        planned = stage_flops(encoder.config, [method])
        laco.compress(encoder, None, method)
        assert stage_flops(encoder) == planned
    encoder.set_attn_implementation("eager")  # torch's counter knows no fused attention on the CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(pixels)
    flops = stage_flops(encoder, pictures=len(pixels))
    assert flops.projector == flops.language_model == 0
    assert flops.forward == flops.encoder == pytest.approx(counter.get_total_flops(), rel=0.01)


# Saving and loading -------------------------------------------------------------------------------------------------


@loads_image_processors
@names
@methods
def test_saved_encoders_come_back(name, method, tmp_path):
    subject = compressed(name, method)
    inputs = subject.inputs(method)
    wanted = features(subject.encoder, inputs)
    laco.save_pretrained(subject.encoder, subject.pictures, tmp_path / "encoder")
    again, info = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not any(info.values()), info
    for loaded in (again, laco.from_pretrained(tmp_path / "encoder")[0]):
        assert type(loaded) is type(subject.encoder)
        assert torch.equal(features(loaded, inputs), wanted)
    pictures = laco.from_pretrained(tmp_path / "encoder")[1]
    assert pictures.to_dict() == subject.pictures.to_dict()


@names
def test_a_stock_checkpoint_leaves_only_the_compressor_new(name, tmp_path):
    subject = tower(name)
    subject.encoder.save_pretrained(tmp_path)
    stock_inputs, wanted = subject.inputs(), features(subject.encoder, subject.inputs())
    laco.compress(subject.encoder, None, METHODS["inside"])
    config = deepcopy(subject.encoder.config)
    again, info = type(subject.encoder).from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] == {key for key in subject.encoder.state_dict() if ".compressor." in key}
    assert not info["unexpected_keys"]
    built = type(subject.encoder)(config)
    for encoder in (again, built):  # transformers has not initialised the compressor over its own choice
        (compressor,) = family_of(encoder).compressors(encoder).values()
        assert not compressor.fc2.weight.any()
        assert not compressor.saliency.weight.any()
        bound = compressor.fc1.in_features**-0.5
        assert 0.9 * bound < float(compressor.fc1.weight.detach().abs().max()) <= bound
    laco.decompress(again, None)
    assert torch.equal(features(again, stock_inputs), wanted)


@names
@methods
def test_a_compressor_is_saved_by_itself(name, method, tmp_path):
    subject, other = compressed(name, method), tower(name)
    laco.save_compressor(subject.encoder, tmp_path / "compressor")
    config = json.loads((tmp_path / "compressor" / "compressor_config.json").read_text())
    assert config["base"]["family"] == "vision_encoder"
    assert config["base"]["text_width"] is None
    laco.load_compressor(other.encoder, other.pictures, tmp_path / "compressor")
    inputs = subject.inputs(method)
    assert torch.equal(features(other.encoder, inputs), features(subject.encoder, inputs))
    assert other.pictures.to_dict() == subject.pictures.to_dict()
    stranger = tower("clip" if name != "clip" else "siglip").encoder
    with pytest.raises(laco.LacoError, match=r"made for another model: its (encoder|layers) is"):
        laco.load_compressor(stranger, None, tmp_path / "compressor")


def test_without_an_image_processor(tmp_path):
    encoder = tower("dinov2").encoder
    laco.compress(encoder, None, METHODS["inside"])
    laco.save_pretrained(encoder, None, tmp_path / "encoder")
    again, pictures = laco.from_pretrained(tmp_path / "encoder", dtype=torch.bfloat16)
    assert pictures is None
    assert again.dtype == torch.bfloat16
    assert type(again) is type(encoder)


KEY = "encoder.layer.1.compressor.fc1.weight"
CHANGES = {
    "missing": (lambda tensors: tensors.pop(KEY), f"{KEY} missing"),
    "extra": (lambda tensors: tensors.update(more=torch.zeros(2)), "more not expected"),
    "misshaped": (lambda tensors: tensors.update({KEY: torch.zeros(3, 5)}), rf"{KEY} has shape \(3, 5\) instead"),
}


@loads_image_processors
@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    subject = compressed("dinov2", METHODS["inside"])
    laco.save_pretrained(subject.encoder, subject.pictures, tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(laco.LacoError, match=message):
        laco.from_pretrained(tmp_path / "encoder")


# What is refused ----------------------------------------------------------------------------------------------------


def refused(subject: Tower, processor, message: str) -> None:
    kind, config = type(subject.encoder), subject.encoder.config.to_dict()
    with pytest.raises(laco.LacoError, match=message):
        laco.compress(subject.encoder, processor, METHODS["inside"])
    assert type(subject.encoder) is kind
    assert subject.encoder.config.to_dict() == config


def test_image_processors_that_do_not_match():
    other = SiglipImageProcessorPil(size={"height": 40, "width": 40})
    oblong = SiglipImageProcessorPil(size={"height": 48, "width": 96})
    for name in ("clip", "aimv2"):
        refused(tower(name), other, f"makes pictures of 40 x 40 pixels, {name} takes 48 x 48")
    refused(tower("dinov2"), oblong, "makes pictures of 48 x 96 pixels, dinov2 takes squares")
    laco.compress(tower("dinov2").encoder, other, METHODS["inside"])  # it makes positions for any square
    subject = tower("clip")
    refused(subject, subject.whole[1], "takes an image processor; a LlavaProcessor is none")
    subject = tower("siglip2")
    subject.pictures.patch_size = 4
    refused(subject, subject.pictures, "its patch_size is 4, the encoder needs 8")


def test_square_pictures_alone():
    """4 x 9 patches are as many as 6 x 6."""
    for name in ("siglip", "dinov2", "aimv2", "internvit"):
        encoder = compressed(name, METHODS["inside"]).encoder
        patch = encoder.config.embed_patch_size
        height, width = (side * (patch if isinstance(patch, int) else patch[0]) for side in (4, 9))
        with pytest.raises(laco.LacoError, match=rf"square.*{height} x {width} pixels"):
            encoder(torch.randn(1, 3, height, width))


def test_a_model_of_no_family_says_what_there_is():
    with pytest.raises(laco.LacoError, match=r"Linear belongs to no family.* Dinov2Model, .*Aimv2VisionModel"):
        laco.compress(nn.Linear(1, 1), None, METHODS["inside"])


def test_it_answers_no_questions():
    subject = tower("clip")
    sentence = "a vision encoder alone answers no questions"
    with pytest.raises(laco.LacoError, match=sentence):
        laco.evaluate(subject.encoder, subject.pictures, samples=2)
    with pytest.raises(laco.LacoError, match=sentence):
        laco.evaluate(subject.encoder, None, samples=2)


# The command line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["laco", *map(str, arguments)])
        monkeypatch.setattr(cli, "out", cli.Console(width=200))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@loads_image_processors
def test_commands(run, tmp_path):
    subject = tower("dinov2")
    source, output = tmp_path / "encoder", tmp_path / "small"
    laco.save_pretrained(subject.encoder, subject.pictures, source)
    code, out, err = run("compress", source, "-o", output, "--layer", 2)
    assert code == 0, err
    assert "36 → 9 visual tokens" in out
    assert family_of(laco.from_pretrained(output)[0]).name == "vision_encoder"
    tiny.picture().save(tmp_path / "picture.png")
    (tmp_path / "recipe.yaml").write_text(f"model: {output}\noutput: {tmp_path / 'out'}\n{STAGES}")
    commands = [
        ("ask", output, "what?", "--image", tmp_path / "picture.png"),
        ("eval", output, "--samples", 2),
        ("train", tmp_path / "recipe.yaml"),
        ("demo", "--model", output, "-o", tmp_path / "demo"),
    ]
    for command in commands:
        code, out, err = run(*command)
        assert code == 2, err
        assert err.splitlines()[-1].startswith("laco: a vision encoder alone answers no questions")


STAGES = "data: {source: world, seed: 1, split: train}\nstages: [{name: heal, steps: 1, batch_size: 2, lr: 1.0e-3}]\n"
