"""Hostile programs, each contained; and the tests that programs are graded by."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_rewards import rollout

from rewards.code_tests import code_tests
from rlpost.errors import RunError
from rlpost.sandbox import Limits, run

LIMITS = Limits(seconds=3.0, memory_mib=256)
SECRET = "rlpost-secret-of-the-test"


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    try:
        assert run("print(1)", limits=LIMITS).output == "1\n"
    except RunError as error:
        pytest.skip(f"this system has no namespaces: {error}")


def test_a_program_reads_prints_and_ends_as_it_likes():
    ran = run("import sys; print(input() * 2); print('bad', file=sys.stderr); sys.exit(3)", "ab\n", LIMITS)
    assert (ran.status, ran.output, ran.errors, ran.timed_out) == (3, "abab\n", "bad\n", False)


def test_an_endless_loop_ends_with_its_time():
    started = time.monotonic()
    assert run("while True: pass", limits=replace(LIMITS, seconds=0.5)).timed_out
    assert time.monotonic() - started < 30


def test_sleeping_for_ever_ends_with_its_time():
    program = (
        "import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
    )
    assert run(program + "while True: time.sleep(9)", limits=replace(LIMITS, seconds=0.5)).timed_out


def test_a_fork_bomb_runs_out_of_processes_and_leaves_none():
    ran = run("import os\nwhile True:\n    os.fork()", limits=LIMITS)
    assert "Resource temporarily unavailable" in ran.errors or ran.timed_out
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if b"-I\0-B\0main.py" in read(one)]


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_files_fill_a_file_system_of_their_own():
    program = "i = 0\nwhile True:\n    i += 1\n    open(f'{i}', 'wb').write(b'x' * (1 << 20))"
    assert "No space left on device" in run(program, limits=LIMITS).errors


def test_there_is_no_network():
    program = (
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 22), 1)\nexcept OSError as e:\n    print(e)\n"
    )
    program += "import os\nprint(sorted(os.listdir('/sys')) if os.path.isdir('/sys') else 'no sys')"
    lines = run(program, limits=LIMITS).output.splitlines()
    assert "unreachable" in lines[0]
    assert lines[1] == "no sys"


def test_a_server_of_this_machine_cannot_be_reached():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nprint('reached')"
        assert "reached" not in run(program, limits=LIMITS).output


def test_the_environment_and_other_processes_cannot_be_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    program = """
import os, glob
print(dict(os.environ))
for file in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
    try:
        print(open(file, 'rb').read())
    except OSError as e:
        print(e)
print('processes', sorted(glob.glob('/proc/[0-9]*')))
"""
    ran = run(program, limits=LIMITS)
    assert ran.status == 0
    assert SECRET not in ran.output + ran.errors
    assert "processes ['/proc/1', '/proc/2']" in ran.output


def test_the_parent_cannot_be_killed():
    program = f"""
