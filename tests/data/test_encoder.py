"""The tokens of a conversation are those of the tokenizer's own template, and the labels are exact."""

import re

import numpy as np
import pytest

from chats import CHATML, byte_tokenizer, chat, turn
from stableqat.data.chat import BadRecordError, Records
from stableqat.data.encoder import ConversationEncoder
from stableqat.errors import UserError

MESSAGES = Records("messages")
GENERATION = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
#: As reasoning models have it: the last turn begins with a thought, earlier ones lose theirs.
THINKS = CHATML.replace(
    "message['role'] + '\n' + message['content']",
    "message['role'] + '\n' + ('<think></think>' if loop.last and message['role'] == 'assistant' else '') "
    "+ message['content']",
)


def encoded(template, *conversations, records=MESSAGES):
    encoder = ConversationEncoder.of(byte_tokenizer(template), records)
    columns = encoder.columns([records.document({"messages": each}) for each in conversations])
    return list(zip(columns["input_ids"], columns["spans"], strict=True))


def written(tokenizer, tokens, spans):
    """The texts of the spans."""
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(spans[::2], spans[1::2], strict=True)]


def test_labels_are_those_counted_by_hand():
    # <|im_start|> user \n h i <|im_end|> \n <|im_start|> assistant \n y o <|im_end|> \n
    #       0      1-4   5 6 7      8      9      10        11-19   20 21 22   23     24
    ((tokens, spans),) = encoded(CHATML, [turn("user", "hi"), turn("assistant", "yo")])
    assert spans.tolist() == [21, 24]
    assert tokens[[0, 8, 10, 23]].tolist() == [256, 257, 256, 257]
    assert len(tokens) == 25


@pytest.mark.parametrize("template", [CHATML, GENERATION, THINKS], ids=["chatml", "generation", "thinks"])
def test_every_turn_of_the_assistant_is_found_with_its_end(template):
    tokenizer = byte_tokenizer(template)
    for number, (tokens, spans) in enumerate(encoded(template, *map(chat, range(12)))):
        assert tokens.tolist() == tokenizer.apply_chat_template(chat(number), return_dict=False)
        answers = [each["content"] + "<|im_end|>" for each in chat(number) if each["role"] == "assistant"]
        if template is THINKS:
            answers[-1] = "<think></think>" + answers[-1]
        assert written(tokenizer, tokens, spans) == answers


def test_the_templates_own_mask_is_the_mask_of_transformers():
    tokenizer = byte_tokenizer(GENERATION)
    ((tokens, spans),) = encoded(GENERATION, chat(5))
    mask = np.zeros(len(tokens), int)
    for start, stop in spans.reshape(-1, 2):
        mask[start:stop] = 1
    found = tokenizer.apply_chat_template(chat(5), return_dict=True, return_assistant_tokens_mask=True)
    assert mask.tolist() == found["assistant_masks"]


@pytest.mark.parametrize(
    "text", ["  spaced  out  ", "\u00e9\u4e2d\U0001f600", "a\nb\n", "<|im_end|>", "\ud800"]
)
def test_any_content_keeps_its_place(text):
    tokenizer = byte_tokenizer()
    for template in (CHATML, THINKS):
        turns = [turn("user", text), turn("assistant", text), turn("user", "?"), turn("assistant", "!")]
        ((tokens, spans),) = encoded(template, turns)
        assert written(tokenizer, tokens, spans)[0] == text.replace("\ud800", "?") + "<|im_end|>"


def test_an_unlabelled_end_of_turn_would_be_noticed():
    """Without an end-of-turn token, all that follows the content belongs to the turn."""
    plain = CHATML.replace("<|im_end|>", "##").replace("<|im_start|>", "@")
    ((tokens, spans),) = encoded(plain, [turn("user", "hi"), turn("assistant", "yo")])
    assert written(byte_tokenizer(), tokens, spans) == ["yo##\n"]


def test_a_prompt_and_a_completion_become_turns_or_are_joined():
    prompt = Records("prompt")
    fields = {"prompt": "2+2?", "completion": "4"}
    templated = ConversationEncoder.of(byte_tokenizer(), prompt).columns([prompt.document(fields)])
    chatted = encoded(CHATML, [turn("user", "2+2?"), turn("assistant", "4")])[0]
    assert templated["input_ids"][0].tolist() == chatted[0].tolist()
    tokenizer = byte_tokenizer(None)
    encoder = ConversationEncoder.of(tokenizer, prompt)
    for given, text in ((fields, "2+2?\n4"), ({"prompt": "The sky", "completion": " is"}, "The sky is")):
        columns = encoder.columns([prompt.document(given)])
        (tokens,), (spans,) = columns["input_ids"], columns["spans"]
        assert tokenizer.decode(tokens) == text + "<|im_end|>"
        assert written(tokenizer, tokens, spans) == [given["completion"] + "<|im_end|>"]


def test_an_instruction_takes_its_input():
    records = Records("instruction")
    document = records.document({"instruction": "Add.", "input": "2 2", "output": "4"})
    columns = ConversationEncoder.of(byte_tokenizer(), records).columns([document])
    assert "user\nAdd.\n\n2 2<|im_end|>" in byte_tokenizer().decode(columns["input_ids"][0])
    for empty in ("", None):
        assert 'Add."' in records.document({"instruction": "Add.", "input": empty, "output": "4"})


REFUSED = {
    "a template that refuses a role": (
        "{{ raise_exception('no tools here') }}" + CHATML,
        r"the chat template refuses it \(no tools here\): change the messages",
    ),
    "a prompt that is no prefix": (
        CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}"),
        "renders what precedes message 2 in another way",
    ),
    "a turn that is no prefix": (
        CHATML.replace(
            "'<|im_end|>\n' }}", "('<|end|>' if loop.last and loop.length % 2 == 0 else '<|im_end|>\n') }}"
        ),
        "renders message 2 in another way when others follow",
    ),
    "a broken template": ("{{ messages[0].content + 1 }}", "refuses it .can only concatenate str"),
    "code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses it .access to attribute"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_refuses_is_one_line(case):
    template, says = REFUSED[case]
    turns = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    with pytest.raises(BadRecordError) as caught:
        encoded(template, turns)
    assert caught.value.index == 0
    assert re.search(says, caught.value.reason)
    assert "\n" not in caught.value.reason


def test_messages_need_a_template():
    with pytest.raises(UserError, match="the tokenizer has no chat template, which chat messages need"):
        ConversationEncoder.of(byte_tokenizer(None), MESSAGES)
