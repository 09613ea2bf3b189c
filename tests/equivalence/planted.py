"""Small errors to plant into the twins: each is one edit of the script's or of the model's text.

An edit is (what goes wrong, the text as it is, the text with the error).  The text as it is must
stand in the file exactly once.
"""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """One planted error."""

    what: str
    right: str
    wrong: str

    def plant(self, source: str) -> str:
        """The source with the error; the edit must be kept up with changes of the source."""
        found = source.count(self.right)
        assert found == 1, f"{self.what}: {self.right!r} stands {found} times in the source"
        return source.replace(self.right, self.wrong)


SCRIPT = (
    # The trip rule and the quorum.
    Edit("run: > for >=", "c.run >= p.failure_threshold", "c.run > p.failure_threshold"),
    Edit("rate: > for >=", "bad * 10000 >= rate * calls", "bad * 10000 > rate * calls"),
    Edit("minimum_calls: <= for <", "calls < p.minimum_calls", "calls <= p.minimum_calls"),
    Edit("q of 1 is refused", "if q <= 1 then return true end", "if q < 1 then return true end"),
    Edit("cap rounds down", "div(need + q - 1, q), 0", "div(need, q), 0"),
    Edit("no cap on a share", "math.min(share, cap))", "share)"),
    Edit("the rest is capped", "r.id == '*' and share or", "r.id == '' and share or"),
    Edit("need below q", "need = math.max(need, q)", "need = math.min(need, q)"),
    Edit("run shares in a rate", "if agreed(x, c, need, false)", "if agreed(x, c, need, true)"),
    Edit("active: > for >=", "if r.id ~= '*' and r.last >= horizon", "if r.last > horizon"),
    Edit("quorum of a rate", "div(rate * p.minimum_calls + 9999, 10000)", "p.failure_threshold"),
    # Window, run and shares.
    Edit("a move keeps the run", "  c.run = 0\n  c.ring = empty_ring()", "  c.ring = empty_ring()"),
    Edit("a move keeps shares", "r.cur, r.prev, r.run = 0, 0, 0", "r.cur, r.prev = 0, 0"),
    Edit("a good call keeps the run", "+ count\n  c.run = 0\n", "+ count\n"),
    Edit("a good call keeps shares", "do r.run = 0 end", "do r.run = r.run end"),
    Edit(
        "slow failures count twice",
        "  c.run = c.run + 1",
        "  c.run = c.run + (SLOW[kind] and 2 or 1)",
    ),
    Edit("late half-window", "half == c.half + 1 and r.cur or 0", "r.cur"),
    Edit("the ring turns too far", "index - c.head, BUCKETS)", "index - c.head + 1, BUCKETS)"),
    Edit("a new window keeps counts", "if offered.window ~= stored.window", "if false"),
    Edit("evicts the latest", "r.last < lost.last)", "r.last > lost.last)"),
    Edit("evicted shares are lost", "rest.run = rest.run + lost.run", "rest.run = rest.run"),
    Edit("ages are ignored", "if current and x.now - run.age >= c.since", "if current"),
    Edit("age: > for >=", "x.now - run.age >= c.since", "x.now - run.age > c.since"),
    Edit("a batch goes on after a trip", "        return done\n", "        return count\n"),
    Edit("looks alone after recovery", "then r.last = x.now end", "then r.last = r.last end"),
    # Times and generations.
    Edit(
        "remaining: max for min",
        "math.min(since + duration - now,",
        "math.max(since + duration - now,",
    ),
    Edit("timers do not restart", "  if c.since > x.now then\n", "  if false then\n"),
    Edit("leases do not restart", "    if slot.since > x.now then\n", "    if false then\n"),
    Edit("v forgets the client's", "c.v + 1, x.known.v + 1)", "c.v + 1)"),
    Edit("v forgets the store's", "math.max(x.now, c.v + 1,", "math.max(x.now,"),
    Edit("ratchet: >= for >", "if known.v > c.v then", "if known.v >= c.v then"),
    Edit("fresh: >= for >", "if theirs > ours or longer", "if theirs >= ours or longer"),
    Edit(
        "margin: >= for >",
        "known.remaining > left + FRESH_MARGIN",
        "known.remaining >= left + FRESH_MARGIN",
    ),
    Edit("fresh a ms longer", "x.now - c.since >= FRESH", "x.now - c.since > FRESH"),
    Edit(
        "restored is not fresh",
        "  transition(x, c, state, 'restored', left)\n  c.fresh = true\n",
        "  transition(x, c, state, 'restored', left)\n",
    ),
    Edit("stays fresh", "  c.fresh = false\n  c.slots = {}", "  c.slots = {}"),
    Edit("endless states run out", "c.duration, x.now) == 0 then", "c.duration, x.now) <= 0 then"),
    Edit(
        "policy: > for >=",
        "offered.version >= stored.version",
        "offered.version > stored.version",
    ),
    # Open intervals.
    Edit(
        "jitter is doubled",
        "tonumber(string.sub(nonce, 1, 4), 16), 65536)",
        "tonumber(string.sub(nonce, 1, 4), 16), 32768)",
    ),
    Edit(
        "backoff beyond the maximum",
        "p.backoff_multiplier, 100), p.open_interval_max)",
        "p.backoff_multiplier, 100), duration * 9)",
    ),
    Edit(
        "a failed probe has no backoff",
        "go_open(x, c, cause, c.attempt + 1, x.open_for)",
        "go_open(x, c, cause, c.attempt, x.open_for)",
    ),
    Edit("rested: > for >=", "x.now - c.since >= c.duration", "x.now - c.since > c.duration"),
    Edit("open_for without bound", "duration = math.min(open_for, most)", "duration = open_for"),
    Edit(
        "reset keeps the attempt",
        "  c.attempt = 0\n  transition(x, c, 'closed', 'reset', 0)",
        "  transition(x, c, 'closed', 'reset', 0)",
    ),
    # Permits.
    Edit(
        "one permit too many",
        "if live < p.half_open_permits and",
        "if live <= p.half_open_permits and",
    ),
    Edit(
        "probes beyond need",
        "c.successes + live < p.success_threshold",
        "c.successes < p.success_threshold",
    ),
    Edit("no look at the lease", "    if lease > 0 then\n", "    if lease >= 0 then\n"),
    Edit(
        "lease ends a ms later",
        "if slot.since + slot.lease <= x.now",
        "if slot.since + slot.lease < x.now",
    ),
    Edit(
        "a token gets two permits",
        "if slot.token == x.token then return",
        "if false then return",
    ),
    Edit(
        "granted while open",
        "c.state == 'forced_open' or left > 0",
        "c.state == 'forced_open' or left > 1",
    ),
    Edit(
        "late settles count",
        "if not current or c.state ~= 'half_open' or not mine",
        "if c.state ~= 'half_open' or not mine",
    ),
    Edit(
        "anybody may settle",
        "c.state ~= 'half_open' or not mine then",
        "c.state ~= 'half_open' then",
    ),
    Edit(
        "closes one too late",
        "c.successes >= p.success_threshold",
        "c.successes > p.success_threshold",
    ),
    Edit(
        "late settles are counted",
        "or not mine then return 'stale', 0 end",
        "or not mine then count_totals(x, c, kind, 1) return 'stale', 0 end",
    ),
    Edit("slow probes do not reopen", "elseif kind ~= 'i' or", "elseif FAILED[kind] or"),
    Edit(
        "released straight to closed",
        "c.state == 'forced_open' and 'half_open' or 'closed', 'released', 0)",
        "'closed', 'released', 0)",
    ),
    Edit("the wait is not shortened", "16), 131072)", "16), 13107200)"),
    # After-effects.
    Edit("expires early", "return math.max(WEEK, left", "return math.min(WEEK, left"),
    Edit("an hour and a ms", "x.now < c.touched + HOUR", "x.now <= c.touched + HOUR"),
    Edit("no PERSIST", "return #x.events > 0 and -1 or 0", "return 0"),
    Edit(
        "pushes only double moves",
        "  if #x.events > 0 then\n    effect(failed, 'PUBLISH'",
        "  if #x.events > 1 then\n    effect(failed, 'PUBLISH'",
    ),
    Edit("logs the step's last v", "'v', text(e.v), 'at'", "'v', text(c.v), 'at'"),
    Edit("counts no opens", "    total = INDEX.opens\n", "    total = INDEX.closes\n"),
)  # fmt: skip

