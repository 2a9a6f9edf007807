# ruff: noqa: RUF001 (families write their control tokens with full-width bars)
"""Tokenizers of the families: the tiny one with a family's control tokens and its chat template."""

import re
from functools import cache
from pathlib import Path

from support.tokenizer import tiny_tokenizer

_CONTROL = re.compile(r"<[|｜][^<>\s]{1,40}?[|｜]>|</?(?:s|bos|eos|pad|(?:start|end)_of_turn)>|<\|?turn\|?>|\[/?INST\]")

# What the families call beginning, end and padding; the last is None where they have none.
ENDS = {
    "llama2": ("<s>", "</s>", None),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", None),
    "mistral": ("<s>", "</s>", None),
    "qwen": (None, "<|im_end|>", "<|endoftext|>"),
    "phi": (None, "<|endoftext|>", "<|endoftext|>"),
    "gemma": ("<bos>", "<eos>", "<pad>"),
    "smol": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
}


def family_of(name):
    return next((family for family in ENDS if name.startswith(family)), "qwen")


def with_template(template, family="qwen"):
    """The tiny tokenizer speaking a family's template, with its control tokens added."""
    bos, eos, pad = ENDS[family]
    tokenizer = tiny_tokenizer(chat_template=template)
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    found = sorted({*_CONTROL.findall(template), *(token for token in named.values() if token)})
    tokenizer.add_special_tokens({"additional_special_tokens": found} if _old() else {"extra_special_tokens": found})
    for name, token in named.items():
        setattr(tokenizer, name, token)
    return tokenizer


@cache
def _old():
    from transformers import PreTrainedTokenizerFast

    return "extra_special_tokens" not in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES and hasattr(
        PreTrainedTokenizerFast, "additional_special_tokens"
    )


def bundled():
    """TRL's own copies of published templates, by name; none in TRL 1.0."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*.jinja"))
        if not path.stem.endswith("_training")
    }


# Written for these tests after the families' published formats; TRL ships the others.
OWN = {
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set said = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (said if loop.first else '') "
        "+ message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('After the optional system message, roles must alternate user/assistant') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3_dated": (
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + strftime_now('%d %b %Y') }}"
        "{% if messages[0]['role'] == 'system' %}{{ '\\n\\n' + messages[0]['content'] }}{% endif %}{{ '<|eot_id|>' }}"
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
        "+ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "phi4": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] "
        "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
    ),
    "phi3_ends": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "gemma2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' "
        "+ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "smollm2": (
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
}
STOPS = {
    "llama2": "</s>",
    "mistral": "</s>",
    "llama3_dated": "<|eot_id|>",
    "phi4": "<|im_end|>",
    "phi3_ends": "<|end|>",
    "gemma2": "<end_of_turn>",
    "smollm2": "<|im_end|>",
}
# Drops the thoughts of answers that are not the last, as reasoning models do, and is none that TRL knows.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Opens a thought in the generation prompt that the answer then does not have.
UNPROVABLE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def own(name):
    """The tokenizer of a family in `OWN`."""
    return with_template(OWN[name], family_of(name))


def learnt_text(tokenizer, ids, labels):
    """What is learnt, stretch by stretch."""
    stretches, last = [], False
    for token, label in zip(ids, labels, strict=True):
        if label != -100:
            assert label == token
            stretches = [*stretches, [token]] if not last else [*stretches[:-1], [*stretches[-1], token]]
        last = label != -100
    return [tokenizer.decode(stretch, clean_up_tokenization_spaces=False) for stretch in stretches]
