"""llama.cpp makes the tokens of a tokenizer, or the export names what it lacks."""

import json
from dataclasses import replace

import engine
import pytest
import tiny_packed as models
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from stableqat.errors import UserError
from stableqat.export import gguf, gguf_tokenizer

SIZE = 420
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "It's we'LL they'Ve: 1234567 and 3.14, x=2**10;\n\n  done\t\tnow  ",
    "Größe naïve Ærø καλημέρα привет 你好世界 日本語 한국어 👩‍🚀🎉 ١٢٣",
    "  leading, trailing  \r\n a\r\nb\n\n\nc   d \t e",
    "a<tool>b <|im_start|>user\nhi<|im_end|> <tool> <|endoftext|>x",
    "don't!!! ...?? @#$ (a[b]{c}) ~`^_ \\ / | snake_case CamelCase 0x1F 1e-9",
    "",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def split(pattern, invert=False):
    how = "removed" if invert else "isolated"
    first = pre_tokenizers.Split(Regex(pattern), how, invert=invert)
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])


def tokenizer(splitter, ignore_merges=False, normalizer=None, bos=None, eos_after=False, trained=(), **model):
    made = Tokenizer(BPE(ignore_merges=ignore_merges, **model))
    made.pre_tokenizer, made.decoder = splitter, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 10,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **dict(trained),
    )
    made.train_from_iterator([*TEXTS, *TEXTS], trainer)
    if bos or eos_after:
        single = " ".join([*([bos] if bos else []), "$A", *(["<|im_end|>"] if eos_after else [])])
        ids = [(token, made.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", bos_token=bos)


def sentencepiece(complete=True, spaces=None):
    """As transformers makes one of SentencePiece's: with every split of each token among its merges."""
    special = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    before = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(before)
    reserved = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 10, special_tokens=reserved, max_token_length=6, show_progress=False
    )
    made.train_from_iterator(["the cat that sat on that mat at a seat", "eat the 12 oats, Tess!"], trainer)
    described = json.loads(made.to_str())
    model, described["added_tokens"] = described["model"], described["added_tokens"][: len(special)]
    if complete:
        tokens = dict.fromkeys("".join(merge) for merge in model["merges"])
        splits = [(token[:at], token[at:]) for token in tokens for at in range(1, len(token))]
        model["merges"] = [list(split) for split in splits if set(split) <= model["vocab"].keys()]
    if spaces is not None:
        described["normalizer"], described["pre_tokenizer"] = None, json.loads(spaces.__getstate__())
    made = Tokenizer.from_str(json.dumps(described))
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", made.token_to_id("<|im_start|>"))]
    )
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **ends)


