"""The privacy budget that outlives runs: what was ever spent on a site's images, in .consilium/ledger.sqlite.

A round *reserves* what it will spend before it trains and *settles* when it is done. Nothing is ever given back: a
reservation that was never settled (a crash, a power cut) counts as spent, and a round that is repeated counts twice, as
its noise is fresh. The reservation is on the disk before ``reserve`` returns, and is decided in one transaction that no
other process can come between.

**Whose budget it is.** One ledger a site folder, that of the site.toml, and all its entries count together, whatever
images they were trained on. The fingerprint of the training cases is written down, but starts no new budget: else one
file more, or one less, would. Counting different images together can only overstate what was spent on each.

**One delta.** What is kept is mechanisms (noise, sampling rate, steps), not epsilons, so that all runs are composed and
evaluated at one delta, the site's own ``max_delta``, whatever delta each job named and by any accountant.

**Units.** An entry stands as its mechanism for the unit it protected. Where the site protects patients, jobs that
protect images are refused before they come here (``client.policy``); entries of before such a rule are counted as they
stand, and ``consilium site budget`` says so. Where the site protects images, an entry that protected patients counts as
it stands as well: what the patient gave as a whole is hidden at that epsilon.

**Seal.** Every entry holds the SHA-256 of itself and the entry before. Changing, inserting or removing one breaks the
chain, and a broken chain refuses every further round. Who may write the file can rewrite all of it, or take the last
entries off: that is seen only by a seal (``Ledger.seal``) noted elsewhere, of which ``verify`` asks that it be there.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from shared.accounting import Mechanism, epsilon
from shared.cases import Sample
from shared.errors import SiteRefusal
from shared.sitefile import OWN_FOLDER

LEDGER = "ledger.sqlite"
PATIENCE = 120.0  # seconds to wait for another process that is deciding
_VERSION = 1
_SCHEMA = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('reserve', 'settle')),
    reserve INTEGER REFERENCES entries (id) CHECK ((kind = 'settle') = (reserve IS NOT NULL)),
    fingerprint TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_rate REAL NOT NULL,
    steps INTEGER NOT NULL,
    delta REAL NOT NULL,
    unit TEXT NOT NULL,
    accountant TEXT NOT NULL,
    epsilon REAL NOT NULL,
    seal TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX settled_once ON entries (reserve) WHERE kind = 'settle';
CREATE TRIGGER no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER no_replace BEFORE INSERT ON entries WHEN NEW.id <= (SELECT max(id) FROM entries)
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


class Entry(NamedTuple):
    """One line of the ledger, as it stands in the file."""

    id: int  # from 1, without gaps
    time: str  # UTC, ISO 8601
    kind: str  # reserve, settle
    reserve: int | None  # of a settle: the id of what it settles
    fingerprint: str  # of the training cases, for information
    run: str
    round: int
    noise_multiplier: float
    sampling_rate: float
    steps: int  # reserved; of a settle: done
    delta: float  # at which epsilon is
    unit: str  # image, patient
    accountant: str  # prv, rdp
    epsilon: float  # of the whole ledger up to here
    seal: str  # SHA-256, hexadecimal

    @property
    def mechanism(self) -> Mechanism:
        """What was spent, as the accountant reckons it."""
        return Mechanism(self.noise_multiplier, self.sampling_rate, self.steps)


class Terms(NamedTuple):
    """By what a round is judged."""

    delta: float  # the site's own, at which everything is evaluated
    max_epsilon: float  # the site's limit over all time; 0 is none
    unit: str = "image"  # what the noise protects: image, patient
    accountant: str = "prv"  # prv, rdp


class Reservation(NamedTuple):
    """Leave to do so many steps; ``epsilon`` is what the whole ledger comes to with them."""

    id: int
    epsilon: float
    steps: int


def ledger_path(site_file: Path) -> Path:
    """Where the ledger of a site.toml lies: beside it."""
    return Path(site_file).parent / OWN_FOLDER / LEDGER


def fingerprint(samples: Iterable[Sample]) -> str:
    """SHA-256 over the names of the training cases and their patients, in hexadecimal; never leaves the site."""
    units = sorted((sample.id, sample.patient) for sample in samples if sample.split == "train")
    return hashlib.sha256(json.dumps(units).encode()).hexdigest()


def spent_in(entries: Iterable[Entry]) -> list[Mechanism]:
    """The mechanisms that count: all that was ever reserved."""
    return [entry.mechanism for entry in entries if entry.kind == "reserve"]


class Ledger:
    """The ledger in one file, made at the first reservation. Safe for several processes and threads at once.

    Every method raises SiteRefusal "ledger-unusable" where the file cannot be read or written: then nothing is trained.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @contextmanager
    def round(
        self, run: str, round_: int, mechanism: Mechanism, terms: Terms, fingerprint: str = ""
    ) -> Iterator[Reservation]:
        """``with ledger.round(…): train``: reserves before, settles after; an error between leaves it spent."""
        reservation = self.reserve(run, round_, mechanism, terms, fingerprint)
        yield reservation
        self.settle(reservation)

    def reserve(self, run: str, round_: int, mechanism: Mechanism, terms: Terms, fingerprint: str = "") -> Reservation:
        """Take a round's budget, on the disk when this returns.

        Args:
            run: the run's id.
            mechanism: what the round will do; at least one step.
            fingerprint: of the training cases, for information.

        Raises:
            SiteRefusal: "budget-spent": everything so far and this would come to more than the limit;
                "ledger-broken": an entry was changed or removed.
        """
        if mechanism.steps < 1:
            raise ValueError(f"{mechanism}: nothing to reserve")
        with self._transaction() as connection:
            entries = _read(connection)
            broken = problems(entries)
            if broken:
                raise SiteRefusal("ledger-broken", f"{self.path}: {broken[0]}; put its last good copy back")
            so_far = epsilon([*spent_in(entries), mechanism], terms.delta, terms.accountant)
            if terms.max_epsilon and not so_far <= terms.max_epsilon:
                raise SiteRefusal(
                    "budget-spent",
                    f"run {run} round {round_} would bring epsilon to {so_far:.4g} at delta {terms.delta:g}, "
                    f"max_epsilon is {terms.max_epsilon:g}",
                )
            entry = _next(
                entries,
                kind="reserve",
                reserve=None,
                fingerprint=fingerprint,
                run=run,
                round=int(round_),
                noise_multiplier=float(mechanism.noise_multiplier),
                sampling_rate=float(mechanism.sampling_rate),
                steps=int(mechanism.steps),
                delta=float(terms.delta),
                unit=terms.unit,
                accountant=terms.accountant,
                epsilon=float(so_far),
            )
            _append(connection, entry)
        return Reservation(entry.id, entry.epsilon, entry.steps)

    def settle(self, reservation: Reservation, steps: int | None = None) -> None:
        """Write down that the round is done; ``steps`` done, if not all. What was reserved stays spent.

        Raises:
            ValueError: no such reservation, settled before, or more steps done than reserved.
        """
        done = reservation.steps if steps is None else steps
        with self._transaction() as connection:
            entries = _read(connection)
            found = next((one for one in entries if one.id == reservation.id and one.kind == "reserve"), None)
            if found is None or any(one.reserve == reservation.id for one in entries):
                raise ValueError(f"reservation {reservation.id} is not open")
            if not 0 <= done <= found.steps:
                raise ValueError(f"{done} steps done, {found.steps} were reserved")
            fields = found._asdict() | {"kind": "settle", "reserve": found.id, "steps": done}
            fields["epsilon"] = entries[-1].epsilon
            _append(connection, _next(entries, **fields))

    def history(self) -> list[Entry]:
        """All entries, oldest first; none where there is no ledger yet."""
        if not self.path.exists():
            return []
        # Not read-only: a journal left by a killed process must be rolled back first.
        with self._connection("?mode=rw") as connection:
            return _read(connection) if _version(connection) else []

    def spent(self, delta: float, accountant: str) -> float:
        """Epsilon of all that was ever reserved, composed, at ``delta``."""
        return epsilon(spent_in(self.history()), delta, accountant)

    def seal(self) -> str:
        """The last entry's; whoever keeps it elsewhere can tell later that nothing up to here was changed."""
        entries = self.history()
        return entries[-1].seal if entries else ""

    def verify(self, seal: str = "") -> list[str]:
        """What is wrong with the chain, in words; nothing if all is well.

        Args:
            seal: noted earlier, its first characters at least: must still be the seal of an entry.
        """
        entries = self.history()
        found = problems(entries)
        if seal and not any(entry.seal.startswith(seal.lower()) for entry in entries):
            found.append(f"no entry has the seal {seal}: the entry that had it was changed or removed")
        return found

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection that alone may write; all is on the disk when the block ends, nothing if it raises."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SiteRefusal("ledger-unusable", f"{self.path}: {error.strerror}") from None
        with self._connection("?mode=rwc") as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                if not _version(connection):
                    _create(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        """Opened for one operation and closed, so that it survives forks and threads."""
        try:
            connection = sqlite3.connect(
                self.path.absolute().as_uri() + mode, uri=True, timeout=PATIENCE, isolation_level=None
            )
            try:
                # A rollback journal, not WAL: one file to copy, and it works on a network drive. EXTRA also flushes
                # the folder when the journal is removed, without which a power cut could undo a commit.
                connection.execute("PRAGMA synchronous=EXTRA")
                if _version(connection) > _VERSION:
                    raise SiteRefusal("ledger-unusable", f"{self.path}: written by a newer version of this program")
                yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise SiteRefusal("ledger-unusable", f"{self.path}: {error}") from None


def _version(connection: sqlite3.Connection) -> int:
    """0: nothing in it yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _create(connection: sqlite3.Connection) -> None:
    for statement in _statements(_SCHEMA):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version={_VERSION}")


def _statements(script: str) -> Iterator[str]:
    """One after the other: ``executescript`` would end the transaction."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def _read(connection: sqlite3.Connection) -> list[Entry]:
    return [Entry(*row) for row in connection.execute(f"SELECT {', '.join(Entry._fields)} FROM entries ORDER BY id")]


def _append(connection: sqlite3.Connection, entry: Entry) -> None:
    marks = ", ".join("?" * len(entry))
    connection.execute(f"INSERT INTO entries ({', '.join(Entry._fields)}) VALUES ({marks})", entry)


def _next(entries: Sequence[Entry], **fields: object) -> Entry:
    """The entry that follows, sealed."""
    own = {"id": len(entries) + 1, "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "seal": ""}
    entry = Entry(**(fields | own))  # type: ignore[arg-type]
    return entry._replace(seal=_sealed(entry, entries[-1].seal if entries else ""))


def _sealed(entry: Entry, before: str) -> str:
    """SHA-256 over the seal before and the entry's own fields as JSON."""
    return hashlib.sha256(json.dumps([before, *entry._replace(seal="")]).encode()).hexdigest()


def problems(entries: Sequence[Entry]) -> list[str]:
    """Where the chain of seals does not hold, in words."""
    found, before = [], ""
    for place, entry in enumerate(entries, start=1):
        if entry.id != place and (place == 1 or entry.id != entries[place - 2].id + 1):
            found.append(f"before entry {entry.id} entries are missing")
        elif _sealed(entry, before) != entry.seal:
            found.append(f"entry {entry.id} was changed, or one before it")
        before = entry.seal
    return found
