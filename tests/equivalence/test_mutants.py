"""The tool that makes mutants makes the ones it says, and can tell the living from the dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from distributed_breaker import model, store
from scripts.mutants import equivalents, lua, python, report
from scripts.mutants.judge import Judge, Verdict
from scripts.mutants.lua_syntax import parse
from scripts.mutants.mutant import Mutant
from scripts.servers import why_missing
from tests.equivalence.twins import model_answer
from tests.equivalence.walks import lives

SCRIPT = store.script()
MODEL = Path(str(model.__file__)).read_text(encoding="utf-8")

LUA = """
local LIMIT = 5
local function pick(a, b)
  if a < LIMIT and not b then return math.max(a, 1) end
  a = a + 1
  return b == 'x' and 2 or a
end
"""
LUA_CHANGES = {
    "LIMIT": {"local LIMIT = 6", "local LIMIT = 4", "local LIMIT = 0"},
    "pick": {
        "if a <= LIMIT and not b then return math.max(a, 1) end",
        "if a >= LIMIT and not b then return math.max(a, 1) end",
        "if a < LIMIT or not b then return math.max(a, 1) end",
        "if a < LIMIT and b then return math.max(a, 1) end",
        "if a < LIMIT then return math.max(a, 1) end",
        "if not b then return math.max(a, 1) end",
        "if not (a < LIMIT and not b) then return math.max(a, 1) end",
        "if true then return math.max(a, 1) end",
        "if false then return math.max(a, 1) end",
        "if a < LIMIT and not b then do end end",
        "if a < LIMIT and not b then return math.min(a, 1) end",
        "if a < LIMIT and not b then return (a) end",
        "if a < LIMIT and not b then return (1) end",
        "if a < LIMIT and not b then return math.max(a, 2) end",
        "if a < LIMIT and not b then return math.max(a, 0) end",
        "do end",
        "a = a - 1",
        "a = a + 2",
        "a = a + 0",
        "return b ~= 'x' and 2 or a",
        "return b == '' and 2 or a",
        "return b == 'x' or 2 or a",
        "return b == 'x' and 2 and a",
        "return b == 'x' and a or 2",
        "return b == 'x' and 2",
        "return b == 'x' or a",
        "return 2 or a",
        "return b == 'x' and 3 or a",
        "return b == 'x' and 1 or a",
        "return b == 'x' and 0 or a",
        "return a",
    },
}
PYTHON = '''
"""Words about it: 1 < 2."""
LIMIT: int = 5

def pick(a: int, b: str = "") -> str:
    """More words."""
    c = max(a, LIMIT)
    c += 1
    if a in (1,) and b:
        return f"{a} {c}"
    return "x" if c <= 2 else b
'''
PYTHON_CHANGES = {
    "LIMIT": {"LIMIT: int = 6", "LIMIT: int = 4", "LIMIT: int = 0"},
    "pick": {
        "c = min(a, LIMIT)",
        "c = a",
        "c = LIMIT",
        "c -= 1",
        "c = 1",
        "c += 2",
        "c += 0",
        "pass",
        "if a not in (1,) and b:",
        "if a in (2,) and b:",
        "if a in (0,) and b:",
        "if ((a in (1,)) or b):",
        "if (a in (1,)):",
        "if b:",
        "if not ((a in (1,) and b)):",
        "if True:",
        "if False:",
        "return f'{a} '",
        "return f'{a}{c}'",
        "return f' {c}'",
        'return "" if c <= 2 else b',
        'return "x" if c < 2 else b',
        'return "x" if c > 2 else b',
        'return "x" if c <= 3 else b',
        'return "x" if c <= 1 else b',
        'return "x" if c <= 0 else b',
        'return "x" if not ((c <= 2)) else b',
        'return "x" if True else b',
        'return "x" if False else b',
    },
}


def changes(mutants: list[Mutant]) -> dict[str, set[str]]:
    """What the changed lines look like, by function."""
    found: dict[str, set[str]] = {}
    for mutant in mutants:
        found.setdefault(mutant.function, set()).add(mutant.now)
    return found


@pytest.mark.parametrize(
    ("make", "source", "wanted"),
    [(lua.mutants, LUA, LUA_CHANGES), (python.mutants, PYTHON, PYTHON_CHANGES)],
    ids=["lua", "python"],
)
def test_it_makes_every_change_that_it_knows(
    make: Callable[[str], list[Mutant]], source: str, wanted: dict[str, set[str]]
) -> None:
    """All operators of both mutators, on a few lines; nothing in comments and docstrings."""
    assert changes(make(source)) == wanted


@pytest.mark.parametrize(
    ("make", "source"),
    [(lua.mutants, SCRIPT), (python.mutants, MODEL)],
    ids=["lua", "python"],
)
def test_mutants_of_the_twins_are_sound(make: Callable[[str], list[Mutant]], source: str) -> None:
    """Each is another text that still can be read, under a name that no other has; the names do
    not change when lines are added elsewhere."""
    found = make(source)
    assert len(found) > 1_500
    assert len({mutant.plant(source) for mutant in found}) == len(found)
    assert len({mutant.key for mutant in found}) == len({mutant.id for mutant in found})
    assert len({mutant.key for mutant in found}) == len(found)
    read = parse if make is lua.mutants else compile_model
    for mutant in found[::60]:
        read(mutant.plant(source))
    moved = make(source.replace("\n", "\n\n", 40))
    assert [mutant.key for mutant in moved] == [mutant.key for mutant in found]


def compile_model(source: str) -> None:
    compile(source, "model", "exec")


def test_the_parser_stops_at_what_it_does_not_know() -> None:
    """A part of the script that is not understood must not go without mutants unnoticed."""
    for source in ("repeat x() until y", "x = [[long]]", "x = a ^ b", "goto x", "if a then"):
        with pytest.raises(SyntaxError):
            parse(source)


# ---------------------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """A judge with a small corpus and no further tests."""
    if why_missing("valkey"):
        pytest.skip(why_missing("valkey"))
    cases = lives(number=2, steps=120)
    with closing(Judge([(case, model_answer(case)) for case in cases])) as it:
        it.tests = lambda *_: ""
        yield it


def planted(file: str, right: str, wrong: str) -> tuple[str, str]:
    source = {"lua": SCRIPT, "model": MODEL}[file]
    assert source.count(right) == 1
    return file, source.replace(right, wrong)


VERDICTS = {
    "": (
        ("lua", "x.nonce or ''", "x.nonce or 'x'"),
        ("model", "duration = p.open_interval\n", "duration = 0 + p.open_interval\n"),
    ),
    "corpus": (
        ("lua", "c.run = c.run + 1", "c.run = c.run - 1"),
        ("model", "    c.run += 1", "    c.run -= 1"),
    ),
    "hang": (
        ("lua", "done = done + part", "done = done + 0"),
        ("model", "done += part", "done += 0"),
    ),
}


@pytest.mark.parametrize(
    ("killer", "change"), [(killer, one) for killer, some in VERDICTS.items() for one in some]
)
def test_the_judge_tells_the_living_from_the_dead(
    killer: str, change: tuple[str, str, str], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An equivalent survives, a visible change is killed, and one that never ends is stopped."""
    monkeypatch.setattr("scripts.mutants.judge.CPU_SECONDS", 0.5)
    monkeypatch.setattr("scripts.mutants.judge.SCRIPT_SECONDS", 0.7)
    verdict = judge.judge(*planted(*change))
    assert (verdict.killer, verdict.broken) == (killer, False)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("lua", "local function"),
        planted("lua", "local function step()", "local function step() nothing()"),
        ("model", "def"),
        planted("model", "    x = Context(now, s, s.policy)\n", ""),
    ],
)
def test_what_never_works_is_told_apart(file: str, source: str, judge: Judge) -> None:
    """A mutant that only stops everything is killed, but proves little: it is counted apart."""
    verdict = judge.judge(file, source)
    assert verdict.killer
    assert verdict.broken


