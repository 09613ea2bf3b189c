"""Errors to plant into the library, each of which the simulation must find.

``python -m tests.simulation.planted`` plants them one after the other, and says after how long each
was found, and by which rule.
"""
# ruff: noqa: E501 - an edit is easier to read on one line.

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import distributed_breaker
from tests.equivalence.planted import Edit

ROOT = Path(__file__).parents[2]
PACKAGE = Path(distributed_breaker.__file__).parent
ENOUGH = 400  # seeds, about a minute on a free core


class Planted(NamedTuple):
    """An error: in ``file``, ``old`` (which stands there once) becomes ``new``.

    ``quick``: it is found within a few seeds.
    """

    what: str
    file: str
    old: str
    new: str
    quick: bool = False

    def plant(self) -> str:
        """The file's text with the error."""
        text = (PACKAGE / self.file).read_text(encoding="utf-8")
        return Edit(self.what, self.old, self.new).plant(text)

    def look_for(self, folder: Path, seeds: int) -> subprocess.CompletedProcess[str]:
        """Simulate with a copy of the library, made in ``folder``, that has the error: by the
        same command that anyone would run."""
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("*.pyc"))
        (folder / PACKAGE.name / self.file).write_text(self.plant(), encoding="utf-8")
        command = [sys.executable, "-m", "tests.simulation", "--jobs", "1", "--minutes", "10"]
        command += [
            "--seeds",
            str(seeds),
            "--shorten",
            "5",
            *(["--server", "valkey"] if self in SCRIPT else []),
        ]
        path = os.pathsep.join([str(folder), str(ROOT)])
        return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path},
                              capture_output=True, text=True, check=False)  # fmt: skip


