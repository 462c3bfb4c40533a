"""Products of eight-bit numbers: weights are rounded before, inputs when they come."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.compression import Calibration, Compression, Matrix, matrices
from llmkit.errors import UserError
from llmkit_plugins.compression.int8 import Int8Matrix


class DynamicMatrix(Int8Matrix):
    """A matrix of eight-bit numbers that is multiplied as such on a CPU, by torch's quantized operators."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._kernel: Any = None

    def kernel(self, bias: Tensor | None = None) -> Any:
        """Return the map as torch's kernels take it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has announced another way to make such tensors
            zeros = torch.zeros(len(self.codes), dtype=torch.long)
            whole = torch._make_per_channel_quantized_tensor(self.codes, self.scale[:, 0].double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(whole, bias)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the map of (..., columns), whose inputs are rounded to seven bits, with one scale for all of them.

        Where a gradient is wanted the matrix is made, for torch's operators have none.
        """
        differentiated = torch.is_grad_enabled() and x.requires_grad
        if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or differentiated:
            return super().linear(x, bias)
        if self._kernel is None:  # the weights have been loaded by now
            self._kernel = self.kernel(None if bias is None else bias.detach())
        try:
            y: Tensor = torch.ops.quantized.linear_dynamic(x, self._kernel, True)
        except RuntimeError:  # inputs that are not finite have no scale
            return super().linear(x, bias)
        return y


class RecurrentKernel:
    """torch's LSTM or GRU of eight-bit weights, in the place of ``torch.lstm`` and ``torch.gru``."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        self.rnn, self._cells = rnn, list[Any]()

    def __call__(
        self, x: Tensor, sizes: Tensor | None, first: Any, directions: list[int], settings: tuple[Any, ...]
    ) -> Any:
        """Return outputs and last states; see ``Recurrent._kernel``."""
        if not self._cells:
            for end in ("", "_reverse")[: 1 + self.rnn.bidirectional]:
                biases = [getattr(self.rnn, f"bias_{one}_l0{end}").detach() for one in ("ih", "hh")]
                forms = [getattr(self.rnn, f"packed_weight_{one}_l0{end}") for one in ("ih", "hh")]
                kernels = [form.kernel(bias) for form, bias in zip(forms, biases, strict=True)]
                make = torch.ops.quantized.make_quantized_cell_params_dynamic
                self._cells.append(make(*kernels, *biases, True))
        cells = [self._cells[number] for number in directions]
        is_lstm = isinstance(self.rnn, nn.LSTM)
        run: Any = torch.quantized_lstm if is_lstm else torch.quantized_gru
        how = {"dtype": torch.qint8, "use_dynamic": True} if is_lstm else {}
        given, rest = ((x, first), (*settings, True)) if sizes is None else ((x, sizes, first), settings)
        try:
            return run(*given, cells, *rest, **how)
        except RuntimeError:  # as above
            plain: Any = torch.lstm if is_lstm else torch.gru
            weights = self.rnn.all_weights
            return plain(*given, [weight for number in directions for weight in weights[number]], *rest)


class DynamicInt8(Compression):
    """Linear maps and recurrences in eight-bit arithmetic on a CPU; embeddings stay as they are.

    Weights have a scale for each output channel, inputs one for each call. A quarter of the bytes of what it packs, and
    faster where matrices are large. The method of ``torch.ao.quantization.quantize_dynamic``, by the same operators.
    """

    def __init__(self) -> None:
        if not hasattr(torch, "quantized_lstm") or "x86" not in torch.backends.quantized.supported_engines:
            raise UserError("needs torch's quantized operators for CPUs of the kind x86, which this torch has not")

    def apply(self, model: nn.ModuleDict, rows: Calibration | None) -> dict[str, Any]:
        """Pack the weights of linear maps and recurrences."""
        for matrix in self._chosen(model):
            form = DynamicMatrix(matrix.weight)
            form.take(matrix.weight.detach())
            matrix.replace(form)
        self._recurrences(model)
        return {}

    def rebuild(self, model: nn.ModuleDict, made: dict[str, Any]) -> None:
        """Put empty forms in their place."""
        for matrix in self._chosen(model):
            matrix.replace(DynamicMatrix(matrix.weight))
        self._recurrences(model)

    def _chosen(self, model: nn.ModuleDict) -> list[Matrix]:
        kinds = (nn.Linear, nn.LSTM, nn.GRU)
        found = [one for one in matrices(model) if all(isinstance(module, kinds) for module, _ in one.places)]
        if not found:
            raise UserError("the model has no linear map and no recurrence that is not packed")
        return found

    def _recurrences(self, model: nn.ModuleDict) -> None:
        for module in model.modules():
            if not isinstance(module, nn.LSTM | nn.GRU) or module.num_layers > 1 or not module.bias:
                continue
            if isinstance(getattr(module, "packed_weight_hh_l0", None), DynamicMatrix):
                vars(module)["quantized"] = RecurrentKernel(module)
