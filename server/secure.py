"""One training round under secure aggregation, the server's part: pass keys and shares on, add masked changes up, take
the masks off the sum. See ``shared.masking`` for the protocol and ``client.secure`` for the sites' part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from server.admission import Dropped, Place, status
from shared.accounting import noisy_sites
from shared.config import Job
from shared.fixedpoint import TAIL, changed, decode
from shared.masking import (
    KEY,
    SEALED,
    SEED,
    add_masks,
    agree,
    commitment,
    own_mask,
    pair_masks,
    public_key,
    put_together,
    threshold,
)

Arrays = dict[str, Tensor]
Content = RecordDict | Callable[[Place], RecordDict]
Exchange = Callable[[str, Content, Iterable[Place], int], Iterator[tuple[Place, Message | None]]]
PASSED_ON = ("round", "reference")  # what of a training message's config the other messages need


class _Keys(NamedTuple):
    mask: bytes
    seal: bytes
    commitment: bytes


class _Stopped(Exception):
    """Too few sites are left."""


class SecureRound:
    """One round. ``exchange`` sends messages as ``Run._exchange`` does; ``parts`` names the parts of the model.

    After ``run``: ``trained`` and ``dropped`` are the rows of the round's event, ``facts`` what is known of all sites
    together, and ``left`` sites of ``needed`` lasted the round out; if fewer, the arrays have not changed.
    """

    def __init__(
        self,
        exchange: Exchange,
        places: Sequence[Place],
        arrays: Arrays,
        config: ConfigRecord,
        job: Job,
        parts: Sequence[str],
    ) -> None:
        self.exchange, self.arrays, self.config, self.job = exchange, arrays, config, job
        self.round = int(config["round"])  # type: ignore[arg-type]
        self.tag = f"{job.sha256} {self.round}"
        self.parts = list(parts) if len(parts) > 1 else []
        self.places = {place.name: place for place in sorted(places, key=lambda place: place.name)}
        self.needed, self.left = max(2, job.federation.min_sites), 0
        self.trained: list[dict[str, Any]] = []
        self.dropped: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {"sites": 0, "needed": self.needed, "images": 0, "loss": math.nan, "silent": []}

    def run(self) -> Arrays:
        """The new global arrays."""
        names: list[str]
        try:
            keys: dict[str, _Keys] = self._ask("keys", self._content(), self.places, _keys)
            self._go_on(len(keys), self.needed)
            names, quorum = list(keys), threshold(len(keys), self.job.privacy.secure_share, noisy_sites(self.job))
            self.facts["needed"] = most = max(self.needed, quorum)
            peers = {field: [getattr(shown, field) for shown in keys.values()] for field in ("mask", "seal")}
            content = self._content(peers={"names": names, **peers})
            sealed: dict[str, list[bytes]] = self._ask("shares", content, names, _sealed(len(names)))
            self._go_on(len(sealed), most)
            total, arrived = self._add_up(list(sealed))
            self._go_on(len(arrived), most)
            revealed = self._ask("unmask", self._requests(names, sealed, arrived), arrived, _shares(len(sealed)))
            self._go_on(len(revealed), quorum)
            self._take_off(total, keys, list(sealed), arrived, revealed, quorum)
            merged = self._mean(total, list(sealed), arrived)
            self._go_on(len(arrived), most)
        except _Stopped:
            return self.arrays
        return merged

    def _go_on(self, left: int, needed: int) -> None:
        self.left, self.needed = left, needed
        if left < needed:
            raise _Stopped

    def _fail(self, site: str, reason: Dropped) -> NoReturn:
        """The sum cannot be used at all."""
        self.dropped.append({"site": site, "reason": str(reason)})
        self.left = 0
        raise _Stopped

    # ------------------------------------------------------------------ the four exchanges

    def _content(self, **records: Mapping[str, Any]) -> RecordDict:
        config = ConfigRecord({key: self.config[key] for key in PASSED_ON if key in self.config})
        return RecordDict({"config": config, **{name: ConfigRecord(dict(facts)) for name, facts in records.items()}})

    def _ask(
        self, stage: str, content: Content, names: Iterable[str], read: Callable[[RecordDict], Any]
    ) -> dict[str, Any]:
        """What ``read`` makes of each reply that is in order, by site.

        A site that fails the last exchange is not dropped, its change is in the sum already: it is called silent.
        """
        found: dict[str, Any] = {}
        asked = [self.places[name] for name in names]
        for place, reply in self.exchange(f"train.{stage}", content, asked, self.round):
            try:
                status(reply)
                assert reply is not None
                found[place.name] = read(reply.content)
            except Dropped as reason:
                rows = self.facts["silent"] if stage == "unmask" else self.dropped
                rows.append({"site": place.name, "reason": str(reason)})
        return found

    def _add_up(self, sharing: list[str]) -> tuple[np.ndarray, list[str]]:
        """The sum of the masked changes that are in order, and whose they are; one at a time is in memory."""
        size = sum(tensor.numel() for tensor in self.arrays.values()) + TAIL + 1 + len(self.parts)
        total = np.zeros(size, np.uint32)
        most = max(float(self.places[name].images["train"]) for name in sharing)
        config = ConfigRecord(dict(self.config) | {"sharing": sharing, "max-weight": most})
        content = RecordDict({"arrays": ArrayRecord(self.arrays), "config": config})

        def add(reply: RecordDict) -> None:
            np.add(total, _masked(reply, size), out=total)

        return total, list(self._ask("masked", content, sharing, add))

    def _requests(
        self, names: list[str], sealed: Mapping[str, list[bytes]], arrived: list[str]
    ) -> Callable[[Place], RecordDict]:
        """To each site: who arrived, and what the others sealed for it."""

        def content(place: Place) -> RecordDict:
            own = names.index(place.name)
            senders = [name for name in sealed if name != place.name]
            theirs = [sealed[name][own] for name in senders]
            return self._content(unmask={"arrived": arrived, "senders": senders, "sealed": theirs})

        return content

    # ------------------------------------------------------------------ the sum

    def _take_off(
        self,
        total: np.ndarray,
        keys: Mapping[str, _Keys],
        sharing: list[str],
        arrived: list[str],
        revealed: Mapping[str, list[bytes]],
        quorum: int,
    ) -> None:
        """Take the masks off ``total`` in place: each arrived site's own, and those that lost sites left in it."""
        places = {name: place for place, name in enumerate(keys)}
        plus: list[bytes] = []
        minus: list[bytes] = []
        for number, name in enumerate(sharing):
            shares = {places[teller]: told[number] for teller, told in revealed.items() if told[number]}
            there, shown = name in arrived, keys[name]
            right = (commitment, shown.commitment) if there else (public_key, shown.mask)
            try:
                seed = put_together(shares, quorum, *right)
            except ValueError:
                self._fail(name, Dropped("bad-shares"))
            if there:
                minus.append(own_mask(seed, self.tag))
            else:  # what it would have added, its peers left in the sum with the other sign
                added, subtracted = pair_masks(name, seed, {other: keys[other].mask for other in arrived}, self.tag)
                plus += added
                minus += subtracted
        add_masks(total, plus, minus)

    def _mean(self, total: np.ndarray, sharing: list[str], arrived: list[str]) -> Arrays:
        """The new arrays, and the rows of the sites; a single site's loss and images are not known."""
        try:
            mean, told = decode(total, 1 + len(self.parts), self.job.federation.max_update_norm, len(sharing))
        except ValueError:
            self._fail("all sites together", Dropped("wrong-sums"))
        equal = self.job.federation.weighting == "equal"
        self.trained = [
            {
                "site": name,
                "weight": 1.0 if equal else float(self.places[name].images["train"]),
                "steps": self.job.local_steps(self.places[name].images["train"]),
                "images": 0,
                "loss": math.nan,
            }
            for name in arrived
        ]
        self.facts |= {"sites": len(arrived), "images": told.images, "loss": told.losses[0] * told.images}
        if self.parts:
            losses = [loss * told.images for loss in told.losses[1:]]
            self.facts["losses"] = dict(zip(self.parts, losses, strict=True))
        return changed(self.arrays, mean)