SESSION, LINKED, SHADOW = "session.py", "linked.py", "shadow.py"
PLANTED = (
    # What a process says to the store, and what it makes of the answers.
    Planted("R2: a grant that nobody waits for is kept", SESSION,
            "if abandoned and request.kind", "if False and request.kind"),
    Planted("R2: an acquire without an answer is not cancelled", SESSION,
            'if step.op == "acquire":', "if False:"),
    Planted("R5: a settle without an answer is forgotten", SESSION,
            'if request.kind == "settle":\n            request.again = True\n', 'if False:\n            request.again = True\n'),
    Planted("a late settle is counted nowhere", SESSION,
            "circuit.settled_late(step)", "circuit.settle_done(True)"),
    Planted("a lost report is sent again", SHADOW,
            "        self.dropped += count\n        if count:\n",
            "        for run in step.batch:\n            self.stale[run.kind] += run.count\n        if False:\n", quick=True),
    Planted("R9: nothing is read after a gap", SESSION,
            "        self._subscribe_failures = 0\n        self._poll_all = True\n        self._next_tick = 0\n",
            "        self._subscribe_failures = 0\n"),
    Planted("no polls", SESSION,
            "if now >= self._next_poll or self._poll_all:", "if self._poll_all:"),
    Planted("a timeout is always tolerated", SESSION,
            "if self._outage.tolerates(error.timeout, asked):", "if True:"),
    Planted("no sync on return", SESSION,
            "                if circuit.answered(step, reply):\n                    self._to_sync[circuit.name] = circuit\n                circuit.heal()\n", "                circuit.heal()\n", quick=True),
    Planted("settles do not survive an outage", SESSION,
            "if request.expires > now and not self.closed:", "if False:", quick=True),
    Planted("a header that asks for a sync is ignored", SESSION,
            "            again = circuit.hear(text, now)",
            "            again = circuit.hear(text, now) and False"),
    # One circuit in one process.
    Planted("R3: several acquires at once", LINKED,
            '            if decision.action == "ask":\n                self._shadow.asking = True\n', "", quick=True),
    Planted("asking never ends", LINKED,
            '        """The acquire in flight was given up."""\n        with self._turn, self._lock:\n            self._shadow.asking = False\n',
            '        """The acquire in flight was given up."""\n        with self._turn, self._lock:\n'),
    Planted("R10: a child sends what its parent has not", LINKED,
            "        shadow.pending.clear()\n        shadow.stale.clear()\n", ""),
    Planted("R10: a child keeps its parent's tallies", LINKED,
            "            era.take()\n        self._rejections.clear()", "            pass\n        self._rejections.clear()", quick=True),
    Planted("a child stays broken", LINKED, '        self.nudged = False\n        self.broken = ""\n', "        self.nudged = False\n"),
    Planted("a check that hangs is the probe for ever", LINKED,
            "            shadow.probed_by_check = check.passed\n            self._refresh(now)\n            if not free:\n                return \"\"\n",
            "            if not free:\n                return \"\"\n            shadow.probed_by_check = check.passed\n            self._refresh(now)\n"),
    Planted("retired eras are forgotten", LINKED,
            "            self._retired = _in_use(self._retired)", "            self._retired = []"),
    # Who decides.
    Planted("C1: an older header is adopted", SHADOW,
            "        if header.v < mine.v:\n            return answering is None\n", ""),
    Planted("R12: a newcomer's circuit is believed", SHADOW,
            "if header.fresh and not ours and self._guarding(now):", "if False:"),
    Planted("R12: only open is guarded", SHADOW,
            'return h.state in ("open", "half_open") or self._left(now) != 0', 'return h.state == "open"'),
    Planted("knows nothing", SHADOW,
            "return Known(h.v, h.nonce, h.state, self._left(now), h.attempt)", "return NOTHING"),
    Planted("forgets how long it knows open to last", SHADOW,
            "return Known(h.v, h.nonce, h.state, self._left(now), h.attempt)",
            "return Known(h.v, h.nonce, h.state, 0, h.attempt)"),
    Planted("C7: begins closed without the store", SHADOW,
            'self.local = self._new_local(now, Known(1, "-", "open", left, h.attempt))', "pass"),
    Planted("R4: a denial is not obeyed", SHADOW, 'if reply.verdict == "deny" and', "if False and", quick=True),
    Planted("R4: a denial that brings news is forgotten", SHADOW,
            "        again = self.hear(header, reply.remaining, now, step.known, reply.now)\n        if reply.verdict == \"deny\" and self.generation == (header.v, header.nonce):\n            self.wait_until = now + reply.value\n",
            "        if reply.verdict == \"deny\":\n            self.wait_until = now + reply.value\n        again = self.hear(header, reply.remaining, now, step.known, reply.now)\n", quick=True),
    Planted("evidence of any age is sent", SHADOW,
            "return min(self.policy.window, EVIDENCE)", "return 10**9"),
    Planted("what was lost is not accounted for", SHADOW, "        self.dropped += count\n", ""),
    Planted("folded outcomes are lost", SHADOW, "            self.stale[old.kind] += old.count\n", ""),
    Planted("late outcomes are sent as good ones", SHADOW,
            "batches.append((NO_GENERATION, [Run(kind, count)]))",
            "batches.append((self.generation, [Run(kind, count)]))"),
    # Admission.
    Planted("R1: a late grant is taken", "admission.py", "if breaker._clock.ms() < until:", "if True:"),
    Planted("a cancelled task keeps its permit", "admission.py", "        if not future.cancel():\n", "        if False:\n"),
    # The way back.
    Planted("never looks again", "outage.py", "return self._good > 2", "return False"),
    # The machine.
    Planted("a lost state is not restored", "model.py", "    if known.v > c.v:\n", "    if False:\n"),
    Planted("v does not grow with the client's", "model.py", "c.v = max(x.now, c.v + 1, x.step.known.v + 1)", "c.v = max(x.now, c.v + 1)"),
    Planted("tokens get a second permit", "model.py",
            '        if slot.token == x.step.token:\n            return "grant", lease\n', ""),
)  # fmt: skip
SCRIPT = (
    Planted("the script: one permit too many", "lua/breaker.lua",
            "if live < p.half_open_permits and", "if live <= p.half_open_permits and", quick=True),
    Planted("the script: a settle of another generation counts", "lua/breaker.lua",
            "if not current or c.state ~= 'half_open' or not mine", "if c.state ~= 'half_open' or not mine"),
    Planted("the script: a lost state is not restored", "lua/breaker.lua", "if known.v > c.v then", "if false then"),
    Planted("the script: the run survives a good call", "lua/breaker.lua", "+ count\n  c.run = 0\n", "+ count\n"),
    Planted("the script: leases do not end", "lua/breaker.lua", "    if lease > 0 then\n", "    if lease >= 0 then\n"),
)  # fmt: skip


def _try_one(planted: Planted) -> bool:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done = planted.look_for(Path(folder), ENOUGH)
    found = re.search(r"FAILED\n(seed \d+, at \d+ ms: .{,60})", done.stdout)
    said = found[1] if found else f"MISSED {done.stderr[-200:]}"
    print(f"{planted.what:55} {time.monotonic() - begin:5.0f} s  {said}", flush=True)
    return found is not None


def main() -> int:
    """Look for all, or for those whose description holds a word that was given."""
    wanted = [
        p for p in (*PLANTED, *SCRIPT) if not sys.argv[1:] or any(w in p.what for w in sys.argv[1:])
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(_try_one, wanted))
    print(f"{sum(found)} of {len(found)} were found")
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
