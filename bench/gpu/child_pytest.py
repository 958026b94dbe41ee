"""One slice of the tests: every n-th test of the backends, journalled as it goes."""

from __future__ import annotations

import argparse

import pytest

from bench.gpu.journal import START_AGAIN, Journal, context_is_lost
from bench.gpu.record import FAILED, PASSED, SKIPPED
from tests.verification import subject


class Journalling:
    """A pytest plugin that selects, reports to the journal, and leaves a process whose CUDA context is lost."""

    def __init__(self, journal: Journal, backends: list[str], first: int, every: int):
        self.journal, self.backends, self.first, self.every = journal, backends, first, every
        self.groups: dict[str, list[str]] = {}
        self.outcomes: dict[str, tuple[str, str]] = {}

    def pytest_collectreport(self, report):
        if report.failed and report.nodeid not in self.journal.done:
            self.journal.end(report.nodeid, ["collection"], FAILED, str(report.longrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        subjects = {item: subject(item) for item in items}
        mine = [item for item in items if subjects[item].backend in self.backends][self.first :: self.every]
        mine = [item for item in mine if item.nodeid not in self.journal.done]
        self.groups = {item.nodeid: list(subjects[item]) for item in mine}
        kept = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = mine

    def pytest_runtest_logstart(self, nodeid):
        self.outcomes[nodeid] = (PASSED, "")
        self.journal.start(nodeid, self.groups[nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.outcomes[report.nodeid] = (FAILED, report.longreprtext)
        elif report.skipped:
            self.outcomes[report.nodeid] = (SKIPPED, str(report.longrepr))

    def pytest_runtest_logfinish(self, nodeid):
        outcome, text = self.outcomes[nodeid]
        self.journal.end(nodeid, self.groups[nodeid], outcome, text)
        if outcome == FAILED and context_is_lost():
            pytest.exit("the CUDA context is lost", returncode=START_AGAIN)


def main() -> int:
    parser = argparse.ArgumentParser()
    Journal.add_options(parser)
    parser.add_argument("--backends", nargs="+", required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--paths", nargs="+", required=True)
    options = parser.parse_args()
    plugin = Journalling(Journal(options), options.backends, options.first, options.every)
    arguments = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *options.paths]
    code = pytest.main(arguments, plugins=[plugin])
    told = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    return 0 if code in told else int(code)  # a failed test is in the journal


if __name__ == "__main__":
    raise SystemExit(main())
