"""A mistake of the user: one line that names the key or file and the remedy, exit code 2, nothing lost."""

import pickle
import re
from math import inf, nan
from pathlib import Path

import pytest
import torch
import yaml

from stableqat.callbacks import (
    DivergenceGuard,
    Evaluate,
    GradientMismatch,
    LastCheckpoint,
    QuantizerMonitor,
    Trajectory,
)
from stableqat.cli.main import main
from stableqat.errors import UserError


def contents(folder):
    """Every file below a folder, with what a change would change."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def refuse(at, capsys, recwarn):
    """Run a command; return the one line that refuses it. Only the data's own cache may have changed."""

    def run(argv):
        before = contents(at)
        capsys.readouterr()
        assert main(argv) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "layers quantized" not in line]
        assert not out
        assert len(lines) == 1, err
        assert lines[0].startswith("stableqat: ")
        assert len(lines[0]) < 400
        after = contents(at)
        assert {p: after.get(p) for p in before if p.is_file()} == {
            p: before[p] for p in before if p.is_file()
        }
        return lines[0].removeprefix("stableqat: "), {p for p in after if p not in before}

    return run


def llama(*flags):
    return ["fit", "-c", "llama.yaml", *flags]


def vit(*flags):
    return ["fit", "-c", "vit.yaml", *flags]


BITS = "bits: must be a whole number from 1 to 8, not "
DSQ = ["--model.quantizer", "stableqat.quantizers.DSQ", "--model.quantizer.bits", "2"]
PLATEAU = ["--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau"]
PLATEAU += ["--model.lr_scheduler.monitor", "val/loss"]
ONE_CYCLE = ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "1e-3"]
ONE_CYCLE += ["--model.lr_scheduler.total_steps", "3"]
COSINE = ["--model.lr_scheduler", "stableqat.modules.CosineWarmup"]

