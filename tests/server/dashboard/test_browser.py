"""The pages in Chromium, served by the real command: each page, by keyboard, live, light and dark, and on a phone."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from playwright.sync_api import Browser, Page, expect, sync_playwright

from client.app import app as real
from server.operating import FIGURES
from server.provision import provision
from server.rounds import Run
from server.wording import number
from shared.config import job_from_flat
from simulations.engine import LocalGrid
from simulations.pool import WorkerPool

from .conftest import make_job, make_sites

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
SELDOM = [("dark", 1200), ("light", 360)]


class Served:
    """`consilium dashboard` as it is typed, on a port that is free."""

    def __init__(self, store: Path, *more: str) -> None:
        command = [sys.executable, "-m", "consilium", "dashboard", "--store", str(store), "--port", "0", *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+)(/\?token=[\w-]{43})\n", line)
        assert found, line
        self.address, self.first = found.group(1), found.group(1) + found.group(2)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(15)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture(scope="module")
def served(store: Path, registry: Path) -> Iterator[Served]:
    found = Served(store, "--registry", str(registry))
    yield found
    found.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Open:
    """A page whose complaints, and whose requests to elsewhere, are kept."""

    def __init__(self, browser: Browser, served: Served, **look: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | look))
        self.page: Page = self.context.new_page()
        self.address, self.said, self.elsewhere = served.address, list[str](), list[str]()
        self.page.on("console", lambda m: self.said.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith(served.address) else self.elsewhere.append(r.url))
        self.page.goto(served.first)
        assert "token" not in self.page.url
        self.page.wait_for_selector("#live.on")

    def go(self, path: str) -> Page:
        self.page.goto(self.address + path)
        self.page.wait_for_selector("#live.on")
        return self.page

    def faultless(self) -> None:
        assert self.said == []
        assert self.elsewhere == []


@pytest.fixture
def opened(browser: Browser, served: Served) -> Iterator[Open]:
    found = Open(browser, served)
    yield found
    found.context.close()


def runs_of(opened: Open) -> dict[str, str]:
    """The runs' ids by their folder, taken from the page."""
    opened.go("/")
    opened.page.wait_for_selector(".runs tbody tr")
    rows = opened.page.locator(".runs tbody tr")
    links = [rows.nth(i).locator("th a").get_attribute("href") or "" for i in range(rows.count())]
    return {rows.nth(i).locator(".path").inner_text(): link.rsplit("/", 1)[1] for i, link in enumerate(links)}


expect.set_options(timeout=60_000)  # the machine may be busy with other tests


def drawn(page: Page, count: int = 1) -> None:
    """Wait for Plotly's figures."""
    expect(page.locator(".chart .main-svg").first).to_be_visible()
    expect(page.locator(".chart.js-plotly-plot")).to_have_count(count)


def test_the_run_shows_the_numbers_of_result_json(opened: Open, runs_folder: Path) -> None:
    import json

    from server.wording import with_interval

    ids = runs_of(opened)
    page = opened.go(f"/runs/{ids['first']}")
    drawn(page, 3)
    result = json.loads((runs_folder / "first" / "result.json").read_text())["federated"]
    table = page.locator("section[aria-labelledby=tested] table").first
    metrics = [name for name in result["n"] if ":" not in name]
    for name, scores in {"all sites": result, **result["sites"]}.items():
        cells = table.locator(f"tr:has(th:text-is('{name}')) td").all_inner_texts()
        told = [with_interval(scores[metric], *scores["intervals"][metric], metric) for metric in metrics]
        assert cells == [*told, str(scores["images"])]
    expect(page.locator("section[aria-labelledby=warnings] .good")).to_contain_text("every reply of every site")
    expect(page.locator(".multiples li")).to_have_count(3)
    expect(page.locator(".grid td.used")).to_have_count(12)
    expect(page.locator("section[aria-labelledby=tested] table").nth(1).locator("tbody tr")).to_have_count(5)
    point = result["operating_point"]["classes"]["right"]["test"]
    shown = page.locator("section[aria-labelledby=tested] table").nth(2).locator("tbody tr td").all_inner_texts()
    assert shown[1:] == [with_interval(row["value"], row["low"], row["high"]) for row in map(point.get, FIGURES)]
    told = page.locator("#groups tbody tr")
    group = result["subgroups"]["groups"]["sex=other"]
    expect(told).to_have_count(1)
    cells = told.locator("td").all_inner_texts()
    assert cells[0] == with_interval(group["auroc"], *group["intervals"]["auroc"])
    assert cells[-2:] == [str(group["images"]), str(len(group["told_by"]))]
    page.locator("#matrix summary").click()
    expect(page.locator("#matrix tbody tr")).to_have_count(4)
    opened.faultless()


