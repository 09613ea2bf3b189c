// What an operator may do, asked for in a dialog: the action, a reason, for how long, by whom. The
// token goes only into the header of the request; it is kept in memory, or for this tab if asked.

import { h, say } from "./dom.js";
import { STATE_WORDS, plural } from "./words.js";

const VERBS = {
  reset: {
    label: "Reset",
    forced: false,
    what: "Close it at once and forget its window. An override ends.",
  },
  "force-open": {
    label: "Force open",
    forced: true,
    what: "Refuse every call, until it is released or the time is over.",
  },
  "force-closed": {
    label: "Force closed",
    forced: true,
    what: "Let every call pass: the protection is off.",
  },
  release: { label: "Release", forced: false, what: "End an override; the circuit decides again." },
};
const TOKEN = "circuit-breakers-token";
const $ = (id) => document.getElementById(id);

export class Actions {
  #fleet;
  #toast;
  #target = {};
  #token = "";
  #dialog = $("action");
  #form = $("action").querySelector("form");

  constructor(fleet, toast) {
    this.#fleet = fleet;
    this.#toast = toast;
    try {
      this.#token = sessionStorage.getItem(TOKEN) ?? "";
    } catch {
      // Storage may be forbidden; then the token is in memory only.
    }
    for (const [verb, { label, what }] of Object.entries(VERBS))
      $("action-verbs").append(
        h(
          "label",
          { class: "verb" },
          h("input", { type: "radio", name: "verb", value: verb, required: true }),
          h("span", {}, h("b", {}, label), h("small", {}, what)),
        ),
      );
    this.#form.addEventListener("change", () => this.#fit());
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#go();
    });
    $("action-cancel").addEventListener("click", () => this.#dialog.close());
    $("action-forget").addEventListener("click", () => {
      this.#forget();
      this.#fit();
    });
  }

  /** Open the dialog for {circuit} or {service}, perhaps with the action chosen. */
  ask(target, verb = "") {
    this.#target = target;
    const affected = target.circuit
      ? ""
      : ` (${plural([...this.#fleet.tiles.values()].filter((tile) => tile.service === target.service).length, "circuit")})`;
    say($("action-title"), `${target.circuit ?? target.service}${affected}`);
    say($("action-problem"), "");
    const { elements } = this.#form;
    for (const radio of elements.verb) radio.checked = radio.value === verb;
    elements.reason.value = "";
    elements.token.value = "";
    this.#fit();
    this.#dialog.showModal();
    (verb ? elements.reason : elements.verb[0]).focus();
  }

  /** Show only what the chosen action needs. */
  #fit() {
    const { elements } = this.#form;
    const verb = VERBS[elements.verb.value];
    elements.reason.required = Boolean(verb?.forced);
    say($("action-reason").firstElementChild, verb?.forced ? "Reason" : "Reason (optional)");
    $("action-ttl").hidden = !verb?.forced;
    $("action-token").hidden = Boolean(this.#token);
    elements.token.required = !this.#token;
    $("action-forget").hidden = !this.#token;
    const go = $("action-go");
    go.disabled = !verb;
    go.classList.toggle("danger", Boolean(verb?.forced));
    say(
      go,
      verb
        ? `${verb.label} ${this.#target.circuit ?? `all of ${this.#target.service}`}`
        : "Choose an action",
    );
  }

  #forget() {
    this.#token = "";
    try {
      sessionStorage.removeItem(TOKEN);
    } catch {
      // It was never stored.
    }
  }

  async #go() {
    const { elements } = this.#form;
    const verb = elements.verb.value;
    const token = this.#token || elements.token.value.trim();
    const body = {
      ...this.#target,
      reason: elements.reason.value.trim(),
      actor: elements.actor.value.trim(),
    };
    if (VERBS[verb].forced && elements.ttl.value) body.ttl = Number(elements.ttl.value);
    say($("action-problem"), "");
    $("action-go").disabled = true;
    try {
      const answer = await fetch(verb, {
        method: "POST",
        headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
        body: JSON.stringify(body),
        credentials: "same-origin",
      });
      const said = await answer.json().catch(() => ({}));
      if (answer.status === 401) this.#forget();
      else if (answer.ok) this.#remember(token, elements.keep.checked);
      // Where each circuit was tried, the answer says of each why not, even if none could be changed.
      if (said.done) this.#done(verb, said.done);
      else say($("action-problem"), problemOf(answer, said.error ?? ""));
    } catch {
      say(
        $("action-problem"),
        "The server can't be reached. Whether anything was done is not known: look at the circuit's history.",
      );
    } finally {
      this.#fit();
    }
  }

  #remember(token, keep) {
    this.#token = token;
    if (!keep) return;
    try {
      sessionStorage.setItem(TOKEN, token);
    } catch {
      // It stays in memory.
    }
  }

  #done(verb, done) {
    const failed = done.filter((one) => one.error);
    if (failed.length) {
      const words = failed.map(({ circuit, error }) => `${circuit}: ${error}`).join("\n");
      say(
        $("action-problem"),
        `${done.length - failed.length} of ${done.length} done. Not done:\n${words}`,
      );
      return;
    }
    this.#dialog.close();
    const changed = done.filter((one) => one.changed !== false);
    const shown = (state) => STATE_WORDS[state] ?? state ?? "?";
    const [{ circuit, before, after } = {}] = done;
    if (!changed.length) this.#toast(`${VERBS[verb].label}: nothing was to be changed.`);
    else if (done.length === 1) this.#toast(`${circuit}: ${shown(before)} → ${shown(after)}`);
    else
      this.#toast(
        `${VERBS[verb].label}: ${changed.length} of ${plural(done.length, "circuit")} changed.`,
      );
  }
}

/** What an answer that isn't 200 means for the person who asked. */
function problemOf(answer, said) {
  const wait = answer.headers.get("Retry-After");
  switch (answer.status) {
    case 401:
      return "The token is not the right one. Enter it again; nothing was changed.";
    case 403:
      return "The server has no admin token, so nothing can be changed from here: set CIRCUIT_BREAKER_ADMIN_TOKEN where it runs.";
    case 404:
      return said || "There is no such circuit any more.";
    case 429:
      return `Too many attempts. Try again ${wait ? `in ${wait} s` : "later"}; nothing was changed.`;
    case 503:
      return `Redis can't be reached, so nothing was changed.${said ? ` ${said}` : ""}`;
    default:
      return said || `The server answered ${answer.status}; nothing is known of what it did.`;
  }
}
