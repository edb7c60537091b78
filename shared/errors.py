"""Errors a person can cause. Each is one line that says what is wrong and what to do."""

from __future__ import annotations

# Every code with which a site may decline, in plain words: no other leaves it (client.egress), none without its words.
CODES = {
    "no-site": "the site has no site.toml",
    "no-data": "the site found no labelled images",
    "bad-table": "the site’s table of images is not in order",
    "missing-files": "the site’s table names files that are not there",
    "missing-modality": "the site has a case without one of its images or numbers",
    "unknown-label": "the site has a label that is no class of the job",
    "too-many-unreadable": "too many of the site’s images cannot be read",
    "no-cache": "the site cannot write its image cache",
    "no-training-images": "the site has no images for training",
    "too-few-images": "the site has too few training images for this model",
    "model-missing": "the site no longer has the model that it was sent a change of",
    "diverged": "the training loss at the site is no longer a number",
    "bad-configuration": "the site’s settings are wrong",
    "internal-error": "something unforeseen failed at the site",
    "dp-required": "the site asks for differential privacy, which the job does not grant",
    "shared-noise-forbidden": "the job shares its noise among the sites, which the site does not count as its own",
    "unit-too-small": "the site asks that patients be protected, the job protects single images",
    "epsilon-over-limit": "the job plans a larger epsilon than the site allows",
    "delta-over-limit": "the job’s delta is larger than the site allows",
    "delta-too-large": "the job’s delta is too large for so few patients",
    "too-few-patients": "the site has fewer training patients than it wants for taking part",
    "metric-forbidden": "the job computes a figure that the site does not allow",
    "secure-aggregation-required": "the site gives its model only masked, by secure aggregation",
    "no-secure-aggregation": "the site was asked for keys by a job without secure aggregation",
    "wrong-round": "the site was asked about another round than the one it is in",
    "wrong-stage": "the site was asked out of order",
    "wrong-list": "the list of sites that the site was shown is not in order",
    "too-few-sites": "too few sites were left for the site’s model to be hidden among",
    "key-changed": "the site was shown another key than its own",
    "changed-survivors": "the site was asked again about other survivors of a round",
    "bad-keys": "a key is not one",
    "bad-weight": "the site named an impossible number of training images",
    "not-finite": "the reply holds numbers that are not finite or not allowed",
    "budget-spent": "the site’s privacy budget does not reach for this round",
    "ledger-broken": "an entry of the site’s privacy ledger was changed or removed",
    "ledger-unusable": "the site’s privacy ledger cannot be read or written",
    "small-cell": "a split, or a class of it, has fewer images than the site tells figures of",
    "split-forbidden": "figures were asked for of images that the site does not evaluate on",
    "bundle-refused": "the site has another release than the server, or the program was changed; it did not run it",
    "egress-refused": "the site’s last gate found something in the reply that may not leave",
}


def how_to_install(extra: str) -> str:
    """How to add one of the optional sets of packages: from the source, for no registry has this project."""
    return f"in the folder of the source: pip install --constraint constraints.txt --editable '.[{extra}]'"


class UserError(Exception):
    """Bad input by a person: shown as one line without a traceback, exit code 2."""


class SiteRefusal(Exception):
    """A site declines to take part; only ``code`` ever leaves it.

    ``str(refusal)`` may hold file names or labels: it is for the site's own log and screen.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
