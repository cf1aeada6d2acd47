"""A result as the command writes it, made by hand: what a GPU would give, with round numbers."""

from typing import Any

ROUNDS = 5
SPREAD = (0.99, 1.0, 1.01, 1.0, 1.02)


def arm(ratio: float, peak: float | None, path: str | None, step: bool = True) -> dict[str, Any]:
    """About `ratio` in every round, though the machine slows down by 3% on the way."""

    def times(ms: float) -> list[float]:
        return [ms * (1 + (ratio - 1) * drift**3) * drift for drift in SPREAD]

    return {
        "path": path,
        "forward_ms": times(50) if step else None,
        "backward_ms": times(100) if step else None,
        "forward_backward_ms": times(150),
        "step_ms": times(160) if step else None,
        "peak_bytes": peak and int(peak * 1e9),
        "state_bytes": 14_800_000_000 if step else None,
    }


def result() -> dict[str, Any]:
    stepped = {
        "FP": arm(1, 30, None),
        "STE": arm(1.01, 28.5, "triton"),
        "DSQ": arm(1.02, 28.5, "triton"),
        "torchao": arm(1.25, 36, None),
        "broken": {"path": None, "failed": "RuntimeError: no such kernel"},
    }
    graphed = {name: arm(ratio, 30, None, step=False) for name, ratio in {"FP": 1, "STE": 1.1}.items()}
    graphed["DSQ"] = {"path": "triton", "failed": "out of memory"}
    size = 8192 * 8192

    def kernel(bytes_a_weight: int, share: float) -> dict[str, Any]:
        moved = bytes_a_weight * size
        return {"bytes": moved, "ms": [moved / 4e9 / share * drift for drift in SPREAD]}  # 4 TB/s

    return {
        "command": "stableqat bench --model llama-3.2-1b --batch 4",
        "date": "2026-01-02T03:04:05+00:00",
        "device": "NVIDIA H200",
        "versions": {"python": "3.11", "torch": "2.11.0"},
        "settings": {
            "model": "llama-3.2-1b",
            "batch": 4,
            "tokens": 2048,
            "precision": "bf16-mixed",
            "bits": 4,
            "rounds": ROUNDS,
            "parameters": 1_235_814_400,
            "items": 8192,
            "unit": "tokens",
        },
        "seeds": [0, 1, 2],
        "modes": {"eager": stepped, "compiled": stepped, "graphed": graphed},
        "kernels": {
            "shape": [8192, 8192],
            "copy": kernel(8, 1),
            "forward": {"STE": kernel(6, 0.95), "DSQ": kernel(6, 0.94)},
            "backward": {"STE": kernel(10, 0.9), "DSQ": kernel(10, 0.8)},
        },
    }
