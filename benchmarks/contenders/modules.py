"""The contender of PyTorch as its users write it: GPT-2 as modules, each batch padded to its longest text."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.contenders.pytorch import OnGPU
from benchmarks.workload import BETA, LEARNING_RATE, padded


class Block(nn.Module):
    """Attention and a hidden layer, each behind its norm, added to what comes in."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(n_embd, 3 * n_embd), "c_proj": nn.Linear(n_embd, n_embd)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(n_embd, 4 * n_embd), "c_proj": nn.Linear(4 * n_embd, n_embd)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.attn.c_attn(self.ln_1(x)).split(C, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Token ids to logits; the output matrix is the embedding."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config.n_embd, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def loaded(config, arrays):
    """A model with weights under GPT-2's names; those of `nn.Linear` are transposed."""
    net = GPT2(config)
    net.load_state_dict({name: torch.tensor(turned(name, x)) for name, x in arrays.items()})
    return net


def turned(name, array):
    return array.T if ".c_" in name and name.endswith("weight") else array


class Modules:
    """One padded batch; each step scores the reference again, without a graph."""

    device = "cpu"

    def __init__(self, work):
        torch.set_default_device(self.device)
        self.B = len(work.pairs)
        self.policy, self.reference = (loaded(work.config, each) for each in (work.policy, work.reference))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True)
        self.ids, self.labels, self.mask = map(torch.tensor, padded(work.pairs))

    def logps(self, net):
        logp = F.log_softmax(net(self.ids), -1).gather(-1, self.labels[..., None])[..., 0]
        return (logp * self.mask).sum(-1)

    def gradient(self):
        self.optimizer.zero_grad()
        with torch.no_grad():
            ref = self.logps(self.reference)
        log_ratio = self.logps(self.policy) - ref
        loss = -F.logsigmoid(BETA * (log_ratio[: self.B] - log_ratio[self.B :])).mean()
        loss.backward()
        return loss.item(), {name: turned(name, p.grad.cpu().numpy()) for name, p in self.policy.named_parameters()}

    def step(self):
        self.gradient()
        self.optimizer.step()


def versions():
    return {"torch": torch.__version__}


class ModulesOnGPU(OnGPU, Modules):
    pass


CONTENDERS = {"step": {"PyTorch modules, padded": Modules}, "gpu": {"PyTorch modules, padded": ModulesOnGPU}}
