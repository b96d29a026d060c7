"""A Python program in, whether it ran to its end out; in a child with limits.

The limits keep what a small model writes from doing harm by accident: time, memory, no processes,
no written files, no network (for certain where the kernel lets a user have a namespace). They are
no defence against an attacker: run code that you do not trust at all in a container.
"""

import secrets
import subprocess
import sys
import tempfile

_SECONDS = 10
_CHILD = """
import ctypes, os, resource, sys
done = sys.stdin.readline()
program = sys.stdin.read()
GIB = 1 << 30
for limit, most in (
    (resource.RLIMIT_CPU, {seconds}),
    (resource.RLIMIT_AS, GIB),
    (resource.RLIMIT_FSIZE, 1 << 20),
    (resource.RLIMIT_NOFILE, 32),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (most, most))
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
try:
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
except (OSError, AttributeError):
    pass
program = compile(program, "program", "exec")
FORBIDDEN = (
    "subprocess.", "os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.kill",
    "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.truncate",
    "os.link", "os.symlink", "os.mkdir", "shutil.", "socket.", "ctypes.", "signal.",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
def watch(event, args):
    if event.startswith(FORBIDDEN) or (event == "open" and (args[2] or 0) & WRITES):
        raise PermissionError(event)
sys.addaudithook(watch)
exec(program, {{"__name__": "program"}})
sys.__stdout__.write(done)
"""


def runs(program: str, seconds: float = _SECONDS) -> bool:
    """Whether a program ends by itself, without an error, within the limits.

    Args:
        program: Python source.
        seconds: of wall and of processor time.
    """
    done = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _CHILD.format(seconds=int(seconds) + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            text=True,
            errors="replace",
        )
        try:
            output, _ = child.communicate(f"{done}\n{program}", timeout=seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            child.kill()
            child.communicate()
            return False
    # The program's own exit(0) writes no such line.
    return child.returncode == 0 and output.endswith(done + "\n")
