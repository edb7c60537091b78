"""The boundary of de-identification: no header value, path, name, label or exception text is in what leaves.

Every task is asked everything at a site whose files, folders, tables and DICOM headers are full of one marker, and
every byte of each reply is searched for it, as it stands and in the forms in which text is usually hidden.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from client.app import app
from client.workspace import open_model
from shared.config import Job, job_from_flat
from shared.tasks import TASKS, load_task
from shared.weights import REFERENCE, exchanged

MARK = "ZQXJVK7"  # letters and digits only, so that it fits wherever a name does
UID = "2.25.7777123454321"  # the marker where only digits and dots are allowed
WORDS = (
    "PatientName PatientID PatientComments StudyDescription SeriesDescription ImageComments InstitutionName "
    "ReferringPhysicianName AccessionNumber StationName OperatorsName StudyID ProtocolName DeviceSerialNumber"
)
NUMBER = "7777123454321"
COMMON: dict[str, Any] = {
    "data.size": 16,
    "model.width": 4,
    "train.batch_size": 4,
    "train.local_steps": 1,
    "train.device": "cpu",
    "evaluation.samples": 8,
}
JOBS: dict[str, dict[str, Any]] = {
    "classification": {"data.classes": "left,right"},
    "segmentation": {"model.name": "unet", "data.classes": "disc", "model.depth": 3},
    "detection": {"model.name": "fasterrcnn_small", "data.classes": "bright", "data.size": 64, "model.width": 8},
    "generation": {"data.classes": "left,right", "data.size": 32, "model.name": "dcgan"},
    "sequence": {"model.name": "cnn_gru", "data.classes": "left,right", "data.size": 8, "model.hidden": 8},
    "reconstruction": {"model.name": "autoencoder", "data.classes": "left,right"},
}
SPLITS = ("train", "train", "val", "test")


def forms() -> Iterator[bytes]:
    """The marker as text, in other encodings, and as hashes of it."""
    for text in (MARK, f"{MARK}^{MARK}", UID, NUMBER, f"{MARK}-patient"):
        for plain in (text, text.lower(), text[::-1]):
            raw = plain.encode()
            yield from (raw, plain.encode("utf-16-le"), plain.encode("utf-16-be"), plain.encode("utf-32-le"))
            yield from (raw.hex().encode(), raw.hex().upper().encode())
            for shift in range(3):  # wherever in a longer text it stands
                coded = base64.b64encode(b"\0" * shift + raw)
                yield coded[4 if shift else 0 : len(coded) - 4]
            for kind in ("md5", "sha1", "sha256"):
                digest = hashlib.new(kind, raw).digest()
                yield from (digest, digest.hex().encode(), base64.b64encode(digest)[:-2])


FORMS = [form for form in forms() if len(form) >= 6]


def leaks(reply: Message) -> list[bytes]:
    """The forms of the marker in any byte of a reply, as Flower sends it and as the simulation hands it on."""
    sent = message_to_proto(reply).SerializeToString() + pickle.dumps(reply.content)
    return [form for form in FORMS if form in sent]


# ---------------------------------------------------------------------- sites full of the marker


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    """A picture, or a film (t, height, width), whose header says the marker wherever it can."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = UID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = SecondaryCaptureImageStorage, UID
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = UID, UID, UID
    for name in WORDS.split():
        setattr(header, name, MARK)
    block = header.private_block(0x0013, MARK, create=True)
    block.add_new(0x01, "LO", MARK)
    header.Rows, header.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        header.NumberOfFrames = len(pixels)
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
    header.PixelData = pixels.astype(np.uint8).tobytes() + b"\0" * (pixels.size % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def write_site(folder: Path, task: str, images: int = 16) -> Path:
    """A site of marked files in marked folders, listed in a marked table; gives its site.toml."""
    rows = [["path", "label", "patient", "split", "comment", "x", "y", "width", "height", "mask"]]
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 120, (24, 24))
        pixels[4:14, 4:14] += 100
        name = f"{MARK}/{MARK}-{number}.dcm"
        write_dicom(folder / name, np.stack([pixels] * 4) if task == "sequence" else pixels)
        label = ("left", "right", f"{MARK}-label")[number % 3] if task in ("classification", "sequence") else "left"
        label = {"detection": "bright", "segmentation": ""}.get(task, label)
        row = [name, label, f"{MARK}-patient-{number}", SPLITS[number % 4], MARK]
        if task == "segmentation":
            mask = f"{MARK}/{MARK}-mask-{number}.png"
            words = PngInfo()
            words.add_text("Comment", MARK)
            Image.fromarray((pixels > 110).astype(np.uint8)).save(folder / mask, pnginfo=words)
            rows.append([*row, "", "", "", "", mask])
        else:
            rows.append([*row, "4", "4", "10", "10", ""])
    kept = {"detection": range(9), "segmentation": (0, 2, 3, 4, 9)}.get(task, range(5))
    (folder / "labels.csv").write_text("\n".join(",".join(row[k] for k in kept) for row in rows) + "\n")
    text = f'name = "site"\n[data]\nformat = "csv"\ncsv = "labels.csv"\n[label_map]\n"{MARK}-label" = "left"\n'
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


