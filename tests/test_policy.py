"""One forward method: the plain network's logits where asked, whatever the padding, and checked at start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_rl.errors import UserError
from dllm_rl.models.policy import Policy, load_policy
from dllm_rl.models.tiny import TinyModel, build_tokenizer
from dllm_rl.task import Prompt
from dllm_rl.types import Completions
from tests.conftest import make_completions, make_policy

TOKENIZER = build_tokenizer([" has", "->", "12", " 12"])


def test_dropout_is_off() -> None:
    """Both passes of the engine and all policies must see the same function."""
    policy = make_policy()
    policy.network.train()
    assert not Policy(policy.network, policy.tokenizer).network.training


def test_a_frozen_copy_stays_as_it_was() -> None:
    policy, completions = make_policy(), make_completions(make_policy())
    everywhere = torch.ones_like(completions.ids, dtype=torch.bool)
    twin = policy.frozen_copy()
    with torch.no_grad():
        before = policy.logits(completions.prompts, completions.ids, everywhere)
        for parameter in policy.network.parameters():
            parameter.mul_(1.1)
        assert torch.equal(twin.logits(completions.prompts, completions.ids, everywhere), before)
        assert not torch.equal(policy.logits(completions.prompts, completions.ids, everywhere), before)
    assert not any(parameter.requires_grad for parameter in twin.network.parameters())


def test_logits_are_the_plain_networks_at_the_positions_asked_for(policy: Policy, completions: Completions) -> None:
    rows: list[int] = []
    policy.network.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: rows.append(len(inputs[0])))
    positions = torch.rand(completions.ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    found = policy.logits(completions.prompts, completions.ids, positions)
    assert rows == [int(positions.sum())], "only the rows asked for pass the output head"
    expected = []
    for row in range(len(completions)):  # one sequence at a time, without padding
        prompt = completions.prompt_ids[row][completions.prompt_mask[row]]
        logits = policy.network(input_ids=torch.cat([prompt, completions.ids[row]]).unsqueeze(0)).logits[0, len(prompt) :]
        expected.append(logits[positions[row]])
    reference = torch.cat(expected)
    assert (found[:, policy.mask_id] == -torch.inf).all()
    kept = torch.arange(found.shape[1]) != policy.mask_id
    # RMSNorm works in float32 inside transformers, whatever the precision of the model.
    torch.testing.assert_close(found[:, kept], reference[:, kept], rtol=0, atol=1e-6)


def test_padding_changes_nothing() -> None:
    policy = make_policy(torch.float32)
    completions = make_completions(policy)
    wider = torch.nn.functional.pad(completions.prompt_ids, (3, 0), value=policy.pad_id)
    mask = torch.nn.functional.pad(completions.prompt_mask, (3, 0), value=False)
    padded = Completions(wider, mask, completions.sample_ids, completions.ids, completions.unmask_step)
    everywhere = torch.ones_like(completions.ids, dtype=torch.bool)
    torch.testing.assert_close(
        policy.logits(padded.prompts, padded.ids, everywhere),
        policy.logits(completions.prompts, completions.ids, everywhere), rtol=0, atol=1e-5,
    )


def test_batch_changes_nothing(policy: Policy, completions: Completions) -> None:
    everywhere = torch.ones_like(completions.ids, dtype=torch.bool)
    whole = policy.logits(completions.prompts, completions.ids, everywhere).view(len(completions), -1)
    for row in range(len(completions)):
        one = completions.rows(slice(row, row + 1))
        alone = policy.logits(one.prompts, one.ids, everywhere[:1]).view(-1)
        torch.testing.assert_close(alone, whole[row], rtol=0, atol=1e-10)


def test_a_causal_network_is_refused(policy: Policy) -> None:
    policy.network.config.is_causal = True
    with pytest.raises(UserError, match="attends causally"):
        Policy(policy.network, policy.tokenizer)


def test_a_network_that_reads_padding_is_refused(policy: Policy) -> None:
    forward = policy.network.forward
    policy.network.forward = lambda input_ids, use_cache, **_: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(UserError, match="ignores the attention mask"):
        Policy(policy.network, policy.tokenizer)


def test_a_tokenizer_without_a_mask_token_is_refused(policy: Policy) -> None:
    tokenizer = SimpleNamespace(mask_token=None, eos_token="e", pad_token="p")
    with pytest.raises(UserError, match="no mask_token"):
        Policy(policy.network, tokenizer)  # type: ignore[arg-type]


def test_save_and_load(tmp_path: Path) -> None:
    policy = make_policy(torch.float32)
    policy.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file() and not list(tmp_path.glob("*.bin"))
    loaded = load_policy(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b, c in zip(policy.network.parameters(), loaded.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert plain.config.is_causal is False
    assert AutoTokenizer.from_pretrained(tmp_path).encode("x->12") == policy.tokenizer.encode("x->12")
    assert (loaded.mask_id, loaded.eos_id, loaded.pad_id) == (policy.mask_id, policy.eos_id, policy.pad_id)


@pytest.mark.parametrize(("removed", "missing"), [
    ("model.safetensors", "no model.safetensors"), ("tokenizer.json", "no tokenizer.json"),
    ("config.json", "no config.json"),
])
def test_an_incomplete_folder_is_named(tmp_path: Path, removed: str, missing: str) -> None:
    make_policy(torch.float32).save(tmp_path)
    (tmp_path / removed).unlink()
    with pytest.raises(UserError, match=missing) as raised:
        load_policy(str(tmp_path))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_weights_depend_on_the_seed_only() -> None:
    before = torch.get_rng_state()
    first, again, other = (list(make_policy(seed=seed).network.parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_words_are_one_token() -> None:
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER.encode("12->12 12 has1")) == ["12", "->", "12", " 12", " has", "1"]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_decode_stops_at_eos(policy: Policy) -> None:
    ids = policy.encode_completions(["ab", "", "abcdef"], 4)
    assert policy.decode(ids) == ["ab", "", "abcd"]
    assert ids[0].tolist()[2:] == [policy.eos_id] * 2


@pytest.mark.parametrize(("fields", "message"), [
    ({"hidden_size": 18, "num_heads": 4}, r"model\.hidden_size=18: must be a multiple of 2 x model\.num_heads=4"),
    ({"num_layers": 0}, r"model\.num_layers=0"),
    ({"rope_theta": 0.5}, r"model\.rope_theta=0\.5"),
])
def test_bad_sizes_name_their_key(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TinyModel(**fields)  # type: ignore[arg-type]


TEMPLATE = ("{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
SOLVED = Prompt("1", "2+2=", shots=(("1+1=", "2"),), prefill="I say ")


def test_prompts_are_laid_out_by_the_chat_template() -> None:
    policy = make_policy(torch.float32)
    assert policy.render(SOLVED) == "1+1=2\n\n2+2=I say "
    assert policy.render("2+2=") == "2+2="
    policy.tokenizer.chat_template = TEMPLATE
    chatting = Policy(policy.network, policy.tokenizer)
    assert chatting.render(SOLVED) == "<user>1+1=<assistant>2<user>2+2=<assistant>I say "
    assert chatting.render("2+2=") == "<user>2+2=<assistant>"
    batch = chatting.encode_prompts([SOLVED, "q"], torch.arange(2))
    assert chatting.tokenizer.decode(batch.ids[0]) == chatting.render(SOLVED)
    assert chatting.tokenizer.decode(batch.ids[1][batch.mask[1]]) == "<user>q<assistant>"


def test_the_chat_template_can_be_left_out(tmp_path: Path) -> None:
    policy = make_policy(torch.float32)
    policy.tokenizer.chat_template = TEMPLATE
    policy.save(tmp_path)
    with_template = TinyModel(path=str(tmp_path)).build([], 0)
    without = TinyModel(path=str(tmp_path), chat_template=False).build([], 0)
    assert (with_template.render("q"), without.render("q")) == ("<user>q<assistant>", "q")