import os, signal
for pid in (1, os.getppid(), {os.getpid()}, -1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as e:
        print(e)
print('still here')
"""
    ran = run(program, limits=LIMITS)
    assert "still here" in ran.output and ran.status == 0


def test_nothing_can_be_written_outside_nor_read_of_this_folder(tmp_path):
    (tmp_path / "private").write_text(SECRET)
    here = Path(__file__).resolve()
    program = f"""
import os
for path in ({str(tmp_path / "mark")!r}, '/usr/mark', '/etc/mark', '/usr/lib/mark'):
    try:
        open(path, 'w').write('x')
        print('wrote', path)
    except OSError as e:
        print(e)
for path in ({str(tmp_path / "private")!r}, {str(here)!r}, '/etc/shadow', '/root/.ssh'):
    print(os.path.exists(path))
"""
    ran = run(program, limits=LIMITS)
    assert "wrote" not in ran.output and ran.output.splitlines()[-4:] == ["False"] * 4
    assert not (tmp_path / "mark").exists()


def test_a_program_cannot_mount_or_become_somebody():
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.mount(b'none', b'/work', b'tmpfs', 0, None), libc.unshare(0x10000000 | 0x00020000), libc.chroot(b'/work'))
try:
    os.setuid(0)
    print('root')
except OSError:
    print('nobody')
print(os.getuid() == 0)
"""
    lines = run(program, limits=LIMITS).output.splitlines()
    assert lines[0] == "-1 -1 -1"
    assert lines[1:] == ["nobody", "False"]


def test_huge_output_is_cut_off():
    ran = run("while True: print('x' * 1000)", limits=LIMITS)
    assert "File too large" in ran.errors and len(ran.output) == 1 << 16


def test_memory_is_bounded():
    ran = run("x = []\nwhile True: x.append(bytearray(1 << 24))", limits=LIMITS)
    assert "MemoryError" in ran.errors


def test_without_namespaces_there_are_limits():
    bare = replace(LIMITS, namespaces=False, seconds=0.5)
    assert run("print(2)", limits=bare).output == "2\n"
    assert run("while True: pass", limits=bare).timed_out


def coded(program, tests, **options):
    one = rollout(f"Here:\n```python\n{program}\n```\n", None)
    one.task = replace(one.task, extra={"tests": tests})
    return code_tests(one, seconds=3.0, **options)


DOUBLE = "def double(x):\n    return 2 * x"
CALLS = ["assert double(2) == 4", {"call": "double([1])", "output": [1, 1]}]
READS = [{"input": "3\n", "output": "6"}, {"input": "4\n", "output": "8\n"}]


def test_a_right_program_passes_its_tests():
    assert coded(DOUBLE, CALLS).value == 1.0
    assert coded("print(2 * int(input()))", READS).value == 1.0
    assert coded("def f():\n    return (1, [2])", [{"call": "f()", "output": [1, [2]]}]).value == 1.0
    assert coded("def f():\n    return 0.1 + 0.2", ["assert f() == 0.3"]).value == 1.0


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def double(x):\n    return 4", CALLS),
        ("import sys\nsys.exit(0)", CALLS),
        ("import os\nos._exit(0)", CALLS),
        ("class A:\n    def __eq__(self, other):\n        return True\ndef double(x):\n    return A()", CALLS),
        (
            "class A(int):\n    def __repr__(self):\n        return 'exit()'\ndef double(x):\n    return A()",
            CALLS,
        ),
        ("import builtins\nbuiltins.repr = lambda x: 'True'\ndef double(x): pass", CALLS),
        ("import os\nos.write(3, b'5')\nos._exit(0)", CALLS),
        ("import os, sys\nos.write(3, b'all tests passed')\ndef double(x):\n    return None", CALLS),
        ("print(6)", READS),
        ("print(open(3).read())", READS),
        ("raise SystemExit", READS),
        ("print('6 8')", READS),
        ("def double(x:", CALLS),
    ],
)
def test_a_program_that_is_wrong_or_cheats_does_not(program, tests):
    found = coded(program, tests)
    assert found.value == 0.0 and found.note


def test_the_share_of_tests_is_a_part_and_counts_where_it_shall():
    assert coded("print(6)", READS, partial=True).value == 0.5
    assert coded("print(6)", READS).parts == {"tests": 0.5}


def test_a_text_without_a_program_is_unparsable():
    one = rollout("def double(x): return 2 * x", None)
    one.task = replace(one.task, extra={"tests": CALLS})
    assert code_tests(one).unparsable
    assert code_tests(replace(one, text="```python\ndef double(x")).unparsable


@pytest.mark.parametrize(
    "tests", [None, [], "[]", [{"input": "1"}], ["assert f(1)"], ["f(1) == 2"], ["assert f(1) > 2"]]
)
def test_tests_that_cannot_be_read_are_an_error_of_the_tasks(tests):
    with pytest.raises(ValueError, match="code_tests needs"):
        coded(DOUBLE, tests)
