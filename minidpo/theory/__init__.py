"""The theory of DPO, executed: what can be enumerated, proved and broken on a laptop."""
