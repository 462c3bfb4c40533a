"""Folders in the format of Hugging Face: weights, config.json, tokenizer, generation config and a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from llmkit import registry
from llmkit.checkpoint.content import begins_with
from llmkit.contracts import Tokenizer
from llmkit.errors import UserError
from llmkit.hf.facts import NoCounterpartError
from llmkit.hf.facts import part as part_of
from llmkit.hf.native import native
from llmkit.hf.native_pairs import start_of
from llmkit.hf.own import CODE, OWN, STATE, code, own_config

ROLES = ("pad", "bos", "eos", "unk", "mask", "sep")


@runtime_checkable
class Publishable(Protocol):
    """A tokenizer that can be written as a tokenizer.json."""

    def published(self) -> dict[str, Any]:
        """Return the content of the file; special tokens are among its ``added_tokens``."""


class Exported(NamedTuple):
    """What was written."""

    architecture: str
    """The name of its class."""
    reason: str | None
    """Why it is an architecture of llmkit's own; None: it is one of transformers'."""


def export(
    folder: Path, part: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Tokenizer, card: str
) -> Exported:
    """Write a model into a new folder, as one of transformers' own architectures where its parts are those of one.

    Args:
        folder: is created; must not exist.
        part: llmkit's section of a checkpoint.
        state: its weights.
        tokenizer: its tokenizer.
        card: the text of the model card, to which is added how the model is used.

    Raises UserError when the folder exists, or head or tokenizer cannot be written in this format.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError("writing models of Hugging Face needs safetensors: pip install 'llmkit[hf]'") from error
    spec, reason = part["model"], None
    labels = list(part["head_info"].get("labels", []))
    try:
        content, weights = native(spec, state, labels)
    except NoCounterpartError as error:
        content, reason = own_config(part, labels, len(state["net.embedding.weight"])), str(error)
        weights = {name: value.contiguous().clone() for name, value in state.items()}
    if not isinstance(tokenizer, Publishable):
        raise UserError(f"the tokenizer {type(tokenizer).__name__} cannot be written as a tokenizer.json")
    architecture, translates = str(content["architectures"][0]), bool(content.get("is_encoder_decoder"))
    bos = tokenizer.bos_id if translates and not tokenizer.around[0] else begins_with(tokenizer, part["config"])
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": bos, "eos_token_id": tokenizer.eos_id}
    if translates:
        ids |= start_of(tokenizer, part_of("head", spec["head"])[1]["start"] or ["bos"])
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    _write(folder / "config.json", {**content, **ids, "dtype": "float32"})
    data = tokenizer.published()
    if reason is not None:
        (folder / CODE).write_text(code(architecture), encoding="utf-8")
        (folder / STATE).write_text(part["tokenizer_state"], encoding="utf-8")
    _write_tokenizer(folder, tokenizer, data, int(spec["context"]), bos, translates, bool(spec.get("token_types")))
    if translates or architecture.endswith(("LMHeadModel", "ForCausalLM")):
        _write(folder / "generation_config.json", {**ids, **_generation(spec, tokenizer, ids)})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text(f"{card}{_use(folder.name, content, reason)}", encoding="utf-8")
    return Exported(architecture, reason)


