"""Files are data: whatever class a file names beside those of a fixed list is neither imported nor built."""

import copy
import json
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from stableqat.checkpoints.read import read_checkpoint
from stableqat.cli.main import main
from stableqat.errors import UserError
from stableqat.modules import LlamaModule, QATModule, ViTModule
from stableqat.modules.hyperparameters import rebuild
from stableqat.modules.start import state_dict_follows
from stableqat.studies.study import read_study
from stableqat.trust import allowing, check_settings, read_settings

PLANTED = """
from pathlib import Path
from stableqat.quantizers import STE

Path("marker").write_text("imported")


class Payload(STE):
    def __init__(self, *args, **kwargs):
        Path("marker").write_text("built")
        super().__init__(*args, **kwargs)
"""
COMMAND = {"class_path": "subprocess.Popen", "init_args": {"args": "touch marker", "shell": True}}
PAYLOADS = {
    "a command": COMMAND,
    "a module beside the file": {"class_path": "planted.Payload", "init_args": {"bits": 2}},
    "a list": [COMMAND],
    "deep inside": {"a": {"b": [{"c": COMMAND}]}},
    "text": json.dumps(COMMAND),
    "a name": "planted.Payload",
}


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A folder, the current one and on the import path, with a module that leaves a mark."""
    monkeypatch.chdir(tmp_path)
    for family in ("llama", "vit"):
        config = yaml.safe_load((place / f"{family}.yaml").read_text())
        config["data"]["init_args"].pop("source", None)
        Path(f"{family}.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("planted.py").write_text(PLANTED)
    yield tmp_path
    sys.modules.pop("planted", None)


def settings(family, folder=Path()):
    return yaml.safe_load((folder / f"{family}.yaml").read_text())["model"]


@pytest.fixture(scope="module")
def saved(place):
    """A checkpoint of each family, as a run would have left it."""
    made = {}
    for family, cls in (("llama", LlamaModule), ("vit", ViTModule)):
        arguments = settings(family, place)["init_args"]
        arguments["quantizer"] = {"class_path": "stableqat.quantizers.STE", "init_args": {"bits": 2}}
        values = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, **arguments}
        values |= {"_class_path": f"stableqat.modules.{cls.__name__}"}
        rest = {"pytorch-lightning_version": "2.6.0", "global_step": 1, "epoch": 0, "callbacks": {}}
        rest |= {"loops": {}, "optimizer_states": [], "lr_schedulers": [], "hyper_parameters": values}
        with state_dict_follows():
            module = rebuild(cls, Path("made"), rest)
            module.configure_model()
        made[family] = rest | {"state_dict": module.state_dict()}
    return made


def write(checkpoint, family="llama", data=None, **config):
    """A run in `run`, and how it was configured."""
    folder = Path("run/checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "last.ckpt")
    data = data or {
        "class_path": f"stableqat.data.{'Text' if family == 'llama' else 'Image'}DataModule",
        "init_args": {},
    }
    config = {"model": settings(family), "data": data, **config}
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "last.ckpt")


def places(values, above=()):
    """Every field of plain values, and the blocks around them."""
    for key, value in values.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from places(value, (*above, key))


def plant(values, place, payload):
    values = copy.deepcopy(values)
    at = values
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = payload
    return values


def fields(family, saved):
    """The fields of a saved module, and those that it could have."""
    values = saved[family]["hyper_parameters"]
    cls = LlamaModule if family == "llama" else ViTModule
    names = [(name,) for name in cls.__init__.__kwdefaults__]
    inside = [("quantizer", "init_args", "surrogate"), ("quantizer", "dict_kwargs"), ("teacher", "source")]
    inside += [("_instantiator",), ("kwargs",), ("lr_scheduler", "init_args", "lr_lambda")]
    found = dict.fromkeys([*places(values), *names])
    return [*found, *(place for place in inside if place[0] in values or len(place) == 1)]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_no_field_of_a_checkpoint_is_built(family, payload, saved, here):
    """Those who open one in Python take the same way as the verbs."""
    checked = fields(family, saved)
    assert len(checked) > 20
    for place in checked:
        values = plant(saved[family]["hyper_parameters"], place, PAYLOADS[payload])
        checkpoint = {**saved[family], "hyper_parameters": values}
        path = here / "planted.ckpt"
        torch.save(checkpoint, path)
        # text may stay text in a field that holds text; Lightning's way to instantiate is not gone at all
        harmless = payload in ("text", "a name") or place == ("_instantiator",)
        if harmless and place in (("config",), ("init_from",)):
            continue  # the name of a model, which is looked for on the hub
        with suppress(UserError) if harmless else pytest.raises(UserError, match=r"hyper_parameters|model"):
            read = read_checkpoint(path)
            with state_dict_follows():
                rebuild(QATModule, path, read).configure_model()
        assert "planted" not in sys.modules, place
        assert not Path("marker").exists(), place


VERBS = {
    "evaluate": ["evaluate", "run"],
    "predict": ["predict", "run", "--prompt", "a"],
    "export": ["export", "run", "--format", "hf", "--out", "out"],
    **{
        verb: [verb, "-c", "llama.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
        for verb in ("validate", "test")
    },
    "fit on": ["fit", "-c", "llama.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"],
    "fit from": ["fit", "-c", "llama.yaml", "--model.init_from", "run/checkpoints/last.ckpt"],
}


def refused(argv, capsys):
    capsys.readouterr()
    assert main(argv) == 2
    assert not Path("marker").exists()
    assert "planted" not in sys.modules
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if "layers quantized" not in line]
    assert len(lines) == 1, error
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("family", ["llama", "vit"])
def test_no_verb_builds_what_a_checkpoint_names(family, verb, saved, here, capsys):
    values = saved[family]["hyper_parameters"]
    block = "config" if family == "llama" else "model_args"
    for place, payload in ((("quantizer",), "a module beside the file"), ((block, "x"), "a command")):
        planted = plant(values, place, PAYLOADS[payload])
        path = write({**saved[family], "hyper_parameters": planted}, family)
        argv = [word.replace("llama", family) for word in VERBS[verb]]
        line = refused(argv, capsys)
        assert path in line
        assert f"hyper_parameters: {'.'.join(place)}" in line
        assert PAYLOADS[payload]["class_path"] in line


def test_no_teacher_is_built_of_what_a_checkpoint_names(saved, here, capsys):
    path = write(
        {
            **saved["llama"],
            "hyper_parameters": plant(
                saved["llama"]["hyper_parameters"], ("quantizer",), PAYLOADS["a module beside the file"]
            ),
        },
        "llama",
    )
    taught = ["--model.teacher.source", path, "--model.teacher.weight", "1"]
    assert main(["fit", "-c", "llama.yaml", *taught]) == 2
    assert "teacher.source: run/checkpoints/last.ckpt: hyper_parameters: quantizer" in capsys.readouterr().err
    assert not Path("marker").exists()


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize("field", ["source", "tokenizer", "block_size", "other"])
def test_no_verb_builds_what_a_run_s_configuration_names(field, verb, saved, here, capsys):
    data = {"class_path": "stableqat.data.TextDataModule", "init_args": {field: COMMAND}}
    write(saved["llama"], data=data)
    assert f"config.yaml: data.{field}" in refused(VERBS[verb], capsys)


def test_data_of_another_class_is_neither_imported_nor_called(saved, here, capsys):
    for name in ("planted.Payload", "stableqat.data.import_module", "subprocess.Popen"):
        write(saved["llama"], data={"class_path": name, "init_args": {"name": "planted"}})
        assert "not of this suite" in refused(VERBS["evaluate"], capsys)


CONFIGS = {
    "model": {"model": {"class_path": "planted.Payload"}},
    "model by name": {"model": "planted.Payload"},
    "quantizer": {"model": {"init_args": {"quantizer": {"class_path": "planted.Payload"}}}},
    "quantizer by name": {"model": {"init_args": {"quantizer": "planted.Payload"}}},
    "quantizer in another file": {"model": {"init_args": {"quantizer": "inner.yaml"}}},
    "quantizer as text": {"model": {"init_args": {"quantizer": "{class_path: planted.Payload}"}}},
    "optimizer": {"model": {"init_args": {"optimizer": {"class_path": "planted.Payload"}}}},
    "a function for a scheduler": {
        "model": {
            "init_args": {
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.LambdaLR",
                    "init_args": {"lr_lambda": "planted.Payload"},
                }
            }
        }
    },
    "data": {"data": {"class_path": "planted.Payload"}},
    "callbacks": {"trainer": {"callbacks": [{"class_path": "planted.Payload"}]}},
    "a callback of functions": {
        "trainer": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"setup": "planted.Payload"},
                }
            ]
        }
    },
    "logger": {"trainer": {"logger": {"class_path": "planted.Payload"}}},
    "strategy": {"trainer": {"strategy": {"class_path": "planted.Payload"}}},
    "plugins": {"trainer": {"plugins": [{"class_path": "planted.Payload"}]}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_no_configuration_is_enough_to_import_a_class(case, here, capsys):
    Path("inner.yaml").write_text("class_path: planted.Payload\n")
    Path("theirs.yaml").write_text(yaml.safe_dump(CONFIGS[case]))
    line = refused(["fit", "-c", "llama.yaml", "-c", "theirs.yaml"], capsys)
    assert "theirs.yaml: " in line
    assert "planted.Payload" in line
    assert "--allow planted.Payload" in line


WORDS = {
    "by --allow": ["-c", "theirs.yaml", "--allow", "planted.Payload"],
    "by its package": ["-c", "theirs.yaml", "--allow=planted"],
    "by name": ["--model.quantizer", "planted.Payload", "--model.quantizer.bits", "2"],
    "by name in full": ['--model.quantizer={"class_path": "planted.Payload", "init_args": {"bits": 2}}'],
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_user_is_enough(word, here, capsys):
    Path("theirs.yaml").write_text(yaml.safe_dump(CONFIGS["quantizer"]))
    Path("empty").mkdir()
    arguments = [*WORDS[word], "--data.source", "empty"]
    assert main(["fit", "-c", "llama.yaml", *arguments]) == 2  # for the data, which comes later
    assert "no data file in empty" in capsys.readouterr().err
    assert Path("marker").read_text() == "built"


def test_what_the_program_has_imported_it_may_load(saved, here):
    """A method of the caller's own needs no further word, other classes of other kinds do."""
    values = plant(saved["llama"]["hyper_parameters"], ("quantizer",), PAYLOADS["a module beside the file"])
    torch.save({**saved["llama"], "hyper_parameters": values}, "own.ckpt")
    with pytest.raises(UserError, match=r"--allow planted\.Payload"):
        LlamaModule.load_from_checkpoint("own.ckpt")
    import planted

    loaded = LlamaModule.load_from_checkpoint("own.ckpt")
    assert type(loaded.model.model.layers[0].mlp.up_proj.weight_quantizer) is planted.Payload
    values = plant(values, ("quantizer", "class_path"), "torch.optim.SGD")
    torch.save({**saved["llama"], "hyper_parameters": values}, "own.ckpt")
    with pytest.raises(UserError, match=r"quantizer: torch\.optim\.SGD is not a Quantizer"):
        LlamaModule.load_from_checkpoint("own.ckpt")


