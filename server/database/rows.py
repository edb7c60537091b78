"""An event as rows of the tables, and the rows as the event again: nothing is lost on the way, to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
Event = dict[str, Any]
# Of a site's row in a round. What a reply always tells may be None (NaN in the loop); the others are then left out.
_ALWAYS = ("weight", "steps", "images", "loss")
_TOLD = (*_ALWAYS, "epsilon", "seconds")


def site_rows(event: Event) -> list[Row]:
    """Takes ``trained``, ``dropped`` and ``bytes`` out of a round's event, as rows of ``site_round``."""
    found: list[Row] = []
    given_bytes = event.pop("bytes", None)
    moved = dict(given_bytes or {})
    for reason, rows in ((False, event.pop("trained", [])), (True, event.pop("dropped", []))):
        for given in rows:
            rest = dict(given)
            row: Row = {"position": len(found), "site": rest.pop("site"), "reason": rest.pop("reason", None)}
            row |= {name: _take(rest, name, name in _ALWAYS and not reason) for name in _TOLD}
            row["down"], row["up"] = moved.pop(row["site"], (None, None))
            found.append(row | {"more": rest or None})
    if moved or given_bytes == {}:
        event["bytes"] = moved  # of sites that are in neither list
    return found


def round_row(event: Event, rows: Iterable[Mapping[str, Any]]) -> Row:
    """The totals of a round. Under secure aggregation images and loss are known of all sites together only."""
    rows = list(rows)
    told = [event["secure"]] if "secure" in event else [row for row in rows if row["reason"] is None]
    pairs = [(row.get("loss"), row.get("images") or 0) for row in told]
    others = event.get("bytes", {}).values()  # of sites that did not train, but were sent something
    counted = [(loss, images) for loss, images in pairs if loss is not None and images]
    return {
        "seconds": event.pop("seconds", None),
        "trained": sum(row["reason"] is None for row in rows),
        "dropped": sum(row["reason"] is not None for row in rows),
        "images": sum(images for _, images in pairs),
        "loss": sum(loss for loss, _ in counted) / sum(n for _, n in counted) if counted else None,
        "down": _total([*(row["down"] for row in rows), *(down for down, _ in others)]),
        "up": _total([*(row["up"] for row in rows), *(up for _, up in others)]),
    }


def joined_round(event: Event, seconds: float | None, rows: Iterable[Mapping[str, Any]]) -> Event:
    """The event of a round from its rows, which it is given in order."""
    rest = event.pop("bytes", None)
    trained, dropped, moved = [], [], dict(rest or {})
    for row in rows:
        always = _ALWAYS if row["reason"] is None else ()
        given = {"site": row["site"]} | {n: row[n] for n in _TOLD if n in always or row[n] is not None}
        given |= row["more"] or {}
        if row["down"] is not None:
            moved[row["site"]] = [row["down"], row["up"]]
        if row["reason"] is None:
            trained.append(given)
        else:
            dropped.append(given | {"reason": row["reason"]})
    event |= {"trained": trained, "dropped": dropped} | ({} if seconds is None else {"seconds": seconds})
    return event | ({"bytes": moved} if moved or rest == {} else {})


def evaluation_rows(event: Event) -> tuple[list[Row], list[Row]]:
    """Takes places, their metrics and sums out of an evaluation's event: rows of ``evaluation`` and of ``metric``."""
    places: list[Row] = []
    metrics: list[Row] = []

    def add(place: str, site: str, images: int | None, found: Mapping[str, Any], **more: Any) -> None:
        position = len(places)
        row = {"position": position, "place": place, "site": site, "images": images, "reason": None, "sums": None}
        places.append(row | more)
        for rank, (name, figure) in enumerate(found.items()):
            metrics.append({"position": position, "rank": rank, "name": name, **_figure(figure)})

    counts, given = event.pop("site_images", {}), event.pop("sums", None)
    sums = dict(given or {})
    add("all", "", event.pop("images", None), event.pop("metrics", {}))
    for name, found in event.pop("sites", {}).items():
        add("site", name, counts.get(name), found, sums=sums.pop(name, None))
    if sums or given == {}:
        event["sums"] = sums  # of nobody
    if "server" in event:
        add("server", "", event.pop("server_images", None), event.pop("server"))
    for item in event.pop("dropped", []):
        add("dropped", item["site"], None, {}, reason=item["reason"])
    return places, metrics


def joined_evaluation(event: Event, places: Iterable[Mapping[str, Any]], figures: Mapping[int, Row]) -> Event:
    """The event of an evaluation from its rows; ``figures`` are the metrics of each position by name."""
    event |= {"metrics": {}, "images": None, "sites": {}, "site_images": {}, "dropped": []}
    sums: Row = {}
    for row in places:
        found = figures.get(row["position"], {})
        if row["place"] == "all":
            event["metrics"], event["images"] = found, row["images"]
        elif row["place"] == "site":
            event["sites"][row["site"]], event["site_images"][row["site"]] = found, row["images"]
            if row["sums"] is not None:
                sums[row["site"]] = row["sums"]
        elif row["place"] == "server":
            event["server"], event["server_images"] = found, row["images"]
        else:
            event["dropped"].append({"site": row["site"], "reason": row["reason"]})
    return event | ({"sums": sums | event.get("sums", {})} if sums or "sums" in event else {})


def surveyed_rows(event: Event) -> list[Row]:
    """Rows of ``site`` of a survey: who takes part, and who was refused. The event keeps them too."""
    found: dict[str, Row] = {}
    for item in event.get("dropped", []):
        row: Row = dict.fromkeys(("node", "train", "val", "test", "classes", "skipped"))
        found[item["site"]] = row | {"name": item["site"], "reason": item["reason"], "surveyed": event["time"]}
    for place in event.get("sites", []):
        images = place.get("images", {})
        found[place["name"]] = {
            "name": place["name"],
            "node": str(place.get("node", "")),
            **{split: images.get(split) for split in ("train", "val", "test")},
            "classes": place.get("classes"),
            "skipped": place.get("skipped"),
            "reason": None,
            "surveyed": event["time"],
        }
    return list(found.values())


def _take(row: Row, name: str, always: bool) -> Any:
    """A value out of ``row``; None that would not be told from one left out stays in it."""
    if always:
        return row.pop(name, None)
    return row.pop(name) if row.get(name) is not None else None


def _figure(figure: Mapping[str, Any]) -> Row:
    return {name: figure.get(name) for name in ("value", "low", "high", "n")}


def _total(values: Iterable[int | None]) -> int | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None