def _use(name: str, content: Mapping[str, Any], reason: str | None) -> str:
    """Return the passage of a model card that says how the model is used."""
    kind = content["architectures"][0].partition("For")[2]
    loader = f"AutoModelFor{'Seq2SeqLM' if content.get('is_encoder_decoder') else kind or 'CausalLM'}"
    lines = ["## Use", "", "```python", f"from transformers import {loader}, AutoTokenizer"]
    if reason is not None:
        packages = sorted({"llmkit", *_packages(content[OWN]["model"])})
        needs = f"It needs {', '.join(packages)} and transformers, version 5: {reason}."
        registers = "import llmkit.interop.transformers  # or trust_remote_code=True below"
        lines = ["## Use", "", needs, "", "```python", registers, "", lines[-1]]
    lines += ["", f'model = {loader}.from_pretrained("{name}")', f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    return "\n".join(["", *lines, "```", ""])


def _packages(spec: Mapping[str, Any]) -> set[str]:
    """Return the distributions that the parts of a model come from; of a local plugin its file."""
    entries = [entry for family in registry.DEFAULTS for entry in registry.entries(family).values()]
    homes = {entry.class_path: entry.distribution for entry in entries if entry.distribution != "(local)"}
    paths = [path for path in _classes(spec) if not path.startswith(("torch.", "llmkit."))]
    return {homes.get(path, f"{path.rpartition('.')[0]}.py (by llmkit.imports.import_modules)") for path in paths}


def _classes(spec: Any) -> Iterator[str]:
    """Yield the class paths in a description, those inside of arguments too."""
    if isinstance(spec, Mapping):
        if "class_path" in spec:
            yield str(spec["class_path"])
        spec = [*spec.values()]
    for item in spec if isinstance(spec, list) else ():
        yield from _classes(item)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _generation(spec: Mapping[str, Any], tokenizer: Tokenizer, ids: Mapping[str, int]) -> dict[str, Any]:
    """Return how text is generated, and the tokens that never are: special ones but the end.

    ``max_new_tokens`` is not said: it would overrule a ``max_length`` that is asked for.

    Args:
        spec: the description of the model.
        tokenizer: its tokenizer.
        ids: of the special tokens, by transformers' names.
    """
    decoding, longest = spec["decoding"], int(spec["context"])
    if "decoder_start_token_id" in ids and decoding["max_new_tokens"]:
        longest = min(longest, decoding["max_new_tokens"] + 1 + ("forced_bos_token_id" in ids))
    forced = ids.get("forced_bos_token_id")
    # transformers suppresses tokens after it has forced one, and bans them before.
    banned = {} if forced is None else {"bad_words_ids": [[forced]]}
    special = {getattr(tokenizer, f"{role}_id") for role in ROLES} - {tokenizer.eos_id}
    sampled = bool(decoding["temperature"]) and decoding["num_beams"] == 1
    how = {"temperature": decoding["temperature"], "top_k": decoding["top_k"], "top_p": decoding["top_p"]}
    return {
        "do_sample": sampled,
        **(how if sampled else {}),
        "num_beams": decoding["num_beams"],
        "max_length": longest,
        **banned,
        "suppress_tokens": sorted(special - {forced}),
    }


def _write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    data: dict[str, Any],
    context: int,
    bos: int | None = None,
    translates: bool = False,
    types: bool = False,
) -> None:
    names = {token["id"]: token["content"] for token in data["added_tokens"]}
    roles = {role: getattr(tokenizer, f"{role}_id") for role in ROLES}
    for role, number in roles.items():
        if number not in names:  # an id that the tokenizer.json did not have a token for
            names[number] = f"<llmkit_{role}>"
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            data["added_tokens"].append({"id": number, "content": names[number], **flags, "special": True})
    if not any(tokenizer.around):
        after = [roles["eos"]] if translates else []
        data["post_processor"] = _template(names, between=[] if translates else [roles["sep"]], after=after)
    _write(folder / "tokenizer.json", data)
    settings = {
        **{f"{role}_token": names[number] for role, number in roles.items()},
        **({} if bos is None else {"bos_token": names[bos]}),
        "cls_token": names[roles["bos"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    if types:
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if template := getattr(tokenizer, "chat_template", None):
        settings["chat_template"] = template  # which spells special tokens
    else:
        settings["split_special_tokens"] = True  # a text that spells the name of a special token is text
    _write(folder / "tokenizer_config.json", settings)


def _template(names: Mapping[int, str], between: list[int], after: list[int]) -> dict[str, Any]:
    """Return the post-processor that puts ids between the texts of a pair, and after a text or a pair."""

    def tokens(numbers: list[int], type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": names[number], "type_id": type_id}} for number in numbers]

    one, other = ({"Sequence": {"id": text, "type_id": type_id}} for text, type_id in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [one, *tokens(after, 0)],
        "pair": [one, *tokens(between, 0), other, *tokens(after, 1)],
        "special_tokens": {
            names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]}
            for number in (*between, *after)
        },
    }
