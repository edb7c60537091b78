"""The preflight of a site: what is green, yellow and red, that each says what to do, and the exit code."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from client.check import Report, check_site
from client.policy import read_policy, require
from client.preflight import Finding, Level, after, before, verdict
from client.preflight_machine import GpuFacts, disk, gpu, look_at_gpu, shared_memory
from client.preflight_rules import _rules, images, key_file, privacy
from consilium.cli import commands
from server.pki import words
from shared.config import Job, job_from_flat
from shared.errors import SiteRefusal, UserError
from shared.sitefile import PRIVACY
from shared.tasks import TASKS
from tests.client.gateway import Authority, serving, write_key
from tests.conftest import write_site

OK, ATTENTION, STOP = Level.OK, Level.ATTENTION, Level.STOP
CARD = ("NVIDIA H200",)
RULES = """[privacy]
require_dp = false
max_epsilon = 8.0
unit = "image"
min_patients = 2
metrics = "all"
min_cell = 1
exact_counts = true
require_secure_aggregation = false
max_update_norm = 0.0
"""


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "device", "level", "words"),
    [
        (GpuFacts("13.2", "", False), "auto", ATTENTION, "training on the processor works, slower"),
        (GpuFacts("13.2", "", False), "cpu", OK, "not asked for"),
        (GpuFacts("13.2", "550", True, "", "no kernel image", CARD, 2**40), "cpu", OK, "not asked for"),
        (GpuFacts("13.2", "", False), "cuda:0", STOP, "the job asks for cuda:0"),
        (GpuFacts(None, "NVRM version: 550", False), "auto", ATTENTION, "built without CUDA"),
        (
            GpuFacts("13.2", "NVRM version: 470", False, "driver too old"),
            "auto",
            ATTENTION,
            "but PyTorch for CUDA",
        ),
        (GpuFacts("13.2", "550", True, "", "no kernel image", CARD, 2**40), "auto", STOP, "no kernel image"),
        (GpuFacts("13.2", "550", True, "", "", CARD, 2**30), "auto", ATTENTION, "1 GiB free"),
        (GpuFacts("13.2", "550", True, "", "", CARD, 2**37), "auto", OK, "NVIDIA H200, 128 GiB free"),
    ],
)
def test_a_graphics_card_is_used_missing_or_broken(facts: GpuFacts, device: str, level: Level, words: str) -> None:
    found = gpu(facts, device)
    assert found.level is level
    assert words in found.words
    assert bool(found.todo) is bool(level)


def test_the_card_of_this_machine_is_what_pytorch_says() -> None:
    facts = look_at_gpu()
    assert facts.usable is torch.cuda.is_available()
    assert facts.build == torch.version.cuda
    assert len(facts.cards) == torch.cuda.device_count() * facts.usable
    if not facts.usable:
        assert gpu(facts).level is ATTENTION
    elif not facts.failed:
        assert facts.cards[0] == torch.cuda.get_device_name(0)


def test_shared_memory_is_measured_and_written_to(tmp_path: Path) -> None:
    assert shared_memory(tmp_path).level is (OK if shutil.disk_usage(tmp_path).free > 2**26 else ATTENTION)
    assert not any(tmp_path.iterdir())
    missing = shared_memory(tmp_path / "no")
    assert missing.level is ATTENTION
    assert "No such file" in missing.words


def test_the_disk_must_hold_what_the_images_take(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    cache = tmp_path / "not" / "yet"
    assert disk(cache, 10 * free).level is STOP
    assert disk(cache, free - 2**29).level is ATTENTION
    if free > 2**32:
        assert disk(cache, 2**20).level is OK
    assert not cache.exists()


def test_what_lies_in_the_cache_already_needs_no_room(tmp_path: Path) -> None:
    (tmp_path / "entry").mkdir()
    with (tmp_path / "entry" / "image.raw").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no room itself
    free = shutil.disk_usage(tmp_path).free
    assert disk(tmp_path, 2**40 + 2**20).level is (OK if free > 2**31 else ATTENTION)
    assert disk(tmp_path, 2**40 + free + 2**30).level is STOP


def test_a_place_that_cannot_be_a_folder_stops(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = disk(tmp_path / "file" / "cache", 1)
    assert found.level is STOP
    assert "cannot write there" in found.words


# --- the key ----------------------------------------------------------------------------------------------------------


def test_a_good_key_shows_the_fingerprint_that_openssh_shows(tmp_path: Path) -> None:
    found = key_file(write_key(tmp_path / "node.key"))
    assert found.level is OK
    blob = base64.b64decode((tmp_path / "node.pub").read_bytes().split()[1])
    told = "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    assert told in found.words
    assert words(hashlib.sha256(blob).digest()) in found.words
    if shutil.which("ssh-keygen"):
        done = subprocess.run(["ssh-keygen", "-lf", tmp_path / "node.pub"], capture_output=True, text=True, check=True)
        assert told in done.stdout


@pytest.mark.parametrize(
    ("mode", "level"), [(0o600, OK), (0o400, OK), (0o640, STOP), (0o604, STOP), (0o644, STOP), (0o666, STOP)]
)
def test_a_key_is_its_owners_alone(tmp_path: Path, mode: int, level: Level) -> None:
    path = write_key(tmp_path / "node.key")
    path.chmod(mode)
    found = key_file(path)
    assert found.level is level
    assert (f"chmod 600 {path}" in found.todo) is bool(level)


def _openssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


P384 = ec.generate_private_key(ec.SECP384R1())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_openssh(ed25519.Ed25519PrivateKey.generate()), "another kind"),
        (
            P384.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            "not a private key in OpenSSH",
        ),
        (_openssh(P384)[:200] + b"\n-----END OPENSSH PRIVATE KEY-----\n", "damaged"),
        (b"ecdsa-sha2-nistp384 AAAA", "is a public key"),
        (b"-----BEGIN CERTIFICATE-----", "is a certificate"),
        (b"", "not a private key"),
        (None, "no such file"),
    ],
)
def test_what_is_no_key_for_flower_stops(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "node.key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    found = key_file(path)
    assert found.level is STOP
    assert words in found.words
    assert found.todo


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="OpenSSH is not here")
@pytest.mark.parametrize(
    ("kind", "password", "words"),
    [
        (["-t", "ecdsa", "-b", "384"], "geheim", "protected by a password"),
        (["-t", "ed25519"], "", "another kind"),
        (["-t", "rsa"], "", "another kind"),
        (["-t", "ecdsa", "-b", "384"], "", ""),
    ],
)
def test_keys_that_openssh_makes(tmp_path: Path, kind: list[str], password: str, words: str) -> None:
    command = ["ssh-keygen", "-q", *kind, "-N", password, "-f", tmp_path / "node.key"]
    subprocess.run(command, check=True, capture_output=True)
    found = key_file(tmp_path / "node.key")
    assert found.level is (STOP if words else OK)
    assert words in found.words


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_key_that_passes_is_one_that_flower_loads(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

    path = write_key(tmp_path / "node.key", curve)
    assert key_file(path).level is OK
    loaded = load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert uses_nist_ec_curve(loaded.public_key())


# --- the rules --------------------------------------------------------------------------------------------------------


def rules(folder: Path, text: str) -> Path:
    file = folder / "site.toml"
    file.write_text(f'name = "s"\n{text}')
    return file


def test_no_rules_stop_a_site_with_a_server_and_no_other(tmp_path: Path) -> None:
    file = rules(tmp_path, "")
    assert privacy(file, connected=True).level is STOP
    assert privacy(file, connected=False).level is ATTENTION


def test_rules_that_are_not_said_are_named_with_what_they_let_pass(tmp_path: Path) -> None:
    found = privacy(rules(tmp_path, "[privacy]\nmin_cell = 5\nunit = 'patient'\n"), connected=True)
    assert found.level is ATTENTION
    for name in ("require_dp", "min_patients", "exact_counts", "require_secure_aggregation", "max_update_norm"):
        assert f"{name} (" in found.words
    assert "min_cell" not in found.words
    assert privacy(rules(tmp_path, RULES), connected=True).level is OK
    for name in PRIVACY:
        if name in RULES:
            less = "\n".join(line for line in RULES.splitlines() if not line.startswith(name))
            assert privacy(rules(tmp_path, less), connected=True).level is ATTENTION, name


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_lines_fit_the_terminal_and_what_is_copied_stays_whole(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = Finding(Level.STOP, "key", "word " * 60, "run consilium/" + "x" * 50 + " and " + "more " * 40).lines()
    assert max(map(len, lines)) <= max(min(columns, 118), 19 + 64)
    assert sum(len(line) > columns for line in lines) <= 1
    assert any("consilium/" + "x" * 50 in line for line in lines)
    assert " ".join(" ".join(lines).split()).count("word") == 60


def test_a_wrong_rule_is_a_wrong_question(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="require_dp"):
        privacy(rules(tmp_path, "[privacy]\nrequire_dp = true\n"), connected=True)


# --- the images -------------------------------------------------------------------------------------------------------


def found_in(file: Path, job: Job, job_file: Path) -> dict[str, Finding]:
    job_file.write_text(job.toml())
    report = check_site(file, None, "auto", job_file, None)
    return {finding.title: finding for finding in images(report, file, job)}


def test_images_and_classes_are_well(tmp_path: Path, tiny_job: Job) -> None:
    found = found_in(write_site(tmp_path / "a", "a", 80), tiny_job, tmp_path / "job.toml")
    assert {finding.level for finding in found.values()} == {OK}
    assert found["classes"].words == "left 20, right 20 training images"
    assert "40 training patients" in found["this job under your rules"].words


def test_a_class_with_few_or_no_training_images_is_named(tmp_path: Path, tiny_job: Job) -> None:
    file = write_site(tmp_path / "a", "a", 24)
    few = found_in(file, tiny_job, tmp_path / "job.toml")["classes"]
    assert (few.level, "left 6, right 6" in few.words) == (ATTENTION, True)
    table = file.parent / "labels.csv"
    table.write_text("\n".join(line for line in table.read_text().splitlines() if ",left," not in line) + "\n")
    none = found_in(file, tiny_job, tmp_path / "job.toml")["classes"]
    assert (none.level, "no training images of left" in none.words) == (ATTENTION, True)


def test_a_job_that_the_sites_rules_decline_stops_with_the_rule(tmp_path: Path, tiny_job: Job) -> None:
    file = write_site(tmp_path / "a", "a", 80)
    file.write_text(file.read_text() + "[privacy]\nmin_patients = 41\n")
    found = found_in(file, tiny_job, tmp_path / "job.toml")["this job under your rules"]
    assert found.level is STOP
    assert "too-few-patients" in found.words
    assert "40 training patients, min_patients is 41" in found.words


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("all", "test figures by sex, age leave, of groups of at least 7 images"),
        ("age", "test figures by age leave, of groups of at least 7 images; none by sex, which the job asks for and"),
        ("", "none by sex, age, which the job asks for and privacy.subgroups does not name"),
    ],
)
def test_by_which_groups_of_patients_figures_leave_is_foretold(
    named: str, words: str, tmp_path: Path, tiny_job: Job
) -> None:
    file = write_site(tmp_path / "site", "a", 80)
    file.write_text(file.read_text() + f'[privacy]\nmin_cell = 7\nsubgroups = "{named}"\n')
    job = tiny_job.replace(evaluation__subgroups="sex, age=40|65")
    found = found_in(file, job, tmp_path / "job.toml")["groups of patients"]
    assert found.level is OK
    assert found.words.startswith(words)


def test_small_cells_of_test_images_are_foretold(tmp_path: Path, tiny_job: Job) -> None:
    file = write_site(tmp_path / "a", "a", 80)
    file.write_text(file.read_text() + "[privacy]\nmin_cell = 11\n")
    found = found_in(file, tiny_job, tmp_path / "job.toml")["this job under your rules"]
    assert found.level is ATTENTION
    assert "val: left 10" in found.words


def test_what_the_images_take_is_what_the_cache_takes(tmp_path: Path, tiny_job: Job) -> None:
    from shared.imaging.dataset import load_dataset
    from shared.samples import read_samples
    from shared.sitefile import read_site

    file = write_site(tmp_path / "a", "a", 24)
    (tmp_path / "job.toml").write_text(tiny_job.toml())
    report = check_site(file, None, "auto", tmp_path / "job.toml", None)
    site = read_site(file)
    load_dataset(read_samples(site, tiny_job), site, tiny_job)
    assert site.cache is not None
    assert report.decoded == sum(path.stat().st_size for path in site.cache.rglob("*.raw"))
    assert any("may lie there already" in finding.words for finding in after(report, file, tiny_job))


# --- as a data manager types it ---------------------------------------------------------------------------------------


def check(*words: object) -> Result:
    return CliRunner().invoke(commands, ["site", "check", *map(str, words)])


@pytest.fixture
def member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site with images, rules, key and authority; without the address of a server."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    file = write_site(tmp_path / "a", "a", 80)
    write_key(file.parent / "node.key")
    file.write_text(file.read_text() + RULES)
    return file


def connect(file: Path, address: str, authority: Authority) -> None:
    text = file.read_text().partition("[server]")[0]
    file.write_text(f'{text}[server]\naddress = "{address}"\nca = "{authority.file}"\nkey = "node.key"\n')


def test_a_site_that_may_join_ends_with_fit_and_0(member: Path, tmp_path: Path, tiny_job: Job) -> None:
    authority = Authority(tmp_path / "ca")
    (tmp_path / "job.toml").write_text(tiny_job.toml())
    with serving(authority.sign("127.0.0.1")) as good:
        connect(member, good.address, authority)
        done = check(member, "--job", tmp_path / "job.toml")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[-1] == "FIT to join"
    titles = [line[12:].split(":")[0] for line in lines if line.startswith(("OK", "ATTENTION", "STOP"))]
    assert [title for title in titles if not title.startswith("shared memory")] == [
        *("privacy rules", "graphics card", "key of this site", "authority", "server", "server's certificate", "clock"),
        *("versions", "images", "classes", "privacy budget", "this job under your rules", "disk"),
    ]
    assert not any(line.startswith("STOP") for line in lines)
    assert good.asked == ["GET /consilium"]


def test_what_stops_is_named_again_in_the_last_line_and_ends_with_1(member: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    (member.parent / "node.key").chmod(0o644)
    with serving(authority.sign("elsewhere.example")) as wrong:
        connect(member, wrong.address, authority)
        done = check(member)
        offline = check(member, "--offline")
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == (
        "REFUSED: key of this site, server's certificate; see the lines with STOP above"
    )
    assert offline.output.splitlines()[-1] == "REFUSED: key of this site; see the lines with STOP above"
    assert wrong.asked == []


def test_the_reason_about_images_comes_first_in_the_last_line(member: Path) -> None:
    for path in (member.parent / "images").iterdir():
        path.write_bytes(b"no picture")
    done = check(member)
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("REFUSED: 80 of 80 images (100%) cannot be read")


def test_a_half_written_server_table_is_a_wrong_question(member: Path) -> None:
    member.write_text(member.read_text() + '[server]\naddress = "a.example:8443"\n')
    with pytest.raises(UserError, match="lacks ca, key"):
        list(before(member))


def test_levels_are_words_first_and_colours_second() -> None:
    found = Finding(STOP, "clock", "is wrong " * 30, "set it " * 30)
    lines = found.lines()
    assert lines[0].startswith("STOP        clock: is wrong")
    assert max(map(len, lines)) <= 120
    assert any(line.startswith(" " * 12 + "To do: set it") for line in lines)
    assert found.styled()[0].startswith("\x1b[31m\x1b[1mSTOP\x1b[0m")
    assert verdict([found]).startswith("REFUSED: clock")
    assert verdict([found._replace(level=ATTENTION)]) == "FIT to join"


@pytest.mark.parametrize(("more", "told"), [("", True), ("require_dp = true\n", False)])
def test_a_limit_that_counts_only_private_jobs_is_said(more: str, told: bool, tmp_path: Path, tiny_job: Job) -> None:
    file = write_site(tmp_path / "a", "a", 80)
    file.write_text(file.read_text() + f"[privacy]\nmax_epsilon = 100.0\nmax_delta = 1e-3\n{more}")
    private = {"privacy__dp": "local", "privacy__epsilon": 8.0, "privacy__delta": 1e-3, "train__class_weights": "none"}
    found = found_in(file, tiny_job.replace(**private), tmp_path / "job.toml")
    assert ("privacy budget" in found) is told


def test_no_metric_is_no_rule_and_a_mark_of_windows_editors_no_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"privacy\.metrics = ''"):
        read_policy(rules(tmp_path, "[privacy]\nmetrics = ''\n"))
    file = rules(tmp_path, "[privacy]\nmin_cell = 7\n")
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert read_policy(file).min_cell == 7


# --- figures that a site forbids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "without", "more"),
    [
        ({"task": "segmentation", "model.name": "unet"}, "image_accuracy", {"data.labels": "well,sick"}),
        ({"task": "segmentation", "model.name": "unet", "data.classes": "cell"}, "aji", {"data.masks": "instances"}),
        ({"task": "generation", "model.name": "dcgan"}, "synthetic_accuracy", {"model.conditional": True}),
        ({"task": "reconstruction", "data.classes": "well"}, "auroc", {"data.classes": "well,sick"}),
    ],
)
def test_a_site_declines_only_the_jobs_that_compute_what_it_forbids(
    asked: dict[str, Any], without: str, more: dict[str, Any], tmp_path: Path
) -> None:
    job, fuller = job_from_flat(asked), job_from_flat(asked | more)
    policy = read_policy(rules(tmp_path, f'[privacy]\nmetrics = "{", ".join(TASKS[job.task].computed(job))}"\n'))
    require(policy, job, 20)
    with pytest.raises(SiteRefusal, match=without) as refusal:
        require(policy, fuller, 20)
    assert refusal.value.code == "metric-forbidden"


def test_a_figure_that_looks_at_training_images_is_not_asked_for_beside_the_noise() -> None:
    noised = {"privacy.epsilon": 8.0, "train.class_weights": "none"}
    for dp, there in {"none": True, "local": False, "central": True}.items():
        job = job_from_flat({"task": "generation", "privacy.dp": dp} | (noised if dp != "none" else {}))
        assert ("memorised" in TASKS["generation"].computed(job)) is there


def test_a_site_is_told_what_can_be_done_about_a_figure_it_forbids(tmp_path: Path) -> None:
    file = write_site(tmp_path / "a", "a", 80)
    kept = file.read_text()
    file.write_text(f'{kept}[privacy]\nmetrics = "auroc, loss"\n')
    (finding,) = _rules(Report("a", patients=20), job_from_flat({}), read_policy(file))
    assert finding.level is STOP
    assert finding.todo.startswith("every classification job computes accuracy, balanced_accuracy: name it in privacy.")
    some = "dice, iou, dice_pooled, iou_pooled, hd95, loss"
    file.write_text(f'{kept}[privacy]\nmetrics = "{some}"\n')
    job = job_from_flat({"task": "segmentation", "model.name": "unet", "data.labels": "well,sick"})
    (finding,) = _rules(Report("a", patients=20), job, read_policy(file))
    assert finding.todo.startswith("ask the coordinator whether a job without it will do")


def test_of_a_generator_the_network_that_measures_it_is_asked_for_too(tmp_path: Path) -> None:
    """It is trained first, by a job of its own, which the site would decline."""
    job = job_from_flat({"task": "generation", "model.name": "dcgan"})
    file = write_site(tmp_path / "a", "a", 80)
    kept, own = file.read_text(), ", ".join(TASKS["generation"].computed(job))
    file.write_text(f'{kept}[privacy]\nmetrics = "{own}"\n')
    (finding,) = _rules(Report("a", patients=20), job, read_policy(file))
    assert finding.level is STOP
    assert finding.todo.startswith(
        "every classification job computes accuracy, auroc, balanced_accuracy, loss: name it"
    )
    file.write_text(f'{kept}[privacy]\nmetrics = "{own}, accuracy, auroc, balanced_accuracy, loss"\n')
    assert all(finding.level is not STOP for finding in _rules(Report("a", patients=20), job, read_policy(file)))


def test_all_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"""privacy\.metrics = 'all, auroc': must be either "all" alone, or names"""):
        read_policy(rules(tmp_path, '[privacy]\nmetrics = "all, auroc"\n'))
