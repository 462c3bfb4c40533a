"""What packed weights cost to run: time and memory of a larger model with random weights, by method.

OMP_NUM_THREADS=1 python docs/studies/compress/costs.py multi_head gru
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from llmkit import LanguageModel, compress, plugin
from llmkit.analysis.compress import measure
from llmkit.run.saving import save_model
from llmkit.sequence import DecodingOptions

METHODS = ("int8", "int4", "bf16", "int8+bf16", "int4+bf16", "dynamic_int8")
TOKENS, ROUNDS = 16, 4


def built(mixer: str) -> LanguageModel:
    """Return a model of about 13 million weights."""
    torch.manual_seed(0)
    model = LanguageModel(attention=plugin("attention", mixer), dim=512, num_layers=4, context=64)
    model.tokenizer, model.head_ready = plugin("tokenizer", "byte")(), True
    model.configure_model()
    return model.eval()


def main() -> None:
    """Print a line for each method."""
    torch.set_num_threads(1)
    options = DecodingOptions(max_new_tokens=TOKENS, min_new_tokens=TOKENS, temperature=0.0)
    for mixer in sys.argv[1:]:
        original = built(mixer)
        models = {"original": original, **{name: compress(original, name) for name in METHODS}}
        ratios = {}
        for size in measure.SIZES:
            runs = {
                name: lambda model=model, size=size: len(model.predict(["a text"] * size, options)) * TOKENS
                for name, model in models.items()
            }
            ratios[size] = measure.times(runs, ROUNDS)
        with tempfile.TemporaryDirectory() as folder:
            for name, model in models.items():
                path = Path(folder) / f"{name}.ckpt"
                save_model(model, path)
                memory = {key: f"{value / 2**20:.0f} MiB" for key, value in measure.memory(path, []).items()}
                shown = [
                    f"batch {size}: {np.median(found[name]):.2f} ms a token, "
                    f"{np.exp(np.log(found[name] / found['original']).mean()):.2f} of the original"
                    for size, found in ratios.items()
                ]
                print(mixer, name, f"{path.stat().st_size / 2**20:.1f} MiB", memory, *shown, sep="; ", flush=True)


if __name__ == "__main__":
    main()
