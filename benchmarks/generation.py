"""Time of a generated token: ``llmkit.ops.decoding.generate``, what predict calls, beside other libraries' generate.

    python benchmarks/generation.py
    python benchmarks/generation.py --device cuda

For each peer llmkit builds the same function and copies the peer's weights (drawn, not trained), so both must choose
the same greedy tokens: this is checked before anything is timed. No token ends a row: all write equally many, after
prompts of 32. llmkit's default network (rotary positions, squared ReLU, RMS norm, normalised queries and keys) is a
further line beside litgpt. The times hold everything from the ids of the prompts to lists of new ids: reading the
prompts, making the cache, llmkit's laying out of the weights. litgpt's cache has room for just these tokens. The limit
is the time that reading all weights once a token takes at the bandwidth measured between the turns by summing a large
matrix; it leaves out the cache. Growth is the median time of one token after prompts of several lengths.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import peers
import torch
from kit import OURS, Bandwidth, Report, arguments, clock, find, interleave
from torch import Tensor, nn

from llmkit import DecodingOptions
from llmkit.model.backbone import Backbone
from llmkit.ops.decoding import generate
from llmkit.registry import plugin, resolve

LAYERS, DIM, HEADS, CONTEXT, VOCAB = 6, 384, 6, 1024, 8192
PROMPT, CHECKED = 32, 200
NEW = {1: 96, 8: 48}
"""Tokens a row, by batch size."""
LENGTHS = (64, 256, 960)
GOALS = {1: 1.4, 8: 1.1}
"""Least ratio to every peer, by batch size."""


def network(attention: str, position: str | None, feedforward: Any, norm: Any, **init_args: Any) -> Backbone:
    """Return a decoder of the benchmark's size; None is llmkit's default part."""
    return Backbone(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        topology="decoder",
        max_length=CONTEXT,
        attention=plugin("attention", attention, **init_args),
        cross_attention=plugin("attention", "multi_head"),
        position=resolve("position", position),
        feedforward=resolve("feedforward", feedforward),
        norm=resolve("norm", norm),
    ).eval()


def copy(net: Backbone, embedding: nn.Module, layers: list[tuple[Any, ...]], last: nn.Module) -> None:
    """Copy a peer's weights: of each layer norm, qkv, out, norm, inner, out, each turned to ours where it must be."""
    pairs: list[tuple[Any, nn.Module]] = [(net.embedding, embedding), (net.decoder_norm, last)]
    for layer, theirs in zip(net.decoder, layers, strict=True):
        own: Any = layer
        attention, feedforward = own.attention, own.feedforward
        parts = (own.attention_norm, attention.qkv, attention.out)
        pairs += zip((*parts, own.feedforward_norm, feedforward.inner, feedforward.out), theirs, strict=True)
    with torch.no_grad():
        for mine, peer in pairs:
            weights = dict(peer.named_parameters())
            turned = weights["weight"].T if type(peer).__name__ == "Conv1D" else weights["weight"]
            mine.weight.copy_(turned)
            if mine.__dict__["_parameters"].get("bias") is not None:
                mine.bias.copy_(weights["bias"])


