"""What an audit found, for people: a table on the screen, a page, a picture; figures for the model's card."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from client.membership import RATE
from consilium.audit import Audit
from consilium.predict import filled_whole
from server.store import write_json
from server.wording import number, with_interval
from shared import __version__
from shared.errors import UserError
from shared.files import write_text
from shared.intervals import Estimate
from shared.sitefile import OWN_FOLDER

MARK = "audit.json"
PAGE = "audit-stays-at-site.html"
PICTURE = "patient-image-stays-at-site.png"
STAYS = "Stays at the site: this shows a patient's image."
RATE_NAME = f"TPR at {RATE:.0%} FPR".replace("%", " %")
_SIDE, _MARGIN, _LINE = 160, 12, 16

Table = tuple[str, list[str], list[list[str]]]  # title, names of the columns, rows


def tables(audit: Audit) -> list[Table]:
    """The figures as text, an interval behind each."""
    rows = [
        [row.attack, row.model, f"{row.members:,} / {row.others:,}", _words(row.found.auc), _words(row.found.tpr)]
        for row in audit.membership
    ]
    columns = ["attack", "model", "in / out", "AUC", RATE_NAME]
    found = [("Was an image trained on? (guessing: AUC .500)", columns, rows)]
    if audit.rebuilt:
        lines = [
            [f"{item.update}{' *' if item.sent else ''}", f"{item.psnr:.1f}", number(item.correlation)]
            for item in audit.rebuilt
        ]
        title = "One image rebuilt from its update (* what this job sends)"
        found.append((title, ["from the update", "PSNR (dB)", "correlation"], lines))
    return found


def remarks(audit: Audit) -> list[str]:
    """What must be known to read the tables."""
    job = audit.job
    private = job.privacy.dp != "none"
    dp = f"privacy.dp = {job.privacy.dp}" + (f", noise {audit.noise:.3g}" if audit.noise else "")
    lines = ["in / out: images the model was trained on, and not; 95 % intervals in brackets"]
    lines += [f"job {job.name}, site {audit.site}; " + (dp if private else "no differential privacy in this job")]
    if audit.shadows:
        lines.append(
            f"local models: not the run's; {audit.shadows + 1} trained here, each on a random half of this site's "
            f"training images, {audit.steps} gradient steps; each is attacked in turn by means of the others, and the "
            "figures with their 95 % bounds are the mean"
        )
    return lines + audit.notes


def _words(estimate: Estimate) -> str:
    return with_interval(estimate.value, estimate.low, estimate.high)


def print_audit(audit: Audit) -> None:
    """Print tables and remarks."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Shown

    console = Console()
    for title, columns, rows in tables(audit):
        shown = Shown(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(columns):
            shown.add_column(escape(name), justify="left" if place == 0 or name == "model" else "right")
        for row in rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for line in remarks(audit):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def default_folder(run: Path, site_file: Path) -> Path:
    """Where an audit lies unless one says otherwise: in the site's own folder."""
    return site_file.parent / OWN_FOLDER / "audit" / run.resolve().name


def write_audit(audit: Audit, out: Path) -> list[Path]:
    """Write the audit to ``out``, a page FILE.html with the picture in it, or a folder; gives what was written.

    Raises:
        UserError: it cannot be written there.
    """
    if out.suffix.lower() == ".html":
        try:
            write_text(out, page(audit))
        except OSError as error:
            raise UserError(f"--out {out}: cannot write there: {error.strerror}") from None
        return [out]
    with filled_whole(out, MARK, "an audit") as work:
        write_text(work / PAGE, page(audit))
        if audit.original is not None:
            (work / PICTURE).write_bytes(_png(audit))
        write_json(work / MARK, facts(audit))
    return [out / name for name in (PAGE, PICTURE, MARK) if (out / name).is_file()]


def write_for_card(audit: Audit, run: Path) -> Path | None:
    """Write the figures, no picture, to ``run``/audit-SITE.json if the site's policy allows; gives the file, or None.

    A site whose number of images may not leave gives neither counts nor intervals, and figures of two digits: else
    each would tell it.

    Raises:
        UserError: it cannot be written there.
    """
    if not audit.policy.audit_in_model_card:
        return None
    file = run / f"audit-{audit.site}.json"  # several sites may have audited the run
    try:
        write_json(file, facts(audit, counts=audit.policy.exact_counts))
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    return file


def facts(audit: Audit, counts: bool = True) -> dict[str, Any]:
    """All figures, by name; no picture, no name of a file."""

    def plain(estimate: Estimate) -> dict[str, float]:
        if not counts:
            return {"value": round(estimate.value, 2)}
        return {"value": estimate.value, "low": estimate.low, "high": estimate.high}

    attacks = [
        {"attack": row.attack, "model": row.model}
        | ({"members": row.members, "others": row.others} if counts else {})
        | {"auc": plain(row.found.auc), "tpr_at_1_percent_fpr": plain(row.found.tpr)}
        for row in audit.membership
    ]
    rebuilt = [
        {"update": item.update, "noise": item.noise, "sent": item.sent}
        | {"psnr": round(item.psnr, 2), "correlation": round(item.correlation, 3)}
        for item in audit.rebuilt
    ]
    return {
        "version": __version__,
        "site": audit.site,
        "job_sha256": audit.job.sha256,
        "round": audit.round,
        "dp": audit.job.privacy.dp,
        "noise": audit.noise,
        "shadows": audit.shadows,
        "shadow_steps": audit.steps,
        "membership": attacks,
        "inversion": rebuilt,
    }


# --- the page and the picture -----------------------------------------------------------------------------------------


def page(audit: Audit) -> str:
    """One HTML page that needs nothing else."""
    from server.report_style import STYLE

    shown = audit.original is not None
    parts = [f'<ul class="warnings"><li>{html.escape(STAYS if shown else "Stays at the site.")}</li></ul>']
    parts += [_html_table(*table) for table in tables(audit)]
    if shown:
        coded = base64.b64encode(_png(audit)).decode()
        parts.append(f'<img alt="The image and what was rebuilt of it" src="data:image/png;base64,{coded}">')
    parts += [f'<p class="note">{html.escape(line)}</p>' for line in remarks(audit)]
    title = html.escape(f"Privacy audit of {audit.job.name} at {audit.site}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{title}</title><style>{STYLE} main img {{ max-width: 100%; }}</style></head>\n"
        f"<body><main><h1>{title}</h1>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _html_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{html.escape(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _png(audit: Audit) -> bytes:
    file = io.BytesIO()
    picture(audit).save(file, "PNG")
    return file.getvalue()


def picture(audit: Audit) -> Image.Image:
    """The original and what was rebuilt of it, in a row, each with words below."""
    assert audit.original is not None
    shown = [(audit.original, "original", "")]
    for item in audit.rebuilt:
        mean = item.update.startswith("none")
        shown.append(
            (item.picture, "mean image" if mean else item.update, f"{item.psnr:.1f} dB, r {item.correlation:.2f}")
        )
    sheet = Image.new("RGB", (len(shown) * (_SIDE + _MARGIN) + _MARGIN, _SIDE + 3 * _LINE + 3 * _MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (values, name, figures) in enumerate(shown):
        left = _MARGIN + place * (_SIDE + _MARGIN)
        sheet.paste(_drawn(values), (left, _MARGIN))
        pen.text((left, _SIDE + _MARGIN + 4), name, "black", font)
        pen.text((left, _SIDE + _MARGIN + 4 + _LINE), figures, "black", font)
    pen.text((_MARGIN, _SIDE + 2 * _MARGIN + 2 * _LINE), STAYS, "black", font)
    return sheet


def _drawn(values: np.ndarray) -> Image.Image:
    pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    return image.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
