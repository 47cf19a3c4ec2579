# %% [markdown]
# # 17. The family of losses
#
# **Question.** DPO has many relatives. What does each of them ask of a pair, when is it satisfied, and with which
# policy?
#
# **Afterwards you can say**
# - how to read a loss from its slope: what it does to a pair that is right, and to one that is badly wrong;
# - how to derive the optimum of a loss from the share of labels that say w, and what wrong labels do to it;
# - why IPO, the hinge, cDPO and robust DPO end at four different policies, and which of them is pi*;
# - what changes without a reference, with means over tokens, with single replies, and with a likelihood term.
#
# **Predict first.** Two replies are compared very often, and nine labels in ten say w. With beta = 0.1, DPO, IPO and
# the hinge loss max(0, 1 - z) are each trained to their optimum. Then three in ten of all labels are flipped at random,
# and they are trained again. For two of the three losses the best margin shrinks to less than half. Which one does not
# move at all? And does cDPO, which was made for noisy labels, end nearer to DPO's first margin than DPO itself?
#
# **The formula.** Many losses depend on a pair only through z = beta * margin. Call such a loss L(z), and its slope
# L'(z). Let a share p of the labels say w. The others exchange w and l, so for them z becomes -z:
#
#     mean loss of the pair      p L(z) + (1 - p) L(-z)
#     its slope is 0 where       p L'(z) = (1 - p) L'(-z),     that is   L'(-z)/L'(z) = p/(1 - p)
#
# At the best z a wrong label pushes p/(1 - p) times as hard as a right one. With p = 0.9, nine right labels balance one
# wrong label. So look at the ratio of the two pushes: where does it reach 9?

# %%
import itertools
import pathlib

import numpy as np

from minidpo import exact, losses, plots
from minidpo.cli import table_of_losses
from minidpo.theory import equalities, optima

p, flip, gamma = 0.9, 0.3, 1.0

# %% [markdown]
# ## From NumPy alone: eight functions of one number
# The first five are functions of DPO's z.
#
# - **DPO**: -log sigma(z).
# - **cDPO**, conservative DPO, treats each label as if it were flipped with probability `flip`. The library calls this
#   number `label_smoothing` (Mitchell 2023).
# - **Robust DPO** removes flips (Chowdhury et al., arXiv 2403.00409): averaged over labels that are flipped with
#   probability `flip`, it is the DPO loss of the labels before the flips. 13 derives it in exercise 1.
# - **Hinge**, from SLiC (Zhao et al., arXiv 2305.10425): z = 1 is enough.
# - **IPO** (Azar et al., arXiv 2310.12036): (margin - 1/(2 beta))^2, which is (z - 1/2)^2/beta^2. The constant factor
#   does not move the minimum, so we leave it out here.
#
# The other three have a z of their own, and the last two have no reference.
#
# - **KTO** (Ethayarajh et al., arXiv 2402.01306) takes single replies, each with a label "desirable" or "undesirable":
#   sigma(-z) or sigma(z), with z = beta (log-ratio - reference point). The reference point is held fixed.
# - **SimPO** (Meng et al., arXiv 2405.14734): z = beta times the difference of the mean log-probabilities per token,
#   and L = -log sigma(z - gamma).
# - **ORPO** (Hong et al., arXiv 2403.07691): z is the difference of the log-odds log(P/(1 - P)), where log P is the mean
#   log-probability per token, and L = -log P_w - 0.1 log sigma(z). If there are only two replies, of one token each,
#   then P_l = 1 - P_w, so z = 2 log(P_w/P_l), and -log P_w = -log sigma(z/2).
#
# The slope is computed with a complex step, and the best z by bisection of the slope of the mean loss.


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
    "ORPO": lambda z: dpo(z / 2) + 0.1 * dpo(z),
}


def slope(loss, z, along=1.0):
    return loss(z + 1e-30j * along).imag / 1e-30


def best(loss, p):
    low, high = -30.0, 30.0
    for _ in range(100):
        middle = (low + high) / 2
        falls = p * slope(loss, middle) < (1 - p) * slope(loss, -middle)
        low, high = (middle, high) if falls else (low, middle)
    return low if low < 29 else np.inf  # still falling at 29: there is no minimum


with_flips = (1 - flip) * p + flip * (1 - p)
rows = {name: [slope(loss, z) for z in (-20, 0, 20)] for name, loss in one_pair.items()}
ends = {name: [best(loss, share) for share in (p, with_flips, 1)] for name, loss in one_pair.items()}
print(f"{'':<8}{'slope at z = -20':>18}{0:>8}{20:>8}{'best z: p = 0.9':>20}{'flipped':>10}{'p = 1':>8}")
for name in one_pair:
    cells = ["none" if z == np.inf else f"{z:.2f}" for z in ends[name]]
    print(f"{name:<8}{rows[name][0]:z18.2f}{rows[name][1]:8.2f}{rows[name][2]:z8.2f}" + "{:>20}{:>10}{:>8}".format(*cells))

