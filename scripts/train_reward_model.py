"""Trains a reward model: a sequence classifier on the weights of a policy, from a file of scored completions.

The loss is binary cross-entropy, so rewards are taken as probabilities of being right (0 to 1), and the model is used with
`reward=learned reward.path=DIR reward.activation=sigmoid`. One prompt in eight is held out to measure it.

    scripts/train_reward_model --data scored.jsonl --model outputs/sft-sudoku-tiny-seed0 --out reward_model
    dllm-rl train algorithm=ppo task=sudoku model.path=outputs/sft-sudoku-tiny-seed0 reward=learned \\
        reward.path=reward_model reward.activation=sigmoid
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from dllm_rl.errors import UserError
from dllm_rl.models.reward_model import encode
from dllm_rl.rows import load_placed_rows
from dllm_rl.run_folder import resolve_model_path


def held_out(prompt: str) -> bool:
    """One prompt in eight, decided by its text alone (the salt: the generated tasks split themselves by the bare hash)."""
    return zlib.crc32(b"reward model" + prompt.encode()) % 8 == 0


def encoded(rows: list[Any], tokenizer: Any) -> datasets.Dataset:
    """Prompts and completions the way `reward=learned` reads them, with their rewards."""
    prompts, completions = ([row[name] for row in rows] for name in ("prompt", "completion"))
    return datasets.Dataset.from_dict({
        **encode(tokenizer, prompts, completions), "labels": [[float(row["reward"])] for row in rows],
    })


def figures(prediction: Any) -> dict[str, float]:
    """Accuracy at one half, and the share of (right, wrong) pairs that are ranked rightly."""
    score, right = prediction.predictions.squeeze(-1), prediction.label_ids.squeeze(-1) > 0.5
    pairs = score[right][:, None] - score[~right][None, :]
    ranked = float(((pairs > 0) + 0.5 * (pairs == 0)).mean()) if pairs.size else float("nan")
    return {"accuracy": float(((score > 0) == right).mean()), "majority": float(max(right.mean(), 1 - right.mean())),
            "ranked": ranked, "n": float(numpy.size(right))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file with columns prompt, completion, reward (0 to 1)")
    parser.add_argument("--model", required=True, help="the policy it starts from: run folder, checkpoint or hub name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the reward model")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    logging.set_verbosity_error()  # a new head is what is wanted, no cause for a warning
    logging.disable_progress_bar()
    set_seed(options.seed)
    try:
        rows = [row for _, row in load_placed_rows(options.data, "train", ("prompt", "completion", "reward"), key="--data")]
        path = resolve_model_path(options.model)
    except UserError as error:
        parser.error(str(error))
    if not all(0 <= float(row["reward"]) <= 1 for row in rows):
        parser.error(f"--data {options.data}: rewards must lie from 0 to 1")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, problem_type="multi_label_classification")
    model.config.pad_token_id = tokenizer.pad_token_id
    kept = [row for row in rows if not held_out(row["prompt"])]
    tested = [row for row in rows if held_out(row["prompt"])]
    if not kept or not tested:
        parser.error(f"--data {options.data}: has too few prompts to hold one in eight out")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, num_train_epochs=options.epochs, per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=256, learning_rate=options.lr, lr_scheduler_type="cosine", warmup_steps=20,
            logging_steps=20, save_strategy="no", report_to="none", disable_tqdm=True, seed=options.seed,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model, arguments, train_dataset=encoded(kept, tokenizer), eval_dataset=encoded(tested, tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=figures,
        )
        trainer.train()
        result = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"held out: {int(result['n'])} completions, accuracy {result['accuracy']:.3f} "
          f"(majority {result['majority']:.3f}), pairs ranked rightly {result['ranked']:.3f}\nreward model: {options.out}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
