"""Time of a translated sentence by beam search, beside JoeyNMT and Hugging Face's Marian with the same weights.

    python benchmarks/beam.py
    python benchmarks/beam.py --device cuda

3 + 3 layers, 256 wide, vocabulary 8,192, beams of 5, one batch of 32 sources about as long as Multi30k's (13 words, 4
to 30). Each goes from lists of ids through the encoder and its search to lists of ids. The peers get llmkit's weights
and so compute the same scores: JoeyNMT with norms before the branches, Marian with norms after them, each beside a
llmkit network of that kind. The weights are drawn, not trained: a word is likely to be followed by one of four others,
the rest of the network decides by which, and the end symbol's row is fitted so that translations end about where their
sources do. A translation's score is its summed log probability (length penalty 0), since each library has another rule
for long ones. JoeyNMT has no decoding cache, and leaves finished translations on the beam in the place of open ones,
so it may miss what the others find: where texts differ, their scores by llmkit's network tell which search did better.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from kit import OURS, Report, arguments, find, interleave
from torch import Tensor

from llmkit import DecodingOptions, Sequence
from llmkit.model.backbone import Backbone
from llmkit.ops.decoding import generate
from llmkit.registry import plugin
from llmkit.sequence import padded, segments_of

LAYERS, DIM, HEADS, VOCAB, BEAMS = 3, 256, 4, 8192, 5
UNK, PAD, BOS, EOS, FIRST = 0, 1, 2, 3, 4  # JoeyNMT's numbers; FIRST is the first word
SENTENCES, MOST = 32, 60
GOAL = 1.5

Translate = Callable[[list[list[int]]], list[list[int]]]
"""Takes the ids of sources, each ended by eos; returns the ids of translations without eos."""


def network(norm_first: bool, device: str) -> Backbone:
    """Return an encoder-decoder of the benchmark's size with drawn weights that make varied, decided texts."""
    torch.manual_seed(0)
    bias: dict[str, Any] = {"bias": True}
    net = Backbone(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        topology="encoder_decoder",
        max_length=128,
        attention=plugin("attention", "multi_head", num_heads=HEADS, qk_norm=False, **bias),
        cross_attention=plugin("attention", "multi_head", num_heads=HEADS, qk_norm=False, **bias),
        position=plugin("position", "sinusoidal"),
        feedforward=plugin("feedforward", "relu", **bias),
        norm=plugin("norm", "layer", eps=1e-6 if norm_first else 1e-5),
        norm_first=norm_first,
        tie_embeddings=False,
    )
    assert net.output is not None
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.8 * parameter.shape[1] ** -0.5)
        words = net.embedding.weight.normal_(std=DIM**-0.5)
        net.output.weight.zero_()
        for share in (3.0, 2.9, 2.8, 2.7):  # a word's row is what the words before it look like
            after = torch.randperm(VOCAB - FIRST) + FIRST
            net.output.weight[after] += share * words[FIRST:]
        start = torch.randperm(VOCAB - FIRST)[:4] + FIRST
        net.output.weight[start] += 3.0 * words[BOS]
        net.eval()
        net.output.weight[EOS] = ending(net)
    return net.to(device)


def ending(net: Backbone) -> Tensor:
    """Return the end symbol's row: the nearest linear map from hidden states to a score that rises past the source."""
    inputs = sources(128, seed=1)
    ids, segments = padded(inputs, PAD), segments_of([len(row) for row in inputs])
    memory = net.encode(ids, Sequence.of(ids, segments))
    written = torch.full((len(ids), 1), BOS)
    for _ in range(40):
        hidden_BTD = net.decode(written, Sequence.dense(written.shape[1]), memory=memory)
        written = torch.cat([written, (hidden_BTD[:, -1:] @ net.output_weight_VD.T).argmax(-1)], 1)
    past_BT = torch.arange(hidden_BTD.shape[1]) - torch.tensor([[len(row)] for row in inputs])
    best_BT = (hidden_BTD @ net.output_weight_VD.T).amax(-1)
    wanted_BT = best_BT + (2.0 * (past_BT - 2)).clamp(-12, 4)
    row_D1: Tensor = torch.linalg.lstsq(hidden_BTD.flatten(0, 1), wanted_BT.flatten()[:, None]).solution
    return row_D1[:, 0]


