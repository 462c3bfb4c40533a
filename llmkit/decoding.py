"""Turning a network's scores into text: sampling, greedy and beam search, with or without a decoding state."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from llmkit.contracts import DecodingOptions, Memory, Network, Sequence, padded
from llmkit.errors import UserError

OnToken = Callable[[int, int], None]
"""Called with (row, token id) as soon as a token is chosen."""


class Decoder:
    """Feeds tokens to a network and returns the scores of what comes next, keeping the decoding state.

    A network whose variant keeps no state is run in full over everything fed so far: slower, the same numbers.

    Args:
        net: the network.
        batch_size: number of rows.
        max_columns: most columns (tokens and padding) that will be fed.
        memory: the encoder's output, for an encoder-decoder.
    """

    def __init__(self, net: Network, batch_size: int, max_columns: int, memory: Memory | None = None) -> None:
        self.net = net
        self.memory = memory
        self.state = net.init_state(batch_size, max_columns)
        self.counts_B = torch.zeros(batch_size, dtype=torch.long)
        self.history: list[tuple[Tensor, Tensor]] = []  # (ids, segments) of every call, without a state only
        self.ragged = False

    def feed(self, ids_BT: Tensor, segments_BT: Tensor | None = None) -> Tensor:
        """Feed columns and return the scores after each row's last real token, (B, V).

        Args:
            ids_BT: token ids, padded anywhere.
            segments_BT: 0 at padding, 1 elsewhere; None: no padding. Each row has at least one real token.
        """
        device = ids_BT.device
        self.counts_B = self.counts_B.to(device)
        length = ids_BT.shape[1]
        if segments_BT is None and not self.ragged:
            seq = Sequence.dense(length, device, start=int(self.counts_B[0]))
            last_B = torch.full((len(ids_BT),), length - 1, device=device)
            self.counts_B = self.counts_B + length
        else:
            self.ragged = True
            segments = torch.ones_like(ids_BT) if segments_BT is None else segments_BT
            ranks = segments.cumsum(-1)
            positions = (self.counts_B[:, None] + ranks - 1).clamp(min=0)
            # Padding gets no segment; a chunk without padding needs no segments of its own.
            seq = Sequence(positions, segments_BT)
            last_B = (segments * torch.arange(1, length + 1, device=device)).argmax(-1)
            self.counts_B = self.counts_B + ranks[:, -1]
        if self.state is None:
            self.history.append((ids_BT, torch.ones_like(ids_BT) if segments_BT is None else segments_BT))
            past = sum(ids.shape[1] for ids, _ in self.history[:-1])
            ids_BT = torch.cat([ids for ids, _ in self.history], 1)
            seq = Sequence.from_segments(torch.cat([s for _, s in self.history], 1))
            if not self.ragged:
                seq = Sequence.dense(ids_BT.shape[1], device)
            last_B = last_B + past
        hidden_BTD = self.net.decode(ids_BT, seq, memory=self.memory, state=self.state)
        last_BD = hidden_BTD[torch.arange(len(ids_BT), device=device), last_B]
        return last_BD @ self.net.output_weight_VD.to(last_BD.dtype).T

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows, in that order."""
        self.counts_B = self.counts_B.to(rows.device)[rows]
        self.history = [(ids[rows], segments[rows]) for ids, segments in self.history]
        for state in self.state or []:
            state.reorder(rows)
        self.memory = None if self.memory is None else self.memory.take(rows)


