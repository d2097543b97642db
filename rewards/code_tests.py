"""Reward for programs: the share of tests that they pass, in a sandbox."""

from __future__ import annotations

import ast
import json
import math
import re
import time
from typing import Any

from rlpost.sandbox import Limits, run
from rlpost.types import Rollout, Score

ON_HANG = "drop"
_FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_CALLS = """
import json as _json, os as _os, sys as _sys
_source, _call = _json.loads(_sys.stdin.read())
_names = {"__name__": "program"}
exec(compile(_source, "program.py", "exec"), _names)
_os.write(3, repr(eval(_call, _names)).encode())
"""
"""Runs beside the program. The expected value never comes near it: what the call gives is compared outside."""


def code_tests(
    rollout: Rollout,
    *,
    tests: str = "tests",
    partial: bool = False,
    seconds: float = 5.0,
    total_seconds: float = 40.0,
    memory_mib: int = 512,
    most_tests: int = 32,
    sandbox: str = "namespaces",
) -> Score:
    """1 where the last fenced block of Python passes every test, else 0; with `partial` the share that it passes.

    `task.extra[tests]` is a list, or its JSON: `{"input": ..., "output": ...}` for a program that reads and prints,
    `{"call": "f(1)", "output": 2}` or `"assert f(1) == 2"` for a function. A test has `seconds`, all together
    `total_seconds`, after which the others count as failed. `sandbox=limits` where a system has no namespaces.
    """
    asked = [
        read_test(test, rollout.task.key) for test in listed(rollout.task.extra.get(tests), tests, rollout.task.key)
    ]
    program = program_of(rollout.text)
    if program is None:
        return Score(0.0, parts={"tests": 0.0}, unparsable=True, note="no block of Python")
    limits = Limits(seconds=seconds, memory_mib=memory_mib, namespaces=sandbox != "limits")
    asked, passed, note, end = asked[:most_tests], 0, "", time.monotonic() + total_seconds
    for kind, given, wanted in asked:
        said = passes(program, kind, given, wanted, limits) if time.monotonic() < end else "no time left for it"
        passed += said is None
        note = note or (f"{given[:60]!r}: {said}" if said is not None else "")
        if said is not None and not partial:
            break
    share = passed / len(asked)
    return Score(share if partial else float(share == 1), parts={"tests": share}, note=note)


def program_of(text: str) -> str | None:
    """The last fenced block that closes.

    >>> program_of("First\\n```python\\nx = 1\\n```\\nthen\\n```\\nx = 2\\n```")
    'x = 2\\n'
    """
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks and blocks[-1].strip() else None


def listed(found: Any, column: str, key: str) -> list[Any]:
    """The tests of a task."""
    tests = json.loads(found) if isinstance(found, str) else found
    if not isinstance(tests, list) or not tests:
        raise ValueError(
            f"code_tests needs tasks with a list of tests in extra.{column} (task {key} has {found!r:.60})"
        )
    return tests


def read_test(test: Any, key: str) -> tuple[str, str, Any]:
    """(`stdin`, `call` or, where the wanted value came as JSON, `json`; what is given; what is wanted).

    >>> read_test("assert f(1) == [2]", "k")
    ('call', 'f(1)', [2])
    """
    if isinstance(test, dict) and "input" in test and "output" in test:
        return "stdin", str(test["input"]), str(test["output"])
    if isinstance(test, dict) and "call" in test and "output" in test:
        return "json", str(test["call"]), test["output"]
    if isinstance(test, str):
        try:
            [line] = ast.parse(test.strip()).body
            assert isinstance(line, ast.Assert) and isinstance(line.test, ast.Compare)
            assert len(line.test.ops) == 1 and isinstance(line.test.ops[0], ast.Eq)
            return "call", ast.unparse(line.test.left), ast.literal_eval(line.test.comparators[0])
        except (SyntaxError, ValueError, AssertionError):
            pass
    raise ValueError(
        "code_tests needs tests that are {input, output}, {call, output} or `assert CALL == VALUE` "
        f"(task {key} has {test!r:.80})"
    )


def passes(program: str, kind: str, given: str, wanted: Any, limits: Limits) -> str | None:
    """None where a test passes, else why it does not."""
    ran = run(program, given, limits) if kind == "stdin" else run(_CALLS, json.dumps([program, given]), limits)
    if ran.timed_out:
        return f"took longer than {limits.seconds:g} s"
    if ran.status:
        last = ran.errors.strip().splitlines()[-1:] or ["no word"]
        return f"ended with status {ran.status}: {last[0][:100]}"
    if kind == "stdin":
        return None if lines(ran.output) == lines(wanted) else f"printed {ran.output[:60]!r}"
    try:
        value = ast.literal_eval(ran.result)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return f"gave {ran.result[:60]!r}, which is no plain value"
    value = without_tuples(value) if kind == "json" else value
    return None if same(value, wanted) else f"gave {ran.result[:60]}"


def lines(text: str) -> list[str]:
    """What was printed, but for white space at the ends of lines and of all."""
    return [line.rstrip() for line in text.strip().splitlines()]


def without_tuples(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, list | tuple):
        return [without_tuples(one) for one in value]
    return {k: without_tuples(v) for k, v in value.items()} if isinstance(value, dict) else value


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, floats to nine digits; a list is no tuple's equal, and True no 1's.

    >>> same([0.1 + 0.2], [0.3]), same(True, 1), same((1,), [1])
    (True, False, False)
    """
    if isinstance(a, float) or isinstance(b, float):
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
        return numbers and math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)