def sources(number: int, seed: int = 0) -> list[list[int]]:
    """Return random sources, each ended by eos."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (13 + 4 * torch.randn(number, generator=generator)).clamp(4, 30).long().tolist()
    return [[*torch.randint(FIRST, VOCAB, (length,), generator=generator).tolist(), EOS] for length in lengths]


def ours(net: Backbone, device: str) -> Translate:
    """What llmkit's translation head does with a batch."""

    def run(batch: list[list[int]]) -> list[list[int]]:
        with torch.inference_mode():
            ids, segments = padded(batch, PAD).to(device), segments_of([len(row) for row in batch])
            memory = net.encode(ids, Sequence.of(ids, None if segments is None else segments.to(device)))
            options = DecodingOptions(max_new_tokens=MOST, num_beams=BEAMS, length_penalty=0.0)
            starts = [[BOS]] * len(batch)
            return generate(net, starts, options, eos_id=EOS, banned=(UNK, PAD, BOS), memory=memory, device=device)

    return run


Part = tuple[Tensor, Tensor]  # weight and bias


def parts(layer: Any, order: Tensor) -> list[Part]:
    """Return norm, q, k, v and out of each attention, then norm, inner and out, with channels in the peer's order."""
    found: list[Part] = []
    for norm, attention in ((layer.attention_norm, layer.attention), (layer.cross_norm, layer.cross)):
        if attention is not None:
            maps = [attention.q, attention.kv] if attention is layer.cross else [attention.qkv]
            weights = torch.cat([part.weight[:, order] for part in maps]).chunk(3)
            biases = torch.cat([part.bias for part in maps]).chunk(3)
            found += [_turned(norm, order), *zip(weights, biases, strict=True), _turned(attention.out, order)]
    inner = layer.feedforward.inner
    found += [_turned(layer.feedforward_norm, order), (inner.weight[:, order], inner.bias)]
    return [*found, _turned(layer.feedforward.out, order)]


def _turned(module: Any, order: Tensor) -> Part:
    return module.weight[order], module.bias[order]


def copy(net: Backbone, stacks: list[tuple[Any, str]], tables: list[Any], order: Tensor) -> None:
    """Copy llmkit's weights to a peer.

    Args:
        net: llmkit's network.
        stacks: the peer's layers, encoder first, with the paths of what ``parts`` returns.
        tables: the peer's embedding and output matrix.
        order: which of our channels each of the peer's is.
    """
    with torch.no_grad():
        for side, (layers, paths) in zip((net.encoder, net.decoder), stacks, strict=True):
            for layer, peer in zip(side, layers, strict=True):
                for path, (weight, bias) in zip(paths.split(), parts(layer, order), strict=True):
                    module = peer.get_submodule(path)
                    module.weight.copy_(weight)
                    module.bias.copy_(bias)
        for table, own in zip(tables, (net.embedding.weight, net.output_weight_VD), strict=True):
            table.weight.copy_(own[:, order])


def joeynmt(net: Backbone, device: str) -> Translate:
    """JoeyNMT's search; its norms come before each branch."""
    from joeynmt.model import build_model
    from joeynmt.search import search
    from joeynmt.vocabulary import Vocabulary

    special = {"unk": UNK, "pad": PAD, "bos": BOS, "eos": EOS, "sep": None}
    settings: dict[str, Any] = {f"{name}_token": number and f"<{name}>" for name, number in special.items()}
    settings |= {"unk_token": "<unk>", "lang_tags": []} | {f"{name}_id": number for name, number in special.items()}
    words = Vocabulary([f"w{number}" for number in range(FIRST, VOCAB)], SimpleNamespace(**settings))
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "hidden_size": DIM, "ff_size": 4 * DIM, "layer_norm": "pre"}
    side = {"type": "transformer", "embeddings": {"embedding_dim": DIM, "scale": True}, **sizes}
    model: Any = build_model({"encoder": side, "decoder": side, "tied_embeddings": True}, words, words)
    inside = "{0}.q_layer {0}.k_layer {0}.v_layer {0}.output_layer "
    end = "feed_forward.layer_norm feed_forward.pwff_layer.0 feed_forward.pwff_layer.3"
    encoder = f"layer_norm {inside.format('src_src_att')} {end}"
    decoder = f"x_layer_norm {inside.format('trg_trg_att')} dec_layer_norm {inside.format('src_trg_att')} {end}"
    stacks = [(model.encoder.layers, encoder), (model.decoder.layers, decoder)]
    copy(net, stacks, [model.src_embed.lut, model.decoder.output_layer], torch.arange(DIM))
    model.to(device).eval()

    def run(batch: list[list[int]]) -> list[list[int]]:
        ids, lengths = padded(batch, PAD).to(device), torch.tensor([len(row) for row in batch])
        rows = SimpleNamespace(
            src=ids, src_length=lengths, src_mask=(ids != PAD)[:, None], has_trg=False, trg_prompt_mask=None
        )
        found = search(model, rows, max_output_length=MOST, beam_size=BEAMS, beam_alpha=0.0)[0]
        return [before_eos(row) for row in found.astype(int).tolist()]

    return run