# %% [markdown]
# ## What the slope says
# `flip` is 0.3. "Flipped" means that a share of 0.9 becomes 0.7 * 0.9 + 0.3 * 0.1 = 0.66.
#
#              reference   tokens   slope at z = -20       0      20    best z: p = 0.9   flipped   p = 1
#     DPO         yes       sum              -1.00     -0.50    0.00          2.20          0.66     none
#     cDPO        yes       sum              -0.70     -0.20    0.30          0.66          0.26     0.85
#     robust      yes       sum              -1.75     -1.25   -0.75          none          2.20     none
#     hinge       yes       sum              -1.00     -1.00    0.00          1.00          1.00     1.00
#     IPO         yes       sum             -41.00     -1.00   39.00          0.40          0.16     0.50
#     KTO         yes       sum               0.00     -0.25    0.00          none          none     none
#     SimPO       no        mean             -1.00     -0.73    0.00          3.10          1.15     none
#     ORPO        no        mean             -0.60     -0.30    0.00          4.05          1.15     none
#
# **A pair that is right, at z = 20.** DPO's slope is never 0, so DPO always asks for more, but ever more quietly. The
# hinge has finished. IPO and cDPO have a target, and push back. Robust DPO does not even become quiet: its loss falls
# without a lower bound.
#
# **A pair that is badly wrong, at z = -20.** DPO, the hinge, SimPO and ORPO push with a bounded force. IPO's force
# grows with the distance: this pair weighs as much as 41 pairs at z = 0. KTO gives up. A wrong label on a well learned
# pair makes it such a pair, so this column also says how hard a wrong label pulls.
#
# **Certain labels**, p = 1. Now L'(z) itself has to be 0 somewhere. It is for IPO, for cDPO and for the hinge, where
# everything above 1 is as good as 1. The others have no optimum. (SimPO's gamma is not a target: at z = gamma the slope
# is still -1/2.)
#
# **The optimum**, from L'(-z)/L'(z) = p/(1 - p):
#
#     DPO      the ratio is sigma(z)/sigma(-z) = e^z               z = log(p/(1 - p))
#     cDPO     is DPO with (1 - flip) p + flip (1 - p) for p       the log-odds of 0.66 instead of 0.9
#     robust   is DPO with (p - flip)/(1 - 2 flip) for p           0.66 becomes 0.9; but 0.9 becomes 1.5: no optimum
#     IPO      the ratio is (1/2 + z)/(1/2 - z)                    z = p - 1/2
#     hinge    the ratio is 1 below z = 1, and infinite above      z = 1 for every p between 1/2 and 1
#     KTO      the ratio is 1 everywhere, as L'(-z) = L'(z)        none: z grows for ever, if p is above 1/2
#
# DPO and IPO hear how sure the labels are. The hinge and KTO hear only the majority. ORPO asks two questions: its
# fine-tuning term wants sigma(z/2) = p, its odds term wants sigma(z) = p, and the best z lies between the two answers,
# 4.39 and 2.20. In the picture, look at the two ends of each slope.

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
            title = ("the loss of a pair", "its slope: below 0 it pushes z up, above 0 down")[column]
            axes.set(title=title, xlabel="z: wrong on the left, right on the right")
            axes.set_ylim(*((-1.6, 5.6), (-2, 1.2))[column])
        figure.savefig(path, dpi=120, metadata={"Software": None})


path = pathlib.Path("17_family.png")
if plots.installed():
    draw(path)
print(f"\npicture: {path.name}" if plots.installed() else "\nthe picture needs matplotlib (the `plot` extra)")

# %% [markdown]
# ## The answer to the prediction
# The hinge does not move: its best margin is 10 nats before the flips and after them. DPO goes from 22.0 nats to 6.6,
# and IPO from 4.0 to 1.6. The price of that calm is that the hinge would give the same 10 nats to a share of 0.51. And
# cDPO ends farther from 22.0 than DPO, at 2.6. It shrinks every margin, as if flips were still to come, and these
# labels are flipped already. Robust DPO is the one that returns to 22.0.

# %%
nats = {name: [z / 0.1 for z in each] for name, each in ends.items()}
assert [f"{each:.1f}" for name in ("hinge", "DPO", "IPO") for each in nats[name][:2]] == "10.0 10.0 22.0 6.6 4.0 1.6".split()
assert f"{nats['cDPO'][1]:.1f} {nats['robust'][1]:.1f} {best(one_pair['hinge'], 0.51) / 0.1:.1f}" == "2.6 22.0 10.0"

