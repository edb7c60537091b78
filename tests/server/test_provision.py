"""`provision` over a federation's life: begun, added to, renewed, revoked; and what lies in a kit."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from client.policy import read_policy
from server import kits, pki
from server.expiry import expiry
from server.federation import Folder
from server.provision import provision, revoke
from shared.errors import UserError
from shared.sitefile import PRIVACY, read_connection, read_site

NOW = datetime.now(UTC)
TEXT = """
name = "council"
[server]
host = "fl.example.org"
also = ["10.0.0.5"]
port = 9443
[sites.north]
contact = "Ada <it@north.example.org>"
[sites.south]
"""


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its mode and bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode & 0o777, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def unpack(kit: Path, to: Path) -> Path:
    """As `unzip` does, which keeps the modes."""
    to.mkdir()
    subprocess.run(["unzip", "-q", str(kit), "-d", str(to)], check=True, timeout=60)
    return to


def keygen(path: Path) -> str:
    """A key pair that OpenSSH made; the public half."""
    words = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "x", "-f", str(path)]
    subprocess.run(words, check=True, timeout=60)
    return path.with_suffix(".pub").read_text()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(TEXT)
    return path


@pytest.fixture
def made(tmp_path: Path, file: Path) -> Folder:
    provision(file, tmp_path / "fed", now=NOW)
    return Folder(tmp_path / "fed")


def test_what_it_makes_and_who_may_read_it(made: Folder) -> None:
    files = content(made.path)
    assert set(files) == {
        *(".gitignore", "federation.toml"),
        *("ca/ca.crt", "ca/ca.key"),
        *("server/server.crt", "server/server.key", "server/superexec.secret"),
        *("server/nginx.conf", "server/consilium-server.service", "server/compose.yml"),
        *("sites/north/node.pub", "sites/south/node.pub"),
        *("kits/north.zip", "kits/south.zip"),
    }
    secret = {"ca/ca.key", "server/server.key", "server/superexec.secret", "kits/north.zip", "kits/south.zip"}
    assert {name for name, (mode, _) in files.items() if mode == 0o600} == secret
    for name, (mode, data) in files.items():
        assert mode in (0o600, 0o644)
        assert (b"PRIVATE KEY" in data) == name.endswith(".key"), name
    words = ["openssl", "verify", "-x509_strict", "-verify_hostname", "fl.example.org", "-CAfile", str(made.ca_cert)]
    assert subprocess.run([*words, str(made.server_cert)], capture_output=True, timeout=60).returncode == 0


def test_git_takes_nothing_of_it_and_a_gitignore_of_ones_own_stays(made: Folder) -> None:
    ignore = made.path / ".gitignore"
    assert ignore.read_text() == "*\n"
    ignore.write_text("*\n!federation.toml\n")
    provision(None, made.path, now=NOW)
    assert ignore.read_text() == "*\n!federation.toml\n"


def test_provision_and_status_count_the_same_days(tmp_path: Path, file: Path) -> None:
    lines = provision(file, tmp_path / "fed")
    (told,) = [line for line in lines if line.startswith("server certificate")]
    days = re.search(r"\((\d+) days\)", told)
    assert days is not None
    assert expiry(Folder(tmp_path / "fed"))[0] == f"certificate: valid for {days[1]} days"


def test_again_changes_nothing_to_the_byte_and_says_so(made: Folder, file: Path) -> None:
    before = content(made.path)
    times = {path: path.stat().st_mtime_ns for path in made.path.rglob("*") if path.is_file()}
    lines = provision(None, made.path, now=NOW + timedelta(days=100))
    assert content(made.path) == before
    assert {path: path.stat().st_mtime_ns for path in made.path.rglob("*") if path.is_file()} == times
    told = [line for line in lines if not line.startswith("  ")]
    assert [line.split(":")[0] for line in told] == ["authority", "server certificate", "server", "north", "south"]
    assert all("kept" in line and "made" not in line and "written" not in line for line in told)


def test_modes_that_somebody_loosened_are_set_right(made: Folder) -> None:
    made.kit("north").chmod(0o644)
    provision(None, made.path, now=NOW)
    assert made.kit("north").stat().st_mode & 0o777 == 0o600


def test_a_new_site_leaves_the_others_as_they_are(made: Folder, file: Path) -> None:
    before = content(made.path)
    file.write_text(TEXT + "[sites.west]\n")
    lines = provision(file, made.path, now=NOW)
    after = content(made.path)
    assert set(after) - set(before) == {"sites/west/node.pub", "kits/west.zip"}
    assert {name for name in before if after[name] != before[name]} == {"federation.toml"}
    new, kept = lines.index("west: new; kit written"), lines.index("north: kept; kit kept")
    assert lines[new + 1] == f"  {made.kit('west')}"
    assert "hand it over safely, then delete it here" in lines[new + 2]
    assert "still holds" in lines[kept + 2]
    assert "once it is handed over" in lines[kept + 2]


@pytest.mark.parametrize(("days", "renewed"), [(330, False), (335.9, False), (336.1, True), (390, True), (500, True)])
def test_the_server_certificate_is_renewed_with_less_than_60_days_left(
    made: Folder, days: float, renewed: bool
) -> None:
    before = content(made.path)
    now = NOW + timedelta(days=days)
    lines = provision(None, made.path, now=now)
    after = content(made.path)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == ({"server/server.crt", "server/server.key"} if renewed else set())
    assert pki.days_left(pki.read_certificate(made.server_cert), now) == pytest.approx(396 if renewed else 396 - days)
    assert any(line.startswith("server certificate: made (") for line in lines) == renewed
    assert pki.issued_by(pki.read_certificate(made.server_cert), pki.read_certificate(made.ca_cert))
    assert pki.belong_together(pki.read_certificate(made.server_cert), pki.read_private_key(made.server_key))


def test_another_host_name_makes_a_new_certificate_and_new_kits_with_the_same_keys(made: Folder, file: Path) -> None:
    before = content(made.path)
    key = kits.private_key_of(made.kit("north"))
    file.write_text(TEXT.replace("fl.example.org", "new.example.org"))
    lines = provision(file, made.path, now=NOW)
    after = content(made.path)
    assert {name for name in before if after[name] != before[name]} == {
        *("federation.toml", "server/server.crt", "server/server.key", "kits/north.zip", "kits/south.zip")
    }
    assert kits.private_key_of(made.kit("north")) == key
    assert any("the server's names changed" in line for line in lines)


@pytest.mark.parametrize("damage", ["key of another", "no key", "garbage", "other authority"])
def test_a_server_certificate_that_does_not_work_is_made_anew(made: Folder, damage: str) -> None:
    if damage == "key of another":
        made.server_key.write_bytes(made.ca_key.read_bytes())
    elif damage == "no key":
        made.server_key.unlink()
    elif damage == "garbage":
        made.server_cert.write_text("garbage")
    else:
        ca, key = pki.make_ca("council", NOW)
        (made.path / "x.crt").write_bytes(ca)
        hosts = ["fl.example.org", "10.0.0.5", "localhost", "127.0.0.1"]
        pair = pki.make_server_certificate(
            "council", hosts, pki.read_certificate(made.path / "x.crt"), pki.parse_private_key(key), NOW
        )
        made.server_cert.write_bytes(pair[0])
        made.server_key.write_bytes(pair[1])
    provision(None, made.path, now=NOW)
    server = pki.read_certificate(made.server_cert)
    assert pki.issued_by(server, pki.read_certificate(made.ca_cert))
    assert pki.belong_together(server, pki.read_private_key(made.server_key))
    assert made.server_key.stat().st_mode & 0o777 == 0o600


def test_the_authoritys_key_may_be_kept_elsewhere_until_it_is_needed(made: Folder) -> None:
    away = made.ca_key.read_bytes()
    made.ca_key.unlink()
    provision(None, made.path, now=NOW)
    with pytest.raises(UserError, match=r"ca\.key is not there: put it back"):
        provision(None, made.path, now=NOW + timedelta(days=390))
    assert not made.ca_key.exists()
    pki.write_file(made.ca_key, pki.make_ca("council", NOW)[1], 0o600)
    with pytest.raises(UserError, match="is not the key of"):
        provision(None, made.path, now=NOW + timedelta(days=390))
    pki.write_file(made.ca_key, away, 0o600)
    provision(None, made.path, now=NOW + timedelta(days=390))


def test_a_lost_authority_is_never_replaced(made: Folder) -> None:
    made.ca_cert.unlink()
    before = content(made.path)
    with pytest.raises(UserError, match="put it back from your backup"):
        provision(None, made.path, now=NOW)
    assert content(made.path) == before


def test_a_kit_holds_what_a_site_needs_and_the_key_unpacks_for_its_owner_alone(made: Folder, tmp_path: Path) -> None:
    kit = unpack(made.kit("north"), tmp_path / "north")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in kit.iterdir()}
    assert modes == {
        **dict.fromkeys(("ca.crt", "site.toml", "compose.yml", "compose.gpu.yml", "guide.html"), 0o644),
        "consilium-site.service": 0o644,
        "node.key": 0o600,
    }
    assert (kit / "ca.crt").read_bytes() == made.ca_cert.read_bytes()
    done = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(kit / "node.key")], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split()[:2] == made.node_pub("north").read_text().split()[:2]
    assert made.node_pub("north").read_text() != made.node_pub("south").read_text()


def test_site_toml_of_a_kit_is_complete_and_closed_until_it_is_filled_in(made: Folder, tmp_path: Path) -> None:
    file = unpack(made.kit("north"), tmp_path / "north") / "site.toml"
    assert read_site(file).name == "north"
    connection = read_connection(file)
    assert (connection.address, connection.ca, connection.key) == (
        "fl.example.org:9443",
        file.parent / "ca.crt",
        file.parent / "node.key",
    )
    text = file.read_text()
    table = text.split("[privacy]")[1].split("\n[")[0]
    lines = [line for line in table.splitlines() if re.match(r"\w+ =", line)]
    assert [line.split(" =")[0] for line in lines] == list(PRIVACY)
    assert all("# " in line for line in lines)
    with pytest.raises(UserError, match="declared_images"):  # what nobody filled in holds the site back
        read_policy(file)
    file.write_text(text.replace("declared_images = 0 ", "declared_images = 400 "))
    policy = read_policy(file)
    assert policy.require_dp
    assert (policy.max_epsilon, policy.unit, policy.min_cell, policy.exact_counts) == (8.0, "patient", 5, False)


class Page(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        assert tag not in ("script", "link", "img", "iframe")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_guide_needs_no_network_and_shows_the_fingerprints_that_the_usual_tools_show(
    made: Folder, tmp_path: Path
) -> None:
    kit = unpack(made.kit("north"), tmp_path / "north")
    html = (kit / "guide.html").read_text()
    page = Page()
    page.feed(html)
    assert page.fetched == []
    assert "url(" not in html
    assert "$" not in page.text
    assert "Ada <it@north.example.org>" in page.text  # shown as written, not taken for markup
    words = ["openssl", "x509", "-in", str(kit / "ca.crt"), "-noout", "-fingerprint", "-sha256"]
    ca = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip().split("=")[1]
    words = ["ssh-keygen", "-lf", str(kit / "node.key")]
    key = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()[1]
    for shown in (ca, key, pki.words(bytes.fromhex(ca.replace(":", ""))), "fl.example.org:9443", "north"):
        assert shown in page.text
    assert pki.words(pki.fingerprint(kit / "node.key")[0]) in page.text
    steps = page.text[page.text.index("Steps") :]  # the same commands as in docs/hospital.md
    assert "consilium site check site.toml --job JOB.toml" in steps
    assert "Ask the coordinator for the job" in steps
    assert "consilium site start site.toml" in steps


def test_a_site_that_made_its_own_key_gets_a_kit_without_one(tmp_path: Path, file: Path) -> None:
    line = keygen(tmp_path / "own")
    file.write_text(TEXT.replace("[sites.south]", '[sites.south]\nkey = "own.pub"'))
    folder = Folder(tmp_path / "fed")
    provision(file, folder.path, now=NOW)
    assert folder.node_pub("south").read_text().split() == [*line.split()[:2], "south"]
    names = zipfile.ZipFile(folder.kit("south")).namelist()
    assert "node.key" not in names
    assert "ca.crt" in names
    assert b"made it with consilium site keygen" in zipfile.ZipFile(folder.kit("south")).read("guide.html")
    before = content(folder.path)
    (tmp_path / "own.pub").unlink()  # the folder's copy of federation.toml does not lie beside the key
    provision(None, folder.path, now=NOW)
    assert content(folder.path) == before


def test_a_site_may_change_to_a_key_of_its_own(made: Folder, tmp_path: Path, file: Path) -> None:
    line, old = keygen(tmp_path / "own"), made.node_pub("south").read_text()
    file.write_text(TEXT.replace("[sites.south]", '[sites.south]\nkey = "own.pub"'))
    lines = provision(file, made.path, now=NOW)
    assert any("south: key replaced, the old one no longer counts" in line for line in lines)
    assert made.node_pub("south").read_text().split()[:2] == line.split()[:2]
    (away,) = made.revoked.glob("south-*/node.pub")
    assert away.read_text() == old
    assert kits.private_key_of(made.kit("south")) is None
    before = content(made.path)
    provision(file, made.path, now=NOW)
    assert content(made.path) == before


@pytest.mark.parametrize("case", ["missing", "private", "ed25519", "twice", "of another"])
def test_a_key_that_cannot_be_used_stops_before_anything_is_written(tmp_path: Path, file: Path, case: str) -> None:
    keygen(tmp_path / "own")
    out = tmp_path / "fed"
    words = {"missing": "no such file", "private": "must never leave", "ed25519": "NIST curves", "twice": "each site"}
    key = {"missing": "none.pub", "private": "own", "ed25519": "ed.pub"}.get(case, "own.pub")
    if case == "ed25519":
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "ed")], check=True, timeout=60
        )
    if case == "of another":
        file.write_text(TEXT.replace("[sites.north]", '[sites.north]\nkey = "own.pub"'))
        provision(file, out, now=NOW)
    before = content(out) if out.exists() else {}
    more = '[sites.west]\nkey = "own.pub"\n' if case in ("twice", "of another") else ""
    south = "" if case == "of another" else f'key = "{key}"\n'
    file.write_text(TEXT.replace("[sites.north]", "[sites.other]") + south + more)
    with pytest.raises(UserError, match=words.get(case, "is the key of north")) as caught:
        provision(file, out, now=NOW)
    assert "\n" not in str(caught.value)
    assert (content(out) if out.exists() else {}) == before


def test_a_kit_that_was_handed_over_and_deleted_stays_so(made: Folder) -> None:
    key = made.node_pub("north").read_bytes()
    made.kit("north").unlink()
    lines = provision(None, made.path, now=NOW)
    assert not made.kit("north").exists()
    assert made.node_pub("north").read_bytes() == key
    assert any(line.startswith("north: kept; its kit was handed over") for line in lines)


def test_a_revoked_site_stays_out_until_it_is_let_back_in_with_a_new_key(made: Folder, file: Path) -> None:
    old, kept = made.node_pub("north").read_text(), content(made.sites / "south")
    assert "revoked, its kit deleted" in revoke(made.path, "north", now=NOW)[0]
    assert made.site_names() == ["south"]
    assert content(made.sites / "south") == kept
    assert [path.name for path in made.revoked.iterdir()] == [f"north-{NOW:%Y%m%dT%H%M%SZ}"]
    assert not made.kit("north").exists()
    assert f"revoked before, on {NOW:%Y-%m-%d}" in revoke(made.path, "north")[0]

    lines = provision(file, made.path, now=NOW)  # still in the file, still out
    assert any(line.startswith(f"north: revoked on {NOW:%Y-%m-%d}, stays out") for line in lines)
    assert made.site_names() == ["south"]
    assert not made.kit("north").exists()

    provision(file, made.path, reinstate=["north"], now=NOW)
    assert made.site_names() == ["north", "south"]
    assert made.node_pub("north").read_text() != old
    assert pki.parse_private_key(kits.private_key_of(made.kit("north")) or b"")
    with pytest.raises(UserError, match="north: is not revoked"):
        provision(file, made.path, reinstate=["north"], now=NOW)
    revoke(made.path, "north", now=NOW)  # twice in one second
    assert len(list(made.revoked.iterdir())) == 2


def test_a_revoked_key_comes_back_under_no_name(tmp_path: Path, file: Path) -> None:
    keygen(tmp_path / "own")
    text = TEXT.replace("[sites.south]", '[sites.south]\nkey = "own.pub"')
    file.write_text(text)
    folder = Folder(tmp_path / "fed")
    provision(file, folder.path, now=NOW)
    revoke(folder.path, "south", now=NOW)
    for change in (text, text.replace("sites.south", "sites.fresh")):
        file.write_text(change)
        with pytest.raises(UserError, match=r"was revoked \(south-.*cannot come back.*keygen"):
            provision(file, folder.path, reinstate=["south"] if change == text else [], now=NOW)
    shutil.move(tmp_path / "own.pub", tmp_path / "old.pub")
    (tmp_path / "own").unlink()
    keygen(tmp_path / "own")
    file.write_text(text)
    provision(file, folder.path, reinstate=["south"], now=NOW)
    assert folder.site_names() == ["north", "south"]


@pytest.mark.parametrize("name", ["nroth", "../sites/north", "", "."])
def test_revoking_what_is_no_site_moves_nothing(made: Folder, name: str) -> None:
    before = content(made.path)
    with pytest.raises(UserError, match=r"no such site.*there are: north, south"):
        revoke(made.path, name, now=NOW)
    assert content(made.path) == before


def test_revoking_works_when_all_else_is_broken(made: Folder) -> None:
    made.federation.write_text("not toml")
    made.ca_cert.unlink()
    revoke(made.path, "north", now=NOW)
    assert made.site_names() == ["south"]


def test_a_site_that_was_taken_out_of_the_file_is_named_not_dropped(made: Folder, file: Path) -> None:
    file.write_text(TEXT.replace("[sites.south]", ""))
    lines = provision(file, made.path, now=NOW)
    assert any(line.startswith("south: NOT in the federation's file, but may still connect") for line in lines)
    assert made.site_names() == ["north", "south"]


def test_folders_that_are_not_this_federations_are_left_alone(made: Folder, tmp_path: Path, file: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="no federation of ours"):
        provision(file, other, now=NOW)
    assert content(other) == {"letter.txt": (0o644, b"mine")}
    before = content(made.path)
    file.write_text(TEXT.replace('"council"', '"board"'))
    with pytest.raises(UserError, match="holds the federation council"):
        provision(file, made.path, now=NOW)
    assert content(made.path) == before
    with pytest.raises(UserError, match="is a file"):
        provision(file, file, now=NOW)
    with pytest.raises(UserError, match="no federation was set up here"):
        provision(None, tmp_path / "nothing", now=NOW)


def test_only_one_works_on_a_folder_at_a_time(made: Folder) -> None:
    handle = os.open(made.path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="at work there"):
            provision(None, made.path, now=NOW)
    finally:
        os.close(handle)
    provision(None, made.path, now=NOW)


@pytest.mark.parametrize("writes", range(13))
def test_killed_between_any_two_files_the_next_run_finishes(tmp_path: Path, file: Path, writes: int) -> None:
    """The process ends for good before its n-th file is written; then all that holds of a fresh folder must hold."""
    program = f"""
import os, sys
from pathlib import Path
from server import pki, provision
real, left = pki.write_file, [{writes}]
def write(*words):
    if left[0] == 0:
        os._exit(9)
    left[0] -= 1
    real(*words)
pki.write_file = write
provision.provision(Path(sys.argv[1]), Path(sys.argv[2]))
"""
    out = tmp_path / "fed"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(file), str(out)],
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
    )
    assert done.returncode == 9
    provision(file, out)
    folder = Folder(out)
    ca, server = pki.read_certificate(folder.ca_cert), pki.read_certificate(folder.server_cert)
    assert pki.issued_by(server, ca)
    assert pki.belong_together(ca, pki.read_private_key(folder.ca_key))
    assert pki.belong_together(server, pki.read_private_key(folder.server_key))
    for site in ("north", "south"):
        key = pki.parse_private_key(kits.private_key_of(folder.kit(site)) or b"")
        assert pki.public_line(key, site) == folder.node_pub(site).read_text()
    before = content(out)
    provision(file, out)
    assert content(out) == before
