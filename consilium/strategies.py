"""Which federated strategies there are, and of which choices they are made."""

from __future__ import annotations

from collections.abc import Iterator

from shared.config import knobs, toml_scalar
from shared.settings import Federation
from shared.strategies import AGGREGATORS, CODEC_NAMES, CORRECTIONS, LOCAL, SERVER_OPTIMIZERS, STRATEGIES

_CHOSEN = {"federation.correction": CORRECTIONS, "federation.local": LOCAL, "federation.codec": CODEC_NAMES}


def lines() -> Iterator[str]:
    """The lists as a person reads them."""
    asked = Federation()
    yield "federation.strategy: a name for these settings; what the job sets itself wins"
    for name, settings in STRATEGIES.items():
        chosen = ", ".join(f"{key} = {toml_scalar(value)}" for key, value in settings.items())
        yield f"    {name:17} {chosen or 'the defaults'}"
    yield ""
    yield (
        f"federation.aggregator: how replies become one model; replies needed at federation.byzantine = "
        f"{asked.byzantine} and federation.trim = {asked.trim:g}"
    )
    for name, facts in AGGREGATORS.items():
        least = facts.least(asked.byzantine, asked.trim)
        masked = "; also under privacy.secure_aggregation" if facts.summed else ""
        yield f"    {name:17} {facts.help} ({least} or more{masked})"
    yield ""
    yield "federation.server_optimizer: what steps on the averaged change, and its learning rate where the job's is 0"
    for name, (rate, help_) in SERVER_OPTIMIZERS.items():
        yield f"    {name:17} {help_}" + ("" if name == "none" else f" ({rate:g})")
    yield ""
    for key, choices in _CHOSEN.items():
        yield f"{key}: {knobs()[key].metadata['help'].partition(';')[0]}"
        for name, help_ in choices.items():
            yield f"    {name:17} {help_}"
        yield ""
    yield "`consilium job --keys` explains every setting; docs/strategies.md and personalisation.md say which when."
