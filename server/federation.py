"""The federation's own file, federation.toml, and where everything of a federation lies at the coordinator.

name = "chest-council"
[server]
host = "consilium.example.org"  # by which hospitals reach the gateway; stands in its certificate
also = ["10.0.0.5"]             # further names and addresses in the certificate
listen = "0.0.0.0"              # the address the gateway listens on
port = 8443
internal_port = 8444            # Flower's SuperLink behind the gateway, on 127.0.0.1 only
[sites.hospital-north]          # one table a site
contact = "it@north.example.org"
key = "north.pub"               # the site made its own key (`consilium site keygen`); else one is made here
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import nearest, read_toml
from shared.errors import UserError
from shared.sitefile import SITE_NAME

PORT = 8443
INTERNAL_PORT = 8444
_TABLES: dict[str, dict[str, type]] = {
    "server": {"host": str, "also": list, "listen": str, "port": int, "internal_port": int},
    "sites": {"contact": str, "key": str},
}
_KINDS = {str: "a text in quotes", int: "a whole number", list: 'a list of texts, as ["10.0.0.5"]'}
_HOST = r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"


@dataclass(frozen=True)
class SiteEntry:
    """One hospital of a federation, as federation.toml names it."""

    name: str
    contact: str = ""
    key: Path | None = None  # public key that the site made; None: the coordinator makes the pair


@dataclass(frozen=True)
class Federation:
    """What federation.toml says."""

    name: str
    host: str
    also: tuple[str, ...] = ()
    listen: str = "0.0.0.0"
    port: int = PORT
    internal_port: int = INTERNAL_PORT
    sites: tuple[SiteEntry, ...] = ()

    @property
    def address(self) -> str:
        """host:port by which hospitals reach the gateway."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Folder:
    """The coordinator's folder DIR: what lies where. Nothing here creates anything."""

    path: Path

    @property
    def federation(self) -> Path:
        """Copy of the federation.toml that was last provisioned."""
        return self.path / "federation.toml"

    @property
    def ca_cert(self) -> Path:
        """The authority's certificate, which every site has too."""
        return self.path / "ca" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The authority's key: who has it can let anybody in."""
        return self.path / "ca" / "ca.key"

    @property
    def server(self) -> Path:
        """What the server's machine needs."""
        return self.path / "server"

    @property
    def server_cert(self) -> Path:
        """The gateway's certificate."""
        return self.server / "server.crt"

    @property
    def server_key(self) -> Path:
        """The gateway's key."""
        return self.server / "server.key"

    @property
    def nginx_conf(self) -> Path:
        """The gateway's configuration."""
        return self.server / "nginx.conf"

    @property
    def superexec_secret(self) -> Path:
        """Shared by SuperLink and its executor."""
        return self.server / "superexec.secret"

    @property
    def unit(self) -> Path:
        """The systemd unit of the server."""
        return self.server / "consilium-server.service"

    @property
    def compose(self) -> Path:
        """The compose file of the server's containers."""
        return self.server / "compose.yml"

    @property
    def sites(self) -> Path:
        """A folder for each site: its public key and who it is."""
        return self.path / "sites"

    @property
    def revoked(self) -> Path:
        """A folder for each site that is out, moved here from ``sites``."""
        return self.path / "revoked"

    @property
    def kits(self) -> Path:
        """The start-up kits, one for each site."""
        return self.path / "kits"

    @property
    def state(self) -> Path:
        """Made by `consilium server start`: SuperLink's database, FLWR_HOME, logs, process ids."""
        return self.path / "state"

    @property
    def gateway(self) -> Path:
        """nginx's own folder: process id, logs, temporary files."""
        return self.state / "gateway"

    @property
    def runs(self) -> Path:
        """The run folders."""
        return self.path / "runs"

    def node_pub(self, site: str) -> Path:
        """The public key by which a site is known, in OpenSSH's format."""
        return self.sites / site / "node.pub"

    def kit(self, site: str) -> Path:
        """A site's start-up kit."""
        return self.kits / f"{site}.zip"

    def site_names(self) -> list[str]:
        """The sites that may connect, sorted."""
        return sorted(path.parent.name for path in self.sites.glob("*/node.pub"))

    def read(self) -> Federation:
        """The federation that was last provisioned.

        Raises:
            UserError: nothing was provisioned here, or its file was damaged.
        """
        if self.path.is_file():
            raise UserError(f"{self.path}: is a file; name the folder that was given to `consilium provision --out`")
        if not self.federation.exists():
            raise UserError(
                f"{self.path}: no federation was set up here; do so with "
                f"`consilium provision federation.toml --out {self.path}`"
            )
        return read_federation(self.federation)


