"""Text of a few words, and a multiple-choice task of the harness over them, in local files."""

import json
from pathlib import Path

WORDS = ["grid", "scale", "level", "bits", "round", "clamp", "weight", "latent", "threshold", "step", "rate"]
TASK = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3}
"""
DOCUMENTS = [" ".join(WORDS[(n * 5 + k * (n % 7 + 1)) % 11] for k in range(30)) for n in range(60)]


def write_text(path: Path) -> Path:
    return write_rows(path, [{"text": text} for text in DOCUMENTS])


def write_task(folder: Path, questions: int = 12) -> Path:
    rows = [
        {
            "question": f"{WORDS[i % 11]} {WORDS[(3 * i + 1) % 11]}",
            "choices": [
                " ".join(WORDS[(i + k * 3 + j) % 11] for j in range(1 + (i + k) % 3)) for k in range(4)
            ],
            "label": i * 7 % 4,
        }
        for i in range(questions)
    ]
    (folder / "words.yaml").write_text(TASK % write_rows(folder / "data.jsonl", rows))
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
