"""Help of fit, validate and test: the settings that people set, at once; all of them with `--help all`.

The page takes descriptions and defaults from the source of the classes, so nothing heavy is imported for it.
"""

import re
from textwrap import fill
from typing import Any

import yaml

from stableqat.cli.signatures import Argument, our_classes, signature, trainer_class
from stableqat.shipped import find_config, shipped_names
from stableqat.trust import walk

RUN_VERBS = {
    "fit": "train a model, quantized or not",
    "validate": "evaluate on the validation split; quantized without training, this is PTQ",
    "test": "evaluate on the test split",
}
WIDTH = 99
INDENT = " " * 36
QUOTE = "'"
_USAGE = "stableqat {verb} -c CONFIG [-c CONFIG ...] [--KEY VALUE ...]"
_EXAMPLES = """
A pretrained language model, and a vision transformer, on your data (defaults in brackets are theirs):
  stableqat {verb} -c llama/finetune --model.init_from DIR --data.source FILE --model.quantizer.bits 4
  stableqat {verb} -c vit/finetune --model.init_from FILE --data.source DIR --model.quantizer.bits 4
"""
_ENDING = """
All settings:
  stableqat {verb} --help all                  Lightning's Trainer, callbacks, optimizers
  stableqat {verb} --model.help LlamaModule    or ViTModule
  stableqat {verb} --data.help TextDataModule  or ImageDataModule
  stableqat {verb} -c CONFIG --print_config    what would run

Shipped configurations for -c, each laid over those before it:
{names}
"""
_OTHERS = {
    "model.teacher.weight": Argument("0", "Weight of distillation from the full-precision start, in [0, 1]."),
    "model.optimizer.lr": Argument(None, "Highest learning rate of the weights; null: by bits and width."),
    "model.optimizer.weight_decay": Argument(
        "0.01", "Decay of the weights; scales, norms and biases have none."
    ),
    "config": Argument(None, "Configuration: a file, or the name of a shipped one. Repeat it to add layers."),
    "print_config": Argument(None, "Print the settings that would run, and exit."),
    "seed_everything": Argument("0", "Seed of weights, order and augmentation."),
    "trainer.logger.version": Argument(None, "Name of the run's folder under lightning_logs/llama or vit."),
    "ckpt_path": Argument("null", "Checkpoint to resume from; last finds the run's own."),
}
_GROUPS = {
    title: keys.split()
    for title, keys in {
        "Run": "config ckpt_path seed_everything trainer.logger.version print_config",
        "Model": "model.init_from model.init_quantizers model.input_quantizer model.attention_quantizer "
        "model.skip model.teacher.weight model.compile_model model.activation_checkpointing",
        "Quantizer": "bits levels grid group_size per_channel scale_init mask amplitude",
        "Data of language models": "source tokenizer block_size batch_size tokens validation_fraction",
        "Data of vision transformers": "source image_size batch_size augment mean std",
        "Training": "model.optimizer.lr model.optimizer.weight_decay model.scale_lr_multiplier "
        "trainer.max_steps trainer.max_epochs trainer.accumulate_grad_batches trainer.gradient_clip_val "
        "trainer.val_check_interval trainer.limit_val_batches trainer.precision trainer.accelerator "
        "trainer.devices trainer.strategy",
    }.items()
}


def people_page(verb: str) -> str:
    """Return the help of a verb: an example per family, and the settings that people set.

    Args:
        verb: fit, validate or test.
    """
    known, finetune = _known(), _finetune()
    parts = [f"usage: {_USAGE.format(verb=verb)}\n\n{RUN_VERBS[verb].capitalize()}.\n"]
    parts.append(_EXAMPLES.format(verb=verb))
    for title, keys in _GROUPS.items():
        family = "vit" if title.endswith("transformers") else "llama"
        entries = {_full(title, key): known[title][key] for key in keys}
        lines = [
            _entry(key, entry, finetune[family].get(key, entry.default)) for key, entry in entries.items()
        ]
        parts.append("\n".join([f"\n{title}:", *lines, ""]))
    parts.append(_ending(verb))
    return "".join(parts)


def describe(parser: Any, verb: str) -> None:
    """Give the full help of a verb headings of its own instead of Lightning's.

    Args:
        parser: The verb's parser.
        verb: The verb.
    """
    parser.usage = _USAGE.format(verb=verb)
    parser.description = f"{RUN_VERBS[verb].capitalize()}."
    titles = {"trainer": "Lightning's Trainer", "model": "Model", "data": "Data", verb: "Checkpoint"}
    for key, title in titles.items():
        if key in parser.groups:
            parser.groups[key].title = title
    parser.ending = _ending(verb)


def run_settings(verb: str) -> dict[str, str]:
    """Return the settings of a verb with their descriptions, those that people set and all of the Trainer's.

    Args:
        verb: fit, validate or test.
    """
    known = _known()
    shown = {_full(title, key): known[title][key].text for title, keys in _GROUPS.items() for key in keys}
    return shown | {key: each.text for key, each in known["Training"].items() if key.startswith("trainer.")}


def _known() -> dict[str, dict[str, Argument]]:
    """Arguments by group of the page and key."""
    trainer = signature(trainer_class(), "Trainer") or {}
    modules, data, quantizers = our_classes("modules"), our_classes("data"), our_classes("quantizers")
    model = {**(signature(modules, "ViTModule") or {}), **(signature(modules, "LlamaModule") or {})}
    whole = {f"trainer.{key}": value for key, value in trainer.items()}
    whole |= {f"model.{key}": value for key, value in model.items()} | _OTHERS
    return {
        "Run": whole,
        "Model": whole,
        "Training": whole,
        "Quantizer": signature(quantizers, "StableQAT") or {},
        "Data of language models": signature(data, "TextDataModule") or {},
        "Data of vision transformers": signature(data, "ImageDataModule") or {},
    }


def _full(title: str, key: str) -> str:
    prefixes = {"Quantizer": "model.quantizer.", "Data of": "data."}
    return next((p for start, p in prefixes.items() if title.startswith(start)), "") + key


def _finetune() -> dict[str, dict[str, str]]:
    """The settings of the configurations for pretrained models, by family and key."""
    return {
        family: {
            key.strip(".").replace("init_args.", ""): "null" if value is None else str(value)
            for key, value in walk(yaml.safe_load(find_config(f"{family}/finetune").read_text()), family)
            if not isinstance(value, dict)
        }
        for family in ("llama", "vit")
    }


def _entry(key: str, argument: Argument, value: str | None) -> str:
    """A setting with the first sentence about it, and its default."""
    text = re.sub(r":class:`([^`]+)`|`+([^`]+)`+", r"\1\2", argument.text)
    first = re.split(r"(?<=[.;]) (?=[A-Z])", text)[0]
    default = {"None": "null", "True": "true", "False": "false"}.get(value or "null", value or "null")
    plain = re.fullmatch(r"[\w.'-]+", default) and default != "null"
    shown = f" [{default.strip(QUOTE)}]" if plain else ""
    lines = fill(
        first + shown, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False
    )
    name = f"  --{key}"
    return f"{name:<{len(INDENT)}}{lines.lstrip()}" if len(name) < len(INDENT) - 1 else f"{name}\n{lines}"


def _ending(verb: str) -> str:
    names = [name for name in shipped_names() if name.count("/") == 1 and not name.endswith("-study")]
    lines = fill("  ".join(names), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return _ENDING.format(verb=verb, names=lines)
