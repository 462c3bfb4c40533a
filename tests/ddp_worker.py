"""One of two processes: runs the commands of a file, one after the other, then adds up losses over an epoch.

Started with ``LOCAL_RANK`` and the address of the other process in its environment, as by a cluster's launcher.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path

import torch
from command import parser_once
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from llmkit import DataModule, LanguageModel, main, plugin
from llmkit.run.cli import CLI
from llmkit.testing.invariance import build


def epoch_sums(head: str, file: str, cache: Path) -> list[list[float]]:
    """Return loss, count and rows of two epochs of training batches, of all processes together."""
    torch.manual_seed(0)
    model = LanguageModel(plugin("head", head), dim=16, num_layers=1, context=16).eval()
    byte = plugin("tokenizer", "byte")
    data = DataModule(train=file, validation_share=0.0, tokenizer=byte, batch_size=4, cache_dir=str(cache))
    build(model, data)
    model.eval()
    loader = data.train_dataloader()
    sums = torch.zeros(2, 3, dtype=torch.float64)
    with torch.no_grad():
        for epoch in sums:
            for batch in loader:
                found = model.head.loss(model.network, batch)
                epoch += torch.tensor([float(found.total), float(found.count), float(len(next(iter(batch.values()))))])
    if distributed.is_initialized():
        distributed.all_reduce(sums)
    found_sums: list[list[float]] = sums.tolist()
    return found_sums


if __name__ == "__main__":
    # Lightning reads the rank when it is imported, which is before this is forked.
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # type: ignore[attr-defined]
    torch.compile = functools.partial(torch.compile, backend="eager")  # what is traced, without the wait for C++
    CLI.setup_parser = parser_once  # type: ignore[method-assign, assignment]
    tasks = json.loads(Path(sys.argv[1]).read_text())
    for words in tasks["commands"]:
        code = main.main(words)
        if code:
            sys.exit(code)
    sums = [epoch_sums(head, file, Path(tasks["cache"])) for head, file in tasks["sums"]]
    if distributed.get_rank() == 0:
        Path(tasks["answer"]).write_text(json.dumps(sums))
