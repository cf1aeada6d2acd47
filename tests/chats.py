"""Made-up conversations, and a tokenizer with a ChatML template whose tokens are the bytes of a text."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(template=CHATML):
    """A token per byte of a text, 256 <|im_start|> and 257 <|im_end|>, which is EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: n for n, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


def turn(role, content):
    return {"role": role, "content": content}


def chat(number):
    """A conversation of one to three questions and answers, decided by its number."""
    turns = [turn("system", "be brief")] if number % 3 == 0 else []
    for n in range(1 + number % 3):
        turns += [turn("user", f"{number}+{n}?"), turn("assistant", f"{number + n}" + "!" * (number % 5))]
    return turns


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_chats(path, count=60):
    return write_jsonl(path, [{"messages": chat(number), "id": number} for number in range(count)])
