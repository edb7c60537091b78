"""deploy/: what can be checked of images and units without a container engine and without installing them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import kits
from server.federation import Folder
from server.provision import provision
from shared import __version__

LINKS = {
    "site/compose.yml": "site",
    "site/compose.gpu.yml": "site",
    "site/consilium-site.service": "site",
    "server/compose.yml": "server",
    "server/consilium-server.service": "server",
}


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture
def made(tmp_path: Path) -> Folder:
    file = tmp_path / "federation.toml"
    file.write_text('name = "council"\n[server]\nhost = "fl.example.org"\nport = 9443\n[sites.north]\n')
    provision(file, tmp_path / "fed")
    return Folder(tmp_path / "fed")


@pytest.fixture
def kit(made: Folder, tmp_path: Path) -> Path:
    with zipfile.ZipFile(made.kit("north")) as archive:
        archive.extractall(tmp_path / "kit")
    return tmp_path / "kit"


@pytest.mark.parametrize(("name", "part"), LINKS.items())
def test_deploy_and_kit_are_one_source(root: Path, name: str, part: str) -> None:
    assert (root / "deploy" / name).resolve() == root / "server" / "kit" / part / Path(name).name


def test_a_kit_holds_the_very_files_of_deploy(root: Path, kit: Path) -> None:
    for path in (root / "deploy" / "site").iterdir():
        assert (kit / path.name).read_bytes() == path.read_bytes()
    assert set(kits.VERBATIM) == {path.name for path in (root / "deploy" / "site").iterdir()}


def test_an_installation_has_the_kits_files(root: Path, tmp_path: Path) -> None:
    """From a wheel, not from the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("shared", "client", "server", "simulations", "consilium"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {f"server/kit/{path.relative_to(root / 'server' / 'kit')}" for path in (root / "server/kit").glob("*/*")}
    assert len(files) == 7
    assert files <= names


def service(path: Path) -> dict[str, Any]:
    (one,) = yaml.safe_load(path.read_text())["services"].values()
    assert isinstance(one, dict)
    return one


@pytest.mark.parametrize("part", ["site", "server"])
def test_containers_are_as_closed_as_they_can_be(root: Path, part: str) -> None:
    one = service(root / "deploy" / part / "compose.yml")
    assert one["read_only"] is True
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices", "env_file"} & set(one)
    assert one["image"] == f"${{CONSILIUM_IMAGE:-consilium-{part}:{__version__}}}"
    assert one["user"].startswith("${CONSILIUM_UID:-1000}")
    assert one["command"][:2] == [part, "start"]
    assert not re.search(r"(?i)secret|password|token", str(one.get("environment", {})))


def test_a_site_publishes_no_port_and_cannot_write_to_the_images(root: Path) -> None:
    one = service(root / "deploy" / "site" / "compose.yml")
    assert "ports" not in one
    assert "expose" not in one
    assert one["volumes"] == [".:/site", "${IMAGES:-./images}:/site/images:ro"]


def test_the_server_publishes_the_gateways_port_and_no_other(made: Folder) -> None:
    assert service(made.compose)["ports"] == ["9443:9443"]


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
@pytest.mark.parametrize("files", [["site/compose.yml"], ["site/compose.yml", "site/compose.gpu.yml"]])
def test_docker_compose_takes_a_sites_files(root: Path, files: list[str]) -> None:
    words = [word for name in files for word in ("-f", root / "deploy" / name)]
    done = run("docker-compose", *words, "config")
    assert done.returncode == 0, done.stderr
    assert (yaml.safe_load(done.stdout)["services"]["site"].get("deploy") is not None) == (len(files) == 2)


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
def test_docker_compose_takes_the_servers_file(made: Folder) -> None:
    done = run("docker-compose", "-f", made.compose, "config")
    assert done.returncode == 0, done.stderr
    (port,) = yaml.safe_load(done.stdout)["services"]["server"]["ports"]
    assert "9443" in str(port)
    assert f"{made.path}:/srv/consilium" in done.stdout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
@pytest.mark.parametrize("part", ["site", "server"])
def test_systemd_takes_the_units_and_finds_little_exposed(made: Folder, kit: Path, tmp_path: Path, part: str) -> None:
    text = (kit / "consilium-site.service" if part == "site" else made.unit).read_text()
    start = re.search(r"^ExecStart=(\S+) (.*)$", text, re.MULTILINE)
    assert start
    folder = "/var/lib/consilium/site.toml" if part == "site" else str(made.path)
    assert start.groups() == ("/opt/consilium/bin/consilium", f"{part} start {folder}")
    unit = tmp_path / f"consilium-{part}.service"
    unit.write_text(text.replace(start.group(1), "/bin/true"))  # the only word that need not be there yet
    done = run("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    exposed = run("systemd-analyze", "security", "--offline=true", "--threshold=25", unit)  # tenths, 100 is the worst
    assert exposed.returncode == 0, exposed.stdout
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    assert run("systemd-analyze", "security", "--offline=true", "--threshold=25", unit).returncode != 0


def test_a_path_that_systemd_spells_otherwise_is_left_to_the_reader(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text('name = "council"\n[server]\nhost = "fl.example.org"\n')
    provision(file, tmp_path / "a folder")
    assert "start /srv/consilium\n" in Folder(tmp_path / "a folder").unit.read_text()


def test_hadolint_finds_nothing_in_the_dockerfile(root: Path) -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = run(program, root / "deploy" / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    assert run(program, "--version").stdout.startswith("Haskell Dockerfile Linter")


def test_the_images_run_as_nobody_special_and_hold_nothing_secret(root: Path) -> None:
    text = (root / "deploy" / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert [stage.split("\n")[0] for stage in stages] == ["${BASE} AS build", "${BASE} AS site", "site AS server"]
    for stage in stages[1:]:
        assert re.findall(r"^USER (\S+)", stage, re.MULTILINE)[-1] == "1000:1000"
    assert re.findall(r"^ARG (\w+)", text, re.MULTILINE) == ["BASE", "TORCH_INDEX"]
    ignored = (root / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert next(line for line in ignored if not line.startswith("#")) == "*"  # nothing goes in but what is named
    named = {line[1:] for line in ignored if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*)", text, re.MULTILINE) for word in line.split()[:-1]}
    assert named == copied
    assert all((root / name).exists() for name in named)
    assert f"consilium-site:{__version__}" in text


def test_kubernetes_takes_the_manifest_and_the_site_is_closed(root: Path) -> None:
    import kubernetes_validate

    parts = {part["kind"]: part for part in yaml.safe_load_all((root / "deploy/kubernetes/site.yml").read_text())}
    for part in parts.values():
        kubernetes_validate.validate(part, "1.31", strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(parts["Deployment"] | {"spec": {"replicas": "one"}}, "1.31", strict=True)
    pod = parts["Deployment"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["image"] == f"consilium-site:{__version__}"
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "ports" not in container
    assert parts["NetworkPolicy"]["spec"]["ingress"] == []
    assert set(parts["NetworkPolicy"]["spec"]["policyTypes"]) == {"Ingress", "Egress"}
