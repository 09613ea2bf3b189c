// The page's frame: which page is shown, the connection's state, and the one clock.

import { Actions } from "./actions.js";
import { CircuitPage } from "./circuit.js";
import { Circuits } from "./circuits.js";
import { h, say, setMark } from "./dom.js";
import { Fleet } from "./fleet.js";
import { Live } from "./live.js";
import { Processes } from "./processes.js";
import { counted, headline } from "./summary.js";
import { Timeline } from "./timeline.js";
import { STATE_WORDS, span } from "./words.js";

const DRAW_EVERY = 150; // ms; however fast messages come, the page is drawn no more often
const NEWS_EVERY = 4000; // ms; a screen reader is told of changes no more often
const NEWS_TOGETHER = 300; // ms in which changes are one piece of news
const ICON_COLOURS = {
  open: "#c4302b",
  half_open: "#b87400",
  closed: "#2c8a57",
  disabled: "#8a9099",
};
const STORELESS =
  "Every process decides alone, by its shadow breaker; the tiles show what the process that serves " +
  "this page knows.";
const $ = (id) => document.getElementById(id);

class App {
  fleet = new Fleet();
  #live = new Live(this.fleet);
  #actions = new Actions(this.fleet, (text) => this.#toast(text));
  #pages = {
    circuits: new Circuits(this),
    timeline: new Timeline(this),
    processes: new Processes(this),
    circuit: new CircuitPage(this),
  };
  #page = null;
  #drawing = false;
  #drawnAt = 0;
  #scrolled = 0; // px, of the page of all circuits
  #news = []; // transitions that are to be told
  #toldAt = 0;
  #saidLive = "connecting";
  #toastTimer = 0;

  start() {
    addEventListener("hashchange", () => this.#route());
    addEventListener("keydown", (event) => this.#key(event));
    $("skip").addEventListener("click", (event) => {
      event.preventDefault();
      $("main").focus();
    });
    $("again").addEventListener("click", () => this.#live.retry());
    this.#live.addEventListener("change", () => this.#sayLive());
    this.fleet.addEventListener("change", () => this.#changed());
    this.fleet.addEventListener("timeline", () => this.#draw());
    this.fleet.addEventListener("transition", ({ detail }) => this.#hear(detail));
    this.#route();
    this.#sayLive();
    setInterval(() => this.#tick(), 1000);
  }

  /** Go to an address without a step in the browser's history. */
  replace(hash) {
    history.replaceState(null, "", hash);
    this.#route();
  }

  /** Ask an operator what to do with {circuit} or {service}. */
  act(target) {
    this.#actions.ask(target);
  }

  // ------------------------------------------------------------------ pages

  #route() {
    const [path, query = ""] = location.hash.slice(1).split("?");
    const [, first = "", ...rest] = path.split("/");
    const page = first === "circuit" ? "circuit" : Object.hasOwn(this.#pages, first) ? first : "circuits";
    const params = new URLSearchParams(query);
    const next = this.#pages[page];
    const other = next !== this.#page;
    if (other) {
      this.#leave();
      this.#page = next;
      $("main").replaceChildren(next.element);
    }
    for (const link of document.querySelectorAll("nav a")) {
      if (link.dataset.page === page) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    next.show({ params, name: named(rest.join("/")) });
    // Whoever comes back to all circuits finds them as they were left.
    if (other) scrollTo(0, page === "circuits" ? this.#scrolled : 0);
  }

  #leave() {
    if (this.#page === this.#pages.circuits) this.#scrolled = scrollY;
    this.#page?.hide();
  }

  #changed() {
    const { fleet } = this;
    document.body.classList.toggle("admin", fleet.admin);
    say($("where"), [fleet.namespace, fleet.environment].filter(Boolean).join(" · "));
    const { reachable, problem } = fleet.store;
    $("store").dataset.lamp = reachable ? "good" : "bad";
    say($("store").lastElementChild, reachable ? "Redis" : "Redis away");
    $("storeless").hidden = reachable;
    const why = problem ? `: ${problem.replace(/\.$/, "")}` : "";
    say($("storeless"), reachable ? "" : `Redis is away${why}. ${STORELESS}`);
    this.#sayOverall();
    this.#draw();
  }

  /** Draw soon, however many messages come until then. */
  #draw() {
    if (this.#drawing) return;
    this.#drawing = true;
    setTimeout(
      () => requestAnimationFrame(() => this.#drawNow()),
      Math.max(0, this.#drawnAt + DRAW_EVERY - Date.now()),
    );
  }

  #drawNow() {
    this.#drawing = false;
    this.#drawnAt = Date.now();
    const changes = this.fleet.take();
    this.#page.update(changes);
    // The tiles are kept up while another page is shown, so that they are right when they are again.
    if (this.#page !== this.#pages.circuits) this.#pages.circuits.update(changes);
  }

  #tick() {
    this.#live.check();
    if (document.hidden) return;
    this.#page.tick(this.fleet.now());
    if (this.#live.state !== "live") this.#sayLive();
  }

  #key(event) {
    const typing = event.target.closest?.("input, select, textarea, dialog");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (this.#page !== this.#pages.circuits) {
      history.pushState(null, "", "#/");
      this.#route();
    }
    $("search").focus();
  }

  // ------------------------------------------------------------------ what is said of the whole

  #sayLive() {
    const { state, since, retryAt } = this.#live;
    const old = span((Date.now() - since) / 1000);
    if (state !== this.#saidLive) {
      // The banner itself changes each second, which nobody wants to hear.
      if (state === "lost") say($("news"), "The server can't be reached.");
      else if (this.#saidLive === "lost") say($("news"), "The server is back.");
      this.#saidLive = state;
    }
    $("live").dataset.lamp = { live: "good", connecting: "unknown", lost: "bad" }[state];
    say(
      $("live").lastElementChild,
      { live: "Live", connecting: "Connecting", lost: `Lost ${old} ago` }[state],
    );
    const lost = state === "lost";
    document.body.classList.toggle("stale", lost);
    $("lost").hidden = !lost;
    if (!lost) return;
    const wait = Math.ceil((retryAt - Date.now()) / 1000);
    const data = this.fleet.known ? `The data is ${old} old.` : "There is no data yet.";
    say(
      $("lost").firstElementChild,
      `The server can't be reached. ${data} ${wait > 0 ? `Trying again in ${wait} s.` : "Trying again …"}`,
    );
  }

  /** The tab tells what is wrong, too. */
  #sayOverall() {
    const state =
      { unhealthy: "open", degraded: "half_open", healthy: "closed" }[this.fleet.overall] ??
      "disabled";
    const { line } = headline(this.fleet, counted(this.fleet.tiles.values()));
    document.title = `${line} – Circuit breakers`;
    setMark($("pulse"), state);
    const lever = { open: "M8 19l13-13", half_open: "M8 19l15-7" }[state] ?? "M2 19h28";
    const icon = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="8" fill="${ICON_COLOURS[state]}"/><path d="M2 19h6M24 19h6${lever}" stroke="#fff" stroke-width="3"/></svg>`;
    const href = `data:image/svg+xml,${encodeURIComponent(icon)}`;
    if ($("favicon").getAttribute("href") !== href) $("favicon").setAttribute("href", href);
  }

  /** Changes of state, for those who can't see them; many at once are counted. */
  #hear(transition) {
    if (this.#news.push(transition) > 1) return;
    setTimeout(
      () => this.#tellNews(),
      Math.max(NEWS_TOGETHER, this.#toldAt + NEWS_EVERY - Date.now()),
    );
  }

  #tellNews() {
    this.#toldAt = Date.now();
    const news = this.#news.splice(0);
    const [first] = news;
    const more = news.length > 1 ? ` ${news.length - 1} more changes.` : "";
    say($("news"), `${first.circuit} is now ${STATE_WORDS[first.to] ?? first.to}.${more}`);
  }

  #toast(text) {
    clearTimeout(this.#toastTimer);
    $("toast").hidden = false;
    $("toast").replaceChildren(h("span", {}, text));
    this.#toastTimer = setTimeout(() => ($("toast").hidden = true), 8000);
  }
}

function named(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

new App().start();