KNOWN = {  # by the name that llama.cpp has
    "gpt-2": lambda: tokenizer(BYTES),
    "smollm": lambda: tokenizer(DIGITS, bos="<|im_start|>"),
    "qwen2": lambda: tokenizer(split(WORDS + r"\p{N}" + SIGNS), normalizer=normalizers.NFC()),
    "llama-bpe": lambda: tokenizer(
        split(WORDS + r"\p{N}{1,3}" + SIGNS), True, bos="<|im_start|>", eos_after=True
    ),
    "SentencePiece": sentencepiece,
    "SentencePiece, no space in front": lambda: sentencepiece(
        spaces=pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    ),
    "smaug-bpe": lambda: tokenizer(split(WORDS + r"\p{N}{1,3}" + SIGNS, invert=True), eos_after=True),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Of llama.cpp, by name, with the tokenizer."""
    folder, made, jobs = tmp_path_factory.mktemp("tokenizers"), {}, []
    model, _ = models.packed(
        "llama", "integer-2", config={"vocab_size": SIZE, "max_position_embeddings": 128}
    )
    for name, make in KNOWN.items():
        made[name] = make()
        made[name].chat_template = TEMPLATE
        (folder / name).mkdir()
        each = replace(model, tokenizer=made[name])
        gguf.check(each)
        gguf.write(each, folder / name)
        messages = [{"role": "user", "content": "hi"}]
        file = str(folder / name / gguf.FILE)
        jobs.append(
            {"file": file, "texts": TEXTS, "messages": messages, "prompts": [[3]], "vocabulary": SIZE}
        )
    return {name: (made[name], answer) for name, answer in zip(KNOWN, engine.run(jobs), strict=True)}


@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_makes_the_same_tokens(name, answers):
    own, answer = answers[name]
    for text, tokens in zip(TEXTS, answer["tokens"], strict=True):
        assert tokens == own(text).input_ids, text
    chat = own.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    begun = own("").input_ids[:1] == [own.bos_token_id]  # it takes the token away that it puts there
    assert answer["chat"] == (chat.removeprefix(own.bos_token) if begun else chat)


@pytest.mark.parametrize("name", KNOWN)
def test_an_added_token_that_is_not_special_is_shown(name, answers):
    own, answer = answers[name]
    fields = gguf_tokenizer.fields(own, SIZE)
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    expected = {"<tool>": (4, "<tool>"), "<|im_end|>": (3, ""), "a": (1, "a"), f"[UNUSED{SIZE - 1}]": (5, "")}
    for token, (kind, shown) in expected.items():
        number = tokens.index(token)
        assert (types[number], answer["shown"][number]) == (kind, shown)


def test_the_ends_of_a_text():
    """A token that begins texts is the tokenizer's; without one it is what ends them, and begins none."""
    fields = gguf_tokenizer.fields(KNOWN["smollm"](), SIZE)
    assert (fields["ggml.bos_token_id"], fields["ggml.add_bos_token"]) == (1, True)
    plain = KNOWN["gpt-2"]()
    fields = gguf_tokenizer.fields(plain, SIZE)
    assert (fields["ggml.bos_token_id"], fields["ggml.eos_token_id"]) == (2, 2)
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (False, False)
    assert "ggml.padding_token_id" not in fields
    plain.pad_token = "<|endoftext|>"
    assert gguf_tokenizer.fields(plain, SIZE)["ggml.padding_token_id"] == 0


def test_what_llama_cpp_leaves_out_is_said():
    assert gguf_tokenizer.notes(KNOWN["gpt-2"]()) == []
    (line,) = gguf_tokenizer.notes(KNOWN["qwen2"]())
    assert "skips the tokenizer's NFC" in line
    first = sentencepiece(spaces=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    assert gguf_tokenizer.fields(first, SIZE)["ggml.add_space_prefix"]
    (line,) = gguf_tokenizer.notes(first)
    assert "texts that begin with a space or hold special tokens make other tokens" in line
    assert gguf_tokenizer.notes(sentencepiece()) == []
    stripping = KNOWN["gpt-2"]()
    stripping.add_tokens([AddedToken("<left>", lstrip=True), AddedToken("<word>", single_word=True)])
    assert [line.split()[-1] for line in gguf_tokenizer.notes(stripping)] == ["<left>", "<word>"]


UNKNOWN = {
    "fewer merges than splits": (
        lambda: sentencepiece(complete=False),
        "merges this tokenizer's bytes",
    ),
    "words by Metaspace": (
        lambda: sentencepiece(spaces=pre_tokenizers.Metaspace()),
        "merges this tokenizer's bytes",
    ),
    "another pattern": (lambda: tokenizer(split(r"\p{L}+|\s+|\S")), "no name for how the tokenizer splits"),
    "a space in front": (lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name for"),
    "whole words of GPT-2": (lambda: tokenizer(BYTES, ignore_merges=True), "no name for how"),
    "lower case": (lambda: tokenizer(BYTES, normalizer=normalizers.Lowercase()), "no normalizer Lowercase"),
    "parts of words": (
        lambda: tokenizer(BYTES, trained={"end_of_word_suffix": "</w>"}),
        "does not mark parts of words",
    ),
    "two in front": (
        lambda: tokenizer(BYTES, bos="<|im_start|> <|im_end|>"),
        "one token before and after a text",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_any_other_tokenizer_needs_a_template(name):
    make, line = UNKNOWN[name]
    model, _ = models.packed("llama", "integer-2", config={"vocab_size": SIZE})
    with pytest.raises(UserError, match=f"^gguf: .*{line}.*convert_hf_to_gguf.py .* as --template$"):
        gguf.check(replace(model, tokenizer=make()))


def test_a_tokenizer_that_is_larger_than_the_model():
    model, _ = models.packed("llama", "integer-2", config={"vocab_size": 300})
    with pytest.raises(UserError, match=r"has token 410, the model only 300 entries; .* --tokenizer"):
        gguf.check(replace(model, tokenizer=KNOWN["gpt-2"]()))


def test_a_template_with_another_tokenizers_tokens():
    fields = gguf_tokenizer.fields(KNOWN["qwen2"](), SIZE)
    with pytest.raises(
        UserError, match=r"^template: token \d+ is '.*' in x.gguf, '.*' in the run's tokenizer"
    ):
        gguf_tokenizer.check_tokens(KNOWN["gpt-2"](), fields["ggml.tokens"], "x.gguf")
    gguf_tokenizer.check_tokens(KNOWN["qwen2"](), fields["ggml.tokens"], "x.gguf")
