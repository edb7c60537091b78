"""Which worker computes where: devices by their free memory, several workers on one if that is asked for."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

import torch

from shared.errors import UserError


def parse(text: str) -> list[str]:
    """The devices of ``--devices``: ``cpu``, or ``cuda:0,cuda:1`` and so on; ``cuda`` stands for all there are.

    Raises:
        UserError: it is not such a list, or this machine has no such device.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names == ["cpu"]:
        return names
    count = torch.cuda.device_count()
    if names == ["cuda"]:
        names = [f"cuda:{number}" for number in range(count)]
    wrong = [name for name in names if not re.fullmatch(r"cuda:\d{1,3}", name)]
    if wrong or not names:
        raise UserError(f"--devices {text}: write cpu or a list such as cuda:0,cuda:1 (CUDA devices here: {count})")
    if len(set(names)) < len(names):
        raise UserError(f"--devices {text}: names a device twice; --per-device says how many workers share one")
    if missing := [name for name in names if int(name[5:]) >= count]:
        raise UserError(f"--devices {text}: no {missing[0]}, this machine has {count} CUDA devices")
    return names


def place(free: Mapping[str, int], per_device: int, workers: int | None = None) -> list[str]:
    """A device for each worker.

    Each worker goes where the free memory, shared evenly with those already there, is the largest; of equals to the
    first. So a device that others use gets fewer workers, unless all places are taken.

    Args:
        free: bytes that are free on each device, in the order of preference.
        per_device: workers on one device at the most.
        workers: how many there are; None fills all places.

    Raises:
        UserError: there are more workers than places.
    """
    places = per_device * len(free)
    workers = places if workers is None else workers
    if workers > places:
        raise UserError(
            f"{workers} workers, but {len(free)} devices with {per_device} each: lower --workers or raise --per-device"
        )
    taken = dict.fromkeys(free, 0)
    chosen = []
    for _ in range(workers):
        open_ = [device for device in free if taken[device] < per_device]
        best = max(open_, key=lambda device: free[device] / (taken[device] + 1))
        taken[best] += 1
        chosen.append(best)
    return chosen


def free_memory(devices: Sequence[str]) -> dict[str, int]:
    """Free bytes of CUDA devices, as the driver's own tool tells them; the same for all where it does not.

    Not asked of torch: that would start CUDA in this process, which could then no longer fork workers.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    return read_free(told, devices, os.environ.get("CUDA_VISIBLE_DEVICES"))


def read_free(told: str, devices: Sequence[str], visible: str | None) -> dict[str, int]:
    """The answer of ``nvidia-smi`` by CUDA's names, which number only the ``visible`` devices."""
    rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.count(",") == 2]
    cards = {name: int(row[2]) * 2**20 for row in rows if row[2].isdigit() for name in row[:2]}
    order = [part.strip() for part in visible.split(",")] if visible is not None else [row[0] for row in rows]
    numbered = {f"cuda:{number}": cards.get(card) for number, card in enumerate(order)}
    known = {device: numbered.get(device) for device in devices}
    return {device: memory if memory is not None else 1 for device, memory in known.items()}


def places(text: str, per_device: int | None, workers: int | None) -> list[str]:
    """The device of each worker for ``--devices``, ``--per-device`` and ``--workers``; none named: no choice, [].

    Raises:
        UserError: as ``parse`` and ``place``.
    """
    if not text:
        if per_device is not None:
            raise UserError("--per-device: says how many workers share a device of --devices, which is not given")
        return []
    devices = parse(text)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    if devices == ["cpu"]:
        return place({"cpu": 1}, per_device or workers or cores(), workers)
    return place(free_memory(devices), per_device or 1, workers)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