def loud(model: nn.Module) -> None:
    """Draw weights so large that the tokens keep changing: small ones repeat the last token for ever."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)


Generate = Callable[[Tensor, int], list[list[int]]]
"""Takes prompts (B, T) and a number of tokens; returns the new ids of each row."""


def gpt2(device: str) -> tuple[Backbone, Generate]:
    """Hugging Face's GPT-2 with its growing cache, attention by scaled_dot_product_attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=DIM,
        n_layer=LAYERS,
        n_head=HEADS,
        activation_function="gelu",
        attn_implementation="sdpa",  # type: ignore[call-arg]
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = GPT2LMHeadModel(config)
    model.to(device).eval()
    loud(model)
    bias: dict[str, Any] = {"bias": True}
    net = network("multi_head", "learned", {"name": "gelu", **bias}, "layer", num_heads=HEADS, qk_norm=False, **bias)
    inside = model.transformer
    layers = [(b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in inside.h]
    copy(net.to(device), inside.wte, layers, inside.ln_f)
    net.position.table.weight.data.copy_(inside.wpe.weight)  # type: ignore[union-attr, operator]

    def run(prompts: Tensor, new: int) -> list[list[int]]:
        mask = torch.ones_like(prompts)
        ids = model.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        found: list[list[int]] = ids[:, prompts.shape[1] :].tolist()
        return found

    return net, run


def litgpt(device: str) -> tuple[Backbone, Generate]:
    """LitGPT's generate, and its batched one for several rows, with its cache of the context's length."""
    from litgpt.generate.base import batched_generate_fn
    from litgpt.generate.base import generate as generate_one

    model: Any = peers.litgpt(peers.Shape(LAYERS, DIM, HEADS, CONTEXT, 1, VOCAB))[0].to(device).eval()
    loud(model)
    net = network("multi_head", "rotary", "gelu", "layer", num_heads=HEADS, qk_norm=False)
    inside = model.transformer
    layers = [(b.norm_1, b.attn.qkv, b.attn.proj, b.norm_2, b.mlp.fc, b.mlp.proj) for b in inside.h]
    copy(net.to(device), inside.wte, layers, inside.ln_f)

    def run(prompts: Tensor, new: int) -> list[list[int]]:
        total = prompts.shape[1] + new
        model.clear_kv_cache()
        model.max_seq_length = total
        model.set_kv_cache(batch_size=len(prompts), device=prompts.device)
        if len(prompts) == 1:
            found = generate_one(model, prompts[0], total, temperature=0.0, include_prompt=False)
            return [found.tolist()]
        steps = list(
            batched_generate_fn(
                model, prompts, total, sample_args={"temperature": 0.0}, include_prompt=False, include_eos=True
            )
        )
        return torch.stack([torch.cat([t.view(1) for t in step if t is not None]) for step in steps], 1).tolist()

    return net, run


def ours(net: Backbone, device: str) -> Generate:
    """llmkit's generate; no id ends a row."""

    def run(prompts: Tensor, new: int) -> list[list[int]]:
        options = DecodingOptions(max_new_tokens=new, temperature=0)
        return generate(net, prompts.tolist(), options, eos_id=-1, device=device)

    return run


def same_tokens(report: Report, peer: str, mine: Generate, theirs: Generate, prompts: Tensor) -> None:
    """Tell how many of the greedy tokens are the peer's."""
    rows = list(zip(mine(prompts, CHECKED), theirs(prompts, CHECKED), strict=True))
    equal = [sum(itertools.accumulate((int(a == b) for a, b in zip(*row, strict=True)), int.__mul__)) for row in rows]
    total, distinct = CHECKED * len(rows), len({token for row, _ in rows for token in row})
    report.add(
        f"batch {len(rows)}, greedy tokens as {peer}'s",
        f"the same, of {total}",
        sum(equal),
        f"tokens ({distinct} distinct)",
        goal="all",
        met=sum(equal) == total,
    )


def growth(report: Report, cycles: int, device: str) -> None:
    """Measure the time of a token after prompts of several lengths."""
    for attention in ("multi_head", "lstm", "linear"):
        heads = {} if attention == "lstm" else {"num_heads": HEADS}
        net = network(attention, None, None, None, **heads).to(device)
        times: dict[int, list[float]] = {length: [] for length in LENGTHS}
        for length in LENGTHS * cycles:
            prompt = torch.randint(VOCAB, (1, length), device=device).tolist()
            ticks: list[float] = []
            options = DecodingOptions(max_new_tokens=17, temperature=0)
            generate(
                net, prompt, options, eos_id=-1, device=device, on_token=lambda *_, t=ticks: t.append(clock(device))
            )
            times[length] += [(after - before) for before, after in itertools.pairwise(ticks)]
        medians = {length: statistics.median(found) for length, found in times.items()}
        slope = statistics.linear_regression(
            [math.log(length) for length in LENGTHS], [math.log(medians[length]) for length in LENGTHS]
        ).slope
        for length, found in medians.items():
            report.add(f"batch 1, {attention}", f"{length} columns before", round(found * 1e3, 3), "ms a token")
        most = 1.0 if attention == "multi_head" else 0.05
        report.add(
            f"batch 1, {attention}",
            "exponent in the length",
            round(slope, 3),
            "",
            goal=f"at most {most:g}",
            met=slope <= most,
        )


def main() -> None:
    """Measure every case."""
    args = arguments(__doc__)
    report = Report("generation", args.json)
    found, missing = find({"HF GPT-2": lambda: gpt2(args.device), "litgpt": lambda: litgpt(args.device)})
    default = network("multi_head", None, None, None, num_heads=HEADS).to(args.device)
    size = sum(parameter.numel() for parameter in default.parameters()) * 4
    generator = torch.Generator().manual_seed(0)
    bandwidth = Bandwidth(args.device)
    for batch, least in GOALS.items():
        new = NEW[batch]
        prompts = torch.randint(VOCAB, (batch, PROMPT), generator=generator).to(args.device)
        for peer, (net, theirs) in found.items():
            mine = ours(net, args.device)
            same_tokens(report, peer, mine, theirs, prompts)
            runs = {OURS: mine, peer: theirs}
            if peer == "litgpt":
                runs[f"{OURS}, default network"] = ours(default, args.device)
            turns: dict[str, Callable[[], Any]] = {
                name: functools.partial(run, prompts, new) for name, run in runs.items()
            }
            times = interleave({**turns, "bandwidth": bandwidth}, args.cycles, device=args.device)
            limit = bandwidth.seconds(size * new, times.pop("bandwidth"))
            report.compare(
                f"batch {batch}, the network of {peer}",
                times,
                "ms a token",
                scale=1e3 / new,
                goals={peer: least},
                limits=dict.fromkeys(times, limit),
            )
        for peer, why in missing.items():
            report.compare(f"batch {batch}, the network of {peer}", {}, "ms a token", missing={peer: why})
    growth(report, args.cycles, args.device)
    report.close()


if __name__ == "__main__":
    main()