def test_the_pages_by_keyboard_alone(opened: Open) -> None:
    page = opened.page
    page.wait_for_selector(".runs tbody tr")

    def tab_to(selector: str, most: int = 40) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"Tab never reaches {selector}")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab_to("button[data-key=sort-name]")
    page.keyboard.press("Enter")
    expect(page.locator("th[aria-sort=descending]")).to_have_text("Run")
    assert page.evaluate("document.activeElement.dataset.key") == "sort-name"
    names = page.locator(".runs tbody th .path")
    expect(names.first).to_have_text("first")  # of the job's names, tiny and private
    tab_to("input[type=checkbox]")
    page.keyboard.press("Space")
    checked = page.locator("input[type=checkbox]:checked")
    expect(checked).to_have_count(1)
    tab_to("input[type=checkbox]:not(:checked)")  # wherever a table that was drawn anew has left the focus
    page.keyboard.press("Space")
    expect(checked).to_have_count(2)
    drawn(page)
    expect(page.get_by_role("heading", name="Comparison")).to_be_visible()
    page.locator("body").press("Home")
    page.locator(".runs tbody th a").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".grid td")
    page.locator(".grid td[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".detail")).to_contain_text("north, round 2: trained")
    page.keyboard.press("End")
    expect(page.locator(".detail")).to_contain_text("north, round 4: trained")
    opened.faultless()


def test_runs_are_filtered_and_compared(opened: Open) -> None:
    page = opened.page
    page.get_by_label("Name or folder contains").fill("priv")
    expect(page.locator(".runs tbody tr")).to_have_count(1)
    page.get_by_label("Name or folder contains").fill("")
    expect(page.locator(".runs tbody tr")).to_have_count(2)
    for box in page.get_by_role("checkbox").all():
        box.check()
    drawn(page)
    page.get_by_label("Metric").select_option(label="Accuracy")
    expect(page.locator(".chart .ytitle")).to_have_text("Accuracy")
    assert "compare=" in page.url
    page.reload()
    drawn(page)
    opened.faultless()


def test_a_model_is_downloaded_whole(opened: Open, runs_folder: Path) -> None:
    page = opened.go(f"/runs/{runs_of(opened)['first']}/model")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download model.safetensors").click()
    assert Path(download.value.path()).read_bytes() == (runs_folder / "first" / "model.safetensors").read_bytes()
    expect(page.locator(".modelcard h1")).to_have_text("Card of tiny")
    expect(page.locator(".modelcard")).to_contain_text("<script>alert(1)</script>")
    opened.faultless()


def test_a_model_stands_against_the_release_before_it(opened: Open, runs_folder: Path) -> None:
    results = [json.loads((runs_folder / name / "result.json").read_text()) for name in ("first", "second")]
    new, old = (result["federated"] for result in results)
    ids = runs_of(opened)
    page = opened.go(f"/runs/{ids['first']}/model")
    table = page.get_by_role("table", name="Both on the same sites’ test sums")
    expect(table).to_be_visible()
    lines = table.locator("tbody tr").all()
    rows = {line.locator("th").inner_text(): line.locator("td").all_inner_texts() for line in lines}
    for name, metric in {"AUROC": "auroc", "Balanced accuracy": "balanced_accuracy"}.items():
        release, this, difference, words = rows[name]
        assert release.startswith(number(old[metric]))
        assert this.startswith(number(new[metric]))
        assert difference.startswith(number(new[metric] - old[metric]))
        assert words in ("this model is better", "this model is worse", "no clear difference")
    expect(page.get_by_role("heading", name="Against release tiny 1.0")).to_be_visible()
    page = opened.go(f"/runs/{ids['second']}/model")  # which is the only release
    expect(page.locator(".modelcard")).to_be_visible()
    expect(page.get_by_role("heading", name="Against release")).to_have_count(0)
    opened.faultless()


@pytest.mark.parametrize(
    ("scheme", "width"),
    [("light", 1200), ("dark", 360), *(pytest.param(*look, marks=pytest.mark.slow) for look in SELDOM)],
)
def test_every_page_is_accessible_and_fits(
    browser: Browser, served: Served, tmp_path: Path, scheme: Any, width: int
) -> None:
    opened = Open(browser, served, color_scheme=scheme, viewport={"width": width, "height": 800})
    ids = runs_of(opened)
    paths = {"runs": "/", "compared": f"/?compare={ids['first']},{ids['second']}", "run": f"/runs/{ids['second']}"}
    paths |= {"model": f"/runs/{ids['first']}/model", "federation": "/federation", "fair": f"/runs/{ids['first']}"}
    for name, path in paths.items():
        page = opened.go(path)
        expect(
            page.locator({"runs": ".runs", "model": ".modelcard", "federation": ".card"}.get(name, ".main-svg")).first
        ).to_be_visible()
        page.screenshot(path=tmp_path / f"{name}-{scheme}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        found = Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == [], name
    opened.faultless()
    opened.context.close()


# ---------------------------------------------------------------------- live


def slow_app(flag: Path) -> ClientApp:
    """The real app at sites that take their time; site ``c`` fails once the flag is there."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            time.sleep(0.15)
            if context.node_config["name"] == "c" and flag.exists():
                raise RuntimeError("the site's disk is gone")
        return real(message, context)

    app.query()(handle)
    app.train()(handle)
    app.evaluate()(handle)
    return app


def simulate(data: Path, out: Path, flag: Path, settings: dict[str, Any]) -> None:
    nodes = [{"site": str(data / n / "site.toml"), "home": str(out / "homes" / n), "name": n} for n in "abc"]
    job = job_from_flat(settings)
    with WorkerPool(slow_app(flag), 1) as pool:
        Run(LocalGrid(pool, nodes, job.flat()), job, out).run()


def test_on_a_phone_figures_have_their_space_and_a_wide_table_a_shade(browser: Browser, served: Served) -> None:
    opened = Open(browser, served, viewport={"width": 390, "height": 800})
    page, ids = opened.page, runs_of(opened)
    cell = page.locator(".runs td[data-label^=Test]").first
    expect(cell).to_have_text(re.compile(r"^\S+ \[\S+, \S+\]$"))
    assert (
        page.evaluate("cell => cell.querySelector('small').previousSibling.textContent", cell.element_handle()) == " "
    )
    expect(page.locator(".runs td[data-label=Started]").first).to_have_text(
        re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d UTC$")
    )
    opened.go(f"/?compare={','.join(ids.values())}")
    table = page.locator("section[aria-labelledby=compared] .scroll")
    expect(table).to_be_visible()
    assert page.evaluate("at => at.scrollWidth > at.clientWidth", table.element_handle())
    shade = page.evaluate("at => getComputedStyle(at).backgroundAttachment", table.element_handle())
    assert shade == "local, local, scroll, scroll"
    opened.faultless()
    opened.context.close()


def test_a_page_that_is_none_says_so(opened: Open) -> None:
    answer = opened.page.goto(opened.address + "/nothing")
    assert answer is not None
    assert answer.status == 404
    expect(opened.page.locator("main [role=alert]")).to_contain_text("There is no such page")
    expect(opened.page.locator("nav a")).to_have_text(["Runs", "Federation"])


def test_a_server_that_is_away_is_told_on_every_page(browser: Browser, store: Path, tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('name = "f"\n[server]\nhost = "127.0.0.1"\n[sites.a]\n')
    provision(tmp_path / "federation.toml", tmp_path / "f", ())
    served = Served(store, "--federation", str(tmp_path / "f"))
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(served.first)
        for path in ("/", "/federation", "/runs/1", "/runs/1/model"):
            page.goto(served.address + path)
            expect(page.locator("#server-away")).to_contain_text("start it: consilium server start")
            expect(page.locator("#live.off")).to_have_text("the federation’s server does not answer")
    finally:
        context.close()
        served.end()


@pytest.mark.slow
def test_a_running_simulation_is_followed_and_a_lost_site_shows_within_five_seconds(
    browser: Browser, tmp_path: Path
) -> None:
    data, flag, out = make_sites(tmp_path / "data", a=24, b=24, c=24), tmp_path / "flag", tmp_path / "runs" / "live"
    job = make_job(federation__rounds=60, federation__min_sites=1)
    process = get_context("fork").Process(target=simulate, args=(data, out, flag, job.flat()))
    process.start()
    store = tmp_path / "runs" / "consilium.sqlite"
    served = None
    try:
        wait_for(lambda: (out / "rounds.jsonl").exists() and '"round"' in (out / "rounds.jsonl").read_text())
        served = Served(store)
        opened = Open(browser, served)
        page = opened.page
        expect(page.locator(".runs .badge.running")).to_be_visible()
        page.locator(".runs tbody th a").first.click()
        drawn(page, 3)
        marks = page.locator(".grid td.used")
        before = marks.count()
        points = "document.querySelector('.multiples .line:not(.whole)').getAttribute('points').split(' ').length"
        told = page.evaluate(points)
        wait_for(lambda: marks.count() > before + 3, 20)
        wait_for(lambda: page.evaluate(points) > told, 20)
        assert process.is_alive()
        flag.touch()
        begun = time.monotonic()
        page.wait_for_selector("#lost-list li:has-text('c')", timeout=5_000)
        page.wait_for_selector(".grid td.lost[title*='c, round']", timeout=5_000)
        assert time.monotonic() - begun < 5
        expect(page.locator("#lost-list li").first).to_contain_text("the site’s program failed, training, round")
        expect(page.locator(".grid td.lost").first).to_have_attribute(
            "title", re.compile("not used, the site’s program failed")
        )
        opened.go("/federation")
        expect(page.locator(".card:has(h3:text-is('c')) .warn")).to_contain_text("the site’s program failed")
        opened.faultless()
        assert served.end() == -signal.SIGTERM  # though a page listens
        assert served.errors() == ""
        expect(page.locator("#live")).to_have_text("no connection, trying again", timeout=10_000)
    finally:
        process.kill()
        process.join(20)
        if served is not None and served.process.poll() is None:
            served.end()


def wait_for(done: Any, patience: float = 60.0) -> None:
    deadline = time.monotonic() + patience
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
