"""A published study says what the original says, in little space."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from stableqat.analysis.command import publish
from stableqat.analysis.comparison import read_summaries
from stableqat.analysis.publish import thinned
from stableqat.analysis.tables import markdown, write_page
from stableqat.errors import UserError
from stableqat.events import read_run


def write(run):
    """As Lightning's logger does."""
    with SummaryWriter(str(run.folder)) as writer:
        metrics = {tag: run.last(tag) for tag in run.scalars if tag.startswith("hp/")}
        for summary in hparams(run.hparams, metrics):
            writer._get_file_writer().add_summary(summary, 0)
        for tag, series in run.scalars.items():
            for step, value in series.items():
                writer.add_scalar(tag, value, step)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs") / "study"
    arms = [synthetic.ARMS[i] for i in (0, 1, 5)]
    for run in synthetic.runs(folder, arms, synthetic.LRS[-3:], seeds=2, every=2):
        write(run)
    (folder / "study.yaml").write_text(synthetic.PLAN)
    (folder / "start" / "checkpoints").mkdir()
    (folder / "start" / "checkpoints" / "last.ckpt").write_bytes(b"0" * 1000)
    return folder


@pytest.fixture(scope="module")
def copy(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "published"
    assert publish([str(study)], out=str(out), points=40) == 0
    return out / "study"


def test_compare_says_the_same_of_the_copy(study, copy):
    # but for what counts logged steps
    def losses(folder: Path) -> str:
        return markdown(write_page(read_summaries([folder])[0])).split("### Training")[0]

    assert losses(copy) == losses(study)
    assert "### Differences" in markdown(write_page(read_summaries([copy])[0]))


def test_scalars_are_thinned_and_layers_left_out(study, copy):
    originals = [path.parent for path in study.glob("*/events.*")]
    assert sorted(path.parent.name for path in copy.glob("*/events.*")) == sorted(
        [path.name for path in originals] + ["overlay"]
    )
    for path in originals:
        before, after = read_run(path, ("",)), read_run(copy / path.name, ("",))
        assert after.hparams == before.hparams
        assert {tag for tag in before.scalars if "layers" not in tag} == after.scalars.keys()
        for tag, series in after.scalars.items():
            assert len(series) <= 40
            assert str(after.last(tag)) == str(before.last(tag))  # NaN, too
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert all(path.name == "study.yaml" or path.name.startswith("events.") for path in files)
    assert sum(path.stat().st_size for path in files) < sum(
        path.stat().st_size for path in study.glob("*/events.*")
    )


def test_thinning_keeps_the_ends_and_what_is_not_finite():
    series = {step: float(step) for step in range(1000)} | {517: math.nan}
    kept = thinned(series, 10)
    assert len(kept) == 11
    assert {0, 517, 999} <= kept.keys()
    assert thinned({3: 1.0, 1: 2.0}, 2) == {1: 2.0, 3: 1.0}


def test_the_overlay_draws_all_arms_of_a_learning_rate(copy):
    """Each method is a run of its own, because TensorBoard gives a run one colour in all charts."""

    def read(folder: Path) -> EventAccumulator:
        events = EventAccumulator(str(folder))
        events.Reload()
        return events

    tags = {}
    for folder in (copy / "overlay").glob("*/"):
        tags[folder.name] = read(folder).Tags()["scalars"]
        assert {tag.rpartition("/")[2] for tag in tags[folder.name]} == {
            folder.name
        }  # one arm of each method
    assert tags.keys() == {"FP", "STE", "StableQAT"}
    config = read(copy / "overlay").Tensors("custom_scalars__config__")[0].tensor_proto
    layout = Layout.FromString(config.string_val[0])
    assert [category.title for category in layout.category][:2] == ["train/loss", "train/grad_norm"]
    assert [chart.title for chart in layout.category[0].chart] == ["lr 3e-2", "lr 0.1", "lr 0.3"]
    drawn = [pattern for group in layout.category for chart in group.chart for pattern in chart.multiline.tag]
    for pattern in drawn:
        assert sum(re.search(pattern, tag) is not None for each in tags.values() for tag in each) == 1
    assert len(drawn) == sum(map(len, tags.values()))


def test_what_is_copied_is_the_study_and_what_can_be_read_of_it(tmp_path, monkeypatch):
    runs = synthetic.runs(tmp_path / "logs", [synthetic.ARMS[1]], [1e-3, 1e-2], seeds=1)[2:]
    runs += [replace(runs[0], folder=runs[0].folder.parent / "smooth-lr1e-3-s0")]  # told apart by their names
    runs += [replace(runs[0], folder=runs[0].folder.parent / "deep" / runs[1].folder.name)]  # another study
    runs += [replace(runs[0], hparams=runs[0].hparams | {"subcommand": "validate"})]  # in the same folder
    for run in runs:
        write(run)
    cut = tmp_path / "logs" / "smooth-lr1e-3-s0" / "events.out.tfevents.1.host"
    cut.write_bytes(b"0" * 20)
    monkeypatch.chdir(tmp_path / "logs")
    assert publish(["."], out="../published") == 0
    copied = tmp_path / "published" / "logs"
    first, second, third = (run.folder.name for run in runs[:3])
    assert {path.name for path in copied.iterdir()} == {first, second, third, "overlay"}
    assert len(list((copied / second).iterdir())) == 1
    assert read_run(copied / second).scalars == read_run(runs[1].folder).scalars
    assert read_run(copied / first).hparams == runs[0].hparams | {"named": first.removesuffix("-s0")}
    assert read_run(copied / third).hparams["named"] == "smooth"
    original = next(each for each in read_summaries([Path()]) if each.folder == Path())
    assert (
        markdown(write_page(read_summaries([copied])[0])).split("###")[0]
        == markdown(write_page(original)).split("###")[0]
    )


def test_nothing_is_overwritten(study, copy):
    with pytest.raises(UserError, match="study exists already"):
        publish([str(study)], out=str(copy.parent))
    with pytest.raises(UserError, match="no runs of its own"):
        publish([str(study.parent)], out=str(copy.parent / "other"))
    with pytest.raises(UserError, match="points: must be at least 2"):
        publish([str(study)], points=1)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["study"]
