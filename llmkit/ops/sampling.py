"""Which token comes next: rules for the scores, and draws that depend on the seed, the row and the position alone."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from llmkit.errors import Problem, UserError
from llmkit.sequence import DecodingOptions

ONE, BITS = 2**32, 30
"""Probability 1 as a whole number (sums of whole numbers are exact in any order), and the random bits of a draw."""


def unused(options: DecodingOptions) -> list[Problem]:
    """Return a problem for each option that is for sampling and is set with a beam search."""
    given = {"top_k": (options.top_k, 0), "top_p": (options.top_p, 1.0)}
    return [
        Problem(f"model.decoding.{name}", f"is for sampling, and num_beams is {options.num_beams}: set it to {off}")
        for name, (value, off) in given.items()
        if options.num_beams > 1 and value != off
    ]


class Rules:
    """What the options demand of scores, whatever the way a token is then chosen.

    Args:
        options: see DecodingOptions.
        banned: ids that are never chosen.
        eos_id: ends a text.
        device: where the scores are.

    Raises:
        UserError: top_k or top_p with a beam search, which does not sample.
    """

    def __init__(self, options: DecodingOptions, banned: Rows[int], eos_id: int, device: torch.device) -> None:
        for problem in unused(options):
            raise UserError(problem)
        self.options, self.eos_id = options, eos_id
        self.banned = torch.tensor(list(banned), dtype=torch.long, device=device)
        self.read_texts = options.repetition_penalty != 1 or options.no_repeat_ngram_size > 0

    def __call__(self, scores_BV: Tensor, length: int, texts_BL: Tensor | None) -> Tensor:
        """Return the scores of the tokens that may come next, -inf elsewhere; ``scores_BV`` is used up.

        Args:
            scores_BV: float32 scores or log probabilities.
            length: number of tokens after the prompt so far.
            texts_BL: ids of the whole text so far, prompt included, padded with -1 at the left; None unless
                ``read_texts``.
        """
        options = self.options
        if texts_BL is not None and options.repetition_penalty != 1:
            # A repeated token is penalised once; padding stands for the last token, which is penalised anyway.
            seen_BL = texts_BL.where(texts_BL >= 0, texts_BL[:, -1:])
            found_BL, penalty = scores_BV.gather(1, seen_BL), options.repetition_penalty
            scores_BV.scatter_(1, seen_BL, torch.where(found_BL < 0, found_BL * penalty, found_BL / penalty))
        if texts_BL is not None and options.no_repeat_ngram_size:
            scores_BV.masked_fill_(repeating(texts_BL, options.no_repeat_ngram_size, scores_BV.shape[1]), -torch.inf)
        if len(self.banned):
            scores_BV.index_fill_(1, self.banned, -torch.inf)
        if length < options.min_new_tokens:
            scores_BV[:, self.eos_id] = -torch.inf
        if options.no_repeat_ngram_size:  # which may leave no token at all: the text ends
            none_B = scores_BV.isneginf().all(-1)
            scores_BV[:, self.eos_id] = scores_BV[:, self.eos_id].masked_fill(none_B, 0.0)
        return scores_BV


def repeating(texts_BL: Tensor, size: int, vocab_size: int) -> Tensor:
    """Return which tokens would end an n-gram of ``size`` that the text holds already, (B, V).

    With ``size`` 2 the text ``a b c a`` must not go on with ``b``.
    """
    length = texts_BL.shape[1]
    found_BV = torch.zeros(len(texts_BL), vocab_size + 1, dtype=torch.bool, device=texts_BL.device)
    if length >= size:
        ngrams_BWN = texts_BL.unfold(1, size, 1)
        same_BW = (ngrams_BWN[..., :-1] == texts_BL[:, None, length - size + 1 :]).all(-1)
        same_BW &= (ngrams_BWN >= 0).all(-1)
        found_BV.scatter_(1, ngrams_BWN[..., -1].where(same_BW, vocab_size), True)  # the last column collects the rest
    return found_BV[:, :-1]


class Chooser:
    """Chooses the next token of each row as the options say: sampling, or the best one at temperature 0.

    A draw is a function of the seed, the row's number and the number of tokens after the prompt, so that a text depends
    neither on the batch nor on its neighbours.

    Args:
        options: see DecodingOptions.
        rules: what scores go through first.
        prompts: ids of each row's prompt.
        rows: the number of each row in the data, (B,); None: its place in the batch.
        device: where the scores are.
    """

    def __init__(
        self,
        options: DecodingOptions,
        rules: Rules,
        prompts: list[list[int]],
        rows: Tensor | None,
        device: torch.device,
    ) -> None:
        self.options, self.rules, self.device = options, rules, device
        self.length = 0
        self.texts_BL: Tensor | None = None
        if rules.read_texts:
            width = max(map(len, prompts))
            self.texts_BL = torch.tensor([[-1] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        rows_B = torch.arange(len(prompts)) if rows is None else rows
        self.keys_B = row_keys(options.seed, rows_B.to(device))
        self.broken = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, scores_BV: Tensor) -> Tensor:
        """Return one token id a row, (B,); the scores are used up."""
        scores_BV = self.rules(scores_BV.float(), self.length, self.texts_BL)
        if self.options.temperature == 0:
            chosen_B = scores_BV.argmax(-1)
        else:
            # Asking the device now would wait for it: ``check`` asks later.
            self.broken |= ~scores_BV.amax(-1).isfinite().all()
            chosen_B = drawn(scores_BV, self.options, scrambled(self.keys_B + self.length))
        self.length += 1
        if self.texts_BL is not None:
            self.texts_BL = torch.cat([self.texts_BL, chosen_B[:, None]], 1)
        return chosen_B

    def keep(self, rows_B: Tensor) -> None:
        """Keep the given rows, in that order."""
        self.keys_B = self.keys_B[rows_B]
        self.texts_BL = None if self.texts_BL is None else self.texts_BL[rows_B]

    def check(self) -> None:
        """Raise UserError when scores that were sampled from are not finite."""
        if self.options.temperature > 0 and bool(self.broken):
            raise UserError("the model's scores are NaN or infinite: its weights have diverged, or are damaged")


def drawn(scores_BV: Tensor, options: DecodingOptions, keys_B: Tensor) -> Tensor:
    """Return one token id a row, drawn by temperature, top_k and top_p from scores that may be -inf.

    Args:
        scores_BV: float32 scores.
        options: see DecodingOptions.
        keys_B: a random integer for each row.
    """
    limits = torch.finfo(torch.float32)
    temperature = min(max(options.temperature, limits.tiny), limits.max)  # beyond them the division overflows
    scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / temperature
    if 0 < options.top_k < scores_BV.shape[-1]:
        kth = scores_BV.topk(options.top_k, -1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < kth, -torch.inf)
    order_BV: Tensor | None = None
    if options.top_p < 1:
        scores_BV, order_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
    shares_BV = (scores_BV.softmax(-1).nan_to_num(0.0) * ONE).long()
    sums_BV = shares_BV.cumsum(-1)
    if options.top_p < 1:
        # Drop a token when those before it reach top_p already; the best one always stays.
        dropped_BV = sums_BV - shares_BV >= max(1, int(options.top_p * ONE))
        sums_BV = shares_BV.masked_fill(dropped_BV, 0).cumsum(-1)
    # Not a remainder: a total that differs in its last bit must not lead to another token.
    at_B1 = sums_BV[:, -1:] * (keys_B[:, None] & 2**BITS - 1) >> BITS
    chosen_B1 = torch.searchsorted(sums_BV, at_B1, right=True).clamp(max=sums_BV.shape[1] - 1)  # NaN: no share at all
    return (chosen_B1 if order_BV is None else order_BV.gather(1, chosen_B1))[:, 0]


def row_keys(seed: int, rows_B: Tensor) -> Tensor:
    """Return a random integer for each row of a seed; a draw is ``scrambled(key + tokens after the prompt)``."""
    return scrambled(scrambled(torch.tensor(seed, device=rows_B.device)) + rows_B)


def scrambled(values: Tensor) -> Tensor:
    """Return integers that look random, equal ones for equal ones (after splitmix64: Steele et al. 2014)."""
    values = (values + 1) * -0x61C8864680B583EB
    # A shift copies the sign into the upper bits, which have to be empty.
    values = (values ^ (values >> 30 & 2**34 - 1)) * -0x40A7B892E31B1A47
    return values ^ (values >> 27 & 2**37 - 1)
