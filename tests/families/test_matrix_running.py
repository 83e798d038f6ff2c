"""Training and running"""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families.matrix import Subject, holds
from laco.families.compat import checkpoint_activations


def gradients(model: PreTrainedModel, batch) -> dict[str, Tensor]:
    model.zero_grad()
    model(**{**batch, "labels": batch["input_ids"]}).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def is_key_bias(name: str) -> bool:
    """The softmax of attention does not see a bias of its keys."""
    return re.search(r"(^|\.)(k_proj|key|k)\.bias$", name) is not None


@holds("gradients and their checkpointing")
def test_gradients(subject):
    model, family = subject.model.train(), subject.family
    batch = subject.inputs(*subject.prompts)
    plain = gradients(model, batch)
    for module in (family.layers(model)[0], *family.compressors(model).values()):
        for name, parameter in module.named_parameters():
            assert is_key_bias(name) or parameter.grad.abs().max() > 0, name
    checkpoint_activations(model)
    assert all(layer.gradient_checkpointing for layer in family.layers(model))
    torch.testing.assert_close(gradients(model, batch), plain, rtol=1e-4, atol=1e-6)


@holds("LoRA on encoder and language model")
def test_lora(subject):
    peft = pytest.importorskip("peft")
    model, family = subject.model, subject.family
    batch = subject.inputs(*subject.prompts)
    before = subject.logits(batch)
    names = {id(module): name for name, module in model.named_modules()}
    targets = [
        names[id(module)]
        for part in (family.encoder(model), family.language_model(model))
        for name, module in part.named_modules()
        if type(module) is nn.Linear and re.search(r"(layers?|blocks)\.\d", name) and ".compressor" not in name
    ]
    parts = [names[id(part)] for part in (family.layers(model)[0], family.language_model(model))]
    trained = ["compressor"] if family.compressors(model) else None
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=trained, r=2))
    found = gradients(adapted, batch)
    assert all("lora" in name or "compressor.modules_to_save" in name for name in found)
    for part in (*parts, *(trained or [])):
        assert any(f".{part}." in name for name in found), part
    # LoRA's second matrix starts at zero, so the first has no gradient yet.
    assert all(grad.abs().max() > 0 for name, grad in found.items() if "lora_A" not in name and "bias" not in name)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.grad is not None:
                parameter.add_(0.1 * torch.randn_like(parameter))
        changed = adapted(**batch).logits[:, -1]
    assert (changed - before).abs().max() > 1e-3
    subject.model = adapted.merge_and_unload()
    assert not any("lora" in name for name, _ in subject.model.named_parameters())
    torch.testing.assert_close(subject.logits(batch), changed, rtol=0, atol=1e-4)


@holds("SDPA equals eager attention")
def test_sdpa(subject):
    batch, encoder = subject.inputs(*subject.prompts), subject.family.encoder(subject.model)
    assert encoder.config._attn_implementation == "sdpa"
    sdpa = subject.logits(batch)
    subject.model.set_attn_implementation("eager")
    layers = subject.family.layers(subject.model)
    configs = [module.config for module in layers.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {"eager"}
    torch.testing.assert_close(subject.logits(batch), sdpa, rtol=0, atol=1e-5)


@holds("bfloat16 close to float32")
def test_bfloat16(subject):
    batch = subject.inputs(*subject.prompts)
    wanted = subject.logits(batch)
    subject.model.to(torch.bfloat16)
    found = subject.logits(batch.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.1 * wanted.norm()


class Features(nn.Module):
    """A vision encoder that puts out tensors alone."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.encoder(**inputs)[0]


def features(subject: Subject) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The encoder, its inputs and what it puts out."""
    subject.model.requires_grad_(False)
    inputs = subject.encoder_inputs()
    encoder = Features(subject.family.encoder(subject.model)).eval()
    return encoder, inputs, encoder(**inputs)


@holds("torch.compile of the encoder, whole", places=("inside",))
def test_compile(subject):
    encoder, inputs, wanted = features(subject)
    torch._dynamo.reset()
    whole = torch.compile(encoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(**inputs), wanted, rtol=0, atol=1e-6)


@holds("torch.export of the encoder", places=("inside",))
def test_export(subject):
    encoder, inputs, wanted = features(subject)
    program = torch.export.export(encoder, (), kwargs=inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs), wanted, rtol=0, atol=1e-6)


@holds("ONNX of the encoder", places=("inside",))
def test_onnx(subject, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    encoder, inputs, wanted = features(subject)
    torch.onnx.export(encoder, (), tmp_path / "encoder.onnx", kwargs=inputs, dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "encoder.onnx")
    names = [argument.name for argument in session.get_inputs()]
    (found,) = session.run(None, {name: inputs[name].numpy() for name in names})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