@torch.no_grad()
def generate(
    net: Network,
    prompts: list[list[int]],
    options: DecodingOptions,
    *,
    eos_id: int,
    banned: Rows[int] = (),
    memory: Memory | None = None,
    device: torch.device | str = "cpu",
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt by sampling (greedy at temperature 0) and return the new ids, without the final eos.

    A text that outgrows the context goes on from its last half.

    Args:
        net: the network, in eval mode.
        prompts: ids of each prompt, at least one each; with a memory, the start of each target.
        options: see DecodingOptions; ``max_new_tokens`` must be set.
        eos_id: ends a row.
        banned: ids that are never chosen (padding and the like).
        memory: the encoder's output, for an encoder-decoder.
        device: where the network is.
        on_token: told of each token as it is chosen.
    """
    assert options.max_new_tokens is not None
    generator = torch.Generator(device=device).manual_seed(options.seed)
    texts = [list(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    decoder: Decoder | None = None
    columns = 0
    starts = [max(0, len(text) - net.max_length) for text in texts]  # of what the network still sees of each text
    for _ in range(options.max_new_tokens):
        if decoder is None or columns >= net.max_length:
            for row, text in enumerate(texts if decoder is not None else []):
                if len(text) - starts[row] >= net.max_length:  # not the others: a row is not cut by its neighbours
                    starts[row] = len(text) - max(1, net.max_length // 2)
            kept = [text[start:] for text, start in zip(texts, starts, strict=True)]
            lengths = torch.tensor([len(text) for text in kept])
            columns = int(lengths.max())
            segments = (torch.arange(columns)[None] < lengths[:, None]).long().to(device)
            decoder = Decoder(net, len(texts), net.max_length, memory)
            scores_BV = decoder.feed(padded(kept, eos_id).to(device), None if bool(segments.all()) else segments)
        else:
            scores_BV = decoder.feed(torch.tensor([[text[-1]] for text in texts], device=device))
        columns += 1
        chosen = _choose(scores_BV, options, banned, generator).tolist()
        for row, token in enumerate(chosen):
            texts[row].append(token)
            if done[row] or token == eos_id:
                done[row] = True
                continue
            new[row].append(token)
            if on_token is not None:
                on_token(row, token)
        if all(done):
            break
    return new


def _choose(scores_BV: Tensor, options: DecodingOptions, banned: Rows[int], generator: torch.Generator) -> Tensor:
    """Return one token id a row, (B,)."""
    scores_BV = scores_BV.float()
    if len(banned):
        scores_BV[:, list(banned)] = -torch.inf
    if options.temperature == 0:
        return scores_BV.argmax(-1)
    scores_BV = scores_BV / options.temperature
    if 0 < options.top_k < scores_BV.shape[-1]:
        kth = scores_BV.topk(options.top_k, -1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < kth, -torch.inf)
    if options.top_p < 1:
        ordered, order = scores_BV.sort(-1, descending=True)
        share = ordered.softmax(-1)
        # Drop a token when those before it reach top_p already; the best one always stays.
        ordered = ordered.masked_fill(share.cumsum(-1) - share >= options.top_p, -torch.inf)
        scores_BV = torch.empty_like(scores_BV).scatter_(-1, order, ordered)
    shares_BV = scores_BV.softmax(-1)
    if not bool(shares_BV.isfinite().all()):
        raise UserError("the model's scores are NaN or infinite: its weights have diverged, or are damaged")
    return torch.multinomial(shares_BV, 1, generator=generator)[:, 0]


@torch.no_grad()
def beam_search(
    net: Network,
    prompts: list[list[int]],
    options: DecodingOptions,
    *,
    eos_id: int,
    banned: Rows[int] = (),
    memory: Memory | None = None,
    device: torch.device | str = "cpu",
) -> list[list[int]]:
    """Return, for each prompt, the continuation with the best length-normalised log probability.

    The score of a finished continuation Y, eos included, is log p(Y) / ((5 + |Y|) / 6) ** length_penalty. A prompt is
    done when ``num_beams`` continuations are finished and no open one can still beat the worst of them at its present
    length. All prompts must have one length when they are not a single start symbol.

    Args: as for ``generate``.
    """
    assert options.max_new_tokens is not None
    beams, num = options.num_beams, len(prompts)
    most = min(options.max_new_tokens, net.max_length - max(map(len, prompts)))

    def normalised(score: float, length: int) -> float:
        return float(score / ((5 + length) / 6) ** options.length_penalty)

    ids = torch.tensor(prompts, device=device).repeat_interleave(beams, 0)
    decoder = Decoder(net, num * beams, ids.shape[1] + max(most, 1), memory)
    if memory is not None:
        decoder.memory = memory.take(torch.arange(num, device=device).repeat_interleave(beams))
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]
    active = list(range(num))  # the prompts that rows of the decoder belong to, in order
    sums = torch.full((num, beams), -torch.inf, device=device)
    sums[:, 0] = 0.0  # all beams start alike: only the first may branch
    tokens = torch.zeros(num, beams, 0, dtype=torch.long, device=device)
    scores_BV = decoder.feed(ids)
    for length in range(1, most + 1):
        logp = scores_BV.float().log_softmax(-1)
        if len(banned):
            logp[:, list(banned)] = -torch.inf
        vocab = logp.shape[-1]
        total = sums[:, :, None] + logp.view(len(active), beams, vocab)
        # Twice as many candidates as beams: eos can use up at most one continuation of each.
        best, where = total.flatten(1).topk(min(2 * beams, beams * vocab), -1)
        parents, chosen = where // vocab, where % vocab
        keep_rows: list[int] = []
        keep_tokens: list[list[int]] = []
        keep_sums: list[list[float]] = []
        still: list[int] = []
        sequences: list[Tensor] = []
        for index, prompt in enumerate(active):
            open_beams: list[tuple[float, int, int]] = []
            for rank, (score, parent, token) in enumerate(
                zip(best[index].tolist(), parents[index].tolist(), chosen[index].tolist(), strict=True)
            ):
                if token == eos_id:
                    if rank < beams and score > -torch.inf:
                        finished[prompt].append((normalised(score, length), tokens[index, parent].tolist()))
                elif len(open_beams) < beams:
                    open_beams.append((score, parent, token))
            finished[prompt] = sorted(finished[prompt], key=lambda item: -item[0])[:beams]
            full = len(finished[prompt]) == beams
            if full and normalised(open_beams[0][0], length) <= finished[prompt][-1][0]:
                continue
            still.append(prompt)
            keep_rows += [index * beams + parent for _, parent, _ in open_beams]
            keep_tokens.append([token for _, _, token in open_beams])
            keep_sums.append([score for score, _, _ in open_beams])
            sequences.append(tokens[index, [parent for _, parent, _ in open_beams]])
        active = still
        if not active:
            break
        sums = torch.tensor(keep_sums, device=device)
        last = torch.tensor(keep_tokens, device=device)
        tokens = torch.cat([torch.stack(sequences), last[:, :, None]], -1)
        if length < most:
            decoder.reorder(torch.tensor(keep_rows, device=device))
            scores_BV = decoder.feed(last.reshape(-1, 1))
    for index, prompt in enumerate(active):  # out of room: open beams count as they stand
        for beam in range(beams):
            score = normalised(float(sums[index, beam]), tokens.shape[-1])
            finished[prompt].append((score, tokens[index, beam].tolist()))
    return [max(options_, key=lambda item: item[0])[1] if options_ else [] for options_ in finished]
