"""The numbers that correct common claims are correct themselves.

They are written here to the digits that we document. The script computes them.
"""

import importlib.util
import math
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "tutorials" / "errata.py"
IDS = [f"E{n}" for n in range(1, 30)]
ZERO, ONE = (-1e-10, 1e-10), (1 - 1e-10, 1 + 1e-10)
POSITIVE, NEGATIVE = (1e-3, math.inf), (-math.inf, -1e-3)

# A string is a number that must agree in all its digits; a tuple is a pair of bounds.
EXPECTED = {
    "E1": {
        "margin at the optimum, beta 0.01": "170",
        "margin at the optimum, beta 0.1": "17",
        "margin at the optimum, beta 0.5": "3.4",
        "margin at t = 10, beta 0.01": "0.10",
        "margin at t = 10, beta 0.1": "0.98",
        "margin at t = 10, beta 0.5": "3.01",
        "margin at t = 100, beta 0.01": "1.0",
        "margin at t = 100, beta 0.1": "7.9",
        "margin at t = 100, beta 0.5": "7.7",
        "margin at t = 1000, beta 0.01": "9.8",
        "margin at t = 1000, beta 0.1": "29.0",
        "margin at t = 1000, beta 0.5": "12.4",
        "margin at t = 10000, beta 0.01": "79",
        "margin at t = 10000, beta 0.1": "53",
        "margin at t = 10000, beta 0.5": "17",
        "beta 0.5 and 0.1 cross at t": "95",
        "beta 0.1 and 0.01 cross at t": (5235, 5245),
    },
    "E2": {
        "ratio with a reference": "77",
        "ratio without": "77",
        'gain of "the" in 50000 places': "52.5",
        'gain of "Paris" in 10 places': "0.811",
        "cosine of a pair's gradients under two references": ONE,
        "ratio of their lengths over ratio of the weights sigma(-z)": ONE,
        "dL/dlogp of a filler token that both responses share": ZERO,
    },
    "E3": {"margin": "-0.525", "loss": "0.990", "dL/dlogp_w": "-0.628", "dL/dlogp_w at margin 0": "-0.500"},
    "E4": {
        "p0": "0.0459",
        "p1": "0.8348",
        "p2": "0.0685",
        "p3": "0.0508",
        "sum": ONE,
        "sum of the given row": "0.974",
    },
    "E5": {
        "row 1, token 0": "-0.134",
        "row 1, token 1": "-2.634",
        "row 1, token 2": "-2.934",
        "row 2, token 0": "-3.968",
        "row 2, token 1": "-0.068",
        "row 2, token 2": "-3.068",
        "total": "-0.201",
    },
    "E6": {"sigma(1.7)": "0.8455", "sigma(-1.7)": "0.154"},
    "E7": {"z": "0.300", "loss": "0.5544"},
    "E8": {
        "slope of -log P with respect to z, P = 0.01": "0.99",
        "slope of 1 - P with respect to z, P = 0.01": "0.0099",
        "slope of -log P with respect to z, z = -100": ONE,
        "slope of the DPO loss with respect to the margin, margin = -1000, beta 0.1": "0.1000000000",
    },
    "E9": {
        "reward of 10 tokens, each 0.02 nats likelier than under the reference": "0.0200000000",
        "reward of 100 tokens, each 0.02 nats likelier than under the reference": "0.2000000000",
    },
    "E10": {
        "responses in all": "85",
        "sum of all probabilities after 20 steps without a reference": ONE,
        "responses that became likelier": (1, 84),
        "responses that became less likely": (1, 84),
        "change of the loss if both log-probs fall by 5, without a reference": ZERO,
        "the same with a reference": ZERO,
    },
    "E11": {
        "loss, beta 0.1": "0.6256",
        "P, beta 0.1": "0.535",
        "loss at the start": "0.6931",
        "loss, beta 0.5": "0.4032",
    },
    "E12": {
        "weights alone, four models": "56",
        "weights alone, two models": "28",
        "PPO, a critic of its own": "252",
        "PPO, critic head": "140",
        "DPO": "126",
        "DPO, cached reference": "112",
    },
    "E13": {
        "distance (TV) of the DPO fit on pairs labelled by an arbitrary reward from the RLHF optimum": ZERO,
        "z that a soft label of 0.7 asks for": "0.8473",  # log(0.7/0.3)
        "sum of the probabilities of all rankings of three (Plackett-Luce)": ONE,
        "slope of -log sigma(beta log_ratio) for a single response marked good, log_ratio 0": "-0.0500000000",
    },
    "E14": {
        "loss without a reference, log-probs -10 and -15, beta 0.1": "0.4741",  # log(1 + e^-0.5)
        "DPO loss, reference -20 and -20": "0.4741",
        "distance (TV) of the two optima on six responses, beta 1": POSITIVE,
    },
    "E15": {
        "distance (TV) of the DPO minimiser from the RLHF optimum, exact Bradley-Terry labels, beta 1": ZERO,
        # gradient flow, z + e^z = 1 + 2 beta^2 t with z = beta * margin, gives 5.3, 7.6, 9.9 and 29, 53: ever larger
        "certain label, beta 1: margin after 100 steps": (5.0, 5.6),
        "certain label, beta 1: margin after 1000 steps": (7.4, 7.8),
        "certain label, beta 1: margin after 10000 steps": (9.7, 10.1),
        "certain label, beta 0.1: margin after 1000 steps": "29",
        "certain label, beta 0.1: margin after 10000 steps": "53",
        "a chain of three responses, two labels, has a finite minimiser (1 yes, 0 no)": "0",
        "a cycle of three has one": "1",
        "two such cycles that no label links have one": "1",
        "cycle: largest margin after 200 steps": ZERO,
        "cycle: loss there": "0.6931",
    },
    "E16": {
        "dL/dlogp_w": "-0.0426",  # -0.1 sigma(-0.3)
        "dL/dlogp_l": "0.0426",
        "three words: change of logp(chosen)": NEGATIVE,
        "of logp(rejected)": NEGATIVE,
        "of the margin": POSITIVE,
        "mean of log(pi/pi_ref) over pi_ref, a random policy": NEGATIVE,
        "the same plus KL(pi_ref || pi)": ZERO,
    },
    "E17": {
        "reward at step 0, no dropout": (0, 0),
        "share of 500 dropout masks (rate 0.1) whose reward is not 0": (0.5, 1),
        "mean size of the reward under them": POSITIVE,
    },
    "E18": {
        "sum over all responses of exp(score): one text, every token scored": ONE,
        "a pad scored": (0, 0.99),
        "end-of-text not scored": (1.01, math.inf),
        "two prompt lengths, sliced at one: row 1 off by (nats)": ZERO,
        "row 2 off by": (0.01, math.inf),
        "with a mask and the length of each prompt: off by": ZERO,
    },
    "E19": {"accuracy": "0", "share of ties": "1", "loss": "0.6931"},
    "E20": {"words": "6", "7 log 0.9": "-0.7375"},
    "E21": {
        "reward_w": "0.0015000000",
        "reward_l": "-0.0010000000",
        "P": "0.5006",
        "loss": "0.6919",
        "reward_w at the start": (0, 0),
        "reward_l at the start": (0, 0),
    },
    "E22": {
        "loss, policy gap 2, reference gap 2": "0.6931",
        "loss, policy gap 2, reference gap 42": "4.0181",  # log(1 + e^4)
        "loss, policy gap 42, reference gap 2": "0.0181",  # log(1 + e^-4)
    },
    "E23": {
        "loss": "0.6931",
        "length of the gradient": POSITIVE,
        "off from -(beta/2)(grad logp_w - grad logp_l) by": ZERO,
    },
    "E24": {
        "loss with sums": POSITIVE,
        "loss with means": POSITIVE,
        "cosine of the two gradients": (-1, 0.99),
        "a shared first token not scored: change of loss and gradient, sums": ZERO,
        "the same, means": POSITIVE,
    },
    "E25": {"prompt scored too: change of loss and gradient, sums": ZERO, "the same, means": POSITIVE},
    "E26": {
        "replies of the desk to one request": "750",
        "replies with the highest reward": "12",  # two polite openers, two offers, three closers
        "pi* at beta 0.2: probability of these together": "0.988",
        "of the likeliest alone": "0.099",
        "replies that are as many as pi* is spread over, e^entropy": "12.8",
        "largest change of the odds between two of the best, pi* against pi_ref, nats": ZERO,
    },
    "E27": {
        "share of well-formed replies, SFT": "0.98",
        "DPO at beta 0.1, after 200 steps": "0.46",
        "DPO without a reference": "0.49",
        "DPO with the reference, where validation would stop": "0.46",
        "DPO with the reference, beta 1": "0.95",
        "DPO with the reference, beta 0.1, and an NLL term": "0.96",
    },
    "E28": {
        "DPO loss of a pair, policy .6, .2 and .2 for a third reply": "0.6642",  # log(1 + e^-0.1 log(3/(5/3)))
        "the same, policy .006, .002 and .992 for the third": "0.6642",
        "KL to the reference, first policy": "0.028",
        "KL to the reference, second policy": "1.552",
        "objective of RLHF, E[r] - beta KL, first policy": "0.197",  # .6 - .4 - .0028
        "objective of RLHF, second policy": "-2.133",
    },
    "E29": {
        "runs of DPO, five betas and three seeds": "15",
        "those that end below their SFT model in true reward": "7",
        "those that are below it where validation would stop": "7",
        "standard deviation of the true reward over seeds, DPO": "0.91",
        "DPO with an NLL term": "0.15",
        "PPO with a learned reward": "0.06",
        "PPO with the true reward": "0.14",
        "PPO with a learned reward, beta 0.02": "0.55",
    },
}


