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
# - what changes without a reference, with means over tokens, with single replies, and with a likelihood term.
#
# **Predict first.** Two replies are compared very often, and nine labels in ten say w. With beta = 0.1, DPO, IPO and
# the hinge loss max(0, 1 - z) are each trained to their optimum. Then three in ten of all labels are flipped at random,
# and all three are trained again. For two of them the best margin shrinks to less than half. Which one does not move at
# all? And cDPO, which was made for noisy labels: does it end nearer to DPO's first margin than DPO itself?
#
# **The formula.** Many losses depend on a pair only through z = beta * margin. Call such a loss L(z), and its slope
# L'(z). Let a share p of the labels say w. The other labels exchange w and l, and turn z into -z:
#
#     mean loss of the pair      p L(z) + (1 - p) L(-z)
#     its slope is 0 where       p L'(z) = (1 - p) L'(-z),     that is   L'(-z)/L'(z) = p/(1 - p)
#
# So at the best z a label for l pushes p/(1 - p) times as hard as a label for w. With p = 0.9, nine labels for w
# balance one for l. For each loss, look at the ratio of these two pushes: where does it reach 9?

# %%
import itertools
import pathlib

import numpy as np

from minidpo import Tensor, exact, losses, plots
from minidpo.cli import table_of_losses
from minidpo.theory import equalities, optima

p, flip, gamma = 0.9, 0.3, 1.0

# %% [markdown]
# ## From NumPy alone: seven functions of one number
# Five are functions of DPO's z.
#
# - **DPO**: -log sigma(z).
# - **cDPO**, conservative DPO, treats each label as if it were flipped with probability `flip` (Mitchell 2023). In the
#   library it is DPO with `label_smoothing`.
# - **Robust DPO** takes flips out (Chowdhury et al., arXiv 2403.00409). Its mean over labels that are flipped with
#   probability `flip` is the DPO loss before the flips (13, exercise 1).
# - **Hinge** (SLiC, Zhao et al., arXiv 2305.10425): z = 1 is enough.
# - **IPO** (Azar et al., arXiv 2310.12036): (margin - 1/(2 beta))^2, which is (z - 1/2)^2/beta^2. The factor 1/beta^2
#   does not move the minimum, so we leave it out.
#
# Two have a z of their own.
#
# - **KTO** (Ethayarajh et al., arXiv 2402.01306) takes single replies. The loss of a reply labelled desirable is
#   sigma(-z), with z = beta (log-ratio - reference point); otherwise sigma(z). We hold the reference point fixed.
# - **SimPO** (Meng et al., arXiv 2405.14734) has no reference. z is beta times the difference of the two mean
#   log-probabilities per token, and L = -log sigma(z - gamma).
#
# The code finds slopes with a complex step, and the best z by bisection. `flip` is 0.3. In the column "flipped", the
# share of 0.9 has become 0.7 * 0.9 + 0.3 * 0.1 = 0.66.


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
        falls = p * slope(loss, middle) < (1 - p) * slope(loss, -middle)
        low, high = (middle, high) if falls else (low, middle)
    return low if low < 29 else np.inf  # still falling at 29: no minimum


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
    cells += [facts.reference, facts.tokens]
    rows.append(f"{name:<8}" + "{:z21.2f}{:8.2f}{:z8.2f}{:>20}{:>10}{:>8}       {:<10}{}".format(*slopes, *cells))
print("\n".join(rows))
assert rows == TABLE.strip("\n").splitlines()

# %% [markdown]
# ## What the slope says
# **A pair that is correct, z = 20.** DPO's slope is never 0, so DPO always asks for more, but ever more quietly. The
# hinge has finished. IPO and cDPO have a target, and push back. Robust DPO does not even become quiet: its loss falls
# without a lower bound.
#
# **A pair that is badly wrong, z = -20.** DPO, the hinge and SimPO push with a bounded force. IPO's force grows with
# the distance: this pair weighs as much as 41 pairs at z = 0. KTO gives up. A wrong label on a well learned pair is
# such a case, so this column also says how hard a wrong label pulls.
#
# **Certain labels, p = 1.** Now L'(z) itself has to be 0 somewhere. It is for IPO, for cDPO and for the hinge, where
# everything above 1 is as good as 1. The others have no optimum. SimPO's gamma is not a target: at z = gamma the slope
# is -1/2.
#
# **The optimum**, from L'(-z)/L'(z) = p/(1 - p):
#
#     DPO      the ratio is sigma(z)/sigma(-z) = e^z               z = log(p/(1 - p))
#     cDPO     is DPO with (1 - flip) p + flip (1 - p) for p       the log-odds of 0.66 instead of 0.9
#     robust   is DPO with (p - flip)/(1 - 2 flip) for p           0.66 becomes 0.9; but 0.9 becomes 1.5: no optimum
#     IPO      the ratio is (1/2 + z)/(1/2 - z)                    z = p - 1/2
#     hinge    the ratio is 1 below z = 1, and infinite above      z = 1 for every p between 1/2 and 1
#     KTO      the ratio is 1 everywhere, as L'(-z) = L'(z)        none: for p above 1/2, z grows for ever
#
# DPO and IPO hear how sure the labels are. The hinge and KTO hear only the majority. In the picture, look at the two
# ends of each slope.

