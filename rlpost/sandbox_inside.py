"""Runs a program cut off from the rest of the machine. A script of its own: `sandbox.py` starts it with `python -I -S`.

With the right to it (root, or user namespaces) the program gets its own users, processes, network and file system: an
empty one in memory, in which only the system's libraries and this Python can be read. It is nobody there, so limits on
processes hold for it even where the run itself is root's.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

NEW_MOUNTS, NEW_CGROUPS, NEW_NAMES, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USERS, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
EVERYTHING = NEW_MOUNTS | NEW_CGROUPS | NEW_NAMES | NEW_IPC | NEW_PIDS | NEW_NET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_PIVOT_ROOT, SYS_MOUNT_SETATTR = 155, 442
"""On x86-64; on arm64 the first is 41."""
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
FIRST_UID = 200_000
NO_NAMESPACES, TIME_OVER = 97, 98
"""Exit status where the system refuses, and where the program took too long."""
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    """`struct mount_attr` of the kernel."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def main() -> None:
    """Take the limits and the files from the command line, and become the program."""
    asked = json.loads(sys.argv[1])
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    program = os.read(asked["program"], 1 << 24)
    if asked["namespaces"]:
        try:
            cut_off(asked)
        except OSError as error:
            print(f"no namespaces: {error}", file=sys.stderr)
            os._exit(NO_NAMESPACES)
    else:
        os.chdir(asked["root"])
    run(asked, program)


def cut_off(asked: dict[str, Any]) -> None:
    """Leave the machine's namespaces for new ones; the process that goes on is the first of its own."""
    is_root = os.geteuid() == 0
    uid, gid = os.geteuid(), os.getegid()
    try:
        check(libc.unshare(EVERYTHING if is_root else EVERYTHING | NEW_USERS), "unshare")
    except OSError:
        if not is_root:
            raise
        is_root = False  # in a container that has taken the right away
        check(libc.unshare(EVERYTHING | NEW_USERS), "unshare")
    if not is_root:
        map_user(uid, gid)
    outside = os.getpid()
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        end_as(status)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    file_system(asked["root"], asked["files_mib"])
    if is_root:
        nobody = FIRST_UID + outside
        os.chown("/work", nobody, nobody)
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        check(libc.unshare(NEW_USERS), "unshare users")
        map_user(nobody, nobody)
    Path("/proc/sys/user/max_user_namespaces").write_text("0")  # in its own it could mount things
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # who changes its user loses it


def map_user(uid: int, gid: int) -> None:
    """This user is the only one of the new namespace, and not its root."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")


def file_system(root: str, size_mib: int) -> None:
    """Move into a file system in memory, with the system's libraries and this Python as things to be read."""
    check(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount / private")
    options = f"size={size_mib}m,mode=755".encode()
    check(libc.mount(b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), "mount tmpfs")
    for folder in dict.fromkeys((*SYSTEM, sys.base_prefix)):
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif os.path.isdir(folder) and not any(Path(folder).is_relative_to(one) for one in SYSTEM if one != folder):
            bind(folder, root + folder)
    os.makedirs(f"{root}/dev")
    for device in DEVICES:
        Path(root + device).touch()
        check(libc.mount(device.encode(), (root + device).encode(), None, MS_BIND, None), f"mount {device}")
    for folder in ("proc", "work", "gone"):
        os.mkdir(f"{root}/{folder}")
    check(libc.mount(b"proc", f"{root}/proc".encode(), b"proc", MS_NOSUID | MS_NODEV, None), "mount proc")
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT if os.uname().machine == "x86_64" else 41, b".", b"gone"), "pivot_root")
    check(libc.umount2(b"/gone", MNT_DETACH), "umount")
    os.chdir("/work")


def bind(folder: str, to: str) -> None:
    """Let a folder be read, and not written, at another place."""
    os.makedirs(to)
    check(libc.mount(folder.encode(), to.encode(), None, MS_BIND | MS_REC, None), f"bind {folder}")
    only_read = MountAttributes(set=MS_RDONLY | MS_NOSUID)
    how = ctypes.byref(only_read), ctypes.c_size_t(ctypes.sizeof(only_read))
    check(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, to.encode(), AT_RECURSIVE, *how), f"read-only {folder}")


def run(asked: dict[str, Any], program: bytes) -> None:
    """The program under its limits, as a child, so that its signals do to it what they would elsewhere."""
    Path("main.py").write_bytes(program)
    if child := os.fork():
        signal.signal(signal.SIGALRM, lambda *_: os._exit(TIME_OVER))  # with the first of its processes all end
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        _, status = os.waitpid(child, 0)
        end_as(status)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    seconds, mib = int(asked["seconds"]) + 1, 1 << 20
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, asked["memory_mib"] * mib),
        (resource.RLIMIT_FSIZE, asked["files_mib"] * mib),
        (resource.RLIMIT_NPROC, asked["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    os.dup2(asked["input"], 0)
    os.dup2(asked["result"], 3)
    os.closerange(4, 64)
    os.set_inheritable(3, True)
    environment = {"PATH": "/usr/bin:/bin", "HOME": os.getcwd(), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(asked["python"], [asked["python"], "-I", "-B", "main.py"], environment)


def end_as(status: int) -> None:
    """End in the way in which a child has ended."""
    if os.WIFSIGNALED(status):
        os._exit(128 + os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def check(result: int, what: str) -> None:
    """Raise what a system call has failed with."""
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
