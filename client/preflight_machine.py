"""The machine part of the preflight: graphics card, shared memory, room for decoded images."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from client.preflight import Finding, attention, ok, stop

GIB = 2**30
SMALL_SHM = 64 * 2**20  # what Docker gives a container that does not ask for more
LITTLE_DISK = 1 * GIB
LITTLE_GPU = 2 * GIB


@dataclass(frozen=True)
class GpuFacts:
    """What PyTorch and the system say of graphics cards."""

    build: str | None  # CUDA version that PyTorch was built for; None: a build without CUDA
    driver: str  # what the NVIDIA driver says of itself; "" if there is none on this machine
    usable: bool  # torch.cuda.is_available()
    warning: str = ""  # what PyTorch said when it was asked
    failed: str = ""  # why a small calculation on a card failed
    cards: tuple[str, ...] = ()
    free: int = 0  # bytes on the first card


def look_at_gpu() -> GpuFacts:
    """Ask PyTorch and the driver, and calculate a little on every card."""
    import torch

    driver = _driver()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    warning = " ".join(str(one.message).splitlines()[0] for one in said if "CUDA" in str(one.message))
    if not usable:
        return GpuFacts(torch.version.cuda, driver, False, warning)
    names, failed, free = [], "", 0
    try:
        for index in range(torch.cuda.device_count()):
            names.append(torch.cuda.get_device_name(index))
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 64.0**3:
                failed = f"{names[-1]} calculates wrongly"
        free = torch.cuda.mem_get_info(0)[0]
    except RuntimeError as error:
        failed = (str(error).splitlines() or ["unknown error"])[0]
    return GpuFacts(torch.version.cuda, driver, True, warning, failed, tuple(names), free)


def _driver() -> str:
    for path in (Path("/proc/driver/nvidia/version"), Path("/sys/module/nvidia/version")):
        try:
            return path.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
        except (OSError, IndexError):
            continue
    return "present" if Path("/dev/nvidiactl").exists() else ""


def gpu(facts: GpuFacts, device: str = "auto") -> Finding:
    """Whether training finds a graphics card.

    Args:
        device: the job's train.device; "auto" takes a card where there is one.
    """
    title, needed = "graphics card", device.startswith("cuda")
    if device == "cpu":
        return ok(title, "not asked for: the job trains on the processor")
    if facts.usable and facts.failed:
        return stop(
            title,
            f"{', '.join(facts.cards) or 'a card'} is there, but calculating on it fails ({facts.failed}), as training "
            "would",
            "let IT mend driver or card; until then train on the processor: set the environment variable "
            "CUDA_VISIBLE_DEVICES to nothing where the site is started",
        )
    if facts.usable:
        words = f"{', '.join(facts.cards)}, {facts.free / GIB:.0f} GiB free, calculates"
        if facts.free < LITTLE_GPU:
            return attention(
                title, words, "another program fills the card's memory: end it, or training may fail for want of memory"
            )
        return ok(title, words)
    judge = stop if needed else attention
    slow = f"the job asks for {device}" if needed else "training on the processor works, slower"
    if facts.driver and facts.build is None:
        return judge(
            title,
            f"the machine has one, but this PyTorch was built without CUDA; {slow}",
            "install the CUDA build of PyTorch, or leave it so if slow is fast enough",
        )
    if facts.driver:
        told = f": {facts.warning}" if facts.warning else ""
        return judge(
            title,
            f"the machine has one (driver: {facts.driver}), but PyTorch for CUDA {facts.build} cannot use it{told}; "
            f"{slow}",
            f"let IT update the NVIDIA driver to one for CUDA {facts.build}; in a container, start it with the card "
            "(docker: --gpus all)",
        )
    if facts.warning and "driver" in facts.warning.lower() and "no NVIDIA" not in facts.warning:
        return judge(title, f"PyTorch cannot use it: {facts.warning}; {slow}", "let IT update the NVIDIA driver")
    return judge(
        title,
        f"none found; {slow}",
        'choose another machine, or ask the coordinator for train.device = "auto"'
        if needed
        else "nothing, if the coordinator's round lasts long enough for it",
    )


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Whether processes can share memory: containers often get 64 MiB, or none that can be written."""
    title = f"shared memory {folder}"
    try:
        size = shutil.disk_usage(folder)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"consilium")
    except OSError as error:
        return attention(
            title,
            f"cannot be used ({error.strerror}); PyTorch needs it when processes share work",
            "in a container start it with --shm-size 1g (compose: shm_size: 1g)",
        )
    words = f"{_size(size.free)} free"
    if size.free < SMALL_SHM or size.total <= SMALL_SHM:
        return attention(
            title,
            f"{words}, of {_size(size.total)}; this version trains in one process, which does with that",
            "in a container start it with --shm-size 1g (compose: shm_size: 1g)",
        )
    return ok(title, words)


def disk(cache: Path, needed: int) -> Finding:
    """Room for decoded images, which are kept between rounds.

    Args:
        cache: the folder of the cache, which need not exist.
        needed: bytes that the images take once decoded; 0 where no job says what is made of them.
    """
    title = "disk"
    place = next(parent for parent in (cache.absolute(), *cache.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return stop(
            title,
            f"{cache}: this user cannot write there",
            "give the user who runs the site the right to write, or name another folder as [cache] dir in site.toml",
        )
    free = shutil.disk_usage(place).free
    missing = max(0, needed - _held(cache))
    words = f"{_size(free)} free for decoded images in {cache}"
    if needed:
        words += f", they take {_size(needed)}" + (
            f", {_size(needed - missing)} may lie there already" if missing < needed else ""
        )
    todo = (
        "make room, or name a folder on a larger disk as [cache] dir in site.toml; the cache may be emptied at any time"
    )
    if free < missing:
        return stop(title, f"{words}: too little", todo)
    if free < missing + LITTLE_DISK:
        return attention(title, f"{words}: little is left for models, logs and everything else", todo)
    return ok(title, words)


def _held(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def _size(number: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if number >= 10 or unit == "bytes" else f"{number:.1f} {unit}"
        number = number / 1024  # type: ignore[assignment]
    raise AssertionError
