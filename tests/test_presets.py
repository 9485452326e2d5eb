"""Every algorithm preset composes and trains, every likelihood and objective can be swapped, and the papers are indexed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.test_cli import dllm, good

REPOSITORY = Path(__file__).parents[1]
PRESETS = sorted(path.stem for path in (REPOSITORY / "conf" / "algorithm").glob("*.yaml"))
NAMED = {
    "bgpo", "vrpo_ol", "diffu_grpo", "coupled_grpo", "unigrpo", "wd1", "spg", "espo", "gdpo", "agrpo", "justgrpo", "grpo",
    "dppo_tv", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl", "drpo", "spo", "reinforce", "ppo", "tracerl", "rpo", "dro", "kto",
    "vrpo", "sft",
}
FROM_FILES = ("rpo", "dro", "kto", "vrpo", "sft")
CRITICS = {"ppo", "tracerl", "dro"}
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


@pytest.fixture(scope="module")
def scored(start: Path) -> Path:
    """A file of scored completions of that model."""
    path = start.parent / "scored.parquet"
    good(start.parent, "rollout", "task=word_problems", f"model.path={start}", f"output={path}", "num_prompts=8")
    return path


def last(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_all_named_presets_are_there() -> None:
    assert set(PRESETS) >= NAMED


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_one_step(start: Path, scored: Path, tmp_path: Path, name: str) -> None:
    source = [f"data={scored}"] if name in FROM_FILES else []
    text = good(tmp_path, "train", f"algorithm={name}", f"model.path={start}", *source, *QUICK, "run_dir=run")
    metrics = last(tmp_path / "run")
    assert metrics["update/sequences"] > 0 and metrics["grad/norm"] > 0
    assert metrics["loss"] == metrics["loss"]
    assert ("critic/loss" in metrics) == (name in CRITICS)
    assert ("rollout/unique" in metrics) == (name not in FROM_FILES) == ("data: " not in text)
    saved = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-000001").iterdir()}
    assert ("critic.safetensors" in saved) == (name in CRITICS)


@pytest.mark.parametrize("name", ["dro", "kto"])
def test_official_variants_train_and_differ(start: Path, scored: Path, tmp_path: Path, name: str) -> None:
    for variant in ("canonical", "official"):
        good(tmp_path, "train", f"algorithm={name}", f"variant={variant}", f"model.path={start}", f"data={scored}", *QUICK,
             "trainer.steps=2", "optimizer.warmup_steps=0", "optimizer.lr=1e-2", f"run_dir={variant}")
    canonical, official = (yaml.safe_load((tmp_path / variant / "config.yaml").read_text())
                           for variant in ("canonical", "official"))
    assert (canonical["objective"]["log_ratio"], official["objective"]["log_ratio"]) == ("sum", "mean")
    assert canonical["objective"].get("reference_point") != "matched"
    assert (official["critic"]["trunk"] == "shared") == (name == "dro")
    assert last(tmp_path / "canonical")["loss"] != last(tmp_path / "official")["loss"]


@pytest.mark.parametrize("settings", [
    ["algorithm=ppo", "critic.mdp=bandit", "likelihood=elbo", "likelihood.num_samples=2"],
    ["algorithm=ppo", "critic.trunk=shared", "trainer.group_size=1", "trainer.prompts_per_step=64"],
    ["algorithm=ppo", "critic.mdp=none", "advantage.kind=z_score", "trainer.group_size=1", "trainer.prompts_per_step=64"],
    ["algorithm=bgpo", "critic.mdp=bandit", "likelihood.num_samples=2", "kl_reward.coef=0.1", "kl_reward.target=1.0"],
    ["algorithm=drpo", "critic.mdp=trajectory", "likelihood=elbo", "likelihood.num_samples=2"],
    ["algorithm=reinforce", "kl_reward.coef=0.1", "likelihood.num_samples=2"],
    ["algorithm=rpo", "likelihood.num_samples=2", "offline.rewards=raw"],  # the offline objectives take rollouts too
])
def test_critics_and_penalties_combine_with_other_parts(start: Path, tmp_path: Path, settings: list[str]) -> None:
    good(tmp_path, "train", f"model.path={start}", *QUICK, *settings, "run_dir=run")
    metrics = last(tmp_path / "run")
    assert metrics["grad/norm"] > 0
    assert ("kl_reward/coef" in metrics) == any("kl_reward" in word or word == "algorithm=ppo" for word in settings)
    assert "rollout/unique" in metrics


def test_a_run_from_a_file_continues(start: Path, scored: Path, tmp_path: Path) -> None:
    more = ("train", "algorithm=dro", f"model.path={start}", f"data={scored}", *QUICK, "trainer.prompts_per_step=4")
    good(tmp_path, *more, "trainer.steps=2", "run_dir=whole")
    good(tmp_path, *more, "trainer.steps=1", "run_dir=half", "optimizer.schedule=constant_with_warmup")
    good(tmp_path, *more, "trainer.steps=2", "run_dir=half", "optimizer.schedule=constant_with_warmup", "resume=auto")
    rows = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    refused = dllm(tmp_path, *more, "trainer.steps=3", "run_dir=whole", "resume=auto", "critic.trunk=shared")
    assert refused.returncode == 2 and "critic.trunk was separate and is shared" in refused.stderr


def test_what_is_skipped_is_listed_in_the_run_folder(start: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Ann", "completion": "3", "reward": reward} for reward in (0, 1, None)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("train", "algorithm=vrpo", f"model.path={start}", "data=mine.jsonl", *QUICK, "run_dir=run")
    refused = dllm(tmp_path, *arguments)
    assert refused.returncode == 2 and "mine.jsonl:3: has no `reward`" in refused.stderr
    assert not (tmp_path / "run").exists()
    text = good(tmp_path, *arguments, "offline.bad_rows=skip")
    assert "2 completions of 1 prompts" in text and "1 rows or groups left out, see skipped.jsonl" in text
    skipped = json.loads((tmp_path / "run" / "skipped.jsonl").read_text())
    assert skipped["place"] == "mine.jsonl:3" and "has no `reward`" in skipped["reason"]


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
    (["variant=official"], ["variant=official", "canonical with algorithm=bgpo", "dro, kto"]),
    (["critic.mdp=trajectory"], ["critic.mdp=trajectory", "bandit or none with objective=bgpo"]),
    (["algorithm=dro", "critic.mdp=none"], ["critic.mdp=none", "bandit with objective=dro"]),
    (["algorithm=dro", "critic.whiten=true"], ["critic.whiten=True", "r - V"]),
    (["algorithm=rpo", "critic.mdp=bandit"], ["critic.mdp=bandit", "none with objective=rpo"]),
    (["algorithm=kto", "kl_reward.coef=0.1"], ["kl_reward.coef=0.1", "0 with objective=kto"]),
    (["algorithm=wd1", "trainer.group_size=1"], ["trainer.group_size=1", "compared within a group"]),
    (["algorithm=kto", "trainer.prompts_per_step=1"], ["trainer.prompts_per_step=1", "two prompts"]),
    (["trainer.group_size=1"], ["trainer.group_size=1", ">= 2 with objective=bgpo: rewards are compared"]),
    (["algorithm=rpo", "offline.rewards=raw", "trainer.group_size=1"], ["trainer.group_size=1", "whatever its reward"]),
    (["data=nowhere.jsonl"], ["data=nowhere.jsonl", "null with objective=bgpo", "rpo, dro, kto"]),
    (["algorithm=rpo", "data=nowhere.jsonl"], ["data=nowhere.jsonl", "cannot be read"]),
    (["algorithm=sft", "data=nowhere.jsonl", "likelihood=trajectory"], ["likelihood=trajectory", "in which order"]),
    (["algorithm=dro", "data=no.jsonl", "critic.mdp=trajectory"], ["critic.mdp=trajectory", "bandit with objective=dro"]),
    (["algorithm=reinforce", "data=no.jsonl", "critic.mdp=trajectory"], ["critic.mdp=trajectory", "in which order"]),
    (["algorithm=kto"], ["offline.rewards=standardised", "raw without data=FILE"]),
    (["algorithm=kto", "data=no.jsonl", "reward=learned"], ["reward=learned", "rollout data=FILE"]),
    (["algorithm=kto", "offline.rewards=raw", "likelihood=trajectory"], ["likelihood=trajectory", "no trajectory"]),
    (["algorithm=ppo", "likelihood.steps_per_slice=8"], ["critic.steps_per_slice=1", "likelihood.steps_per_slice=8"]),
    (["algorithm=ppo", "likelihood.length_norm=canvas"], ["likelihood.length_norm=canvas", "kl_reward"]),
    (["algorithm=sft", "likelihood.length_norm=canvas"], ["likelihood.length_norm=canvas", "objective.aggregation"]),
    (["reward=learned"], ["reward.path=None", "sequence-classification model"]),
    (["reward=learned", "reward.path=./nowhere"], ["reward.path=./nowhere", "no such folder"]),
    (["reward=learned", "reward.activation=tanh"], ["reward.activation=tanh", "sigmoid"]),
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
