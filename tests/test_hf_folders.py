"""Folders of Hugging Face, without transformers: as a config's starting point, what is refused in them, and written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import hf_folder
import pytest
import torch
import yaml
from command import Result, done, llmkit
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from llmkit import LanguageModel, UserError, load, plugin
from llmkit.checkpoint.content import section
from llmkit.hf.export import export
from llmkit.hf.folder import Source

SMALL = (
    *("--data.batch_size", "2", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--model.context", "16"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder.write(tmp_path_factory.mktemp("hf") / "gpt2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("ABC def GHI jkl\n" * 40)
    return path


@pytest.fixture(scope="module")
def fitted(folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that begins with the folder, with a shorter context."""
    output = tmp_path_factory.mktemp("runs")
    return done("fit", "--model.init_from", f"hf:{folder}", "--data.train", texts, "--output", output, *SMALL)


def test_a_run_begins_with_a_folder(fitted: Result, folder: Path) -> None:
    """The settings are written out, the first rows of the position table are taken, and the folder is not needed."""
    assert "model.init_from hf:" in fitted.err and "28 weights taken, and its tokenizer" in fitted.err
    config = yaml.safe_load((fitted.folder / "config.yaml").read_text())["model"]
    assert (config["dim"], config["num_layers"], config["context"], config["vocab_size"]) == (8, 2, 16, 60)
    assert config["attention"]["class_path"].endswith("MultiHead")
    assert config["attention"]["init_args"]["num_heads"] == 2 and config["feedforward"]["init_args"]["hidden"] == 32
    model = load(fitted.checkpoint)
    assert model.tokenizer is not None
    assert (model.tokenizer.vocab_size, model.tokenizer.eos_id, model.tokenizer.pad_id) == (58, 1, 1)
    assert model.network.embedding.weight.shape == (60, 8) and model.context == 16
    assert not torch.equal(model.network.embedding.weight, hf_folder.weights()["transformer.wte.weight"])
    again = done("fit", "--config", fitted.folder / "config.yaml", "--trainer.max_steps", "1")
    assert "28 weights taken" in again.err


def test_a_run_is_resumed_without_the_folder(fitted: Result, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump({"model": {"init_from": "hf:./gone", "context": 16}, "data": {"train": str(texts)}})
    )
    words = ("--config", tmp_path / "x.yaml", "--ckpt_path", fitted.checkpoint, "--output", tmp_path, *SMALL[:2])
    assert llmkit("fit", *words, "--trainer.max_steps", "2").code == 0


def test_where_the_settings_come_from(folder: Path, texts: Path) -> None:
    words = ("config", "show", "--model.init_from", f"hf:{folder}", "--data.train", texts, "--model.context", 16)
    shown = done(*words, "--json").out
    origins = {key: item["origin"] for key, item in json.loads(shown).items()}
    assert origins["model.dim"] == origins["model.attention.num_heads"] == f"hf:{folder} config.json"
    assert origins["model.context"] == "command line" and origins["model.dropout"] == "default"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model.dim", 16), "command line: model.dim: is 16, but hf:{0} config.json has 8"),
        (
            ("--model.attention.num_heads", 4),
            "command line: model.attention.num_heads: is 4, but hf:{0} config.json has 2",
        ),
        (("--model.norm", "rms"), "command line: model.norm: is RMSNorm, but hf:{0} config.json has LayerNorm"),
        (("--model.context", 48), "model.init_from: hf:{0} does not fit this model: of another shape: "),
        (("--model.head", "masked_lm"), "model.head: needs a network with encoder, but hf:{0} has decoder"),
        (
            ("--data.tokenizer", "char"),
            "data.tokenizer: is Char, but model.init_from hf:{0} brings a trained Pretrained",
        ),
    ],
)
def test_what_contradicts_the_folder(
    words: tuple[Any, ...], says: str, folder: Path, texts: Path, tmp_path: Path
) -> None:
    given = ("fit", "--model.init_from", f"hf:{folder}", "--data.train", texts, "--output", tmp_path, *SMALL, *words)
    result = llmkit(*given)
    assert result.code == 2
    assert says.format(folder) in result.err, result.err


