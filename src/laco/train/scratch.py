"""A small LLaVA from scratch, in stock Hugging Face classes: configuration, random weights, tokenizer, processor."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from laco.train.recipe import NewModel
from laco.world import SIDE, World

IMAGE, END, PAD = "<image>", "<eos>", "<pad>"
# One turn: the pictures, the question, a line break, the answer, the end.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '<eos>' }}{% endif %}"
    "{% endfor %}"
)


def build_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the world's questions.

    Any text can be written in it. Questions are lower case and become few tokens; words and numbers to be read are
    upper case and digits, which the questions lack, so every character of an answer stays a token of its own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    world = World()
    asked = [q for i in range(200) for q in world[i].questions]
    lines = [q.question for q in asked] + [q.answer for q in asked if q.answer.islower()]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, extra_special_tokens={"image_token": IMAGE}
    )


def build_new(new: NewModel) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A randomly initialised LLaVA for pictures of the world's size, and its processor."""
    tokenizer = build_tokenizer(new.vocabulary)
    image_processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=new.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    pad_id, end_id, image_id = (int(tokenizer.vocab[token]) for token in (PAD, END, IMAGE))
    vision = SiglipVisionConfig(image_size=SIDE, patch_size=new.patch_size, vision_use_head=False, **new.vision)
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
        **new.text,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        image_seq_length=(SIDE // new.patch_size) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = end_id
    model.generation_config.pad_token_id = pad_id
    return model, processor
