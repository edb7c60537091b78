"""Which federated strategies there are, and of which choices they are made."""

from __future__ import annotations

from collections.abc import Iterator

from shared.config import knobs, toml_scalar
from shared.settings_federation import Federation
from shared.strategies import AGGREGATORS, CODEC_NAMES, CORRECTIONS, LOCAL, SERVER_OPTIMIZERS, STRATEGIES
from shared.terminal import wrapped

_CHOSEN = {"federation.correction": CORRECTIONS, "federation.local": LOCAL, "federation.codec": CODEC_NAMES}


def lines() -> Iterator[str]:
    """The lists as a person reads them."""
    asked = Federation()
    yield from wrapped("federation.strategy: a name for these settings; what the job sets itself wins", "    ")
    for name, settings in STRATEGIES.items():
        chosen = ", ".join(f"{key} = {toml_scalar(value)}" for key, value in settings.items())
        yield from _item(name, chosen or "the defaults")
    yield ""
    yield from wrapped(
        f"federation.aggregator: how replies become one model; replies needed at federation.byzantine = "
        f"{asked.byzantine} and federation.trim = {asked.trim:g}",
        "    ",
    )
    for name, facts in AGGREGATORS.items():
        least = facts.least(asked.byzantine, asked.trim)
        masked = "; also under privacy.secure_aggregation" if facts.summed else ""
        yield from _item(name, f"{facts.help} ({least} or more{masked})")
    yield ""
    yield from wrapped(
        "federation.server_optimizer: what steps on the averaged change, and its learning rate where the job's is 0",
        "    ",
    )
    for name, (rate, help_) in SERVER_OPTIMIZERS.items():
        yield from _item(name, help_ + ("" if name == "none" else f" ({rate:g})"))
    yield ""
    for key, choices in _CHOSEN.items():
        yield from wrapped(f"{key}: {knobs()[key].metadata['help'].partition(';')[0]}", "    ")
        for name, help_ in choices.items():
            yield from _item(name, help_)
        yield ""
    yield from wrapped(
        "`consilium job --keys` explains every setting; docs/strategies.md and personalisation.md say which when.", ""
    )


def _item(name: str, text: str) -> list[str]:
    return wrapped(f"    {name:17} {text}", " " * 22)
