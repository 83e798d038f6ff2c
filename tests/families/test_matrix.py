"""Prompts and answers

The other properties are in the files beside this one: `pytest tests/families -k "matrix and llava-clip"`.
"""

import torch

import tiny
from families.matrix import NONE, ONE, SQUARE, TWO, Subject, differ, holds


def equal_alone_and_together(subject: Subject, prompts) -> None:
    together = subject.logits(subject.inputs(*prompts))
    for prompt, logits in zip(prompts, together, strict=True):
        alone = subject.logits(subject.inputs(prompt))[0]
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)


def generates_alike_with_and_without_cache(subject: Subject, batch) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (subject.model.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.logits, plain.logits, rtol=0, atol=1e-5)


@holds("several pictures in a prompt", places=("inside", "external", "map"))
def test_several_pictures(subject):
    text, (first, second) = TWO
    logits = subject.logits(subject.inputs(TWO))
    assert differ(logits, subject.logits(subject.inputs((text, [first, tiny.picture(5)]))))
    assert differ(logits, subject.logits(subject.inputs((text, [tiny.picture(6, 90, 40), second]))))


@holds("batches of unequal prompts", places=("inside", "external", "map"))
def test_batches(subject):
    equal_alone_and_together(subject, [prompt for prompt in subject.prompts if prompt != NONE])


@holds("prompts without a picture")
def test_text_only(subject):
    alone = subject.inputs(NONE)
    assert torch.equal(subject.logits(alone), subject.stock().logits(alone))
    equal_alone_and_together(subject, [ONE, NONE])


@holds("a picture in the second turn")
def test_second_turn(subject):
    text = "USER: hello ASSISTANT: good day USER: what is <image> here? ASSISTANT:"
    first, second = ((text, [tiny.picture(seed, 60, 40)]) for seed in (1, 2))
    assert differ(subject.logits(subject.inputs(first)), subject.logits(subject.inputs(second)))
    prompts = [first, SQUARE]
    if "several_pictures" not in subject.case.cannot:
        both = "USER: see <image> ASSISTANT: yes USER: and <image>? ASSISTANT:"
        prompts.append((both, [tiny.picture(3), tiny.picture(4, 50, 70)]))
    equal_alone_and_together(subject, prompts)
    if "generation" not in subject.case.cannot:
        generates_alike_with_and_without_cache(subject, subject.inputs(*prompts))


@holds("generation with cache as without", places=("inside", "external", "map"))
def test_generation(subject):
    generates_alike_with_and_without_cache(subject, subject.inputs(*subject.prompts))


@holds("videos", applies=lambda case: case.videos is not None)
def test_videos(subject):
    for frames in (2, 3):
        one, other = (subject.case.videos(subject.model, subject.processor, frames, seed) for seed in (1, 2))
        assert differ(subject.logits(one), subject.logits(other))
        generates_alike_with_and_without_cache(subject, one)
