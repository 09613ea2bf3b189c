"""``make mutants``: changes the twins in thousands of small ways; the tests must find each change.

It ends with an error when a mutant survives that is not listed in ``equivalent.toml``, when a
listed one does not survive, when the list names a mutant that there is none of, when the tests
fail without a mutant, and when a mutant that was judged killed passes the real tests.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence

from tests.equivalence.corpus import corpus
from tests.equivalence.twins import model_answer

from . import equivalents, lua, python, report
from .judge import CORPUS_TEST, ROOT, SOURCES, Expected, Judge, Verdict
from .mutant import Mutant
from .pool import Pool

MUTATORS = {"lua": lua.mutants, "model": python.mutants}
QUICK = 400
# The tests of which the corpus is made: they must fail where the judge says that it kills.
MADE_OF = (CORPUS_TEST, "tests/equivalence/test_walks.py", "tests/equivalence/test_exhaustive.py")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="make mutants", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--only", choices=MUTATORS, help="the mutants of one of the twins")
    parser.add_argument("--match", default="", metavar="TEXT", help="those that show this text")
    parser.add_argument("--sample", type=int, metavar="N", help="so many, drawn by --seed")
    parser.add_argument("--quick", action="store_true", help=f"the same as --sample {QUICK}")
    parser.add_argument("--seed", type=int, default=0, help="of --sample and --confirm")
    parser.add_argument("--confirm", type=int, default=8, metavar="N", help="how many killed ones "
                        "to try on the real tests as well, of each twin (default: 8)")  # fmt: skip
    parser.add_argument("--soon", action="store_true", help="try what the corpus does not kill on "
                        "the tests that find most alone: a first look, in minutes")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="judges at once")
    parser.add_argument("--list", action="store_true", help="show the mutants and judge none")
    parser.add_argument("--show", metavar="ID", help="judge one mutant and say who kills it")
    return parser.parse_args(words)


def chosen(options: argparse.Namespace, mutants: list[Mutant]) -> list[Mutant]:
    """The mutants that are asked for, in the order of the sources."""
    mutants = [
        mutant
        for mutant in mutants
        if options.only in (None, mutant.file)
        and options.match in str(mutant)
        and options.show in (None, mutant.id)
    ]
    size = options.sample or (QUICK if options.quick else 0)
    if 0 < size < len(mutants):
        taken = set(random.Random(options.seed).sample(range(len(mutants)), size))
        mutants = [mutant for index, mutant in enumerate(mutants) if index in taken]
    return mutants


class Run:
    """One run: judge, try some of the verdicts, report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sources = {file: (ROOT / path).read_text("utf-8") for file, path in SOURCES.items()}
        made = [MUTATORS[file](source) for file, source in self.sources.items()]
        self.mutants = [mutant for some in made for mutant in some]
        self.entries = equivalents.read()
        self.listed = {entry.key for entry in self.entries}
        self.problems = equivalents.faults(self.entries, self.mutants)

    def judge(self, mutants: list[Mutant]) -> list[tuple[Mutant, Verdict]]:
        """All verdicts, in the order of the sources."""
        verdicts: dict[str, Verdict] = {}
        pool = Pool(min(self.options.jobs, len(mutants)), self._expected(), self._ask)
        try:
            for mutant, verdict in pool.judged(mutants):
                verdicts[mutant.id] = verdict
                if not verdict.killer and mutant.key not in self.listed:
                    print(f"survived: {mutant}", flush=True)
                elif len(verdicts) % 250 == 0:
                    print(f"{len(verdicts)} of {len(mutants)} judged", flush=True)
        finally:
            pool.close()
        return [(mutant, verdicts[mutant.id]) for mutant in mutants]

    def confirm(self, judged: list[tuple[Mutant, Verdict]]) -> None:
        """Some of those that the corpus killed must be killed by the real tests, too."""
        choose = random.Random(self.options.seed)
        some: list[Mutant] = []
        for file in SOURCES:
            killed = [m for m, v in judged if m.file == file and v.killer == "corpus"]
            some += choose.sample(killed, min(self.options.confirm, len(killed)))
        if not some:
            return
        print(f"{len(some)} killed ones on the real tests", flush=True)
        pool = Pool(min(self.options.jobs, len(some)), [], self._confirm)
        try:
            for mutant, verdict in pool.judged(some):
                if not verdict.killer:
                    self.problems.append(f"judged killed, but the tests pass: {mutant}")
        finally:
            pool.close()

    def sound(self) -> bool:
        """Whether the tests pass without a mutant; else they would kill anything."""
        judge = Judge(self._expected())
        try:
            for number, (file, source) in enumerate(self.sources.items()):
                # Nothing differs between the two but what is tried first, so once is enough.
                killer = judge.judge(
                    file, source, patient=number == 0 and not self.options.soon
                ).killer
                if killer:
                    self.problems.append(f"killed without a mutant: {file}, by {killer}")
        finally:
            judge.close()
        return not self.problems

    def _ask(self, judge: Judge, mutant: Mutant) -> Verdict:
        source = mutant.plant(self.sources[mutant.file])
        patient = mutant.key not in self.listed and not self.options.soon
        return judge.judge(mutant.file, source, patient=patient)

    def _confirm(self, judge: Judge, mutant: Mutant) -> Verdict:
        return Verdict(judge.tests(mutant.file, mutant.plant(self.sources[mutant.file]), MADE_OF))

    @staticmethod
    def _expected() -> Expected:
        return [(case, model_answer(case, stepped)) for case, stepped in corpus()]


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    options, began = arguments(words), time.monotonic()
    run = Run(options)
    mutants = chosen(options, run.mutants)
    if options.list:
        print(*mutants, f"{len(mutants)} of {len(run.mutants)} mutants", sep="\n")
        return 0
    if not mutants:
        print("There is no such mutant.")
        return 2
    print(f"{len(mutants)} of {len(run.mutants)} mutants", flush=True)
    if run.sound():
        judged = run.judge(mutants)
        if options.show:
            print(mutants[0], judged[0][1], sep="\n")
        run.problems += report.problems(judged, run.listed)
        run.confirm(judged)
        print("", report.summary(judged, run.listed, time.monotonic() - began), sep="\n")
    print("", *run.problems, sep="\n")
    print(f"{len(run.problems)} problems" if run.problems else "Every mutant is accounted for.")
    return 1 if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
