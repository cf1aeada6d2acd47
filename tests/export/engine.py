"""llama.cpp itself, in a process of its own, which ends where it aborts: jobs on stdin, answers on stdout."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from urllib.request import Request, urlopen

import pytest

MISSING = "xllamacpp, which is llama.cpp, has no wheel here; pip install 'stableqat[dev]'"


def run(jobs):
    """Answers of llama.cpp, a dictionary a job.

    A job has a `file`, and of these what is asked: `prompts` (lists of ids; `vocabulary` says how many there
    are) gives the `logprobs` of the next token by id and, as `shown`, what a user sees of each token; `texts`
    gives `tokens`; `messages` gives `chat`; `generate` (ids) gives `generated`, the 16 likeliest that follow.
    """
    if find_spec("xllamacpp") is None:
        pytest.skip(MISSING)
    done = subprocess.run(
        [sys.executable, __file__],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    missing = len(jobs) - len(answers)  # it printed why to stderr and is gone
    return answers + [{"aborted": done.stderr[-2000:] or f"exit code {done.returncode}"}] * missing


def answer(job):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["file"]
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 256
    parameters.n_parallel, parameters.warmup, parameters.fit_params = 1, False, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.verbosity = -1
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        return {"refused": str(error)}

    def post(path, body):
        request = Request(server.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request) as reply:
            return json.load(reply)

    def next_token(prompt):
        # it answers with no probabilities where the token that it takes has no text: let it take "!"
        body = {"prompt": prompt, "n_predict": 1, "n_probs": job["vocabulary"], "logit_bias": [["!", 1e3]]}
        (choice,) = server.handle_completions(body)["choices"]
        return sorted(choice["logprobs"]["content"][0]["top_logprobs"], key=lambda each: each["id"])

    found = {}
    if "prompts" in job:
        tokens = [next_token(prompt) for prompt in job["prompts"]]
        found["logprobs"] = [[each["logprob"] for each in one] for one in tokens]
        found["shown"] = [each["token"] for each in tokens[0]]
    if "texts" in job:
        options = {"add_special": True, "parse_special": True}
        found["tokens"] = [post("/tokenize", {"content": each, **options})["tokens"] for each in job["texts"]]
    if "messages" in job:
        found["chat"] = post("/apply-template", {"messages": job["messages"]})["prompt"]
    if "generate" in job:
        body = {"prompt": job["generate"], "n_predict": 16, "temperature": 0, "return_tokens": True}
        found["generated"] = post("/completion", body)["tokens"]
    return found


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
