"""A tokenizer of whole words with a chat template, small enough that expected ids are written by hand.

``<s> system words <end> <u> words <end> <a> words <end>``: one id a word, 0 to 6 for the template's tokens and
``w<n>`` has the id 10 + n.
"""

from __future__ import annotations

from pathlib import Path

BOS, END, SYSTEM, USER, ASSISTANT, UNKNOWN = 0, 1, 2, 3, 4, 5
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'system': '<y>', 'user': '<u>', 'assistant': '<a>'}[m['role']] + m['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def words(*numbers: int) -> str:
    """Return a text of which word ``w<n>`` becomes the id ``10 + n``."""
    return " ".join(f"w{n}" for n in numbers)


def word_tokenizer(template: str | None = TEMPLATE, adds_bos: bool = False):
    """Return the tokenizer; with ``adds_bos`` it puts a BOS before whatever it is given, as Llama's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": BOS, "<end>": END, "<y>": SYSTEM, "<u>": USER, "<a>": ASSISTANT, "<unk>": UNKNOWN}
    vocabulary |= {f"w{n}": 10 + n for n in range(60)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<y>", "<u>", "<a>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def word_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Save the tokenizer as a model folder."""
    word_tokenizer(template).save_pretrained(folder)
    return folder


def chat(*contents: str, system: str | None = None) -> list[dict]:
    """Return messages: user and assistant in turn, after a system message if there is one."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
