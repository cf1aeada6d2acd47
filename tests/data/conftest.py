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
