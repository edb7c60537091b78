"""The site's own part of the preflight: its privacy rules, its key, its images against a job."""

from __future__ import annotations

import base64
import hashlib
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key

from client.check import Report
from client.policy import Policy, forbidden, least_of, read_policy, require, tells
from client.preflight import Finding, attention, ok, spoken, stop
from shared.config import Job, read_toml
from shared.errors import CODES, SiteRefusal
from shared.subgroups import parse_subgroups
from shared.tasks import TASKS, load_task

FEW = 10  # training images of a class: below, its few images alone decide what is learnt of it here

# What the rules that weigh most let pass where the site does not say; the others follow from these.
_UNSAID = {
    "require_dp": "models without differential privacy leave",
    "max_epsilon": "no limit to the privacy budget",
    "unit": "single images are protected, not patients",
    "min_patients": "the site takes part with any number of patients",
    "metrics": "every figure of the job's task is computed",
    "min_cell": "counts of a single image leave",
    "exact_counts": "exact numbers of images leave",
    "require_secure_aggregation": "the coordinator sees this site's own model",
    "max_update_norm": "a change of the model of any size leaves",
}


def privacy(file: Path, connected: bool) -> Finding:
    """Whether the site has said what may leave.

    Args:
        connected: the site is to join a server, where silence is a stop.

    Raises:
        UserError: a rule is wrong.
    """
    read_policy(file)
    title, said = "privacy rules", read_toml(file).get("privacy", {})
    todo = "docs/hospital.md, What leaves the site; write each rule that is meant so, even where it is the default"
    if not said:
        words = "site.toml has no [privacy] table: exact counts and a model without noise would leave"
        return stop(title, words, todo) if connected else attention(title, words, todo)
    unsaid = [f"{name} ({words})" for name, words in _UNSAID.items() if name not in said]
    if unsaid:
        return attention(title, f"{len(said)} are set; not said, so the default holds: {'; '.join(unsaid)}", todo)
    return ok(title, f"all {len(_UNSAID)} that weigh most are set")


# --- the key ----------------------------------------------------------------------------------------------------------


def key_file(path: Path) -> Finding:
    """Whether the site's private key is one that Flower takes, and only its owner can read it."""
    title, whence = "key of this site", "ask for a new start-up kit, or make a key with `consilium site keygen`"
    try:
        content = path.read_bytes()
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return stop(title, f"{path}: no such file", f"put it there from the start-up kit; if it is lost, {whence}")
    except OSError as error:
        return stop(title, f"{path}: cannot be read ({error.strerror})", "make this user the file's owner")
    problem = _problem(content)
    if problem:
        return stop(title, f"{path}: {problem}", whence)
    digest = key_digest(_load(content))
    shown = "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
    words = f"{path}, fingerprint “{spoken(digest)}” ({shown})"
    if mode & 0o077:
        return stop(
            title,
            f"{words}, but other users of this machine can reach it (mode {mode:04o}): each could pose as this site",
            f"chmod 600 {path}; if others use this machine, {whence}",
        )
    return ok(title, words)


def key_digest(key: ec.EllipticCurvePrivateKey) -> bytes:
    """SHA-256 of the public half, as `ssh-keygen -l` computes it."""
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return hashlib.sha256(base64.b64decode(line.split()[1])).digest()