# command, the pieces of the line
SETTINGS = {
    # verbs and keys
    "a misspelt verb": (["fitt"], ["fitt is not a verb", "did you mean fit?"]),
    "an unknown verb": (["zip"], ["zip is not a verb", "fit, validate, test, sweep, runs, compare"]),
    "a stray word": (llama("2"), ["2: not a setting", "--KEY VALUE"]),
    "a flag without its value": (llama("--trainer.max_steps"), ["trainer.max_steps: needs a value"]),
    "a misspelt key of the model": (
        llama("--model.init_form", "x"),
        ["model.init_form: unknown key; did you mean model.init_from?"],
    ),
    "an unknown key of the quantizer": (
        llama("--model.quantizer.temperature", "1"),
        ["model.quantizer.temperature: unknown key; choose one of amplitude, bits, dampening, freezing, "],
    ),
    "a misspelt key of the optimizer": (
        llama("--model.optimizer.weight_decai", "0"),
        ["model.optimizer.weight_decai: unknown key; did you mean model.optimizer.weight_decay?"],
    ),
    "a misspelt key of the trainer": (
        llama("--trainer.max_stepz", "1"),
        ["trainer.max_stepz: unknown key; did you mean trainer.max_steps?"],
    ),
    "a key cut short": (
        llama("--trainer.max_step", "5"),
        ["trainer.max_step: unknown key; did you mean trainer.max_steps?"],
    ),
    "a key cut short, with its value": (
        vit("--data.batch=5"),
        ["data.batch: unknown key; did you mean data.batch_size?"],
    ),
    "a key of the model cut short": (
        llama("--model.init", "none"),
        ["model.init: unknown key; did you mean model.init_from?"],
    ),
    "a key without its group": (
        llama("--max_steps", "1"),
        ["max_steps: ", "did you mean trainer.max_steps?"],
    ),
    "a misspelt key of the data": (
        llama("--data.blocksize", "8"),
        ["data.blocksize: unknown key; did you mean data.block_size?"],
    ),
    "a misspelt group": (llama("--modle.skip", "[]"), ["modle.skip: ", "did you mean model.skip?"]),
    "an unknown key of the model's config": (
        llama("--model.config.hidden_sice", "32"),
        ["model.config.hidden_sice: unknown key", "did you mean hidden_size?"],
    ),
    "a setting before its class": (
        ["fit", "--model.quantizer.bits", "2"],
        ["model.quantizer.bits: comes before the class of model", "-c or --model CLASS"],
    ),
    # classes
    "a misspelt method": (
        llama("--model.quantizer", "stableqat.quantizers.StabelQAT"),
        ["model.quantizer: stableqat.quantizers.StabelQAT is not a Quantizer", "did you mean StableQAT?"],
    ),
    "an unknown method": (
        llama("--model.quantizer", "LSQ"),
        [
            "model.quantizer: LSQ is not a Quantizer",
            "choose one of DSQ, LRQAT, ParetoQ, PermutedStableQAT, STE, STEAtNoise, STEAtRandomRounding, "
            "STEAtWeight, ScaledSTE, StableQAT",
        ],
    ),
    "a misspelt module": (
        llama("--model", "LamaModule"),
        ["model: LamaModule is not a QATModule", "did you mean LlamaModule?"],
    ),
    "a class of another kind": (
        llama("--data", "stableqat.modules.LlamaModule"),
        ["data: stableqat.modules.LlamaModule is not a LightningDataModule", "TextDataModule"],
    ),
    "a misspelt optimizer": (
        llama("--model.optimizer", "torch.optim.Adamw"),
        ["model.optimizer: torch.optim.Adamw is not an Optimizer", "did you mean AdamW?"],
    ),
    # null where a run could not be read back
    "data that is null": (
        llama("--data.vocab_size", "null"),
        ["data.vocab_size: must be a whole number, not null"],
    ),
    "a switch that is null": (
        llama("--model.activation_checkpointing", "null"),
        ["model.activation_checkpointing: must be true or false, not null"],
    ),
    # values of the quantizer
    "bits 0": (llama("--model.quantizer.bits", "0"), [BITS + "0"]),
    "bits -1": (llama("--model.quantizer.bits", "-1"), [BITS + "-1"]),
    "bits 9": (llama("--model.quantizer.bits", "9"), [BITS + "9"]),
    "bits 2.5": (
        llama("--model.quantizer.bits", "2.5"),
        ["model.quantizer.bits: must be a whole number or null, not 2.5"],
    ),
    "bits two": (
        llama("--model.quantizer.bits", "two"),
        ["model.quantizer.bits: must be a whole number or null, not two"],
    ),
    "an amplitude that turns gradients round": (
        llama("--model.quantizer.amplitude", "0.3"),
        ["amplitude: at 0.3", "stay below 0.225"],
    ),
    "no harmonic": (llama("--model.quantizer.harmonics", "0"), ["harmonics: must be at least 1, not 0"]),
    "a of DSQ out of range": (
        llama(*DSQ, "--model.quantizer.a", "1.5"),
        ["a: must lie between 0 and 1, not 1.5"],
    ),
    "an unknown grid": (
        llama("--model.quantizer.grid", "diagonal"),
        ["model.quantizer.grid: must be integer, stretched, ternary, binary or null, not diagonal"],
    ),
    "an unknown mask": (
        llama("--model.quantizer.mask", "half"),
        ["model.quantizer.mask: must be range, levels or none, not half"],
    ),
    "a grid that has no such width": (
        llama("--model.quantizer.grid", "binary"),
        ["bits: the binary grid takes 1 bits, not 2"],
    ),
    "groups that do not fit a layer": (
        llama("--model.quantizer.group_size", "32"),
        ["layer model.layers.0.mlp.down_proj", "group_size: 32 does not divide the layer's 48 inputs"],
    ),
    "nothing left to quantize": (
        llama("--model.skip", '["*"]'),
        ["skip: * leaves none of the 8 linear layers to quantize; skip fewer"],
    ),
    # values of the optimizer, scheduler and trainer
    "a negative learning rate": (
        llama("--model.optimizer.lr", "-1"),
        ["model.optimizer", "learning rate: -1"],
    ),
    "a learning rate in words": (
        llama("--model.optimizer.lr", "high"),
        ["model.optimizer.lr: must be a number, not high"],
    ),
    "a negative warm-up": (
        llama(*COSINE, "--model.lr_scheduler.warmup_steps", "-3"),
        ["model.lr_scheduler.warmup_steps: must be at least 0, not -3"],
    ),
    "a learning rate that float32 does not hold": (
        llama("--model.optimizer.lr", "1e300"),
        ["model.optimizer.lr: must be at most 3.40282e+38, not 1e+300"],
    ),
    "an infinite weight decay": (
        llama("--model.optimizer.weight_decay", ".inf"),
        ["model.optimizer.weight_decay: must be at most 3.40282e+38, not inf"],
    ),
    "learning rates whose product is infinite": (
        llama("--model.optimizer.lr", "1e10", "--model.weight_lr_multiplier", "1e30"),
        ["model.weight_lr_multiplier: 1e+30 makes the learning rate infinite; lower it"],
    ),
    "a schedule that ends nowhere": (
        llama(*COSINE, "--model.lr_scheduler.final_ratio", ".nan"),
        ["model.lr_scheduler.final_ratio: must be at least 0 and at most 1, not nan"],
    ),
    "a schedule that follows a metric": (
        llama(*PLATEAU),
        ["model.lr_scheduler: ReduceLROnPlateau follows a metric", "take stableqat.modules.CosineWarmup"],
    ),
    "a name that two classes have": (
        llama("--model.lr_scheduler", "ReduceLROnPlateau"),
        [
            "model.lr_scheduler: ReduceLROnPlateau is not a LRScheduler",
            "did you mean torch.optim.lr_scheduler.R",
        ],
    ),
    "a schedule that is over before the run": (
        llama(*ONE_CYCLE, "--trainer.max_steps", "5"),
        ["model.lr_scheduler.total_steps: OneCycleLR ends after 3 steps, but the run takes 5; set it"],
    ),
    "a search for the learning rate": (
        llama("--trainer.callbacks+=LearningRateFinder"),
        ["trainer.callbacks: LearningRateFinder tries rates", "stableqat sweep, and set model.optimizer.lr"],
    ),
    "a search for the batch size": (
        llama("--trainer.callbacks+=BatchSizeFinder"),
        ["trainer.callbacks: BatchSizeFinder tries other batch sizes", "set data.batch_size"],
    ),
    "weights averaged before there are any": (
        vit("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.1"),
        ["trainer.callbacks: StochasticWeightAveraging copies the module", "take WeightAveraging or EMA"],
    ),
    "a negative number of steps": (llama("--trainer.max_steps", "-5"), ["trainer", "`max_steps`", "-5"]),
    "a schedule that ends with a run without end": (
        llama(*COSINE, "--trainer.max_steps", "-1", "--trainer.max_time", "00:00:00:02"),
        [
            "model.lr_scheduler.total_steps: the schedule ends with the run",
            "set total_steps, trainer.max_steps or",
        ],
    ),
    "half a step": (
        llama("--trainer.max_steps", "1.5"),
        ["trainer.max_steps: must be a whole number, not 1.5"],
    ),
    "no accumulation at all": (
        llama("--trainer.accumulate_grad_batches", "0"),
        ["trainer.accumulate_grad_batches: must be at least 1, not 0"],
    ),
    "an unknown precision": (
        llama("--trainer.precision", "fp7"),
        ["trainer.precision: must be 64, 32, 16", "bf16-mixed", "not fp7"],
    ),
    "half-precision masters": (
        llama("--trainer.precision", "bf16-true"),
        ["trainer.precision: bf16-true", "take bf16-mixed"],
    ),
    "no folder for the run": (
        llama("--trainer.logger", "false"),
        ["trainer.logger: the run's folder is the logger's, so it cannot be off"],
    ),
    "FSDP1": (
        llama("--trainer.strategy", "fsdp"),
        ["trainer.strategy: fsdp", "use --trainer.strategy fsdp2"],
    ),
    "a misspelt strategy": (
        llama("--trainer.strategy", "dpp"),
        ["trainer.strategy: dpp", "did you mean ddp?"],
    ),
    "a misspelt accelerator": (
        llama("--trainer.accelerator", "cpuu"),
        ["trainer.accelerator: cpuu is unknown; did you mean cpu?"],
    ),
    "more processes than cores": (
        llama("--trainer.devices", "9999"),
        ["trainer.devices: 9999 processes", "CPU cores; ask for fewer"],
    ),
    "devices in words": (llama("--trainer.devices", "some"), ["trainer: `devices`", "int > 0"]),
    "a seed out of range": (llama("--seed_everything", "-1"), ["seed_everything: must be from 0", "not -1"]),
    "an unknown mode of the best checkpoint": (
        llama("--best.mode", "low"),
        ["`mode` can be min, max but got low"],
    ),
    # settings that do not fit one another
    "rows longer than the model allows": (
        llama("--data.block_size", "64"),
        ["data.block_size: 64 tokens", "max_position_embeddings, 32", "shorten the rows"],
    ),
    "a tokenizer larger than the embedding": (
        llama("--data.vocab_size", "400"),
        ["model.config.vocab_size: 300 is less than the tokenizer's 400 entries; raise it"],
    ),
    "a width that the heads do not divide": (
        llama("--model.config.num_attention_heads", "3"),
        ["model.config: ", "hidden size (32)", "attention heads (3)"],
    ),
    "another number of classes": (
        vit("--model.num_classes", "7"),
        ["model.num_classes: the model has 7 classes, but the data has 10; set it to 10"],
    ),
    "another image size": (
        vit("--model.model_args.img_size", "16"),
        ["model.model_args.img_size: the model takes 16", "image_size 8"],
    ),
    "a misspelt timm model": (
        vit("--model.model_name", "deit_smal_patch16_224"),
        ["model.model_name: Unknown model (deit_smal_patch16_224); did you mean deit_small_patch16_224?"],
    ),
    # files that are not there
    "a missing config file": (
        ["fit", "-c", "none.yaml"],
        ["none.yaml: there is no such file, and no shipped configuration of this name"],
    ),
    "no config at all": (["fit"], ["data, model: missing; set it in a configuration"]),
    "a missing data file": (
        llama("--data.source", "none.jsonl"),
        ["data.source: none.jsonl does not exist; name a file, a folder or a data set on the Hub"],
    ),
    "a missing checkpoint": (
        llama("--ckpt_path", "none.ckpt"),
        ["ckpt_path: none.ckpt does not exist; name a checkpoint, or leave it out"],
    ),
    "the last checkpoint of a run that has none": (
        llama("--ckpt_path", "last", "--trainer.logger.version", "new"),
        ["ckpt_path: logs/llama/new/checkpoints/last.ckpt does not exist"],
    ),
    "the last checkpoint of no run": (
        llama("--ckpt_path", "last"),
        ["ckpt_path: last and best need the run's folder; add --trainer.logger.version"],
    ),
    "a missing start": (
        llama("--model.init_from", "none.ckpt"),
        ["model.init_from: none.ckpt does not exist; name a run, a checkpoint, a model folder or"],
    ),
    "an output folder below a file": (
        llama("--trainer.logger.save_dir", "llama.yaml/logs"),
        ["trainer.logger.save_dir: llama.yaml/logs", "cannot be written", "choose another folder"],
    ),
    "an output folder that refuses": (
        llama("--trainer.logger.save_dir", "/proc/stableqat"),
        ["trainer.logger.save_dir: /proc/stableqat", "cannot be written", "choose another folder"],
    ),
    # studies
    "a missing study": (["sweep", "none.yaml"], ["none.yaml: there is no such file"]),
    "a sweep of nothing": (["sweep"], ["studies: missing"]),
    "a missing folder to compare": (
        ["compare", "none"],
        ["none: no event files", "name the folder of a study"],
    ),
    "a misspelt key of a tool": (["compare", "none", "--ot", "x"], ["ot: unknown key; did you mean out?"]),
    "a key of a tool cut short": (
        ["export", "none", "--form", "gguf"],
        ["form: unknown key; did you mean format?"],
    ),
    "a key of another tool cut short": (
        ["data", "sample", "--tok", "5"],
        ["tok: unknown key; did you mean tokens?"],
    ),
}
VALIDATED = "above 0; --trainer.limit_val_batches 0 skips validation"
SETTINGS |= {
    f"{key} {value}": (llama(f"--{key}", value), [f"{key}: must be {range}"])
    for key, value, range in [
        ("guard.patience", "-1", "at least 1, not -1"),
        ("monitor.rows", "0", "at least 1 or null, not 0"),
        ("evaluate.limit", "-3", "at least 1 or null, not -3"),
        ("last.every_n_train_steps", "0", "at least 1 or null, not 0"),
        ("trainer.gradient_clip_val", ".nan", "at least 0, not nan"),
        ("trainer.log_every_n_steps", "-1", "at least 0, not -1"),
        ("trainer.num_sanity_val_steps", "-2", "at least -1, not -2"),
        ("trainer.min_steps", "-1", "at least 0, not -1"),
        ("trainer.val_check_interval", "0", VALIDATED),
    ]
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_is_refused_before_anything_is_written(case, refuse):
    argv, pieces = SETTINGS[case]
    line, made = refuse(argv)
    for piece in pieces:
        assert piece in line
    assert not made


OUT_OF_RANGE = [
    (DivergenceGuard, "guard", {"margin": [nan, -1.0], "patience": [0, -1], "decay": [5.0, 1.0, -0.1, nan]}),
    (DivergenceGuard, "guard", {"check_parameters_every": [0, -1]}),
    (QuantizerMonitor, "monitor", {"rows": [0, -1], "every_n_steps": [-1]}),
    (GradientMismatch, "mismatch", {"every_n_steps": [-1], "directions": [1, -1], "sigma": [0.0, nan, inf]}),
    (Evaluate, "evaluate", {"every_n_steps": [-1], "stride": [0, -8], "limit": [0, -3], "batch_size": [0]}),
    (Trajectory, "trajectory", {"every_n_steps": [-1], "batches": [0, -1]}),
    (LastCheckpoint, "last", {"every_n_train_steps": [0, -1]}),
]


@pytest.mark.parametrize(
    ("kind", "group", "key", "value"),
    [
        (kind, group, k, v)
        for kind, group, wrong in OUT_OF_RANGE
        for k, values in wrong.items()
        for v in values
    ],
)
def test_a_number_that_would_end_or_silence_a_run_is_refused(kind, group, key, value):
    with pytest.raises(UserError, match=rf"^{group}\.{key}: must be .*, not {re.escape(str(value))}$"):
        kind(**{key: value})


# what the file holds (None: the name alone), the pieces of the line
CONFIGS = {
    "an empty file": ("", ["holds no settings", "trainer: {max_steps: 100}"]),
    "a list": ("- 1\n- 2\n", ["holds no settings"]),
    "no YAML": ("trainer:\n  max_steps: 1\n  - 2\n", ["line 3 is not valid YAML"]),
    "no text": (b"\xff\xfe\x00\x01", ["not a text file"]),
    "a value of the wrong type": (
        "trainer: {max_steps: many}",
        ["trainer.max_steps: must be a whole number"],
    ),
    "a misspelt key deep inside": (
        "model: {init_args: {quantizer: {init_args: {bitz: 3}}}}",
        ["model.quantizer.bitz: unknown key; did you mean model.quantizer.bits?"],
    ),
    "a misspelt init_args": (
        "model: {init_arg: {skip: []}}",
        ["model.init_arg.skip: unknown key; did you mean model.init_args.skip?"],
    ),
    "a misspelt class": (
        "model: {init_args: {quantizer: {class_path: stableqat.quantizers.DSQQ}}}",
        ["model.quantizer: stableqat.quantizers.DSQQ is not a Quantizer", "did you mean DSQ?"],
    ),
    "a misspelt key in one of several types": (
        "trainer: {strategy: {class_path: stableqat.modules.FSDP2Strategy, init_args: {backend: x}}}",
        ["trainer.strategy.backend: unknown key; choose one of save_distributed_checkpoint"],
    ),
    "a number for a class": ("model: 3", ["model: 3 is not a QATModule", "LlamaModule, ViTModule"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_file_is_refused_by_name(case, refuse, at):
    text, pieces = CONFIGS[case]
    path = at / "case.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line, made = refuse(llama("-c", "case.yaml"))
    for piece in ["case.yaml: ", *pieces]:
        assert piece in line
    assert not made


# what is found only once all files are read together, and so without a file's name
WHOLES = {
    "a strategy's place in earlier versions": (
        "trainer: {strategy: {class_path: stableqat.modules.strategy.FSDP2Strategy}}",
        ["trainer.strategy: stableqat.modules.strategy.F", "did you mean stableqat.modules.FSDP2Strategy?"],
    ),
    "an unknown group": ("trainr: {max_steps: 1}", ["trainr.max_steps", "did you mean trainer.max_steps?"]),
    "an unknown key of a callback": (
        "guard: {patienc: 1}",
        ["guard.patienc", "did you mean guard.patience?"],
    ),
    "a number for a group": ("trainer: 3", ["trainer: must be a mapping of settings, not 3"]),
    "no model": ("model: null", ["model: missing"]),
    "no data": ("data: null", ["data: missing"]),
}


@pytest.mark.parametrize("case", WHOLES)
def test_a_config_is_refused_by_key(case, refuse, at):
    text, pieces = WHOLES[case]
    (at / "case.yaml").write_text(text)
    line, made = refuse(llama("-c", "case.yaml"))
    for piece in pieces:
        assert piece in line
    assert not made


STUDIES = {
    "an empty grid": ({"grid": {}}, ["the grid is empty"]),
    "an empty axis": ({"configs": ["llama.yaml"], "grid": {"arm": {"fp": None}, "lr": []}}, ["lr"]),
    "a misspelt key": ({"gird": {"lr": [1]}}, ["unknown key gird: did you mean grid?"]),
    "a missing config": ({"configs": ["none.yaml"], "grid": {"arm": {"fp": None}}}, ["none.yaml"]),
}


@pytest.mark.parametrize("case", STUDIES)
def test_a_study_is_refused_by_name(case, refuse, at):
    study, pieces = STUDIES[case]
    (at / "case.yaml").write_text(yaml.safe_dump(study))
    line, made = refuse(["sweep", "case.yaml"])
    for piece in ["case.yaml: ", *pieces]:
        assert piece in line
    assert not made


def test_an_empty_folder_has_nothing_to_compare(refuse, at):
    (at / "nothing").mkdir()
    line, made = refuse(["compare", "nothing"])
    assert "nothing: no event files" in line
    assert not made


def test_a_gpu_is_refused_where_there_is_none(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line, made = refuse(llama("--trainer.accelerator", "gpu"))
    assert line == "trainer.accelerator: gpu, but PyTorch sees no GPU; use cpu or auto"
    assert not made


def test_more_gpus_than_there_are_are_refused(refuse, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line, made = refuse(llama("--trainer.accelerator", "gpu", "--trainer.devices", "2"))
    assert line == "trainer.devices: 2 processes, but this machine has 1 GPUs; ask for fewer"
    assert not made


def test_a_run_is_not_overwritten(run, refuse):
    line, made = refuse(llama("--trainer.logger.version", "done"))
    assert f"{run}: already holds a run; choose another --trainer.logger.version, or resume it" in line
    assert not made


class Trap:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.fixture
def checkpoints(at, run):
    """Checkpoints that are none."""
    whole = (at / run / "checkpoints/last.ckpt").read_bytes()
    (at / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    (at / "empty.ckpt").write_bytes(b"")
    torch.save({"state_dict": {}, "trap": Trap()}, at / "trap.ckpt")
    (at / "pickle.ckpt").write_bytes(pickle.dumps(Trap()))
    torch.save([1, 2], at / "list.ckpt")
    torch.save({"state_dict": {"w": torch.zeros(2)}}, at / "bare.ckpt")
    return f"{run}/checkpoints/last.ckpt"


DAMAGED = {
    "cut.ckpt": ["not a readable checkpoint (cut short or damaged); take another one"],
    "empty.ckpt": ["not a readable checkpoint"],
    "trap.ckpt": ["holds more than tensors and plain values; refused"],
    "pickle.ckpt": ["pickle.ckpt"],
    "list.ckpt": ["not a checkpoint of this suite"],
}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *(("ckpt_path", name) for name in DAMAGED),
        ("model.init_from", "cut.ckpt"),
        ("model.init_from", "trap.ckpt"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_never_executed(key, name, checkpoints, refuse, at):
    line, made = refuse(llama(f"--{key}", name))
    for piece in [name, *DAMAGED[name]]:
        assert piece in line
    assert not made
    assert not (at / "sprung").exists()


def test_weights_alone_cannot_be_resumed(checkpoints, refuse):
    line, _ = refuse(llama("--ckpt_path", "bare.ckpt"))
    assert (
        "ckpt_path: bare.ckpt was not written by a run and cannot be resumed; name it as model.init_from"
        in line
    )


# flags, the pieces of the line
OTHERS = {
    "a start of another width": (
        llama("--model.init_from", "CHECKPOINT", "--model.config.hidden_size", "64"),
        ["another architecture: model.embed_tokens.weight has shape (300, 32), the model (300, 64)"],
    ),
    "a start of another family": (
        vit("--model.init_from", "CHECKPOINT"),
        ["weights of another architecture", "check the model's settings"],
    ),
    "a resumed run of another width": (
        llama("--ckpt_path", "CHECKPOINT", "--model.config.hidden_size", "64"),
        [
            "ckpt_path: model.config.hidden_size is 32 in the checkpoint, 64 in the configuration",
            "model.init_from",
        ],
    ),
    "a resumed run of another width in bits": (
        llama("--ckpt_path", "CHECKPOINT", "--model.quantizer.bits", "3"),
        ["ckpt_path: model.quantizer.bits is 2 in the checkpoint, 3 in the configuration"],
    ),
    "a resumed run without its quantizer": (
        llama("--ckpt_path", "CHECKPOINT", "--model.quantizer", "null"),
        [
            "ckpt_path: model.quantizer is stableqat.quantizers.StableQAT in the checkpoint",
            "None in the configuration",
        ],
    ),
    "a resumed run of another family": (
        vit("--ckpt_path", "CHECKPOINT"),
        ["ckpt_path: model.class_path is stableqat.modules.LlamaModule in the checkpoint"],
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_model_is_refused(case, checkpoints, refuse):
    argv, pieces = OTHERS[case]
    line, made = refuse([checkpoints if word == "CHECKPOINT" else word for word in argv])
    for piece in pieces:
        assert piece in line
    assert not made


@pytest.mark.parametrize("argv", [llama(), vit()], ids=["llama", "vit"])
def test_a_hub_that_cannot_be_reached_is_told_before_data_is_prepared(argv, refuse, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line, made = refuse([*argv, "--model.init_from", "someone/some-model"])
    assert "init_from: someone/some-model was not found locally" in line
    assert "name" in line
    assert not made


def test_a_start_folder_without_weights_is_refused(refuse, at):
    (at / "hollow").mkdir(exist_ok=True)
    assert "hollow has no usable config.json" in refuse(llama("--model.init_from", "hollow"))[0]
    assert "hollow holds no .safetensors or .pth file" in refuse(vit("--model.init_from", "hollow"))[0]
