"""What the hub refuses is told in one line with the remedy; no test reaches for the network."""

import huggingface_hub.errors as hub
import pytest

import tiny
from stableqat.data.source import TEXT_FORMATS, local_files
from stableqat.data.tokenizer import load_tokenizer
from stableqat.errors import UserError
from stableqat.modules import Distillation, LlamaModule
from stableqat.modules.config import hub_refusal
from stableqat.modules.vit_config import architecture

NAME = "meta-llama/Llama-3.2-1B"


class Response:
    """What the errors of the hub read of an answer, whatever library fetched it."""

    def __init__(self, status: int) -> None:
        self.status_code = status
        self.headers = {}
        self.request = None


def of_status(kind, status):
    return kind(f"{status} Client Error.\n\nCannot access gated repo for url ...", response=Response(status))


REFUSALS = {
    "gated, not logged in": (
        of_status(hub.GatedRepoError, 401),
        ["is gated", f"huggingface.co/{NAME}", "hf auth"],
    ),
    "gated, not granted": (
        of_status(hub.GatedRepoError, 403),
        ["is gated", "request access", "hf auth login"],
    ),
    "private or misspelt": (of_status(hub.RepositoryNotFoundError, 404), ["correct the name", "HF_TOKEN"]),
    "a token without rights": (
        of_status(hub.HfHubHTTPError, 403),
        ["refused by the Hub (403)", "hf auth login"],
    ),
    "a token that has expired": (
        of_status(hub.HfHubHTTPError, 401),
        ["refused by the Hub (401)", "HF_TOKEN"],
    ),
    "no network": (
        hub.LocalEntryNotFoundError("nothing cached"),
        ["there is no such folder", "cannot be reached", "download it"],
    ),
    "offline mode": (hub.OfflineModeIsEnabled("offline"), ["cannot be reached", "download it"]),
}


@pytest.fixture
def refused(monkeypatch):
    def by(error):
        def download(*args, **kwargs):
            raise error

        for function in ("hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(f"transformers.utils.hub.{function}", download)

    return by


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: LlamaModule(init_from=NAME), "init_from"),
        (lambda: LlamaModule(config=NAME), "model.config"),
        (lambda: tiny.module("llama", init_from=NAME).check_pretrained(NAME), "init_from"),
    ],
    ids=["init_from", "config", "early check"],
)
def test_a_config_that_the_hub_refuses(build, key, case, refused):
    error, pieces = REFUSALS[case]
    refused(error)
    with pytest.raises(UserError) as caught:
        build()
    line = str(caught.value)
    assert line.startswith(f"{key}: {NAME} ")
    assert "\n" not in line
    for piece in pieces:
        assert piece in line


def test_weights_that_the_hub_refuses(refused):
    refused(REFUSALS["gated, not granted"][0])
    with pytest.raises(UserError, match=f"^init_from: {NAME} is gated: request access"):
        tiny.module("llama", init_from=NAME).configure_model()


def test_a_teacher_that_the_hub_refuses(refused):
    refused(REFUSALS["gated, not granted"][0])
    made = tiny.module("llama", teacher=Distillation(source=NAME))
    made.trainer = tiny.trainer()
    with pytest.raises(UserError, match=f"^teacher.source: {NAME} is gated: request access"):
        made.setup("fit")


@pytest.mark.parametrize("name", ["./mine", "a/b/mine", "models/mine", "models/mine/"])
def test_the_hub_is_not_asked_for_a_path(name, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for ask in (
        lambda: LlamaModule(init_from=name),
        lambda: LlamaModule(config=name),
        lambda: load_tokenizer(name),
        lambda: local_files(name, TEXT_FORMATS),
        lambda: architecture(name),
        lambda: tiny.module("vit", init_from=name).check_pretrained(name),
    ):
        with pytest.raises(UserError, match=rf"({name} does not exist|no such .* folder: {name})"):
            ask()


def test_any_other_error_is_not_the_hubs():
    assert hub_refusal(NAME, ValueError("a broken file")) is None