def test_a_function_that_a_checkpoint_names_is_not_called(saved, here):
    values = saved["llama"]["hyper_parameters"] | {"_instantiator": "planted.Payload"}
    torch.save({**saved["llama"], "hyper_parameters": values}, "own.ckpt")
    assert isinstance(LlamaModule.load_from_checkpoint("own.ckpt"), LlamaModule)
    assert not Path("marker").exists()


@pytest.mark.parametrize("layer", ["args", "configs", "allow"])
def test_a_study_is_not_the_user_s_word(layer, here, capsys):
    Path("theirs.yaml").write_text(yaml.safe_dump(CONFIGS["quantizer"]))
    arm = {
        "args": {"args": {"model.quantizer": "planted.Payload"}},
        "configs": {"configs": ["theirs.yaml"]},
        "allow": {"args": {"allow": "planted"}, "configs": ["theirs.yaml"]},
    }[layer]
    study = {"configs": ["llama.yaml"], "grid": {"arm": {"theirs": arm}}}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    assert "study.yaml: " in refused(["sweep", "study.yaml"], capsys)
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("field", [("class_path",), ("init_args", "config"), ("init_args", "skip")])
def test_a_benchmark_s_model_is_data(field, here, capsys):
    payload = "planted.Payload" if field == ("class_path",) else COMMAND
    Path("theirs.yaml").write_text(yaml.safe_dump({"model": plant(settings("llama"), field, payload)}))
    assert "theirs.yaml" in refused(["bench", "--model", "theirs.yaml", "--batch", "1"], capsys)


