"""What is exported is what was loaded, bit for bit, and loads elsewhere; families of one's own too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dllm_rl.models import families
from dllm_rl.models.export import export
from dllm_rl.models.policy import load_policy
from dllm_rl.models.pretrained import PretrainedModel
from dllm_rl.models.tiny import build_tokenizer
from tests.conftest import make_policy
from tests.original_models import FAMILIES, write_checkpoint
from tests.test_cli import bad, good
from tests.test_families import logits_of, sequences

REPOSITORY = Path(__file__).parents[1]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_is_bit_identical(tmp_path: Path, family: str, dtype: torch.dtype, tied: bool) -> None:
    """Original, loaded, saved in our format, loaded, exported: the same tensors, configuration and tokenizer files."""
    weights = write_checkpoint(family, tmp_path / "original", shards=2, dtype=dtype, tied=tied)
    load_policy(str(tmp_path / "original")).save(tmp_path / "ours")
    good(tmp_path, "export", "model.path=ours", "output=exported", "format=original")
    assert same(tensors(tmp_path / "exported"), weights)
    names = {path.name for path in (tmp_path / "original").iterdir() if not path.name.startswith("model")}
    assert {"config.json", "tokenizer_config.json"} <= names
    for name in names - {"config.json"}:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "original" / name).read_bytes()
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("original", "exported"))
    assert after == before
    prompts, canvas = sequences(family)
    found = [logits_of(load_policy(str(tmp_path / name)), prompts, canvas) for name in ("original", "exported")]
    assert torch.equal(*found)


def restore(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Replaces the weights of a checkpoint of one file by what `change` makes of them."""
    weights = change(tensors(folder))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


HEADS = {"llada": ("model.transformer.wte.weight", "model.transformer.ff_out.weight")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_of_tied_embeddings_is_written_back(tmp_path: Path, family: str) -> None:
    """Qwen3-1.7B and what was made from it have `lm_head.weight` in their files although config.json ties it."""
    write_checkpoint(family, tmp_path / "original", tied=True)
    embeddings, head = HEADS.get(family, ("model.embed_tokens.weight", "lm_head.weight"))
    weights = restore(tmp_path / "original", lambda found: found | {head: found[embeddings].clone()})
    load_policy(str(tmp_path / "original")).save(tmp_path / "ours")
    good(tmp_path, "export", "model.path=ours", "output=exported", "format=original")
    assert same(tensors(tmp_path / "exported"), weights)
    restore(tmp_path / "original", lambda found: found | {head: found[embeddings] + 1})
    message = bad(tmp_path, "export", "model.path=original", "output=other")
    assert "model.path=original: config.json ties the output head" in message and "tie_word_embeddings" in message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_keeps_its_own_precision(tmp_path: Path, family: str) -> None:
    """Matrices in 16 bits with norms in 32."""
    write_checkpoint(family, tmp_path / "original")
    weights = restore(tmp_path / "original", lambda found: {
        name: tensor if tensor.ndim == 1 else tensor.bfloat16() for name, tensor in found.items()})
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16, torch.float32}
    good(tmp_path, "export", "model.path=original", "output=native")
    for name in ("original", "native"):
        good(tmp_path, "export", f"model.path={name}", f"output=from-{name}", "format=original")
        assert same(tensors(tmp_path / f"from-{name}"), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_format_keeps_the_stored_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint("llada", tmp_path / "original", dtype=dtype)
    good(tmp_path, "export", "model.path=original", "output=exported")
    assert {tensor.dtype for tensor in tensors(tmp_path / "exported").values()} == {dtype}
    good(tmp_path, "export", "model.path=original", "output=half", "model.dtype=float16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "half").values()} == {torch.float16}


def test_only_files_of_the_checkpoint_are_copied(tmp_path: Path) -> None:
    """The export lies inside the original's folder, among what people leave there."""
    original = tmp_path / "original"
    write_checkpoint("llada", original)
    for name in (".git/config", ".cache/huggingface/tokenizer.json", "sub/modeling.py", "modeling_llada.py.bak",
                 "model.gguf", "tokenizer.json.bak", "training.log", "pytorch_model.bin"):
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / name).write_text("left here")
    for name in ("modeling_llada.py", "LICENSE", "generation_config.json", "special_tokens_map.json"):
        (original / name).write_text("{}")
    good(tmp_path, "export", "model.path=original", "output=original/exported", "format=original")
    assert {path.name for path in (original / "exported").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modeling_llada.py",
        "LICENSE", "generation_config.json", "special_tokens_map.json"}


@pytest.mark.parametrize("way", ["another model at the path", "a folder of that name here"])
def test_files_of_another_model_are_not_copied(tmp_path: Path, way: str) -> None:
    write_checkpoint("dream", tmp_path / "base")
    good(tmp_path, "export", "model.path=base", "output=native")
    load_policy(str(tmp_path / "base")).save(tmp_path / "ours")
    (tmp_path / "base" / "strange.py").write_text("strange")
    if way == "another model at the path":
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "initializer_range": 0.03}))
    source = {"another model at the path": "ours", "a folder of that name here": "native"}[way]
    text = good(tmp_path, "export", f"model.path={source}", "output=exported", "format=original")
    assert "note: the tokenizer's files are as transformers writes them" in text
    assert not (tmp_path / "exported" / "strange.py").exists()
    load_policy(str(tmp_path / "exported"))