def test_another_head(folder: Path, tmp_path: Path) -> None:
    """A classifier on top of a decoder: its head begins at random, and is named."""
    (tmp_path / "labels.csv").write_text(
        "text,label\n" + "".join(f"WORD {'AB'[i % 2]},{'ab'[i % 2]}\n" for i in range(20))
    )
    words = (
        "--data.train",
        tmp_path / "labels.csv",
        "--model.head",
        "classification",
        "--model.head.topology",
        "decoder",
    )
    result = done("fit", "--model.init_from", f"hf:{folder}", *words, "--output", tmp_path, *SMALL)
    assert (
        "28 weights taken, and its tokenizer; new, of the head: head.classifier.weight, head.classifier.bias"
        in result.err
    )


def test_import(folder: Path, tmp_path: Path) -> None:
    done("import", f"hf:{folder}", tmp_path / "gpt2.ckpt")
    model, direct = load(tmp_path / "gpt2.ckpt"), load(f"hf:{folder}")
    for name, value in direct.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    answers = [
        done("infer", path, "ABC", "--greedy", "--max_new_tokens", 4).out
        for path in (tmp_path / "gpt2.ckpt", f"hf:{folder}")
    ]
    assert answers[0] == answers[1]
    for words, says in {
        (f"hf:{folder}", "gpt2.txt"): "with the suffix .ckpt",
        ("gpt2", "new.ckpt"): "import: gpt2 does not begin with hf:",
        (f"hf:{folder}", "gpt2.ckpt"): "exists already",
        (f"hf:{folder}", "new.ckpt", "--head", "{name: x"): "--head '{name: x' is neither a name nor {name: ...",
        (f"hf:{folder}", "new.ckpt", "--head", "classification"): "Classification learns from training data",
    }.items():
        result = llmkit("import", words[0], tmp_path / words[1], *words[2:])
        assert result.code == 2 and says in result.err and result.err.count("\n") == 1, result.err