@pytest.mark.parametrize("verb", ["import", "evaluate", "fit"])
def test_code_of_a_model_folder_is_never_run(verb, here, capsys, monkeypatch):
    """Not even after transformers' question, which `yes |` would answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    Path("theirs").mkdir()
    Path("theirs/planted.py").write_text(PLANTED)
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "planted.Payload"}}
    Path("theirs/config.json").write_text(json.dumps(config))
    commands = {
        "import": ["import", "theirs", "--from", "stableqat", "--out", "new"],
        "evaluate": ["evaluate", "theirs"],
        "fit": ["fit", "-c", "llama.yaml", "--model.init_from", "theirs", "--model.config", "null"],
    }
    assert "theirs" in refused(commands[verb], capsys)


def test_settings_end(here):
    """Neither cycles nor billions of laughs keep a reader busy."""
    Path("cycle.yaml").write_text("a: &a\n  b: *a\n")
    laughs = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    Path("laughs.yaml").write_text(laughs)
    Path("deep.yaml").write_text(f"a: {'[' * 1500}{']' * 1500}\n")
    for name in ("cycle.yaml", "laughs.yaml", "deep.yaml"):
        with pytest.raises(UserError, match=name):
            read_settings(Path(name))


def test_the_suite_s_own_configurations_are_trusted():
    for path in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml")):
        check_settings(yaml.safe_load(path.read_text()), str(path))


BROKEN = {
    "empty": b"",
    "binary": b"\x00\x01\xfe\xff",
    "Latin-1": "# Größe\nmodel: {}\n".encode("latin-1"),
    "a list": b"- 1\n- 2\n",
    "plain text": b"nothing but words\n",
    "a Python tag": b"model: !!python/object/apply:os.system ['touch marker']\n",
    "a self-referring block": b"model: &a\n  init_args: *a\n",
    "no YAML": b"model: {\n",
    "a list of settings": b"data: [1, 2]\n",
    "text for a block": b"data: {class_path: stableqat.data.TextDataModule, init_args: words}\n",
}


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_run_s_broken_configuration_is_one_line(case, verb, saved, here, capsys):
    write(saved["llama"])
    Path("run/config.yaml").write_bytes(BROKEN[case])
    assert "run/config.yaml: " in refused(VERBS[verb], capsys)


CHANGED = {
    "hyper-parameters that are a list": ({"hyper_parameters": [1]}, "hyper_parameters: must be a mapping"),
    "bits in words": ({"quantizer.init_args.bits": "two"}, "quantizer.bits: must be a whole number or null"),
    "no number of bits": (
        {"quantizer.init_args.bits": 2.5},
        "quantizer.bits: must be a whole number or null",
    ),
    "an unknown key": (
        {"quantizer.init_args.bitz": 2},
        "quantizer.bitz is not a setting of STE; did you mean bits?",
    ),
    "a rate in words": ({"optimizer.init_args.lr": "x"}, "optimizer.lr: must be a number"),
    "skip of numbers": ({"skip": [1]}, "skip: must be a list"),
    "skip of text": ({"skip": "lm_head"}, "skip: must be a list"),
    "no callbacks": ({"callbacks": None}, "callbacks: must be a mapping, not None"),
    "a step in words": ({"global_step": "ten"}, "global_step: must be a whole number, not ten"),
    "a state of words": ({"state_dict": {"a": "b"}}, "it has no state_dict of tensors alone"),
    "a width beyond all": ({"config.hidden_size": 10**9}, "hidden_size: must be from 1 to 131072"),
    "a width beyond the file": ({"config.hidden_size": 2**15}, "and it holds"),
    "layers beyond all": ({"config.num_hidden_layers": 10**6}, "num_hidden_layers: must be from 1 to 1024"),
    "a config of text": ({"config.vocab_size": "many"}, "vocab_size"),
    "a class of no module": (
        {"_class_path": "torch.optim.SGD"},
        "torch.optim.SGD is not a QATModule",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_checkpoint_is_one_line(case, saved, here, capsys):
    changes, words = CHANGED[case]
    checkpoint = copy.deepcopy(saved["llama"])
    for key, value in changes.items():
        inside = key.partition(".")[0] not in checkpoint
        place = key.split(".")
        block = checkpoint["hyper_parameters"] if inside else checkpoint
        block.update(plant(block, place, value))
    path = write(checkpoint)
    line = refused(VERBS["export"], capsys)
    assert path in line
    assert words in line


TASK = """task: theirs
dataset_path: json
dataset_kwargs: {data_files: {test: docs.jsonl}}
test_split: test
output_type: multiple_choice
process_docs: !function planted.Payload
doc_to_text: "{{q}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
"""
EVALUATE = {"class_path": "stableqat.callbacks.Evaluate", "init_args": {"tasks": "theirs", "tasks_path": "t"}}
TASKS = {
    "a file": ({"evaluate": {"tasks": "piqa, t/theirs.yaml"}}, "evaluate.tasks: ", "t/theirs.yaml"),
    "a folder": ({"evaluate": {"tasks": "theirs", "tasks_path": "t"}}, "evaluate.tasks_path: ", "t"),
    "a callback": ({"trainer": {"callbacks": [EVALUATE]}}, "trainer.callbacks.tasks_path: ", "t"),
}


@pytest.mark.parametrize("case", TASKS)
def test_no_configuration_is_enough_to_read_task_files(case, here, capsys, monkeypatch):
    config, key, file = TASKS[case]
    Path("t").mkdir()
    Path("t/planted.py").write_text(PLANTED)
    Path("t/theirs.yaml").write_text(TASK)
    Path("docs.jsonl").write_text('{"q": "x"}\n')
    Path("theirs.yaml").write_text(yaml.safe_dump(config))
    argv = ["fit", "-c", "llama.yaml", "-c", "theirs.yaml", "--data.source", "empty"]
    Path("empty").mkdir()
    for other in ([], ["--evaluate.tasks", "theirs"], ["--evaluate.tasks_path", "other"]):
        if not (other and case == "a folder" and "tasks_path" in other[0]):
            line = refused([*argv[:3], *other, *argv[3:]], capsys)
            assert key in line
            assert f"cannot name {file};" in line
    flag = "--" + key.removesuffix(": ")
    given = [flag, file if case != "a file" else "piqa, t/theirs.yaml"]
    assert "no data file in empty" in refused([*argv, *given], capsys)  # the data comes next
    monkeypatch.setenv("STABLEQAT_STUDY", "1")
    assert key in refused([*argv, *given], capsys)


def test_a_study_s_point_calls_no_function(here, capsys, monkeypatch):
    callback = "lightning.pytorch.callbacks.LambdaCallback"
    spec = json.dumps([{"class_path": callback, "init_args": {"on_fit_start": "planted.Payload"}}])
    assert "--allow planted.Payload" in refused(
        ["fit", "-c", "llama.yaml", "--trainer.callbacks", spec], capsys
    )
    named = ["--model.quantizer", "planted.Payload", "--model.quantizer.bits", "2"]
    for words in (["--trainer.callbacks", spec], named, ['--model={"class_path": "planted.Payload"}']):
        with monkeypatch.context() as child:
            child.setenv("STABLEQAT_STUDY", "1")
            assert "planted.Payload" in refused(["fit", "-c", "llama.yaml", *words], capsys)
            refused(["fit", "-c", "--allow=planted.Payload", *words], capsys)


@pytest.mark.parametrize(
    "value",
    [
        "evil/${oc.env:SECRET}",
        "${ oc.env : SECRET }",
        "${${vars.env}:SECRET}",
        "${oc.env:SECRET,'{'}",
        "${oc.env:${vars.secret}}",
    ],
)
def test_a_study_reads_no_environment(value, here, capsys, monkeypatch):
    monkeypatch.setenv("SECRET", "leak")
    study = {"vars": {"env": "oc.env", "secret": "SECRET"}, "configs": ["llama.yaml"]}
    study |= {"args": {"model.init_from": value}, "grid": {"arm": {"a": {}}}}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    line = refused(["sweep", "study.yaml"], capsys)
    assert "study.yaml: args.model.init_from: " in line
    assert "leak" not in line
    study["args"] = {"model.init_from": "${vars.secret}:${vars.env}"}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    [point] = read_study("study.yaml").points
    assert "SECRET:oc.env" in point.argv


def test_only_what_the_user_names_is_looked_for_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine_of_the_folder", "other_of_the_folder", "json"):
        Path(f"{name}.py").write_text("HERE = True")
    names = ["--allow", "mine_of_the_folder.Mine", "--allow", "json.Mine"]
    try:
        with allowing([*names, "runs"]):
            assert import_module("mine_of_the_folder").HERE
            assert find_spec("json").origin != str(tmp_path / "json.py")
            assert find_spec("other_of_the_folder") is None
        assert find_spec("other_of_the_folder") is None
        del sys.modules["mine_of_the_folder"]
        assert find_spec("mine_of_the_folder") is None
    finally:
        sys.modules.pop("mine_of_the_folder", None)


def test_a_missing_module_is_not_a_class_of_the_wrong_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", "llama/base", "--model.quantizer", "of_nobody.STE"]) == 2
    assert capsys.readouterr().err == (
        "stableqat: model.quantizer: of_nobody.STE: no module of_nobody is installed, nor in the current "
        "folder; correct the name\n"
    )
