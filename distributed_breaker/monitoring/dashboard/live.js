// The connection to the server: server-sent events, and what to do when they stop.

const FIRST_WAIT = 1000; // ms
const LONGEST_WAIT = 30000;
// A stream that ends after it has told everything is no loss: a server without a thread to spare ends
// each at once and wants to be asked again, and proxies cut what is old.
const AGAIN = 2000;
// The server repeats everything every 60 s, so a connection that says less than that hangs.
const SILENCE = 75000;

/** Keeps a fleet up to date. Its state is "connecting", "live" or "lost"; `since` says from when the
 *  data is, `retryAt` when it will try again (both in ms of this clock). */
export class Live extends EventTarget {
  state = "connecting";
  since = Date.now();
  retryAt = 0;
  #fleet;
  #source = null;
  #told = false; // by this very connection
  #wait = FIRST_WAIT;
  #timer = 0;

  constructor(fleet) {
    super();
    this.#fleet = fleet;
    addEventListener("online", () => this.retry());
    addEventListener("pagehide", () => this.#source?.close());
    addEventListener("pageshow", (event) => event.persisted && this.#open());
    document.addEventListener("visibilitychange", () => document.hidden || this.retry());
    this.#open();
  }

  /** Try now, if it is lost. */
  retry() {
    if (this.state === "lost" && !this.#source) this.#open();
  }

  /** To be called now and then: a connection may hang without an error. */
  check() {
    if (this.state === "live" && Date.now() - this.#fleet.heard > SILENCE)
      this.#lose(this.#fleet.heard);
  }

  #open() {
    clearTimeout(this.#timer);
    this.#source?.close();
    const source = new EventSource("events");
    this.#source = source;
    this.#told = false;
    const on = (name, take) =>
      source.addEventListener(name, (event) => {
        take.call(this.#fleet, JSON.parse(event.data));
        if (name === "fleet") this.#arrived();
      });
    on("fleet", this.#fleet.takeFleet);
    on("tiles", this.#fleet.takeTiles);
    on("transition", this.#fleet.takeTransition);
    // The browser's own reconnection gives up at the first answer that isn't 200, so it isn't used.
    source.addEventListener("error", () => (this.#told ? this.#ended() : this.#lose(this.since)));
    this.#timer = setTimeout(() => this.#lose(this.since), LONGEST_WAIT);
    this.#say();
  }

  #arrived() {
    clearTimeout(this.#timer);
    this.#told = true;
    this.#wait = FIRST_WAIT;
    this.state = "live";
    this.#say();
  }

  /** Ask again; until that fails, nothing is known to be wrong. */
  #ended() {
    this.#source.close();
    this.since = Date.now();
    this.#timer = setTimeout(() => this.#open(), AGAIN);
  }

  #lose(since) {
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#timer);
    const wait = this.#wait * (0.75 + Math.random() / 2);
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT);
    this.since = since;
    this.retryAt = Date.now() + wait;
    this.#timer = setTimeout(() => this.#open(), wait);
    this.state = "lost";
    this.#say();
  }

  #say() {
    this.dispatchEvent(new CustomEvent("change"));
  }
}