class Site(NamedTuple):
    job: Job
    file: Path


@pytest.fixture(params=TASKS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    job = job_from_flat(COMMON | {"task": request.param} | JOBS[request.param])
    return Site(job, write_site(tmp_path / MARK / f"hospital-{MARK}", request.param))


@pytest.fixture(autouse=True)
def _sender() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def ask(kind: str, site: Site, **config: Any) -> Message:
    job = site.job
    context = Context(7, 2, {"site": str(site.file)}, RecordDict(), dict(job.flat()))
    settings = {"round": 1, "split": "test", "class-weights": [1.0] * max(len(job.classes), 1)} | config
    content = RecordDict({"config": ConfigRecord(settings)})
    if kind != "query":
        model = load_task(job.task).build_model(job)
        content["arrays"] = ArrayRecord(exchanged(model, job))  # type: ignore[arg-type]
        if hasattr(load_task(job.task), "reference"):
            content[REFERENCE] = ArrayRecord(model.get_submodule(REFERENCE).state_dict())  # type: ignore[arg-type]
    return app(Message(content, 2, kind), context)


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("query", {"round": 0}),
    ("query", {"survey": True}),
    ("train", {}),
    ("evaluate", {"split": "val"}),
    ("evaluate", {"split": "test"}),
]


def test_the_search_finds_what_is_hidden() -> None:
    """The search itself: a reply with the marker in any of the forms is caught."""
    asked = Message(RecordDict(), 2, "query")
    for form in FORMS:
        assert (
            leaks(Message(RecordDict({"x": ConfigRecord({"x": b"before" + form + b"behind"})}), reply_to=asked)) != []
        )
    inside = base64.b64encode(f"name={MARK}^{MARK}, born".encode()).decode()
    assert leaks(Message(RecordDict({"x": ConfigRecord({"x": inside})}), reply_to=asked)) != []


def test_nothing_that_names_a_patient_leaves_a_site_that_takes_part(site: Site) -> None:
    assert pydicom.dcmread(next(site.file.parent.rglob("*.dcm"))).PatientID == MARK
    for kind, config in ASKED:
        reply = ask(kind, site, **config)
        assert reply.content["status"]["ok"], (kind, (site.file.parent / "site.log").read_text()[-2000:])
        assert leaks(reply) == []


def test_nothing_that_names_a_patient_leaves_beside_the_model_or_with_a_sites_own(site: Site) -> None:
    """SCAFFOLD's control variates, and the figures of a site's own model, which itself stays in the site's folder."""
    model = load_task(site.job.task).build_model(site.job)
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters() if value.requires_grad}
    for kind, strategy in (("train", "scaffold"), ("train", "ditto"), ("evaluate.personal", "ditto")):
        own = Site(site.job.replace(federation__strategy=strategy), site.file)
        context = Context(7, 2, {"site": str(site.file)}, RecordDict(), dict(own.job.flat()))
        content = message_with_weights(kind, own)
        if strategy == "scaffold":
            content.content["control"] = ArrayRecord(zeros)  # type: ignore[arg-type]
        if hasattr(load_task(site.job.task), "reference"):
            content.content[REFERENCE] = ArrayRecord(model.get_submodule(REFERENCE).state_dict())  # type: ignore[arg-type]
        reply = app(content, context)
        assert reply.content["status"]["ok"], (kind, (site.file.parent / "site.log").read_text()[-2000:])
        assert leaks(reply) == []
    (file,) = (site.file.parent / ".consilium" / "personal").glob("*.safetensors")
    assert MARK.encode() not in file.read_bytes()