# %%
LOOKS = {  # dash, and where the name is: beside the loss, beside the slope
    "DPO": ("-", (-3.9, 2.95), (1.6, -0.33)), "cDPO": ("--", (3.15, 1.5), (3.1, 0.37)),
    "robust": ("-.", (-2.55, 4.9), (-3.9, -1.62)), "hinge": (":", (-3.9, 5.0), (-1.4, -1.15)),
    "IPO": ("-", (1.65, 3.0), (1.05, 0.7)), "KTO": ((0, (1, 3)), (-3.9, 0.55), (-3.3, 0.04)),
}  # fmt: skip


def draw(path):
    import matplotlib
    from matplotlib.figure import Figure

    z = np.linspace(-4, 4, 801)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 7.6), layout="constrained")
        for column, axes in enumerate(figure.subplots(2)):
            for color, (name, (dash, *places)) in zip(plots.PALETTE, LOOKS.items()):
                each = slope(one_pair[name], z) if column else one_pair[name](z)
                axes.plot(z, each, color=color, linestyle=dash, linewidth=2)
                axes.text(*places[column], name, color=color, fontsize=12, weight="bold")
            axes.axhline(0, color=plots.INK, linewidth=1)
            axes.set_ylim(*((-1.6, 5.6), (-2, 1.2))[column])
            axes.set(title=("the loss", "its slope: below 0 it pushes z up, above 0 down")[column])
            axes.set(xlabel="z: wrong on the left, correct on the right")
        figure.savefig(path, dpi=120, metadata={"Software": None})


path = pathlib.Path("17_family.png")
if plots.installed():
    draw(path)
