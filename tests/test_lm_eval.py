"""lm-eval's questions: against enumeration with the plain network, the sampler itself, and accuracy by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from dllm_rl import harness
from dllm_rl.diffusion.enumeration import Enumeration
from dllm_rl.diffusion.sampler import LowConfidence, reproduces
from dllm_rl.errors import UserError
from dllm_rl.lm_eval_model import ESTIMATORS, MaskedDiffusionLM
from dllm_rl.models.families import Rules
from dllm_rl.models.policy import Policy
from dllm_rl.types import PromptBatch
from tests.conftest import make_policy
from tests.test_corruption import EOS, MASK, TableDenoiser, exact_elbo, many
from tests.test_estimators import draw, estimates

PAIRS = [("Q: 1+1? A:", " 2"), ("Q: 1+1? A:", " 11"), ("", "abc"), ("a longer context with words. ", "yes"), ("x", " no!"),
         ("Q: 1+1? A:", " eleven"), ("Colour of the sky:", " deep blue"), ("x", ""), ("ab", "cdefg")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_policy(torch.float32).save(path)
    return path


@pytest.fixture
def make(folder: Path) -> Callable[..., MaskedDiffusionLM]:
    """The adapter in float64, with other arguments where a test gives them."""
    return lambda **arguments: MaskedDiffusionLM(str(folder), **{"dtype": "float64", "device": "cpu", **arguments})


def ask(lm: MaskedDiffusionLM, question: str, *requests: tuple[Any, ...]) -> list[Any]:
    instances = [Instance(question, {}, arguments, 0) for arguments in requests]  # type: ignore[arg-type]
    answers: list[Any] = getattr(lm, question)(instances, disable_tqdm=True)
    return answers


def enumerated(policy: Policy, prompt: list[int], target: list[int]) -> float:
    """The exact ELBO, a mask at a time through the plain network."""
    length, total = len(target), 0.0
    for k in range(1, length + 1):
        for hidden in combinations(range(length), k):
            canvas = [policy.mask_id if place in hidden else token for place, token in enumerate(target)]
            with torch.no_grad():
                logits = policy.network(input_ids=torch.tensor([prompt + canvas])).logits[0, len(prompt):].double()
            logits[:, policy.mask_id] = -torch.inf
            logps = logits.log_softmax(-1)
            total += sum(logps[place, target[place]].item() for place in hidden) / (k * comb(length, k))
    return total


def by_hand(lm: MaskedDiffusionLM, context: str, continuation: str) -> float:
    """The tiny tokenizer has one token per character; white space at the end of the context goes with the continuation."""
    encode, kept = lm.tokenizer.encode, context.rstrip()
    return enumerated(lm.policy, encode(kept), encode(context[len(kept):] + continuation))


def test_short_continuations_have_the_exact_elbo(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make()
    short = [pair for pair in PAIRS if len("".join(pair)) - len(pair[0].rstrip()) <= 4]
    assert len(short) == 6
    for pair, (value, _) in zip(short, ask(lm, "loglikelihood", *short), strict=True):
        assert value == pytest.approx(by_hand(lm, *pair), abs=1e-6), pair


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_over_seeds_is_the_exact_elbo(make: Callable[..., MaskedDiffusionLM], name: str) -> None:
    lm = make(likelihood=name, num_samples=24)
    found = []
    for lm.seed in range(60):
        found += [value for value, _ in ask(lm, "loglikelihood", ("ab", " cdef"), ("ab", "cdefg"))]
    values = torch.tensor(found, dtype=torch.float64).view(60, 2)
    exact = torch.tensor([by_hand(lm, "ab", " cdef"), by_hand(lm, "ab", "cdefg")], dtype=torch.float64)
    bias = 1e-3 * 30 if name == "bernoulli" else 0.0  # of the order of its least mask ratio
    assert ((values.mean(0) - exact).abs() < 4 * values.std(0) / 60**0.5 + bias).all()
    assert (values.std(0) > 1e-3).all()


def test_enumeration_is_exact_and_starts_where_it_costs_no_more(make: Callable[..., MaskedDiffusionLM]) -> None:
    pair = ("ab", "cdefg")
    lm = make(num_samples=31)
    exact = by_hand(lm, *pair)
    assert ask(lm, "loglikelihood", pair)[0][0] == pytest.approx(exact, abs=1e-6)
    assert abs(ask(make(num_samples=30), "loglikelihood", pair)[0][0] - exact) > 1e-4


def test_enumeration_against_a_table() -> None:
    model, ids = TableDenoiser(4), [2, 4, EOS, EOS]
    found = estimates(model, Enumeration(num_samples=15), many(ids, 2))
    assert found.tolist() == pytest.approx([exact_elbo(model, ids, 4)] * 2, rel=1e-12)
    hidden = [tuple((draw(Enumeration(num_samples=15), many(ids, 1), j).canvas[0] == MASK).tolist()) for j in range(15)]
    assert len(set(hidden)) == 15 and (False,) * 4 not in hidden


def close(a: list[tuple[float, bool]], b: list[tuple[float, bool]]) -> bool:
    return all(x == pytest.approx(y, abs=1e-6) and u is v for (x, u), (y, v) in zip(a, b, strict=True))


def test_nothing_but_the_request_changes_an_answer(make: Callable[..., MaskedDiffusionLM]) -> None:
    whole = ask(make(), "loglikelihood", *PAIRS)
    for batch_size in (1, 3):
        assert close(ask(make(batch_size=batch_size), "loglikelihood", *PAIRS), whole)
    assert close(ask(make(), "loglikelihood", *PAIRS[::-1])[::-1], whole)
    assert close([ask(make(), "loglikelihood", pair)[0] for pair in PAIRS], whole)
    assert not close(ask(make(seed=1), "loglikelihood", *PAIRS), whole)


def test_the_choices_of_a_question_share_their_masks(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make(num_samples=4)
    seen: list[Tensor] = []
    logps_of = lm.policy.logps

    def spy(prompts: PromptBatch, canvas: Tensor, positions: Tensor, *more: Any) -> Tensor:
        seen.append(positions)
        return logps_of(prompts, canvas, positions, *more)

    lm.policy.logps = spy  # type: ignore[method-assign]
    ask(lm, "loglikelihood", ("Q", " first"), ("Q", " other"), ("R", " other"))
    masks = [call for call in seen if not call.all()]
    assert masks and all(torch.equal(call[0], call[1]) for call in masks)
    assert not all(torch.equal(call[1], call[2]) for call in masks)


def test_empty_requests(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make()
    assert ask(lm, "loglikelihood", ("x", ""), ("", "")) == [(0.0, True), (0.0, True)]
    assert ask(lm, "loglikelihood") == [] and ask(lm, "generate_until") == []


def test_half_precision_is_close(make: Callable[..., MaskedDiffusionLM]) -> None:
    half, full = make(dtype="bfloat16"), make()
    assert half.policy.network.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in half.policy.network.buffers()} == {torch.float32}, "positions lose nothing"
    requests = [("a" * 200, " bcd"), ("Q:", " yes!")]
    found, expected = (torch.tensor([value for value, _ in ask(lm, "loglikelihood", *requests)]) for lm in (half, full))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


# is_greedy -----------------------------------------------------------------------------------------------------------

def test_greedy_is_what_the_sampler_decodes(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make()
    letters = torch.tensor([lm.tokenizer.encode(letter)[0] for letter in "abcdefghij "])
    logits_of = lm.policy.logits

    def only_letters(prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        """An untrained model decodes padding and bytes, which no text can spell."""
        logits = logits_of(prompts, canvas, positions)
        return torch.full_like(logits, -torch.inf).index_copy(1, letters, logits[:, letters])

    lm.policy.logits = only_letters  # type: ignore[method-assign]
    contexts = [f"{word}!" for word in ("one", "two", "three", "four", "five", "six")]
    rows = [direct(lm, context, 5, block_length=5, denoising_steps=5) for context in contexts]
    pairs = [(context, lm.tokenizer.decode(row)) for context, row in zip(contexts, rows, strict=True)]
    assert len({text for _, text in pairs}) > 1
    changed = [(context, text[:-1] + ("a" if text[-1] != "a" else "b")) for context, text in pairs]
    longer = [(context, text + text[-1]) for context, text in pairs]
    greedy = [flag for _, flag in ask(lm, "loglikelihood", *pairs, *changed)]
    assert greedy == [True] * len(pairs) + [False] * len(pairs)
    flags = [flag for _, flag in ask(lm, "loglikelihood", *longer)]
    six = [direct(lm, context, 6, block_length=6, denoising_steps=6) for context in contexts]
    assert flags == [lm.tokenizer.encode(text) == row for (_, text), row in zip(longer, six, strict=True)]


def test_every_wrong_place_is_found_and_wrong_rows_cost_nothing_more(policy: Policy) -> None:
    prompts = policy.encode_prompts(["q" * (1 + row % 3) for row in range(8)], torch.arange(8))
    decoded = LowConfidence(6, 6, temperature=0).sample(policy, prompts, 6, seed=0, step=0)
    rows: list[int] = []
    logits_of = policy.logits

    def spy(prompts: PromptBatch, canvas: Tensor, positions: Tensor) -> Tensor:
        rows.append(len(canvas))
        return logits_of(prompts, canvas, positions)

    policy.logits = spy  # type: ignore[method-assign]
    assert reproduces(policy, prompts, decoded.ids).all() and rows == [8] * 6
    for place in range(6):
        wrong = decoded.ids.clone()
        wrong[::2, place] = (wrong[::2, place] + 1) % 50 + 10
        rows.clear()
        assert reproduces(policy, prompts, wrong).tolist() == [False, True] * 4
        found = decoded.unmask_step[::2, place]  # the step in which each wrong row shows it
        assert rows == [4 + int((found >= step).sum()) for step in range(6)]
    rows.clear()
    assert not reproduces(policy, prompts, decoded.ids % 50 + 10).any()
    assert rows == [8]


# Tokens --------------------------------------------------------------------------------------------------------------

def test_a_token_over_the_border_is_split(tmp_path: Path) -> None:
    """With 12 as one token, `1` is no prefix of `12`: lm-eval's rule would leave nothing of the continuation."""
    from dllm_rl.models.tiny import TinyModel
    TinyModel(hidden_size=16, num_layers=1, num_heads=2).build(["12"], seed=0).save(tmp_path)
    lm = MaskedDiffusionLM(str(tmp_path), dtype="float64", device="cpu")
    names = lm.tokenizer.convert_ids_to_tokens
    assert [names(part) for part in lm._encode_pair("1", "2")] == [["1"], ["2"]]
    assert [names(part) for part in lm._encode_pair("1 \n", "12")] == [["1"], [" ", "\n", "12"]]
    assert [names(part) for part in lm._encode_pair(" ", "12")] == [[], [" ", "12"]]
    expected = enumerated(lm.policy, lm.tokenizer.encode("1"), lm.tokenizer.encode("2"))
    assert ask(lm, "loglikelihood", ("1", "2"))[0][0] == pytest.approx(expected, abs=1e-6)