def test_files_of_a_base_on_the_hub_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network."""
    write_checkpoint("llada", tmp_path / "cache")
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, **more: asked.append((name, more)) or str(tmp_path / "cache"))
    text = good(tmp_path, "export", "model.path=owner/base", "output=exported", "format=original")
    assert asked[-1] == ("owner/base", {"local_files_only": True})
    exported, cached = (tmp_path / name / "tokenizer.json" for name in ("exported", "cache"))
    assert exported.read_bytes() == cached.read_bytes()
    assert "note: code that config.json names is not here: copy it from owner/base" in text


def test_shards(tmp_path: Path) -> None:
    weights = write_checkpoint("llada", tmp_path / "original")
    export(load_policy(str(tmp_path / "original")), tmp_path / "exported", "original", max_shard_size="20KB")
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 2
    assert same(tensors(tmp_path / "exported"), weights)
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    load_policy(str(tmp_path / "exported"))


def test_without_the_original_folder_the_tokenizer_is_written_anew(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path / "original")
    load_policy(str(tmp_path / "original")).save(tmp_path / "ours")
    (tmp_path / "original").rename(tmp_path / "moved")
    text = good(tmp_path, "export", "model.path=ours", "output=exported", "format=original")
    assert "note: the tokenizer's files are as transformers writes them" in text
    exported, moved = (load_policy(str(tmp_path / name)).tokenizer for name in ("exported", "moved"))
    assert exported.encode("x12") == moved.encode("x12")


def test_the_native_format_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    write_checkpoint("llada", tmp_path / "original")
    good(tmp_path, "export", "model.path=original", "output=exported")
    assert not [file for file in (tmp_path / "exported").iterdir() if str(tmp_path).encode() in file.read_bytes()]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ours = load_policy(str(tmp_path / "original")).network
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), ours.parameters(), strict=True))


def test_the_model_card(tmp_path: Path) -> None:
    write_checkpoint("dream", tmp_path / "base")
    steps = ("supervised.steps=1", "supervised.batch_size=2", "model=auto", "model.path=base")
    good(tmp_path, "sft", "task=sudoku", *steps, "run_dir=run")
    good(tmp_path, "evaluate", "task=sudoku", "model.path=run", "evaluation.num_prompts=2", "run_dir=evaluated")
    good(tmp_path, "export", "model.path=run", "output=exported", "results=evaluated")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "task `sudoku`" in card
    assert "| family | dream |" in card and "| base model | base |" in card and "| logit shift | 1 |" in card
    (row,) = [line for line in card.splitlines() if "| greedy/reward |" in line]
    found = json.loads((tmp_path / "evaluated" / "results.json").read_text())["sudoku"]["metrics"][0]
    assert f"| 2 | {found['value']:.3f} | {found['low']:.3f} to {found['high']:.3f} |" in row
    good(tmp_path, "train", "task=sudoku", "model=auto", "model.path=run", "trainer.steps=1", "trainer.prompts_per_step=1",
         "trainer.group_size=2", "trainer.eval_every=0", "likelihood.num_samples=2", "run_dir=trained")
    good(tmp_path, "export", "model.path=trained", "output=exported", "overwrite=true")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "algorithm `bgpo` on task `sudoku`" in card and "- bgpo" in card and "## Evaluation" not in card


def test_the_card_names_the_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llada", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path / "cache"))
    good(tmp_path, "export", "model=llada_8b", "model.dtype=float32", "output=exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "base_model: GSAI-ML/LLaDA-8B-Instruct\n" in card


def test_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llada", tmp_path / "original")
    calls: list[Any] = []

    class Api:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append((name, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return "https://there"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    text = good(tmp_path, "export", "model.path=original", "output=exported", "push=owner/name")
    assert "pushed: https://there" in text and calls[0] == ("owner/name", True)
    assert calls[1][0] == "owner/name" and {"README.md", "config.json", "model.safetensors"} <= set(calls[1][1])
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no token")))
    message = bad(tmp_path, "export", "model.path=original", "output=again", "push=owner/name")
    assert "push=owner/name: cannot be written on the hub (no token)" in message and (tmp_path / "again").is_dir()


ROW = {"metric": "reward", "n": 2, "value": 0.5, "low": 0.1, "high": 0.9}
WRONG_RESULTS = [[1, 2], {"sudoku": {"accuracy": 1.0}}, {"sudoku": {"metrics": [{"metric": "reward"}]}}, {"sudoku": 3}, 7,
                 {"sudoku": {"metrics": [{**ROW, "value": "high"}]}}, {"sudoku": {"metrics": [{**ROW, "low": None}]}}]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], ["output=None"]), (["output=there"], ["output=there: is there already", "overwrite=true"]),
    (["output=mine", "overwrite=true"], ["output=mine: holds no exported model"]),
    (["output=new", "format=gguf"], ["format=gguf: must be native or original"]),
    (["output=new", "results=nowhere.json"], ["results=nowhere.json"]),
    *((["output=new", f"results=wrong/{number}.json"], [f"results=wrong/{number}.json: must be a results.json of dllm-rl"])
      for number in range(len(WRONG_RESULTS))),
    (["output=afile/sub"], ["output=afile/sub: must be a folder to write: ", "afile is a file"]),
    (["output=afile/sub/deep"], ["output=afile/sub/deep: must be a folder to write"]),
    (["output=new", "model.path=tiny", "format=original"], ["format=original: must be native"]),
    (["output=new", "model.lora.r=2"], ["model.lora.r=2: must be 0"]),
])
def test_mistakes_leave_nothing(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    write_checkpoint("llada", tmp_path / "original")
    make_policy(torch.float32).save(tmp_path / "tiny")
    good(tmp_path, "export", "model.path=original", "output=there")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "novel.txt").write_text("chapter one")
    (tmp_path / "afile").write_text("a file")
    (tmp_path / "wrong").mkdir()
    for number, content in enumerate(WRONG_RESULTS):
        (tmp_path / "wrong" / f"{number}.json").write_text(json.dumps(content))
    before = sorted(path for path in tmp_path.rglob("*"))
    message = bad(tmp_path, "export", "model.path=original", *arguments)
    assert all(word in message for word in words), message
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llada", tmp_path / "original")
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dllm_rl.models.export.save_torch_state_dict", full)
    message = bad(tmp_path, "export", "model.path=original", "output=new", "format=original")
    assert "output=new: cannot be written" in message and "No space left" in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_family_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/examples/my_family.py, with a checkpoint in its format."""
    page, file = REPOSITORY / "docs" / "add_a_family.md", REPOSITORY / "docs" / "examples" / "my_family.py"
    assert file.read_text() in page.read_text()
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    config = {"architectures": ["PebbleForMaskedDiffusion"], "vocab": 384, "dim": 16, "ffn_dim": 24, "depth": 2, "heads": 2,
              "context": 128}
    shapes = {"tokens": (384, 16), "norm": (16,), "logits": (384, 16)}
    for n in range(2):
        shapes |= {f"layers.{n}.{name}": shape for name, shape in {
            "norm_attention": (16,), "norm_ffn": (16,), "attention.query": (16, 16), "attention.key": (16, 16),
            "attention.value": (16, 16), "attention.out": (16, 16), "ffn.gate": (24, 16), "ffn.up": (24, 16),
            "ffn.down": (16, 24)}.items()}
    folder = tmp_path / "pebble"
    build_tokenizer([]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    assert "the architecture PebbleForMaskedDiffusion" in bad(tmp_path, "export", "model.path=pebble", "output=out")
    plug = f"plugins=[{file}]"
    good(tmp_path, "sft", plug, "task=sudoku", "model=auto", "model.path=pebble", "supervised.steps=1", "run_dir=run",
         "model.lora.r=2")
    good(tmp_path, "evaluate", plug, "task=sudoku", "model=auto", "model.path=run", "evaluation.num_prompts=2",
         "run_dir=evaluated")
    good(tmp_path, "export", plug, "model.path=pebble", "output=out", "format=original")
    assert same(tensors(tmp_path / "out"), weights)
    message = bad(tmp_path, "export", plug, "model.path=pebble", "output=other", "model.block_length=4")
    assert "the family pebble: it is not block-causal" in message


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml")))
def test_every_named_model_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its checkpoint is stood in for by a tiny one of its family."""
    family = "llada" if "llada" in name else "sdar" if name.startswith(("sdar", "trado")) else "dream"
    write_checkpoint(family, tmp_path / "cache")
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda path, **_: asked.append(path) or str(tmp_path / "cache"))
    built: list[Any] = []
    real = PretrainedModel.build
    monkeypatch.setattr(PretrainedModel, "build", lambda self, *rest: built.append(real(self, *rest)) or built[-1])
    good(tmp_path, "generate", f"model={name}", "task=sudoku", "count=1")
    assert asked[0].count("/") == 1 and built[0].rules.family == family
    assert {parameter.dtype for parameter in built[0].network.parameters()} == {torch.bfloat16}
    # Tokenizers of base models come with a template as well, for turns that the models were never trained on.
    assert built[0].chat == ("base" not in name)
