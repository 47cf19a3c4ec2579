"""Somebody's DPO loss against Eq. 7 and its gradient, with a name for what is wrong."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

from .. import losses
from ..backend import Array
from .frameworks import Framework, candidates, leading
from .report import Report

NAMES = ("logp_w", "logp_l", "ref_logp_w", "ref_logp_l", "beta")
Logps = tuple[Array, ...]  # of policy and reference, chosen and rejected: (B,) each
FAR = (0.0, 0.25, -0.25, 3.0, -3.0, 20.0, -20.0, 60.0, -60.0, 300.0, -300.0, 2000.0, -2000.0)  # z of single pairs
TOLERANCE = 1e-6  # of 1 + |expected|


def softplus(z: Any) -> Any:
    """log(1 + e^z), without overflow."""
    return numpy.logaddexp(0.0, z)


def margin(w: Array, l: Array, rw: Array, rl: Array) -> Array:
    return (w - rw) - (l - rl)


class Suspect(NamedTuple):
    """A wrong, or merely different, loss of a pair: a subject that equals it gets this finding."""

    code: str
    sentence: str
    loss: Callable[..., Array]  # of (B,) arrays and beta


SUSPECTS = [
    Suspect("other_loss", "this is 1 - sigma(z): its slope vanishes where the model is confidently wrong",
            lambda *x: 1 - numpy.exp(-softplus(-x[4] * margin(*x[:4])))),
    Suspect("other_loss", "this is sigma(-z) after another sigmoid: -log sigma(sigma(z))",
            lambda *x: softplus(-numpy.exp(-softplus(-x[4] * margin(*x[:4]))))),
    Suspect("other_loss", "this is max(0, -z): pairs that are ranked correctly count for nothing",
            lambda *x: numpy.maximum(0, -x[4] * margin(*x[:4]))),
    Suspect("other_loss", "this is hinge (SLiC), max(0, 1 - z)",
            lambda *x: numpy.maximum(0, 1 - x[4] * margin(*x[:4]))),
    Suspect("wrong_value", "the minus sign is missing: minimising it makes the chosen responses less likely",
            lambda *x: -softplus(-x[4] * margin(*x[:4]))),
    Suspect("beta_divides", "the whole loss is divided by beta", lambda *x: softplus(-x[4] * margin(*x[:4])) / x[4]),
    Suspect("beta_twice", "the whole loss is multiplied by beta once more",
            lambda *x: softplus(-x[4] * margin(*x[:4])) * x[4]),
    Suspect("wants_logits", "log sigma is taken of each log-probability first, as if it were a logit",
            lambda *x: softplus(-x[4] * margin(*(-softplus(-each) for each in x[:4])))),
    Suspect("wants_logits", "log_softmax over the batch is taken of each log-probability first, as if it were a logit",
            lambda *x: softplus(-x[4] * margin(*(each - numpy.logaddexp.reduce(each) for each in x[:4])))),
    Suspect("wrong_axis", "the softmax runs over the batch, not over chosen and rejected",
            lambda *x: numpy.logaddexp.reduce(x[4] * margin(*x[:4])) - x[4] * margin(*x[:4])),
    Suspect("wrong_axis", "the softmax runs over the batch, not over chosen and rejected",
            lambda *x: numpy.logaddexp.reduce(x[4] * (x[0] - x[2])) - x[4] * (x[0] - x[2])),
    Suspect("wrong_axis", "every chosen response is set against every rejected one: (B, B), not (B,)",
            lambda *x: softplus(-x[4] * ((x[0] - x[2])[:, None] - (x[1] - x[3]))).mean(axis=1)),
    Suspect("wrong_axis", "every chosen response is set against every rejected one, policy and reference apart",
            lambda *x: softplus(-x[4] * ((x[0] - x[1])[:, None] - (x[2] - x[3]))).mean(axis=1)),
    Suspect("other_loss", "this is kto_pair: sigma for log sigma, each log-ratio against the mean of the other side's",
            lambda w, l, rw, rl, beta: numpy.exp(-softplus(-beta * numpy.stack(
                [max((l - rl).mean(), 0) - (w - rw), (l - rl) - max((w - rw).mean(), 0)]))).mean(axis=0)),
    Suspect("wants_logits", "the margin is of probabilities, sigma(z) without a logarithm",
            lambda *x: -numpy.exp(-softplus(-x[4] * margin(*x[:4])))),
]  # fmt: skip


def dpo(*numbers: Any) -> Array:
    """Eq. 7, pair by pair, of the four log-probabilities and beta.  (B,) -> (B,)"""
    return softplus(-numbers[4] * margin(*numbers[:4]))


def random_pairs(rng: numpy.random.Generator, B: int, spread: float = 4.0) -> Logps:
    """Log-probabilities that float32 holds exactly, some of them near 0; ratios to the reference within `spread`."""
    policy = -rng.uniform(0.25, numpy.where(rng.random((2, B)) < 0.3, 2.0, 40.0))
    ref = numpy.minimum(policy + rng.uniform(-spread, spread, (2, B)), -0.125)
    w, l, rw, rl = numpy.round(numpy.concatenate([policy, ref]) * 64) / 64
    for i in range(2 if B > 1 else 0):  # of a batch, the first pair is ranked correctly and the second is not
        if (margin(w, l, rw, rl)[i] > 0) == bool(i):
            w[i], l[i], rw[i], rl[i] = l[i], w[i], rl[i], rw[i]
    return w, l, rw, rl


def pair_of_margin(z: float, beta: float) -> Logps:
    """One pair with beta * margin = z."""
    half = z / beta / 2
    ref = numpy.array([-abs(half) - 2.0])
    return ref + half, ref - half, ref, ref.copy()


class Subject:
    """Somebody's loss, called with our arrays."""

    def __init__(self, fn: Any, framework: Framework, arguments: Any):
        self.fn, self.framework, self.arguments = fn, framework, arguments
        self.names, self.takes_beta = self.signature()

    def signature(self) -> tuple[list[str] | None, bool]:
        """The names of the first four parameters if beta has its own name, and whether the subject takes beta."""
        if self.arguments is not None:
            text = self.arguments if isinstance(self.arguments, str) else ""
            named = self.arguments.values() if isinstance(self.arguments, dict) else ()
            if callable(self.arguments):  # it may leave beta out
                arrays = [self.framework.array(x, "float64") for x in pair_of_margin(1.0, 1.0)]
                return None, repr(self.arguments(*arrays, 0.25)) != repr(self.arguments(*arrays, 0.5))
            return None, "beta" in (*text.replace(" ", "").split(","), *named)
        try:
            parameters = inspect.signature(getattr(self.fn, "forward", self.fn)).parameters
        except (TypeError, ValueError):
            return None, True
        kinds = inspect.Parameter
        usual = [name for name, p in parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        logps = [name for name in usual if "logp" in name or "log_p" in name]
        if (
            len(logps) == 4
            and all(parameters[name].kind == kinds.KEYWORD_ONLY for name in logps)
            and "beta" not in usual
        ):
            return logps, False
        if "beta" in usual and len(usual) >= 5:
            return logps if len(logps) == 4 else [name for name in usual if name != "beta"][:4], True
        starred = any(p.kind == kinds.VAR_POSITIONAL for p in parameters.values())
        positional = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        fifth = positional[4] if len(positional) > 4 else None
        other = fifth and any(word in fifth.name for word in ("mask", "weight", "label", "length", "margin", "target"))
        strength = fifth and (fifth.name in ("tau", "temperature") or "beta" in fifth.name)
        return None, starred or bool(fifth and (strength or (fifth.default is fifth.empty and not other)))

    def __call__(self, arrays: tuple[Any, ...], beta: float) -> Any:
        """What the subject returns for arrays of its framework."""
        five = dict(zip(NAMES, (*arrays, beta)))
        if callable(self.arguments):
            given = self.arguments(*five.values())
            positional, words = given if isinstance(given, tuple) and isinstance(given[-1], dict) else (given, {})
            return self.fn(*positional, **words)
        if isinstance(self.arguments, str):
            return self.fn(*[five[name.strip()] for name in self.arguments.split(",")])
        if isinstance(self.arguments, dict):
            return self.fn(**{theirs: five[ours] for theirs, ours in self.arguments.items()})
        if self.names:
            return self.fn(**dict(zip(self.names, arrays)), **({"beta": beta} if self.takes_beta else {}))
        return self.fn(*arrays, beta) if self.takes_beta else self.fn(*arrays)

    def value(self, logps: Logps, beta: float, dtype: str = "float64") -> Array:
        """The loss, () or (B,), in NumPy."""
        arrays = tuple(self.framework.array(x, dtype) for x in logps)
        return numpy.asarray(self.framework.host(leading(self(arrays, beta))), dtype="float64")

    def mean(self, logps: Logps, beta: float, dtype: str = "float64") -> float:
        """The mean of the loss."""
        return float(self.value(logps, beta, dtype).mean())

    def gradients(self, logps: Logps, beta: float) -> list[Array | None]:
        """The derivatives of the mean in the four inputs."""

        def f(*arrays: Any) -> Any:
            loss = leading(self(arrays, beta))
            return (loss.mean() if hasattr(loss, "mean") else numpy.mean(loss)).reshape(1)

        return self.framework.jacobian(f, logps)[0]


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    found, expected = numpy.asarray(found), numpy.asarray(expected)
    return bool((abs(found - expected) <= tolerance * (1 + abs(expected))).all())


def loss(fn: Any, beta: float = 0.1, framework: str | None = None, arguments: Any = None) -> Report:
    """Check a DPO loss: its value, its gradient and how far out both hold.

    `fn(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)` takes arrays, (B,), of its own framework and returns the mean, a
    value per pair, or something that begins with one. For another signature `arguments` is a text with our names in its
    order, a dict from its names to ours, or a function of our five arguments that returns its arguments. A subject
    without beta holds it: pass its value as `beta`. Without `framework` NumPy is tried first, then what is imported.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, not {beta}")
    report, rng = Report(getattr(fn, "__name__", type(fn).__name__)), numpy.random.default_rng(0)
    base = random_pairs(rng, 5)
    for each in candidates(framework):
        with each.session():
            try:
                subject = Subject(fn, each, arguments)
                subject.value(base, beta)
            except Exception:  # whatever somebody's code raises
                report.failed(each.name)
                continue
            report.traceback = ""
            try:
                _check(subject, report, base, beta, rng)
            except Exception:
                report.failed(each.name)
            break
    if report.traceback:
        report.not_callable("with these arguments: see its traceback, and `arguments`")
    return report


def _check(subject: Subject, report: Report, base: Logps, beta: float, rng: numpy.random.Generator) -> None:
    """Everything that is tried on a loss."""
    report.tried.append(f"{subject.framework.name} arrays")
    arrays = tuple(subject.framework.array(x, "float64") for x in base)
    results = [subject.framework.host(leading(subject(arrays, beta))) for _ in range(3)]
    if any(not close(subject.framework.host(array), x, 0.0) for array, x in zip(arrays, base)):
        report.fault("inputs_changed", "it writes into its arguments")
    elif not all(numpy.array_equal(results[0], again, equal_nan=True) for again in results[1:]):
        report.fault("not_repeatable", "called again with the same numbers it gives another result")
        return
    betas = [beta, 2.5 * beta] if subject.takes_beta else [beta]
    cases = [(random_pairs(rng, B), b) for b in betas for B in (5, 1, 7)]
    cases += [((w, l, w.copy(), l.copy()), b) for b in betas for w, l, _, _ in [random_pairs(rng, 4)]]
    report.tried.append(f"{len(cases)} random batches at beta {' and '.join(f'{b:g}' for b in betas)}")
    found = [subject.value(logps, b) for logps, b in cases]
    expected = [dpo(*logps, b).mean() for logps, b in cases]
    ordinary = all(close(y.mean(), e) for y, e in zip(found, expected))
    capped = _far_out(subject, report, beta)
    if not ordinary and not capped:
        _name(subject, report, cases, found, expected, betas, rng)
    if ordinary:
        _narrow(subject, report, cases, beta)
    _gradient(subject, report, base, beta, check=ordinary)
    report.findings.sort(key=lambda each: {"unstable": 1, "wrong_value": 2, "wrong_gradient": 2}.get(each.code, 0))
    _rewards(subject, report, base, beta)


def _far_out(subject: Subject, report: Report, beta: float) -> bool:
    """Single pairs at large |z|; returns whether the loss is Eq. 7 near 0 and constant below."""
    report.tried.append("z = 0 to +-2000 in float64 and float32")
    capped = False
    for dtype in ("float64", "float32"):
        pairs = [tuple(numpy.asarray(x, dtype).astype("float64") for x in pair_of_margin(z, beta)) for z in FAR]
        found = [subject.mean(logps, beta, dtype) for logps in pairs]
        expected = [float(dpo(*logps, beta)[0]) for logps in pairs]
        lost = next((i for i, y in enumerate(found) if not math.isfinite(y)), None)
        if lost is not None:
            report.fault(
                "unstable", f"at z = {FAR[lost]:g} in {dtype} it is {found[lost]}", expected[lost], found[lost]
            )
            break
        near = all(close(y, e) for y, e, z in zip(found, expected, FAR) if abs(z) < 0.5)
        if near and not close(found[-1], expected[-1]):
            if close(found[-1], found[-3]):
                capped = True
                report.fault(
                    "capped", f"it never exceeds {found[-1]:.4g}, so the gradient of the worst pairs is lost",
                    expected[-1], found[-1],
                )  # fmt: skip
            elif not close(found[-1], expected[-1], 1e-2):
                report.fault("unstable", f"at z = {FAR[-1]:g} in {dtype} it is wrong", expected[-1], found[-1])
            break
    return capped


def _name(
    subject: Subject, report: Report, cases: list[tuple[Logps, float]], found: list[Array], expected: list[Any],
    betas: list[float], rng: numpy.random.Generator,
) -> None:  # fmt: skip
    """Find which wrong loss this is."""
    worst = next(i for i, (y, e) in enumerate(zip(found, expected)) if not close(y.mean(), e))
    numbers = {"expected": float(expected[worst]), "found": float(found[worst].mean())}
    if any(y.ndim > 1 and y.size != len(logps[0]) for y, (logps, _) in zip(found, cases)):
        shape = next(y.shape for y in found if y.ndim > 1)
        report.fault("wrong_axis", f"it returns {shape}, one number for every chosen with every rejected", **numbers)
        return

    def equal(suspect: Callable[..., Any], total: bool = False) -> bool:
        with numpy.errstate(all="ignore"):
            values = [numpy.asarray(suspect(*logps, b)) for logps, b in cases]
        return all(close(y.mean(), v.sum() if total else v.mean()) for y, v in zip(found, values))

    if equal(dpo, total=True):
        report.fault("sum_over_batch", "it is the sum over the pairs, not the mean: it grows with the batch", **numbers)
        return
    for code, sentence, suspect in SUSPECTS:
        for total in (False, True):
            if equal(suspect, total):
                report.fault(code, sentence, **numbers)
                if total:
                    report.fault("sum_over_batch", "it is the sum over the pairs, not the mean", **numbers)
                return
    if _probabilities(subject, report, betas[0], rng, numbers):
        return
    logps, b = cases[0]
    apart = numpy.array([subject.mean(tuple(x[i : i + 1] for x in logps), b) for i in range(len(logps[0]))])
    coupled = not close(found[0].mean(), apart.mean()) and not close(found[0].mean(), apart.sum())
    if not coupled and (
        _linear(subject, report, betas, rng, numbers) or _smoothed(subject, report, cases, found, numbers)
    ):
        if close(found[0].mean(), apart.sum()):
            report.fault("sum_over_batch", "it is the sum over the pairs, not the mean", **numbers)
        return
    for name, known in losses.LOSSES.items():
        parameters = inspect.signature(known).parameters
        if name == "dpo" or any(p.default is p.empty and n not in NAMES for n, p in parameters.items()):
            continue
        given = [{n: x for n, x in zip(NAMES, (*logps, b)) if n in parameters} for logps, b in cases]
        try:
            values = [float(known(**each).loss.data) for each in given]
        except (ValueError, TypeError):  # a loss that needs more than four numbers
            continue
        offset = found[0].mean() - values[0]  # a constant has no gradient
        if all(close(y.mean() - offset, v) for y, v in zip(found, values)):
            plus = "" if close(offset, 0.0) else f", plus {offset:.4g}"
            report.fault("other_loss", f"this is the loss {name!r}, at beta = {betas[0]:g}{plus}", **numbers)
            return
    if coupled:
        report.fault("pairs_coupled", "a batch's loss is not the mean of its pairs' losses: they affect each other",
                     float(apart.mean()), float(found[0].mean()))  # fmt: skip
        return
    report.fault("wrong_value", "it is not the DPO loss, nor any that is known here", **numbers)


def _probabilities(
    subject: Subject, report: Report, beta: float, rng: numpy.random.Generator, numbers: dict[str, float]
) -> bool:
    """Whether the subject is right if it is given probabilities."""
    small = tuple(numpy.maximum(x / 16, -3.0) for x in random_pairs(rng, 5))
    if close(subject.mean(tuple(map(numpy.exp, small)), beta), dpo(*small, beta).mean()):
        report.fault("wants_probabilities", "it is right for probabilities: it takes their logarithm itself", **numbers)
        return True
    return False


def _linear(
    subject: Subject, report: Report, betas: list[float], rng: numpy.random.Generator, numbers: dict[str, float]
) -> bool:
    """Name a loss -log sigma(a_w logp_w + a_l logp_l + a_rw ref_logp_w + a_rl ref_logp_l + c) by its coefficients."""
    fits = []
    for beta in betas:
        pairs = [random_pairs(rng, 1, spread=0.5 if i % 2 else 2.0) for i in range(24)]
        values = numpy.array([subject.mean(logps, beta) for logps in pairs])
        kept = numpy.isfinite(values) & (values > 1e-9) & (values < 600)
        if kept.sum() < 8:
            return False
        z = -(values[kept] + numpy.log(-numpy.expm1(-values[kept])))  # the z of -log sigma(z)
        inputs = numpy.array([[*(x[0] for x in logps), 1.0] for logps in pairs])[kept]
        fit, *_ = numpy.linalg.lstsq(inputs, z)
        if not close(inputs @ fit, z, 1e-4):
            return _positive(inputs.T[:4], z, beta, report, numbers)
        fits.append(fit)
    pattern, tolerance = numpy.array([1.0, -1.0, -1.0, 1.0]), 1e-3
    a, c, beta = fits[0][:4], fits[0][4], betas[0]

    def proportional(pattern: Array) -> float | None:
        scale = float(a @ pattern / (pattern @ pattern))
        return scale if abs(a - scale * pattern).max() <= tolerance * max(abs(a).max(), 1e-9) else None

    def fault(code: str, sentence: str) -> bool:
        report.fault(code, sentence, **numbers)
        return True

    if abs(a).max() < 1e-6 * beta and abs(c) < 1e-6:
        return fault("reference_is_policy", "it is log 2 whatever it is given: policy and reference cancel")
    if abs(c) > 1e-3:
        return (
            fault("other_loss", f"{-c:.4g} is subtracted from z: a target margin") if proportional(pattern) else False
        )
    if (scale := proportional(pattern)) is not None:
        if len(fits) > 1 and close(fits[1][:4], a, 1e-3):
            if close(abs(scale), 1.0, 1e-3):
                return fault("beta_missing" if scale > 0 else "pair_swapped", "the margin is not multiplied by beta")
            return fault("beta_ignored", f"whatever beta it is given, it computes with {abs(scale):.4g}")
        for code, sentence, factor in (
            ("pair_swapped", "chosen and rejected are swapped; so it is if policy and reference are, or if it wants "
             "negative log-probabilities: all three are the same function", -beta),
            ("beta_missing", "the margin is not multiplied by beta", 1.0),
            ("beta_twice", "the margin is multiplied by beta twice", beta * beta),
            ("beta_divides", "the margin is divided by beta", 1 / beta),
        ):  # fmt: skip
            if close(scale / factor, 1.0, 1e-3):
                return fault(code, sentence)
            if close(scale / factor, -1.0, 1e-3) and code != "pair_swapped":
                return fault(code, sentence) and fault("pair_swapped", "chosen and rejected are swapped, too")
        if close(scale / beta, 1.0, 1e-3):  # right for one pair
            return False
        return fault("wrong_value", f"the margin is multiplied by {scale:.4g}, not by beta = {beta:g}")
    if (scale := proportional(numpy.array([1.0, -1.0, 0.0, 0.0]))) is not None:
        fault("reference_ignored", "the reference's log-probabilities do not enter")
        return not close(scale * beta, 1.0, 1e-3) or fault("beta_divides", "the margin is divided by beta")
    if proportional(numpy.array([0.0, 0.0, 1.0, -1.0])) is not None:
        return fault("wrong_value", "the policy's log-probabilities do not enter")
    words = ", ".join(f"{x / beta:.3g} {name}" for x, name in zip(a, NAMES))
    return fault("wrong_value", f"z is beta times ({words}), not logp_w - logp_l - ref_logp_w + ref_logp_l")


def _positive(logps: Array, z: Array, beta: float, report: Report, numbers: dict[str, float]) -> bool:
    """Whether z = beta (margin - penalty max(0, ref_logp_w - logp_w)), as in DPO-positive."""
    below, gap = numpy.maximum(0, logps[2] - logps[0]), beta * margin(*logps) - z
    penalty = float(below @ gap / (below @ below)) if below.any() else 0.0
    if penalty <= 0 or not close(penalty * below, gap, 1e-4):
        return False
    report.fault("other_loss", f"this is the loss 'dpop', with a penalty of {penalty / beta:.4g}", **numbers)
    return True


def _smoothed(
    subject: Subject, report: Report, cases: list[tuple[Logps, float]], found: list[Array], numbers: dict[str, float]
) -> bool:
    """Whether -(1 - e) log sigma(z) - e log sigma(-z) fits with one e."""
    rows = [(float(y.mean() - dpo(*x, b).mean()), float(b * margin(*x).mean())) for y, (x, b) in zip(found, cases)]
    excess, z = max(rows, key=lambda row: abs(row[1]))
    e = excess / z
    if 0 < abs(e) < 1 and all(close(y, e * z, 1e-5) for y, z in rows):
        if e > 0:
            report.fault(
                "label_smoothing", f"labels are smoothed, with {e:.4g}: a target of its own, not Eq. 7", **numbers
            )
            return True
        report.fault("other_loss", f"this is robust DPO, with a flip rate of {-e / (1 - 2 * e):.4g}", **numbers)
        return True
    return False


def _narrow(subject: Subject, report: Report, cases: list[tuple[Logps, float]], beta: float) -> None:
    """The same batches in float32; and whether half precision keeps the loss finite."""
    for logps, b in cases:
        y, e = subject.mean(logps, b, "float32"), float(dpo(*logps, b).mean())
        if not close(y, e, 2e-6):
            report.fault("wrong_value", "it is right in float64 and wrong in float32", e, y)
            return
    for dtype in ("float16", "bfloat16") if subject.framework.name != "numpy" else ("float16",):
        half = tuple(-abs(x) for x in pair_of_margin(-60.0, max(beta, 0.05)))
        try:
            value = subject.mean(half, max(beta, 0.05), dtype) if subject.takes_beta or beta >= 0.05 else 0.0
        except Exception:  # a type that the subject does not take
            continue
        if not math.isfinite(value):
            report.remark("not_stable_in_half_precision", f"at z = -60 in {dtype} it is {value}")


def _gradient(subject: Subject, report: Report, base: Logps, beta: float, check: bool) -> None:
    """The gradient in the four inputs, by the framework's autograd, against the closed form."""
    report.tried.append("gradient in all four inputs")
    found = subject.gradients(base, beta)
    zero = [g is None or not numpy.any(g) for g in found]
    codes = {finding.code for finding in report.findings}
    if zero[0] and zero[1] and not codes & {"wants_probabilities", "other_loss", "capped", "unstable", "wrong_value"}:
        report.fault("no_gradient", "no gradient reaches the policy's log-probabilities: was it run without a graph?")
        return
    if not check or "unstable" in codes:
        return
    w, l = losses.dpo_gradient(*base, beta)
    for name, g, right in zip(NAMES, found, (w, l, -w, -l)):
        g = numpy.zeros_like(right) if g is None else g
        optional = name.startswith("ref") and not numpy.any(g)
        if optional or close(g, right, 1e-5 if subject.framework.name == "numpy" else TOLERANCE):
            continue
        ratio = g @ right / (right @ right)
        factor = f": it is {ratio:.4g} times the gradient" if close(g, ratio * right, 1e-6) else ""
        report.fault("wrong_gradient", f"dL/d{name} is not that of Eq. 7{factor}", right.tolist(), g.tolist())
    if subject.framework.name != "numpy" and "wrong_gradient" not in {finding.code for finding in report.findings}:
        w, l, rw, rl = (numpy.concatenate(each) for each in zip(*(pair_of_margin(z, beta) for z in FAR)))
        far = subject.gradients((w, l, rw, rl), beta)[0]
        right, _ = losses.dpo_gradient(w, l, rw, rl, beta)
        off = [] if far is None else [i for i, z in enumerate(FAR) if not close(far[i], right[i])]
        if off and far is not None:
            report.fault("unstable", f"its gradient at z = {FAR[off[0]]:g} is wrong", right[off[0]], float(far[off[0]]))


def _rewards(subject: Subject, report: Report, base: Logps, beta: float) -> None:
    """The rewards beside a loss: multiplied by beta, and no part of the graph."""
    leaves = tuple(subject.framework.array(x, "float64") for x in base)
    for leaf in leaves[:2]:
        if hasattr(leaf, "requires_grad_"):
            leaf.requires_grad_()
    result = subject(leaves, beta)
    entries = list(result.values()) if isinstance(result, dict) else list(getattr(result, "__dict__", {}).values())
    entries = list(result) if isinstance(result, tuple) else entries
    for entry in entries[1:] if len(entries) >= 3 else []:
        if getattr(entry, "shape", None) != base[0].shape:
            continue
        y = subject.framework.host(entry)
        for ratio in (base[0] - base[2], base[1] - base[3]):
            if close(y, ratio) and not close(y, beta * ratio):
                report.remark("rewards_without_beta", "a reward is returned without its factor beta")
            if (close(y, ratio) or close(y, beta * ratio)) and subject.framework.in_graph(entry):
                report.remark("rewards_have_gradient", "a reward is returned with its graph: detach it")
