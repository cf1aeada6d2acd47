"""lm-evaluation-harness without a network: the same answers, sample by sample, wherever the model lies."""

import json
import random
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import distributed as dist

import words
from stableqat.errors import UserError
from stableqat.evaluate import tasks as evaluated
from stableqat.evaluate.isolation import isolated
from stableqat.evaluate.model import find
from stableqat.evaluate.processes import Share, processes
from stableqat.evaluate.report import figures
from stableqat.evaluate.tasks import DEFAULT, check_documents, load_tasks, run_tasks, scores, task_names

pytest.importorskip("lm_eval")


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def answers(results):
    return [
        (sample["doc_id"], [response[0] for response in sample["resps"]])
        for sample in results["samples"]["words"]
    ]


def load(source):
    (loader,) = find(str(source)).loaders
    return loader()


@pytest.fixture(scope="module")
def loaded(tasks):
    return load_tasks(["words"], str(tasks))


def test_every_sample_of_live_and_exported(run, exported, loaded):
    told, given = [], []
    for source in (run, run / "checkpoints" / "best.ckpt", exported):
        model = load(source)
        tokenizer = model.tokenizer
        modes = [module.training for module in model.network.modules()]
        before = generators()
        for held in (True, False) if source == run else (True,):
            if held:
                with isolated(model.network):
                    results = run_tasks(model.network, tokenizer, loaded, batch_size=5, share=Share())
                assert generators() == before
                assert [module.training for module in model.network.modules()] == modes
            else:
                results = run_tasks(model.network, tokenizer, loaded, batch_size=5, share=Share())
            told.append(scores(results))
            given.append(answers(results))
        assert tokenizer.pad_token is None  # the harness needs one, the user's has none
    assert all(each == told[0] for each in told)
    assert all(each == given[0] for each in given)
    assert len({value for _, values in given[0] for value in values}) > 12  # not all the same


def test_loglikelihoods_are_those_of_the_model(run, loaded):
    model = load(run)
    tokenizer = model.tokenizer
    results = run_tasks(model.network, tokenizer, loaded, batch_size=5, share=Share())
    sample = results["samples"]["words"][3]
    doc = sample["doc"]
    for choice, (value, _) in zip(doc["choices"], (r[0] for r in sample["resps"]), strict=True):
        context, whole = tokenizer.encode(doc["question"]), tokenizer.encode(f"{doc['question']} {choice}")
        with torch.no_grad():
            logits = model.network(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
        spent = logits.log_softmax(-1)[torch.arange(len(context), len(whole)) - 1, whole[len(context) :]]
        assert spent.sum().item() == pytest.approx(float(value), abs=1e-4)


def test_products_in_half_precision_are_summed_in_single(run, loaded):
    model = load(run)
    tokenizer = model.tokenizer
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), isolated(model.network):
            results = run_tasks(model.network, tokenizer, loaded, batch_size=5, share=Share())
        values.append([float(r[0]) for _, given in answers(results) for r in given])
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=0.05)
    # bfloat16's eight bits would leave every one of them as it is
    assert any(torch.tensor(value).bfloat16().item() != value for value in values[1])


def test_a_mean_counts_each_task_once(run, tmp_path):
    words.write_task(tmp_path)
    for name in ("first", "second", "alone"):  # each takes other documents
        task = (tmp_path / "words.yaml").read_text().replace("task: words", f"task: {name}")
        task += f"process_docs: !function docs.{name}\n"
        (tmp_path / f"{name}.yaml").write_text(task)
    take = "{} = lambda docs: docs.select(range({}, {}))\n"
    (tmp_path / "docs.py").write_text(
        take.format("first", 6, 11) + take.format("second", 9, 12) + take.format("alone", 0, 12)
    )
    mean = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (tmp_path / "inner.yaml").write_text("group: inner\ntask: [second]\n")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [first, inner]\n" + mean)
    model = load(run)

    def told(*names):
        loaded = load_tasks(list(names), str(tmp_path))
        results = run_tasks(model.network, model.tokenizer, loaded, batch_size=8, share=Share())
        tasks = scores(results)
        values = {name: value for name, value, _ in figures({"tasks": tasks})}
        return {name: tasks[name]["group"] for name in tasks}, values

    groups, values = told("both", "alone")
    assert groups == {"first": "both", "second": "both", "inner": "both", "both": None, "alone": None}
    assert len({values[f"{name}/acc"] for name in ("first", "second", "both", "alone")}) == 4
    assert values["mean/acc"] == pytest.approx((values["both/acc"] + values["alone/acc"]) / 2)
    groups, values = told("inner", "alone")  # a group without figures of its own
    assert set(groups.values()) == {None}
    assert values["mean/acc"] == pytest.approx((values["second/acc"] + values["alone/acc"]) / 2)


def test_fewer_documents_than_processes(loaded):
    check_documents(loaded, None, Share(0, 12))
    check_documents(loaded, 4, Share(0, 4))
    with pytest.raises(UserError, match="tasks: words has 12 documents for 13 processes, and each needs"):
        check_documents(loaded, 99, Share(12, 13))
    with pytest.raises(UserError, match=r"words has 3 documents \(limit; it has 12\) for 4 processes"):
        check_documents(loaded, 3, Share(0, 4))


def test_processes_wait_for_the_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: joined.append(options))
    with processes("cpu") as (share, _):
        assert share == Share(1, 2)
    assert joined[0]["timeout"] > timedelta(hours=2)


def test_names():
    assert task_names("default") == list(DEFAULT)
    assert task_names("words, piqa,words") == ["words", "piqa"]
    with pytest.raises(UserError, match="empty name"):
        task_names("piqa,")


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr(evaluated, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need lm_eval and accelerate; pip install 'stableqat\[eval\]'"):
        task_names("piqa")


def test_tasks_that_cannot_be_loaded(tasks, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"tasks_path: .* is not a folder"):
        load_tasks(["words"], str(tmp_path / "nothing"))
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: label\n'
    )

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nand a second line")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"tasks: far cannot be loaded: Couldn't reach .* Hub; load it"):
        load_tasks(["far"], str(tmp_path))


def test_a_task_that_nobody_knows(tasks, monkeypatch):
    import lm_eval.tasks

    own = lm_eval.tasks.TaskManager

    class Small(own):  # a search of the harness's own files takes long
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Small)
    with pytest.raises(UserError, match="tasks: word is not a task of lm_eval or of --tasks_path"):
        load_tasks(["words", "word"], str(tasks))


def test_a_task_file_by_its_path(tasks):
    (task,) = load_tasks([str(tasks / "words.yaml")], None)["tasks"].values()
    assert json.loads((tasks / "data.jsonl").read_text().splitlines()[0]) == task.dataset["test"][0]


def test_weights_are_computed_once(run, loaded, computed):
    model = load(run)
    tokenizer = model.tokenizer
    with isolated(model.network):
        run_tasks(model.network, tokenizer, loaded, batch_size=5, share=Share())
    assert len(computed) == 14  # seven layers a block
    with isolated(model.network):  # weights may have changed meanwhile
        pass
    assert len(computed) == 28
