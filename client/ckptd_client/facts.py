"""What can be known about the run for reproducing it: code, machine, packages, command. Collected in the background.

Nothing here waits longer than GIT_S in all, needs anything installed, or initialises a GPU.
"""

import hashlib
import os
import platform
import subprocess
import sys
import time
from typing import Any, Dict, List, Optional

from ckptd_client.capture import MASK, is_secret, mask_arguments, mask_text

GIT_S = 1.0  # for all git commands together
DIFF_BYTES_MAX = 64 << 20
PACKAGES_MAX = 500
# Settings that change what a training run computes, or where it ran.
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONHASHSEED",
    "TORCH_CUDA_ARCH_LIST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID",
    "SLURM_JOB_NAME", "SLURM_NODELIST", "SLURM_PROCID", "SLURM_ARRAY_TASK_ID", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV",
    "HOSTNAME", "KUBERNETES_SERVICE_HOST", "JOB_NAME",
)  # fmt: skip
_ENVIRONMENT_PREFIXES = ("NCCL_", "PYTORCH_", "TORCH_", "XLA_", "JAX_")


def quick_facts() -> Dict[str, Any]:
    """Return what costs no I/O: host, process, command line, Python."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "argv": mask_arguments([str(argument) for argument in getattr(sys, "argv", [])]),
        "command": _command(),
        "cwd": _cwd(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _command() -> List[str]:
    """Return how the interpreter was started, "-m package" and all; [] where Python 3.9 does not keep it.

    A program on the command line itself is left out: its text is code, where no mask finds a secret.
    """
    given = [str(argument) for argument in getattr(sys, "orig_argv", [])]
    return [] if "-c" in given and getattr(sys, "argv", [""])[:1] == ["-c"] else mask_arguments(given)


def slow_facts() -> Dict[str, Any]:
    """Return the rest: environment, packages, GPUs, seeds, git. Blocks for at most GIT_S and some milliseconds."""
    facts: Dict[str, Any] = {"env": environment(), "packages": packages()}
    facts.update(_gpus())
    facts.update(_seeds())
    facts.update(git_facts(_cwd()))
    return facts


def rss_bytes() -> Optional[int]:
    """Return how much memory this process has in use now; None where /proc does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def environment() -> Dict[str, str]:
    """Return the variables of the allow-list that are set, secrets masked."""
    return {
        name: MASK if is_secret(name) else mask_text(value)
        for name, value in sorted(os.environ.items())
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }


def packages() -> Dict[str, str]:
    """Return the versions of the imported packages that tell theirs; the disk is not touched."""
    standard = getattr(sys, "stdlib_module_names", frozenset(sys.builtin_module_names))
    found: Dict[str, str] = {}
    for name in sorted(name for name in list(sys.modules) if "." not in name):
        if name in standard or name.startswith("_"):
            continue
        # vars() and not getattr(): a lazy package would import half of itself to answer.
        version = getattr(sys.modules.get(name), "__dict__", {}).get("__version__")
        if isinstance(version, str) and len(found) < PACKAGES_MAX:
            found[name] = version[:64]
    return found


def git_facts(directory: str) -> Dict[str, Any]:
    """Return commit, branch and the SHA-256 of uncommitted changes of the repository around `directory`.

    {} outside of a repository or without git; "git_problem" says what took too long.
    """
    deadline_s = time.monotonic() + GIT_S
    try:
        head = _git(directory, deadline_s, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")
        if head is None:
            return {}
        commit, _, branch = head.decode("utf-8", "replace").strip().partition("\n")
        facts: Dict[str, Any] = {"git_commit": commit, "git_branch": branch}
        diff = _git(directory, deadline_s, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary")
        untracked = _git(directory, deadline_s, "ls-files", "--others", "--exclude-standard", "-z")
    except subprocess.TimeoutExpired:
        return {"git_problem": f"git took longer than {GIT_S} s"}
    except OSError:
        return {}  # git is not installed, or the directory is gone
    if diff is None or untracked is None:
        return facts
    facts["git_dirty"] = bool(diff or untracked)
    facts["git_dirty_sha256"] = hashlib.sha256(diff).hexdigest() if diff and len(diff) <= DIFF_BYTES_MAX else None
    facts["git_untracked"] = untracked.count(b"\0")
    return facts


def _git(directory: str, deadline_s: float, *arguments: str) -> Optional[bytes]:
    """Run one git command; None when it fails. Never asks, never takes a lock others would wait for."""
    done = subprocess.run(
        ["git", "-C", directory, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"},
        timeout=max(0.01, deadline_s - time.monotonic()),
        check=False,
    )
    return done.stdout if done.returncode == 0 else None


def _gpus() -> Dict[str, Any]:
    """Return GPU names when CUDA is in use already; asking earlier would initialise it, and break a later fork."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return {}
    names: List[str] = [str(cuda.get_device_name(index)) for index in range(cuda.device_count())]
    return {"gpus": names, "cuda": str(getattr(getattr(torch, "version", None), "cuda", ""))}


def _seeds() -> Dict[str, Any]:
    torch = sys.modules.get("torch")
    initial_seed = getattr(torch, "initial_seed", None)
    return {"torch_seed": initial_seed()} if callable(initial_seed) else {}


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the directory was removed under us
        return ""
