"""Somebody's whole DPO step, from models and a batch to the loss, against Eq. 7 and its gradient in the logits."""

import math
from collections.abc import Callable
from typing import Any

import numpy

from ..backend import Array
from ..losses import dpo_gradient
from .cells import Cells, cells, diagnose
from .frameworks import Framework, leading
from .logprob_check import SIZES, traced
from .loss_check import SUSPECTS, close, dpo
from .report import Report, run
from .texts import EOS, Model, NeverSeen, Texts, distinct, located, module, settle

VOCABULARY = 29  # small, for those whose derivatives are differences
REJECTED = (2, 5, 3, 6)  # lengths of the rejected responses to the prompts of SIZES


def pairs(rng: numpy.random.Generator, count: int) -> tuple[Texts, Texts]:
    """Chosen and rejected texts to the same prompts; no token occurs twice in a text."""
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    prompts = []
    for (n, m), other in list(zip(SIZES, REJECTED))[:count]:
        tokens = distinct(rng, n + m + other - 2, VOCABULARY)
        prompts.append(tokens[:n])
        sides[0].append([*tokens[n : n + m - 1], EOS])
        sides[1].append([*tokens[n + m - 1 :], EOS])
    return Texts(prompts, sides[0], VOCABULARY - 1), Texts(prompts, sides[1], VOCABULARY - 1)


def batch_of(sides: tuple[Texts, Texts], framework: Framework) -> dict[str, Any]:
    """A batch under the names that are usual."""
    batch: dict[str, Any] = {}
    for side, texts in zip(("chosen", "rejected"), sides):
        real = (numpy.arange(texts.ids.shape[1]) < texts.lengths[:, None]).astype("int64")
        for name, x in (("ids", texts.ids), ("mask", texts.mask), ("input_ids", texts.ids), ("attention_mask", real),
                        ("labels", texts.labels), ("lengths", texts.lengths)):  # fmt: skip
            batch[f"{side}_{name}"] = framework.array(x)
    batch["prompt_lengths"] = framework.array(sides[0].prompt_lengths)
    return batch


def step(fn: Any, beta: float = 0.1, framework: str | None = None) -> Report:
    """Check `fn(policy, reference, batch, beta) -> loss`, with models and a batch of ours.

    `policy(ids)`, (B, T), gives logits, (B, T, V), as they are, as `.logits` or in a pair (logits, loss), whichever fn
    takes; in PyTorch it is a torch.nn.Module. fn may run backward itself. `batch` is a dict with, for
    chosen and for rejected, `chosen_ids` (also as `chosen_input_ids`), `chosen_mask` (1 at the response's tokens),
    `chosen_attention_mask` (1 at all but pads), `chosen_labels` (-100 where nothing counts) and `chosen_lengths`; and
    `prompt_lengths`. The gradient is compared in the logits: how a model hands it on is its framework's work.
    """
    report = Report(getattr(fn, "__name__", type(fn).__name__))
    how = "as fn(policy, reference, batch, beta): see its traceback"

    def check(each: Framework) -> None:
        try:
            _check(fn, each, beta, report)
        except NeverSeen as error:
            report.fault("wrong_value", str(error))

    run(report, framework, check, how)
    return report