MODEL = (
    Edit("run: > for >=", "c.run >= p.failure_threshold", "c.run > p.failure_threshold"),
    Edit("rate: > for >=", "bad * 10_000 >= rate * calls", "bad * 10_000 > rate * calls"),
    Edit("cap rounds down", "cap = (need + q - 1) // q", "cap = need // q"),
    Edit(
        "the rest is capped",
        'if r.id == "*" else min(share, cap)',
        'if r.id == "" else min(share, cap)',
    ),
    Edit("a move keeps the run", "    c.run = 0\n    c.ring = empty", "    c.ring = empty"),
    Edit(
        "good calls in one piece",
        "part = min(part, max(1, x.policy.minimum_calls - counts(c)[0]))",
        "part = count",
    ),
    Edit(
        "remaining below nothing",
        "max(0, min(since + duration - now, duration))",
        "min(since + duration - now, duration)",
    ),
    Edit("v forgets the client's", "c.v + 1, x.step.known.v + 1)", "c.v + 1)"),
    Edit("ratchet: >= for >", "if known.v > c.v:", "if known.v >= c.v:"),
    Edit("half_open is restored as closed", 'state, left = "open", 0', 'state, left = "closed", 0'),
    Edit(
        "one permit too many",
        "if live < p.half_open_permits and",
        "if live <= p.half_open_permits and",
    ),
    Edit(
        "probes beyond need",
        "c.successes + live < p.success_threshold",
        "c.successes < p.success_threshold",
    ),
    Edit("anybody may settle", '!= "half_open" or not mine:', '!= "half_open":'),
    Edit("late settles count", "if (c.v, c.nonce) != x.step.era or c.state", "if c.state"),
    Edit(
        "granted while open",
        'c.state == "forced_open" or left > 0',
        'c.state == "forced_open" or left > 9',
    ),
    Edit(
        "closes one too early",
        "if c.successes >= p.success_threshold:",
        "if c.successes + 1 >= p.success_threshold:",
    ),
    Edit(
        "other generations count",
        "current = (c.v, c.nonce) == x.step.era and c.state",
        "current = c.state",
    ),
    Edit(
        "late outcomes touch the run",
        '        c.totals[INDEX["late"]] += run.count - counted\n',
        '        c.totals[INDEX["late"]] += run.count - counted\n        c.run = 0\n',
    ),
    Edit(
        "released straight to closed",
        '"half_open" if c.state == "forced_open" else "closed", "released"',
        '"closed", "released"',
    ),
    Edit("no cap on a share", "else min(share, cap)", "else share"),
    Edit("outcomes count twice", 't[INDEX["calls"]] += count', 't[INDEX["calls"]] += 2 * count'),
    Edit(
        "a trip in forced_closed",
        '        if c.state == "closed":\n            cause',
        '        if c.state != "open":\n            cause',
    ),
)  # fmt: skip