def with_bos(folder: Path, template: str | None = None) -> MaskedDiffusionLM:
    """A model whose tokenizer starts every text with [UNK], and has a chat template."""
    policy = make_policy(torch.float32)
    tokenizer = policy.tokenizer
    tokenizer.bos_token, tokenizer.chat_template = "[UNK]", template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", tokenizer.unk_token_id)])
    policy.save(folder)
    return MaskedDiffusionLM(str(folder), dtype="float64", device="cpu")


def test_a_beginning_token_is_there_once(tmp_path: Path) -> None:
    lm = with_bos(tmp_path)
    bos, ab = lm.tokenizer.bos_token_id, lm.tokenizer.encode("ab", add_special_tokens=False)
    assert lm._encode_pair("", "ab") == ([bos], ab)
    assert lm._encode_pair("a", "b") == ([bos, ab[0]], ab[1:])
    assert lm._encode_pair("[UNK]a", "b") == ([bos, ab[0]], ab[1:])
    value = ask(lm, "loglikelihood_rolling", ("ab",))[0]
    assert value == pytest.approx(enumerated(lm.policy, [bos], ab), abs=1e-6)


def test_texts_begin_and_end_as_the_family_says(tmp_path: Path) -> None:
    policy = make_policy(torch.float32)
    policy.tokenizer.bos_token, policy.tokenizer.chat_template = "[UNK]", "{{ messages[0]['content'] }}"
    policy.save(tmp_path)
    lm = MaskedDiffusionLM(str(tmp_path), device="cpu")
    plain, bos = lm._encode("ab"), lm.tokenizer.bos_token_id
    lm.policy.rules, lm.policy.turn_end_id, lm.policy.chat = Rules(bos=True), plain[1], False
    assert lm._encode("ab") == lm.policy.encode_prompts(["ab"], torch.zeros(1)).ids[0].tolist() == [bos, *plain]
    assert lm._encode_pair("", "ab") == ([bos], plain)
    assert lm._read(plain, []) == "a"
    lm.apply_chat_template([{"role": "user", "content": "ab"}])
    assert lm._encode("ab") == plain


