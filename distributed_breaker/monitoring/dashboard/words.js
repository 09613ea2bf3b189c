// How things are said: durations, shares, causes, and why a circuit is in its state.

export const STATES = ["open", "forced_open", "half_open", "forced_closed", "closed", "disabled"];
export const STATE_WORDS = {
  open: "open",
  forced_open: "forced open",
  half_open: "half-open",
  forced_closed: "forced closed",
  closed: "closed",
  disabled: "disabled",
};
const CAUSES = {
  created: "it was made",
  unreadable: "the store's key cannot be read",
  restored: "the store had lost it, and processes put it back",
  run: "bad outcomes in a row",
  rate: "the share of failures in the window",
  slow: "the share of slow calls in the window",
  retry_after: "the dependency asked to be left alone",
  due: "the open interval was over",
  recovered: "enough probes succeeded",
  probe: "a probe failed",
  forced_open: "an operator forced it open",
  forced_closed: "an operator forced it closed",
  released: "an operator released it",
  expired: "an operator's override ran out",
  reset: "an operator reset it",
};

export const causeOf = (cause) => CAUSES[cause] ?? cause ?? "";
/** The state to show: a circuit that is switched off lets all calls pass, whatever the store holds. */
export const shownState = (circuit) => (circuit.enabled === false ? "disabled" : circuit.state);
export const plural = (count, one, many = `${one}s`) =>
  `${number(count)} ${count === 1 ? one : many}`;
export const number = (value) => value.toLocaleString("en");

/** A duration in its two greatest units. */
export function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  if (whole >= 86400) return `${Math.floor(whole / 86400)}d ${Math.floor((whole % 86400) / 3600)}h`;
  if (whole >= 3600) return `${Math.floor(whole / 3600)}h ${Math.floor((whole % 3600) / 60)}m`;
  if (whole >= 60) return `${Math.floor(whole / 60)}m ${whole % 60}s`;
  return `${whole}s`;
}

/** A response time. */
export function duration(seconds) {
  if (seconds == null) return "–";
  if (seconds >= 10) return `${seconds.toFixed(0)} s`;
  if (seconds >= 1) return `${seconds.toFixed(1)} s`;
  const ms = seconds * 1000;
  return `${ms >= 10 ? ms.toFixed(0) : ms.toFixed(1)} ms`;
}

export function share(part) {
  if (part == null) return "–";
  if (part > 0 && part < 0.001) return "<0.1%";
  return `${(part * 100).toFixed(part > 0 && part < 0.0995 ? 1 : 0)}%`;
}

export function rate(perSecond) {
  if (perSecond == null) return "–";
  if (perSecond >= 10000) return `${(perSecond / 1000).toFixed(0)}k`;
  if (perSecond >= 1000) return `${(perSecond / 1000).toFixed(1)}k`;
  return perSecond >= 10 || perSecond === 0 ? perSecond.toFixed(0) : perSecond.toFixed(1);
}

