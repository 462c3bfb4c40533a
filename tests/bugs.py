"""Realistic bugs, each one change to the source of a correct variant, and the property that catches it."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import dataclass

import plain_attention

from llmkit.contracts import Attention
from llmkit_plugins.attention import linear, min_gru, recurrent, window


@dataclass(frozen=True)
class Bug:
    """One change to the source of a correct variant, and the property that has to catch it."""

    name: str
    old: str
    new: str
    caught_by: str
    source: types.ModuleType = plain_attention
    cls: str = "PlainAttention"


MASK = "scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)"
OVER_ROWS = "kernel(x.to(exact), first, exact_weights, *settings, True)"
SOFTMAX = "weights = scores.softmax(-1)"
BUGS = [
    Bug("mask dropped", MASK, "pass", "causal_by_gradient"),
    Bug("mask one position too far", "<= rows[:, None] + S - T", "<= rows[:, None] + S - T + 1", "causal_by_gradient"),
    Bug("mask upside down", "(columns[None] <= rows", "(columns[None] >= rows", "causal_by_gradient"),
    Bug(
        "mask after softmax",
        f"{MASK}\n        {SOFTMAX}",
        "weights = scores.softmax(-1).masked_fill(~seen, 0.0)",
        "causal_by_gradient",
    ),
    Bug("softmax over the queries", SOFTMAX, "weights = scores.softmax(-2)", "causal_by_gradient"),
    Bug("divided by the length", "y = weights @ v", "y = weights @ v / len(v[0, 0])", "causal_by_value"),
    Bug("scale missing", " / math.sqrt(q.shape[-1])", "", "reference"),
    Bug("scale by the whole width", "math.sqrt(q.shape[-1])", "math.sqrt(self.dim)", "reference"),
    Bug(
        "heads joined in the wrong order",
        "y.transpose(1, 2).flatten(2)",
        "y.permute(0, 2, 3, 1).flatten(2)",
        "reference",
    ),
    Bug("no transpose: scores across heads", "self.num_heads, -1).transpose(1, 2)", "self.num_heads, -1)", "shape"),
    Bug("heads not joined back", "y.transpose(1, 2).flatten(2)", "y.reshape(x_BTD.shape)", "causal_by_gradient"),
    Bug("flattened to (batch, -1)", "return joined", "return joined.flatten(1)", "shape"),
    Bug("positions on their own", "y = weights @ v", "y = v if memory is None else weights @ v", "mixes_positions"),
    Bug("padding mask inverted", "(key_BS > 0)", "(key_BS == 0)", "cross_memory"),
    Bug("padding of the memory ignored", "(key_BS > 0)", "(key_BS > -1)", "cross_memory"),
    Bug(
        "end of the memory cut",
        "else (memory.x_BSD, memory.seq)\n        q, k, v = self",
        "else (memory.x_BSD * (memory.x_BSD.shape[1] < 4), memory.seq)\n        q, k, v = self",
        "cross_memory",
    ),
    Bug(
        "padding ignored",
        "seen = query_BT[:, None, :, None] == key_BS[:, None, None, :]",
        "seen = torch.ones(len(x_BTD), 1, T, S, dtype=torch.bool)",
        "padding",
    ),
    Bug(
        "documents ignored",
        "== key_BS[:, None, None, :]",
        ".clamp(max=1) == key_BS[:, None, None, :].clamp(max=1)",
        "packed_documents",
    ),
    Bug("bias by column", "seq.bias(Sequence(positions, segments)", "seq.bias(Sequence.dense(k.shape[2])", "padding"),
    Bug("batch statistics", "q @ k.transpose", "(q - q.mean(0)) @ k.transpose", "batch_rows"),
    Bug(
        "batch statistics in training only",
        "return joined",
        "return joined - joined.mean(0) * self.training",
        "batch_rows",
    ),
    Bug("dropout left on in eval", "self.dropout, self.training)", "0.1, True)", "deterministic"),
    Bug("dropout never on", "self.dropout, self.training)", "self.dropout, False)", "dropout"),
    Bug(
        "mask kept from the first call",
        "seen = self.seen(seq, x_BTD, segments)",
        "self.kept = seen = getattr(self, 'kept', self.seen(seq, x_BTD, segments))",
        "deterministic",
    ),
    Bug(
        "a tensor outside of the state_dict",
        'self.register_buffer("temperature", torch.rand(1) + 1)',
        "self.temperature = 1 + torch.rand(1).item()",
        "state_dict",
    ),
    Bug(
        "a buffer never initialised",
        'self.register_buffer("temperature", torch.rand(1) + 1)',
        'self.register_buffer("temperature", torch.empty(1))',
        "weights_are_set",
    ),
    Bug("values detached", "y = weights @ v", "y = weights @ v.detach()", "every_parameter_learns"),
    Bug("a wrong gradient", "y = weights @ v", "y = weights @ v\n        y = y + (y - y.detach())", "gradients"),
    Bug("minus infinity over nothing", "torch.finfo(scores.dtype).min", "float('-inf')", "cross_memory"),
    Bug(
        "input changed in place",
        "source, key = (x_BTD",
        "x_BTD.mul_(1.5)\n        source, key = (x_BTD",
        "layout_of_inputs",
    ),
    Bug("float32 inside", "return joined", "return joined.float()", "bfloat16"),
    Bug(
        "sum of weights in half precision",
        'chunks.mix(q_BHTE, k_BHTE, torch.ones_like(v_BHTE[..., :1]), "weights")',
        "(q_BHTE @ k_BHTE.mT).tril().sum(-1, keepdim=True)",
        "long_text",
        linear,
        "Linear",
    ),
    Bug(
        "data on the CPU",
        "scores = scores if bias",
        "scores.detach().sum().item()\n        scores = scores if bias",
        "meta_device",
    ),
    Bug(
        "cache forgets the newest",
        "state[name] = torch.cat([state[name], new], dim)",
        "state[name] = torch.cat([state[name], new * 0], dim)",
        "decoding_steps",
    ),
    Bug(
        "cache position off by one",
        "rows[:, None] + S - T)",
        "rows[:, None] + S - T - int(S > T))",
        "decoding_steps",
    ),
    Bug(
        "positions not advanced while decoding",
        "q, k = seq.rotate(q), seq.rotate(k)",
        "seq.positions_BT = seq.positions_BT - (0 if state is None else state.length)\n"
        "            q, k = seq.rotate(q), seq.rotate(k)",
        "decoding_steps",
    ),
    Bug(
        "chunks look ahead",
        "columns[None] <= rows[:, None] + S - T",
        "(columns[None] <= rows[:, None] + S - T) | (S > T)",
        "decoding_chunks",
    ),
    Bug(
        "padding forgotten in the cache",
        'self.remember(state, "s", segments, 1)',
        'self.remember(state, "s", segments.clamp(min=1), 1)',
        "decoding_padding",
    ),
    Bug(
        "documents forgotten in the cache",
        'self.remember(state, "s", segments, 1)',
        'self.remember(state, "s", segments.clamp(max=1), 1)',
        "decoding_documents",
    ),
    Bug(
        "cache outside of the state",
        "state[name] = torch.cat([state[name], new], dim) if name in state else new",
        "self.__dict__[name + '_'] = torch.cat([self.__dict__[name + '_'], new], dim) if state.length else new\n"
        "            return self.__dict__[name + '_']",
        "decoding_reorder",
    ),
    Bug(
        "a map without its position bias", "looked = looked if bias is None else looked + bias", "", "map_gives_output"
    ),
    Bug(
        "a map that looks ahead",
        "Mixing(values, shares,",
        "Mixing(values, shares.masked_fill(hidden, 1e-9),",
        "map_is_masked",
    ),
    Bug("length never counted", "state.length += x_BTD.shape[1]", "pass", "decoding_steps"),
    Bug(
        "bidirectional LSTM in a decoder",
        'both = role == "bidirectional"',
        "both = True",
        "causal_by_gradient",
        recurrent,
        "LSTM",
    ),
    Bug(
        "LSTM over the batch",
        OVER_ROWS,
        "[self.rnn(x.transpose(0, 1))[0].transpose(0, 1)]",
        "batch_rows",
        recurrent,
        "LSTM",
    ),
    Bug("LSTM state leaks over documents", " * continued_M1 for", " for", "decoding_documents", recurrent, "LSTM"),
    Bug(
        "LSTM runs over padding",
        "if seq.segments_BT is not None:",
        "if seq.segments_BT is not None and False:",
        "padding",
        recurrent,
        "LSTM",
    ),
    Bug(
        "LSTM restarts at each piece",
        "[state[name] for name in self.names]",
        "None",
        "decoding_steps",
        recurrent,
        "LSTM",
    ),
    Bug(
        "cache of a window forgets the furthest columns",
        "argsort(dim=1, stable=True)[:, -self.capacity :]",
        "argsort(dim=1, stable=True)[:, 3 - self.capacity :]",
        "decoding_long",
        window,
        "SlidingWindow",
    ),
    Bug(
        "linear attention divided by the sum over the future too",
        'chunks.mix(q_BHTE, k_BHTE, torch.ones_like(v_BHTE[..., :1]), "weights")',
        "q_BHTE @ k_BHTE.sum(2, keepdim=True).mT",
        "causal_by_gradient",
        linear,
        "Linear",
    ),
    Bug(
        "group norm over the length",
        "self._normalised(join(y_BHTE))",
        "self.norm(join(y_BHTE).mT.to(gate_BTD.dtype)).mT",
        "causal_by_gradient",
        linear,
        "Retention",
    ),
    Bug(
        "minGRU continues over documents",
        "keep_BTD = keep_BTD.masked_fill((segments_BT > running_BT[:, :-1])[..., None], 0.0)",
        "pass",
        "packed_documents",
        min_gru,
        "MinGRU",
    ),
    Bug(
        "minGRU reads padding",
        "keep_BTD.masked_fill(padding_BT1, 1.0), new_BTD.masked_fill(padding_BT1, 0.0)",
        "keep_BTD, new_BTD",
        "padding",
        min_gru,
        "MinGRU",
    ),
    Bug(
        "a gradient written by hand, one position off",
        "return new_BTD * previous_BTD, new_BTD",
        "return new_BTD * h_BTD, new_BTD",
        "gradients",
        min_gru,
        "MinGRU",
    ),
]


def injected(bug: Bug) -> type[Attention]:
    """Return the variant with the bug in it."""
    source = inspect.getsource(bug.source)
    assert source.count(bug.old) == 1, f"{bug.name}: its source text occurs not exactly once"
    module = types.ModuleType(f"injected_{bug.name.replace(' ', '_')}")
    sys.modules[module.__name__] = module
    exec(compile(source.replace(bug.old, bug.new), module.__name__, "exec"), module.__dict__)
    found: type[Attention] = getattr(module, bug.cls)
    return found
