import json

import pytest
from sample_documents import document


@pytest.fixture(autouse=True)
def _quiet():
    import datasets

    datasets.disable_progress_bars()


@pytest.fixture
def documents():
    return [document(n) for n in range(200)]


@pytest.fixture
def corpus(tmp_path, documents):
    """A jsonl file of 200 documents."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(documents)))
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The folder of a small BPE that knows these documents."""
    from stableqat.data.tokenizer import train_bpe

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe([document(n) for n in range(50)], 300).save_pretrained(folder)
    return folder