/** A time of the day, here; with the date when it isn't today. */
export function clock(iso) {
  if (!iso) return "–";
  const at = new Date(iso);
  const time = at.toLocaleTimeString("en-GB");
  if (at.toDateString() === new Date().toDateString()) return time;
  return `${at.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

/** What a transition's maker said of it: an error, or who and why. */
export function saidOf(detail) {
  if (!detail) return "";
  if (detail.error) return detail.message ? `${detail.error}: ${detail.message}` : detail.error;
  return [detail.actor, detail.reason].filter(Boolean).join(": ");
}

export const reporterOf = (detail) =>
  detail?.reporter ? `${detail.reporter}${detail.host ? `@${detail.host}` : ""}` : "";

/** What is known of the moment of a transition. */
export function evidenceOf(window, run, reporters) {
  if (!window) return "";
  const parts = [];
  if (window.calls)
    parts.push(
      `${number(window.failures)} of ${plural(window.calls, "call")} failed (${share(window.failure_rate ?? window.failures / window.calls)})`,
    );
  if (window.slow) parts.push(`${number(window.slow)} slow`);
  if (run) parts.push(`${number(run)} bad in a row`);
  if (reporters) parts.push(`${plural(reporters, "process", "processes")} reporting`);
  return parts.join(", ");
}

/** Who decides, when it isn't the fleet's shared state. */
export const sourceOf = ({ source }) =>
  ["shadow", "quarantine", "override"].includes(source) ? source : "";

/** Sentences that say why a circuit is in its state and what comes next. */
export function explain({ health, metrics, history }, now) {
  const state = shownState(health);
  const since = health.since
    ? ` since ${clock(health.since)} (${span((now - Date.parse(health.since)) / 1000)})`
    : "";
  if (state === "disabled")
    return ["It is switched off by the configuration: all calls pass, none is counted."];
  if (health.cause === "unreadable")
    return [
      `The store's key cannot be read (${saidOf(health.detail)}): every process decides alone. Delete or mend it.`,
    ];
  if (health.shared_state == null && health.source === "shared")
    return ["It is closed: nobody has called it yet."];
  const verb = since ? "has been" : "is";
  const lines = [`It ${verb} ${STATE_WORDS[state]}${since}. ${MEANING[state]}`];
  if (health.source === "shadow")
    lines.push(
      "The store can't be asked, so this process's own shadow breaker decides; others may decide differently.",
    );
  if (health.source === "quarantine")
    lines.push(
      "The fleet's circuit is closed, but this process alone sees failures: it has put itself in quarantine.",
    );
  if (health.cause && health.cause !== "created") {
    const said = saidOf(health.detail);
    const reporter = reporterOf(health.detail);
    const by = reporter && `, ${health.detail.error ? "seen by" : "by way of"} ${reporter}`;
    lines.push(`Why: ${causeOf(health.cause)}.${said ? ` ${said}${by}.` : ""}`);
  }
  // The log says more of a trip than the circuit itself keeps.
  const trip = history.find((entry) => entry.to === "open") ?? health.last_trip;
  if (trip && !["closed", "forced_closed"].includes(state)) {
    const evidence = evidenceOf(trip.window, trip.run, trip.reporters);
    if (evidence)
      lines.push(
        `Evidence when it last opened (${clock(trip.time)}, ${causeOf(trip.cause)}): ${evidence}.`,
      );
  }
  if (health.suspects?.length)
    lines.push(
      `Only ${health.suspects.join(", ")} sees failures, so the fleet goes on; that process is most likely in quarantine.`,
    );
  lines.push(outlook(health, state, now));
  if (metrics.fallback_requests)
    lines.push(
      `Fallbacks have answered ${plural(metrics.fallback_requests, "call")}; ${number(metrics.rejected_requests)} were refused in all.`,
    );
  return lines;
}

const MEANING = {
  open: "Every call is refused at once.",
  forced_open: "An operator has every call refused.",
  half_open: "Only a few probes may try whether the dependency is back.",
  forced_closed: "An operator lets every call pass: the protection is off.",
  closed: "Calls pass.",
};

function outlook(health, state, now) {
  const { probes, window } = health;
  if (state === "open") {
    if (!health.next_attempt_time)
      return "It stays open until an operator resets it: automatic recovery is off.";
    const left = (Date.parse(health.next_attempt_time) - now) / 1000;
    if (left <= 0) return "A probe is due: the next call, or the health check, makes it.";
    return `Next: a probe may be made in ${span(left)}, at ${clock(health.next_attempt_time)}.`;
  }
  if (state === "half_open")
    return `Next: ${probes.successes} of ${probes.needed ?? "?"} needed probes have succeeded, ${plural(probes.out, "permit")} out; one failure opens it again.`;
  if (state.startsWith("forced"))
    return health.ends_at
      ? `Next: the override ends at ${clock(health.ends_at)}.`
      : "Next: it stays so until an operator releases it.";
  return window.calls
    ? `In the window: ${plural(window.calls, "call")}, ${plural(window.failures, "failure")}; ${plural(health.run, "bad outcome")} in a row.`
    : "No call in the window.";
}
