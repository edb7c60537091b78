"""The round loop: survey the sites, then sample, train, admit, aggregate, evaluate and save, round by round.

It talks to a Flower ``Grid`` only, so it is the same on one machine, on Ray and between hospitals.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors.torch import load_file
from torch import Tensor, nn

from server.admission import Dropped, Place, Update, admit
from server.algorithm import Algorithm, TooFew
from server.buffered import Buffered, rebased
from server.central import Central
from server.checkpoint import Best, Checkpoint, State
from server.corrections import weight_of_all, with_own_rounds
from server.evaluation import better, evaluate, evaluate_personal, evaluate_subgroups, keep
from server.roll import await_sites, call, joined, shortfall
from server.sampling import pass_on, sample
from server.secure import SecureRound
from server.store import Store, read_events
from server.wire import LATE, Content, Line
from shared import __version__
from shared.config import Job
from shared.files import write_text
from shared.imaging.dataset import Dataset
from shared.intervals import NOTHING, Estimate
from shared.tasks import TASKS, Sums, load_task
from shared.training import pick_device
from shared.weights import REFERENCE, exchanged, exchanged_names, finite, frozen_digest, keeps_own, put, trained_names

Arrays = dict[str, Tensor]
Records = Mapping[str, Mapping[str, Tensor]]


class RunFailed(Exception):
    """The run cannot go on; everything up to here is in the run folder. Exit code 1."""


class Run:
    """One run of one job on the sites behind ``grid``; results go to ``folder``.

    ``heldout`` is the server's own data set, if it has one; its images are only evaluated on. ``jury`` is a surveyed
    run whose sites test the final model instead of this run's own: how a baseline is judged on everybody's images.
    ``reference`` holds the weights of the network the job's task measures by, where it has one and they are there
    already; else the run trains it first. ``resume`` goes on after the last whole round that ``folder`` holds.
    ``expected`` is how many sites are waited for at first, up to ``federation.start_timeout``. ``store`` is as for
    ``server.store.Store``.
    """

    def __init__(
        self,
        grid: Grid,
        job: Job,
        folder: Path,
        heldout: Dataset | None = None,
        jury: Run | None = None,
        reference: Arrays | None = None,
        resume: bool = False,
        expected: int = 0,
        store: str | None = "",
    ) -> None:
        self.grid, self.job, self.folder, self.heldout, self.jury = grid, job, folder, heldout, jury
        self.expected = max(expected, job.federation.min_sites)
        self.checkpoint = Checkpoint(folder)
        self.reference: Arrays = reference or {}
        self.is_reference = False
        self.task = load_task(job.task)
        self.parts = [part.prefix.rstrip(".") for part in self.task.parts(job)]
        self.store = Store(folder, store)
        self.model = self.task.build_model(job)
        self.resumed = self.checkpoint.load(list(exchanged(self.model, job))) if resume else None
        self.frozen = frozen_digest(self.model, job)
        self.algorithm = Algorithm(job, trained_names(self.model, job))
        self.asked: Counter[str] = Counter()  # how often each site was asked to train
        self.line = Line(job)
        self.buffered = Buffered(grid, self.line, job)
        self.central = Central.of(job, exchanged_names(self.model, job)) if job.privacy.dp == "central" else None
        self.device = pick_device(job)
        self.template: Sums = self.task.collect(self.model, Dataset.of(()), job, torch.device("cpu"))
        self.counted = len(self.task.count_classes(Dataset.of(()), job))
        self.places: list[Place] = []
        self.called: set[int] = set()  # nodes that were asked who they are
        self.heard: set[int] = set()  # those of them that answered, whatever they said
        self.best = self.resumed.best if self.resumed else Best()

    def run(self) -> dict[str, Any]:
        """Train, evaluate and save; returns the best round, the seconds it took and the names of the sites.

        Raises:
            RunFailed: fewer sites than the quorum are left.
        """
        job = self.job
        started = time.monotonic()
        write_text(self.folder / "job.toml", job.toml())
        facts = {"job": job.sha256, "name": job.name, "rounds": job.federation.rounds, "version": __version__}
        self.store.add("start", **facts, **({"resumed_after": self.resumed.round} if self.resumed else {}))
        try:
            arrays = self._train_all(exchanged(self.model, job))
            result = self._finish(arrays, time.monotonic() - started)
        except Exception as failure:  # of whatever kind: what is over must not look as if it went on
            with contextlib.suppress(OSError):  # the disk may be why
                self.store.add("failed", reason=str(failure) or type(failure).__name__)
            raise
        self.store.add("finish", seconds=round(time.monotonic() - started, 3))
        return result

    def _train_all(self, arrays: Arrays) -> Arrays:
        job, done = self.job, self.resumed.round if self.resumed else 0
        await_sites(self.grid, self.expected, job.federation.start_timeout)
        self.survey(round_=done)
        if hasattr(self.task, "reference") and not (self.reference or self.is_reference):
            self.reference = train_reference(self.grid, job, self.folder, self.store.store)
        if self.resumed:
            arrays, weights = self.resumed.arrays, self.resumed.more["class_weights"]
            self.line.version, self.line.late = done, self.resumed.held.pop(LATE, {})
            self.algorithm.held.update(self.resumed.held)
            self.asked.update(self.resumed.more.get("asked", {}))
            if self.central is not None:
                self.central.bound, self.central.rounds = self.resumed.more["central"]
            if self.resumed.more.get("due"):
                self._keep_best(done, arrays, evaluate(self, arrays, done, "val"))
        else:
            totals = [sum(column) for column in zip(*(place.classes for place in self.places), strict=True)]
            weights = [float(weight) for weight in self.task.class_weights(totals, job)]
            evaluate(self, arrays, 0, "val")
        self.class_weights = weights
        for number in range(done + 1, job.federation.rounds + 1):
            self._admit_newcomers(number)
            arrays = self.train_round(arrays, number, weights)
            if not finite(arrays):
                raise RunFailed(f"in round {number} the model is no longer finite; set federation.max_update_norm")
            if number % job.evaluation.every == 0 or number == job.federation.rounds:
                if job.privacy.secure_aggregation:  # its sites do no round twice, so none may be lost in what follows
                    self._save(number, arrays, due=True)
                self._keep_best(number, arrays, evaluate(self, arrays, number, "val"))
            self._save(number, arrays)
        self.buffered.forget()
        return arrays

    def _save(self, number: int, arrays: Arrays, due: bool = False) -> None:
        """Write the state after a round; ``due``: it has still to be evaluated."""
        central = [self.central.bound, self.central.rounds] if self.central is not None else []
        more = {"class_weights": self.class_weights, "central": central, "asked": dict(self.asked), "due": due}
        state = State(number, arrays, self.best, more, self.algorithm.held | self.line.held())
        self.checkpoint.save(state, self._facts(number))

    def _keep_best(self, number: int, arrays: Arrays, metrics: dict[str, Estimate]) -> None:
        """Strictly better by the job's metric, in its direction, replaces the best; the earlier of equals stays."""
        metric = self.job.best_metric
        value = metrics.get(metric, NOTHING).value
        if not better(value, self.best.value, TASKS[self.job.task].metrics[metric]):
            return
        self.best = Best(number, value, arrays)
        self.checkpoint.keep_best(self.best, self._facts(number))

    def _facts(self, number: int) -> dict[str, str]:
        facts = {"job": self.job.sha256, "round": str(number), "version": __version__, "model": self.job.model.name}
        return facts | ({"frozen": self.frozen} if self.frozen else {})

    def _finish(self, last: Arrays, seconds: float) -> dict[str, Any]:
        job = self.job
        if not self.best.round:
            self.store.add("warning", text=f"no validation figure of {job.best_metric}: the last round is kept")
            self.best = Best(job.federation.rounds, math.nan, last)
            self.checkpoint.keep_best(self.best, self._facts(job.federation.rounds))
        keep(self)
        if self.jury is not None:
            self.grid, self.places = self.jury.grid, self.jury.places
        evaluate(self, self.best.arrays, self.best.round, "test")
        if keeps_own(job) and self.jury is None:
            evaluate_personal(self, self.best.arrays, self.best.round)
        if not any(place.images["test"] for place in self.places):
            self.store.add("warning", text="no test image at any site: no test figure can be given")
        elif job.evaluation.subgroups and self.jury is None and not self.is_reference:
            evaluate_subgroups(self, self.best.arrays, self.best.round)
        return {
            "best_round": self.best.round,
            "seconds": round(seconds, 1),
            "sites": [place.name for place in self.places],
        }

    def _model_of(self, arrays: Arrays) -> nn.Module:
        """The server's own network with these weights, on its device."""
        put(self.model, arrays, self.job)
        if self.reference:
            self.model.get_submodule(REFERENCE).load_state_dict(self.reference)
        model: nn.Module = self.model.to(self.device)
        return model

    def _exchange(
        self, kind: str, content: Content, places: Iterable[Place], round_: int
    ) -> Iterator[tuple[Place, Message | None]]:
        return self.line.exchange(self.grid, kind, content, places, round_)

    def _config(self, round_: int, **more: Any) -> ConfigRecord:
        return ConfigRecord({"round": round_, **more} | ({"reference": True} if self.is_reference else {}))

    def survey(self, fresh: bool = True, round_: int = 0) -> None:
        """Ask every node who it is; fill ``places``, sorted by name.

        ``fresh``: sites forget what an earlier attempt left of rounds after ``round_``.

        Raises:
            RunFailed: two sites with one name, differing frozen weights, or fewer sites than the quorum.
        """
        dropped = self._ask(sorted(self.grid.get_node_ids()), fresh, round_)
        self._require(len(self.places), dropped, "before the first round")

    def _admit_newcomers(self, number: int) -> None:
        """Ask those who were not there before, or did not answer, who they are: from now on they take part."""
        if nodes := sorted(set(self.grid.get_node_ids()) - self.heard):
            self._ask(nodes, True, number - 1)

    def _ask(self, nodes: list[int], fresh: bool, round_: int) -> list[dict[str, str]]:
        """Survey ``nodes``; gives those that were not admitted, with the reason."""
        content = RecordDict({"config": self._config(round_, fresh=fresh)})
        known = {node.node_id: node.name for node in self.grid.get_nodes()}
        asked = [Place(node, known.get(node, ""), {}, [], 0) for node in nodes]
        answers = self._exchange(MessageType.QUERY, content, asked, round_)
        found, dropped, heard = call(answers, self.job, self.frozen, self.counted)
        self.heard |= heard
        self.places = joined(self.places, found, known, set(self.grid.get_node_ids()))
        names = [place.name for place in self.places]
        if found or not self.called.issuperset(nodes):  # who failed before and fails again is no news
            self.store.add("survey", sites=[vars(place) for place in self.places], dropped=dropped)
        self.called.update(nodes)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise RunFailed(f"two sites call themselves {twice!r}; give each site.toml a name of its own")
        return dropped

    def _require(self, admitted: int, dropped: list[dict[str, str]], when: str, secure: int = 0) -> None:
        if lack := shortfall(admitted, dropped, self.job, secure):
            raise RunFailed(f"{when}, {lack}")

    def sample(self, number: int) -> list[Place]:
        """The sites of a round, see ``server.sampling``."""
        return sample(self.places, self.job, number, self.asked)

    def train_round(self, arrays: Arrays, number: int, class_weights: list[float]) -> Arrays:
        """Send ``arrays`` out, aggregate the replies that are in order, return the new global arrays.

        Raises:
            RunFailed: fewer replies than the quorum were in order.
        """
        started = time.monotonic()
        self.line.took.clear()
        trained: list[dict[str, Any]] = []
        dropped: list[dict[str, str]] = []
        places = self.buffered.idle(self.sample(number))
        self.asked.update(place.name for place in places)
        self.algorithm.everyone = weight_of_all(self.places, self.job)
        # best: the round of which a site must not forget what is its own
        config = self._config(number, best=self.best.round, **{"class-weights": list(map(float, class_weights))})
        if self.job.privacy.dp == "distributed":  # one divisor at all sites, so that each one's noise weighs the same
            config["examples"] = sum(place.images["train"] for place in self.places) / len(self.places)
        if self.job.privacy.secure_aggregation:
            return self._secure_round(places, arrays, config, started)

        def accepted(place: Place, reply: Message | None, sent: Arrays, beside: Records, **facts: int) -> Update | None:
            try:
                update = admit(reply, sent, self.job, place.images["train"], beside)
            except Dropped as reason:
                dropped.append({"site": place.name, "reason": str(reason)})
                return None
            trained.append({"site": place.name, **update.told(self.parts), **facts})
            return update

        def admitted(places: list[Place], sent: Arrays) -> Iterator[tuple[float, Arrays]]:
            content = RecordDict({"arrays": ArrayRecord(sent), "config": config})
            beside = self.algorithm.outgoing(sent)
            for name, record in beside.items():
                content[name] = ArrayRecord(record)
            own = with_own_rounds(self.line.addressed(content, sent, number - 1), self.algorithm.correction)
            for place, reply in self._exchange(MessageType.TRAIN, own, places, number):
                if update := accepted(place, reply, sent, beside):
                    yield self.algorithm.take(update, place.name, number, sent)
                del update, reply  # the next one needs the room

        def as_they_come() -> Iterator[tuple[float, Arrays]]:
            content = RecordDict({"arrays": ArrayRecord(arrays), "config": config})
            for asked, reply in self.buffered.replies(places, content, arrays, number):
                behind = number - asked.number
                if update := accepted(asked.place, reply, asked.arrays, {}, behind=behind):
                    weight, own = self.algorithm.take(update, asked.place.name, number, asked.arrays)
                    share = (1.0 + behind) ** -self.job.federation.staleness
                    yield weight, rebased(own, asked.arrays, arrays, share, self.algorithm.trained)
                    if len(trained) == self.job.federation.buffer:
                        return

        noised = {}
        try:
            if self.central is not None:
                merged = self.central.merge(admitted(places, arrays), arrays, len(places))
                merged = self.algorithm.step(arrays, merged, number)
                noised = {"central": self.central.facts()}
            elif self.job.federation.order == "cyclic":
                merged = self.algorithm.step(arrays, pass_on(admitted, places, arrays, number), number)
            elif self.job.federation.order == "buffered":
                merged = self.algorithm.merge(as_they_come(), arrays, number)
            else:
                merged = self.algorithm.merge(admitted(places, arrays), arrays, number)
        except TooFew:
            merged = arrays
        seconds = round(time.monotonic() - started, 3)
        facts = {"trained": self._timed(trained), "dropped": dropped, "seconds": seconds, "bytes": self.line.weighed()}
        self.store.add("round", round=number, **facts, **noised)
        self._require(len(trained), dropped, f"in round {number}")
        return self.line.step(arrays, merged, number)

    def _secure_round(self, places: list[Place], arrays: Arrays, config: ConfigRecord, started: float) -> Arrays:
        """The same round with the sites' models under masks, of which only the sum is seen."""
        number = int(config["round"])  # type: ignore[arg-type]
        secure = SecureRound(self._exchange, places, arrays, config, self.job, self.parts)
        merged, seconds = secure.run(), round(time.monotonic() - started, 3)
        facts = {"trained": self._timed(secure.trained), "dropped": secure.dropped, "secure": secure.facts}
        self.store.add("round", round=number, **facts, seconds=seconds, bytes=self.line.weighed())
        lost = [*secure.dropped, *secure.facts["silent"]]
        self._require(secure.left, lost, f"in round {number}", secure.needed)
        return self.algorithm.step(arrays, merged, number)

    def _timed(self, trained: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of a round with the seconds from the question to each site's reply."""
        return [row | {"seconds": round(self.line.took[row["site"]], 3)} for row in trained]


def train_reference(grid: Grid, job: Job, folder: Path, store: str | None = "") -> Arrays:
    """Train the network the job's task measures by at the same sites; the run lies in ``folder``/reference.

    Raises:
        RunFailed: as ``Run.run``.
    """
    own = folder / REFERENCE
    if not any(event["event"] == "finish" for event in read_events(own)):
        run = Run(grid, load_task(job.task).reference(job), own, resume=True, store=store)
        run.is_reference = True
        run.run()
    return dict(load_file(own / "model.safetensors"))