@pytest.fixture(scope="module")
def errata():
    spec = importlib.util.spec_from_file_location("errata", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def agrees(number, expected):
    if isinstance(expected, tuple):
        low, high = expected
        return low <= number <= high
    return f"{number:.{len(expected.partition('.')[2])}f}" == expected


@pytest.mark.parametrize("id", IDS)
def test_the_computed_numbers_are_correct(errata, id):
    """Each item computes the documented numbers, all of them and no others."""
    erratum = getattr(errata, id.lower())()
    assert erratum.id == id and erratum.claim and erratum.why
    assert erratum.computed.keys() == EXPECTED[id].keys()
    wrong = {name: x for name, x in erratum.computed.items() if not agrees(x, EXPECTED[id][name])}
    assert not wrong, {name: (x, EXPECTED[id][name]) for name, x in wrong.items()}


@pytest.mark.parametrize(
    "id, name, number",
    [
        ("E2", "ratio", 77),
        ("E4", "p1", 0.819),
        ("E5", "total", -0.41),
        ("E6", "sigma(1.7)", 0.845),
        ("E7", "loss", 0.555),
        ("E12", "DPO, GB", 28),
        ("E20", "sum", -0.735),
    ],
)
def test_a_claim_has_the_number_that_people_quote(errata, id, name, number):
    """A reader recognises a claim by its number."""
    assert getattr(errata, id.lower())().given[name] == number


def test_a_computed_number_differs_from_the_claim(errata):
    """A number that the script corrects is wrong by more than rounding."""
    same = {"E21": {"reward_w", "reward_l"}, "E19": {"accuracy"}}  # correct numbers, misread
    for id in IDS:
        erratum = getattr(errata, id.lower())()
        for name in (erratum.given.keys() & erratum.computed.keys()) - same.get(id, set()):
            assert abs(erratum.given[name] - erratum.computed[name]) > 4e-4, (id, name)


def test_each_item_is_there_once_and_printed(errata, capsys):
    """Every item is in the list once, and is printed in order under its id."""
    assert len(errata.ERRATA) == len(set(errata.ERRATA)) == len(IDS)
    errata.main()
    printed = capsys.readouterr().out
    first_words = [line.split()[0] for line in printed.splitlines() if line and not line.startswith(" ")]
    assert first_words == IDS


def test_the_answers_of_an_interview_are_computed(errata):
    """Every number below an answer in tutorials/WAYS.md is one that the script computes."""
    spans = re.findall(r"`(E\d+: .+?)`", (SCRIPT.parent / "WAYS.md").read_text())
    numbers = [re.fullmatch(r"(E\d+): (.+) = ([-\d.]+)", span).groups() for span in spans]
    items = {id: getattr(errata, id.lower())().computed for id in {id for id, _, _ in numbers}}
    wrong = [(id, name, items[id][name]) for id, name, number in numbers if not agrees(items[id][name], number)]
    assert len(numbers) > 20 and not wrong, wrong