class Code:
    """Runs when it is unpickled by a reader that runs code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


def drop(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({k: v for k, v in hf_folder.weights().items() if k not in names}, folder / "model.safetensors")

    return change


def add(name: str, *shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({**hf_folder.weights(), name: torch.zeros(*shape)}, folder / "model.safetensors")

    return change


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(hf_folder.config(**changes)))

    return change


def index(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file(hf_folder.weights(), folder.parent / "outside.safetensors")
        (folder / "model.safetensors").unlink()
        content = {"weight_map": dict.fromkeys(hf_folder.weights(), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return change


def pickled(**how: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({**hf_folder.weights(), "code": Code()}, folder / "pytorch_model.bin", **how)

    return change


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def header(content: Any, length: int | None = None) -> Callable[[Path], None]:
    """Write a safetensors file of a header alone, which claims a length."""

    def change(folder: Path) -> None:
        text = json.dumps(content).encode()
        size = len(text) if length is None else length
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text)

    return change


def tensor(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"transformer.wte.weight": {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}}


def link(name: str, target: str = "../outside") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder / target)
        (folder / name).symlink_to(target)

    return change


def twice(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(hf_folder.weights(), folder / name)
    content = {"weight_map": {"one": "a.safetensors", "other": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def expanded(folder: Path) -> None:
    """One number that says that it is a matrix of a trillion."""
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": torch.zeros(1).expand(10**6, 10**6)}, folder / "pytorch_model.bin")


def classifier(**changes: Any) -> Callable[[Path], None]:
    """A BERT that says that it is a classifier."""

    def change(folder: Path) -> None:
        hf_folder.write_bert(folder)
        content = json.loads((folder / "config.json").read_text())
        content |= {"architectures": ["BertForSequenceClassification"], **changes}
        (folder / "config.json").write_text(json.dumps(content))

    return change


def own(*keys: str, value: Any, remove: str = "") -> Callable[[Path], None]:
    """A folder of llmkit's own architecture, with code that runs if anything imports it, and one value changed."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        parts: dict[str, Any] = {"head": plugin("head", "generation"), "attention": plugin("attention", "gru")}
        model = LanguageModel(**parts, dim=8, num_layers=1, context=16)
        model.tokenizer = plugin("tokenizer", "byte")()
        model.configure_model()
        export(folder, section(model.spec, model.tokenizer, model.head, {}), model.state_dict(), model.tokenizer, "")
        (folder / "modeling_llmkit.py").write_text("import os; os.mkdir('PWNED')")
        content = json.loads((folder / "config.json").read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        if keys:
            place[keys[-1]] = value
        (folder / "config.json").write_text(json.dumps(content))
        if remove:
            (folder / remove).unlink()

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pickled(), "holds more than plain data"),
        (expanded, "pytorch_model.bin"),
        (twice, "is in two of its files"),
        (link("config.json"), "config.json is a link that leads out of the folder"),
        (link("model.safetensors"), "model.safetensors is a link that leads out of the folder"),
        (link("tokenizer.json"), "tokenizer.json is a link that leads out of the folder"),
        (header({}, 2**62), "model.safetensors cannot be read"),
        (header(tensor("F32", [2**40, 2**40], 0, 2**62)), "model.safetensors cannot be read"),
        (header(tensor("F32", [60, 8], -8, 2**10)), "model.safetensors cannot be read"),
        (header(tensor("F32", [-60, -8], 0, 1920)), "model.safetensors cannot be read"),
        (header([]), "model.safetensors cannot be read"),
        (set_config(n_positions=10**9), "of another shape: net.position.table.weight"),
        (set_config(n_head=10**9), "dim 8 is not divisible by num_heads 1000000000"),
        (set_config(layer_norm_epsilon=10**400), "layer_norm_epsilon should be a number above 0"),
        (set_config(layer_norm_epsilon=float("nan")), "layer_norm_epsilon should be a number above 0"),
        (set_config(architectures=[["GPT2LMHeadModel"]]), "has no head that is known"),
        (set_config(model_type=["gpt2"]), "is not supported"),
        (write("config.json", "[" * 10**5), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json is not UTF-8"),
        (classifier(), "weights are missing: pooler.dense.weight, pooler.dense.bias, classifier.weight"),
        (classifier(id2label={"x": "a"}), "id2label should be names by number"),
        (classifier(id2label={"0": "a", "5": "b"}), "id2label should be names by number"),
        (own("llmkit", "model", "attention", "class_path", value="os.system"), "needs attention os.system, which is"),
        (own("llmkit", "tokenizer", "class_path", value="shutil.rmtree"), "needs tokenizer shutil.rmtree, which is"),
        (
            own(
                *("llmkit", "model", "attention"),
                value={
                    "class_path": "llmkit_plugins.attention.pattern.Pattern",
                    "init_args": {"variants": [{"class_path": "os.mkdir", "init_args": {"path": "PWNED"}}]},
                },
            ),
            "os.mkdir",
        ),
        (own("llmkit", value=None), "does not describe its model"),
        (own("llmkit", "model", value=[]), "does not describe its model"),
        (own("llmkit", "config", value=[]), "damaged"),
        (own("llmkit", "model", "num_layers", value=10**9), "num_layers 1000000000, and the most"),
        (own("llmkit", "model", "dim", value=10**9), "dim 1000000000, and the most"),
        (own("llmkit", "model", "context", value=10**9), "context 1000000000, and the most"),
        (own("llmkit", "model", "feedforward", "init_args", value={"hidden": 10**9}), "its weights do not fit"),
        (own("llmkit", "model", "unknown", value=1), "unknown"),
        (own("llmkit", "format", value=2), "is of format 2"),
        (own("llmkit", "head_info", value={"x": 1}), "its head_info does not fit"),
        (own("vocab_size", value=2**31), "its weights do not fit: net.embedding.weight has (262, 8)"),
        (own("vocab_size", value=10), "vocab_size"),
        (own(remove="model.safetensors", value=None), "it has neither model.safetensors nor pytorch_model.bin"),
        (pickled(_use_new_zipfile_serialization=False), "cannot be read"),
        (cut, "model.safetensors cannot be read"),
        (index("../outside.safetensors"), "names '../outside.safetensors', which is not a file of the folder"),
        (index("/etc/passwd"), "names '/etc/passwd', which is not a file of the folder"),
        (index("gone.safetensors"), "names gone.safetensors, which is not there"),
        (write("model.safetensors.index.json", "[]"), "should be a mapping"),
        (write("config.json", "{"), "config.json is not JSON"),
        (write("config.json", "{}"), "model_type 'None' is not supported"),
        (
            set_config(auto_map={"AutoModel": "code.Model"}),
            "names code of its own (auto_map), which llmkit does not run",
        ),
        (set_config(quantization_config={"bits": 4}), "quantised"),
        (set_config(model_type="gpt_neox"), "not supported: attention and feedforward are parallel in its layers"),
        (set_config(activation_function="mish"), "with the activation 'mish' is not supported; these are: gelu"),
        (set_config(scale_attn_by_inverse_layer_idx=True), "with other attention scores"),
        (set_config(n_embd="8"), "n_embd should be a whole number from 1 to 2147483648, got '8'"),
        (set_config(n_embd=10**8), "says 60 ids of width 100000000, not (60, 8)"),
        (set_config(n_inner=10**9), "of another shape: net.decoder.0.feedforward.inner.weight"),
        (set_config(n_layer=10**9), "n_layer is 1000000000, and the most is 4096"),
        (set_config(n_layer=3), "weights are missing: h.2.ln_1.weight"),
        (set_config(n_layer=1), "weights that nothing takes: h.1."),
        (set_config(vocab_size=59), "says 59 ids of width 8, not (60, 8)"),
        (drop("transformer.h.1.ln_2.bias"), "weights are missing: h.1.ln_2.bias"),
        (add("transformer.h.0.extra.weight", 2), "weights that nothing takes: h.0.extra.weight"),
        (add("lm_head.weight", hf_folder.ROWS, hf_folder.DIM), "lm_head.weight is not wte.weight"),
        (
            add("transformer.h.0.attn.c_attn.bias", 9),
            "of another shape: net.decoder.0.attention.qkv.bias (9,) there, (24,) here",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "it has no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor pytorch_model.bin"),
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    ],
)
def test_what_is_refused(
    change: Callable[[Path], Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 2, and nothing of the folder has run."""
    monkeypatch.chdir(tmp_path)
    change(hf_folder.write(tmp_path / "model"))
    result = llmkit("import", "hf:model", "out.ckpt")
    assert result.code == 2 and says in result.err, result.err
    assert result.err.count("\n") == 1 and not Path("PWNED").exists() and not Path("out.ckpt").exists()


def test_bin_files_and_parts(tmp_path: Path) -> None:
    """Weights as torch pickles them, and spread over files by an index, are the same ones."""
    expected = LanguageModel.published(f"hf:{hf_folder.write(tmp_path / 'whole')}").state_dict()
    weights = hf_folder.weights()
    binary, parts = (hf_folder.write(tmp_path / name) for name in ("binary", "parts"))
    torch.save(weights, binary / "pytorch_model.bin")
    names = [f"model-0000{1 + number % 2}-of-00002.safetensors" for number in range(len(weights))]
    where = dict(zip(weights, names, strict=True))
    for name in set(names):
        save_file({key: weights[key] for key in weights if where[key] == name}, parts / name)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for folder in (binary, parts):
        (folder / "model.safetensors").unlink()
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "1"  # as the hub's cache has it
    snapshot.mkdir(parents=True)
    (tmp_path / "whole").rename(tmp_path / "models--gpt2" / "blobs")
    for file in (tmp_path / "models--gpt2" / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    for folder in (binary, parts, snapshot):
        for name, value in LanguageModel.published(f"hf:{folder}").state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_what_is_not_there(tmp_path: Path) -> None:
    result = llmkit("import", f"hf:{tmp_path}/none", tmp_path / "out.ckpt")
    assert result.code == 2 and "there is no such folder, and it is not a name on the Hugging Face hub" in result.err


def test_what_the_hub_does_not_have_and_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, text in (
        (EntryNotFoundError("404"), "it has no config.json"),
        (LocalEntryNotFoundError("no network"), "could not be downloaded from the Hugging Face hub (no network)"),
    ):
        monkeypatch.setattr("llmkit.hf.folder.hf_hub_download", mock.Mock(side_effect=error))
        with pytest.raises(UserError, match=re.escape(text)):
            Source.of("hf:some/model").config()


def test_export(folder: Path, fitted: Result, tmp_path: Path) -> None:
    """What comes out is what went in, and a fine-tuned one has its figures in the model card."""
    done("import", f"hf:{folder}", tmp_path / "gpt2.ckpt")
    printed = done("export", tmp_path / "gpt2.ckpt", tmp_path / "out").out
    assert "GPT2LMHeadModel, vocabulary 58" in printed
    found, given = load_file(tmp_path / "out" / "model.safetensors"), hf_folder.weights()
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    done("export", fitted.folder, tmp_path / "tuned")
    card = (tmp_path / "tuned" / "README.md").read_text()
    results = json.loads((fitted.folder / "results.json").read_text())
    assert f"- val_loss: {results['val_loss']}" in card and "text.txt" in card and "licence" in card
    assert LanguageModel.published(f"hf:{tmp_path / 'tuned'}").context == 16
    result = llmkit("export", tmp_path / "gpt2.ckpt", tmp_path / "out")
    assert result.code == 2 and "File exists" in result.err


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({}, "rotary positions without rms norms and a gated feedforward (Llama has rms and swiglu)"),
        ({"attention": "lstm"}, "the attention lstm"),
        ({"feedforward": "swiglu", "position": "alibi"}, "the position alibi with the norm rms"),
        ({"feedforward": "swiglu", "norm_first": False}, "post-norms, embedding_norm, token_types or output_bias"),
        (
            {"feedforward": "swiglu", "attention": ["multi_head", {"name": "multi_head", "num_heads": 2}]},
            "layers whose",
        ),
        ({"position": "learned"}, "learned positions and this attention (GPT-2 has multi_head without qk_norm)"),
        ({"head": "masked_lm"}, "these norms or positions in an encoder"),
        ({"head": "regression"}, "the head regression as it is here"),
        ({"head": "translation"}, "the position rotary with the norm rms"),
        (
            {"attention": {"name": "multi_head", "qk_norm": False, "scale": 1.0}, "feedforward": "swiglu"},
            "a scale of scores, embedding_scale or output_scale in a network with one stack",
        ),
        ({"feedforward": "swiglu", "mup_base_dim": 8}, "the output multiplier of mup_base_dim"),
    ],
)
def test_what_transformers_does_not_have_is_an_architecture_of_our_own(
    parts: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = LanguageModel(**{"head": plugin("head", "generation"), "dim": 16, "num_layers": 2, "context": 16, **parts})
    model.tokenizer = plugin("tokenizer", "byte")()
    model.configure_model()
    part = section(model.spec, model.tokenizer, model.head, {})
    written = export(tmp_path / "out", part, model.state_dict(), model.tokenizer, "")
    assert written.reason is not None and written.reason.startswith(f"transformers has no architecture with {says}")
    assert written.architecture.startswith("LlmkitFor") and written.reason in (tmp_path / "out/README.md").read_text()