print(f"\npicture: {path.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The answer to the prediction
# The hinge does not move: its best margin is 10 nats before the flips and after them. DPO goes from 22.0 nats to 6.6,
# and IPO from 4.0 to 1.6. The hinge pays for it: it gives the same 10 nats to a share of 0.51. And cDPO ends farther
# from 22.0 than DPO does, at 2.6. It shrinks every margin as if flips were still to come, but these labels are flipped
# already. Robust DPO is the one that returns to 22.0.

# %%
nats = {name: [round(z / 0.1, 1) for z in each] for name, each in ends.items()}
assert (nats["hinge"][:2], nats["DPO"][:2], nats["IPO"][:2]) == ([10.0, 10.0], [22.0, 6.6], [4.0, 1.6])
assert (nats["cDPO"][1], nats["robust"][1], round(best(one_pair["hinge"], 0.51) / 0.1, 1)) == (2.6, 22.0, 10.0)

# %% [markdown]
# ## From pairs to a policy
# A policy of three replies has three pairs, but their z are not free: z_02 = z_01 + z_12. Can every pair have its best
# z? Take all pairs, with shares p_ij = sigma(r_i - r_j) from Bradley-Terry.
#
# - **DPO**: the best z_ij is r_i - r_j. These add up, so the optimum is pi* = pi_ref exp(r/beta)/Z, as in 08. So it is
#   for **robust DPO** on flipped labels.
# - **cDPO**: the log-odds of smoothed shares do not add up. The optimum is a compromise, and not pi*.
# - **IPO**: p_ij - 1/2 does not add up either, but with squares we can solve for the compromise. The derivative with
#   respect to the log-ratio of i is 0 where sum_j (z_ij - (p_ij - 1/2)) = 0. So beta * log-ratio of i is the mean of
#   p_ij over j, plus a constant. That mean is the reply's win rate (against itself it wins half of the time). The
#   optimum is pi_ref exp(win rate/beta)/Z: RLHF's optimum, with win rates for rewards.
# - **Hinge**: the mean loss is made of flat pieces. At its lowest corner replies either tie or differ by whole steps of
#   z. We find it on a grid.
#
# **Without a reference**, a pair is pushed in the same direction (06, 07), but the pushes balance elsewhere: for DPO at
# exp(r/beta)/Z, whatever pi_ref was. SimPO works with log pi/|y| instead of log pi. **ORPO** (Hong et al., arXiv
# 2403.07691) has no reference either. It adds fine-tuning on w, -log P_w, to 0.1 times -log sigma of a difference of
# log-odds log(P/(1 - P)), where log P = log pi/|y|.
#
# **A likelihood term**, -log pi(w)/|y_w| (NLL; Pang et al., arXiv 2404.19733), sees the level of log pi(w), which no
# margin contains (13). It pulls the policy towards how often each reply was chosen. **Another distance** than the KL
# gives another z, and another optimum: see the rows "DPO under" in tutorial 12.

# %%
beta, ref_logp = 0.5, np.log([0.6, 0.3, 0.1])
reward, tokens = np.array([0, 0.4, 1.2]), np.array([1.0, 2, 4])


def log_softmax(s):
    return s - np.log(np.exp(s).sum(axis=-1, keepdims=True))


def differences(r):  # r_i - r_j for all ordered pairs
    return r[..., :, None] - r[..., None, :]


def of_margin(loss):
    return lambda logp: loss(beta * differences(logp - ref_logp))


def log_odds(logp):
    return logp - np.log(1 - np.exp(logp))


of_policy = {  # log pi, (..., 3), to the loss of each ordered pair, (..., 3, 3)
    **{name: of_margin(one_pair[name]) for name in ("DPO", "cDPO", "robust", "hinge", "IPO")},
    "DPO, no reference": lambda logp: dpo(beta * differences(logp)),
    "SimPO": lambda logp: dpo(2 * differences(logp / tokens) - gamma),
    "ORPO": lambda logp: -(logp / tokens)[..., None] + 0.1 * dpo(differences(log_odds(logp / tokens))),
    "DPO + likelihood": lambda logp: of_margin(dpo)(logp) - (logp / tokens)[..., None],
}


def descent(loss, labels):
    s = ref_logp
    for _ in range(1000):
        s = s - slope(lambda s: (labels * loss(log_softmax(s))).sum(axis=(-1, -2)), s, np.eye(len(s)))
    return log_softmax(s)


def on_a_grid(loss, labels):
    z = np.array([(0, *rest) for rest in itertools.product(np.arange(-3, 3.25, 0.25), repeat=2)])
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
labels = sigma(differences(reward)) * (1 - np.eye(3))  # (3, 3): how often i is preferred to j
flipped = (1 - flip) * labels + flip * labels.T
star = log_softmax(ref_logp + reward / beta)
policies, rows = {}, OPTIMA.splitlines()[1:2]
for name, loss in of_policy.items():
    policies[name] = [(on_a_grid if name == "hinge" else descent)(loss, each) for each in (labels, flipped)]
    cells = []
    for logp in policies[name]:
        pi, tv = np.exp(logp), exact.total_variation(logp, star)
        none = pi.max() > 0.999  # one reply is getting everything, for ever
        cells.append("none" if none else "{:.3f}  {:.3f}  {:.3f}    {:.3f}".format(*pi, tv))
    rows.append(f"{name:<21}{cells[0]:<37}{cells[1]}")
print("\n" + "\n".join(rows))
assert rows == OPTIMA.strip("\n").splitlines()

# %% [markdown]
# cDPO on exact labels ends where DPO does on flipped ones: the shares are the same. The hinge ties replies 0 and 1, puts
# reply 2 one step above them, and does not notice the flips. At equal beta IPO stays much closer to pi_ref, because win
# rates differ less than rewards, so do not compare two losses at one beta. SimPO ranks reply 1 above 0 per token, but
# reply 1 has two tokens, and gets less. If another row is near pi*, that is luck of this world.
#
# ## The library's version
# `python -m minidpo losses` lists every member with formula and gradient. Here are our values and gradients against the
# library's, and two optima that it has in closed form.

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


assert library.keys() == of_policy.keys()
for name, (theirs, its_beta, options) in library.items():
    leaf, lengths = Tensor(star, requires_grad=True), (tokens[w], tokens[l])
    out = losses.Choice(theirs, options)(leaf[w], leaf[l], ref_logp[w], ref_logp[l], its_beta, *lengths)
    out.loss.backward()
    np.testing.assert_allclose(out.loss.item(), mean_loss(name)(star), rtol=1e-12)
    np.testing.assert_allclose(leaf.grad, slope(mean_loss(name), star, np.eye(3)), rtol=1e-9, atol=1e-12)

z = np.linspace(-3, 3, 8)
for sign in (1, -1):  # KTO: desirable replies, then others
    closed = losses.LOSSES["kto"].gradient(z / beta, 0 * z, np.full(8, sign == 1), 0.0, beta=beta)[0]
    np.testing.assert_allclose(8 * closed, sign * beta * slope(one_pair["KTO"], sign * z), rtol=1e-9)

world, wins = equalities.World([[0]], [[1]] * 3, reward[None], ref_logp[None]), labels + np.eye(3) / 2
for closed in (log_softmax(ref_logp + wins.mean(axis=1) / beta), optima.ipo_optimum(world, wins[None], beta)[0]):
    np.testing.assert_allclose(policies["IPO"][0], closed, atol=1e-9)
np.testing.assert_allclose(policies["robust"][1], exact.optimum(ref_logp, reward, beta)[0], atol=1e-9)
np.testing.assert_allclose(policies["DPO, no reference"][0], log_softmax(reward / beta), atol=1e-9)
np.testing.assert_allclose(policies["cDPO"][0], policies["DPO"][1], atol=1e-9)
per_token = policies["SimPO"][0] / tokens
assert np.all(np.diff(per_token) > 0) and abs(slope(one_pair["SimPO"], gamma) + 1 / 2) < 1e-12

# %% [markdown]
# ## What was shown
# The two ends of the slope tell what a loss does with certain labels and with wrong ones. The ratio L'(-z)/L'(z) tells
# what it wants. With Bradley-Terry labels DPO wants pi*, and so does robust DPO, if it knows how many are flipped. IPO
# wants RLHF's optimum for win rates, the hinge wants steps, and cDPO wants less than DPO. These are optima of free
# tables. What eight members do to a transformer in a short training is measured in
# [benchmarks/README.md](../benchmarks/README.md#eight-losses).
#
# ## Exercises
# 1. By hand: of two replies, 0 beats 1 in nine cases of ten, so IPO's best z_01 is 0.4. A third reply joins, which loses
#    to both every time. All pairs are equally frequent. What becomes of z_01? And under DPO?
# 2. Predict, then measure: two replies are equally good, so half of the labels say each, but one has one token and the
#    other two. There is no other reply. Which probabilities does SimPO, which is length-normalised, give to them?
# 3. Find the bug: somebody writes robust DPO with a plus instead of the minus. Nothing crashes, and the loss falls.
#    Which loss is it? Where does it end on the flipped labels? What in its values tells the two apart?
# 4. Derive: EXO (Ji et al., arXiv 2402.00856) has the slope sigma(z) sigma(-z) (z - target), where target is
#    log((1 - flip)/flip). What does it do to a pair that is badly wrong, and where is its optimum for a share p?

# %%
print("\n17: the hinge does not notice flips, cDPO shrinks margins twice, robust DPO finds pi*, IPO wants win rates")

# %% [markdown]
# ## Solutions
# 1. The win rates are (1/2 + 0.9 + 1)/3 and (0.1 + 1/2 + 1)/3. They differ by 0.8/3, so z_01 falls to 0.27: against the
#    third reply the two are equal, and IPO averages that in. Under DPO z_01 stays at log 9, as every pair can have its
#    own best z. (The third reply falls for ever.)
# 2. 0.618 to the short one and 0.382 to the long one. With equal labels z = 0, so both have the same probability per
#    token. Call it q. Then q + q^2 = 1, and q is the golden ratio. Equal per token is not equal per reply. DPO would
#    leave the reference as it is.
# 3. It is cDPO divided by 1 - 2 flip, and ends at 0.26 instead of 2.20. The loss of robust DPO becomes negative for
#    large z. The other is a sum of positive terms.
# 4. The slope vanishes there: EXO gives up, like KTO. L'(-z)/L'(z) = (target + z)/(target - z), which is p/(1 - p) at
#    z = (2p - 1) target: linear in p, as for IPO.

# %%
beats = np.array([[0, 0.9, 1], [0.1, 0, 1], [0, 0, 0]])
z_01 = {name: beta * differences(descent(of_policy[name], beats) - ref_logp)[0, 1] for name in ("IPO", "DPO")}
np.testing.assert_allclose(z_01["IPO"], 0.8 / 3, rtol=1e-9)
np.testing.assert_allclose(z_01["DPO"], np.log(9), atol=0.02)

ref_logp, lengths = np.log([0.5, 0.5]), np.array([1, 2])
simpo = descent(lambda logp: dpo(2 * differences(logp / lengths) - gamma), 1 - np.eye(2))
np.testing.assert_allclose(np.exp(simpo), [0.618, 0.382], atol=5e-4)


def with_plus(z):
    return ((1 - flip) * dpo(z) + flip * dpo(-z)) / (1 - 2 * flip)


np.testing.assert_allclose(best(with_plus, shares[1]), ends["cDPO"][1], rtol=1e-9)
assert one_pair["robust"](3.0) < 0 < with_plus(z).min()

target = np.log((1 - flip) / flip)
z = (2 * p - 1) * target * np.array([1, -1]), np.zeros(2)
at_best = losses.LOSSES["exo_pair"].gradient(*z, *np.zeros((2, 2)), beta=1.0, label_smoothing=flip)[0]
np.testing.assert_allclose(at_best[1] / at_best[0], p / (1 - p), rtol=1e-9)
