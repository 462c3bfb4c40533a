"""Write the network of a checkpoint as one file that runs without llmkit, by torch.export or as ONNX.

python examples/export.py runs/NAME/version_0/checkpoints/best.ckpt model.pt2
python examples/export.py runs/NAME/version_0/checkpoints/best.ckpt model.onnx    (pip install onnx onnxscript)

A classifier becomes (ids, segments) -> scores of the labels, any other encoder or decoder (ids, segments) -> scores of
the vocabulary at each position, for any number of rows and any length from 3 to the context: pad shorter rows. Segments
are 1 for tokens and 0 for padding. Tokenizer and labels stay with the checkpoint: ``llmkit.load(FILE).tokenizer`` and
``.head``. The decoder's file computes a full pass, without the state that makes generation fast.

The variants that compute softmax attention can be exported. The recurrent ones and those that work in chunks cannot:
how they go through a batch depends on its padding and length.

A .pt2 file is read by ``torch.export.load(FILE).module()``. A .onnx file holds at most 2 GB and is run by
``onnxruntime.InferenceSession(FILE).run(["scores"], {"ids": ids, "segments": segments})``, with int64 arrays.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import llmkit


class Scores(nn.Module):
    """What a checkpoint computes, from plain tensors to plain tensors."""

    def __init__(self, model: llmkit.LanguageModel) -> None:
        super().__init__()
        self.net, self.head = model.network, model.head

    def forward(self, ids_BT: Tensor, segments_BT: Tensor) -> Tensor:
        """Return the scores, (B, labels) or (B, T, V)."""
        scores = getattr(self.head, "scores", None)
        if scores is not None:
            labels: Tensor = scores(self.net, {"ids": ids_BT, "segments": segments_BT})
            return labels
        seq = llmkit.Sequence.from_segments(segments_BT)
        if self.head.topology == "encoder":
            hidden_BTD = self.net.encode(ids_BT, seq).x_BSD
            hidden_BTD = self.head.get_submodule("dense")(hidden_BTD)  # of masked_lm: the layers before the scores
        else:
            hidden_BTD = self.net.decode(ids_BT, seq)
        return F.linear(hidden_BTD, self.net.output_weight_VD, self.net.output_bias_V)


def export(model: llmkit.LanguageModel) -> ExportedProgram:
    """Return the exported program of a loaded checkpoint."""
    ids_BT, segments_BT = torch.zeros(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    rows, length = Dim("rows", min=1), Dim("length", min=3, max=model.context)
    with torch.no_grad():
        return torch.export.export(Scores(model), (ids_BT, segments_BT), dynamic_shapes=({0: rows, 1: length},) * 2)


def write_onnx(program: ExportedProgram, file: str) -> None:
    """Write an exported program as ONNX, which has no running maximum: it becomes a maximum over what came before."""

    def cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        length = x.shape[-1]
        before = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        values = torch.where(before, x[..., None, :], torch.iinfo(x.dtype).min).amax(-1)
        return values, values  # in place of the indices, which are not used

    decompositions = torch.export.default_decompositions()
    decompositions[torch.ops.aten.cummax.default] = cummax
    program = program.run_decompositions(decompositions)
    names = ["ids", "segments"]
    torch.onnx.export(program, (), file, input_names=names, output_names=["scores"], dynamo=True, external_data=False)


if __name__ == "__main__":
    checkpoint, file = sys.argv[1:]
    program = export(llmkit.load(checkpoint))
    write_onnx(program, file) if file.endswith(".onnx") else torch.export.save(program, file)
    print(f"written: {file}")
