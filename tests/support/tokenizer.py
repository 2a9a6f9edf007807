"""A real fast tokenizer of 246 tokens, made in memory: every byte that UTF-8 uses, and three special tokens.

It loses nothing (any text decodes to itself), keeps padding and end of sequence apart, and speaks ChatML with the
`{% generation %}` markers that TRL needs for `assistant_only_loss`. The ids of `<|pad|>`, `<|im_start|>` (beginning)
and `<|im_end|>` (end) are 0, 1 and 2: a model config with `pad_token_id=0, bos_token_id=1, eos_token_id=2` agrees.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# UTF-8 never produces these, which leaves room for the special tokens below 256.
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def _byte_symbols() -> list[str]:
    """The printable stand-ins of GPT-2's byte alphabet, in byte order, without the bytes that never occur."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    symbol = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [symbol[byte] for byte in range(0x100) if byte not in _NEVER_IN_UTF8]


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Make a tokenizer; `chat_template=None` makes one that has none."""
    specials = [PAD, START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(specials + _byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=START, eos_token=END, model_max_length=512
    )
    tokenizer.chat_template = chat_template
    return tokenizer
