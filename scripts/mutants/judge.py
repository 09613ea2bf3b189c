"""Whether the tests find a mutant.

A mutant is killed when a test of ``make test`` fails with it. Most are killed by the comparison of
the twins on the corpus, which is what ``tests/equivalence/test_corpus.py`` does; here the corpus is
made only once. For a mutant of the script that is the test itself. In the test of a mutant of the
model, the corpus would be made by the mutant too; but up to the first case on which it differs it
does what the model does, so it comes to that case (``confirm`` runs the real test for a sample).

What is not killed so is judged by the real tests, run on a copy of the tree that holds the mutant:
those that find most come before the long rest of the corpus, and last, unless the mutant is listed
as an equivalent, all that concern the twins.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import NamedTuple

import redis

from scripts.servers import Server
from tests.equivalence.steady import wrongly_taken
from tests.equivalence.twins import Answer, Case, Script, differing, model_answer

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"lua": Path("lua/breaker.lua"), "model": Path("distributed_breaker/model.py")}
CORPUS_TEST = "tests/equivalence/test_corpus.py"
E = "tests/equivalence/"
# What finds most of what the corpus does not, quickest first.
SOON = {
    "lua": (
        *(f"{E}test_arguments.py", f"{E}test_values.py", f"{E}test_atomicity.py"),
        *(f"{E}test_shortcut.py", "tests/unit/test_costs.py"),
    ),
    "model": (f"{E}test_values.py", f"{E}test_arguments.py", "tests/unit/test_shadow.py"),
}
ALL = ("tests/unit", "tests/equivalence")
# Tests of one kind of server only, and those that need none.
ONE_KIND = "not redis8 and not redis- and not redis]"

# The first cases kill nearly all. On these an error in every answer means: it does not work at all.
FIRST = 25
CHUNKS = (FIRST, 75, 400, 2_500)
CPU_SECONDS = 4  # for one chunk of cases in the model; they take a quarter of a second
SCRIPT_SECONDS = 6  # for the answer to one pipeline; it takes a twentieth of a second
TEST_SECONDS = 900  # for one run of pytest: a survivor takes all of them
CRASHED = "CRASHED"

Expected = list[tuple[Case, Answer]]


class Verdict(NamedTuple):
    """``killer`` is empty for a survivor; ``broken`` if the mutant never works at all."""

    killer: str
    detail: str = ""
    broken: bool = False


class Hang(Exception):
    """The mutant has not come to an end."""


class Tree:
    """A copy of what the tests need, with one file changed at a time."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.path = Path(self._folder.name)
        unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in ("distributed_breaker", "docs", "lua", "scripts", "tests"):
            shutil.copytree(ROOT / name, self.path / name, symlinks=True, ignore=unwanted)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, self.path)

    def close(self) -> None:
        """Remove the copy."""
        self._folder.cleanup()

    @contextmanager
    def planted(self, file: str, source: str) -> Iterator[None]:
        """The tree with another text of one of the twins."""
        path = self.path / SOURCES[file]
        right = path.read_bytes()
        try:
            self._write(path, source.encode())
            yield
        finally:
            self._write(path, right)

    def _write(self, path: Path, content: bytes) -> None:
        # Bytecode is told from its source by size and second, which is not enough here.
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        path.write_bytes(content)

    def failing(self, tests: tuple[str, ...]) -> str:
        """The first test that fails, or an empty text."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "no:randomly", "--tb=no", "-k", ONE_KIND, *tests]
        environment = {k: v for k, v in os.environ.items() if k not in ("REDIS_URL", "PYTHONPATH")}
        process = subprocess.Popen(
            command,
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=TEST_SECONDS)
        except subprocess.TimeoutExpired:
            return "hang"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        if process.returncode == 0:
            return ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if process.returncode not in (1, 2) or failed is None:
            raise RuntimeError(f"pytest ended with {process.returncode}:\n{output[-2_000:]}")
        return failed.group(1).split("[")[0]


class Judge:
    """Judges one mutant after the other, with a server and a copy of the tree of its own."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self.tree = Tree()
        self._server = self._start()
        signal.signal(signal.SIGPROF, self._too_long)

    def close(self) -> None:
        """Stop the server and remove the copy."""
        self._server.stop()
        self.tree.close()

    def judge(self, file: str, source: str, patient: bool = True) -> Verdict:
        """Whether the tests find this text of one of the twins; ``patient``: or any test does."""
        compare = {"lua": self._compare_script, "model": self._compare_model}[file]
        verdict = compare(source)
        if verdict.killer or not patient:
            return verdict
        return Verdict(self.tests(file, source, ALL))

    def tests(self, file: str, source: str, tests: tuple[str, ...]) -> str:
        """The first of these tests that fails with this text."""
        with self.tree.planted(file, source):
            return self.tree.failing(tests)

    # ---------------------------------------------------------------------- the corpus

    def _chunks(self) -> Iterator[Expected]:
        sizes, first = iter(CHUNKS), 0
        while first < len(self._expected):
            size = next(sizes, CHUNKS[-1])
            yield self._expected[first : first + size]
            first += size

    def _verdict(self, some: Expected, answers: list[Answer]) -> Verdict | None:
        crashes = [answer.reply[0] for answer in answers if answer.reply[1:2] == (CRASHED,)]
        if crashes and len(crashes) == len(some):
            return Verdict("corpus", crashes[0], broken=True)
        for (case, wanted), got in zip(some, answers, strict=True):
            names = differing(wanted, got)
            if names:
                return Verdict("corpus", f"{', '.join(names)} of {case.step.op}")
        return None

    def _compare_script(self, source: str) -> Verdict:
        with closing(self._server.client(decode_responses=True, socket_timeout=60.0)) as admin:
            try:
                admin.script_load(source)
            except redis.ResponseError as error:
                return Verdict("corpus", str(error), broken=True)
        try:
            with closing(
                self._server.client(decode_responses=True, socket_timeout=SCRIPT_SECONDS)
            ) as client:
                client.script_flush()
                client.flushall()
                with closing(Script(client, "mutant", source)) as script:
                    for number, some in enumerate(self._chunks()):
                        # The rest of the corpus takes longest by far, and finds little.
                        if number == len(CHUNKS) and (killer := self._elsewhere(source)):
                            return Verdict(killer)
                        answers = [self._plain(a) for a in script.answers([c for c, _ in some])]
                        verdict = self._verdict(some, answers)
                        if verdict:
                            return verdict
        except redis.TimeoutError:
            self._server.stop()
            self._server = self._start()
            return Verdict("hang")
        except (AssertionError, TypeError) as error:
            # It wrote something else than a hash, a log and pushes.
            return Verdict("corpus", repr(error))
        return Verdict("")

    def _elsewhere(self, source: str) -> str:
        """What of the tests that are not the corpus finds a mutant of the script soon."""
        if self._wrongly_taken(source):
            return "the shortcut"
        return self.tests("lua", source, SOON["lua"])

    def _wrongly_taken(self, source: str) -> bool:
        """What ``tests/equivalence/test_shortcut.py`` does, without a start of pytest."""
        with closing(
            self._server.client(decode_responses=True, socket_timeout=SCRIPT_SECONDS)
        ) as client:
            try:
                return bool(wrongly_taken(client, "shortcut", source))
            except (AssertionError, redis.RedisError, TypeError):
                return False  # the tests will tell

    @staticmethod
    def _plain(answer: Answer) -> Answer:
        """An error of Lua itself, as against one that the script answers with."""
        if len(answer.reply) == 2 and answer.reply[0] == "ERR":
            return answer._replace(reply=(answer.reply[1], CRASHED))
        return answer

    def _compare_model(self, source: str) -> Verdict:
        try:
            machine = module(source)
            for some in self._chunks():
                with bounded():
                    answers = [answer_of(case, machine) for case, _ in some]
                verdict = self._verdict(some, answers)
                if verdict:
                    return verdict
        except Hang:
            return Verdict("hang")
        except Exception as error:  # It is the mutant's, whatever it is.
            return Verdict("corpus", repr(error), broken=True)
        return Verdict(self.tests("model", source, SOON["model"]))

    # ---------------------------------------------------------------------- bounds

    @staticmethod
    def _start() -> Server:
        return Server.start("valkey", args=("--busy-reply-threshold", "60000"))

    @staticmethod
    def _too_long(number: int, frame: FrameType | None) -> None:
        raise Hang


@contextmanager
def bounded() -> Iterator[None]:
    """Bounds the processor's time, which does not run while others have the processor."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def module(source: str) -> ModuleType:
    """The model as a module of its own."""
    made = ModuleType("distributed_breaker.mutant")
    made.__package__ = "distributed_breaker"
    sys.modules[made.__name__] = made  # Dataclasses look their module up.
    exec(compile(source, made.__name__, "exec"), made.__dict__)
    return made


def answer_of(case: Case, machine: ModuleType) -> Answer:
    """What a mutant of the model makes of a case; an exception is an answer, too."""
    try:
        return model_answer(case, machine=machine)
    except Hang:
        raise
    except Exception as error:
        return Answer((repr(error), CRASHED), {}, [], 0, 0, [])
