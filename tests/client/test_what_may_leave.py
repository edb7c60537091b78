"""The page for the ethics board against the code: every rule, every number and every file that it must name."""

from __future__ import annotations

import re
from pathlib import Path

from client.egress import KINDS
from client.egress_log import HEAD, LOG
from shared.errors import CODES
from shared.sitefile import OWN_FOLDER, PRIVACY
from shared.statistics import GREY_BINS

NOT_ABOUT_LEAVING = {"cryptographic_noise"}
# What the page calls the records of a reply; a record that is new here must be explained to the board first.
EXPLAINED = {
    "query": {"metrics": "numbers of training, validation and test images", "facts": "SHA-256 of the job"},
    "query.survey": {"metrics": "histogram of grey values"},
    "train": {"arrays": "trained model's numbers", "metrics": "number of training images; steps"},
    "train.scaffold": {
        "arrays": "trained model's numbers",
        "metrics": "number of training images; steps",
        "control": "control variate",
    },
    "evaluate": {"metrics": "sums over them"},
    "evaluate.personal": {"metrics": "your own model"},
    "evaluate.subgroups": {"metrics": "sums over the test images of each group"},
    "train.keys": {"keys": "public keys"},
    "train.shares": {"shares": "sealed shares"},
    "train.masked": {"arrays": "under masks"},
    "train.unmask": {"revealed": "open shares"},
}


def page(root: Path) -> str:
    return (root / "docs" / "what-may-leave.md").read_text()


def test_every_rule_of_the_site_is_named_and_no_other(root: Path) -> None:
    text = page(root)
    named = set(re.findall(r"`([a-z_]+)[`= ]", text))
    assert set(PRIVACY) - NOT_ABOUT_LEAVING <= named
    assert {name for name in named if "_" in name} <= set(PRIVACY)


def test_the_page_for_the_data_manager_has_every_rule_too(root: Path) -> None:
    text = (root / "docs" / "hospital.md").read_text()
    assert set(PRIVACY) <= set(re.findall(r"^([a-z_]+) = ", text, re.MULTILINE))


def test_every_record_that_may_leave_is_explained(root: Path) -> None:
    text = " ".join(page(root).split())
    assert {kind: set(records) for kind, records in KINDS.items()} == {k: set(v) for k, v in EXPLAINED.items()}
    for records in EXPLAINED.values():
        assert all(words in text for words in records.values())


def test_codes_and_files_are_as_the_code_has_them(root: Path) -> None:
    text = page(root)
    assert {"egress-refused", "small-cell", "too-few-patients"} <= set(CODES)
    assert f"`{OWN_FOLDER}/{LOG}`" in text
    assert f"`{HEAD}`" in text
    assert f"in {GREY_BINS} steps" in text
