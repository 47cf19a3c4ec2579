"""What a check found: data first, then as text."""

import math
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..tokenizer import printable
from .frameworks import Framework, candidates

CAUSES = (  # of an exception, by its text
    (r"index -100", "labels of -100 are looked up as tokens: replace them first"),
    (r"missing \d+ required (?:positional|keyword-only) arguments?: (.+)", "it needs {}, too: adapt the call"),
    (r"takes [\w ]+ positional arguments? but (\d+) were given", "it does not take {} arguments: adapt the call"),
    (r"(?:0-dimensional|length-1|size-1) arrays can be converted|truth value of an array|must be real number",
     "it takes single numbers: call it pair by pair"),
)  # fmt: skip


class Finding(NamedTuple):
    """One thing that is wrong, or worth knowing."""

    code: str  # stable, for programs: the lists are in this folder's README.md
    sentence: str
    expected: Any = None  # a number, or None
    found: Any = None

    def __str__(self) -> str:
        numbers = "" if self.found is None else f" (expected {_short(self.expected)}, found {_short(self.found)})"
        return f"{self.code}: {self.sentence}{numbers}"


@dataclass
class Report:
    """What was tried on a subject, and what came back."""

    subject: str
    tried: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)  # faults, the likeliest cause first
    remarks: list[Finding] = field(default_factory=list)  # true, worth knowing, no fault
    picture: str = ""
    traceback: str = ""  # of the subject, if it could not be called

    @property
    def right(self) -> bool:
        return not self.findings

    def fault(self, code: str, sentence: str, expected: Any = None, found: Any = None) -> None:
        """Add a finding, once for each code."""
        if code not in {finding.code for finding in self.findings}:
            self.findings.append(Finding(code, sentence, expected, found))

    def remark(self, code: str, sentence: str, expected: Any = None, found: Any = None) -> None:
        """Add a remark, once for each code."""
        if code not in {remark.code for remark in self.remarks}:
            self.remarks.append(Finding(code, sentence, expected, found))

    def failed(self, framework: str) -> None:
        """Keep the traceback of the exception that is being handled, after those of other frameworks."""
        self.traceback += f"given {framework} arrays:\n{traceback.format_exc(limit=-4)}"

    def not_callable(self, how: str) -> None:
        """Add the finding that it could not be called, with the commonest cause if its traceback shows it."""
        for pattern, cause in CAUSES:
            if match := re.search(pattern, self.traceback):
                how += f"; {cause.format(*match.groups())}"
                break
        self.fault("not_callable", f"it could not be called {how}")

    def assert_right(self) -> None:
        """Raise AssertionError, with the whole report as its text, if anything is wrong."""
        if not self.right:
            raise AssertionError(str(self))

    def as_dict(self) -> dict[str, Any]:
        """All but the picture, as dicts, lists, strings and numbers, which `json.dumps` takes."""
        rows = {name: [_plain(row._asdict()) for row in getattr(self, name)] for name in ("findings", "remarks")}
        return {"subject": self.subject, "right": self.right, "tried": self.tried, **rows, "traceback": self.traceback}

    def __str__(self) -> str:
        verdict = "right" if self.right else "WRONG"
        verdict = "COULD NOT RUN" if self.findings and self.findings[0].code == "not_callable" else verdict
        lines = [f"{printable(self.subject)}: {verdict}"]
        lines += [f"  {printable(str(finding))}" for finding in self.findings]
        lines += [f"  remark, {printable(str(remark))}" for remark in self.remarks]
        lines += ["  tried: " + "; ".join(self.tried)] if self.tried else []
        lines += ["", self.picture] if self.picture else []
        lines += ["", self.traceback] if self.traceback else []
        return "\n".join(lines)


def run(report: Report, framework: str | None, check: Callable[[Framework], None], how: str) -> None:
    """Check with the first framework that the subject takes; `how` says how it was called, if it takes none."""
    for each in candidates(framework):
        report.tried.clear()
        with each.session():
            try:
                check(each)
            except Exception:  # whatever somebody's code raises
                report.failed(each.name)
                continue
            report.traceback = ""
            break
    if report.traceback:
        report.not_callable(how)


def _plain(value: Any) -> Any:
    """The same for JSON, which has no word for nan and inf: these become texts."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    """A number or a few of them, in six digits."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_short, value[:4]))}{', ...' if len(value) > 4 else ''}]"
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)