def _check(fn: Any, framework: Framework, beta: float, report: Report) -> None:
    """Everything that is tried on a step."""
    sides = pairs(numpy.random.default_rng(1), 4)
    policy, reference = models = (
        Model(framework, 21, vocabulary=VOCABULARY),
        Model(framework, 22, vocabulary=VOCABULARY),
    )
    bodies = module(policy), module(reference)
    weights = [_weights(body, i + 1.0) for i, body in enumerate(bodies)]

    def call(batch: Any = None) -> Any:
        return fn(*bodies, batch or batch_of(sides, framework), beta)

    settle(call, models)
    report.tried += [f"{framework.name}: a batch of four pairs, three times", "gradient in the logits of both models"]
    batch, values = batch_of(sides, framework), []
    for _ in range(3):
        for model in models:
            model.calls.clear()
        values.append(float(numpy.mean(framework.host(leading(call(dict(batch)))))))
    fresh, host = batch_of(sides, framework), framework.host
    changed = [name for name in fresh if not numpy.array_equal(host(fresh[name]), host(batch.get(name, 0)))]
    if changed:
        report.fault("inputs_changed", f"it writes into the batch's {changed[0]}: the next use of the batch is another")
        values = [float(numpy.mean(host(leading(call())))) for _ in range(2)]
    if [_weights(body) for body in bodies] != weights:
        same = len({tuple(_weights(body)) for body in bodies}) < 2 and weights[0] != weights[1]
        report.fault("reference_is_policy" if same else "inputs_changed", "it writes into the weights of a model")
        return
    if not close(values, values[0], 1e-9):
        report.fault("not_repeatable", "called again on the same batch it gives another loss", values[0], values[1])
        return
    _, rows = traced(call, models)
    value, row = values[0], rows[0] if rows else []
    own = len(policy.calls)
    gradients, of_reference = row[:own], row[own:]
    if not policy.calls:
        report.fault("wrong_value", "the policy is never called", None, value)
        return
    if not reference.calls:
        constant = close(value, math.log(2))
        report.fault("reference_is_policy" if constant else "reference_ignored",
                     "the reference is never called" + (": the policy stands in for it" if constant else ""),
                     None, value)  # fmt: skip
        return
    wanted = [[{(len(x) - 1 + t, v): 1.0 for t, v in enumerate(y)} for x, y in zip(each.prompts, each.responses)]
              for each in sides]  # fmt: skip
    numbers = _scores(sides, models, wanted, mean=False)
    expected = float(dpo(*numbers, beta).mean())
    if framework.name == "torch" and any(g is not None and g.any() for g in of_reference):
        report.fault("reference_gets_gradient", "a gradient reaches the reference model: score it without a graph")
    if not any(g is not None and g.any() for g in gradients):  # it may have run backward itself
        gradients = [getattr(logits, "grad", None) for _, _, logits in policy.calls]
        gradients = [None if g is None else framework.host(g) for g in gradients]
    if not any(g is not None and g.any() for g in gradients):
        if framework.name == "numpy" or close(value, expected):
            report.fault("no_gradient", "no gradient reaches the policy's logits: was it run without a graph?")
        else:
            report.fault("no_gradient", "no gradient reaches the policy's logits", expected, value)
        return
    counted = [_counted(texts, policy, gradients) for texts in sides]
    if any(each is None for each in counted):
        report.fault("wrong_value", "its gradient is not that of log-probabilities of these texts", expected, value)
        return
    found = [each for each in counted if each is not None]
    _explain(report, sides, models, found, value, expected, numbers, beta)
    if not report.findings:
        _parts(fn, sides, models, bodies, value, beta, report)


def _weights(body: Any, start: float | None = None) -> list[float]:
    """The weights of a module; with `start`, set them first."""
    found = []
    for p in body.parameters() if hasattr(body, "parameters") else ():
        if start is not None:
            p.data.fill_(start)
        found += p.detach().reshape(-1).tolist()
    return found


def _counted(texts: Texts, policy: Model, gradients: list[Array | None]) -> list[Cells] | None:
    """The cells of each text, with the weights of the loss; None if some gradient is no sum of log-probabilities."""
    result: list[Cells] = []
    for x, y in zip(texts.prompts, texts.responses):
        try:
            call, b, start = located(x + y, policy)
        except NeverSeen:
            return None
        gradient = gradients[call]
        if gradient is None:
            result.append({})
            continue
        found, fault = cells(gradient[b] * 1e3, policy.calls[call][1][b])
        if fault:
            return None
        result.append({(t - start, v): weight / 1e3 for (t, v), weight in found.items()})
    return result


