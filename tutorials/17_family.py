# %% [markdown]
# # 17. The family of losses
#
# **Question.** DPO has many relatives. What does each of them ask of a pair, when is it satisfied, and with which
# policy?
#
# **Afterwards you can say**
# - how to read a loss from its slope: what it does to a pair that is correct, and to one that is badly wrong;
# - how to derive its optimum from the share of labels that say w, and what flipped labels do to it;
# - why IPO, the hinge, cDPO and robust DPO end at different policies, and which of them end at pi*;
# - what changes without a reference, with means over tokens, and with a likelihood term.
#
# **Predict first.** Two replies are compared very often, and nine labels in ten say w. With beta = 0.1, DPO, IPO and
# the hinge loss max(0, 1 - z) are each trained to their optimum. Then three in ten of all labels are flipped at random,
# and all three are trained again. For two of them the best margin shrinks to less than half. Which one does not move?
# And cDPO, which was made for noisy labels: does it end nearer to DPO's first margin than DPO itself?
#
# **The formula.** Many losses depend on a pair only through z = beta * margin. Call such a loss L(z), and its slope
# L'(z). Let a share p of the labels say w. The other labels exchange w and l, and turn z into -z:
#
#     mean loss of the pair      p L(z) + (1 - p) L(-z)
#     its slope is 0 where       p L'(z) = (1 - p) L'(-z),     that is   L'(-z)/L'(z) = p/(1 - p)
#
# So at the best z a label for l pushes p/(1 - p) times as hard as one for w. With p = 0.9 one label balances nine.
# For each loss, ask where the ratio reaches 9.

# %%
import pathlib

import numpy as np

from minidpo import Tensor, exact, losses, plots
from minidpo.cli import table_of_losses
from minidpo.theory import equalities, optima

p, flip, gamma = 0.9, 0.3, 1.0

# %% [markdown]
# ## From NumPy alone: seven functions of one number
# Five are functions of DPO's z. The last two have a z of their own.
#
# - **DPO**: -log sigma(z).
# - **cDPO**, conservative DPO, or `label_smoothing`, treats each label as if it were flipped with probability `flip`.
# - **Robust DPO** takes flips out (Chowdhury et al., arXiv 2403.00409). Its mean over labels that are flipped with
#   probability `flip` is the DPO loss before the flips (13, exercise 1).
# - **Hinge** (SLiC, Zhao et al., arXiv 2305.10425): z = 1 is enough.
# - **IPO** (Azar et al., arXiv 2310.12036): (margin - 1/(2 beta))^2 = (z - 1/2)^2/beta^2. We leave out the 1/beta^2.
# - **KTO** (Ethayarajh et al., arXiv 2402.01306) takes single replies. If one is labelled desirable, its loss is
#   sigma(-z), with z = beta (log-ratio - a number that we hold fixed). Otherwise it is sigma(z). Here p is the share of
#   "desirable".
# - **SimPO** (Meng et al., arXiv 2405.14734) has no reference. z is beta times the difference of the two mean
#   log-probabilities per token, and L = -log sigma(z - gamma).
#
# The code finds slopes with a complex step, and the best z by bisection. With `flip` = 0.3, a share of 0.9 becomes
# 0.7 * 0.9 + 0.3 * 0.1 = 0.66: column "flipped". (Its log-odds are also 0.66, by chance.)


# %%
def sigma(z):
    return 1 / (1 + np.exp(-z))


def dpo(z):
    return np.log1p(np.exp(-z))  # -log sigma(z)


one_pair = {
    "DPO": dpo,
    "cDPO": lambda z: (1 - flip) * dpo(z) + flip * dpo(-z),
    "robust": lambda z: ((1 - flip) * dpo(z) - flip * dpo(-z)) / (1 - 2 * flip),
    "hinge": lambda z: np.where(z.real < 1, 1 - z, 0),
    "IPO": lambda z: (z - 1 / 2) ** 2,
    "KTO": lambda z: sigma(-z),
    "SimPO": lambda z: dpo(z - gamma),
}


def slope(loss, z, along=1.0):
    return loss(z + 1e-30j * along).imag / 1e-30


def best(loss, p):
    low, high = -30.0, 30.0
    for _ in range(100):
        middle = (low + high) / 2
        falling = p * slope(loss, middle) < (1 - p) * slope(loss, -middle)
        low, high = (middle, high) if falling else (low, middle)
    return low if low < 29 else np.inf  # no minimum