def marian(net: Backbone, device: str) -> Translate:
    """Hugging Face's Marian and its generate; its norms come after each branch, its cosines after all sines."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        vocab_size=VOCAB,
        d_model=DIM,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * DIM,
        decoder_ffn_dim=4 * DIM,
        max_position_embeddings=128,
        activation_function="relu",
        scale_embedding=True,
        tie_word_embeddings=False,
        dropout=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model: Any = MarianMTModel(config)
    inside = "{0}.q_proj {0}.k_proj {0}.v_proj {0}.out_proj "
    end = "final_layer_norm fc1 fc2"
    encoder = f"self_attn_layer_norm {inside.format('self_attn')} {end}"
    decoder = f"{encoder[: -len(end)]} encoder_attn_layer_norm {inside.format('encoder_attn')} {end}"
    body = model.model
    stacks = [(body.encoder.layers, encoder), (body.decoder.layers, decoder)]
    copy(net, stacks, [body.encoder.embed_tokens, model.lm_head], torch.arange(DIM).view(-1, 2).T.flatten())
    body.decoder.embed_tokens.weight = body.encoder.embed_tokens.weight
    model.to(device).eval()

    def run(batch: list[list[int]]) -> list[list[int]]:
        ids = padded(batch, PAD).to(device)
        found = model.generate(
            ids,
            attention_mask=(ids != PAD).long(),
            num_beams=BEAMS,
            max_new_tokens=MOST,
            length_penalty=0.0,
            do_sample=False,
            early_stopping=False,
        )
        return [before_eos(row[1:]) for row in found.tolist()]

    return run


def before_eos(row: list[int]) -> list[int]:
    """Return ids without eos, what follows it, and padding."""
    row = [*row, EOS]
    return [token for token in row[: row.index(EOS)] if token != PAD]


def score(net: Backbone, source: list[int], text: list[int], device: str) -> float:
    """Return a translation's log probability by llmkit's network in one pass, eos included unless it was cut off."""
    target = [*text, EOS][:MOST]
    with torch.inference_mode():
        ids, written = torch.tensor([source], device=device), torch.tensor([[BOS, *target[:-1]]], device=device)
        memory = net.encode(ids, Sequence.of(ids))
        hidden_TD = net.decode(written, Sequence.of(written), memory=memory)[0]
        logp_TV = (hidden_TD @ net.output_weight_VD.T).log_softmax(-1)
    return float(logp_TV[torch.arange(len(target)), target].sum())


def main() -> None:
    """Measure both peers."""
    args = arguments(__doc__)
    report = Report("beam", args.json)
    texts = sources(SENTENCES)
    for peer, build, norm_first in (("JoeyNMT", joeynmt, True), ("HF Marian", marian, False)):
        net = network(norm_first, args.device)
        found, missing = find({peer: lambda build=build, net=net: build(net, args.device)})  # type: ignore[misc]
        runs = {OURS: ours(net, args.device), **found}
        case = f"{LAYERS}+{LAYERS}L {DIM} wide, beam {BEAMS}, {SENTENCES} sentences, the network of {peer}"
        if found:
            mine, theirs = (run(texts) for run in runs.values())  # the warm-up, too
            gaps = [
                score(net, source, a, args.device) - score(net, source, b, args.device)
                for source, a, b in zip(texts, mine, theirs, strict=True)
                if a != b
            ]
            worse = sum(gap < -1e-3 for gap in gaps)
            lengths = sorted(map(len, mine))
            report.add(
                case,
                f"translations as {peer}'s, of {SENTENCES}",
                SENTENCES - len(gaps),
                f"the same, {sum(gap > 1e-3 for gap in gaps)} likelier by llmkit, {worse} less likely",
                goal="none less likely",
                met=worse == 0,
                note=f"{lengths[0]} to {lengths[-1]} tokens, {sum(lengths) / SENTENCES:.1f} on average",
            )
        turns: dict[str, Callable[[], Any]] = {
            name: lambda run=run: run(texts)  # type: ignore[misc]
            for name, run in runs.items()
        }
        times = interleave(turns, args.cycles, warm=0 if found else 1, device=args.device)
        report.compare(case, times, "ms a sentence", 1e3 / SENTENCES, dict.fromkeys(found, GOAL), missing=missing)
    report.close()


if __name__ == "__main__":
    main()
