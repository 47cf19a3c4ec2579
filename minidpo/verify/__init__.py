"""What verifies code against independent oracles; random arguments for every operation; what a training log says."""

from .doctor import doctor as doctor