# %% [markdown]
# ## From pairs to a policy
# A policy of three replies has three pairs, but their z are not free: z_02 = z_01 + z_12. Can every pair have its best z
# at once? Take every ordered pair, with its share of labels p_ij = sigma(r_i - r_j) from Bradley-Terry.
#
# - **DPO**: the best z_ij is log(p_ij/p_ji) = r_i - r_j. These do add up, so the optimum is pi* = pi_ref exp(r/beta)/Z,
#   as in 08. For **robust DPO** the same holds on flipped labels.
# - **cDPO**: the log-odds of the smoothed shares do not add up. The optimum is a compromise, and not pi*.
# - **IPO**: p_ij - 1/2 does not add up either, but squares make the compromise easy. The derivative with respect to the
#   log-ratio of reply i is 0 where sum_j (z_ij - (p_ij - 1/2)) = 0. So beta * log-ratio_i is the mean of p_ij over j,
#   plus a constant. With a reply's win rate for that mean (against itself it wins half of the time), the optimum is
#   pi_ref exp(win rate/beta)/Z: RLHF's optimum, with win rates for rewards.
# - **Hinge**: its mean loss is made of straight pieces, and a lowest corner is where differences z are whole numbers.
#   Policies have levels: some replies tie, others are a step of 1/beta nats apart. We find it by trying a grid.
#
# Without a reference, pi_ref leaves the margin (06 and 07: that changes no direction of a push, only its size), and so
# it leaves the optimum: exp(r/beta)/Z. Where lengths divide, log pi_i/|y_i| takes the place of log pi_i. A likelihood
# term - log pi(w)/|y_w| looks at the level of log pi(w), which the margin does not contain (13). It pulls the policy
# towards how often each reply was chosen.
#
# The last row replaces the KL of RLHF's objective with another distance, the mean over pi_ref of f(pi/pi_ref). As in
# 08, a multiplier gives r - beta f'(pi/pi_ref) = lambda at the optimum. In a difference of two replies lambda cancels,
# so z = beta (f'(pi_w/pi_ref_w) - f'(pi_l/pi_ref_l)) (Wang et al., arXiv 2309.16240). f = u log u for u = pi/pi_ref is
# KL(pi || pi_ref), and gives DPO. f = -log u is the forward KL(pi_ref || pi), with f' = -1/u.

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


of_policy = {  # (..., 3) -> (..., 3, 3): log pi -> the loss of each ordered pair
    **{name: of_margin(one_pair[name]) for name in ("DPO", "cDPO", "robust", "hinge", "IPO")},
    "DPO, no reference": lambda logp: dpo(beta * differences(logp)),
    "SimPO": lambda logp: dpo(differences(2 * logp / tokens) - gamma),
    "ORPO": lambda logp: -(logp / tokens)[..., None] + 0.1 * dpo(differences(log_odds(logp / tokens))),
    "DPO + likelihood": lambda logp: of_margin(dpo)(logp) - (logp / tokens)[..., None],
    "DPO, forward KL": lambda logp: dpo(beta * differences(-np.exp(ref_logp - logp))),
}


def descent(loss, labels, steps=3000):
    s = ref_logp
    for _ in range(steps):
        s = s - 0.5 * slope(lambda s: (labels * loss(log_softmax(s))).sum(axis=(-1, -2)), s, np.eye(3))
    return log_softmax(s)


def on_a_grid(loss, labels):
    grid = np.array([(0, *rest) for rest in itertools.product(np.arange(-3, 3.25, 0.25), repeat=2)])  # beta * log-ratio
    logp = log_softmax(ref_logp + grid / beta)
    return logp[(labels * loss(logp)).sum(axis=(-1, -2)).argmin()]


labels = sigma(differences(reward)) * (1 - np.eye(3))  # (3, 3): how often i is preferred to j
flipped = (1 - flip) * labels + flip * labels.T
star = log_softmax(ref_logp + reward / beta)
policies = {}
print(f"\n{'three replies':<20}{'exact labels':>21}{'TV to pi*':>11}{'three in ten flipped':>24}{'TV':>8}")
for name, loss in of_policy.items():
    policies[name] = [(on_a_grid if name == "hinge" else descent)(loss, each) for each in (labels, flipped)]
    cells = [(np.exp(logp), exact.total_variation(logp, star)) for logp in policies[name]]
    print(f"{name:<20}" + "   ".join("{:8.3f}{:8.3f}{:8.3f}{:9.3f}".format(*pi, tv) for pi, tv in cells))