TABLE = """
             slope at z = -20       0      20     best z: p = 0.9   flipped   p = 1    reference   tokens
DPO                     -1.00   -0.50    0.00                2.20      0.66    none       yes       sums
cDPO                    -0.70   -0.20    0.30                0.66      0.26    0.85       yes       sums
robust                  -1.75   -1.25   -0.75                none      2.20    none       yes       sums
hinge                   -1.00   -1.00    0.00                1.00      1.00    1.00       yes       sums
IPO                    -41.00   -1.00   39.00                0.40      0.16    0.50       yes       sums
KTO                      0.00   -0.25    0.00                none      none    none       yes       sums
SimPO                   -1.00   -0.73    0.00                3.10      1.15    none       no        means
"""
shares = (p, (1 - flip) * p + flip * (1 - p), 1)
ends = {name: [best(loss, share) for share in shares] for name, loss in one_pair.items()}
rows = TABLE.splitlines()[1:2]
for name, loss in one_pair.items():
    slopes = [slope(loss, z) for z in (-20, 0, 20)]
    cells = ["none" if z == np.inf else f"{z:.2f}" for z in ends[name]]
    facts = table_of_losses.facts({"cDPO": "dpo"}.get(name, name.lower()))  # a row of `python -m minidpo losses`
    cells = *slopes, *cells, facts.reference, facts.tokens
    rows.append(f"{name:<8}" + "{:z21.2f}{:8.2f}{:z8.2f}{:>20}{:>10}{:>8}       {:<10}{}".format(*cells))
print("\n".join(rows))
assert rows == TABLE.strip("\n").splitlines()

# %% [markdown]
# ## What the slope says
# **A pair that is correct, z = 20.** DPO's slope is never 0: DPO always asks for more, but ever more quietly. The hinge
# has finished. IPO and cDPO have a target, and push back. Robust DPO never becomes quiet: its loss has no lower bound.
#
# **A pair that is badly wrong, z = -20.** IPO's force grows with the distance: this pair weighs as much as 41 pairs at
# z = 0. All others push with a bounded force, and KTO's fades to nothing: it gives up. A well learned pair with a wrong
# label is such a pair, so this column also says how hard a wrong label pulls.
#
# **Certain labels, p = 1.** Now L'(z) has to be 0 somewhere. For IPO and cDPO it is at one z; for the hinge at
# every z from 1 on. SimPO's gamma is not a target: at z = gamma the slope is -1/2.
#
# **The optimum**, from L'(-z)/L'(z) = p/(1 - p):
#
#     DPO      sigma(z)/sigma(-z) = e^z                         z = log(p/(1 - p))
#     cDPO     DPO with (1 - flip) p + flip (1 - p) for p       log(0.66/0.34), not log 9
#     robust   DPO with (p - flip)/(1 - 2 flip) for p           0.66 becomes 0.9; but 0.9 becomes 1.5: no optimum
#     IPO      (1/2 + z)/(1/2 - z)                              z = p - 1/2
#     hinge    1 from z = -1 to 1, infinite above               z = 1 for every p between 1/2 and 1
#     KTO      1 everywhere, as L'(-z) = L'(z)                  none: for p above 1/2, z grows for ever
#     SimPO    (1 + e^(z - gamma))/(1 + e^(-z - gamma))         3.10, above log 9
#
# DPO and IPO hear how sure the labels are. The hinge and KTO hear only the majority. In the picture, z = -4 and 4 are
# nearly the ends of every slope but IPO's. SimPO is not drawn: it is DPO, moved right by gamma.

# %%
LOOKS = {  # dash, places of the name
    "DPO": ("-", (-3.9, 2.95), (1.6, -0.33)), "cDPO": ("--", (3.15, 1.5), (3.1, 0.37)),
    "robust": ("-.", (1.8, -0.95), (-3.9, -1.62)), "hinge": (":", (-3.9, 5.0), (-1.4, -1.15)),
    "IPO": ("-", (1.65, 3.0), (1.05, 0.7)), "KTO": ((0, (1, 3)), (-3.9, 0.55), (-3.3, 0.04)),
}  # fmt: skip


def draw(path):
    z = np.linspace(-4, 4, 801)
    with plots.figure(path, (6.4, 7.6)) as figure:
        for column, axes in enumerate(figure.subplots(2)):
            for color, (name, (dash, *places)) in zip(plots.PALETTE, LOOKS.items()):
                each = slope(one_pair[name], z) if column else one_pair[name](z)
                axes.plot(z, each, color=color, linestyle=dash, linewidth=2)
                axes.text(*places[column], name, color=color, fontsize=12, weight="bold")
            axes.axhline(0, color=plots.INK, linewidth=1)
            axes.set_ylim(*((-1.6, 5.6), (-2, 1.2))[column])
            title = ("the loss", "its slope: below 0 it pushes z up, above 0 down")[column]
            axes.set(title=title, xlabel="z: wrong on the left, correct on the right")