def _explain(
    report: Report, sides: tuple[Texts, Texts], models: tuple[Model, Model], counted: list[list[Cells]], value: float,
    expected: float, numbers: tuple[Array, ...], beta: float,
) -> None:  # fmt: skip
    """Name what is wrong with the scores, then with the loss of these scores."""
    for side, texts, found in zip(("chosen", "rejected"), sides, counted):
        plain = [{cell: 1.0 for cell in each} for each in found]
        if not all(found):
            report.fault("wrong_gradient", f"no gradient reaches the {side} responses of some pairs", expected, value)
            return
        own = Report(side)
        diagnose(own, texts, plain)
        for finding in own.findings:
            report.fault(finding.code, f"{side}: {finding.sentence}", finding.expected, finding.found)
        for remark in own.remarks:
            report.remark(remark.code, f"{side}: {remark.sentence}")
    one_sided = [side for side, texts, found in zip(("chosen", "rejected"), sides, counted) if _prompts(texts, found)]
    if len(one_sided) == 1:
        report.remarks.clear()
        report.fault(
            "prompt_counted_on_one_side", f"the prompt is counted in the {one_sided[0]} texts alone", expected, value
        )
    scores = _scores(sides, models, counted, mean=False)
    if close(value, expected) and not report.findings:
        _coefficients(report, counted, numbers, beta)
        return
    if close(value, dpo(*scores, beta).mean()):
        if not report.findings:
            report.fault("wrong_value", "its value is not that of its gradient", expected, value)
        return
    for code, sentence, suspect in [
        ("mean_for_sum", "it is Eq. 7 of means over tokens, not of sums",
         lambda *x: dpo(*_scores(sides, models, counted, mean=True), x[4])),
        ("sum_over_batch", "it is the sum over the pairs, not the mean", lambda *x: dpo(*x) * len(x[0])),
        ("pair_swapped", "chosen and rejected are swapped, or policy and reference", lambda *x: dpo(*x[:4], -x[4])),
        ("beta_missing", "the margin is not multiplied by beta", lambda *x: dpo(*x[:4], 1.0)),
        ("beta_twice", "the margin is multiplied by beta twice", lambda *x: dpo(*x[:4], x[4] ** 2)),
        ("beta_divides", "the margin is divided by beta", lambda *x: dpo(*x[:4], 1 / x[4])),
        ("reference_ignored", "the reference's scores do not enter",
         lambda *x: dpo(x[0], x[1], 0 * x[2], 0 * x[3], x[4])),
        ("reference_is_policy", "it is log 2 whatever the models are", lambda *x: math.log(2) + 0 * x[0]),
        *SUSPECTS,
    ]:  # fmt: skip
        with numpy.errstate(all="ignore"):
            if close(value, numpy.mean(suspect(*scores, beta))):
                report.fault(code, sentence, expected, value)
                return
    factor = value / expected
    if close(_weights_of(counted), factor * _weights_of_eq7(numbers, beta), 1e-4):
        report.fault("wrong_value", f"value and gradient are those of Eq. 7 times {factor:.4g}: if it is divided by a "
                     "number of micro-batches, only their sum is right", expected, value)  # fmt: skip
        return
    report.fault("wrong_value", "its value is not that of Eq. 7", expected, value)


def _prompts(texts: Texts, counted: list[Cells]) -> bool:
    """Whether tokens of the prompts are counted."""
    return any(v in x[1:] for x, found in zip(texts.prompts, counted) for _, v in found)


def _scores(
    sides: tuple[Texts, Texts], models: tuple[Model, Model], counted: list[list[Cells]], mean: bool
) -> tuple[Array, Array, Array, Array]:
    """The four scores, of the cells that were counted, under the logits that the subject was given."""
    scores = []
    for model in models:
        for texts, cells_of in zip(sides, counted):
            totals = []
            for x, y, found in zip(texts.prompts, texts.responses, cells_of):
                call, b, start = located(x + y, model)
                logits = model.calls[call][1][b, start:]
                logp = logits - numpy.logaddexp.reduce(logits, axis=-1, keepdims=True)
                parts = [logp[t, v] for t, v in found if 0 <= t < len(logp)]
                totals.append(sum(parts) / (max(1, len(found)) if mean else 1))
            scores.append(numpy.array(totals))
    w, l, rw, rl = scores
    return w, l, rw, rl


def _weights_of(counted: list[list[Cells]]) -> Array:
    """dL/dlog pi of each chosen and each rejected text, from its cells.  (2, B)"""
    return numpy.array([[numpy.median(list(each.values())) for each in side] for side in counted])


def _weights_of_eq7(numbers: tuple[Array, ...], beta: float) -> Array:
    """The same of Eq. 7: -+(beta/B) sigma(-z).  (2, B)"""
    return numpy.stack(dpo_gradient(*numbers, beta))


def _coefficients(report: Report, counted: list[list[Cells]], numbers: tuple[Array, ...], beta: float) -> None:
    """Whether each text's log-probability enters with the weight of Eq. 7's gradient."""
    for name, found, right in zip(("chosen", "rejected"), _weights_of(counted), _weights_of_eq7(numbers, beta)):
        if not close(found / beta, right / beta, 1e-4):
            report.fault("wrong_gradient", f"the value is right and dL/dlog pi({name}) is not", right.tolist(),
                         found.tolist())  # fmt: skip


def _parts(
    fn: Callable[..., Any], sides: tuple[Texts, Texts], models: tuple[Model, Model], bodies: tuple[Any, Any],
    value: float, beta: float, report: Report,
) -> None:  # fmt: skip
    """Two parts of unequal size, weighted by their sizes, give the whole."""
    framework, losses = models[0].framework, []
    for part in (slice(0, 1), slice(1, 4)):
        some = tuple(Texts(each.prompts[part], each.responses[part], each.pad) for each in sides)
        y = framework.host(leading(fn(*bodies, batch_of((some[0], some[1]), framework), beta)))
        losses.append(float(numpy.mean(y)))
    together = (losses[0] + 3 * losses[1]) / 4
    report.tried.append("one pair and three, weighted by their number, against all four")
    if not close(together, value):
        report.fault(
            "wrong_value", "parts of the batch, weighted by their sizes, do not add up to the whole", value, together
        )
