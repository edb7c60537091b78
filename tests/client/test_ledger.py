"""The ledger: nothing is spent that is not written down, whatever is killed, and nothing written down is changed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ledger import Ledger, Reservation, Terms, fingerprint, ledger_path, problems
from shared.accounting import Mechanism, epsilon
from shared.cases import Sample
from shared.errors import SiteRefusal

STEP = Mechanism(2.0, 0.1, 5)
FREE = Terms(delta=1e-5, max_epsilon=0.0, accountant="rdp")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(ledger_path(tmp_path / "site.toml"))


def run_script(script: str, *args: object, root: Path) -> str:
    """Real processes: the script forks, so that the slow imports are made once."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from client.ledger import Ledger, Terms
from shared.accounting import Mechanism, epsilon

ledger, started = Ledger(Path(sys.argv[1])), sys.argv[2]
mechanism, terms = Mechanism(4.0, 0.01, 1), Terms(1e-5, 0.0, accountant="rdp")
epsilon([mechanism], 1e-5, "rdp")  # imports what is slow

def work(life):
    file = os.open(started, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = 0
    while True:
        with ledger.round(f"life-{life}", number, mechanism, terms) as reservation:
            os.write(file, f"{reservation.id} life-{life} {number}\\n".encode())  # from here on the noise is drawn
            time.sleep(random.random() * 0.004)
        number += 1

random.seed(0)
for life in range(100):
    child = os.fork()
    if child == 0:
        work(life)
    time.sleep(random.random() * 0.09)  # a round takes some 50 ms, most of it flushing
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
"""


def test_a_process_killed_a_hundred_times_has_started_nothing_that_is_not_reserved(
    ledger: Ledger, tmp_path: Path, root: Path
) -> None:
    run_script(KILLED, ledger.path, tmp_path / "started", root=root)
    entries = ledger.history()
    reserved = {(entry.id, entry.run, entry.round) for entry in entries if entry.kind == "reserve"}
    lines = [line.split() for line in (tmp_path / "started").read_text().splitlines()]
    started = [(int(number), run, int(round_)) for number, run, round_ in lines]
    assert len(started) > 20  # some hundred on an idle machine
    assert len(set(started)) == len(started)
    assert set(started) <= reserved
    settled = {entry.reserve for entry in entries if entry.kind == "settle"}
    assert settled <= {number for number, _, _ in started}
    assert len(settled) < len(reserved)  # some were killed in between, and count
    assert ledger.spent(1e-5, "rdp") >= epsilon([Mechanism(4.0, 0.01, len(started))], 1e-5, "rdp")
    assert ledger.spent(1e-5, "rdp") == epsilon([Mechanism(4.0, 0.01, len(reserved))], 1e-5, "rdp")
    assert ledger.verify() == []


CROWD = """
import os, random, sys, time
from pathlib import Path
from client.ledger import Ledger, Terms
from shared.accounting import Mechanism, epsilon
from shared.errors import SiteRefusal

mechanism, terms = Mechanism(2.0, 0.1, 5), Terms(1e-5, float(sys.argv[2]), accountant="rdp")
epsilon([mechanism], 1e-5, "rdp")
ledger = Ledger(Path(sys.argv[1]))
children = []
for name in "abcd":
    child = os.fork()
    if child == 0:
        for number in range(1000):
            try:
                ledger.reserve(name, number, mechanism, terms)
                time.sleep(random.random() * 0.03)  # SQLite lets nobody queue: who never pauses always wins
            except SiteRefusal as refusal:
                os._exit(0 if refusal.code == "budget-spent" else 1)
        os._exit(2)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert codes == [0] * 4, codes
"""


def test_processes_that_reserve_at_once_fill_the_limit_and_never_pass_it(ledger: Ledger, root: Path) -> None:
    run_script(CROWD, ledger.path, 3.0, root=root)
    count = len(ledger.history())
    assert len({entry.run for entry in ledger.history()}) >= 2
    assert epsilon([Mechanism(2.0, 0.1, 5 * count)], 1e-5, "rdp") <= 3.0
    assert epsilon([Mechanism(2.0, 0.1, 5 * (count + 1))], 1e-5, "rdp") > 3.0
    assert ledger.verify() == []


def test_two_runs_cost_what_one_history_of_both_costs_and_what_an_independent_library_says(tmp_path: Path) -> None:
    first, second = Mechanism(1.0, 0.01, 10), Mechanism(1.5, 0.05, 15)
    terms, spent = Terms(1e-5, 8.0), [0.0]
    for number in range(5):  # a new object each time: nothing is kept in the process
        spent.append(Ledger(tmp_path / "l").reserve("one", number, first, terms).epsilon)
    for number in range(4):
        reservation = Ledger(tmp_path / "l").reserve("two", number, second, terms)
        Ledger(tmp_path / "l").settle(reservation)
        spent.append(reservation.epsilon)
    assert spent == sorted(spent)
    assert len(set(spent)) == len(spent)
    whole = [first._replace(steps=50), second._replace(steps=60)]
    assert spent[-1] == Ledger(tmp_path / "l").spent(1e-5, "prv") == epsilon(whole, 1e-5, "prv")
    oracle = PLDAccountant()
    for noise, rate, steps in whole:
        oracle.compose(dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise)), steps)
    pld = oracle.get_epsilon(1e-5)
    assert 0 <= spent[-1] - pld <= 0.015
    assert Ledger(tmp_path / "l").spent(1e-5, "rdp") >= pld


def test_a_round_beyond_the_limit_is_refused_by_name_and_leaves_no_entry(ledger: Ledger) -> None:
    terms = FREE._replace(max_epsilon=1.5)
    rounds = 0
    while epsilon([STEP] * (rounds + 1), 1e-5, "rdp") <= 1.5:
        ledger.reserve("r", rounds, STEP, terms)
        rounds += 1
    with pytest.raises(SiteRefusal) as refused:
        ledger.reserve("r", rounds, STEP, terms)
    assert refused.value.code == "budget-spent"
    assert "max_epsilon is 1.5" in str(refused.value)
    assert len(ledger.history()) == rounds > 0
    ledger.reserve("r", rounds, Mechanism(50.0, 0.001, 1), terms)  # what costs less still fits
    ledger.reserve("r", rounds, STEP, FREE)  # a site without a limit refuses nothing, but writes all down
    assert ledger.spent(1e-5, "rdp") > 1.5


def test_what_comes_to_the_limit_exactly_still_fits(ledger: Ledger) -> None:
    limit = epsilon([STEP, STEP], 1e-5, "rdp")
    terms = FREE._replace(max_epsilon=limit)
    assert [ledger.reserve("r", number, STEP, terms).epsilon for number in (1, 2)][-1] == limit
    with pytest.raises(SiteRefusal, match="max_epsilon"):
        ledger.reserve("r", 3, STEP, terms)


def test_nothing_is_reserved_for_no_step_and_images_need_not_be_named(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="nothing to reserve"):
        ledger.reserve("r", 1, STEP._replace(steps=0), FREE)
    assert ledger.history() == []
    ledger.reserve("r", 1, STEP, FREE)
    assert ledger.history()[0].fingerprint == ""


def test_a_step_without_noise_fits_no_limit(ledger: Ledger) -> None:
    with pytest.raises(SiteRefusal, match="inf"):
        ledger.reserve("r", 1, Mechanism(0.0, 0.1, 1), FREE._replace(max_epsilon=1e6))
    assert ledger.reserve("r", 1, Mechanism(0.0, 0.1, 1), FREE).epsilon == math.inf
    assert ledger.spent(1e-5, "prv") == math.inf
    assert ledger.verify() == []


def test_other_images_a_lower_delta_or_another_accountant_open_no_new_budget(ledger: Ledger) -> None:
    once = ledger.reserve("a", 1, STEP, FREE, "images of monday").epsilon
    again = ledger.reserve("b", 1, STEP, FREE, "images of tuesday").epsilon
    assert again == epsilon([STEP, STEP], 1e-5, "rdp") > once
    third = ledger.reserve("c", 1, STEP, FREE._replace(accountant="prv")).epsilon
    assert third == epsilon([STEP] * 3, 1e-5, "prv")
    assert ledger.spent(1e-7, "rdp") == epsilon([STEP] * 3, 1e-7, "rdp")


def test_an_error_in_training_and_a_repeated_round_stay_spent(ledger: Ledger) -> None:
    with pytest.raises(ZeroDivisionError), ledger.round("r", 1, STEP, FREE):
        raise ZeroDivisionError
    with ledger.round("r", 1, STEP, FREE, "f") as reservation:
        assert reservation.epsilon == epsilon([STEP, STEP], 1e-5, "rdp")
    assert [(entry.kind, entry.reserve) for entry in ledger.history()] == [
        ("reserve", None),
        ("reserve", None),
        ("settle", 2),
    ]
    assert ledger.spent(1e-5, "rdp") == epsilon([STEP, STEP], 1e-5, "rdp")


def test_settling_gives_nothing_back_and_happens_once(ledger: Ledger) -> None:
    reservation = ledger.reserve("r", 1, STEP, FREE)
    before = ledger.spent(1e-5, "rdp")
    with pytest.raises(ValueError, match="6 steps done, 5 were reserved"):
        ledger.settle(reservation, steps=6)
    ledger.settle(reservation, steps=2)
    assert ledger.history()[-1].steps == 2
    assert ledger.spent(1e-5, "rdp") == before
    for closed in (reservation, Reservation(2, 0.0, 1), Reservation(9, 0.0, 1)):
        with pytest.raises(ValueError, match="not open"):
            ledger.settle(closed)
    ledger.settle(ledger.reserve("r", 2, STEP, FREE), steps=0)  # reserved, then stopped before the first
    assert ledger.history()[-1].steps == 0


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    for number in range(4):
        with ledger.round("r", number, STEP, FREE):
            pass
    return ledger


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM entries WHERE id = 8",
        "UPDATE entries SET steps = 1 WHERE id = 1",
        "INSERT OR REPLACE INTO entries SELECT 1, time, kind, reserve, fingerprint, run, round, 100.0, sampling_rate, "
        "steps, delta, unit, accountant, epsilon, seal FROM entries WHERE id = 1",
    ],
)
def test_the_file_itself_refuses_to_change_or_lose_an_entry(filled: Ledger, sql: str) -> None:
    before = filled.history()
    with sqlite3.connect(filled.path) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(sql)
    assert filled.history() == before


FORGERIES = {
    "noise raised": "UPDATE entries SET noise_multiplier = 100 WHERE id = 3",
    "run renamed": "UPDATE entries SET run = 'other' WHERE id = 5",
    "first removed": "DELETE FROM entries WHERE id = 1",
    "one removed": "DELETE FROM entries WHERE id = 4",
    "one removed, numbers closed up": "DELETE FROM entries WHERE id = 3; UPDATE entries SET id = id - 1 WHERE id > 3",
    "seal of another": "UPDATE entries SET seal = (SELECT seal FROM entries WHERE id = 1) WHERE id = 7",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_entry_changed_or_removed_by_force_is_found_and_stops_every_further_round(
    filled: Ledger, forgery: str
) -> None:
    with sqlite3.connect(filled.path) as connection:
        connection.executescript(f"DROP TRIGGER no_update; DROP TRIGGER no_delete; {FORGERIES[forgery]}")
    assert filled.verify() != []
    with pytest.raises(SiteRefusal) as refused:
        filled.reserve("r", 9, STEP, FREE)
    assert refused.value.code == "ledger-broken"
    assert f"{filled.path}: {filled.verify()[0]}; put its last good copy back" in str(refused.value)


@pytest.mark.parametrize("gone", [{1}, {1, 2}, {2}, {3, 4}, {2, 5, 6}])
def test_each_gap_is_told_once_and_what_follows_is_in_order(filled: Ledger, gone: set[int]) -> None:
    left = [entry for entry in filled.history() if entry.id not in gone]
    after = [entry.id for entry in left if entry.id - 1 in gone]
    assert problems(left) == [f"before entry {number} entries are missing" for number in after]


def test_a_seal_is_the_hash_of_the_one_before_and_of_the_entry(filled: Ledger) -> None:
    """As it stands in files of earlier versions, which must go on being read."""
    before = ""
    for entry in filled.history():
        fields = [before, *entry[:-1], ""]
        before = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        assert entry.seal == before


def test_last_entries_taken_off_are_seen_by_a_seal_noted_before(filled: Ledger) -> None:
    seal = filled.seal()
    assert filled.verify(seal[:16]) == []
    filled.reserve("r", 5, STEP, FREE)
    assert filled.verify(seal) == []
    with sqlite3.connect(filled.path) as connection:
        connection.executescript("DROP TRIGGER no_delete; DELETE FROM entries WHERE id > 7")
    assert filled.verify() == []
    assert seal in filled.verify(seal)[0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_single_change_of_any_field_breaks_the_chain(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    ledger = Ledger(folder / "l")
    for number in range(3):
        ledger.reserve(f"r{number}", number, STEP, FREE)
    entries = ledger.history()
    assert problems(entries) == []
    place = data.draw(st.integers(0, 2))
    name = data.draw(st.sampled_from(entries[0]._fields))
    value = getattr(entries[place], name)
    other = value + 1 if isinstance(value, (int, float)) else f"{value}0"
    entries[place] = entries[place]._replace(**{name: other})
    assert problems(entries) != []
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["not a database", "a folder", "newer", "no permission"])
def test_a_ledger_that_cannot_be_used_refuses_the_round(filled: Ledger, kind: str, tmp_path: Path) -> None:
    ledger = filled
    if kind == "not a database":
        ledger.path.write_bytes(b"x" * 5000)
    elif kind == "newer":
        with sqlite3.connect(ledger.path) as connection:
            connection.execute("PRAGMA user_version=99")
    elif kind == "a folder":
        ledger = Ledger(tmp_path)
    else:
        ledger = Ledger(Path("/proc/consilium/ledger.sqlite"))  # refuses every new file, even to root
    with pytest.raises(SiteRefusal) as refused:
        ledger.reserve("r", 1, STEP, FREE)
    assert refused.value.code == "ledger-unusable"
    assert "\n" not in str(refused.value)


def test_no_ledger_is_an_empty_history_and_makes_no_file(ledger: Ledger) -> None:
    assert (ledger.history(), ledger.spent(1e-5, "prv"), ledger.seal(), ledger.verify()) == ([], 0.0, "", [])
    assert not ledger.path.exists()


def test_a_reservation_is_flushed_to_the_disk(filled: Ledger) -> None:
    with filled._connection("?mode=rw") as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_the_fingerprint_is_of_the_training_cases_in_any_order() -> None:
    cases = [Sample(f"{i}.png", (0,), f"p{i}", split) for i, split in enumerate(("train", "train", "val", "test"))]
    whole = fingerprint(cases)
    assert whole == fingerprint(reversed(cases)) == fingerprint(cases[:2])
    assert whole != fingerprint(cases[:1])
    assert whole != fingerprint([cases[0], Sample("1.png", (0,), "other", "train")])
    assert len(whole) == 64