# ---------------------------------------------------------------------- which replies are in order


def _record(reply: RecordDict, name: str) -> Mapping[str, Any]:
    if set(reply.config_records) - {"status"} != {name} or reply.array_records or reply.metric_records:
        raise Dropped("wrong-records")
    return reply.config_records[name]


def _bytes(value: object, count: int, sizes: tuple[int, ...]) -> list[bytes]:
    if not isinstance(value, list) or len(value) != count:
        raise Dropped("wrong-shape")
    if not all(isinstance(item, bytes) and len(item) in sizes for item in value):
        raise Dropped("wrong-shape")
    return value


def _keys(reply: RecordDict) -> _Keys:
    record = _record(reply, "keys")
    found = _Keys(*_bytes([record.get(name) for name in _Keys._fields], 3, (KEY,)))
    try:
        for key in found[:2]:
            agree(bytes(SEED), key)  # a key that is none would fail later, at every peer
    except ValueError:
        raise Dropped("bad-keys") from None
    return found


def _sealed(count: int) -> Callable[[RecordDict], list[bytes]]:
    return lambda reply: _bytes(_record(reply, "shares").get("sealed"), count, (0, SEALED))


def _shares(count: int) -> Callable[[RecordDict], list[bytes]]:
    return lambda reply: _bytes(_record(reply, "revealed").get("shares"), count, (0, SEED))


def _masked(reply: RecordDict, size: int) -> np.ndarray:
    if set(reply.array_records) != {"arrays"} or list(reply.array_records["arrays"]) != ["masked"]:
        raise Dropped("wrong-records")
    try:
        vector = reply.array_records["arrays"]["masked"].numpy()
    except Exception:
        raise Dropped("undecodable") from None
    if vector.shape != (size,):
        raise Dropped("wrong-shape")
    if vector.dtype != np.uint32:
        raise Dropped("wrong-dtype")
    return vector