def test_chat_templates_are_the_tokenizers(tmp_path: Path, make: Callable[..., MaskedDiffusionLM]) -> None:
    template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")
    lm = with_bos(tmp_path, template)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    assert lm.apply_chat_template(chat[:1]) == "<user>hi<assistant>"
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == "<user>hi<assistant>so"
    assert lm.chat_template(True) == template and lm.chat_template(False) is None
    assert lm.tokenizer_name == str(tmp_path).replace("/", "__")
    with pytest.raises(UserError, match="has no chat template"):
        make().apply_chat_template(chat)


def test_long_contexts_lose_their_beginning(
    make: Callable[..., MaskedDiffusionLM], caplog: pytest.LogCaptureFixture
) -> None:
    lm = make(max_length=8)
    assert ask(lm, "loglikelihood", ("abcdefgh", " 12"))[0][0] == pytest.approx(by_hand(lm, "defgh", " 12"), abs=1e-6)
    assert "1 of 1 contexts lost their beginning (up to 3 tokens): max_length=8" in caplog.text
    caplog.clear()
    job = lm._job("abcdefgh", {"max_gen_toks": 5}, 0)
    assert lm.tokenizer.decode(job.prompt) == "fgh" and job.lost == 5
    assert ask(lm, "loglikelihood", ("defgh", " 12")) and not caplog.text
    with pytest.raises(UserError, match="max_length=8: a continuation of 9 tokens"):
        ask(lm, "loglikelihood", ("a", "123456789"))
    with pytest.raises(UserError, match="max_length=8: a generation of 9 tokens"):
        ask(lm, "generate_until", ("a", {"max_gen_toks": 9}))


