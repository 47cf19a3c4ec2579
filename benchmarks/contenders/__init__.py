"""A DPO step and sampling in each library, a file for minidpo, one for PyTorch and one for three others."""
