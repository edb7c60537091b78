"""A site's part in the client corrections: what of it is kept, and what is sent beside the model.

A site's control variate must be the one that the server has counted in. Whether a reply arrived the site cannot know:
so the server says with each message which was the last round it heard this site in, and the site goes on from there.
"""

from __future__ import annotations

from flwr.app import Message
from torch import Tensor, nn

from client.memory import Memory
from shared.adversary import Adversary
from shared.config import Job
from shared.corrections import Correction
from shared.weights import exchanged_names, trained_names

Arrays = dict[str, Tensor]


class SiteCorrection:
    """The correction of one site in one round; ``term`` goes into the training loop, None where the job has none."""

    def __init__(self, model: nn.Module, job: Job, message: Message, memory: Memory, site: str) -> None:
        """``model`` holds the weights it was sent."""
        self.job, self.kind = job, job.federation.correction
        self.heard = int(message.content["config"].get("heard", 0))  # type: ignore[arg-type]
        self.own: Arrays = {}
        self.term: Correction | None = None
        if self.kind == "adversarial":
            self.term = Adversary(model, job, site)
        if self.kind not in ("proximal", "scaffold", "feddyn"):
            return
        state, trained = model.state_dict(), trained_names(model, job)
        start = {name: state[name].detach().clone() for name in trained}
        if self.kind == "proximal":
            self.term = Correction(model, start, pull=job.federation.proximal_mu)
            return
        known = memory.load("control", self.heard + 1) if self.heard else None
        known = known or {name: value.new_zeros(value.shape, device="cpu") for name, value in start.items()}
        self.own = {name: known[name] for name in trained}  # in the order in which it is sent; a file has none
        minus = {name: -value for name, value in self.own.items()}
        if self.kind == "feddyn":
            self.term = Correction(model, start, job.federation.feddyn_alpha, minus)
            return
        common = message.content.array_records["control"].to_torch_state_dict()
        self.term = Correction(model, start, 0.0, {name: common[name] + minus[name] for name in trained}, gather=True)

    def after(self) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
        """What to keep and what to send, by kind, once the model was trained."""
        if self.kind == "scaffold" and self.term is not None:
            now = self.term.mean_gradients()
            change = {name: now[name] - value for name, value in self.own.items()}
            return {"control": now}, {"control": change}
        if self.kind == "feddyn" and self.term is not None:
            moved, alpha = self.term.changes(), self.job.federation.feddyn_alpha
            return {"control": {name: value - alpha * moved[name] for name, value in self.own.items()}}, {}
        return {}, {}


def pulled_to(model: nn.Module, job: Job, common: Arrays) -> Correction:
    """The pull of a personal model to the common one: Ditto (Li et al. 2021, algorithm 1)."""
    names = exchanged_names(model, job)
    return Correction(model, {name: common[name] for name in names}, pull=job.federation.ditto_lambda)