@pytest.mark.parametrize("file", ["lua", "model"])
def test_the_tests_run_on_the_mutant(file: str, judge: Judge) -> None:
    """The real tests see the changed tree and not the one from which it was copied."""
    test = judge.tree.path / "tests" / "test_here.py"
    test.write_text(
        "from distributed_breaker import model, store\n"
        "def test_here():\n"
        "    assert '0 - 0' not in store.script()\n"
        "    assert model.BUCKETS == 12\n"
    )
    tests = (str(test.relative_to(judge.tree.path)),)
    change = {"lua": ("lua", "= 12", "= 0 - 0"), "model": ("model", "= 12", "= 13")}[file]
    right = {"lua": SCRIPT, "model": MODEL}[file]
    for source, failed in ((planted(*change)[1], f"{tests[0]}::test_here"), (right, "")):
        with judge.tree.planted(file, source):
            assert judge.tree.failing(tests) == failed


# ---------------------------------------------------------------------------- the list


def listed(tmp_path: Path, mutants: str) -> list[equivalents.Equivalent]:
    path = tmp_path / "list.toml"
    head = '[[equivalent]]\nfile = "lua"\nfunction = "LIMIT"\nreason = "Only a test of the list."\n'
    path.write_text(f"{head}mutants = [{mutants}]\n")
    return equivalents.read(path)


RIGHT = '["local LIMIT = 5", "local LIMIT = 6"]'


def test_the_list_must_fit_the_mutants(tmp_path: Path) -> None:
    """An entry without a mutant, and one that stands twice, are errors."""
    made = lua.mutants(LUA)
    assert equivalents.faults(listed(tmp_path, RIGHT), made) == []
    stale = listed(tmp_path, RIGHT.replace("6", "7"))
    assert "no such mutant" in equivalents.faults(stale, made)[0]
    twice = listed(tmp_path, f"{RIGHT}, {RIGHT}")
    assert "twice" in equivalents.faults(twice, made)[0]
    (entry,) = listed(tmp_path, RIGHT)
    assert "reason" in equivalents.faults([entry._replace(reason="-")], made)[0]


def test_the_shipped_list_fits_the_twins() -> None:
    """Every mutant that is said to be equivalent exists."""
    assert equivalents.faults(equivalents.read(), lua.mutants(SCRIPT) + python.mutants(MODEL)) == []


def test_survivors_and_killed_equivalents_are_problems() -> None:
    """Either is an error: a mutant that nobody kills or lists, and a listed one that is killed."""
    one, two, three, four = lua.mutants(LUA)[:4]
    judged = [
        (one, Verdict("")),
        (two, Verdict("")),
        (three, Verdict("corpus")),
        (four, Verdict("corpus")),
    ]
    problems = report.problems(judged, {two.key, four.key})
    assert [problem.split(":")[0] for problem in problems] == [
        "survived",
        "listed as equivalent, but killed by corpus",
    ]
    assert one.id in problems[0]
    assert four.id in problems[1]