def _load(content: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_ssh_private_key(content, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("another kind of key")
    return key


def _problem(content: bytes) -> str:
    """Why Flower would not take the key, or ""."""
    head = content.lstrip()[:200]
    if head.startswith((b"ssh-", b"ecdsa-", b"-----BEGIN PUBLIC")):
        return "is a public key; the private one is asked for"
    if head.startswith(b"-----BEGIN CERTIFICATE"):
        return "is a certificate; the private key is asked for"
    if not head.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----"):
        return "is not a private key in OpenSSH's format"
    try:
        _load(content)
    except ValueError as error:
        if "password" in str(error).lower():
            return "is protected by a password, which nobody is there to type when the site starts"
        if str(error) == "another kind of key":
            return "is of another kind than ECDSA on a NIST curve, the only one that Flower takes"
        return "is damaged"
    except (TypeError, UnsupportedAlgorithm):
        return "is protected by a password, or of a kind that is not known here"
    return ""


# --- the images -------------------------------------------------------------------------------------------------------


def images(report: Report, file: Path, job: Job | None) -> Iterator[Finding]:
    """What was found in the images, held against the job where one is given and against the site's rules."""
    read, broken = report.read, len(set(report.unreadable))
    if report.refused:
        yield stop("images", report.refused, "the lines above name the files; then check again")
        return
    words = f"{read} can be read"
    if broken:
        yield attention("images", f"{words}, {broken} cannot and are left out", "mend or remove those named above")
    else:
        yield ok("images", f"all {words}")
    if job is None or not report.labels:
        yield attention("labels", "were not looked at", "add --job JOB.toml, the job that the coordinator plans")
        return
    yield from classes(report, job)
    policy = read_policy(file)
    yield from _rules(report, job, policy)
    yield from groups(job, policy)


def classes(report: Report, job: Job) -> Iterator[Finding]:
    """Whether there is enough of each class to learn from, and anything to test on."""
    what = TASKS[job.task].counted
    train: Counter[str] = report.counts.get("train", Counter())
    missing = [name for name in job.classes if train and not train.get(name)]
    few = [f"{name} {train[name]}" for name in job.classes if 0 < train.get(name, 0) < FEW]
    short = [
        *([f"no training {what} of {', '.join(missing)}"] if missing else []),
        *([f"fewer than {FEW} training {what} of {', '.join(few)}"] if few else []),
    ]
    if short:
        todo = "see whether [label_map] and the split are right; if they are, it is for the other sites to teach it"
        yield attention("classes", "; ".join(short), todo)
    elif train:
        yield ok("classes", ", ".join(f"{name} {train[name]}" for name in job.classes) + f" training {what}")
    if not train:
        yield ok("labels", f"{report.images['train']} training images have what the job learns")
    if not report.images["test"]:
        yield attention(
            "test images", "there are none: the model is not tested here", "fine if that is meant; else see the split"
        )


def groups(job: Job, policy: Policy) -> Iterator[Finding]:
    """By which groups of patients test figures leave, where the job asks for any."""
    asked = [one.name for one in parse_subgroups(job.evaluation.subgroups)]
    told, kept = ([name for name in asked if tells(policy, name) is one] for one in (True, False))
    if not asked:
        return
    words = []
    if told:
        words.append(f"test figures by {', '.join(told)} leave, of groups of at least {least_of(policy)} images")
    if kept:
        words.append(f"none by {', '.join(kept)}, which the job asks for and privacy.subgroups does not name")
    yield ok("groups of patients", "; ".join(words))


def _way_out(code: str, job: Job, policy: Policy) -> str:
    owner = "changing [privacy] is for whoever answers for the patients"
    if code != "metric-forbidden":
        return f"ask the coordinator for a job that grants it; {owner}"
    always = [name for name in forbidden(policy, job) if name not in TASKS[job.task].only_if]
    if always:  # no coordinator can help
        return (
            f"every {job.task} job computes {', '.join(always)}: name it in privacy.metrics, or take no part; {owner}"
        )
    return f"ask the coordinator whether a job without it will do, name it in privacy.metrics, or take no part; {owner}"


def _rules(report: Report, job: Job, policy: Policy) -> Iterator[Finding]:
    task = load_task(job.task)
    # The network that a generator is measured by is trained first, by a job of its own.
    for asked in (job, *([task.reference(job)] if hasattr(task, "reference") else [])):
        try:
            require(policy, asked, report.patients)
        except SiteRefusal as refusal:
            yield stop(
                "this job under your rules",
                f"would be declined ({refusal.code}: {CODES[refusal.code]}): {refusal}",
                _way_out(refusal.code, asked, policy),
            )
            return
    if policy.max_epsilon and not policy.require_dp:
        yield attention(
            "privacy budget",
            "max_epsilon counts only jobs with differential privacy: one without it is granted, and nothing is counted",
            "set privacy.require_dp = true, unless that is meant",
        )
    small = [
        f"{split}: {name} {number}"
        for split in ("val", "test")
        for name, number in report.counts.get(split, {}).items()
        if 0 < number < policy.min_cell
    ]
    if small:
        yield attention(
            "this job under your rules",
            f"is granted, but no figures leave of a split with fewer than min_cell = {policy.min_cell} of a class "
            f"({', '.join(small)})",
            "nothing, if that is meant; else mark more images as val or test",
        )
    else:
        yield ok("this job under your rules", f"is granted, with {report.patients} training patients")
