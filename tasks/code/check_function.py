'''The assertions of a HumanEval row, one test for each.

A row has one function `check(candidate)`; run as a whole it says whether a program is right, not which share of it is.
Here each statement of it that holds an `assert` becomes a test. Example (HumanEval/33, openai/human-eval, MIT):

    def check(candidate):
        assert tuple(candidate([1, 2, 3])) == tuple(sort_third([1, 2, 3]))
        assert tuple(candidate([5, 6, 3, 4, 8, 9, 2])) == tuple([2, 6, 3, 4, 8, 9, 5])

has one test: the first assertion compares the program with itself, so it is no test of its own but belongs to the next
one. `assert True`, which 36 rows hold, is none at all.
'''

from __future__ import annotations

import ast
import builtins
import copy
from collections.abc import Collection

from dllm_rl.sandbox import Assertion, Call
from dllm_rl.tasks.code.grading import is_program

_BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_"))


def assertions_of(test: str, entry_point: str, preamble: str) -> tuple[Call | Assertion, ...]:
    """The tests of `check(candidate)`; together they demand what the whole function demands.

    Args:
        test: source code that defines `check`; what else it defines is at hand in every test.
        entry_point: the function under test, by the row, never by the answer.
        preamble: trusted code of the prompt that tests use: imports and helper functions, without the entry point.

    Raises:
        ValueError: there is no such function, or no assertion in it.
    """
    tree = ast.parse(test)
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None or len(check.args.args) != 1:
        raise ValueError("must define check(candidate)")
    others = [node for node in tree.body if node is not check and not isinstance(node, ast.Expr)]
    groups = _groups(check, entry_point)
    if not groups:
        raise ValueError("check(candidate) must hold an assertion that can fail")
    setup = "\n".join([preamble, *map(ast.unparse, others)])
    candidate = check.args.args[0].arg
    codes = ["\n".join([f"{candidate} = {entry_point}", *map(ast.unparse, group)]) for group in groups]
    if not all(map(is_program, codes)):  # a `return`, for instance: the function cannot be cut up
        codes, groups = [f"{ast.unparse(check)}\ncheck({entry_point})"], [[check]]
    return tuple(
        _call(group, candidate, entry_point) or Assertion(code, trusted_setup(setup, code, (entry_point,)))
        for group, code in zip(groups, codes, strict=True)
    )


def trusted_setup(setup: str, code: str, under_test: Collection[str]) -> str:
    """The set-up of an assertion, in which built-in functions are what they should be, whatever the program calls `sum`.

    Only the functions under test remain the program's. Numbers of the module `random` are the same at every grading.
    """
    tree = ast.parse(f"{setup}\n{code}")
    used = sorted((names_read(tree) & _BUILTINS).difference(under_test))
    lines = [f"from builtins import {', '.join(used)}"] if used else []
    if "random" in _imported_modules(tree):
        lines.append("import random; random.seed(0)")
    return "\n".join([*lines, setup])


def _groups(check: ast.FunctionDef, entry_point: str) -> list[list[ast.stmt]]:
    """The statements of each test: what it needs of the statements before it, then its assertion."""
    before: list[ast.stmt] = []
    with_itself: list[ast.stmt] = []
    groups: list[list[ast.stmt]] = []
    for statement in check.body:
        if not holds_assertion(statement):
            before.append(statement)
        elif isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant) and statement.test.value:
            continue
        elif entry_point in names_read(statement):
            with_itself.append(statement)
        else:
            groups.append([*before, *with_itself, statement])
            with_itself = []
    if with_itself:  # none came after them
        groups[-1:] = [[*(groups[-1] if groups else before), *with_itself]]
    return groups


def _call(group: list[ast.stmt], candidate: str, entry_point: str) -> Call | None:
    """The stronger form of `assert candidate(LITERALS) == LITERAL`, or None."""
    statement = group[-1]
    if any(isinstance(other, ast.Assert) for other in group[:-1]) or not isinstance(statement, ast.Assert):
        return None
    comparison = statement.test
    if not (isinstance(comparison, ast.Compare) and len(comparison.ops) == 1 and isinstance(comparison.ops[0], ast.Eq)):
        return None
    call = copy.deepcopy(comparison.left)
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == candidate):
        return None
    try:
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            ast.literal_eval(argument)
        expected = ast.literal_eval(comparison.comparators[0])
    except ValueError:
        return None
    call.func.id = entry_point
    return Call(ast.unparse(call), expected, same_type=False)


def holds_assertion(tree: ast.AST) -> bool:
    """Whether there is an `assert` in the code."""
    return any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def names_read(tree: ast.AST) -> set[str]:
    """The variables that the code reads."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _imported_modules(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    return ({alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)})