def test_rolling_windows_cover_every_token_once(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make(max_length=4)
    encode = lm.tokenizer.encode
    expected = [
        enumerated(lm.policy, [], encode("abcd")) + enumerated(lm.policy, [], encode("efgh"))
        + enumerated(lm.policy, encode("gh"), encode("ij")),
        enumerated(lm.policy, [], encode("xyz")), 0.0,
    ]
    assert ask(lm, "loglikelihood_rolling", ("abcdefghij",), ("xyz",), ("",)) == pytest.approx(expected, abs=1e-6)


# Generation ----------------------------------------------------------------------------------------------------------

def direct(lm: MaskedDiffusionLM, context: str, length: int, **settings: Any) -> list[int]:
    """The sampler itself, one prompt at a time."""
    prompts = lm.policy.pad_prompts([lm.tokenizer.encode(context)], torch.arange(1))
    row: list[int] = LowConfidence(**{"temperature": 0, **settings}).sample(
        lm.policy, prompts, length, seed=0, step=0).ids[0].tolist()
    return row


def test_generations_are_the_samplers(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make(block_length=4, max_gen_toks=8)
    contexts = ["a", "Q: what? A:", "Q: where? A:", "longer " * 4]
    expected = [lm.policy.decode(torch.tensor([direct(lm, context, 8, block_length=4)]))[0] for context in contexts]
    assert len(set(expected)) > 1 and all(expected)
    for number in (1, 3, 32):
        lm.batch_size = number
        assert ask(lm, "generate_until", *((context, {}) for context in contexts)) == expected
    # 6 tokens: two blocks of 4, and what is too much is cut off.
    six = lm.policy.decode(torch.tensor([direct(lm, "a", 8, block_length=4)[:6]]))[0]
    assert ask(lm, "generate_until", ("a", {"max_new_tokens": 6})) == [six]
    # Fewer than a block: one block of that length. Other numbers of steps: other texts.
    three = lm.policy.decode(torch.tensor([direct(lm, "a", 3, block_length=4)]))[0]
    assert ask(lm, "generate_until", ("a", {"max_gen_toks": 3})) == [three]
    steps = lm.policy.decode(torch.tensor([direct(lm, "a", 8, block_length=4, denoising_steps=2)]))[0]
    assert ask(make(block_length=4, denoising_steps=2), "generate_until", ("a", {"max_gen_toks": 8})) == [steps]


def test_texts_end_at_eos_and_at_the_first_stop_string(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make()
    eos, unknown = lm.policy.eos_id, lm.tokenizer.unk_token_id
    row = [*lm.tokenizer.encode("one. two\nthree"), unknown, *lm.tokenizer.encode("!"), eos, *lm.tokenizer.encode("four")]
    assert lm._read(row, []) == "one. two\nthree!"
    assert lm._read(row, ["\n", ". "]) == "one"
    assert lm._read(row, ["four", "", "\n"]) == "one. two"
    assert lm._read(row, ["[UNK]"]) == "one. two\nthree", "a stop string that is a special token"
    lm.policy.eos_id = row[0]
    assert lm._read(row, []) == ""
    job = lm._job("a", {"until": "\n"}, 0)
    assert job.until == ["\n"]


def test_sampled_generations(make: Callable[..., MaskedDiffusionLM]) -> None:
    lm = make(block_length=8, max_gen_toks=8)
    settings = {"do_sample": True, "temperature": 1.0}
    requests = [("a", settings), ("a", settings), ("b", settings)]
    found = ask(lm, "generate_until", *requests)
    assert found[0] != found[1], "equal requests get different samples"
    assert ask(lm, "generate_until", *requests[::-1])[::-1] == [found[1], found[0], found[2]]
    assert ask(make(block_length=8, max_gen_toks=8, seed=1), "generate_until", *requests) != found
    greedy = ask(lm, "generate_until", ("a", {}))
    assert ask(lm, "generate_until", ("a", {"do_sample": False, "temperature": 1.0})) == greedy
    hot = make(block_length=8, max_gen_toks=8, temperature=1.0)
    assert ask(hot, "generate_until", ("a", {})) == found[:1]


def test_settings_that_the_sampler_lacks_are_reported(
    make: Callable[..., MaskedDiffusionLM], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"max_gen_toks": 4, "until": "b"}
    ask(make(), "generate_until", ("a", {**settings, "top_p": 0.9}), ("b", {**settings, "top_k": 5}))
    assert [record.message for record in caplog.records] == ["the sampler knows nothing of top_k, top_p"]


def test_steps_that_do_not_fit_are_refused(make: Callable[..., MaskedDiffusionLM]) -> None:
    with pytest.raises(UserError, match=r"denoising_steps=3: must be a multiple of the number of blocks \(2\)"):
        ask(make(block_length=4, denoising_steps=3), "generate_until", ("a", {"max_gen_toks": 7}))


# lm-eval itself ------------------------------------------------------------------------------------------------------

QUESTIONS = [("1+1?", ["2", "3", "no"]), ("Sky?", ["blue", "red"]), ("Up?", ["down", "up", "on"]), ("7*7?", ["49", "1"]),
             ("a?", ["b", "a", "c"]), ("Cat?", ["dog", "cat"]), ("Is it?", ["yes", "no"]), ("2^3?", ["8", "6", "9"])]


def write_tasks(folder: Path, lm: MaskedDiffusionLM) -> None:
    """Two tasks of one's own. The gold answers of the second are the sampler's own for every other question."""
    rows, texts = [], []
    for number, (question, choices) in enumerate(QUESTIONS):
        rows.append({"question": question, "choices": choices, "gold": number % len(choices)})
        answer = lm.policy.decode(torch.tensor([direct(lm, f"Q: {question} A:", 8, block_length=4)]))[0].split("e")[0]
        texts.append({"question": question, "answer": answer if number % 2 else "something else"})
    for name, data, settings in (
        ("own_choice", rows, {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
                              "metric_list": [{"metric": "acc"}]}),
        ("own_text", texts, {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                             "generation_kwargs": {"until": ["e"], "max_gen_toks": 8, "do_sample": False},
                             "metric_list": [{"metric": "exact_match"}]}),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({
            "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
            "doc_to_text": "Q: {{question}} A:", **settings,
        }))


def accuracy_by_hand(lm: MaskedDiffusionLM) -> float:
    right = 0
    for number, (question, choices) in enumerate(QUESTIONS):
        values = [by_hand(lm, f"Q: {question} A:", f" {choice}") for choice in choices]
        right += values.index(max(values)) == number % len(choices)
    return right / len(QUESTIONS)


def test_lm_eval_gives_what_hand_computation_gives(
    tmp_path: Path, folder: Path, make: Callable[..., MaskedDiffusionLM]
) -> None:
    lm = make(num_samples=31, block_length=4)
    write_tasks(tmp_path, lm)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options: dict[str, Any] = {"tasks": ["own_choice", "own_text"], "task_manager": manager, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(model=lm, **options)
    assert found is not None
    expected = accuracy_by_hand(lm)
    assert 0 < expected < 1
    assert found["results"]["own_choice"]["acc,none"] == expected
    assert found["results"]["own_text"]["exact_match,none"] == 0.5
    assert found["config"]["num_samples"] == 31 and found["config"]["model_path"] == str(folder)


def test_the_command_line_of_lm_eval(
    tmp_path: Path, folder: Path, make: Callable[..., MaskedDiffusionLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make(num_samples=31, block_length=4)
    write_tasks(tmp_path, lm)
    monkeypatch.setattr(sys, "argv", [
        "harness", "--model", "dllm_rl", "--model_args", f"path={folder},num_samples=31,block_length=4,dtype=float64",
        "--include_path", str(tmp_path), "--tasks", "own_choice,own_text", "--batch_size", "5",
        "--output_path", str(tmp_path / "out"),
    ])
    harness.main()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(file.read_text())
    assert written["results"]["own_choice"]["acc,none"] == accuracy_by_hand(lm)
    assert written["results"]["own_text"]["exact_match,none"] == 0.5
    assert written["config"]["model_path"] == str(folder)


def test_the_cache_of_lm_eval(tmp_path: Path, make: Callable[..., MaskedDiffusionLM]) -> None:
    """lm-eval's cache answers what was asked before, with the same values."""
    lm = make(block_length=4)
    write_tasks(tmp_path, lm)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options: dict[str, Any] = {"tasks": ["own_choice"], "task_manager": manager, "bootstrap_iters": 0,
                               "use_cache": str(tmp_path / "answers")}
    first = lm_eval.simple_evaluate(model=lm, **options)
    lm._elbos = None  # type: ignore[method-assign, assignment]
    second = lm_eval.simple_evaluate(model=lm, **options)
    assert first is not None and second is not None
    assert [row["resps"] for row in first["samples"]["own_choice"]] == [
        row["resps"] for row in second["samples"]["own_choice"]]


# Mistakes ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "message"), [
    ({"path": None}, "path=None: must be a run folder"), ({"path": "./nowhere"}, "nowhere: no such folder"),
    ({"num_samples": 0}, "num_samples=0: must be an integer >= 1"),
    ({"num_samples": "many"}, "num_samples=many: must be an integer >= 1"),
    ({"seed": -1}, "seed=-1: must be an integer >= 0"), ({"batch_size": "auto"}, "batch_size=auto: must be an integer >= 1"),
    ({"likelihood": "trajectory"}, "likelihood=trajectory: must be elbo or bernoulli"),
    ({"dtype": "int8"}, "dtype=int8: must be float32"), ({"device": "tpu"}, "device=tpu: must be cpu or cuda"),
    ({"max_length": 1}, "max_length=1: must be an integer >= 2"), ({"block_length": 0}, "block_length=0"),
    ({"temperature": -1.0}, "temperature=-1.0"), ({"temperature": "hot"}, "temperature=hot: must be a number >= 0"),
    ({"denoising_steps": "many"}, "denoising_steps=many"), ({"likelihood": "coupled", "num_samples": 3}, "a multiple of 2"),
    ({"pretrained": "x"}, "pretrained: no such model argument; must be one of path, num_samples"),
])
def test_bad_arguments_are_named(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskedDiffusionLM(**{"path": str(folder), **arguments})


def test_the_command_line_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: MaskedDiffusionLM("./gone"))
    with pytest.raises(SystemExit) as stop:
        harness.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: path=./gone: no such folder")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stop:
        harness.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: lm-eval is not installed: pip install 'dllm-rl[eval]'\n"


def test_other_models_of_lm_eval_are_still_there() -> None:
    from lm_eval.api.registry import get_model
    assert get_model("dllm_rl") is MaskedDiffusionLM
    assert get_model("dummy").__name__ == "DummyLM"