def read_federation(path: Path) -> Federation:
    """Read and validate a federation.toml.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    path = Path(path)
    content = read_toml(path)
    try:
        _check_keys(content)
        return _federation(content, path.parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _federation(content: Mapping[str, Any], folder: Path) -> Federation:
    name, server = content.get("name", ""), content.get("server", {})
    if not re.fullmatch(SITE_NAME, name):
        raise UserError("name: name the federation with letters, digits, '.', '_' and '-', as name = \"chest-council\"")
    if "host" not in server:
        raise UserError('[server] host is missing: the name by which hospitals reach this server, as "fl.example.org"')
    for key, value in [("host", server["host"]), *(("also", value) for value in server.get("also", []))]:
        if not is_host(value):
            raise UserError(f"server.{key}: {value!r} is neither a host name nor an IP address")
    listen = server.get("listen", "0.0.0.0")
    if not is_address(listen):
        raise UserError(f"server.listen = {listen!r}: must be an IP address of this machine, or 0.0.0.0 for all")
    port, internal = server.get("port", PORT), server.get("internal_port", INTERNAL_PORT)
    for key, value in (("port", port), ("internal_port", internal)):
        if not 1 <= value <= 65535:
            raise UserError(f"server.{key} = {value}: must be from 1 to 65535")
    if port == internal:
        raise UserError(f"server.port and server.internal_port are both {port}: give them different ports")
    sites = tuple(_site(name, table, folder) for name, table in content.get("sites", {}).items())
    folded = [site.name.casefold() for site in sites]
    for site in sites:  # their folders and kits must not collide on disks that ignore case
        if folded.count(site.name.casefold()) > 1:
            raise UserError(f"[sites.{site.name}]: another site has the same name but for upper and lower case")
    return Federation(name, server["host"], tuple(server.get("also", [])), listen, port, internal, sites)


def _site(name: str, table: Mapping[str, Any], folder: Path) -> SiteEntry:
    if not re.fullmatch(SITE_NAME, name):
        raise UserError(f"site {name!r}: a site's name has letters, digits, '.', '_' and '-', as hospital-north")
    if "key" in table and not table["key"]:
        raise UserError(f"sites.{name}.key is empty: name the site's public key, or leave the line out")
    contact = table.get("contact", "")
    if not contact.isprintable():
        raise UserError(f"sites.{name}.contact: must be one line of text")
    return SiteEntry(name, contact, folder / table["key"] if "key" in table else None)


def is_address(text: str) -> bool:
    """Whether ``text`` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # an address with a zone cannot stand in a certificate


def is_host(text: str) -> bool:
    """Whether ``text`` is a host name or an IP address, so fit for a certificate."""
    if re.fullmatch(r"[0-9.]+", text):
        return is_address(text)
    return is_address(text) or re.fullmatch(_HOST, text) is not None


def _check_keys(content: Mapping[str, Any]) -> None:
    """Every key known and of its kind."""
    known = ["name", *_TABLES]
    for key, value in content.items():
        if key not in known:
            raise UserError(f"unknown key {key!r}{nearest(key, known)}")
        if key == "name":
            _check_value("name", value, str)
        elif not isinstance(value, dict):
            raise UserError(
                f"{key} = {value!r}: must be a table, as [{key}{'.hospital-north' if key == 'sites' else ''}]"
            )
        elif key == "server":
            _check_table("server", value, _TABLES["server"])
        else:
            for name, table in value.items():
                if not isinstance(table, dict):
                    raise UserError(f"sites.{name} = {table!r}: must be a table, as [sites.{name}]")
                _check_table(f"sites.{name}", table, _TABLES["sites"])


def _check_table(label: str, table: Mapping[str, Any], known: Mapping[str, type]) -> None:
    for name, value in table.items():
        if name not in known:
            raise UserError(f"unknown key '{label}.{name}'{nearest(name, known)}")
        _check_value(f"{label}.{name}", value, known[name])


def _check_value(label: str, value: Any, kind: type) -> None:
    wrong = not isinstance(value, kind) or isinstance(value, bool)
    if wrong or (kind is list and not all(isinstance(item, str) for item in value)):
        raise UserError(f"{label} = {value!r}: must be {_KINDS[kind]}")
