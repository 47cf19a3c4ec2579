"""What verifies code against independent oracles; here, random arguments for every operation."""

from .doctor import doctor as doctor