path = pathlib.Path("17_family.png")
if plots.installed():
    draw(path)
print(f"\npicture: {path.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The answer to the prediction
# The hinge does not move: 10 nats before and after. DPO goes from 22.0 nats to 6.6, and IPO from 4.0 to 1.6. But the
# hinge gives the same 10 nats to a share of 0.51. And cDPO ends farther from 22.0 than DPO, at 2.6. It shrinks every
# margin as if flips were still to come, but these labels are flipped already. Robust DPO returns to 22.0.

# %%
before_and_after = [ends[name][:2] for name in ("hinge", "DPO", "IPO")]
np.testing.assert_allclose(before_and_after, [[1.0, 1.0], [2.2, 0.66], [0.4, 0.16]], atol=0.005)
above, below = 1 + np.exp(np.array([1, -1]) * ends["SimPO"][0] - gamma)
np.testing.assert_allclose(above / below, 9, rtol=1e-9)
others = ends["cDPO"][1], ends["robust"][1], best(one_pair["hinge"], 0.51)
np.testing.assert_allclose(others, [0.26, 2.2, 1.0], atol=0.005)

# %% [markdown]
# ## From pairs to a policy
# A policy of three replies has three pairs, but their z are not free: z_02 = z_01 + z_12. Can every pair have its best
# z? Take all pairs, with shares p_ij = sigma(r_i - r_j) from Bradley-Terry.
#
# - **DPO**: the best z_ij is r_i - r_j. These add up, so the optimum is pi* = pi_ref exp(r/beta)/Z, as in 08. **Robust
#   DPO** has the same optimum on flipped labels.
# - **cDPO**: the log-odds of smoothed shares do not add up. The optimum is a compromise, and not pi*.
# - **IPO**: p_ij - 1/2 does not add up either, but with squares we can solve for the compromise. The derivative with
#   respect to the log-ratio of i is 0 where sum_j (z_ij - (p_ij - 1/2)) = 0. So beta * log-ratio of i is its win rate,
#   the mean of p_ij over j (with p_ii = 1/2), plus a constant. The optimum is pi_ref exp(win rate/beta)/Z: RLHF's
#   optimum, with win rates for rewards.
# - **Hinge**: its mean loss consists of flat pieces, so its lowest point is a corner. There each pair is tied or a
#   whole number apart in z. The code tries quarter steps.
#
# **A likelihood term**, -log pi(w)/|y_w| (NLL; Pang et al., arXiv 2404.19733), sees the level of log pi(w), which no
# margin contains (13, where |y_w| was 1). Alone, it would make pi proportional to how often a reply was chosen, divided
# by its tokens.
#
# **Without a reference**, a pair is pushed in the same direction (06, 07), but the pushes balance elsewhere: for DPO at
# exp(r/beta)/Z, whatever pi_ref was. SimPO puts log pi/|y| in the place of log pi. **ORPO** (Hong et al., arXiv
# 2403.07691) takes the log-odds of exp(log pi/|y|). It adds the likelihood term to 0.1 times -log sigma of their
# difference. It ends close to the optimum of the likelihood term alone.
#
# **Another distance** than the KL gives another z and another optimum: tutorial 12 measures three, in its rows "DPO
# under".

# %%
beta, ref_logp = 0.5, np.log([0.6, 0.3, 0.1])
reward, tokens = np.array([0, 0.4, 1.2]), np.array([1.0, 2, 4])


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def differences(r):  # (..., 3) -> (..., 3, 3)
    return r[..., :, None] - r[..., None, :]


def of_margin(loss):
    return lambda logp: loss(beta * differences(logp - ref_logp))


def log_odds(logp):
    return logp - np.log(1 - np.exp(logp))


def likelihood(logp):
    return -(logp / tokens)[..., None]


of_policy = {  # (..., 3) -> (..., 3, 3): log pi to the loss of each ordered pair
    **{name: of_margin(one_pair[name]) for name in ("DPO", "cDPO", "robust", "hinge", "IPO")},
    "DPO, no reference": lambda logp: dpo(beta * differences(logp)),
    "SimPO": lambda logp: dpo(2 * differences(logp / tokens) - gamma),
    "ORPO": lambda logp: likelihood(logp) + 0.1 * dpo(differences(log_odds(logp / tokens))),
    "DPO + likelihood": lambda logp: of_margin(dpo)(logp) + likelihood(logp),
}


def descent(loss, labels):
    s = ref_logp
    for _ in range(1000):
        s = s - slope(lambda s: (labels * loss(log_softmax(s))).sum(axis=(-1, -2)), s, np.eye(len(s)))
    return log_softmax(s)


def on_a_grid(loss, labels):
    z = np.array([*np.ndindex(1, 25, 25)]) / 4 - [0, 3, 3]  # (625, 3)
    logp = log_softmax(ref_logp + z / beta)
    return logp[(labels * loss(logp)).sum(axis=(-1, -2)).argmin()]


OPTIMA = """
                      exact labels: pi     TV to pi*    three in ten flipped: pi     TV
DPO                  0.253  0.282  0.465    0.000         0.481  0.324  0.195    0.270
cDPO                 0.481  0.324  0.195    0.270         0.556  0.313  0.132    0.333
robust               none                                 0.253  0.282  0.465    0.000
hinge                0.366  0.183  0.451    0.113         0.366  0.183  0.451    0.113
IPO                  0.529  0.318  0.153    0.312         0.573  0.308  0.119    0.346
DPO, no reference    0.070  0.156  0.774    0.309         0.209  0.281  0.510    0.045
SimPO                0.312  0.191  0.497    0.091         0.469  0.288  0.243    0.222
ORPO                 0.437  0.309  0.254    0.212         0.523  0.298  0.179    0.286
DPO + likelihood     0.392  0.307  0.301    0.164         0.513  0.301  0.185    0.280
"""
labels = sigma(differences(reward)) * (1 - np.eye(3))  # p_ij
flipped = (1 - flip) * labels + flip * labels.T
star = log_softmax(ref_logp + reward / beta)
policies, rows = {}, OPTIMA.splitlines()[1:2]
for name, loss in of_policy.items():
    policies[name] = [(on_a_grid if name == "hinge" else descent)(loss, each) for each in (labels, flipped)]
    cells = []
    for logp in policies[name]:
        numbers = "{:.3f}  {:.3f}  {:.3f}    {:.3f}".format(*np.exp(logp), exact.total_variation(logp, star))
        cells.append("none" if logp.max() > -0.001 else numbers)  # one reply gets everything
    rows.append(f"{name:<21}{cells[0]:<37}{cells[1]}")
print("\n" + "\n".join(rows))
assert rows == OPTIMA.strip("\n").splitlines()

# %% [markdown]
# The hinge ties replies 0 and 1, and puts reply 2 one step above them, with flips and without. IPO stays closer to
# pi_ref than DPO, because win rates differ less than rewards: beta means something else in each loss. SimPO gives
# reply 1 more than reply 0 per token, but reply 1 has two tokens, and gets less. The 0.045 without a reference and
# SimPO's 0.091 are luck: reverse pi_ref, which neither sees, and they are 0.386 and 0.399.
#
# ## The library's version
# `python -m minidpo losses` lists all. Ours have the same values and gradients.

# %%
library = {  # name in the library, beta, options
    "DPO": ("dpo", beta, {}), "cDPO": ("dpo", beta, {"label_smoothing": flip}), "hinge": ("hinge", beta, {}),
    "robust": ("robust", beta, {"label_smoothing": flip}), "IPO": ("ipo", beta, {}), "ORPO": ("orpo", 0.1, {}),
    "DPO, no reference": ("reference_free", beta, {}), "SimPO": ("simpo", 2.0, {"gamma": gamma}),
    "DPO + likelihood": ("dpo_nll", beta, {}),
}  # fmt: skip
w, l = np.nonzero(1 - np.eye(3))


def mean_loss(name):
    return lambda logp: of_policy[name](logp)[..., w, l].mean(axis=-1) / (beta**2 if name == "IPO" else 1)


for name, (theirs, its_beta, options) in library.items():
    leaf, lengths = Tensor(star, requires_grad=True), (tokens[w], tokens[l])
    out = losses.Choice(theirs, options)(leaf[w], leaf[l], ref_logp[w], ref_logp[l], its_beta, *lengths)
    out.loss.backward()
    np.testing.assert_allclose(out.loss.item(), mean_loss(name)(star), rtol=1e-12)
    np.testing.assert_allclose(leaf.grad, slope(mean_loss(name), star, np.eye(3)), rtol=1e-9, atol=1e-12)

z = np.linspace(-3, 3, 8)
closed = losses.LOSSES["kto"].gradient(z / beta, 0 * z, z > -9, 0.0, beta=beta)[0]
np.testing.assert_allclose(8 * closed, beta * slope(one_pair["KTO"], z), rtol=1e-9)

world = equalities.World([[0]], [[1]] * 3, reward[None], ref_logp[None])
by_win_rates = log_softmax(ref_logp + labels.mean(axis=1) / beta)
np.testing.assert_allclose(policies["IPO"][0], by_win_rates, atol=1e-9)
np.testing.assert_allclose(optima.ipo_optimum(world, labels[None], beta)[0], by_win_rates, atol=1e-9)
np.testing.assert_allclose(policies["robust"][1], exact.optimum(ref_logp, reward, beta)[0], atol=1e-9)
np.testing.assert_allclose(differences(policies["hinge"][1] - ref_logp)[0], [0, 0, -1 / beta], atol=1e-9)
np.testing.assert_allclose(policies["DPO, no reference"][0], log_softmax(reward / beta), atol=1e-9)
assert exact.kl(by_win_rates, ref_logp) < exact.kl(star, ref_logp)
alone = log_softmax(np.log(labels.sum(axis=1) / tokens))
np.testing.assert_allclose(descent(likelihood, labels), alone, atol=1e-9)
assert exact.total_variation(policies["ORPO"][0], alone) < 0.01
lucky = np.array([policies["DPO, no reference"][1], policies["SimPO"][0]])
elsewhere = exact.total_variation(lucky, log_softmax(ref_logp[::-1] + reward / beta))
np.testing.assert_allclose(elsewhere, [0.386, 0.399], atol=5e-4)
assert np.all(np.diff(policies["SimPO"][0] / tokens) > 0) and round(slope(one_pair["SimPO"], gamma), 9) == -1 / 2

# %% [markdown]
# ## What was shown
# The two ends of the slope tell what a loss does with certain labels and wrong ones. The ratio L'(-z)/L'(z) tells what
# it wants. DPO wants pi*, and so does robust DPO, if it knows the share of flips. IPO wants RLHF's optimum for win
# rates, the hinge wants steps, and cDPO wants less than DPO. These are optima of free tables.
# [benchmarks/README.md](../benchmarks/README.md#eight-losses) trains transformers with eight losses, briefly.
#
# ## Exercises
# 1. By hand: of two replies, 0 beats 1 in nine cases of ten, so IPO's best z_01 is 0.4. A third reply joins and always
#    loses. All pairs are equally frequent. What becomes of z_01? And under DPO?
# 2. Predict, then measure: two replies are equally good, so each gets half of the labels, but one has one token and the
#    other has two. There is no other reply. Which probabilities does SimPO, which is length-normalised, give them?
# 3. Find the bug: somebody writes robust DPO with a plus instead of the minus. Which loss is it? Where does it end on
#    flipped labels? Which values of the loss give it away?

# %%
print("\n17: flips do not move the hinge, robust DPO finds pi*, IPO wants win rates")

# %% [markdown]
# ## Solutions
# 1. The win rates are (1/2 + 0.9 + 1)/3 and (0.1 + 1/2 + 1)/3. They differ by 0.8/3, so z_01 falls to 0.27: against the
#    third reply the two are equal, and IPO averages that in. Under DPO z_01 tends to log 9 as before. The third reply
#    falls for ever.
# 2. 0.618 to the short one and 0.382 to the long one. With equal labels z = 0, so both have the same probability per
#    token. If it is p, then p + p^2 = 1: the golden ratio. Equal per token is not equal per reply. DPO would leave the
#    reference as it is.
# 3. It is cDPO divided by 1 - 2 flip, and ends at 0.26 instead of 2.20. Robust DPO's loss becomes negative for large z.
#    A sum of positive terms cannot.

# %%
beats = np.array([[0, 0.9, 1], [0.1, 0, 1], [0, 0, 0]])
z_01 = [beta * differences(descent(of_policy[name], beats) - ref_logp)[0, 1] for name in ("IPO", "DPO")]
np.testing.assert_allclose(z_01, [0.8 / 3, np.log(9)], atol=0.02)

ref_logp, lengths = np.log([0.5, 0.5]), np.array([1, 2])
simpo = descent(lambda logp: dpo(2 * differences(logp / lengths) - gamma), 1 - np.eye(2))
np.testing.assert_allclose(np.exp(simpo), [0.618, 0.382], atol=5e-4)


def with_plus(z):
    return ((1 - flip) * dpo(z) + flip * dpo(-z)) / (1 - 2 * flip)


np.testing.assert_allclose(best(with_plus, shares[1]), ends["cDPO"][1], rtol=1e-9)
assert one_pair["robust"](3.0) < 0 < with_plus(z).min()