def unknown_label(site: Site) -> None:
    table = site.file.parent / "labels.csv"
    text = table.read_text()
    table.write_text(text.replace(",left,", f",{MARK}-unknown,").replace(",bright,", f",{MARK}-unknown,"))


def missing_file(site: Site) -> None:
    next(site.file.parent.rglob("*-3.dcm")).unlink()


def broken_files(site: Site) -> None:
    for number in range(1, 4):
        path = next(site.file.parent.rglob(f"{MARK}-{number}.dcm"))
        path.write_bytes(path.read_bytes()[:-100] if number > 1 else f"{MARK} no picture".encode())


def wrong_toml(site: Site) -> None:
    site.file.write_text(f'name = "site"\n{MARK} = "{MARK}"\n')


def wrong_name(site: Site) -> None:
    site.file.write_text(site.file.read_text().replace('name = "site"', f'name = "{MARK}^{MARK} and more"'))


def no_table(site: Site) -> None:
    (site.file.parent / "labels.csv").write_text(f"{MARK},{MARK}\n{MARK},{MARK}\n")


FAULTS = (missing_file, broken_files, wrong_toml, wrong_name, no_table, unknown_label)


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_that_names_a_patient_leaves_a_site_that_declines(fault: Any, site: Site) -> None:
    fault(site)
    for kind, config in ASKED:
        reply = ask(kind, site, **config)
        if not (fault is unknown_label and site.job.task == "segmentation"):  # whose table has no label here
            assert set(reply.content) == {"status"}
            assert not reply.content["status"]["ok"]
        assert leaks(reply) == []


VERBS = ("read_samples", "decode", "batch", "step", "collect", "count_classes", "build_model")


@pytest.mark.parametrize("verb", VERBS)
def test_the_text_of_an_exception_anywhere_in_a_task_does_not_leave(
    verb: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"step": "train", "batch": "train", "collect": "evaluate", "build_model": "query"}
    task = load_task(site.job.task)

    def explode(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{MARK}^{MARK} in {site.file}")

    kind = kinds.get(verb, "query")
    if verb == "build_model":
        open_model.cache_clear()
    content = message_with_weights(kind, site)
    monkeypatch.setattr(task, verb, explode)
    reply = app(content, Context(7, 2, {"site": str(site.file)}, RecordDict(), dict(site.job.flat())))
    assert set(reply.content) == {"status"}
    assert reply.content["status"]["code"] == "internal-error"
    assert leaks(reply) == []
    assert MARK in (site.file.parent / "site.log").read_text()


def message_with_weights(kind: str, site: Site) -> Message:
    """A message of the kind, its weights made before the task is broken."""
    config = {"round": 1, "split": "test", "class-weights": [1.0] * max(len(site.job.classes), 1)}
    content = RecordDict({"config": ConfigRecord(config)})  # type: ignore[arg-type]
    if kind != "query":
        model = load_task(site.job.task).build_model(site.job)
        content["arrays"] = ArrayRecord(exchanged(model, site.job))  # type: ignore[arg-type]
    return Message(content, 2, kind)


def test_weights_that_the_server_marks_do_not_come_back_as_text(site: Site) -> None:
    """Names of arrays that the model does not have are the sender's text: they are not repeated."""
    content = RecordDict({"config": ConfigRecord({"round": 1, "split": "test", "class-weights": [1.0]})})
    content["arrays"] = ArrayRecord({MARK: torch.zeros(1)})  # type: ignore[arg-type]
    for kind in ("train", "evaluate"):
        context = Context(7, 2, {"site": str(site.file)}, RecordDict(), dict(site.job.flat()))
        reply = app(Message(content, 2, kind), context)
        assert reply.content["status"]["code"] == "internal-error"
        assert leaks(reply) == []
