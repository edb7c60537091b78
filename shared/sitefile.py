"""The site's own file, site.toml: who the site is, where its images lie, and what it calls things.

name = "hospital-north"
[data]
dir = "."                # folder of the images, relative to this file
format = "csv"           # auto, csv, folder, npz, coco-crops, coco, voc, masks: what the job's task reads
csv = "labels.csv"       # path,label and optional patient, split, frame, box, key
[label_map]
"Verschattung" = "opacity"
[limits]
max_unreadable = 0.05
[cache]
dir = ".consilium/cache"  # decoded images; this is the default
max_gb = 100              # beyond that, those of jobs that ran longest ago are removed
[privacy]                 # what may leave: see client/policy.py
require_dp = true
max_epsilon = 8.0
[server]                  # the federation's server, for `consilium site start`; paths are relative to this file
address = "consilium.example.org:8443"
ca = "ca.crt"             # whom to trust as the server
key = "node.key"          # who this site is
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cases import SiteData
from shared.config import nearest, read_toml
from shared.errors import UserError
from shared.settings import FORMATS

SITE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
OWN_FOLDER = ".consilium"  # what this program keeps beside a site's images; never taken for a class folder
# The site's rules on what may leave, each with its default; ``client.policy`` says what they mean.
PRIVACY: dict[str, bool | float | int | str] = {
    "require_dp": False,
    "max_epsilon": 0.0,
    "max_delta": 0.0,
    "unit": "image",
    "min_patients": 0,
    "metrics": "all",
    "subgroups": "",
    "min_cell": 1,
    "exact_counts": True,
    "declared_images": 0,
    "allow_shared_noise": False,
    "require_secure_aggregation": False,
    "max_update_norm": 0.0,
    "cryptographic_noise": False,
    "audit_in_model_card": False,
}
_KEYS: dict[str, dict[str, type]] = {
    "": {"name": str},
    "data": {"dir": str, "format": str, "csv": str},
    "limits": {"max_unreadable": float},
    "cache": {"dir": str, "max_gb": float},
    "privacy": {name: type(value) for name, value in PRIVACY.items()},
    "server": {"address": str, "ca": str, "key": str, "local_port": int},
}

_KINDS = {str: "a text in quotes", float: "a number", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class Connection:
    """How a site reaches its federation's server."""

    address: str  # host:port of the gateway
    ca: Path  # PEM: the authority whose word on the server's name is trusted
    key: Path  # OpenSSH private key on a NIST curve: the site's identity
    local_port: int  # on which the site's own processes talk, on 127.0.0.1 only; 0: one that is free


def read_connection(path: Path) -> Connection:
    """The [server] table of a site.toml.

    Raises:
        UserError: the file is wrong, or says nothing of a server.
    """
    content = read_toml(path)
    read_site(path)
    server = content.get("server", {})
    missing = [key for key in ("address", "ca", "key") if key not in server]
    if missing:
        raise UserError(
            f"{path}: [server] lacks {', '.join(missing)}; the start-up kit that the coordinator sent has these lines"
        )
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}", server["address"]):
        raise UserError(f"{path}: server.address = {server['address']!r}: must be host:port, as host.example.org:8443")
    folder = path.parent
    return Connection(server["address"], folder / server["ca"], folder / server["key"], server.get("local_port", 0))


def read_site(path: Path, home: Path | None = None) -> SiteData:
    """Read and validate a site.toml.

    The cache lies beside the file unless the file says otherwise, so that the next run finds it; where that folder
    cannot be written it lies in ``home``.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    path = Path(path)
    content = read_toml(path)
    try:
        _check(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    data = content.get("data", {})
    cache = content.get("cache", {}).get("dir", f"{OWN_FOLDER}/cache")
    own = home is None or "cache" in content or os.access(path.parent, os.W_OK)
    return SiteData(
        name=content["name"],
        root=path.parent / data.get("dir", "."),
        format=data.get("format", "auto"),
        csv=data.get("csv", ""),
        label_map=content.get("label_map", {}),
        max_unreadable=float(content.get("limits", {}).get("max_unreadable", 0.05)),
        cache=path.parent / cache if own or home is None else home / cache,
        cache_gb=float(content.get("cache", {}).get("max_gb", SiteData.cache_gb)),
    )


def _check(content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key == "label_map":
            if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
                raise UserError('[label_map] must hold lines like "your label" = "class of the job"')
        elif isinstance(value, dict):
            if key not in _KEYS:
                raise UserError(
                    f"unknown table [{key if key.isprintable() else repr(key)}]{nearest(key, [*_KEYS, 'label_map'])}"
                )
            for name, item in value.items():
                _check_value(key, name, item)
        else:
            _check_value("", key, value)
    if not re.fullmatch(SITE_NAME, content.get("name", "")):
        raise UserError(
            "name: give the site a short name of letters, digits, '.', '_' and '-', for example \"hospital-north\""
        )
    form = content.get("data", {}).get("format", "auto")
    if form not in FORMATS:
        raise UserError(f"data.format = {form!r}: must be one of {', '.join(FORMATS)}{nearest(form, FORMATS)}")
    limit = content.get("limits", {}).get("max_unreadable", 0.05)
    if not 0 <= limit <= 1:
        raise UserError(f"limits.max_unreadable = {limit}: must be from 0 to 1, for example 0.05 for 5 %")
    room = content.get("cache", {}).get("max_gb", SiteData.cache_gb)
    if not room > 0:
        raise UserError(f"cache.max_gb = {room}: must be above 0, for example 100")


def _check_value(table: str, name: str, value: Any) -> None:
    label = f"{table}.{name}" if table else name
    known = _KEYS[table]
    if name not in known:
        raise UserError(f"unknown key {label!r}{nearest(name, known)}")
    kind = known[name]
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{label} = {value!r}: must be {_KINDS[kind]}")
