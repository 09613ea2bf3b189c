"""What the benchmarks make of figures: verdicts, reasons, pages and marks.  Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.bench import pages
from scripts.bench.__main__ import TOPICS
from scripts.bench.figures import OURS, Row, Spread, Topic, Verdict, judge, number, times
from scripts.bench.plots import plot
from scripts.bench.reasons import REASONS
from scripts.bench.setting import missing
from scripts.marks import between

ROOT = Path(__file__).parents[2]


def exactly(value: float) -> Spread:
    return Spread.exactly(value)


def row(ours: float | None, *peers: float, **given: object) -> Row:
    spreads = {f"peer {n}": exactly(value) for n, value in enumerate(peers)}
    return Row("row", "µs", None if ours is None else exactly(ours), spreads, **given)


def report(*rows: Row, reasons: dict[str, str] | None = None, quick: bool = False) -> pages.Report:
    topics = [
        Topic("topic", "A topic", "It is measured.", rows, ["a limit"], [r.name for r in rows])
    ]
    titles = (OURS, "peer 0", "peer 1 + Redis")
    return pages.Report(
        machine={"machine": "2 cores"},
        versions=dict.fromkeys(titles, "1.0"),
        configurations=dict.fromkeys(titles, "as it comes"),
        topics=topics,
        judgements=judge(topics, reasons or {}),
        shared=frozenset({OURS, "peer 1 + Redis"}),
        limits=["one can't"],
        quick=quick,
    )


class TestSpread:
    def test_sums_up(self) -> None:
        assert Spread.of([5, 1, 3, 2, 4]) == Spread(1, 2, 3, 4, 5, 5)

    def test_one_figure_is_its_own_spread(self) -> None:
        assert Spread.of([2.0]) == Spread(2, 2, 2, 2, 2, 1)

    def test_two_figures(self) -> None:
        assert Spread.of([1.0, 3.0]).median == 2.0


class TestVerdict:
    @pytest.mark.parametrize(
        ("ours", "peers", "verdict"),
        [
            (1.0, (2.0, 3.0), Verdict.AHEAD),
            (2.5, (2.0, 3.0), Verdict.BEHIND),
            (2.05, (2.0,), Verdict.LEVEL),
            (1.95, (2.0,), Verdict.LEVEL),
            (1.0, (), Verdict.ALONE),
            (0.0, (0.0,), Verdict.LEVEL),
            (0.0, (1.0,), Verdict.AHEAD),
            (1.0, (0.0,), Verdict.BEHIND),
            (None, (1.0,), Verdict.BEHIND),
        ],
    )
    def test_of_costs(self, ours: float, peers: tuple[float, ...], verdict: Verdict) -> None:
        assert row(ours, *peers).verdict is verdict

    def test_more_may_be_better(self) -> None:
        assert row(3.0, 2.0, 1.0, more_is_better=True).verdict is Verdict.AHEAD
        assert row(1.0, 2.0, 0.5, more_is_better=True).verdict is Verdict.BEHIND
        assert row(1.0, 2.0, 0.5, more_is_better=True).best() == ("peer 0", exactly(2.0))

    def test_samples_that_overlap_are_level(self) -> None:
        ours, theirs = Spread.of([1, 2, 3, 4, 5]), Spread.of([3, 4, 5, 6, 7])
        assert Row("row", "", ours, {"peer": theirs}).verdict is Verdict.LEVEL
        apart = Spread.of([7, 8, 9, 10, 11])
        assert Row("row", "", ours, {"peer": apart}).verdict is Verdict.AHEAD

    def test_noise_is_level_and_more_than_noise_is_not(self) -> None:
        assert row(3.0, 1.0, noise=3.0).verdict is Verdict.LEVEL
        assert row(3.1, 1.0, noise=3.0).verdict is Verdict.BEHIND
        assert row(1.0, 300.0, noise=3.0).verdict is Verdict.AHEAD


class TestReasons:
    def test_the_first_that_fits_is_given_where_ours_is_behind(self) -> None:
        reasons = {"topic: r*": "why", "topic: row": "too late"}
        (judgement,) = report(row(2.0, 1.0), reasons=reasons).judgements
        assert (judgement.reason, judgement.unexplained) == ("why", False)

    def test_what_is_ahead_needs_none(self) -> None:
        (judgement,) = report(row(1.0, 2.0), reasons={"*": "why"}).judgements
        assert (judgement.reason, judgement.unexplained) == ("", False)

    def test_behind_without_one_is_reported(self) -> None:
        found = report(row(2.0, 1.0), reasons={"other: *": "why"})
        assert found.unexplained == ["topic: row"]
        assert "UNEXPLAINED" in found.summary()
        assert "No reason is on file" in found.markdown()

    def test_those_on_file_are_sentences(self) -> None:
        assert [pattern for pattern, text in REASONS.items() if not text.endswith(".")] == []

    def test_each_is_for_a_topic(self) -> None:
        assert {pattern.partition(":")[0] for pattern in REASONS} <= set(TOPICS)


class TestPages:
    def test_every_row_stands_in_the_page_with_both_kinds_of_peer(self) -> None:
        peers = {"peer 0": exactly(2.0), "peer 1 + Redis": exactly(30.0)}
        page = report(Row("closed", "µs", exactly(1.0), peers, target="≤ 1")).markdown()
        assert (
            "| closed | 1.00 µs | 2.00 µs, peer 0 | 30.0 µs, peer 1 + Redis | ahead, 2.00×" in page
        )
        assert "one can't" in page
        assert "a limit" in page

    def test_quick_figures_say_so(self) -> None:
        assert "rough figures" in report(row(1.0, 2.0), quick=True).markdown()
        assert "rough figures" not in report(row(1.0, 2.0)).markdown()

    def test_json_holds_what_was_measured_and_the_verdict(self) -> None:
        content = json.loads(report(row(1.23456789, 2.0)).json())
        assert content["topics"][0]["rows"][0]["ours"] == [*[1.23457] * 5, 1]
        assert content["verdicts"][0]["verdict"] == "ahead"

    def test_the_files_are_written_and_the_readme_keeps_the_rest(self, tmp_path: Path) -> None:
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n", encoding="utf-8")
        written = pages.write(report(row(1.0, 2.0)), tmp_path / "docs", readme)
        assert {path.relative_to(tmp_path).as_posix() for path in written} == {
            "docs/benchmarks.md", "docs/benchmarks.json", "docs/benchmarks/topic.svg", "README.md",
        }  # fmt: skip
        text = readme.read_text(encoding="utf-8")
        assert text.startswith("before\n")
        assert text.endswith(f"{pages.END}\nafter\n")
        assert "old" not in text

    def test_marks_are_replaced_again_and_again(self) -> None:
        page = f"a\n{pages.BEGIN}\n{pages.END}\nb\n"
        once = between(page, "first", pages.MARKS)
        assert between(once, "first", pages.MARKS) == once
        assert between(once, "second", pages.MARKS).count("second") == 1

    @pytest.mark.parametrize(
        "page",
        ["", pages.BEGIN, pages.END + pages.BEGIN, 2 * (pages.BEGIN + pages.END)],
    )
    def test_a_page_without_its_marks_is_refused(self, page: str) -> None:
        with pytest.raises(ValueError, match="each once"):
            between(page, "text", pages.MARKS)

    def test_the_readme_has_its_marks(self) -> None:
        between((ROOT / "README.md").read_text(encoding="utf-8"), "text", pages.MARKS)


@pytest.mark.parametrize("values", [(1.0, 2.0), (0.0, 3.0), (0.0, 0.0), (1e-6, 1e6)])
def test_a_plot_is_xml_with_a_bar_for_each(values: tuple[float, float]) -> None:
    topic = Topic("topic", "A & B", "", [row(*values)], drawn=["row"])
    picture = ElementTree.fromstring(plot(topic))
    bars = picture.findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 3  # the page, ours and the peer
    assert all(float(bar.get("width", "")) >= 0 for bar in bars[1:])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1.00"), (0.3333, "0.333"), (12345.6, "12,346"), (0.0001234, "0.000123"),
     (0.05, "0.05"), (-1.5, "-1.50"), (float("inf"), "∞")],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_ratios() -> None:
    assert (times(None), times(2.5)) == ("–", "2.50×")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.bench", "--quick", "--only", "threads", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100, check=False
    )


needs_no_peers = pytest.mark.skipif(not missing(), reason="all peers are installed here")


@needs_no_peers
def test_a_peer_that_is_not_installed_is_an_error() -> None:
    result = bench()
    assert result.returncode == 2
    assert "not installed: " in result.stderr
    assert "circuitbreaker" in result.stderr


@needs_no_peers
def test_a_run_without_peers_says_so_and_writes_where_it_is_told(tmp_path: Path) -> None:
    result = bench("--without", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "Not installed, and so not measured: " in page
    assert "| 16 threads |" in page
    assert (tmp_path / "benchmarks" / "threads.svg").exists()
