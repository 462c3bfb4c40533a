"""Adapters in the format of peft: read, trained further, written, and refused; against peft itself where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_folder
import pytest
import torch
import transformers
from command import done, llmkit
from hf_models import CLASSIFIERS, DECODERS, save
from safetensors.torch import save_file
from torch import Tensor

from llmkit import LanguageModel, UserError, load
from llmkit.hf.start import settings_of
from llmkit.ops.lora import LoRA
from llmkit.run.saving import save_model
from llmkit.sequence import Sequence
from llmkit_plugins.head.classification import Classification

RANK, ALPHA = 3, 7.5
LAYER = "base_model.model.transformer.h.0"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_folder.write(tmp_path_factory.mktemp("hf") / "gpt2")


def weights() -> dict[str, Tensor]:
    """Adapters of the attention's fused map and of a map of the feedforward."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"attn.c_attn": (8, 24), "mlp.c_proj": (32, 8)}
    return {
        f"{LAYER}.{name}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for name, (inputs, outputs) in shapes.items()
        for half, shape in {"A": (RANK, inputs), "B": (outputs, RANK)}.items()
    }


def write(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """Write an adapter; a setting that is None is left out."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "alpha_pattern": {}, **changes}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    save_file(weights() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def logits(model: LanguageModel, ids: Tensor) -> Tensor:
    net = model.eval().network
    with torch.no_grad():
        return torch.nn.functional.linear(net.decode(ids, Sequence.of(ids)), net.output_weight_VD)


def test_an_adapter_is_merged(base: Path, tmp_path: Path) -> None:
    """W + alpha / rank * B A; GPT-2 stores W as (in, out). One map has an alpha of its own."""
    folder = write(tmp_path / "adapter", alpha_pattern={"mlp.c_proj": 1.5})
    done("import", f"hf:{base}", tmp_path / "merged.ckpt", "--adapter", folder)
    state, given, before = load(tmp_path / "merged.ckpt").state_dict(), weights(), hf_folder.weights()
    for ours, theirs, alpha in (("attention.qkv", "attn.c_attn", ALPHA), ("feedforward.out", "mlp.c_proj", 1.5)):
        a, b = (given[f"{LAYER}.{theirs}.lora_{half}.weight"] for half in "AB")
        expected = before[f"transformer.h.0.{theirs}.weight"].T + alpha / RANK * (b @ a)
        torch.testing.assert_close(state[f"net.decoder.0.{ours}.weight"], expected)
        assert torch.equal(state[f"net.decoder.1.{ours}.weight"], before[f"transformer.h.1.{theirs}.weight"].T)


def test_an_adapter_is_trained_further_and_written(base: Path, tmp_path: Path) -> None:
    """Of more columns and another scale than those that were read; what is written is read again."""
    folder, ids = write(tmp_path / "adapter"), torch.randint(50, (2, 9))
    merged = LanguageModel.published(f"hf:{base}", adapter=str(folder))
    text = tmp_path / "text.txt"
    text.write_text("ABC def GHI jkl\n" * 40)
    words = ("--data.train", text, "--trainer.max_steps", 1, "--trainer.accelerator", "cpu", "--output", tmp_path)
    lora = ("--model.lora", "{rank: 4, alpha: 2, targets: [attention, feedforward.out]}", "--model.adapter", folder)
    small = ("--data.batch_size", 2, "--trainer.limit_val_batches", 1, "--trainer.enable_progress_bar", "false")
    start = ("fit", "--model.init_from", f"hf:{base}", *words, *lora, *small)
    still = done(*start, "--model.optimizer.lr", "0")  # weights are the same after the step
    torch.testing.assert_close(logits(load(still.checkpoint), ids), logits(merged, ids), rtol=0, atol=1e-5)
    done("test", "--ckpt_path", still.checkpoint, "--data.test", text, *words[-2:], *small[:2])  # needs no folder
    assert "adapters of 6 linear maps" in done("export", still.checkpoint, tmp_path / "out", "--adapter").out
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base) and settings["rank_pattern"] == {"c_attn": 12}
    again = LanguageModel.published(f"hf:{base}", adapter=str(tmp_path / "out"))
    torch.testing.assert_close(logits(again, ids), logits(merged, ids), rtol=0, atol=1e-5)
    adapted = started(f"hf:{base}", tmp_path / "out", LoRA(5, 2, ["attention", "feedforward.out"]))
    torch.testing.assert_close(logits(adapted, ids), logits(merged, ids), rtol=0, atol=1e-5)


def started(base: str, adapter: Path, lora: LoRA) -> LanguageModel:
    """A model with the adapters of a folder, not merged."""
    model = LanguageModel(**settings_of(base, None)[0], init_from=base, adapter=str(adapter), lora=lora)
    assert model._initial is not None
    model.head.set_info(model._initial.part["head_info"])
    model.configure_model()
    return model


def changed(name: str, value: Tensor | None) -> dict[str, Tensor]:
    found = {**weights(), name: value}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "is of the type IA3; only LORA is supported"),
    "dora": ({"use_dora": True, "bias": "all"}, "has use_dora, bias, which is not supported"),
    "alpha": ({"lora_alpha": -1}, "has lora_alpha -1, which should be a number above 0"),
    "half": ({"tensors": changed(f"{LAYER}.attn.c_attn.lora_B.weight", None)}, "matrices A and B of h.0.attn.c_attn"),
    "embeddings": ({"tensors": changed("base_model.model.transformer.wte.lora_embedding_A", torch.ones(3, 2))}, "_A,"),
    "shape": (
        {"tensors": changed(f"{LAYER}.attn.c_attn.lora_A.weight", torch.ones(3, 5))},
        "adapts h.0.attn.c_attn of the shape (24, 5), the model has (24, 8)",
    ),
    "name": (
        {"tensors": {"base_model.model.x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}},
        "adapts x of the shape (2, 2), the model has no such map",
    ),
    "empty": ({"tensors": {}}, "has no adapters"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    changes, says = WRONG[case]
    folder = write(tmp_path / "adapter", **changes)
    result = llmkit("import", f"hf:{base}", tmp_path / "x.ckpt", "--adapter", folder)
    assert result.code == 2 and says in result.err and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora": LoRA(2, targets=["attention", "out"])}, "model.lora.rank: is 2, but "),
        ({"lora": LoRA(4)}, "model.lora.targets: leaves out decoder.0.feedforward.out, which "),
        ({"init_from": None}, "model.adapter: needs the model that it adapts: model.init_from: hf:NAME_OR_FOLDER"),
    ],
)
def test_what_does_not_fit_the_settings(settings: dict[str, Any], says: str, base: Path, tmp_path: Path) -> None:
    found = {**settings_of(f"hf:{base}", None)[0], "init_from": f"hf:{base}"}
    with pytest.raises(UserError) as raised:
        LanguageModel(**found | {"adapter": str(write(tmp_path / "adapter"))} | settings).configure_model()
    assert says in str(raised.value)


def test_only_a_checkpoint_with_adapters_gives_them(base: Path, tmp_path: Path) -> None:
    done("import", f"hf:{base}", tmp_path / "plain.ckpt")
    result = llmkit("export", tmp_path / "plain.ckpt", tmp_path / "out", "--adapter")
    assert result.code == 2 and "was trained without model.lora: it has no adapters" in result.err


PEFT: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "llama": (
        *DECODERS["llama"],
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"},
        ["attention.qkv", "out"],
    ),
    "gpt2": (
        *DECODERS["gpt2"],
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True, "task_type": "CAUSAL_LM"},
        ["qkv"],
    ),
    "bert": (
        *CLASSIFIERS["bert"],
        {"target_modules": ["query", "intermediate.dense"], "task_type": "SEQ_CLS"},
        ["attention", "feedforward.inner"],
    ),
}


@pytest.mark.parametrize("case", PEFT)
def test_peft_reads_and_writes_the_same(case: str, tmp_path: Path) -> None:
    """Its adapter merged, its adapter in ours, and ours in it, have the same outputs."""
    peft = pytest.importorskip("peft")
    name, sizes, config, targets = PEFT[case]
    base, ids = f"hf:{tmp_path / 'base'}", torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **config)
    theirs = peft.get_peft_model(save(tmp_path / "base", name, sizes), settings)
    for weight, parameter in theirs.named_parameters():
        if "lora_" in weight or "modules_to_save" in weight:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=ids).logits.detach()

    def equal(model: LanguageModel) -> None:
        if case == "bert":
            assert isinstance(model.eval().head, Classification)
            actual = model.head.scores(model.network, {"ids": ids})  # type: ignore[operator]
        else:
            actual = logits(model, ids)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))

    equal(LanguageModel.published(base, adapter=str(tmp_path / "theirs")))
    model = started(base, tmp_path / "theirs", LoRA(4, 2, targets))
    equal(model)
    save_model(model, tmp_path / "model.ckpt")
    equal(load(tmp_path / "model.ckpt"))
    done("export", tmp_path / "model.ckpt", tmp_path / "ours", "--adapter")
    plain = getattr(transformers, name).from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
