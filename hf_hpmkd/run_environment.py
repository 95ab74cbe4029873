"""Where a run happened: versions, hardware, and the commit of this package. Nothing that tells whose machine it was."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "hf_hpmkd",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "timm",
    "scikit-learn",
    "numpy",
)


def environment() -> tuple[dict[str, str], dict[str, Any]]:
    """Versions of Python and the libraries, and the hardware: cpu, cores, gpus, system.

    Nothing that tells which machine, whose account or which folder it was.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = {"cpu": _cpu_name(), "cores": cores, "gpus": _gpu_names(), "system": platform.system()}
    return versions, hardware


def code_commit() -> str | None:
    """The git commit of this package where it lies in a clone, with "+changes" if files differ from it; else None."""
    folder = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Installed, or copied without its history, this file is none that git knows.
    if git("ls-files", "--error-unmatch", "hf_hpmkd/run_environment.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit


def _cpu_name() -> str:
    if platform.system() == "Linux":
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.is_file():
            found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
            if found:
                return found[1].strip()
    if platform.system() == "Darwin":
        brand = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(brand, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.machine()


def _gpu_names() -> list[str]:
    import torch  # here, so that reading a record does not load it

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
