"""llmkit's language models in lm-evaluation-harness (Gao et al., github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from llmkit.checkpoint.content import begins_with
from llmkit.errors import UserError, nearest
from llmkit.model.language_model import LanguageModel
from llmkit.model.use import Scores, evaluating
from llmkit.ops.decoding import generate
from llmkit.ops.writing import special_ids
from llmkit.sequence import DecodingOptions, padded, segments_of
from llmkit.sequence import Sequence as Positions

SEED = 1234
"""The harness's own seed, of the examples in a prompt and of numpy; Python's is 0."""

KEPT = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better")
"""What is reported of the harness's findings."""

Ids = list[int]


class Adapter(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A language model as the harness asks it. What transformers answers for the exported model, this one answers.

    Args:
        model: any decoder that writes text.
        batch_size: texts that are read at once.

    Raises UserError for another head.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 64) -> None:
        super().__init__()
        if model.head.topology != "decoder" or not isinstance(model.head, Scores):
            raise UserError(
                f"{type(model.head).__name__} is not a language model: tasks are for generation and completion"
            )
        assert model.tokenizer is not None
        self.model, self.words, self.batch_size = model, model.tokenizer, batch_size
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text that has no context."""
        return begins_with(self.words, self.model.config)

    @property
    def max_gen_toks(self) -> int:
        """Most tokens that are written where a task does not say."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """Return the ids of a text, after what the tokenizer puts before one."""
        before = [] if add_special_tokens is False else self.words.around[0]
        return [*before, *self.words.encode(string)]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation after its context, and whether it is the greedy one.

        A context that is too long loses its beginning. Raises UserError for a continuation longer than the context of
        the model.
        """
        net, answers = self.model.network, [(0.0, True)] * len(requests)
        rows: list[tuple[int, Ids, Ids]] = []
        for number, (_, context, continuation) in enumerate(requests):
            if len(continuation) > net.max_length:
                text = f"a continuation has {len(continuation)} tokens"
                raise UserError(f"eval: {text}, and the context of the model is {net.max_length}")
            if continuation:
                rows.append((number, [*context, *continuation][-net.max_length - 1 : -1], continuation))
        rows.sort(key=lambda row: len(row[1]))
        with evaluating(self.model):
            for group in _groups(rows, self.batch_size):
                ids_BT, segments_BT = (
                    padded([read for _, read, _ in group], 0),
                    segments_of([len(r) for _, r, _ in group]),
                )
                segments_BT = None if segments_BT is None else segments_BT.to(self.device)
                ids_BT = ids_BT.to(self.device)
                hidden_BTD = net.decode(ids_BT, Positions.of(ids_BT, segments_BT))
                for hidden_TD, (number, read, continuation) in zip(hidden_BTD, group, strict=True):
                    states_TD = hidden_TD[len(read) - len(continuation) : len(read)]
                    scores_TV = F.linear(states_TD, net.output_weight_VD, net.output_bias_V).float()
                    targets_T = torch.tensor(continuation, device=self.device)
                    logp = -F.cross_entropy(scores_TV, targets_T, reduction="sum")
                    answers[number] = float(logp), bool((scores_TV.argmax(-1) == targets_T).all())
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each text, its first token included, in windows that do not overlap."""
        parts: list[tuple[Any, Ids, Ids]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids, longest = self.tok_encode(request.args[0]), self.model.context
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, longest, context_len=1)
            for context, continuation in map(utils.make_disjoint_window, windows):
                parts.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[number] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what is written after each context, up to one of the task's stop strings."""
        answers = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        for numbers in kinds.values():
            options, stops = self._options(requests[numbers[0]].args[1])
            numbers.sort(key=lambda number: len(requests[number].args[0]))
            for group in _groups(numbers, self.batch_size if options.num_beams == 1 else 1):
                texts = self._write([requests[number].args[0] for number in group], options, stops)
                for number, text in zip(group, texts, strict=True):
                    answers[number] = text
        return answers

    def _options(self, given: Mapping[str, Any]) -> tuple[DecodingOptions, list[str]]:
        how = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        until = how.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        known = {name: how[name] for name in ("top_k", "top_p", "num_beams", "repetition_penalty") if name in how}
        temperature = float(how.get("temperature") or 0.0)
        return DecodingOptions(max_new_tokens=how["max_gen_toks"], temperature=temperature, **known), stops

    def _write(self, contexts: list[str], options: DecodingOptions, stops: list[str]) -> list[str]:
        assert options.max_new_tokens is not None
        room = self.model.context - options.max_new_tokens
        room = room if room > 0 else max(1, self.model.context // 2)  # a text that outgrows the context continues
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        longest = max(map(len, stops), default=0)

        def ends(row: int, new: Ids) -> bool:  # a character has up to four tokens
            tail = self.words.decode(new[-4 * longest - 4 :])
            return any(stop in tail for stop in stops)

        banned = sorted(special_ids(self.words) - {self.words.eos_id})
        how: dict[str, Any] = {"eos_id": self.words.eos_id, "banned": banned, "device": self.device}
        with evaluating(self.model):
            written = generate(self.model.network, prompts, options, **how, ends=ends if stops else None)
        texts = self.words.decode_batch(written)
        return [text[: min([text.find(stop) for stop in stops if stop in text], default=None)] for text in texts]


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def run_tasks(model: LanguageModel, names: list[str], limit: int | None = None, batch_size: int = 64) -> dict[str, Any]:
    """Return what the harness finds: ``results`` by task and metric, and how they were made.

    Args:
        model: a language model.
        names: tasks of the harness, or YAML files of tasks, which may name others of their folder.
        limit: how many documents of each task; None: all.
        batch_size: texts that are read at once.

    Raises UserError for a task that there is not, or that cannot be loaded.
    """
    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise UserError(f"eval: {missing[0]} does not exist")
    adapter = Adapter(model, batch_size)
    folders: list[str | Path] = sorted({Path(name).resolve().parent for name in files})
    manager = TaskManager(include_path=folders, include_defaults=len(files) < len(names))
    # A group's file is known under its name alone.
    by_file = {str(entry.yaml_path): name for name, entry in manager.task_index.items()}
    known = [by_file.get(str(Path(name).resolve()), name) if name in files else name for name in names]
    for name in known:
        if name not in files and name not in manager.task_index:
            near, count = nearest(name, manager.all_tasks), len(manager.all_tasks)
            text = f"a YAML file, or one of the {count:,} names that 'lm-eval ls tasks' lists"
            raise UserError(f"eval: unknown task '{name}'.{near} Allowed: {text}.")
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        loaded = manager.load(known)
    except Exception as error:  # of the harness, of datasets, or of a task's own code
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"eval: {', '.join(names)} cannot be loaded: {text}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    found = evaluate(lm=adapter, task_dict=loaded, limit=limit, log_samples=False)
    facts: dict[str, Any] = json.loads(
        json.dumps({name: found[name] for name in KEPT if name in found}, default=_plain)
    )
    return facts


def _plain(value: Any) -> Any:
    """Return a value of the harness as plain data; of a function its name."""
    return value.item() if hasattr(value, "item") else str(getattr(value, "__name__", value))
