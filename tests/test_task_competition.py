"""The task `math`: its rows, prompts and demonstrations, and the right answers of MATH500 and GSM8K."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from dllm_rl.errors import UserError
from dllm_rl.tasks.math.competition import Math
from dllm_rl.tasks.math.extraction import last_boxed
from tests.test_real_data import DATA

ROW: dict[str, Any] = {"problem": "What is $1 + 1$?", "answer": "2", "level": 1}
SOLVED: dict[str, Any] = {"problem": "What is $2 + 2$?", "solution": "It is $\\boxed{4}$.", "level": "Level 2"}


def write(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> str:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_rows_with_and_without_a_solution(tmp_path: Path) -> None:
    task = Math(data=write(tmp_path, [ROW, SOLVED]))
    first, second = task.prompts("train")
    assert (first.id, first.text, first.data) == ("train/0", ROW["problem"], {"answer": "2", "solution": "", "level": 1})
    assert second.data == {"answer": "4", "solution": SOLVED["solution"], "level": "Level 2"}
    assert task.prompts("train") is Math(data=str(tmp_path)).prompts("train")


def test_train_and_test_prompts_are_worded_alike(tmp_path: Path) -> None:
    write(tmp_path, [ROW])
    folder = write(tmp_path, [ROW], "test")
    for protocol in Math.protocols:
        task = Math(data=folder, test_data=folder, protocol=protocol)
        (train,), (test,) = task.prompts("train"), task.prompts("test")
        assert train.text == test.text
        assert train.text.endswith(ROW["problem"])
        assert task.fingerprint(train) == task.fingerprint(test)
    assert len({Math(data=folder, protocol=protocol).prompts("train")[0].text for protocol in Math.protocols}) == 3


def test_rows_without_an_answer_are_left_out_of_training_and_said(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "answer": ""}, SOLVED, {**ROW, "answer": None}, {"problem": "Why?", "solution": "None."}]
    with pytest.warns(UserWarning, match=r"left out 3 of 5 rows, which have no answer \(the first is .*train\.jsonl:2\)"):
        prompts = Math(data=write(tmp_path, rows)).prompts("train")
    assert [prompt.id for prompt in prompts] == ["train/0", "train/2"]
    write(tmp_path, rows, "test")
    with pytest.raises(UserError, match=r"test\.jsonl:2: has no answer"):
        Math(test_data=str(tmp_path)).prompts("test")


def test_rows_without_any_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:1: has no answer"):
        Math(data=write(tmp_path, [{"problem": "Why?"}])).prompts("train")


@pytest.mark.parametrize(("row", "problem"), [
    ({"answer": "2"}, "has no `problem`"), ({**ROW, "answer": 2}, "answer=2: must be a string"),
    ({**ROW, "problem": 2}, "problem=2: must be a string"), ({**ROW, "solution": []}, r"solution=\[\]: must be a string"),
])
def test_bad_rows_name_their_line(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=rf"train\.jsonl:2: .*{problem}"):
        Math(data=write(tmp_path, [ROW, row])).prompts("train")


@pytest.mark.parametrize("fields", [
    {"data": ""}, {"test_data": 3}, {"completion_length": 0}, {"protocol": "plain"}, {"timeout_seconds": 0}, {"workers": 0},
])
def test_bad_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^task\.{next(iter(fields))}=.*: must be "):
        Math(**fields)


@pytest.mark.parametrize("protocol", Math.protocols)
def test_demonstrations_score_one(tmp_path: Path, protocol: str) -> None:
    task = Math(data=write(tmp_path, [ROW, SOLVED]), protocol=protocol)
    prompts = {prompt.text: prompt for prompt in task.prompts("train")}
    demos = task.demonstrations(6, 0)
    assert [demos.count(demo) for demo in set(demos)] == [3, 3]
    assert demos == task.demonstrations(6, 0)
    for text, completion in demos:
        reward = task.score(prompts[text], completion)
        assert (reward.value, reward.parts) == (1.0, {} if protocol == "bgpo" else {"format": 1.0})


def graders(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import check_graders

    return check_graders


@pytest.mark.parametrize(("gold", "wrong"), [
    ("\\frac{3}{2}", "\\frac{4}{2}"), ("9", "0"), ("\\text{(C)}", "\\text{(D)}"), ("\\pi", "-(\\pi)"), ("A", "B"),
    ("(-\\infty,\\infty)", "(-\\infty,\\infty), 0"), ("\\text{Evelyn}", "\\text{Fvelyn}"), ("x^2", "x^3"),
])
def test_mutated_answers(monkeypatch: pytest.MonkeyPatch, gold: str, wrong: str) -> None:
    assert graders(monkeypatch).mutated(gold) == wrong


def test_the_check_finds_a_grader_that_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = graders(monkeypatch)
    task = Math()
    prompts = [script.Prompt(f"test/{index}", "", {"answer": "5"}) for index in range(3)]
    cases = script.Cases(task, prompts, [["\\boxed{5}", "\\boxed{6}"], ["\\boxed{5}"], ["#### 5"]], ["5", "\\boxed{5}", "x"])
    monkeypatch.setitem(script.SETS, "made_up", lambda _: cases)
    found = script.checked("made_up", Path())
    assert {key: found[key] for key in ("gold_right", "gold_total", "mutated_right")} == \
        {"gold_right": 2, "gold_total": 3, "mutated_right": 1}
    assert capsys.readouterr().out.count("test/") == 2


@pytest.mark.parametrize("name", ["gsm8k_test", "math500"])
def test_right_answers_of_the_data_sets_score_one_and_changed_ones_zero(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = {"gsm8k_test": "gsm8k", "math500": "math"}[name]
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the real rows at {DATA / folder}; set DLLM_RL_DATA to the folder that holds {folder}/")
    found = graders(monkeypatch).checked(name, DATA)
    rows = {"gsm8k_test": 1319, "math500": 500}[name]
    assert (found["gold_right"], found["gold_total"], found["mutated_right"]) == (rows, rows, 0)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["gsm8k_train", "math_train"])
def test_right_answers_of_the_training_sets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if not (DATA / "math").is_dir() or not (DATA / "gsm8k").is_dir():
        pytest.skip(f"needs the real rows at {DATA}; set DLLM_RL_DATA to the folder that holds gsm8k/ and math/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = graders(monkeypatch).checked(name, DATA)
    rows = {"gsm8k_train": 7473, "math_train": 7470}[name]
    assert (found["gold_right"], found["gold_total"], found["mutated_right"]) == (rows, rows, 0)


def test_the_rows_of_math500_have_what_the_task_needs() -> None:
    path = DATA / "math" / "math500.json"
    if not path.is_file():
        pytest.skip(f"needs the real rows at {path}; set DLLM_RL_DATA to the folder that holds math/math500.json")
    prompts = Math(test_data=str(path)).prompts("test")
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [(prompt.text, prompt.data["answer"], prompt.data["level"]) for prompt in prompts] == \
        [(row["problem"], row["answer"].strip(), row["difficulty"]) for row in rows]


def test_the_package_asks_for_what_the_graders_import() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'"math-verify\[antlr4_9_3\]', project)
    assert last_boxed("\\boxed{1}") == "1"
    assert "math_verify" not in sys.modules, "only the workers load it"
