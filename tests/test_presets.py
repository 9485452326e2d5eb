"""Every algorithm preset composes and trains, every likelihood and objective can be swapped, and the papers are indexed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.test_cli import dllm, good

REPOSITORY = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (REPOSITORY / "conf" / "algorithm").glob("*.yaml"))
NAMED = {
    "bgpo", "vrpo_ol", "diffu_grpo", "coupled_grpo", "unigrpo", "wd1", "spg", "espo", "gdpo", "agrpo", "justgrpo", "grpo",
    "dppo_tv", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl", "drpo", "spo", "reinforce",
}
SMALL = ("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "supervised.steps=200",
         "supervised.batch_size=32")
QUICK = ("task=word_problems", "trainer.steps=1", "trainer.prompts_per_step=8", "trainer.group_size=8",
         "trainer.eval_every=0")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen a few demonstrations: its rewards vary, so that there is something to learn from."""
    folder = tmp_path_factory.mktemp("start")
    good(folder, "sft", "task=word_problems", *SMALL, "run_dir=start")
    return folder / "start"


def last(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_all_named_presets_are_there() -> None:
    assert set(PRESETS) >= NAMED


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_one_step(start: Path, tmp_path: Path, name: str) -> None:
    good(tmp_path, "train", f"algorithm={name}", f"model.path={start}", *QUICK, "run_dir=run")
    metrics = last(tmp_path / "run")
    assert metrics["update/sequences"] > 0 and metrics["grad/norm"] > 0
    assert metrics["loss"] == metrics["loss"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_its_paper(name: str) -> None:
    text = (REPOSITORY / "conf" / "algorithm" / f"{name}.yaml").read_text()
    assert "arXiv" in text or "Williams 1992" in text
    assert f"`{name}`" in (REPOSITORY / "docs" / "paper_index.md").read_text()


@pytest.mark.parametrize("swap", [
    ["algorithm=diffu_grpo", "likelihood=elbo", "likelihood.num_samples=2"],
    ["algorithm=spg", "likelihood=coupled"],
    ["algorithm=justgrpo", "objective=bgpo", "likelihood.num_samples=5"],
    ["algorithm=espo", "objective=bgpo"],
    ["algorithm=bgpo", "likelihood=trajectory", "advantage.kind=leave_one_out", "trainer.gradient_cosine=true"],
    ["algorithm=dppo_topk_kl", "objective.divergence=exact_kl", "trainer.inner_updates=2"],
    ["algorithm=bgpo", "objective.chunk=2", "likelihood.num_samples=4", "trainer.inner_updates=2"],
])
def test_parts_can_be_swapped(start: Path, tmp_path: Path, swap: list[str]) -> None:
    good(tmp_path, "train", *swap, f"model.path={start}", *QUICK, "run_dir=run")
    metrics = last(tmp_path / "run")
    assert metrics["grad/norm"] > 0
    assert ("grad/cosine" in metrics) == ("trainer.gradient_cosine=true" in swap)


def test_diagnostics_are_logged(start: Path, tmp_path: Path) -> None:
    good(tmp_path, "train", "algorithm=dppo_tv", f"model.path={start}", *QUICK, "trainer.inner_updates=2", "run_dir=run",
         "optimizer.lr=1e-2", "optimizer.warmup_steps=0")
    metrics = last(tmp_path / "run")
    for name in ("elbo/mean", "elbo/std", "elbo/high_mask", "delta/mean_abs", "delta/std", "delta/max_abs", "bound/gap",
                 "ratio/low_mask/p50", "ratio/high_mask/p95", "divergence/mid_mask/p95", "objective/clipped"):
        assert name in metrics
    assert metrics["delta/max_abs"] > 0 and metrics["bound/gap"] > 0 and metrics["divergence/mid_mask/p95"] > 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["objective.chunk=3"], ["objective.chunk=3", "a divisor of likelihood.num_samples=16"]),
    (["likelihood=coupled", "likelihood.num_samples=3"], ["likelihood.num_samples=3", "a multiple of 2"]),
    (["likelihood.num_samples=1", "trainer.gradient_cosine=true"], ["trainer.gradient_cosine=True", "num_samples=1"]),
    (["algorithm=dppo", "task=sudoku"], ["algorithm/dppo", "dppo_tv"]),
    (["objective=dppo", "objective.divergence=tv"], ["objective.divergence=tv", "binary_tv", "exact_kl"]),
    (["advantage.kind=rank"], ["advantage.kind=rank", "group_standardised", "z_score"]),
    (["objective.clip=0.1"], ["objective.clip", "clip_low", "clip_high"]),
])
def test_bad_combinations_end_with_one_line(start: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = dllm(tmp_path, "train", *QUICK, f"model.path={start}", *arguments, "run_dir=run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_continued_run_keeps_its_reference(start: Path, tmp_path: Path) -> None:
    more = ("train", "algorithm=grpo", *QUICK, "run_dir=run")
    good(tmp_path, *more, f"model.path={start}")
    moved = tmp_path / "elsewhere"
    shutil.copytree(start, moved)
    refused = dllm(tmp_path, *more, f"model.path={moved}", "resume=auto", "trainer.steps=2")
    assert refused.returncode == 2 and "model.path was" in refused.stderr
    good(tmp_path, *more, f"model.path={start}", "resume=auto", "trainer.steps=2")
    assert last(tmp_path / "run")["step"] == 2


def commands() -> list[str]:
    """The commands of the paper index."""
    lines = (REPOSITORY / "docs" / "paper_index.md").read_text().splitlines()
    return [line for line in lines if line.startswith("dllm-rl train ")]


@pytest.mark.parametrize("command", commands())
def test_the_commands_of_the_paper_index_compose(tmp_path: Path, command: str) -> None:
    text = good(tmp_path, *command.split()[1:], "--cfg", "job")
    assert "objective:" in text


def test_the_commands_cover_every_preset() -> None:
    named = {word.removeprefix("algorithm=") for command in commands() for word in command.split() if "algorithm=" in word}
    families = {"dppo_kl", "dppo_topk_tv"}  # shown with another member of their family
    assert named | families >= set(PRESETS)
