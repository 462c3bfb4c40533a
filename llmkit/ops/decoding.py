"""Turning a network's scores into text: sampling, greedy and beam search, with or without a decoding state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Rows
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmkit.contracts import Network
from llmkit.ops.graphs import ENOUGH, Capture, StaticSteps, capture_on
from llmkit.ops.sampling import Chooser, Rules
from llmkit.sequence import DecodingOptions, Memory, Sequence, padded, segments_of

OnToken = Callable[[int, int], None]
"""Called with (row, token id) as soon as a token is chosen."""

Ends = Callable[[int, list[int]], bool]
"""Whether the text of a row ends after these new ids, though the last one is not eos (a stop string)."""

Beam = tuple[float, list[int]]
"""A continuation with its score, or the sum of its log probabilities."""

LOOK_EVERY = {"cpu": 1}
"""Steps between two looks of the host at the chosen tokens, by device; else 16, since a look waits for the device."""


class Decoder:
    """Feeds tokens to a network and returns the scores of what comes next, keeping the decoding state.

    A network whose variant keeps no state is run in full over everything fed so far: slower, the same numbers.

    Args:
        net: the network.
        batch_size: number of rows.
        max_columns: most columns (tokens and padding) that will be fed.
        memory: the encoder's output, for an encoder-decoder.
        steps: how many single columns may be fed after the first ones; where they are enough, they are captured as a
            CUDA graph, and the scores of a step overwrite those of the step before.
    """

    def __init__(
        self, net: Network, batch_size: int, max_columns: int, memory: Memory | None = None, steps: int = 0
    ) -> None:
        self.net = net
        self.memory = memory
        self.max_columns, self.steps = max_columns, steps
        self.state = net.init_state(batch_size, max_columns)
        output_VD = net.output_weight_VD
        self.output_VD = by_columns(output_VD)
        self.exact = output_VD.device.type == "cpu" and output_VD.dtype == torch.float32
        self.columns = 0
        self.seen: int | Tensor = 0  # real tokens so far; one number for each row, (B, 1), once there was padding
        self.history: list[tuple[Tensor, Tensor]] = []  # (ids, segments) of every call, without a state only
        self.capture = None if self.state is None else capture_on(output_VD.device)
        self.static: StaticSteps | None = None

    def feed(self, ids_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Feed columns and return the scores after each row's last real token, (B, V).

        Args:
            ids_BT: token ids, padded anywhere.
            segments_BT: 0 at padding, 1 elsewhere; None: no padding. Each row has at least one real token.
        """
        if self.columns and ids_BT.shape[1] == 1:
            if segments_BT is None and self.capture is not None and (self.static or self.steps >= ENOUGH):
                self.columns += 1
                return self._static_step(ids_BT, self.capture)
            self.steps -= 1
        hidden_BTD, last_B = self.states(ids_BT, segments_BT)
        rows = None if last_B is None else torch.arange(len(last_B), device=ids_BT.device)
        return self.scores(hidden_BTD[:, -1] if rows is None else hidden_BTD[rows, last_B])

    def states(self, ids_BT: Tensor, segments_BT: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Feed columns; return states, theirs at the end, and the place of each row's last real one (None: the end)."""
        # The rows "a b" and "c ." (the dot is padding) stand at positions 0 1 and 0 0, the last real states are those
        # of columns 1 and 0, and 2 and 1 tokens were seen: a column "d", "e" fed next stands at positions 2 and 1.
        device, (start, length) = ids_BT.device, (self.columns, ids_BT.shape[1])
        self.columns += length
        last_B: Tensor | None = None
        if segments_BT is None:
            positions_BT = torch.arange(length, device=device)[None] + self.seen
            self.seen = self.seen + length
        else:
            positions_BT = (segments_BT.cumsum(-1) - 1 + self.seen).clamp(min=0)
            last_B = (segments_BT * torch.arange(1, length + 1, device=device)).argmax(-1)
            self.seen = positions_BT.amax(-1, keepdim=True) + 1
        seq = Sequence(positions_BT, segments_BT)  # a chunk without padding needs no segments of its own
        if self.state is None:
            self.history.append((ids_BT, torch.ones_like(ids_BT) if segments_BT is None else segments_BT))
            ids_BT, segments_BT = (torch.cat(parts, 1) for parts in zip(*self.history, strict=True))
            seq = Sequence.of(ids_BT, segments_BT if isinstance(self.seen, Tensor) else None)
            last_B = None if last_B is None else last_B + start
        return self._decode(ids_BT, seq), last_B

    def _decode(self, ids_BT: Tensor, seq: Sequence) -> Tensor:
        with _without_onednn() if self.exact and ids_BT.shape[1] == 1 else contextlib.nullcontext():
            return self.net.decode(ids_BT, seq, memory=self.memory, state=self.state)

    def scores(self, last_BD: Tensor) -> Tensor:
        """Return the scores over the vocabulary of states (B, D) at the end of a text, (B, V)."""
        output_VD = self.net.output_weight_VD if self.output_VD is None else self.output_VD
        bias_V = self.net.output_bias_V
        return F.linear(last_BD, output_VD.to(last_BD.dtype), None if bias_V is None else bias_V.to(last_BD.dtype))

    def _static_step(self, ids_B1: Tensor, capture: Capture) -> Tensor:
        """Feed one column to all rows by steps that are captured and replayed."""
        if self.columns > self.max_columns:
            raise ValueError(f"the decoder has room for {self.max_columns} columns, got {self.columns}")
        if self.static is None:
            assert self.state is not None
            seen = self.seen
            positions_b1 = seen if isinstance(seen, Tensor) else torch.full((1, 1), seen, device=ids_B1.device)

            def run(ids_B1: Tensor, positions_b1: Tensor) -> Tensor:
                return self.scores(self._decode(ids_B1, Sequence(positions_b1))[:, -1])

            self.static = StaticSteps(run, self.state, positions_b1, capture)
        if not isinstance(self.seen, Tensor):  # else it is counted along
            self.seen += 1
        self.steps -= 1
        return self.static(ids_B1)

    def reorder(self, rows: Tensor, same_memory: bool = False) -> None:
        """Keep the given rows, in that order; ``same_memory``: the row at each place still reads the same memory."""
        self.static = None  # captured for other rows
        if isinstance(self.seen, Tensor):
            self.seen = self.seen[rows]
        self.history = [(ids[rows], segments[rows]) for ids, segments in self.history]
        for state in self.state or []:
            if not (same_memory and state.of_memory):
                state.reorder(rows)
        if self.memory is not None and not same_memory:
            self.memory = self.memory.take(rows)


def by_columns(weight: Tensor) -> Tensor | None:
    """Return a copy of a matrix that lies column by column in memory, or None where that gains nothing.

    A CPU multiplies a few rows by a matrix with no fewer outputs than inputs up to twice as fast when the weights of
    one input lie together; copying takes about as long as two such products. The values are the same.
    """
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu" and weight.dtype == torch.float32
    if not plain or weight.dim() != 2 or not weight.is_contiguous() or weight.shape[0] < weight.shape[1]:
        return None
    return weight.detach().T.contiguous().T


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Switch oneDNN off: it prepares every call from scratch, which for one position takes most of the time."""
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    # Half precision is nowhere else as fast.
    backend.enabled = before and torch.is_autocast_enabled("cpu")
    try:
        yield
    finally:
        backend.enabled = before


@contextlib.contextmanager
def column_major(net: Network) -> Iterator[None]:
    """Let linear maps and recurrences of a network read copies ``by_columns`` of their weights within this block."""
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for module in net.modules() if isinstance(net, nn.Module) else ():
            for weight in module.parameters(recurse=False) if isinstance(module, nn.Linear | nn.RNNBase) else ():
                if (copy := by_columns(weight)) is not None:
                    own.append((weight, weight.data))
                    weight.data = copy
        yield
    finally:
        for weight, data in own:
            weight.data = data


@torch.inference_mode()
def generate(
    net: Network,
    prompts: list[list[int]],
    options: DecodingOptions,
    *,
    eos_id: int,
    banned: Rows[int] = (),
    memory: Memory | None = None,
    rows: Tensor | None = None,
    device: torch.device | str = "cpu",
    on_token: OnToken | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """Continue each prompt and return the new ids, without the final eos.

    By beam search if ``num_beams`` is above 1, else by sampling. A text that outgrows the context keeps its last half.

    Args:
        net: the network, in eval mode.
        prompts: ids of each prompt, at least one each; with a memory, the start of each target. For a beam search all
            have one length.
        options: see DecodingOptions; ``max_new_tokens`` must be set.
        eos_id: ends a row.
        banned: ids that are never chosen (padding, for example).
        memory: the encoder's output, for an encoder-decoder.
        rows: the number of each row in the data, (B,), which its draws depend on; None: its place in the batch.
        device: where the network is.
        on_token: called with each token as it is chosen; sampling only.
        ends: asked after each token whether the row ends; its last token is kept.
    """
    rules = Rules(options, banned, eos_id, torch.device(device))
    if options.num_beams > 1:
        return [beams[0][1] for beams in beam_search(net, prompts, rules, memory, ends)]
    assert options.max_new_tokens is not None
    choose = Chooser(options, rules, prompts, rows, torch.device(device))
    with column_major(net):
        return _sample(net, prompts, choose, options.max_new_tokens, memory, on_token, ends)


def _sample(
    net: Network,
    prompts: list[list[int]],
    choose: Chooser,
    steps: int,
    memory: Memory | None,
    on_token: OnToken | None,
    ends: Ends | None,
) -> list[list[int]]:
    """Continue each prompt by at most ``steps`` tokens, one ``choose`` at a time; see ``generate``."""
    device, eos_id = choose.device, choose.rules.eos_id
    texts = [list(prompt) for prompt in prompts]
    starts = [max(0, len(text) - net.max_length) for text in texts]  # of what the network still sees of each text
    active = list(range(len(prompts)))  # the prompt of each row of the decoder
    waiting: list[Tensor] = []  # the tokens of steps that the host has not looked at yet, (B,) each
    look_every = 1 if on_token is not None else LOOK_EVERY.get(device.type, 16)
    done: dict[int, int] = {}  # where the text of each row that ended ends

    def look() -> None:
        choose.check()
        for tokens in torch.stack(waiting).tolist():
            for row, token in zip(active, tokens, strict=True):
                text = texts[row]
                text.append(token)
                if row in done:
                    continue
                if token == eos_id:
                    done[row] = len(text) - 1
                    continue
                if on_token is not None:
                    on_token(row, token)
                if ends is not None and ends(row, text[len(prompts[row]) :]):
                    done[row] = len(text)
        waiting.clear()

    decoder: Decoder | None = None
    chosen_B = torch.empty(0)
    for step in range(1, steps + 1):
        if decoder is None or decoder.columns + 1 >= net.max_length:
            if decoder is not None:
                if waiting:
                    look()
                for row in active:
                    starts[row] = kept_from(starts[row], len(texts[row]), net)  # a row is not cut by its neighbours
                memory = decoder.memory
            kept = [texts[row][starts[row] :] for row in active]
            columns = min(net.max_length, max(map(len, kept)) + steps - step)  # the last token is not fed
            decoder = Decoder(net, len(active), columns, memory, steps - step)
            segments_BT = segments_of([len(text) for text in kept])
            segments_BT = None if segments_BT is None else segments_BT.to(device)
            scores_BV = decoder.feed(padded(kept, eos_id).to(device), segments_BT)
        else:
            scores_BV = decoder.feed(chosen_B[:, None])
        chosen_B = choose(scores_BV)
        waiting.append(chosen_B)
        if len(waiting) < look_every and step < steps:
            continue
        look()
        if len(done) == len(prompts):
            break
        rows = [index for index, row in enumerate(active) if row not in done]
        if 2 * len(rows) <= len(active):  # what is left is worth moving together
            rows_B = torch.tensor(rows, device=device)
            decoder.reorder(rows_B)
            choose.keep(rows_B)
            chosen_B, active = chosen_B[rows_B], [active[index] for index in rows]
    # A row that ended was fed further tokens until the host looked or until it was left out.
    return [text[len(prompt) : done.get(row)] for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True))]


def kept_from(start: int, length: int, net: Network) -> int:
    """Return where the part of a text begins that the network reads: one that outgrew the context keeps half of it."""
    return start if length - start < net.max_length else length - max(1, net.max_length // 2)


@torch.inference_mode()
def beam_search(
    net: Network, prompts: list[list[int]], rules: Rules, memory: Memory | None = None, ends: Ends | None = None
) -> list[list[Beam]]:
    """Return, for each prompt, its best continuations with their scores, best first; see ``generate``.

    The score of a finished continuation Y, eos included, is log p(Y) / ((5 + |Y|) / 6) ** length_penalty. A prompt is
    done when ``num_beams`` continuations are finished and no open one, at its present length, beats the worst of them.

    A step with two beams, for one prompt; log p in brackets:

        open beams       a b [-1], a c [-2]
        best four        a b . [-1.2]   a c d [-2.1]   a b e [-2.5]   a b f [-3]       (the dot is eos)
        finished         a b            among the first two, so it counts
        open afterwards  a c d, a b e   continue rows 1 and 0 of the decoder, whose states are reordered like that
    """
    with column_major(net):
        return _beam_search(net, prompts, rules, memory, ends)


def _beam_search(
    net: Network, prompts: list[list[int]], rules: Rules, memory: Memory | None, ends: Ends | None
) -> list[list[Beam]]:
    options, eos_id, device = rules.options, rules.eos_id, rules.banned.device
    beams, steps = options.num_beams, options.max_new_tokens
    assert steps is not None

    def normalised(score: float, length: int) -> float:
        return float(score / ((5 + length) / 6) ** options.length_penalty)

    finished: list[list[Beam]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the prompt of each group of the decoder's rows
    beams_of: list[list[Beam]] = [[(0.0, [])] for _ in prompts]  # open ones of the active prompts: all begin alike
    start = max(0, len(prompts[0]) - net.max_length)  # of what the network still sees of each text

    def texts() -> Tensor:
        whole = [prompts[prompt] + ids for prompt, rows in zip(active, beams_of, strict=True) for _, ids in rows]
        return torch.tensor(whole, device=device)

    def begin(texts_BL: Tensor) -> tuple[Decoder, Tensor]:
        most = min(net.max_length, texts_BL.shape[1] - start + steps)
        decoder = Decoder(net, len(texts_BL), most, memory)
        return decoder, decoder.feed(texts_BL[:, start:])

    decoder, scores_BV = begin(texts())
    for length in range(1, steps + 1):
        width = len(beams_of[0])  # 1 at first, then always ``beams``
        # Lightning makes half precision the default dtype of a model in half precision, which would round the sums.
        sums_NW = torch.tensor([[score for score, _ in rows] for rows in beams_of], dtype=torch.float32, device=device)
        logp_BV = rules(scores_BV.float().log_softmax(-1), length - 1, texts() if rules.read_texts else None)
        # Twice as many candidates as beams: eos can use up at most one continuation of each.
        candidates = _best(logp_BV, sums_NW, 2 * beams)
        rows_kept: list[int] = []  # of the decoder
        groups: list[tuple[int, list[Beam]]] = []
        for group, (prompt, found) in enumerate(zip(active, candidates, strict=True)):
            before = [ids for _, ids in beams_of[group]]
            stopped = [ends is not None and ends(prompt, [*before[parent], token]) for _, parent, token in found]
            for (score, parent, token), stop in zip(found[:beams], stopped, strict=False):
                if (stop or token == eos_id) and score > -torch.inf:
                    ids = before[parent] if token == eos_id else [*before[parent], token]
                    finished[prompt].append((normalised(score, length), ids))
            finished[prompt] = sorted(finished[prompt], key=lambda item: -item[0])[:beams]
            going = [c for c, stop in zip(found, stopped, strict=True) if not stop and c[2] != eos_id][:beams]
            # A vocabulary smaller than the beam leaves some of its places empty.
            going += [(-torch.inf, 0, eos_id)] * (beams - len(going))
            full = len(finished[prompt]) == beams
            if full and normalised(going[0][0], length) <= finished[prompt][-1][0]:
                continue
            rows_kept += [group * width + parent for _, parent, _ in going]
            groups.append((prompt, [(score, [*before[parent], token]) for score, parent, token in going]))
        same_prompts = len(groups) == len(active) and width == beams
        active, beams_of = [prompt for prompt, _ in groups], [rows for _, rows in groups]
        if not active:
            break
        if length < steps:
            if not same_prompts or rows_kept != list(range(len(rows_kept))):
                decoder.reorder(torch.tensor(rows_kept, device=device), same_prompts)
            if decoder.columns + 1 >= net.max_length:
                start, memory = kept_from(start, len(prompts[0]) + length, net), decoder.memory
                decoder, scores_BV = begin(texts())
            else:
                last = [[ids[-1]] for rows in beams_of for _, ids in rows]
                scores_BV = decoder.feed(torch.tensor(last, device=device))
    for prompt, rows in zip(active, beams_of, strict=True):  # at the limit: open beams count as they stand
        finished[prompt] += [(normalised(score, len(ids)), ids) for score, ids in rows if score > -torch.inf]
    return [sorted(found, key=lambda item: -item[0]) or [(-torch.inf, [])] for found in finished]


def _best(logp_BV: Tensor, sums_NW: Tensor, count: int) -> list[list[tuple[float, int, int]]]:
    """Return the best continuations of each prompt, best first: sum of log probabilities, beam, token.

    Args:
        logp_BV: log probabilities of what comes next, B = N W.
        sums_NW: the sums of W beams for each of N prompts.
        count: most continuations returned per prompt.
    """
    prompts, each = len(sums_NW), min(count, logp_BV.shape[-1])
    # The best of a prompt are among the best of its beams: sums are made of these alone.
    best_BK, token_BK = logp_BV.topk(each, -1)
    sums_NC = (sums_NW.view(-1, 1) + best_BK).view(prompts, -1)
    best_NK, where_NK = sums_NC.topk(min(count, sums_NC.shape[-1]), -1)
    token_NK = token_BK.view(prompts, -1).gather(1, where_NK)
    rows = zip(best_NK.tolist(), (where_NK // each).tolist(), token_NK.tolist(), strict=True)
    return [list(zip(*row, strict=True)) for row in rows]
