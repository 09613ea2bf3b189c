"""The dashboard in a real browser: what people see, and what they can do there.

Most tests look at a real fleet through the real endpoints. What a real one would not give within a
test (thousands of circuits, a cascade, a server that comes back) is made up.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from distributed_breaker.monitoring import text
from distributed_breaker.services import Services
from scripts.servers import Server as Store
from tests.fleet.process import BOUND
from tests.monitoring import made_up
from tests.monitoring.client import Site
from tests.monitoring.conftest import CLOSED, OPEN, TOKEN, configured, fail, make_circuits
from tests.monitoring.made_up import MadeUp, iso, serving, tile, transition
from tests.required import need

pytestmark = pytest.mark.servers("valkey")

ARGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
NASTY = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"
EVERYWHERE = ("#/", "#/timeline", "#/processes", "#/circuit/{}")
Open = Callable[..., Page]
Standing = Callable[..., Site]

PATIENCE = BOUND / 2 * 1000  # ms
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser. It belongs to the module, because playwright keeps its event loop running, which
    tests of asyncio could not bear."""
    binary = shutil.which("chromium")
    need("" if binary else "no chromium on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Open]:
    """Open an address in a browser of its own.  In the end nothing may have been complained about:
    no error in a script, nothing that the Content-Security-Policy forbids, nothing not found."""
    complaints: list[str] = []
    with contextlib.ExitStack() as stack:

        def open_(url: str, allowed: str = "", **options: Any) -> Page:
            context = chromium.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(PATIENCE)
            page = context.new_page()

            def heard(text: str) -> None:
                if not allowed or allowed not in text:
                    complaints.append(text)

            page.on("console", lambda m: heard(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: heard(str(error)))
            page.on("dialog", lambda dialog: heard(f"a dialog: {dialog.message}"))
            page.goto(url)
            return page

        yield open_
    assert complaints == []


@pytest.fixture
def fleet() -> Iterator[MadeUp]:
    """A made-up one, with something of everything."""
    now = time.time()
    soon = {"next_attempt_time": iso(now + 50), "since": iso(now - 10)}
    with serving(
        tile("web_app.database.write", "open", **soon),
        tile("web_app.database.read"),
        tile("web_app.cache", policy_mismatch=True),
        tile("api_v1.http.ml_api", "half_open"),
        tile("api_v1.ml", "open", shared_state="closed", source="quarantine", **soon),
        tile("api_v1.cache", "forced_closed", ends_at=iso(now + 500)),
        tile("ml_prediction.ml", "forced_open"),
        tile("ml_prediction.cache", "disabled"),
        tile("a" * 128),
    ) as made:
        made.timeline = [
            transition(name, "closed", "open", "run", now - 60 + 4 * i)
            for i, name in enumerate(["web_app.database.write", "api_v1.ml", "api_v1.http.ml_api"])
        ][::-1]
        made.processes = [
            process("web-1", 11),
            process("web-2", 12, degraded=True),
            process("web-3", 13, quarantined=["api_v1.ml"], version="0.0.9"),
        ]
        yield made


def process(host: str, pid: int, **other: Any) -> dict[str, Any]:
    now = iso(time.time())
    values = {
        "id": f"{pid:08x}", "host": host, "pid": pid, "service": "web_app", "version": "0.1.0",
        "python": "3.11.2", "started_at": now, "seen_at": now, "circuits": 9, "mirror_age": 0.25,
        "degraded": False, "quarantined": [], "policy_mismatch": [], "config_version": 3,
        "role": "",
    }  # fmt: skip
    return {**values, **other}


def url_of(site: Site) -> str:
    return f"http://127.0.0.1:{site.port}{site.prefix}/"


def tile_of(page: Page, name: str) -> Any:
    return page.locator(f'.tile[href="#/circuit/{name}"]')


def names(page: Page) -> list[str]:
    return [
        text.replace("\n", "") for text in page.locator(".groups .tile .name").all_text_contents()
    ]


# ---------------------------------------------------------------------------- looking


def test_a_trip_is_seen_while_it_happens(
    services: Services, standing: Standing, open_page: Open
) -> None:
    page = open_page(url_of(standing()))
    expect(page.locator("h1")).to_have_text(re.compile(r"All \d+ circuits are closed"))
    expect(page.locator("#live")).to_have_text("Live")
    expect(tile_of(page, OPEN)).to_have_attribute("data-state", "closed")
    fail(services, OPEN)
    expect(tile_of(page, OPEN)).to_have_attribute("data-state", "open")
    expect(tile_of(page, OPEN).locator(".state")).to_have_text("open")
    expect(tile_of(page, OPEN).locator(".next")).to_have_text(re.compile("probe in"))
    expect(tile_of(page, OPEN).locator(".note")).to_have_text("TimeoutError: no answer")
    expect(page.locator("h1")).to_have_text("1 circuit is open")
    expect(page).to_have_title(re.compile("^1 circuit is open"))
    expect(page.locator("#news")).to_have_text(f"{OPEN} is now open.")
    page.get_by_role("link", name="Timeline").click()
    expect(page.locator(".lane .whose")).to_have_text([OPEN])
    expect(page.locator("tbody tr").first).to_contain_text("closed → open")


def test_the_page_of_a_circuit_explains_it(
    services: Services, standing: Standing, open_page: Open
) -> None:
    fail(services, OPEN)
    services.registry.breaker(CLOSED).force_open(actor="mia", reason="maintenance")
    page = open_page(url_of(standing()))
    tile_of(page, OPEN).click()
    why = page.locator(".why")
    expect(why).to_contain_text("It has been open since")
    expect(why).to_contain_text("Why: bad outcomes in a row. TimeoutError: no answer, seen by")
    expect(why).to_contain_text(re.compile(r"Evidence when it last opened .*: 3 of 4 calls failed"))
    expect(why).to_contain_text("Next: a probe may be made in")
    expect(page.get_by_text("failure threshold")).to_be_visible()
    expect(page.locator(".changes tbody tr").first).to_contain_text("closed → open")
    services.registry.breaker(OPEN).reset(actor="mia", reason="it is back")
    expect(page.locator(".now .state")).to_have_text("closed")
    expect(page.locator(".changes tbody tr").first).to_contain_text("mia: it is back")
    page.goto(f"{page.url.partition('#')[0]}#/circuit/{CLOSED}")
    expect(why).to_contain_text("an operator forced it open. mia: maintenance, by way of")


def test_a_circuit_that_is_not_there(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(f"{fleet.url}#/circuit/nothing%2F..%2Fthere", allowed="404")
    expect(page.locator(".banner.bad:visible")).to_have_text("no circuit nothing/../there")


def test_filters_stand_in_the_address(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(fleet.url)
    worst = ["api_v1.ml", "web_app.database.write", "ml_prediction.ml", "api_v1.http.ml_api"]
    expect(page.locator(".tile")).to_have_count(9)
    assert names(page)[:4] == worst
    page.get_by_role("button", name="half-open").click()
    page.get_by_role("button", name=re.compile("^open")).click()
    expect(page.locator(".tile")).to_have_count(3)
    page.get_by_label("Service").select_option("api_v1")
    page.get_by_label("Order").select_option("name")
    expect(page.locator(".tile")).to_have_count(2)
    page.get_by_role("searchbox").fill("ml_api")
    expect(page.locator(".tile")).to_have_count(1)
    assert page.url.endswith("#/?service=api_v1&state=half_open%2Copen&q=ml_api&sort=name")
    other = open_page(page.url)
    expect(other.locator(".tile")).to_have_count(1)
    expect(other.get_by_role("button", name="half-open")).to_have_attribute("aria-pressed", "true")
    expect(other.get_by_role("searchbox")).to_have_value("ml_api")
    expect(other.locator(".shown")).to_contain_text("1 of 9 circuits shown.")
    other.get_by_role("searchbox").fill("nothing")
    expect(other.locator(".shown")).to_contain_text("No circuit is like this.")
    other.get_by_role("button", name="Show all").click()
    expect(other.locator(".tile")).to_have_count(9)
    other.get_by_role("button", name="in quarantine").click()
    expect(other.locator(".tile .badge")).to_have_text(["quarantine"])


def test_a_cascade_is_a_staircase(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(f"{fleet.url}#/timeline")
    lanes = page.locator(".lane .whose")
    first, second, third = "web_app.database.write", "api_v1.ml", "api_v1.http.ml_api"
    expect(lanes).to_have_text([first, second, third])
    expect(page.locator(".cascades")).to_contain_text("3 circuits opened within 8s. First " + first)
    lefts = [at.bounding_box()["x"] for at in page.locator(".at").all()]
    assert lefts == sorted(lefts)
    page.locator(".at").nth(1).focus()
    expect(page.locator("#tip")).to_contain_text("OperationalError: could not connect to server")
    expect(page.locator("#tip")).to_contain_text("26 of 42 calls failed (62%)")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    fleet.transit("web_app.cache", "open", "run")
    expect(lanes).to_have_count(4)
    expect(page.locator(".changes tbody tr")).to_have_count(4)


def test_the_processes(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(f"{fleet.url}#/processes")
    expect(page.locator(".shown")).to_contain_text("3 processes. 2 of them need a look.")
    expect(page.locator(".shown")).to_contain_text("2 versions are running")
    rows = page.locator("tbody tr")
    expect(rows.nth(0)).to_contain_text("decides alone")
    expect(rows.nth(1)).to_contain_text("in quarantine: api_v1.ml")
    expect(rows.nth(2)).to_contain_text("follows")


def test_no_circuits(open_page: Open) -> None:
    with serving() as fleet:
        page = open_page(fleet.url)
        expect(page.locator("h1")).to_have_text("No circuits")
        expect(page.get_by_text("There are no circuits yet.")).to_be_visible()
        fleet.change(tile("payments"))
        expect(page.locator("h1")).to_have_text("The one circuit is closed")
        expect(page.locator(".tile .name")).to_have_text("payments")
        fleet.change(gone=("payments",))
        expect(page.locator("h1")).to_have_text("No circuits")


def test_thousands_of_circuits(open_page: Open) -> None:
    """Only what is near the screen is in the page, and it is right after scrolling and changes."""
    circuits = [tile(f"service_{i % 7}.cache.n{i:04}", spark=[], spark_bad=[]) for i in range(3000)]
    with serving(*circuits) as fleet:
        page = open_page(fleet.url)
        expect(page.locator("h1")).to_have_text("All 3,000 circuits are closed")
        last = "service_6.cache.n2995"
        assert page.locator(".tile").count() < 200
        page.keyboard.press("End")
        page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        expect(tile_of(page, last)).to_be_in_viewport()
        assert page.locator(".tile").count() < 200
        fleet.transit("service_3.cache.n1277", "open", "rate")
        page.evaluate("scrollTo(0, 0)")
        expect(page.locator(".attention .tile .name")).to_have_text("service_3.cache.n1277")
        page.get_by_role("searchbox").fill("n2995")
        expect(tile_of(page, last)).to_be_visible()
        expect(page.locator(".tile")).to_have_count(1)


def test_causes_are_called_what_the_command_calls_them() -> None:
    words = (made_up.PAGES / "words.js").read_text(encoding="utf-8")
    causes = re.search(r"const CAUSES = \{(.*?)\n\};", words, re.DOTALL)
    assert causes is not None
    assert dict(re.findall(r'(\w+): "(.*)",', causes[1])) == text.CAUSES


# ---------------------------------------------------------------------------- stepping in


def fill_in(page: Page, verb: str, **fields: str) -> None:
    page.get_by_role("radio", name=re.compile(f"^{verb}")).check()
    for label, value in fields.items():
        page.get_by_label(label).fill(value)


def test_an_operator_steps_in(services: Services, standing: Standing, open_page: Open) -> None:
    page = open_page(f"{url_of(standing())}#/circuit/{OPEN}", allowed="401")
    page.get_by_role("button", name="Actions…").click()
    dialog = page.get_by_role("dialog")
    go = dialog.locator("#action-go")
    expect(go).to_be_disabled()
    fill_in(page, "Force open", **{"Your name": "mia", "Admin token": "wrong"})
    go.click()
    expect(dialog).to_be_visible()  # A reason must be given.
    fill_in(page, "Force open", Reason="maintenance")
    page.get_by_label("For how long").select_option("300")
    go.click()
    expect(dialog.get_by_role("alert")).to_contain_text("The token is not the right one.")
    page.get_by_label("Admin token").fill(TOKEN)
    go.click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#toast")).to_have_text(f"{OPEN}: closed → forced open")
    snapshot = services.registry.snapshot()[OPEN]
    assert (snapshot.state, snapshot.detail["actor"]) == ("forced_open", "mia")
    assert snapshot.detail["reason"] == "maintenance"
    assert snapshot.ends_at is not None
    assert 200 < snapshot.ends_at - time.time() <= 300
    expect(page.locator(".now .state")).to_have_text("forced open")
    expect(page.locator(".changes")).to_contain_text("mia: maintenance")
    # The token is remembered, but nowhere else.
    page.get_by_role("button", name="Actions…").click()
    expect(page.get_by_label("Admin token")).to_be_hidden()
    fill_in(page, "Release")
    go.click()
    expect(page.locator(".now .state")).not_to_have_text("forced open")
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, location.href])")
    assert TOKEN not in kept


def test_the_token_is_kept_for_the_tab_if_asked(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(f"{fleet.url}#/circuit/api_v1.ml")
    page.get_by_role("button", name="Actions…").click()
    fill_in(page, "Reset", **{"Your name": "mia", "Admin token": made_up.TOKEN})
    page.get_by_label("Keep it until this tab is closed").check()
    page.locator("#action-go").click()
    expect(page.locator("#toast")).to_have_text("api_v1.ml: open → closed")
    page.reload()
    page.get_by_role("button", name="Actions…").click()
    expect(page.get_by_label("Admin token")).to_be_hidden()
    page.get_by_role("button", name="Forget the token").click()
    expect(page.get_by_label("Admin token")).to_be_visible()
    assert fleet.posts == [
        ("reset", {"circuit": "api_v1.ml", "reason": "", "actor": "mia"}, made_up.TOKEN)
    ]


def test_what_goes_wrong_is_said_in_words(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(f"{fleet.url}#/circuit/api_v1.ml", allowed="Failed to load resource")
    page.get_by_role("button", name="Actions…").click()
    fill_in(page, "Reset", **{"Your name": "mia", "Admin token": "any"})
    said = page.get_by_role("alert")
    done = [{"circuit": "api_v1.ml", "before": None, "after": None, "error": "CLUSTERDOWN"}]
    for status, document, headers, words in (
        (403, {}, {}, "set CIRCUIT_BREAKER_ADMIN_TOKEN where it runs"),
        (429, {}, {"Retry-After": "7"}, "Try again in 7 s"),
        (503, {"error": "no answer"}, {}, "Redis can't be reached, so nothing was changed."),
        (400, {"error": "give a 'reason'"}, {}, "give a 'reason'"),
        (503, {"done": done}, {}, "api_v1.ml: CLUSTERDOWN"),
        (500, {}, {}, "The server answered 500"),
    ):
        fleet.answer = (status, document, headers)
        page.locator("#action-go").click()
        expect(said).to_contain_text(words)
    fleet.stop()
    page.locator("#action-go").click()
    expect(said).to_contain_text("Whether anything was done is not known")


def test_a_whole_service(services: Services, standing: Standing, open_page: Open) -> None:
    page = open_page(url_of(standing()))
    page.get_by_role("button", name="Actions for all of web_app").click()
    expect(page.get_by_role("heading", name="web_app (2 circuits)")).to_be_visible()
    fill_in(page, "Force closed", Reason="a test", **{"Your name": "mia", "Admin token": TOKEN})
    page.locator("#action-go").click()
    expect(page.locator("#toast")).to_have_text("Force closed: 2 of 2 circuits changed.")
    expect(page.locator("h1")).to_have_text("2 circuits are forced closed")


def test_without_a_token_nobody_can_step_in(standing: Standing, open_page: Open) -> None:
    page = open_page(url_of(standing(token="")))
    expect(tile_of(page, OPEN)).to_be_visible()
    expect(page.get_by_text("Actions…").first).to_be_hidden()
    tile_of(page, OPEN).click()
    expect(page.locator(".why")).to_be_visible()
    expect(page.get_by_text("Actions…")).to_be_hidden()


# ---------------------------------------------------------------------------- outages


def test_the_server_goes_and_comes_back(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(fleet.url, allowed="ERR_")
    expect(page.locator("#live")).to_have_text("Live")
    fleet.stop()
    lost = page.locator("#lost")
    expect(lost).to_contain_text(re.compile(r"The server can't be reached. The data is \d+s old."))
    expect(page.locator("#live")).to_have_text(re.compile(r"Lost \d+s ago"))
    expect(page.locator("#news")).to_have_text("The server can't be reached.")
    expect(tile_of(page, "web_app.database.write")).to_be_visible()
    fleet.tiles["web_app.database.write"] = tile("web_app.database.write")
    fleet.start()
    page.get_by_role("button", name="Try now").click()
    expect(page.locator("#live")).to_have_text("Live")
    expect(lost).to_be_hidden()
    expect(tile_of(page, "web_app.database.write")).to_have_attribute("data-state", "closed")


def test_a_server_that_ends_each_stream_is_asked_again(fleet: MadeUp, open_page: Open) -> None:
    fleet.short = True
    page = open_page(fleet.url)
    expect(tile_of(page, "web_app.database.read")).to_have_attribute("data-state", "closed")
    fleet.tiles["web_app.database.read"] = tile("web_app.database.read", "open")
    expect(tile_of(page, "web_app.database.read")).to_have_attribute("data-state", "open")
    expect(page.locator("#live")).to_have_text("Live")
    expect(page.locator("#lost")).to_be_hidden()


def test_redis_goes_and_comes_back(
    own_server: Callable[..., Store],
    namespace: str,
    tmp_path: Any,
    standing: Standing,
    open_page: Open,
) -> None:
    store = own_server()
    with contextlib.closing(configured(tmp_path, store.url, namespace)) as services:
        make_circuits(services)
        page = open_page(url_of(standing(services)))
        expect(tile_of(page, OPEN)).to_be_visible()
        store.kill()
        expect(page.locator("#storeless")).to_be_visible()
        expect(page.locator("#storeless")).to_contain_text("Redis is away: Redis at")
        expect(tile_of(page, OPEN).locator(".badge")).to_have_text("shadow")
        expect(page.locator("#live")).to_have_text("Live")
        with contextlib.suppress(TimeoutError):
            fail_here(services, OPEN)
        expect(tile_of(page, OPEN)).to_have_attribute("data-state", "open")
        expect(page.locator("#store")).to_have_text("Redis away")
        tile_of(page, OPEN).click()
        kept = "History, as it was known before Redis went away"
        expect(page.get_by_role("heading", name=kept)).to_be_visible()
        expect(page.locator(".why")).to_contain_text("this process's own shadow breaker decides")
        page.get_by_role("link", name="Processes").click()
        expect(page.locator(".shown")).to_contain_text("nothing new is known of the processes")
        page.get_by_role("link", name="Circuits", exact=True).click()
        store.restart()
        expect(page.locator("#storeless")).to_be_hidden()
        expect(tile_of(page, OPEN).locator(".badge")).to_have_count(0)


def fail_here(services: Services, name: str) -> None:
    """Let calls fail until this process's own machine has had enough."""

    def boom() -> None:
        raise TimeoutError("no answer")

    for _ in range(20):
        with contextlib.suppress(Exception):
            services.registry.breaker(name).call(boom)


# ---------------------------------------------------------------------------- whoever looks


def test_texts_stay_texts(services: Services, standing: Standing, open_page: Open) -> None:
    breaker = services.registry.breaker(OPEN)

    def boom() -> None:
        raise TimeoutError(NASTY)

    while breaker.snapshot().shared_state != "open":
        with contextlib.suppress(Exception):
            breaker.call(boom)
    services.registry.breaker(CLOSED).force_open(actor=NASTY[:40], reason=NASTY)
    page = open_page(url_of(standing()), allowed="404")
    expect(tile_of(page, OPEN).locator(".note")).to_contain_text("<img src=x onerror=alert(1)>")
    for place in ("#/timeline", f"#/circuit/{OPEN}", f"#/circuit/{CLOSED}", f"#/circuit/{NASTY}"):
        page.goto(page.url.partition("#")[0] + place)
        expect(page.locator("main")).to_contain_text("<img src=x onerror=alert(1)>")
        assert page.locator("img, main script").count() == 0


def test_keys_are_enough(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(fleet.url)
    expect(page.locator(".tile")).to_have_count(9)
    page.keyboard.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator(".tile").first).to_be_focused()
    assert page.locator(".tile").first.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    # A tile that moves keeps the focus.
    fleet.transit("a" * 128, "open", "run")
    expect(page.locator(".tile").first).to_contain_text("a" * 128)
    expect(page.locator(".tile").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("api_v1.ml")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()


@pytest.mark.parametrize(("theme", "width", "height"), [("dark", 320, 640), ("light", 2560, 1300)])
def test_it_can_be_read(
    fleet: MadeUp, open_page: Open, theme: Any, width: int, height: int
) -> None:
    """Nothing is wider than the screen, and every text has the contrast of WCAG's AA."""
    viewport = {"width": width, "height": height}
    page = open_page(fleet.url, color_scheme=theme, viewport=viewport)
    for place in EVERYWHERE:
        page.goto(fleet.url + place.format("web_app.database.write"))
        expect(page.locator(".tile .state, .lane, td, .why p").first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, place
        assert page.evaluate(FAINT) == [], place
    page.get_by_role("button", name="Actions…").click()
    page.get_by_role("radio", name="Force open").check()
    assert page.evaluate(FAINT) == []


def test_the_theme_can_be_chosen(fleet: MadeUp, open_page: Open) -> None:
    page = open_page(fleet.url, color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    button = page.get_by_role("button", name="Theme: auto")
    button.click()
    page.get_by_role("button", name="Theme: light").click()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(paper) != light
    page.reload()
    assert page.evaluate(paper) != light


# The texts whose contrast is too small.
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest("option, noscript, .unseen, :disabled")) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement)
      behind.unshift(getComputedStyle(e).backgroundColor);
    const style = getComputedStyle(element);
    const [a, b] = [over(behind), over([...behind, style.color])].map(light).sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)} ${walker.currentNode.data}`);
  }
  return faint;
}"""
