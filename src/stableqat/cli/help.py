"""Help of fit, validate and test for people: short usage, whole headings, where to read on."""

from textwrap import fill
from typing import Any

from stableqat.shipped import shipped_names

RUN_VERBS = {
    "fit": "train a model, quantized or not",
    "validate": "evaluate on the validation split; quantized without training, this is PTQ",
    "test": "evaluate on the test split",
}
_TITLES = {
    "trainer": "Lightning's Trainer",
    "model": "The model, of a class; --model.help CLASS lists its settings",
    "data": "The data, of a class; --data.help CLASS lists its settings",
}
_ENDING = """
A pretrained model on your own data:
  stableqat {verb} -c llama/finetune --model.init_from DIR --data.source FILE
  stableqat {verb} -c vit/finetune --model.init_from FILE --data.source my_images/

Settings of model and data, which depend on the class:
  stableqat {verb} --model.help LlamaModule       or ViTModule
  stableqat {verb} --data.help TextDataModule     or ImageDataModule

Shipped configurations for -c; a later one is laid over the earlier ones:
{names}
"""


def describe(parser: Any, verb: str) -> None:
    """Replace Lightning's headings, which end in mid-sentence, and add the shipped configurations.

    Args:
        parser: The verb's parser.
        verb: The verb.
    """
    parser.usage = f"stableqat {verb} -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]"
    parser.description = f"{RUN_VERBS[verb].capitalize()}."
    for key, title in {**_TITLES, verb: "The checkpoint"}.items():
        if key in parser.groups:
            parser.groups[key].title = title
    names = [name for name in shipped_names() if name.count("/") == 1 and not name.endswith("-study")]
    lines = fill("  ".join(names), 79, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parser.ending = _ENDING.format(verb=verb, names=lines)
